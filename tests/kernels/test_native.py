"""The native loop is its NumPy twin, whatever the processor runs, the batch and the threads."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import _compiled, make_input, make_layers
from tolerances import FLOAT32_LOOP, NATIVE_LEVEL

from marnet_kernels.crowd import Crowd
from marnet_kernels.native import (
    KINDS,
    LoopLayer,
    NativeLoop,
    build,
    instruction_sets,
    layer_reference,
    library,
    loop_reference,
    why_missing,
)
from marnet_kernels.native import loop as loop_module
from marnet_kernels.native.loop import MOST_INPUTS, pack
from marnet_kernels.reverse_sampler import from_bits

__all__ = ["_compiled"]
SETS = {  # of the processors that the library is compiled for, best first
    "x86_64": ("avx512", "avxvnni", "avx2", "portable"),
    "aarch64": ("dotprod", "neon", "portable"),
}.get(platform.machine(), ("portable",))
TESTS = str(Path(__file__).parent.parent)
CARRIES = ("hidden", "feature")


def close(got, want, tolerance=FLOAT32_LOOP, of=""):
    bound = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=of)


# Against the twin, with every instruction set of this processor


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_image", [False, True])
def test_it_is_the_twin(carry, kind, by_image):
    layers = make_layers(kind, carry)
    inputs = make_input(layers, by_image=by_image)
    want = loop_reference(layers, *inputs)
    for instructions in instruction_sets():
        close(NativeLoop(layers, 1, instructions)(*inputs), want, of=instructions)


@pytest.mark.parametrize("carry", CARRIES)
def test_int8_is_the_twin_to_the_bit(carry):
    """Where the float products around the loop are exact: small integers, and an identity."""
    layers = make_layers("int8", carry, hidden=70, dim=70, given=30)
    rng = np.random.default_rng(0)
    whole = rng.integers(-3, 4, layers.condition.weight.shape).astype(np.float32)
    layers = replace(
        layers,
        mean=np.zeros(30, np.float32),
        std=np.full(30, 8, np.float32),
        condition=LoopLayer("fp32", whole),
        output=LoopLayer("fp32", np.eye(70, dtype=np.float32)),
    )
    x_v, *tables = make_input(layers, steps=20)
    x_v = np.round(x_v)
    want = loop_reference(layers, x_v, *tables)
    for instructions in instruction_sets():
        got = NativeLoop(layers, 1, instructions)(x_v, *tables)
        np.testing.assert_array_equal(got, want, err_msg=instructions)


@given(
    kind=st.sampled_from(KINDS),
    carry=st.sampled_from(CARRIES),
    hidden=st.integers(1, 200),
    dim=st.integers(1, 200),
    width=st.integers(1, 150),
    images=st.integers(1, 20),
    samples=st.integers(1, 4),
    steps=st.integers(1, 4),
    by_image=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_sizes(kind, carry, hidden, dim, width, images, samples, steps, by_image, threads):
    layers = make_layers(kind, carry, hidden=hidden, dim=dim, given=width)
    inputs = make_input(layers, images, samples, steps, by_image=by_image)
    loop = many_threads(layers, threads)
    got, want = loop(*inputs), loop_reference(layers, *inputs)
    assert got.shape == want.shape == (images, samples, dim)
    close(got, want, NATIVE_LEVEL if kind == "int8" else FLOAT32_LOOP)


def many_threads(layers, threads, instructions=None) -> NativeLoop:
    """A loop that uses so many threads, though it is too small for them."""
    loop = NativeLoop(layers, threads, instructions)
    loop.threads = lambda rows=1: threads
    return loop


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_weights_and_activations(kind):
    """Sums of the largest products, levels beyond the range, subnormal fp16."""
    layers = make_layers(kind, hidden=64, dim=64, given=64)
    if kind == "int8":
        weight = np.full((64, 64), 127, np.int8)
        weight[::2] = -127
        big = LoopLayer("int8", weight, None, np.full(64, 1e-3, np.float32))
    else:
        bits = layers.hidden2.weight.copy()
        bits[:, 0] = 1 if kind != "fp32" else 1e-40
        big = replace(layers.hidden2, weight=bits)
    layers = replace(layers, hidden2=big)
    x_v, coefficients, bias = make_input(layers)
    want = loop_reference(layers, x_v, coefficients, 100 * bias)
    for instructions in instruction_sets():
        got = NativeLoop(layers, 1, instructions)(x_v, coefficients, 100 * bias)
        close(got, want, of=instructions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_so_in_its_row(kind, bad):
    """An infinite value becomes one that is no number, or stays infinite."""
    layers = make_layers(kind)
    x_v, *tables = make_input(layers)
    good = NativeLoop(layers, 1)(x_v, *tables)
    x_v[1, 3] = bad
    for loop in (NativeLoop(layers, 1), partial(loop_reference, layers)):
        with np.errstate(invalid="ignore", over="ignore"):
            got = loop(x_v, *tables)
        assert not np.isfinite(got[1]).any()
        close(got[[0, 2]], good[[0, 2]], NATIVE_LEVEL)


def test_the_twin_of_a_layer_says_what_int8_means():
    weight = np.array([[127, -1, 3]], np.int8)
    layer = LoopLayer("int8", weight, np.float32([0.5]), np.float32([2]))
    x = np.float32([[1.25, -5, 122.5], [0, 0, 0]])  # half a step: 2 (a tie), -10, 245
    want = 2 * 0.5 * (2 * 127 - 10 * -1 + 245 * 3) + 0.5
    assert layer_reference(layer, x).tolist() == [[want], [0.5]]


def test_a_row_is_rounded_by_its_own_range_alone():
    """A row of large values leaves the others as they are, and one of nothing has no levels."""
    layers = make_layers("int8")
    x_v, coefficients, bias = make_input(layers, by_image=True)
    loop = NativeLoop(layers, 1)
    before = loop(x_v, coefficients, bias)
    bias[:, 1] *= 1e4
    x_v[2], bias[:, 2] = layers.mean, 0
    after = loop(x_v, coefficients, bias)
    np.testing.assert_array_equal(after[0], before[0])
    close(after, loop_reference(layers, x_v, coefficients, bias), NATIVE_LEVEL)


# Rows and threads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("carry", CARRIES)
def test_a_row_is_the_same_bits_in_every_batch(kind, carry):
    layers = make_layers(kind, carry)
    x_v, coefficients, bias = make_input(layers, images=21, samples=3)
    for instructions in instruction_sets():
        loop = NativeLoop(layers, 1, instructions)
        whole = loop(x_v, coefficients, bias)
        for count in (1, 2, 3, 5, 7):
            np.testing.assert_array_equal(loop(x_v[:count], coefficients, bias), whole[:count])
        np.testing.assert_array_equal(loop(x_v[::-1], coefficients, bias), whole[::-1])
        np.testing.assert_array_equal(loop(x_v, coefficients, bias[:, :, 1:2]), whole[:, 1:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("carry", CARRIES)
def test_threads_do_not_change_a_bit(kind, carry):
    layers = make_layers(kind, carry, hidden=200, dim=150)
    inputs = make_input(layers, images=9)
    for instructions in instruction_sets():
        want = many_threads(layers, 1, instructions)(*inputs)
        for threads in (2, 3, 8):
            got = many_threads(layers, threads, instructions)(*inputs)
            np.testing.assert_array_equal(got, want, err_msg=instructions)


def test_threads_are_those_that_are_asked_for_and_are_worth_it():
    small = NativeLoop(make_layers("int8"), 8)
    assert small.threads() == 1
    large = make_layers("fp32", hidden=512)
    assert NativeLoop(large, 8).threads() == 8
    assert NativeLoop(large, 1).threads() == 1


def learned(crowd: Crowd, jobs: int, asleep: float, wanted: int = 8) -> list[int]:
    """How many threads each of some jobs had, which all slept for a share of their time."""
    used = []
    for _ in range(jobs):
        used.append(crowd.most(wanted))
        crowd.learn(used[-1], asleep)
    return used


def test_threads_that_mostly_sleep_become_fewer_and_more_are_tried_again():
    crowd = Crowd()
    assert learned(crowd, 100, 0.3) == [8] * 100
    busy = learned(crowd, 100, 0.9)
    assert busy[:4] == [8, 8, 4, 4]
    assert busy[-1] == 1
    assert 1 < sum(busy) / len(busy) < 2  # 2 are tried now and then
    assert set(busy[10:]) == {1, 2}
    idle = learned(crowd, 3000, 0.1)
    assert idle == sorted(idle)
    assert idle[-1] == 8


def test_one_long_job_that_sleeps_is_enough():
    crowd = Crowd()
    crowd.learn(8, 0.9, seconds=0.3)
    assert crowd.most(8) == 4


def test_one_job_that_sleeps_changes_nothing():
    crowd = Crowd()
    for _ in range(20):
        assert learned(crowd, 1, 1.0) == [8]
        assert learned(crowd, 7, 0.1) == [8] * 7


def test_one_thread_never_becomes_fewer():
    assert learned(Crowd(), 100, 0.0, wanted=1) == [1] * 100


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_call_tells_for_which_share_of_the_time_its_threads_slept(threads, monkeypatch):
    told = []
    monkeypatch.setattr(loop_module, "_crowd", crowd := Crowd())
    monkeypatch.setattr(crowd, "learn", lambda *a: told.append(a))
    layers = make_layers("fp32", hidden=200)
    many_threads(layers, threads)(*make_input(layers))
    ((used, asleep),) = told
    assert used == threads
    assert 0 <= asleep < 1
    assert threads > 1 or asleep == 0


def test_callers_take_turns():
    layers = make_layers("fp16", hidden=200)
    inputs = make_input(layers)
    loops = [many_threads(layers, threads) for threads in (1, 2, 3, 2)]
    want = loops[0](*inputs)
    wrong = []

    def call(loop):
        for _ in range(20):
            got = loop(*inputs)
            wrong.extend(got[got != want])

    callers = [threading.Thread(target=call, args=(loop,)) for loop in loops]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# The life of the workers. In a process of its own, since the loops of other tests share them.

_LIFE = """
import numpy as np, sys
sys.path.insert(0, {tests!r})
from native import make_input, make_layers
from marnet_kernels.native import NativeLoop, library
workers = library().marnet_loop_workers
layers = make_layers("fp16", hidden=200)
inputs = make_input(layers)

def loop(threads):
    made = NativeLoop(layers, threads)
    made.threads = lambda rows=1: threads
    return made

"""


def run(script: str) -> str:
    code = _LIFE.format(tests=TESTS) + script
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_workers_start_with_the_first_call_that_wants_them_and_end_with_the_last_loop():
    said = run(
        """
one, two = loop(1), loop(3)
print(workers())
one(*inputs)
print(workers())
two(*inputs)
print(workers())
one.close()
print(workers())
del two
print(workers())
again = loop(2)
again(*inputs)
print(workers())
"""
    )
    assert said.split() == ["0", "0", "2", "2", "0", "1"]


def test_a_forked_child_starts_workers_of_its_own():
    said = run(
        """
import os
one = loop(2)
want = one(*inputs)
child = os.fork()
if not child:
    before = workers()
    same = np.array_equal(one(*inputs), want)
    print(before, workers(), same, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(workers(), np.array_equal(one(*inputs), want))
"""
    )
    assert said.splitlines() == ["0 1 True", "1 True"]


def test_a_child_forked_amid_a_call_is_not_kept_waiting():
    """Whoever has the pool at that moment is not there in the child to give it back."""
    said = run(
        """
import os, threading
one, other = loop(2), loop(2)
want = one(*inputs)
stop = []
def keep_busy():
    while not stop:
        other(*inputs)
busy = threading.Thread(target=keep_busy)
busy.start()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
for _ in range(10):
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(one(*inputs), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.append(1)
busy.join()
"""
    )
    assert said == ""


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((2, 3))}, r"weight: got float64 of shape \(2, 3\) for 'fp32'"),
        ({"kind": "fp8"}, r"expected a matrix .* of one of fp32, fp16, bf16, int8"),
        ({"kind": "fp16"}, r"16 bits come as uint16"),
        ({"bias": np.zeros(3, np.float32)}, r"bias: got \(3,\), expected \(2,\)"),
    ],
)
def test_a_layer_that_is_none_is_refused(change, message):
    good = {"kind": "fp32", "weight": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=message):
        LoopLayer(**good | change)


def test_an_int8_layer_without_scales_is_refused():
    with pytest.raises(ValueError, match="scale: got None for 'int8', expected a scale for each"):
        LoopLayer("int8", np.zeros((2, 3), np.int8))


def test_an_int8_layer_whose_sums_overflow_is_refused():
    weight = np.zeros((1, MOST_INPUTS + 1), np.int8)
    with pytest.raises(ValueError, match=rf"expected at most {MOST_INPUTS}, or sums overflow"):
        LoopLayer("int8", weight, None, np.ones(1, np.float32))


def test_layers_that_do_not_fit_are_refused_by_name():
    good, other = make_layers("fp32"), make_layers("fp32", "feature")
    wide = LoopLayer("fp32", np.zeros((70, 71), np.float32))
    with pytest.raises(ValueError, match=r"hidden3: got a matrix \(70, 71\), expected \(70, 70\)"):
        replace(good, hidden3=wide)
    with pytest.raises(ValueError, match="carry: got 40 outputs for 70 hidden ones and no layer"):
        replace(other, input=None)
    with pytest.raises(ValueError, match=r"std: got \(3,\), expected \(30,\)"):
        replace(good, std=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="output: got int8, expected a float type"):
        replace(good, output=make_layers("int8", hidden=40, dim=70).hidden2)


def test_arrays_that_do_not_fit_are_refused():
    layers = make_layers("fp32")
    loop = NativeLoop(layers)
    x_v, coefficients, bias = make_input(layers)
    for bad in (
        (x_v[:, 1:], coefficients, bias),
        (x_v[:0], coefficients, bias),
        (x_v, coefficients[1:], bias),
        (x_v, coefficients[:, :2], bias),
        (x_v, coefficients, bias[..., 1:]),
        (x_v, coefficients, np.repeat(bias, 2, axis=1)),
        (x_v, coefficients[:0], bias[:0]),
    ):
        with pytest.raises(ValueError, match="x_v, coefficients, bias: got shapes"):
            loop(*bad)


def test_instructions_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"instructions: got 'sse9', expected one of .*portable"):
        NativeLoop(make_layers("fp32"), 1, "sse9")


# Layout


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_packed_by_64_outputs(kind):
    layer = make_layers(kind, hidden=70).hidden2
    packed, together = pack(layer), 4 if kind == "int8" else 1
    assert packed.shape == (2, 128 // together, 64, together)
    for output, into in ((0, 0), (63, 5), (64, 69), (69, 7)):
        found = packed[output // 64, into // together, output % 64, into % together]
        assert found == layer.weight[output, into]
    assert np.count_nonzero(packed) == np.count_nonzero(layer.weight)


def test_bits_of_16_are_what_the_twin_reads():
    layer = make_layers("bf16").hidden2
    eye = np.eye(70, dtype=np.float32)
    zero = replace(layer, bias=None)
    np.testing.assert_array_equal(layer_reference(zero, eye).T, from_bits(layer.weight, "bf16"))


# The library


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A process that has not loaded the library yet, with an empty cache."""
    module = sys.modules["marnet_kernels.native.library"]
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(module, "file_name", lambda machine=None: "libmarnet_loop-test.so")
    monkeypatch.setattr(module, "_loaded", None)
    return tmp_path


def test_without_a_library_it_says_how_to_get_one(elsewhere):
    with pytest.raises(RuntimeError, match=r"the native loop is not compiled: .* run: make native"):
        library()
    assert "make native" in (why_missing() or "")


def test_without_a_compiler_it_says_so(elsewhere, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match="compiled with no-such-compiler, which is not installed"
    ):
        library(compile_it=True)


def test_a_compiler_that_refuses_is_quoted(elsewhere, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="false refuses the native loop: got exit code 1"):
        build(elsewhere)
    assert list(elsewhere.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(elsewhere, monkeypatch):
    (elsewhere / "native").write_text("a file")
    with pytest.raises(RuntimeError, match=r"cannot be kept in .*native .*set MARNET_CACHE"):
        library(compile_it=True)


def test_a_damaged_library_is_named(elsewhere):
    damaged = elsewhere / "native" / "libmarnet_loop-test.so"
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"cannot be loaded .* delete .*libmarnet_loop-test\.so"):
        library()


def test_the_library_needs_no_python_and_has_every_variant():
    lib = library()
    assert isinstance(lib, ctypes.CDLL)
    assert tuple(lib.marnet_loop_set(i).decode() for i in range(len(SETS))) == SETS
    assert lib.marnet_loop_set(len(SETS)) is None


# Other compilers, and sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_another_compiler_makes_is_the_twin(kind, carry, by_clang):
    layers = make_layers(kind, carry, hidden=200, dim=150)
    inputs = make_input(layers, images=9)
    want = loop_reference(layers, *inputs)
    tolerance = NATIVE_LEVEL if kind == "int8" else FLOAT32_LOOP
    for instructions in instruction_sets(by_clang):
        one, three = (NativeLoop(layers, n, instructions, by_clang) for n in (1, 3))
        three.threads = lambda rows=1: 3
        got = one(*inputs)
        close(got, want, tolerance)
        np.testing.assert_array_equal(three(*inputs), got)


@pytest.fixture(scope="module")
def by_clang(tmp_path_factory):
    """The library as clang++ compiles it, without a warning."""
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++: sudo apt install clang")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "clang++")
        lib = ctypes.CDLL(str(build(tmp_path_factory.mktemp("clang"), ["-Werror"])))
    lib.marnet_loop_set.restype = ctypes.c_char_p
    return lib


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(kind, tmp_path):
    flags = [f"-fsanitize={kind}", "-O1", "-g", "-fno-sanitize-recover=all"]
    built = build(tmp_path, flags)
    runtime = {"thread": "libtsan.so"}.get(kind, "libasan.so")
    preload = subprocess.run(
        [os.environ.get("CXX", "g++"), f"-print-file-name={runtime}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    script = _LIFE.format(tests=TESTS) + _UNDER_SANITIZERS
    done = subprocess.run(
        [sys.executable, "-c", script, str(built)],
        env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


_UNDER_SANITIZERS = """
import ctypes, threading
from marnet_kernels.native import KINDS, instruction_sets
lib = ctypes.CDLL(sys.argv[1])
lib.marnet_loop_set.restype = ctypes.c_char_p
for kind in KINDS:
    for carry in ("hidden", "feature"):
        layers = make_layers(kind, carry, hidden=130, dim=70)
        inputs = make_input(layers, images=9)
        for instructions in instruction_sets(lib):
            made = [NativeLoop(layers, n, instructions, lib) for n in (1, 3, 2)]
            for threads, one in zip((1, 3, 2), made):
                one.threads = lambda rows=1, threads=threads: threads
            callers = [threading.Thread(target=one, args=inputs) for one in made]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            for one in made:
                one.close()
print("done")
"""

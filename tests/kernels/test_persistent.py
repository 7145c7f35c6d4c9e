"""The persistent loop against its twin on the emulator and on a GPU, and what is refused."""

import ctypes
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from emulate import Cpu, emulate
from quick import kept
from tolerances import PERSISTENT, PERSISTENT_LAYER

from marnet_kernels import persistent
from marnet_kernels import reverse_sampler as rs
from marnet_kernels.compile import TARGETS, compile_cubin, source
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.persistent import (
    ReverseSampler,
    ReverseSamplerArguments,
    Variant,
    check_launch,
    choose_variant,
    cleared,
    shipped_options,
)

COUNTER, EPOCH = Variant(8, 2, "counter"), Variant(8, 2, "epoch", copies=2)
EIGHT = [COUNTER, EPOCH, Variant(8, 2, "epoch", groups=3)]
FOUR = Variant(16, 4, "epoch", copies=2)
SIXTEEN = [Variant(16, 2, "counter"), Variant(16, 2, "epoch")]


def name_of(variant):
    """Of a test's parameter."""
    return f"{variant.rows}-{variant.tiles}-{variant.exchange}-{variant.groups}"


@dataclass(eq=False)
class Loop:
    """Weights and inputs of one launch, all packed."""

    packed: rs.PackedLoop
    q: np.ndarray
    coefficients: np.ndarray
    bias: np.ndarray
    samples: int
    slope: float = 0.05

    @property
    def sizes(self):
        return {
            "images": len(self.q),
            "samples": self.samples,
            "noises": self.bias.shape[1],
            "steps": len(self.coefficients),
        }

    def twin(self, exchange="counter"):
        given = (self.packed, self.q, self.coefficients, self.bias, self.slope)
        return rs.reverse_sampler_reference(*given, exchange=exchange)


def weights(hidden, seed=0):
    """Random matrices and biases that keep activations of order 1, as keywords of pack."""
    rng = np.random.default_rng(seed)

    def matrix():
        return rng.standard_normal((hidden, hidden), np.float32) / np.float32(hidden**0.5)

    def bias():
        return rng.standard_normal(hidden, np.float32)

    return {"hidden2": (matrix(), bias()), "hidden3": (matrix(), bias()), "carry": matrix()}


def make(hidden, images, samples=1, noises=1, steps=3, dtype="fp16", seed=1):
    """A Loop of random inputs whose coefficients are not zero, C included."""
    rng = np.random.default_rng(seed)
    coefficients = rng.uniform(0.1, 0.5, (steps, 3))
    shape = (steps, noises, samples, hidden)
    q = rs.pack_condition(rng.standard_normal((images, hidden), np.float32))
    tables = rs.pack_tables(coefficients, rng.standard_normal(shape, np.float32))
    return Loop(rs.pack(**weights(hidden), dtype=dtype), q, *tables, samples)


def place(machine, loop):
    """Arguments for a loop, all on the machine. What is not given holds NaN, of odd parity."""
    given = {
        "weights": loop.packed.weights,
        "biases": loop.packed.biases,
        "coefficients": loop.coefficients,
        "bias": loop.bias,
        "condition": loop.q,
    }
    sizes = loop.packed.layout.buffers(**loop.sizes)
    for name, array in given.items():
        assert array.nbytes == sizes[name]
    memory = {
        name: machine.put(given[name]) if name in given else machine.empty(size)
        for name, size in sizes.items()
    }
    return ReverseSamplerArguments(**loop.sizes, **memory, slope=loop.slope)


def launch(machine, plan, variant, arguments, seed=0):
    """One launch, and its end."""
    if isinstance(machine, Cpu):
        check_launch(plan, variant, arguments)
        for address, nbytes in cleared(plan, variant, arguments):
            ctypes.memset(address, 0, nbytes)
        emulate("reverse_sampler", variant.options(plan)).launch(
            "reverse_sampler",
            arguments._parameters(),
            grid=variant.grid(plan),
            block=plan.threads,
            shared=variant.shared_bytes,
            seed=seed,
        )
    else:
        ReverseSampler(plan, variant).launch(int(machine.stream), arguments)
        machine.wait()


def output(machine, arguments, plan):
    shape = (arguments.images, arguments.samples, plan.padded)
    return machine.get(arguments.out, shape)


def run(machine, loop, variant, seed=0):
    """h3 of the last step [B, K, H]; checks that its padding is zero, where the rest is finite."""
    plan, arguments = loop.packed.layout, place(machine, loop)
    launch(machine, plan, variant, arguments, seed)
    got = output(machine, arguments, plan)
    finite = np.isfinite(got).all(axis=-1)
    assert not got[finite][..., plan.hidden :].any()
    return got[..., : plan.hidden]


def assert_same(machine, got, want, tolerance):
    """To the bit on the emulator, which adds as the twin does."""
    if isinstance(machine, Cpu):
        np.testing.assert_array_equal(got, want)
    else:
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


# Each layer


def alone(layer, steps, dtype="fp16"):
    """A loop in which the other matrices are the identity, and biases and tables mostly zero."""
    hidden, images = 250, 5
    loop, one = make(hidden, images, steps=steps, dtype=dtype), np.eye(hidden, dtype=np.float32)
    given = weights(hidden)
    zeros = np.zeros(hidden, np.float32)
    for name in ("hidden2", "hidden3"):
        given[name] = given[name] if name == layer else (one, zeros)
    given["carry"] = given["carry"] if layer == "carry" else one
    loop.packed = rs.pack(**given, dtype=dtype)
    loop.bias[...] = 0
    loop.slope = 1.0
    return loop


@pytest.mark.parametrize("variant", [COUNTER, EPOCH, Variant(16, 1, "counter")], ids=name_of)
def test_layer_hidden3_alone(machine, variant):
    """h1 and h2 are the input, rounded; what comes out is the product, not rounded."""
    loop = alone("hidden3", steps=1)
    want = rs.layer_reference(loop.packed, "hidden3", loop.q, 1.0, exchange=variant.exchange)
    got = run(machine, loop, variant)[:, 0]
    np.testing.assert_allclose(
        got, want[:, :250], rtol=0, atol=PERSISTENT_LAYER * np.abs(want).max()
    )


@pytest.mark.parametrize("layer", ["hidden2", "carry"])
@pytest.mark.parametrize("variant", [COUNTER, EPOCH], ids=name_of)
def test_other_layers_alone(machine, variant, layer):
    """What comes out was rounded on the way, so a sum next to a tie may differ by one unit."""
    loop = alone(layer, steps=1 if layer == "hidden2" else 2)
    loop.coefficients[0] = 0, 1, 0, 0
    exchange = variant.exchange
    want = rs.layer_reference(loop.packed, layer, loop.q, 1.0, exchange=exchange)
    if layer == "carry":
        want += loop.q
    want = rs._exchanged(want, "fp16", exchange)[:, :250]
    unit = 2**-9 if exchange == "epoch" else 2**-10
    got = run(machine, loop, variant)[:, 0]
    np.testing.assert_allclose(got, want, rtol=unit, atol=1e-6)
    assert np.mean(got != want) < 0.02


@pytest.mark.parametrize("column", [0, 1, 2])
def test_each_coefficient_alone(machine, column):
    """After step 0 the state is B g; then it is A, B or C of step 1 alone."""
    loop = make(250, 3, steps=3)
    loop.coefficients[:] = 0
    loop.coefficients[0, 1] = loop.coefficients[1, column] = 0.75
    for variant in (COUNTER, EPOCH):
        got = run(machine, loop, variant)[:, 0]
        assert_same(machine, got, loop.twin(variant.exchange)[:, 0], PERSISTENT["fp16"])
    without = replace(loop, coefficients=np.zeros_like(loop.coefficients)).twin()
    assert np.abs(loop.twin() - without).max() > 0.1  # it is seen at all


# End to end


SHAPES = {
    "one row": ((250, 1), {"steps": 5}, Variant(8, 2, "counter")),
    "one row, epoch": ((250, 1), {"steps": 5}, EPOCH),
    "one step": ((250, 3), {"steps": 1}, EPOCH),
    "two rows, epoch": ((256, 2), {"steps": 4}, Variant(8, 2, "epoch")),
    "7 rows": ((257, 7), {}, COUNTER),
    "7 rows, epoch": ((257, 7), {}, EPOCH),
    "16 rows, one tile": ((600, 16), {}, Variant(16, 1, "counter", copies=2)),
    "16 rows, one tile, epoch": ((600, 16), {}, Variant(16, 1, "epoch")),
    "16 rows, wide": ((1024, 16), {}, Variant(8, 2, "counter", groups=2)),
    "16 rows, wide, epoch": ((1000, 16), {}, Variant(8, 2, "epoch", copies=2, groups=2)),
    "17 rows": ((250, 17), {"steps": 6}, Variant(32, 2, "counter")),
    "17 rows in 2 groups": ((250, 17), {}, Variant(16, 2, "counter", groups=2)),
    "33 rows": ((257, 33), {}, Variant(64, 2, "counter")),
    "33 rows in 5 groups, epoch": ((250, 33), {}, Variant(8, 2, "epoch", groups=5)),
    "64 rows": ((600, 64), {}, Variant(64, 2, "counter")),
    "64 rows, wide": ((1024, 64), {"steps": 2}, Variant(32, 2, "counter", groups=2)),
    "64 rows, epoch": ((600, 64), {}, Variant(32, 2, "epoch", groups=2)),
    "16 rows, four tiles": ((1024, 16), {}, Variant(16, 4, "counter")),
    "33 rows, four tiles": ((600, 33), {}, Variant(64, 4, "counter")),
    "9 rows, four tiles, epoch": ((250, 9), {"steps": 4}, Variant(16, 4, "epoch", copies=2)),
    "64 rows, four tiles": ((1024, 64), {"steps": 2}, Variant(16, 4, "counter", groups=4)),
    "more groups than rows": ((250, 3), {}, Variant(8, 2, "counter", groups=7)),
    "samples": ((250, 3, 7), {}, Variant(32, 2, "counter")),
    "samples in groups": ((250, 3, 7), {}, Variant(8, 2, "epoch", groups=4)),
    "noise of each image": ((250, 5, 1, 5), {}, COUNTER),
    "and samples": ((250, 5, 3, 5), {}, Variant(16, 2, "counter")),
    "bf16": ((257, 7), {"dtype": "bf16"}, COUNTER),
    "bf16, samples": ((250, 5, 3, 5), {"dtype": "bf16"}, Variant(16, 1, "counter")),
}  # fmt: skip


QUICK = {
    "one row, epoch",
    "7 rows",
    "16 rows, one tile, epoch",
    "33 rows in 5 groups, epoch",
    "64 rows, four tiles",
    "samples",
    "and samples",
    "bf16",
}


@pytest.mark.parametrize("name", kept(SHAPES, QUICK))
def test_kernel_matches_its_twin(machine, name):
    sizes, more, variant = SHAPES[name]
    loop = make(*sizes, **more)
    got, want = run(machine, loop, variant), loop.twin(variant.exchange)
    assert_same(machine, got, want, PERSISTENT[loop.packed.layout.dtype])


@pytest.mark.parametrize("sampler", kept(["ddpm", "ddim", "dpmpp"], {"dpmpp"}))
def test_every_sampler(machine, sampler):
    diffusion = pytest.importorskip("marnet_train.diffusion", exc_type=ImportError)
    steps = 8
    table = diffusion.sampler_table(diffusion.ScheduleConfig(steps=100), sampler, steps, 0.0)
    loop = make(250, 5, steps=steps)
    loop.coefficients[:, :3] = table.coefficients[:, :3]
    assert_same(machine, run(machine, loop, EPOCH), loop.twin("epoch"), PERSISTENT["fp16"])
    assert (loop.coefficients[:-1, 2] != 0).any() == (sampler == "dpmpp")


# Independence


@pytest.mark.parametrize("variant", [*EIGHT, FOUR], ids=name_of)
@pytest.mark.parametrize("seed", kept([1, 2, 3], {1}))
def test_order_of_blocks_changes_nothing(emulator, variant, seed):
    loop = make(250, 7, steps=4)
    want = run(emulator, loop, variant)
    np.testing.assert_array_equal(run(emulator, loop, variant, seed), want)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["counter", "epoch"])
def test_variants_of_one_exchange_give_the_same_bits(machine, exchange):
    loop = make(250, 7, 2, steps=4)
    want = run(machine, loop, Variant(16, 2, exchange))
    for variant in (
        Variant(16, 1, exchange),
        Variant(16, 4, exchange),
        Variant(16, 2, exchange, copies=2),
        Variant(8, 2, exchange, groups=2),
        Variant(8, 2, exchange, groups=6),
        Variant(32, 2, exchange),
    ):
        np.testing.assert_array_equal(run(machine, loop, variant), want)


@pytest.mark.parametrize("variant", SIXTEEN, ids=name_of)
def test_an_answer_does_not_depend_on_the_place_in_the_batch(machine, variant):
    loop = make(250, 13, 1, 13, steps=4)
    whole = run(machine, loop, variant)
    order = np.random.default_rng(0).permutation(13)[:9]
    some = replace(loop, q=loop.q[order], bias=np.ascontiguousarray(loop.bias[:, order]))
    np.testing.assert_array_equal(run(machine, some, variant), whole[order])


@pytest.mark.parametrize("bad", kept([1e30, np.inf, np.nan], {1e30}))
@pytest.mark.parametrize("variant", EIGHT, ids=name_of)
def test_a_row_that_is_not_finite_spoils_no_other(machine, variant, bad):
    """It has to show: neither its rounding nor the parity may make a number of it."""
    loop = make(250, 7, steps=4)
    want = run(machine, loop, variant)
    loop.q[3, 16] = bad  # an even column: its rounding is the one of two steps
    got = run(machine, loop, variant)
    assert not np.isfinite(got[3]).any()
    others = np.arange(7) != 3
    np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("variant", [COUNTER, EPOCH], ids=name_of)
def test_launches_share_their_buffers(machine, variant, steps):
    """Nothing that a launch leaves behind is an answer for the next, whatever its parity."""
    loop = make(250, 7, steps=steps)
    plan, arguments = loop.packed.layout, place(machine, loop)
    other = make(250, 7, steps=steps, seed=5)
    want = {id(x): run(machine, x, variant) for x in (loop, other)}
    second = replace(arguments, condition=machine.put(other.q), bias=machine.put(other.bias))
    second = replace(second, coefficients=machine.put(other.coefficients))
    for given, expected in ((arguments, loop), (second, other), (second, other), (arguments, loop)):
        launch(machine, plan, variant, given)
        got = output(machine, given, plan)[..., :250]
        np.testing.assert_array_equal(got, want[id(expected)])


# What compiles


BUDGET = {8: 184, 16: 200, 32: 232, 64: 224}  # by rows, at width 1024; two or one tiles
KINDS = [(rows, 2, exchange) for rows in (8, 16, 32, 64) for exchange in ("counter", "epoch")]
KINDS += [(rows, 1, exchange) for rows in (8, 16) for exchange in ("counter", "epoch")]


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("kind", kept(KINDS, {KINDS[0], KINDS[7]}), ids=str)
def test_every_variant_stays_within_its_registers(kind):
    """More than 255 a thread cannot be, and one block of 256 threads is all that has to fit."""
    plan, variant = rs.layout(1024), Variant(*kind, copies=2)
    cubin = compile_cubin(source("reverse_sampler"), "sm_90", variant.options(plan))
    assert (cubin.spill_bytes, "warning" in cubin.log) == (0, False)
    assert cubin.registers <= BUDGET[variant.rows]


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", kept(TARGETS, {"sm_90"}))
def test_what_is_shipped_and_the_widest_compile_for_every_target(arch):
    kinds = [Variant(8, 2, "epoch", 2), *(Variant(rows, 2, "counter") for rows in (16, 64))]
    wide = [variant.options(rs.layout(hidden)) for hidden in (1536, 256) for variant in kinds]
    wide += [Variant(rows, 4, "counter").options(rs.layout(768)) for rows in (8, 64)]
    chosen = shipped_options()
    if arch not in persistent._CROWDED_TARGETS:  # choose_variant takes none with four tiles there
        chosen = [options for options in chosen if "-DTILES=4" not in options]
    for options in (*chosen, *wide):
        cubin = compile_cubin(source("reverse_sampler"), arch, options)
        assert (options, cubin.spill_bytes) == (options, 0)
        assert b"reverse_sampler" in cubin.code


def test_shipped_options_are_those_that_are_chosen_at_the_usual_width():
    options = shipped_options()
    assert len(set(options)) == len(options)
    for dtype in ("fp16", "bf16"):
        plan = rs.layout(1000, dtype)
        for multiprocessors in (46, 64, 84, 108, 132, 148, 170):
            device = replace(H100, multiprocessors=multiprocessors)
            for rows in range(1, 65 if multiprocessors >= 64 else 17):
                assert choose_variant(plan, rows, device).options(plan) in options


def test_parameters_have_the_size_that_the_kernel_asserts():
    assert ctypes.sizeof(persistent._Parameters) == 88
    assert "sizeof(Arguments) == 88" in source("reverse_sampler")


# What is chosen, and what is refused


H100 = DeviceInfo((9, 0), 132, 232448, True)


@pytest.mark.parametrize(
    ("rows", "multiprocessors", "variant"),
    [
        (1, 132, Variant(8, 2, "epoch", copies=2)),
        (8, 132, Variant(8, 2, "epoch", copies=2)),
        (9, 132, Variant(8, 2, "counter", groups=2)),
        (16, 132, Variant(8, 2, "counter", groups=2)),
        (17, 132, Variant(16, 4, "counter", groups=3)),
        (64, 132, Variant(16, 4, "counter", groups=4)),
        (16, 108, Variant(16, 2, "counter")),
        (48, 108, Variant(16, 4, "counter", groups=3)),
        (64, 108, Variant(64, 2, "counter")),
        (8, 46, Variant(16, 4, "epoch", copies=2)),
        (64, 64, Variant(64, 2, "counter")),
    ],
)
def test_choice_at_the_usual_width(rows, multiprocessors, variant):
    device = replace(H100, multiprocessors=multiprocessors)
    assert choose_variant(rs.layout(1024), rows, device) == variant


def test_choice_for_other_loops():
    assert choose_variant(rs.layout(1024, "bf16"), 1, H100).exchange == "counter"
    assert choose_variant(rs.layout(250), 64, H100) == Variant(8, 4, "counter", groups=8)
    blackwell = replace(H100, capability=(10, 0), multiprocessors=148)
    assert choose_variant(rs.layout(1024), 64, blackwell) == Variant(32, 2, "counter", groups=2)
    assert choose_variant(rs.layout(1536), 64, H100).groups == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected at least 1"),
        ({"rows": 65}, "rows: got 65, expected at most 64; a captured graph .* 18.9 us a step"),
        ({"capability": (7, 5)}, "compute capability: got 7.5, expected a GPU that runs one of"),
        ({"cooperative": False}, "device: got one without cooperative launches, expected one with"),
        ({"multiprocessors": 31}, "multiprocessors: got 31, expected at least 64 for hidden width"),
        ({"multiprocessors": 46, "rows": 17}, "multiprocessors: got 46, expected at least 64"),
        ({"hidden": 1537}, "width: got hidden width 1792, which needs 168 registers a thread"),
        ({"hidden": 4096}, "width: got hidden width 4096, which needs 384 registers a thread"),
    ],
)
def test_loops_without_a_variant_are_refused(change, message):
    given = {"rows": 1, "hidden": 1024} | change
    device = replace(H100, **{k: v for k, v in change.items() if hasattr(H100, k)})
    with pytest.raises(ValueError, match=message):
        choose_variant(rs.layout(given["hidden"]), given["rows"], device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 24}, r"rows: got 24, expected one of \(8, 16, 32, 64\); choose_variant chooses"),
        ({"tiles": 3}, r"tiles: got 3, expected one of \(1, 2, 4\)"),
        ({"exchange": "flag"}, r"exchange: got 'flag', expected one of \('counter', 'epoch'\)"),
        ({"copies": 3}, r"copies: got 3, expected one of \(1, 2\)"),
        ({"groups": 17}, "groups: got 17, expected one of"),
        ({"rows": 32, "tiles": 1}, "rows: got 32 with one tile, expected at most 16; use two"),
    ],
)
def test_variants_that_do_not_exist_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(COUNTER, **change)


def test_epoch_is_for_fp16_alone():
    with pytest.raises(ValueError, match="exchange: got 'epoch' for bf16, expected fp16; use 'cou"):
        EPOCH.options(rs.layout(250, "bf16"))


GOOD = ReverseSamplerArguments(
    images=4, samples=2, noises=1, steps=3, **dict.fromkeys(rs.POINTERS, 128)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images: got 0, expected at least 1"),
        ({"samples": -1}, "samples: got -1, expected at least 1"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"noises": 3}, "noises: got 3 for 4 images, expected 1 or 4"),
        ({"out": 0}, "out: got address 0, expected device memory; allocate what"),
        ({"bias": 8}, "bias: got address 0x8, expected a multiple of 16; pass the start"),
        ({"counter": 64}, "counter: got address 0x40, expected a multiple of 128"),
        ({"weights": -16}, "weights: got address -0x10, expected a multiple of 16"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (replace(GOOD, images=5), r"rows: got 10 \(images times samples\), expected at most 8, as"),
        (replace(GOOD, steps=2**30), "steps: got 1073741824, expected at most"),
    ],
)
def test_launches_that_do_not_fit_the_variant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_launch(rs.layout(250), COUNTER, arguments)
    check_launch(rs.layout(250), replace(COUNTER, groups=2), replace(GOOD, images=5))


def test_an_exchange_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="exchange: got 'flag', expected 'counter' or 'epoch'"):
        rs.layer_reference(
            rs.pack(**weights(96)), "carry", np.zeros((1, 256), np.float32), exchange="flag"
        )


# The wrapper


class FakeDriver:
    """Records what is enqueued; `each` blocks fit on a multiprocessor."""

    def __init__(self, each=1):
        self.each, self.calls = each, []

    def __getattr__(self, name):
        if name == "cuOccupancyMaxActiveBlocksPerMultiprocessor":
            return lambda *_: (0, self.each)
        return lambda *args: self.calls.append((name, *args)) or (0,)


@pytest.fixture
def fake(monkeypatch):
    driver = FakeDriver()
    cubin = SimpleNamespace(registers=200, spill_bytes=0)
    monkeypatch.setattr(persistent._cuda, "load", lambda _: driver)
    monkeypatch.setattr(persistent, "current_device", lambda: H100)
    monkeypatch.setattr(persistent, "compile_cubin", lambda *_: cubin)
    monkeypatch.setattr(persistent, "load_function", lambda *_: "function")
    return driver


def test_a_launch_clears_and_then_starts_all_blocks_together(fake):
    plan = rs.layout(1024)
    sampler = ReverseSampler(plan, replace(EPOCH, groups=2))
    assert sampler.resources == persistent.Resources(200, 0, sampler.variant.shared_bytes, 128)
    sampler.launch(77, GOOD)
    clear, start = fake.calls
    assert clear == ("cuMemsetD8Async", 128, 0, 2 * 3 * 2 * 8 * 1024, 77)
    assert start[:10] == (
        *("cuLaunchCooperativeKernel", "function", 64, 2, 1, 256, 1, 1),
        *(sampler.variant.shared_bytes, 77),
    )
    fake.calls.clear()
    ReverseSampler(plan, replace(COUNTER, groups=2)).launch(77, GOOD)
    assert fake.calls[0] == ("cuMemsetD8Async", 128, 0, 256, 77)


def test_a_device_that_cannot_hold_all_blocks_is_refused(fake):
    fake.each = 0
    with pytest.raises(RuntimeError, match="got a device that runs 0 of its blocks at once, expec"):
        ReverseSampler(rs.layout(1024), COUNTER)
    fake.each = 1
    with pytest.raises(RuntimeError, match="runs 132 of its blocks at once, expected 192, as they"):
        ReverseSampler(rs.layout(1024), replace(COUNTER, groups=3))


# On a GPU alone


def replays(gpu, loop, variant):
    """(arguments, function that replays the captured launch)."""
    arguments = place(gpu, loop)
    sampler = ReverseSampler(loop.packed.layout, variant)
    return arguments, gpu.graph(lambda: sampler.launch(int(gpu.stream), arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_captured_loop_at_full_size_is_the_twin(gpu, rows):
    loop = make(1024, rows, steps=6)
    plan = loop.packed.layout
    variant = choose_variant(plan, rows, persistent.current_device())
    arguments, replay = replays(gpu, loop, variant)
    want, first = loop.twin(variant.exchange), None
    for _ in range(20):
        replay()
        gpu.wait()
        got = output(gpu, arguments, plan)
        first = got if first is None else first
        np.testing.assert_array_equal(got, first)
    atol = PERSISTENT["fp16"] * np.abs(want).max()
    np.testing.assert_allclose(first, want, rtol=0, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["counter", "epoch"])
def test_100000_replays_allocate_nothing_and_give_the_same_bits(gpu, exchange):
    loop = make(1000, 7, steps=3)
    arguments, replay = replays(gpu, loop, Variant(8, 2, exchange))
    replay()
    gpu.wait()
    first, free = output(gpu, arguments, loop.packed.layout), gpu.do("cuMemGetInfo")
    for _ in range(100):
        for _ in range(1000):
            replay()
        gpu.wait()
        np.testing.assert_array_equal(output(gpu, arguments, loop.packed.layout), first)
    assert gpu.do("cuMemGetInfo") == free


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is part of the CUDA toolkit, which is not installed")
    inner = f"{__file__}::test_launches_share_their_buffers"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    done = subprocess.run(
        [*command, "-q", "-m", "gpu", inner], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]

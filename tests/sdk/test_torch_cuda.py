"""Torch on a GPU: everything but the real capture on the CPU, and the real one where there is one.

`Late` stands in for the GPU. It does nothing before somebody waits for it, and capturing runs
nothing but notes what to run again, into the same tensors: what is read too early, or written to a
place that nobody reads, shows as wrong numbers.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model, make_seda, tables_of
from tolerances import BUILT, CAPTURED_LOOP, FLOAT32_TWICE

from marnet_export.build.builder import Order
from marnet_export.build.torchscript import build_encoder, build_refine
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower, lower_marnet
from marnet_export.lower.modules import Refine, ScriptedLoop
from marnet_export.lower.plan import make_plan
from marnet_kernels.reverse_sampler import pack_condition, pack_tables, reverse_sampler_reference
from marnet_sdk.backends import torch_cuda, torch_device, torchscript
from marnet_sdk.backends.torch_cuda import TorchOnCuda
from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput, MarnetWarning
from marnet_sdk.gpu import torch_programs, torch_stream
from marnet_sdk.gpu.captured import ALIGNMENT, Shape
from marnet_sdk.gpu.torch_programs import Parts
from marnet_sdk.gpu.torch_stream import Cuda, Rows
from marnet_sdk.noise.tables import Tables
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

HIDDEN, FEATURE = 12, 40  # widths with which the loop carries its hidden state, or the feature
STEPS = 7


class Late(Cuda):
    """A stream on the CPU that is as late as a GPU may be."""

    name = "the CPU"

    def __init__(self, refuses: str = "") -> None:
        """refuses: why nothing can be captured."""
        self.device, self.refuses = torch.device("cpu"), refuses
        self.waiting: list[Callable[[], Any]] = []
        self.copies: list[tuple[int, ...]] = []  # shapes
        self.followed = 0

    @property
    def stream(self) -> int:
        return 0

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def follow_caller(self) -> None:
        self.followed += 1

    def zeros(self, *shape: int) -> Any:
        return torch.zeros(shape)

    def pinned(self, *shape: int) -> Any:
        return torch.zeros(shape)

    def at(self, address: int, shape: Sequence[int]) -> Any:
        memory = (ctypes.c_float * prod(shape)).from_address(address)
        return torch.from_numpy(np.frombuffer(memory, np.float32).reshape(shape))

    def copy(self, target: Any, source: Any) -> None:
        self.copies.append(tuple(source.shape))
        self.waiting.append(partial(target.copy_, source))

    def upload(self, array: Any) -> Any:
        self.synchronize()
        return torch.from_numpy(array.copy())

    def download(self, tensor: Any) -> Any:
        self.synchronize()
        return tensor.numpy()

    def capture(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], None], Any]:
        if self.refuses:
            raise InferenceError(self.refuses)
        outputs = [torch.full_like(output, torch.nan) for output in run()]

        def again() -> None:
            for target, value in zip(outputs, run(), strict=True):
                target.copy_(value)

        return lambda: self.waiting.append(again), outputs

    def synchronize(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def reserved(self) -> int:
        return 12345


class TwinKernel:
    """The kernel's NumPy twin as a `KernelLoop`."""

    description, nbytes = "the twin", 100

    def __init__(self, parts: Parts, shape: Shape) -> None:
        self.weights, self.shape = parts.weights, shape
        self.packed = parts.weights.pack()
        self.h3 = torch.zeros(shape.batch, shape.samples, self.packed.layout.hidden)
        self.tables: Tables | None = None

    def hold(self, tables: Tables) -> None:
        self.tables = tables

    def __call__(self, q: Any) -> Any:
        if self.tables is not None:  # not before it is captured
            tables = pack_tables(self.tables.coefficients, self.tables.bias)
            condition = pack_condition(q.numpy())
            h3 = reverse_sampler_reference(self.packed, condition, *tables, self.weights.slope)
            self.h3.copy_(torch.from_numpy(h3))
        return self.h3


class Twins:
    """Makes them, up to so many rows."""

    nbytes = 1000

    def __init__(self, most: int = 8) -> None:
        self.most = most

    def __call__(self, parts: Parts, shape: Shape, gpu: Cuda) -> TwinKernel:
        if shape.batch * shape.samples > self.most:
            raise ValueError(f"rows: got {shape.batch * shape.samples}, at most {self.most}")
        return TwinKernel(parts, shape)


@pytest.fixture(scope="module")
def models() -> dict[int, MARNet]:
    return {hidden: make_model(hidden=hidden) for hidden in (HIDDEN, FEATURE)}


@pytest.fixture(scope="module")
def payload_of(models, tmp_path_factory) -> Callable[[int, str], Path]:
    """hidden width, compute -> what the builder writes. Read-only."""
    made: dict[tuple[int, str], Path] = {}

    def make(hidden: int = HIDDEN, compute: str = "fp32") -> Path:
        if (hidden, compute) not in made:
            folder = tmp_path_factory.mktemp("torchscript")
            lowered, types = lower_marnet(models[hidden]), Types(compute, compute)
            build_encoder(lowered, torch.rand(2, 3, 32, 32), types, folder)
            build_refine(lowered, types, folder)
            made[hidden, compute] = folder
        return made[hidden, compute]

    return make


@pytest.fixture
def tables(models) -> Callable[..., Tables]:
    def make(samples: int = 1, seed: int = 0, steps: int = STEPS, hidden: int = HIDDEN, **keys):
        table = sampler_table(models[hidden].config.schedule, "ddpm", steps)
        plan = make_plan(models[hidden])
        return tables_of(models[hidden], plan, table, samples=samples, seed=seed, **keys)

    return make


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, 32, 32), np.float32)


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    return got.shape == want.shape and bool(
        np.abs(got - want).max() <= tolerance * np.abs(want).max()
    )


@pytest.fixture
def on_cpu(payload_of) -> Callable[[np.ndarray, Tables], tuple[np.ndarray, np.ndarray]]:
    """The answers of the same bundle on the processor."""
    backend = torchscript.open_payload(payload_of(), "fp32", 1)
    return lambda given, table: backend.refine(backend.encode(given), table)


@pytest.fixture
def backend(payload_of) -> TorchOnCuda:
    return captured(payload_of())


def captured(
    payload: Path, compute: str = "fp32", make_gpu: Callable[[], Cuda] = Late, **more: Any
) -> TorchOnCuda:
    model = torchscript.load_model(payload, compute, "cpu")
    return TorchOnCuda(model, make_gpu, buckets=(1, 4, 8), **more)


# --- batches, tables and memory


def test_a_program_takes_the_lane_that_one_of_its_shape_has_left(payload_of, tables):
    backend = captured(payload_of(HIDDEN, "fp32"))
    backend.run(pixels(1), tables())
    shape = Shape(4, STEPS, 1)
    first, second = (backend._capture(shape) for _ in range(2))
    assert first._lane is not second._lane
    left = second._lane
    del second
    gc.collect()
    assert backend._capture(shape)._lane is left


def test_batches_of_any_size_are_the_processor_s_answers(backend, on_cpu, tables):
    for count in (1, 3, 4, 8, 19, 1, 4):
        given, table = pixels(count, seed=count), tables()
        for got, want in zip(backend.run(given, table), on_cpu(given, table), strict=True):
            assert close(got, want, FLOAT32_TWICE)
    report = backend.report()
    assert (report.captures, report.fallbacks) == (3, {})
    assert report.replays == 9  # 19 images are three batches


def test_encode_and_refine_are_there_for_those_that_need_them_apart(backend, on_cpu, tables):
    given, table = pixels(3), tables(samples=2, keys=[1, 2, 3])
    x_v = backend.encode(given)
    for got, want in zip(backend.refine(x_v, table), on_cpu(given, table), strict=True):
        assert close(got, want, FLOAT32_TWICE)


def test_steps_samples_and_seeds_in_turn_do_not_meet(backend, on_cpu, tables):
    given = pixels(4)
    asked = [tables(), tables(seed=1), tables(samples=3), tables(steps=1), tables(seed=1)]
    for table in [*asked, *reversed(asked)]:
        got, want = backend.run(given, table)[0], on_cpu(given, table)[0]
        assert close(got, want, FLOAT32_TWICE)


def test_answers_outlive_the_next_call_and_belong_to_the_caller(backend, tables):
    table = tables()
    first = backend.run(pixels(4), table)
    kept = [array.copy() for array in first]
    backend.run(pixels(4, seed=1), table)
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        array[:] = 0


def test_inputs_are_left_alone_even_where_they_must_not_be_written_to(backend, tables):
    given, table = pixels(3), tables()
    before = given.copy()
    for array in (given, table.coefficients, table.bias):
        array.flags.writeable = False
    backend.run(given, table)
    np.testing.assert_array_equal(given, before)


def test_tables_are_copied_again_only_when_they_are_others(payload_of, tables):
    made: list[Late] = []
    backend = captured(payload_of(), make_gpu=lambda: made.append(Late()) or made[-1])
    one, other = tables(), tables(seed=1)
    copied = []
    for table in (one, one, other, other, one):
        for gpu in made:
            gpu.copies.clear()
        for count in (4, 1):  # programs of other batches read the same tables
            backend.run(pixels(count), table)
        copied.append(sum((STEPS, 1, 1, HIDDEN) in gpu.copies for gpu in made))
    assert copied == [1, 0, 1, 0, 1]


def test_noise_of_each_image_is_run_plainly_and_said_once(backend, on_cpu, tables):
    given, table = pixels(3), tables(keys=[1, 2, 3])
    with pytest.warns(RuntimeWarning, match="without a captured graph.*noise of its own"):
        got = backend.run(given, table)[0]
    assert close(got, on_cpu(given, table)[0], FLOAT32_TWICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.run(given, table)
    assert backend.report().fallbacks == {"each image has noise of its own": 2}


def test_what_cannot_be_captured_runs_plainly_and_says_why(payload_of, on_cpu, tables):
    why = "torch cannot capture a graph: operation not permitted"
    backend = captured(payload_of(), make_gpu=partial(Late, refuses=why))
    given, table = pixels(3), tables()
    with pytest.warns(RuntimeWarning, match=f"slower: {why}"):
        got = backend.run(given, table)
    assert close(got[0], on_cpu(given, table)[0], FLOAT32_TWICE)
    assert backend.report().fallbacks == {why: 1}
    assert (backend.report().captures, backend.report().replays) == (0, 0)


def test_calls_from_eight_threads_give_what_calls_one_after_another_give(backend, tables):
    shared = [tables(), tables(seed=1), tables(samples=2)]
    asked = [(pixels(1 + i % 6, seed=i), shared[i % 3]) for i in range(48)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda given: backend.run(*given), asked))
    for given, got in zip(asked, at_once, strict=True):
        for one, other in zip(got, backend.run(*given), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_caller_s_autocast_does_not_change_answers(backend, tables):
    given, table = pixels(4), tables()
    want = backend.run(given, table)
    with torch.autocast("cpu", torch.bfloat16):
        got = [*backend.run(given, table), backend.encode(given)]
    for one, other in zip(got, (*want, backend.encode(given)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_sizes_than_the_first_are_refused(backend, tables):
    table = tables()
    backend.run(pixels(2), table)
    with pytest.raises(InvalidInput, match=r"got .*\(3, 32, 31, 12\).*expected \(3, 32, 32, 12\)"):
        backend.run(np.zeros((2, 3, 32, 31), np.float32), table)
    with pytest.raises(InvalidInput, match=r"\(3, 32, 32, 11\)"):
        backend.run(pixels(2), replace(table, bias=table.bias[..., :-1]))
    with pytest.raises(InvalidInput, match=r"got tables \(6, 3\) and \(7, 1, 1, 12\), expected"):
        backend.run(pixels(2), replace(table, coefficients=table.coefficients[1:]))


def test_the_report_says_device_buckets_and_memory(backend, tables):
    assert backend.report().loop.startswith("nothing is captured yet; the persistent kernel")
    backend.run(pixels(4), tables(samples=2))
    report = backend.report()
    assert (report.device, report.buckets) == ("the CPU", (1, 4, 8))
    assert report.memory["torch, all of this process"] == 12345
    assert report.memory["tables"] == 4 * (STEPS * 3 + STEPS * 2 * HIDDEN)
    images, answers = 4 * 4 * 3 * 32 * 32, 4 * 4 * 2 * (3 + 8)
    assert report.memory["images and answers"] >= images + answers - 4 * 4 * 2 * 8


# --- arrays of the caller on the device


def aligned(count: int, beside: int = 0) -> torch.Tensor:
    """Make pixels that are aligned as a GPU's memory is, or lie `beside` floats from there."""
    memory = np.zeros(count * 3 * 32 * 32 + ALIGNMENT // 4 + beside, np.float32)
    start = -memory.ctypes.data % ALIGNMENT // 4 + beside
    return torch.from_numpy(memory[start : start + count * 3 * 32 * 32]).view(count, 3, 32, 32)


def test_a_caller_s_array_is_read_where_it_lies(backend, on_cpu, tables):
    table, given = tables(), aligned(4)
    rows = backend.device_rows(given)
    for seed in (0, 1):  # the second time with other values at the same place
        given.copy_(torch.from_numpy(pixels(4, seed)))
        got = backend.run(rows, table)[0]
        assert close(got, on_cpu(pixels(4, seed), table)[0], FLOAT32_TWICE)
    assert backend.report().copies == 0
    assert backend.report().captures == 1


def test_a_caller_s_array_of_another_size_is_copied_and_padded(backend, on_cpu, tables):
    table = tables()
    backend.run(pixels(8, seed=5), table)  # leaves other rows behind
    for count in (3, 6, 11):
        given = aligned(count, beside=1).copy_(torch.from_numpy(pixels(count)))
        got = backend.run(backend.device_rows(given), table)[0]
        assert close(got, on_cpu(pixels(count), table)[0], FLOAT32_TWICE)
    assert backend.report().copies == 4  # 11 rows are two batches


def test_the_stream_waits_for_who_writes_the_caller_s_array(payload_of, tables):
    made: list[Late] = []
    backend = captured(payload_of(), make_gpu=lambda: made.append(Late()) or made[-1])
    backend.run(pixels(4), tables())  # the program of its own memory
    assert sum(gpu.followed for gpu in made) == 0
    backend.run(backend.device_rows(torch.from_numpy(pixels(4))), tables())
    assert sum(gpu.followed for gpu in made) == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), r"got torch.float64 .*expected torch.flo"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\) on cpu, expected .* \[B, 3, height, width\]"),
        ([1, 2], "got list, which torch cannot read.*pass an array that has __dlpack__"),
    ],
)
def test_arrays_that_cannot_be_read_are_refused(backend, array, message):
    with pytest.raises(InvalidInput, match=message):
        backend.device_rows(array)


def test_any_library_s_array_is_taken(backend):
    rows = backend.device_rows(pixels(4))  # NumPy's speak DLPack too
    assert isinstance(rows, Rows)
    assert (len(rows), rows.shape) == (4, (4, 3, 32, 32))


# --- the loop


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_parts_around_the_kernel_are_the_module(payload_of, tables, compute, samples):
    """condition, the kernel's twin, output and head give what the whole module gives."""
    model = torchscript.load_model(payload_of(HIDDEN, compute), compute, "cpu")
    assert isinstance(model.parts, Parts)
    table = tables(samples=samples, steps=20)
    with torch.inference_mode():
        x_v = model.encode(torch.from_numpy(pixels(5)))
        given = map(torch.from_numpy, (table.coefficients, table.bias))
        want = model.refine(x_v, *given)
        kernel = TwinKernel(model.parts, Shape(5, 20, samples))
        kernel.hold(table)
        got = model.parts.finish(x_v, kernel(model.parts.condition(x_v)[:, 0]))
    for one, other in zip(got, want, strict=True):
        assert close(one.numpy(), other.numpy(), CAPTURED_LOOP[compute])


def test_the_kernel_is_captured_where_it_can_run(payload_of, tables):
    payload = payload_of(HIDDEN, "bf16")
    backend = captured(payload, "bf16", make_kernel=Twins(most=8))
    plain = torchscript.open_payload(payload, "bf16", 1)

    def compare(count: int, table: Tables) -> None:
        given = pixels(count, seed=count)
        got, want = backend.run(given, table), plain.refine(plain.encode(given), table)
        assert close(got[0], want[0], CAPTURED_LOOP["bf16"])

    for table in (tables(), tables(seed=1), tables(samples=2)):
        for count in (1, 3):
            compare(count, table)
    compare(8, tables())
    with pytest.warns(MarnetWarning, match="rows: got 16, at most 8"):
        compare(8, tables(samples=2))
    compare(8, tables(seed=1, samples=2))  # it is said once
    report = backend.report()
    assert report.loop == (
        "batches of 1, 4, 8: the twin; batches of 8: operators in the captured graph, because the "
        "persistent kernel cannot run: rows: got 16, at most 8"
    )
    assert report.memory["persistent kernel"] == 1000 + 5 * 100
    assert report.fallbacks == {}


def test_a_kernel_that_cannot_be_captured_leaves_the_loop_to_operators(payload_of, tables):
    class Broken(TwinKernel):
        def __call__(self, q: Any) -> Any:
            raise RuntimeError("cuLaunchCooperativeKernel: CUDA_ERROR_NOT_SUPPORTED")

    class Makes(Twins):
        def __call__(self, parts: Parts, shape: Shape, gpu: Cuda) -> TwinKernel:
            return Broken(parts, shape)

    payload = payload_of(HIDDEN, "bf16")
    backend = captured(payload, "bf16", make_kernel=Makes())
    plain = torchscript.open_payload(payload, "bf16", 1)
    want = plain.refine(plain.encode(pixels(4)), tables())
    with pytest.warns(MarnetWarning, match=r"slower than it could: .*CUDA_ERROR_NOT_SUPPORTED"):
        got = backend.run(pixels(4), tables())
    assert close(got[0], want[0], BUILT["bf16"])
    assert backend.report().loop == (
        "operators in the captured graph, because the persistent kernel cannot run: "
        "cuLaunchCooperativeKernel: CUDA_ERROR_NOT_SUPPORTED"
    )


@pytest.mark.parametrize(
    ("hidden", "compute", "reason"),
    [
        (HIDDEN, "fp32", "the persistent kernel multiplies in fp16 or bf16, the bundle in fp32"),
        (FEATURE, "bf16", "the bundle's loop carries the feature and not the hidden state"),
    ],
)
def test_where_the_kernel_cannot_take_the_loop_the_report_says_why(
    payload_of, tables, hidden, compute, reason
):
    backend = captured(payload_of(hidden, compute), compute)
    assert backend.report().loop == f"nothing is captured yet; {reason}"
    backend.run(pixels(1), tables(hidden=hidden))
    assert backend.report().loop == f"operators in the captured graph, because {reason}"


def test_a_loop_of_another_method_is_left_to_operators():
    assert torch_cuda.loop_parts(torch.nn.Identity(), "fp16") == (
        "the bundle's loop is not that of MARNet's plan"
    )


def test_a_progressive_loop_is_left_to_operators():
    lowered = lower_marnet(make_model(progressive=True))
    refine = Refine(ScriptedLoop(lowered.step(torch.float16)), lowered.head)
    assert torch_cuda.loop_parts(refine, "fp16") == (
        "the bundle's denoiser is progressive, and the persistent kernel feeds nothing back"
    )


def test_a_chain_that_carries_another_on_is_left_to_operators():
    lowered = lower(make_seda(latent=10, handover="carry"))
    refine = Refine(ScriptedLoop(lowered.step(torch.float16)), lowered.head)
    assert lowered.step(torch.float16).kernel_weights() is None
    assert torch_cuda.loop_parts(refine, "fp16") == (
        "the bundle's chain starts from what stage 1 left, the persistent kernel from noise"
    )


class PlayedLoop:
    """`PersistentLoop` and what it prepares, with the twin for a kernel: it reads and writes at the
    addresses that it is given."""

    variant = "the twin"

    def __init__(self, weights: Any, gpu: Any, allocate: Callable[[int], int], stream: int) -> None:
        self.packed, self.slope, self.gpu = weights.pack(), weights.slope, gpu
        self.layout = self.packed.layout
        allocate(1001)

    def prepare(self, images: int, samples: int, steps: int, allocate: Callable[[int], int]) -> Any:
        if images > 4:
            raise ValueError("rows: got more than 4")
        allocate(400)
        shape = SimpleNamespace(images=images, samples=samples, tables=None)

        def set_tables(tables: Tables, stream: int) -> None:
            shape.tables = pack_tables(tables.coefficients, tables.bias)

        def enqueue(stream: int, q: int, h3: int) -> None:
            if shape.tables is None:  # not before it is captured
                return
            padded = self.layout.padded
            condition = Late().at(q, (images, padded)).numpy()
            out = Late().at(h3, (images, samples, padded)).numpy()
            found = reverse_sampler_reference(self.packed, condition, *shape.tables, self.slope)
            out[..., : self.layout.hidden] = found

        return SimpleNamespace(variant=self.variant, set_tables=set_tables, enqueue=enqueue)


@pytest.fixture
def played(monkeypatch) -> None:
    monkeypatch.setattr(torch_programs, "PersistentLoop", PlayedLoop)
    driver = SimpleNamespace(current=nullcontext)
    monkeypatch.setattr(torch_programs, "Gpu", lambda extra, ordinal: driver)


def test_the_kernel_s_memory_is_where_the_graph_leaves_and_finds_what_it_shares(
    played, payload_of, tables
):
    payload = payload_of(HIDDEN, "bf16")
    backend, plain = captured(payload, "bf16"), torchscript.open_payload(payload, "bf16", 1)
    for table in (tables(), tables(seed=1), tables(samples=3), tables()):
        given = pixels(3)
        got, want = backend.run(given, table), plain.refine(plain.encode(given), table)
        assert close(got[0], want[0], CAPTURED_LOOP["bf16"])
    report = backend.report()
    assert report.loop == "persistent kernel (the twin)"
    width = 256  # of the kernel, 4 bytes each
    shapes = sum(4 * width * (4 + 4 * samples) + 400 for samples in (1, 3))
    assert report.memory["persistent kernel"] == 1004 + shapes


def test_a_table_that_the_kernel_s_memory_does_not_hold_is_refused(played, payload_of, tables):
    backend = captured(payload_of(HIDDEN, "bf16"), "bf16")
    table = tables()
    wide = replace(table, bias=np.repeat(table.bias, 30, axis=-1))
    with pytest.raises(InvalidInput, match=r"of \(7, 1, 1, 360\), expected \(7, 1, 1, 12\)"):
        backend.run(pixels(1), wide)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_driver_the_kernel_says_so_and_operators_run(payload_of, tables):
    backend = captured(payload_of(HIDDEN, "bf16"), "bf16")
    with pytest.warns(MarnetWarning, match="the persistent kernel cannot run: "):
        backend.run(pixels(1), tables())
    assert "because the persistent kernel cannot run: " in backend.report().loop


# --- where there is no GPU, and settings of the process


def test_a_torch_without_cuda_is_told_with_the_line_that_installs_another(payload_of, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = r"torchscript cannot run on cuda: torch \S+ is built without CUDA; install .*pip inst"
    with pytest.raises(BackendUnavailable, match=message):
        torchscript.open_payload(payload_of(), "fp16", None, "cuda")


def test_a_torch_that_finds_no_gpu_says_what_torch_says(monkeypatch):
    def none_there() -> bool:
        warnings.warn("Found no NVIDIA driver on your system.", UserWarning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", none_there)
    message = r"CUDA 13.0\) finds no GPU \(Found no NVIDIA driver .*; look at .*--device cpu"
    with pytest.raises(BackendUnavailable, match=message):
        torch_device.check_cuda("torchscript")


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_a_gpu_computes_in_three_types(compute, monkeypatch):
    monkeypatch.setattr(torch_device, "why_no_cuda", lambda: None)
    torch_device.check_types("torchscript", compute, "cuda")
    message = f"torchscript computes in fp32, bf16 or fp16 on a GPU, the bundle asks {compute}x"
    with pytest.raises(BackendUnavailable, match=message):
        torch_device.check_types("torchscript", f"{compute}x", "cuda")


@pytest.fixture
def told() -> Iterator[Callable[[], list[Any]]]:
    """What torch is told about float32, as far as it answers; put back after the test."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings() -> list[Any]:
        newer = [setting.fp32_precision for setting in (cudnn.conv, cudnn.rnn, matmul)]
        older = (lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision)
        return [*newer, *map(torch_stream._ask, older)]

    yield settings
    cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


TELL = {
    "nothing": lambda: None,
    "older": lambda: torch.set_float32_matmul_precision("high"),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("how", TELL)
def test_float32_is_exact_while_it_is_computed_and_settings_are_put_back(told, how):
    TELL[how]()
    before = told()
    with torch_stream.exact_float32():
        assert told()[:3] == ["ieee"] * 3
        assert not told()[3]
    assert told() == before


def test_threads_that_want_exact_products_do_not_wait_for_each_other(told):
    TELL["older"]()
    before, barrier = told(), Barrier(2)

    def use(_: int) -> None:
        with torch_stream.exact_float32():
            barrier.wait(60)  # both are inside
            assert told()[:3] == ["ieee"] * 3
            barrier.wait(60)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(use, range(2)))
    assert told() == before


def test_the_reason_is_what_came_first_in_one_line():
    def fail() -> None:
        try:
            raise RuntimeError("cannot call this\n  while capturing")
        finally:
            raise RuntimeError("capture_end: failed because of an earlier error")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert torch_stream.first_cause(caught.value) == "cannot call this while capturing"


def test_a_reason_from_torchscript_is_its_last_line():
    error = RuntimeError(
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript "
        "(most recent call last):\n  ...\nRuntimeError: out of memory\n"
    )
    assert torch_stream.one_line(error) == "RuntimeError: out of memory"


def test_texts_of_any_length_are_encoded():
    def module(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (ids * mask).float().sum(dim=1, keepdim=True)

    encode = torch_cuda.plain_text(module, Late())
    for length in (1, 5):
        ids = np.arange(2 * length).reshape(2, length)
        want = ids.sum(axis=1, keepdims=True).astype(np.float32)
        np.testing.assert_array_equal(encode(ids, np.ones_like(ids)), want)


# --- on a GPU

ON_GPU = [pytest.mark.gpu]
if not torch.cuda.is_available():
    ON_GPU.append(pytest.mark.skip(reason="torch finds no GPU here"))


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def gpu_payload_of(models, tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(compute: str) -> Path:
        if compute not in made:
            folder = tmp_path_factory.mktemp("cuda")
            lowered, types = lower_marnet(models[HIDDEN]), Types(compute, compute)
            build_encoder(lowered, torch.rand(2, 3, 32, 32), types, folder, Order("cuda"))
            build_refine(lowered, types, folder, Order("cuda"))
            made[compute] = folder
        return made[compute]

    return make


@on_gpu
@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_the_processor_s_answers(gpu_payload_of, on_cpu, tables, compute):
    backend = torchscript.open_payload(gpu_payload_of(compute), compute, None, "cuda")
    for count in (1, 5, 8, 70):
        for table in (tables(), tables(samples=3)):
            got, want = backend.run(pixels(count), table), on_cpu(pixels(count), table)
            for one, other in zip(got, want, strict=True):
                assert close(one, other, BUILT[compute])
    report = backend.report()
    assert report is not None
    assert report.fallbacks == {}
    assert report.replays > 0


@on_gpu
def test_a_hundred_thousand_replays_allocate_nothing_and_are_equal(gpu_payload_of, tables):
    backend = torchscript.open_payload(gpu_payload_of("fp16"), "fp16", None, "cuda")
    given, table = pixels(1), tables()
    want = backend.run(given, table)
    before = torch.cuda.memory_stats()
    for _ in range(100_000):
        got = backend.run(given, table)
    after = torch.cuda.memory_stats()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    for count in (
        "allocation.all.allocated",
        "segment.all.allocated",
        "reserved_bytes.all.current",
    ):
        assert after[count] == before[count]
    report = backend.report()
    assert report is not None
    assert (report.captures, report.replays) == (1, 100_001)


@on_gpu
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_an_answer_does_not_depend_on_its_place_in_the_batch(gpu_payload_of, tables, compute):
    backend = torchscript.open_payload(gpu_payload_of(compute), compute, None, "cuda")
    given, table = pixels(8), tables(samples=2)
    logits, _ = backend.run(given, table)
    turned, _ = backend.run(np.ascontiguousarray(given[::-1]), table)
    np.testing.assert_array_equal(turned[::-1], logits)


@on_gpu
def test_the_kernel_and_the_operators_agree_on_a_gpu(gpu_payload_of, tables):
    model = torchscript.load_model(gpu_payload_of("fp16"), "fp16", "cuda")
    operators = TorchOnCuda(replace(model, parts="this test asks for operators"))
    kernel = TorchOnCuda(model)
    for count in (1, 8):
        given, table = pixels(count), tables(samples=2)
        got, want = kernel.run(given, table), operators.run(given, table)
        assert close(got[0], want[0], CAPTURED_LOOP["fp16"])
    assert "this test asks for operators" in operators.report().loop
    assert kernel.report().loop.startswith("persistent kernel"), kernel.report().loop


@on_gpu
def test_an_array_on_the_gpu_is_read_where_it_lies(gpu_payload_of, tables):
    backend = torchscript.open_payload(gpu_payload_of("fp32"), "fp32", None, "cuda")
    table, given = tables(), torch.from_numpy(pixels(8)).cuda()
    np.testing.assert_array_equal(
        backend.run(backend.device_rows(given), table)[0], backend.run(pixels(8), table)[0]
    )
    given.copy_(torch.from_numpy(pixels(8, seed=1)))  # still at work when the next line starts
    np.testing.assert_array_equal(
        backend.run(backend.device_rows(given), table)[0], backend.run(pixels(8, 1), table)[0]
    )


@on_gpu
def test_a_capture_that_fails_says_why_and_leaves_the_gpu_usable(gpu_payload_of, tables):
    model = torchscript.load_model(gpu_payload_of("fp32"), "fp32", "cuda")

    def asks_the_host(pixels: Any) -> Any:
        x_v = model.encode(pixels)
        return x_v + float(x_v.sum()) * 0  # waits for the GPU, which nobody may while capturing

    backend = TorchOnCuda(replace(model, encode=asks_the_host))
    with pytest.warns(RuntimeWarning, match="torch cannot capture a graph: .*captur"):
        got = backend.run(pixels(2), tables())
    want = TorchOnCuda(model).run(pixels(2), tables())
    assert close(got[0], want[0], BUILT["fp32"])

"""The TensorRT leaf: what needs no GPU is tried with a real engine, and the rest on one."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import IntEnum
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny import make_model, tables_of
from tolerances import BUILT

from marnet_export.builders import Types
from marnet_export.builders.tensorrt import (
    _session,
    build_encoder,
    build_refine,
    build_text,
    open_reference,
    open_text_reference,
)
from marnet_export.lower import Lowered, lower
from marnet_export.plan import make_plan
from marnet_export.tensorrt_engines import add_engines
from marnet_sdk.backends import Backend, Floats, Tables, TextEncoder
from marnet_sdk.backends import tensorrt as leaf
from marnet_sdk.backends.tensorrt import (
    by_noise_row,
    by_samples,
    open_payload,
    open_text,
    pad_rows,
    split_batch,
)
from marnet_sdk.errors import BackendUnavailable, InvalidInput, MissingExtra
from marnet_sdk.tensorrt_library import (
    Device,
    Engine,
    EngineSet,
    Library,
    choose_engines,
    find_device,
    load_library,
    read_index,
)
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

BATCHES = [(1, 1), (8, 8), (16, 16)]


def has_gpu() -> bool:
    try:
        find_device()
    except BackendUnavailable:
        return False
    return True


no_gpu = pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")


# --- what needs no GPU


@pytest.mark.parametrize(
    ("count", "batches", "expected"),
    [
        (1, BATCHES, [(0, 1, 0, 1)]),
        (2, BATCHES, [(0, 2, 1, 8)]),
        (8, BATCHES, [(0, 8, 1, 8)]),
        (9, BATCHES, [(0, 9, 2, 16)]),
        (17, BATCHES, [(0, 16, 2, 16), (16, 17, 0, 1)]),
        (40, BATCHES, [(0, 16, 2, 16), (16, 32, 2, 16), (32, 40, 1, 8)]),
        (9, BATCHES[::-1], [(0, 9, 0, 16)]),  # in whatever order they were built
        (3, [(1, 64)], [(0, 3, 0, 3)]),
        (70, [(1, 64)], [(0, 64, 0, 64), (64, 70, 0, 6)]),
        (1, [(4, 4)], [(0, 1, 0, 4)]),
    ],
)
def test_a_batch_takes_the_smallest_bucket_that_holds_it(count, batches, expected):
    pieces = split_batch(count, batches)
    assert [(p.rows.start, p.rows.stop, p.profile, p.batch) for p in pieces] == expected


def test_padding_repeats_the_last_row():
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    padded = pad_rows(rows, 5)
    np.testing.assert_array_equal(padded, rows[[0, 1, 2, 2, 2]])
    assert pad_rows(rows, 3) is rows


def recorded(calls: list[tuple[int, tuple[int, ...]]]):
    """A loop whose logits say which image and noise they come from."""

    def run(x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        calls.append((len(x_v), tables.bias.shape))
        logits = x_v[:, None, :1] * 100 + tables.bias[0, :, :, :1]
        return logits, np.repeat(logits, 2, axis=2)

    return run


def tables_with(rows: int, samples: int) -> Tables:
    bias = np.arange(rows * samples, dtype=np.float32).reshape(1, rows, samples, 1)
    return Tables(np.zeros((2, 3), np.float32), np.repeat(bias, 2, axis=0))


def test_more_noise_samples_than_the_engine_takes_are_run_in_turn():
    calls = []
    x_v, tables = np.arange(3, dtype=np.float32)[:, None], tables_with(1, 7)
    logits, features = by_samples(recorded(calls), 3)(x_v, tables)
    assert [shape[2] for _, shape in calls] == [3, 3, 1]
    np.testing.assert_array_equal(logits, recorded([])(x_v, tables)[0])
    assert features.shape == (3, 7, 2)


def test_images_with_noise_of_their_own_are_run_alone():
    calls = []
    x_v, tables = np.arange(3, dtype=np.float32)[:, None], tables_with(3, 2)
    logits, features = by_noise_row(recorded(calls), x_v, tables)
    assert calls == [(1, (2, 1, 2, 1))] * 3
    np.testing.assert_array_equal(logits, recorded([])(x_v, tables)[0])
    assert features.shape == (3, 2, 2)


@pytest.fixture(scope="module")
def small_payload(tmp_path_factory) -> Path:
    """Real engines, of one product each. Read-only."""
    folder = tmp_path_factory.mktemp("small")
    for name, inputs in {"encoder": ["pixels"], "refine": ["x_v"]}.items():
        values = [helper.make_tensor_value_info(i, TensorProto.FLOAT, ["b", 4]) for i in inputs]
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 2])
        weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 2], [0.5] * 8)
        node = helper.make_node("MatMul", [inputs[0], "weight"], ["out"])
        graph = helper.make_graph([node], name, values, [out], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / f"{name}.onnx")
    add_engines(folder, ["sm80", "sm89"], buckets=[1, 8])
    return folder


def run_here(code: str, payload: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may crash."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(payload)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@no_gpu
def test_without_a_driver_the_error_names_both_sides_and_nothing_is_loaded(small_payload):
    """A runtime of TensorRT without a driver takes the process down."""
    done = run_here(
        """
        import sys
        from pathlib import Path
        from marnet_sdk.backends.tensorrt import open_payload
        from marnet_sdk.errors import BackendUnavailable
        try:
            open_payload(Path(sys.argv[1]), "fp16", None)
        except BackendUnavailable as error:
            print(error)
        print({"tensorrt", "tensorrt_rtx", "cuda", "torch"} & set(sys.modules))
        """,
        small_payload,
    )
    version = load_library("tensorrt_rtx").version
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"tensorrt: the engines were built by TensorRT-RTX {version} on sm80, sm89, and this "
        "machine has no CUDA driver (libcuda.so.1 is not here); run the bundle on a machine with "
        "such a GPU, or export one for this machine: marnet-export --backend auto",
        "set()",
    ]


@no_gpu
def test_everything_up_to_the_first_call_of_the_driver_runs_here(small_payload):
    """With a driver that says there is a GPU and then is gone."""
    done = run_here(
        """
        import sys
        from pathlib import Path
        from marnet_sdk.backends import tensorrt
        from marnet_sdk.errors import BackendUnavailable
        from marnet_sdk.tensorrt_library import Device
        tensorrt.find_device = lambda: Device("NVIDIA L4", (8, 9), 13000)
        try:
            tensorrt.open_payload(Path(sys.argv[1]), "fp16", None)
        except BackendUnavailable as error:
            print(error)
        print("tensorrt_rtx" in sys.modules)
        """,
        small_payload,
    )
    assert (done.returncode, done.stderr) == (0, "")
    error, loaded = done.stdout.splitlines()
    assert error.startswith("tensorrt: the CUDA driver cannot be asked for cuInit: ")
    assert loaded == "True"


@no_gpu
def test_text_is_refused_like_images(small_payload):
    with pytest.raises(BackendUnavailable, match="this machine has no CUDA driver"):
        open_text(small_payload, "fp16", None)


def test_without_cuda_bindings_the_pip_line_is_named(small_payload, monkeypatch):
    monkeypatch.setattr(leaf, "find_device", lambda: Device("NVIDIA L4", (8, 9), 13000))
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(MissingExtra, match=r'"cuda\S*" is not installed.*"marnet\[rtx\]"'):
        open_payload(small_payload, "fp16", None)


RUNTIME = {
    "Runtime": "get_engine_validity deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode create_runtime_config "
    "create_execution_context",
    "IRuntimeConfig": "set_execution_context_allocation_strategy create_runtime_cache "
    "set_runtime_cache cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeCache": "serialize deserialize",
    "IExecutionContext": "set_optimization_profile_async set_input_shape set_tensor_address "
    "get_tensor_shape execute_async_v3",
    "EngineValidity": "INVALID",
    "TensorIOMode": "OUTPUT",
    "ExecutionContextAllocationStrategy": "ON_PROFILE_CHANGE",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "CudaGraphStrategy": "DISABLED",
}


@pytest.mark.parametrize("kind", RUNTIME)
def test_the_library_has_every_name_that_only_a_gpu_calls(kind):
    """Tests on a machine without one would not notice that a release has renamed something."""
    found = getattr(load_library("tensorrt_rtx").module, kind)
    assert [name for name in RUNTIME[kind].split() if not hasattr(found, name)] == []


CUDA = (
    "cuInit cuDeviceGet cuDevicePrimaryCtxRetain cuCtxPushCurrent cuCtxPopCurrent cuStreamCreate "
    "cuStreamSynchronize cuMemAlloc cuMemFree cuMemcpyHtoDAsync cuMemcpyDtoHAsync CUstream_flags"
)


def test_cuda_bindings_has_every_name_that_only_a_gpu_calls():
    driver = import_module("cuda.bindings.driver")
    assert [name for name in CUDA.split() if not hasattr(driver, name)] == []
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1


# --- on a GPU, or on one that is played


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


OK, INVALID = Status.CUDA_SUCCESS, Status.CUDA_ERROR_INVALID_VALUE


class PlayedDriver:
    """The part of cuda.bindings.driver that is used, with memory of the host for the GPU's."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        """cuInit, cuStreamSynchronize and others that have nothing to do here."""
        if not name.startswith("cu"):
            raise AttributeError(name)
        values = {"cuDeviceGet": 0, "cuDevicePrimaryCtxRetain": 77, "cuStreamCreate": 5}
        return lambda *_: (OK, values[name]) if name in values else (OK,)

    def current(self) -> list[int]:
        if not hasattr(self.thread, "stack"):
            self.thread.stack = []
        return self.thread.stack

    def cuCtxPushCurrent(self, context: int) -> tuple[Status]:  # noqa: N802
        self.current().append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Status, int]:  # noqa: N802
        return OK, self.current().pop()

    def cuMemAlloc(self, size: int) -> tuple:  # noqa: N802
        if not self.current() or size <= 0:
            return (INVALID, 0)
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cuMemFree(self, address: int) -> tuple[Status]:  # noqa: N802
        return (OK if self.current() and self.memory.pop(address, None) else INVALID,)

    def holds(self, address: int, size: int) -> bool:
        return address in self.memory and size <= len(self.memory[address])

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int):  # noqa: N802
        if not self.current() or not self.holds(to, size):
            return (INVALID,)
        ctypes.memmove(to, source, size)
        return (OK,)

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int):  # noqa: N802
        if not self.current() or not self.holds(source, size):
            return (INVALID,)
        ctypes.memmove(to, source, size)
        return (OK,)


class PlayedEngine:
    """An engine whose products ONNX Runtime computes, from the ONNX file that it was built from."""

    def __init__(self, driver: PlayedDriver, path: Path, batches: Sequence[tuple[int, int]]):
        self.driver, self.batches = driver, batches
        self.session = _session(path, 1)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = load_library("tensorrt_rtx").module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda blob: True)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: None,
        )

    def create_execution_context(self, runtime_config: Any) -> PlayedContext:
        return PlayedContext(self)


class PlayedContext:
    def __init__(self, engine: PlayedEngine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.batches = (0, 0)
        self.busy = threading.Lock()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.batches = self.engine.batches[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.batches
        self.shapes[name] = shape
        return name in ("coefficients", "bias") or least <= shape[0] <= most

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in self.engine.driver.memory

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = ctypes.c_int64 if name in ("ids", "mask") else ctypes.c_float
        pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(kind))
        return np.ctypeslib.as_array(pointer, shape)

    def answers(self) -> dict[str, np.ndarray]:
        feed = {name: self.array(name, self.shapes[name]) for name in self.engine.inputs}
        results = self.engine.session.run(self.engine.outputs, feed)
        return dict(zip(self.engine.outputs, results, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.answers()[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert self.busy.acquire(blocking=False), "two threads in one context"
        for name, values in self.answers().items():
            self.array(name, values.shape)[...] = values
        self.busy.release()
        return True


def play_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ada GPU: all of the leaf runs but for TensorRT's own runtime and the driver."""
    rtx, driver = load_library("tensorrt_rtx"), PlayedDriver()

    class Runtime:
        def __init__(self, log: Any) -> None:
            pass

        def get_engine_validity(self, content: bytes) -> tuple[Any, int]:
            sound = sha256(content).hexdigest() in known
            validity = rtx.module.EngineValidity
            return (validity.VALID, 0) if sound else (validity.INVALID, 32)

        def deserialize_cuda_engine(self, content: bytes) -> PlayedEngine:
            path, engine = known[sha256(content).hexdigest()]
            return PlayedEngine(driver, path, engine.batches)

    known: dict[str, tuple[Path, Engine]] = {}

    def choose(sets: Sequence[EngineSet], device: Device) -> tuple[Library, EngineSet]:
        found = choose_engines(sets, device)[1]
        known.update(
            (engine.sha256, (folders[-1] / f"{name}.onnx", engine))
            for name, engine in found.engines.items()
        )
        module: Any = SimpleNamespace(**{**vars(rtx.module), "Runtime": Runtime})
        return replace(rtx, module=module), found

    folders: list[Path] = []

    def read(payload: Path) -> list[EngineSet]:
        folders.append(payload)
        return read_index(payload)

    monkeypatch.setattr(leaf, "find_device", lambda: Device("NVIDIA L4", (8, 9), 13000))
    monkeypatch.setattr(leaf, "choose_engines", choose)
    monkeypatch.setattr(leaf, "read_index", read)
    monkeypatch.setattr(import_module("cuda.bindings"), "driver", driver, raising=False)


class Here(NamedTuple):
    model: MARNet
    lowered: Lowered
    payload: Path
    backend: Backend
    reference: Backend  # the same graphs in ONNX Runtime


@pytest.fixture(scope="module", params=["played", pytest.param("real", marks=pytest.mark.gpu)])
def here(request, tmp_path_factory) -> Iterator[Here]:
    """Engines for the GPU of this machine, or for the one that is played."""
    played = request.param == "played"
    if not played and not has_gpu():
        pytest.skip("no CUDA device on this machine")
    payload = tmp_path_factory.mktemp("gpu")
    model = make_model(hidden=32, dim=64)
    lowered, types = lower(model), Types("fp16", "fp16")
    how: dict[str, Any] = {"buckets": [1, 4, 8], "targets": ["sm89"] if played else []}
    build_encoder(lowered, torch.rand(2, 3, 32, 32), types, payload, **how)
    build_refine(lowered, types, payload, **how)
    build_text(lowered, types, payload, **how)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MARNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        if played:
            play_gpu(monkeypatch)
        backend = open_payload(payload, "fp16", None)
        yield Here(model, lowered, payload, backend, open_reference(payload, 1))


@pytest.fixture(scope="module")
def text(here) -> tuple[TextEncoder, TextEncoder]:
    return open_text(here.payload, "fp16", None), open_text_reference(here.payload, 1)


def pixels(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random((count, 3, 32, 32), np.float32)


def tables(here: Here, steps: int = 20, samples: int = 1, seed: int = 0, keys=None) -> Tables:
    table = sampler_table(here.model.config.schedule, "ddpm", steps)
    return tables_of(
        here.model, make_plan(here.model), table, samples=samples, seed=seed, keys=keys
    )


def assert_close(got: Floats, want: Floats) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= BUILT["fp16"] * np.abs(want).max()


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8, 9, 21])
def test_the_gpu_answers_as_the_cpu_does_for_every_batch(here, batch):
    given = pixels(batch)
    x_v = here.reference.encode(given)
    assert_close(here.backend.encode(given), x_v)
    got, want = (run.refine(x_v, tables(here)) for run in (here.backend, here.reference))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (2, 3), (100, 1), (3, 16), (3, 40)])
def test_one_engine_serves_every_number_of_steps_and_samples(here, steps, samples):
    x_v = here.reference.encode(pixels(3))
    given = tables(here, steps, samples)
    assert_close(here.backend.refine(x_v, given)[0], here.reference.refine(x_v, given)[0])


def test_images_may_have_noise_of_their_own(here):
    x_v, given = here.reference.encode(pixels(3)), tables(here, samples=2, keys=[5, 6, 2**64 - 4])
    assert_close(here.backend.refine(x_v, given)[0], here.reference.refine(x_v, given)[0])


def test_a_chain_that_the_engine_was_not_built_for_is_refused(here):
    x_v = here.reference.encode(pixels(1))
    bias = np.zeros((1001, 1, 1, here.lowered.row_width), np.float32)
    with pytest.raises(InvalidInput, match=r"steps: got 1001, the engine refine\.engine takes"):
        here.backend.refine(x_v, Tables(np.zeros((1001, 3), np.float32), bias))


def test_texts_of_every_batch_and_length(text):
    run, reference = text
    rng = np.random.default_rng(0)
    for batch, length in [(1, 1), (3, 7), (8, 512), (11, 20)]:
        ids = rng.integers(0, 8, (batch, length))
        mask = np.ones_like(ids)
        mask[0, length // 2 + 1 :] = 0
        assert_close(run(ids, mask), reference(ids, mask))
    with pytest.raises(InvalidInput, match=r"tokens: got 513, the engine text\.engine takes"):
        run(np.ones((1, 513), np.int64), np.ones((1, 513), np.int64))


def test_calls_from_eight_threads_give_what_calls_one_after_another_give(here):
    inputs = [
        (pixels(1 + i % 9, seed=i), tables(here, samples=1 + i % 3, seed=i)) for i in range(48)
    ]

    def answer(given: tuple[Floats, Tables]) -> list[Floats]:
        x_v = here.backend.encode(given[0])
        return [x_v, *here.backend.refine(x_v, given[1])]

    one_after_another = [answer(given) for given in inputs]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(answer, inputs))
    for got, want in zip(at_once, one_after_another, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_answers_belong_to_the_caller_and_inputs_are_left_alone(here):
    given, table = pixels(3), tables(here, samples=2)
    x_v = here.backend.encode(given)
    answers = [x_v, *here.backend.refine(x_v, table)]
    kept = [array.copy() for array in answers]
    here.backend.refine(here.backend.encode(pixels(3, seed=1)), tables(here, seed=1))
    for array, copy in zip(answers, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert array.flags.writeable
    np.testing.assert_array_equal(given, pixels(3))


def test_arrays_that_are_read_only_or_not_contiguous_are_taken(here):
    want = here.backend.encode(pixels(3))
    wide = np.zeros((3, 3, 32, 64), np.float32)
    wide[..., ::2] = pixels(3)
    np.testing.assert_array_equal(here.backend.encode(wide[..., ::2]), want)
    fixed = pixels(3)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(here.backend.encode(fixed), want)


def test_compiled_kernels_are_kept_for_the_next_process(here, tmp_path, monkeypatch):
    (engines,) = read_index(here.payload)
    if engines.flavour != "tensorrt_rtx":
        pytest.skip("standard TensorRT compiles when it builds")
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    open_payload(here.payload, "fp16", None).encode(pixels(1))
    (kept,) = (tmp_path / "tensorrt").iterdir()
    written = kept.stat().st_mtime_ns
    open_payload(here.payload, "fp16", None).encode(pixels(1))
    assert kept.stat().st_mtime_ns == written


def test_a_damaged_engine_is_refused_by_name(here, tmp_path):
    shutil.copytree(here.payload, tmp_path, dirs_exist_ok=True)
    (engines,) = read_index(tmp_path)
    path = engines.file(tmp_path, "encoder")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(BackendUnavailable, match=r"cannot (run|load) .*encoder.engine on"):
        open_payload(tmp_path, "fp16", None)


def test_the_thread_keeps_the_context_that_it_had(here):
    driver: Any = here.backend._encoder.machine.gpu._driver
    if isinstance(driver, PlayedDriver):
        here.backend.encode(pixels(1))
        assert driver.current() == []
    else:
        before = driver.cuCtxGetCurrent()
        here.backend.encode(pixels(1))
        assert int(driver.cuCtxGetCurrent()[1]) == int(before[1])


def test_memory_is_given_back_with_the_backend(here):
    backend: Any = open_payload(here.payload, "fp16", None)
    driver = backend._encoder.machine.gpu._driver
    if not isinstance(driver, PlayedDriver):
        pytest.skip("the driver does not say how much one backend holds")
    gc.collect()  # what other tests left
    before = set(driver.memory)
    backend.encode(pixels(9))
    backend.refine(here.reference.encode(pixels(3)), tables(here))
    assert len(driver.memory) > len(before)
    del backend
    gc.collect()
    assert set(driver.memory) == before

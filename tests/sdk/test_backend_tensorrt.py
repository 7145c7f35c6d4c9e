"""The TensorRT leaf: what needs no GPU is tried with a real engine, and the rest on one."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from exports import in_one_process
from onnx import TensorProto, helper
from played_gpu import PlayedDriver, has_driver, played_array
from tiny import make_model, tables_of, write_checkpoint
from tolerances import BUILT

import marnet_kernels.loader
import marnet_kernels.persistent
import marnet_sdk.gpu.driver
from marnet_export.build.builder import Order
from marnet_export.build.tensorrt import graphs
from marnet_export.build.tensorrt.engines import add_engines, check_targets
from marnet_export.build.tensorrt.graphs import (
    _session,
    build_encoder,
    build_refine,
    build_text,
    open_reference,
    open_text_reference,
)
from marnet_export.build.types import Types
from marnet_export.job import export_bundle
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.plan import make_plan
from marnet_export.settings import Settings
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.persistent import ReverseSamplerArguments, Variant, check_launch
from marnet_kernels.reverse_sampler import Layout, PackedLoop, reverse_sampler_reference
from marnet_sdk import Classifier
from marnet_sdk.backends import Backend, TextEncoder, open_backend
from marnet_sdk.backends.tensorrt import (
    by_noise_row,
    by_samples,
    open_payload,
    open_text,
)
from marnet_sdk.errors import (
    BackendUnavailable,
    InferenceError,
    InvalidInput,
    MarnetError,
    MarnetWarning,
    MissingExtra,
)
from marnet_sdk.gpu import tensorrt_runtime
from marnet_sdk.gpu.tensorrt_library import (
    Device,
    Engine,
    EngineSet,
    Library,
    choose_engines,
    find_device,
    load_library,
    read_index,
)
from marnet_sdk.noise.tables import Floats, Tables
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet


def why_no_gpu() -> str:
    """Why this machine has no GPU, without a driver or with one; empty where it has one."""
    try:
        find_device()
    except BackendUnavailable as error:
        return str(error)
    return ""


NO_GPU = why_no_gpu()
no_gpu = pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")


# --- what needs no GPU


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
        f"machine has {NO_GPU}; run the bundle on a machine with "
        "such a GPU, or export one for this machine: marnet-export --backend auto",
        "set()",
    ]


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_everything_up_to_the_first_call_of_the_driver_runs_here(small_payload):
    """With a driver that says there is a GPU and then is gone."""
    done = run_here(
        """
        import sys
        from pathlib import Path
        from marnet_sdk.backends import tensorrt
        from marnet_sdk.gpu import tensorrt_runtime
        from marnet_sdk.errors import BackendUnavailable
        from marnet_sdk.gpu.tensorrt_library import Device
        tensorrt_runtime.find_device = lambda: Device("NVIDIA L4", (8, 9), 13000)
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
    with pytest.raises(BackendUnavailable, match=re.escape(f"this machine has {NO_GPU}")):
        open_text(small_payload, "fp16", None)


def test_without_cuda_bindings_the_pip_line_is_named(small_payload, monkeypatch):
    monkeypatch.setattr(tensorrt_runtime, "find_device", lambda: Device("NVIDIA L4", (8, 9), 13000))
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(MissingExtra, match=r'"cuda\S*" is not installed.*"marnet\[rtx\]"'):
        open_payload(small_payload, "fp16", None)


RUNTIME = {
    "Runtime": "get_engine_validity deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode create_runtime_config "
    "create_execution_context get_tensor_shape get_device_memory_size_for_profile_v2",
    "IRuntimeConfig": "set_execution_context_allocation_strategy create_runtime_cache "
    "set_runtime_cache cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeCache": "serialize deserialize",
    "IExecutionContext": "set_optimization_profile_async set_input_shape set_tensor_address "
    "get_tensor_shape execute_async_v3 is_stream_capturable",
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


# --- on a GPU, or on one that is played


class PlayedEngine:
    """An engine whose products ONNX Runtime computes, from the ONNX file that it was built from."""

    def __init__(self, gpu: PlayedGpu, path: Path, batches: Sequence[tuple[int, int]]) -> None:
        self.gpu, self.driver, self.batches, self.name = gpu, gpu.driver, batches, path.stem
        self.session = _session(path, 1)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = load_library("tensorrt_rtx").module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        (shape,) = (value.shape for value in values if value.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * self.batches[profile][1]

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda blob: True)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: None,
        )

    def create_execution_context(self, runtime_config: Any) -> PlayedContext:
        disabled = load_library("tensorrt_rtx").module.CudaGraphStrategy.DISABLED
        assert runtime_config.cuda_graph_strategy == disabled
        return PlayedContext(self)


class PlayedContext:
    def __init__(self, engine: PlayedEngine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.batches = (0, 0)
        self.busy = threading.Lock()

    def log(self, what: str) -> None:
        self.engine.driver.log.append(f"{self.engine.name}: {what}")

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.batches = self.engine.batches[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.log(f"shape {name}")
        least, most = self.batches
        self.shapes[name] = shape
        return name in ("coefficients", "bias") or least <= shape[0] <= most

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.log(f"address {name}")
        self.addresses[name] = address
        return self.engine.driver.holds(address, 1)

    def answers(self) -> dict[str, np.ndarray]:
        kinds = {"ids": ctypes.c_int64, "mask": ctypes.c_int64}
        feed = {
            name: self.engine.driver.array(
                self.addresses[name], self.shapes[name], kinds.get(name, ctypes.c_float)
            )
            for name in self.engine.inputs
        }
        results = self.engine.session.run(self.engine.outputs, feed)
        return dict(zip(self.engine.outputs, results, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """What varies in an output has the size of the input in which it varies too."""
        sizes = {"batch": self.batches[1]}
        for value in self.engine.session.get_inputs():
            named = zip(value.shape, self.shapes[value.name], strict=True)
            sizes |= {size: given for size, given in named if isinstance(size, str)}
        values = (*self.engine.session.get_inputs(), *self.engine.session.get_outputs())
        (shape,) = (value.shape for value in values if value.name == name)
        return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.name not in self.engine.gpu.uncapturable

    def execute_async_v3(self, stream: int) -> bool:
        self.log("enqueue")
        if self.engine.name in self.engine.gpu.refused:
            return False
        self.engine.driver.enqueue(stream, self.run)
        return True

    def run(self) -> None:
        assert self.busy.acquire(blocking=False), "two threads in one context"
        for name, values in self.answers().items():
            self.engine.driver.array(self.addresses[name], values.shape)[...] = values
        self.busy.release()


class PlayedSampler:
    """The persistent kernel, whose twin in NumPy reads and writes the GPU's memory."""

    driver: PlayedDriver

    def __init__(self, layout: Layout, variant: Variant) -> None:
        self.layout, self.variant = layout, variant

    def launch(self, stream: int, arguments: ReverseSamplerArguments) -> None:
        check_launch(self.layout, self.variant, arguments)
        self.driver.log.append("kernel")
        self.driver.enqueue(stream, lambda: self.run(arguments))

    def run(self, a: ReverseSamplerArguments) -> None:
        array, plan = self.driver.array, self.layout
        width = plan.padded
        weights = array(a.weights, plan.weight_shape, ctypes.c_uint16)
        packed = PackedLoop(plan, weights, array(a.biases, (2, width)))
        q = array(a.condition, (a.images, width))
        coefficients = array(a.coefficients, (a.steps, 4))
        bias = array(a.bias, (a.steps, 1, a.samples, width))
        h3 = reverse_sampler_reference(packed, q, coefficients, bias, a.slope)
        array(a.out, (a.images, a.samples, width))[..., : h3.shape[2]] = h3


class PlayedGpu(NamedTuple):
    """What tests may ask of the GPU and change about it."""

    driver: PlayedDriver
    uncapturable: set[str]  # engines of which the library says so
    refused: set[str]  # engines that are not enqueued
    device: dict[str, Any]  # of DeviceInfo, what is not an Ada GPU's


def play_gpu(monkeypatch: pytest.MonkeyPatch) -> PlayedGpu:
    """One Ada GPU: all of the leaf runs but for TensorRT's own runtime, kernel and driver."""
    rtx, driver = load_library("tensorrt_rtx"), PlayedDriver()
    gpu = PlayedGpu(driver, set(), set(), {})

    class Runtime:
        def __init__(self, log: Any) -> None:
            pass

        def get_engine_validity(self, content: bytes) -> tuple[Any, int]:
            sound = sha256(content).hexdigest() in known
            validity = rtx.module.EngineValidity
            return (validity.VALID, 0) if sound else (validity.INVALID, 32)

        def deserialize_cuda_engine(self, content: bytes) -> PlayedEngine:
            path, engine = known[sha256(content).hexdigest()]
            return PlayedEngine(gpu, path, engine.batches)

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

    def current_device() -> DeviceInfo:
        ada = {"capability": (8, 9), "multiprocessors": 58, "shared_bytes": 99 << 10}
        return DeviceInfo(**({**ada, "cooperative": True} | gpu.device))

    monkeypatch.setattr(tensorrt_runtime, "find_device", lambda: Device("NVIDIA L4", (8, 9), 13000))
    monkeypatch.setattr(tensorrt_runtime, "choose_engines", choose)
    monkeypatch.setattr(tensorrt_runtime, "read_index", read)
    monkeypatch.setattr(import_module("cuda.bindings"), "driver", driver, raising=False)
    monkeypatch.setattr(PlayedSampler, "driver", driver, raising=False)
    monkeypatch.setattr(marnet_kernels.persistent, "ReverseSampler", PlayedSampler)
    monkeypatch.setattr(marnet_kernels.loader, "current_device", current_device)
    return gpu


class Here(NamedTuple):
    model: MARNet
    lowered: Lowered
    payload: Path
    backend: Backend
    reference: Backend  # the same graphs in ONNX Runtime
    gpu: PlayedGpu | None  # None: a real one


@pytest.fixture(scope="module", params=["played", pytest.param("real", marks=pytest.mark.gpu)])
def here(request, tmp_path_factory, shared) -> Iterator[Here]:
    """Engines for the GPU of this machine, or for the one that is played."""
    played = request.param == "played"
    if not played and NO_GPU:
        pytest.skip("no CUDA device on this machine")
    if not played:
        try:
            check_targets([])
        except MarnetError as error:
            pytest.skip(f"no TensorRT that builds for this GPU ({error})")
    model = make_model(hidden=32, dim=64)
    lowered, types = lower(model), Types("fp16", "fp16")
    order = Order(targets=["sm89"] if played else [], buckets=[1, 4, 8])

    def build(out: Path) -> None:
        payload = tmp_path_factory.mktemp("gpu")
        build_encoder(lowered, torch.rand(2, 3, 32, 32), types, payload, order)
        build_refine(lowered, types, payload, order)
        build_text(lowered, types, payload, order)
        payload.rename(out)

    payload = shared(f"engines-{request.param}", build)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MARNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        gpu = play_gpu(monkeypatch) if played else None
        backend = open_payload(payload, "fp16", None)
        yield Here(model, lowered, payload, backend, open_reference(payload, 1), gpu)


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
    driver: Any = here.backend._encoder.machine.gpu.driver
    if isinstance(driver, PlayedDriver):
        here.backend.encode(pixels(1))
        assert driver.current() == []
    else:
        before = driver.cuCtxGetCurrent()
        here.backend.encode(pixels(1))
        assert int(driver.cuCtxGetCurrent()[1]) == int(before[1])


def test_memory_is_given_back_with_the_backend(here):
    if here.gpu is None:
        pytest.skip("the driver does not say how much one backend holds")
    driver = here.gpu.driver
    gc.collect()  # what other tests left
    before = set(driver.memory)
    backend = open_payload(here.payload, "fp16", None)
    backend.encode(pixels(9))
    backend.refine(here.reference.encode(pixels(3)), tables(here))
    assert len(driver.memory) > len(before)
    del backend
    gc.collect()
    assert set(driver.memory) == before


# --- captured graphs


@pytest.fixture
def fresh(here) -> Iterator[tuple[Any, PlayedGpu]]:
    """A backend that has captured nothing, on the GPU that is played."""
    if here.gpu is None:
        pytest.skip("looks into the GPU that is played")
    backend = open_payload(here.payload, "fp16", None)
    here.gpu.driver.log.clear()
    yield backend, here.gpu
    here.gpu.uncapturable.clear()
    here.gpu.refused.clear()
    here.gpu.device.clear()
    here.gpu.driver.broken.clear()


def assert_answers(backend: Any, here: Here, given: Floats, table: Tables) -> None:
    """As the same graphs do in ONNX Runtime."""
    want = here.reference.run(given, table)
    for one, other in zip(backend.run(given, table), want, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("batch", [1, 3, 8, 21])
@pytest.mark.parametrize(("steps", "samples"), [(20, 1), (1, 2), (2, 3)])
def test_a_captured_graph_answers_as_its_parts_do(here, batch, steps, samples):
    """Again and again, and with other tables of the same sizes."""
    for seed in (0, 0, 1):
        table = tables(here, steps, samples, seed=seed)
        assert_answers(here.backend, here, pixels(batch, seed), table)


def test_after_the_first_a_batch_is_one_launch_and_nothing_is_bound_or_allocated(here, fresh):
    (backend, gpu), table = fresh, tables(here)
    backend.run(pixels(4), table)
    first = list(gpu.driver.log)
    assert first.count("cuGraphLaunch") == 1
    gpu.driver.log.clear()
    backend.run(pixels(4, seed=1), table)
    backend.run(pixels(3, seed=2), table)  # padded to 4
    assert gpu.driver.log == ["cuGraphLaunch", "cuStreamSynchronize"] * 2
    gpu.driver.log.clear()
    backend.run(pixels(4), tables(here, seed=1))  # other tables of the same sizes
    copies = ["cuMemcpyHtoDAsync"] * 2  # coefficients and bias
    assert gpu.driver.log == [*copies, "cuGraphLaunch", "cuStreamSynchronize"]


def test_every_tensor_is_bound_once_and_every_engine_enqueued_before_the_capture(here, fresh):
    backend, gpu = fresh
    backend.run(pixels(4), tables(here))
    log = gpu.driver.log
    bound = [line for line in log if ": shape" in line or ": address" in line]
    assert len(bound) == len(set(bound)) > 0
    begin, end = log.index("cuStreamBeginCapture"), log.index("cuStreamEndCapture")
    work = ["encoder: enqueue", "condition: enqueue", "kernel", "finish: enqueue"]
    copies = ["cuMemcpyHtoDAsync"], ["cuMemcpyDtoHAsync"] * 2  # pixels in, logits and features out
    captured = [*copies[0], *work, *copies[1]]
    assert log[begin + 1 : end] == captured
    assert [line for line in log[:begin] if line in work] == work
    assert "cuMemAlloc" not in log[begin:]


def open_slower(payload: Path, why: str) -> Any:
    """A backend that warns that it runs no persistent kernel."""
    with pytest.warns(MarnetWarning, match=f"slower than it could: .*{why}"):
        return open_payload(payload, "fp16", None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"multiprocessors": 1}, "multiprocessors: got 1, expected at least"),
        ({"cooperative": False}, "got one without cooperative launches"),
    ],
)
def test_a_gpu_on_which_the_kernel_does_not_run_gets_operators(here, fresh, change, why):
    _, gpu = fresh
    gpu.device.update(change)
    backend = open_slower(here.payload, why)
    gpu.driver.log.clear()  # of the opening
    assert_answers(backend, here, pixels(4), tables(here))
    begin = gpu.driver.log.index("cuStreamBeginCapture")
    end = gpu.driver.log.index("cuStreamEndCapture")
    enqueued = [line for line in gpu.driver.log[begin:end] if "enqueue" in line]
    assert enqueued == ["encoder: enqueue", "refine: enqueue"]
    assert backend.report().loop.startswith("operators in the captured graph, because ")
    assert why in backend.report().loop


def test_more_rows_than_the_kernel_takes_get_operators(here, fresh):
    (backend, _), table = fresh, tables(here, 2, 16)
    assert_answers(backend, here, pixels(1), table)
    assert backend.report().loop == "persistent kernel"
    with pytest.warns(MarnetWarning, match="got 128, expected at most 64"):
        assert_answers(backend, here, pixels(8), table)
    loop = backend.report().loop
    assert loop.startswith("at 16 rows: persistent kernel; at 128 rows: operators in the captured")
    assert "got 128, expected at most 64" in loop


def test_a_payload_without_engines_around_the_kernel_gets_operators(here, fresh, tmp_path):
    shutil.copytree(here.payload, tmp_path, dirs_exist_ok=True)
    (tmp_path / "loop.safetensors").unlink()
    backend: Any = open_payload(tmp_path, "fp16", None)
    assert_answers(backend, here, pixels(2), tables(here))
    assert "the payload has no engines to go around the kernel" in backend.report().loop


def test_weights_of_a_damaged_loop_are_told_and_not_used(here, fresh, tmp_path):
    shutil.copytree(here.payload, tmp_path, dirs_exist_ok=True)
    (tmp_path / "loop.safetensors").write_bytes(b"nothing")
    backend = open_slower(tmp_path, "does not hold the weights of a loop")
    assert_answers(backend, here, pixels(2), tables(here))
    assert "does not hold the weights of a loop" in backend.report().loop


def test_a_loop_that_cannot_be_captured_is_enqueued_counted_and_warned_of_once(here, fresh):
    _, gpu = fresh
    gpu.uncapturable.add("refine")
    gpu.device["cooperative"] = False
    backend = open_slower(here.payload, "cooperative")
    with pytest.warns(RuntimeWarning, match="without a captured graph.*cannot capture refine"):
        backend.run(pixels(4), tables(here))
    assert_answers(backend, here, pixels(4), tables(here))  # a second warning would be an error
    report = backend.report()
    assert (report.captures, report.replays) == (0, 0)
    ((reason, count),) = report.fallbacks.items()
    assert count == 2
    assert "cannot capture refine.engine in a CUDA graph" in reason


def test_the_kernel_makes_a_loop_capturable_that_was_not(here, fresh):
    backend, gpu = fresh
    gpu.uncapturable.add("refine")
    assert_answers(backend, here, pixels(4), tables(here))
    assert backend.report().fallbacks == {}


def test_a_capture_that_the_driver_refuses_is_a_fallback_too(here, fresh):
    backend, gpu = fresh
    gpu.driver.broken.update(range(10_000))
    with pytest.warns(RuntimeWarning, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        backend.run(pixels(4), tables(here))
    assert sum(backend.report().fallbacks.values()) == 1
    assert gpu.driver.recording == {}


def test_an_engine_that_is_not_enqueued_is_an_error(here, fresh):
    backend, gpu = fresh
    gpu.refused.add("encoder")
    error = r"refuses execute_async_v3 of .*encoder\.engine"
    with (
        pytest.warns(RuntimeWarning, match=error),
        pytest.raises(InferenceError, match=error),
    ):
        backend.run(pixels(1), tables(here))
    with pytest.raises(InferenceError, match=error):
        backend.encode(pixels(1))


@pytest.mark.parametrize("kernel", [True, False])
def test_tables_and_pixels_of_another_model_are_refused(here, fresh, kernel):
    """Never written beyond their memory on the GPU."""
    _, gpu = fresh
    gpu.device["cooperative"] = kernel
    if kernel:
        backend: Any = open_payload(here.payload, "fp16", None)
    else:
        backend = open_slower(here.payload, "cooperative")
    table = tables(here, 3)
    backend.run(pixels(4), table)
    wide = Tables(table.coefficients, np.repeat(table.bias, 2, axis=3))
    with pytest.raises(InvalidInput, match=r"bias: got shape .*64\), expected .*32\)"):
        backend.run(pixels(4), wide)
    with pytest.raises(InvalidInput, match=r"pixels: got \(4, 3, 1, 1\), expected \(4, 3, 32"):
        backend.run(pixels(4)[..., :1, :1], table)
    assert_answers(backend, here, pixels(4), table)


def test_more_noise_samples_than_the_engines_take_are_run_without_a_graph(here, fresh):
    backend, _ = fresh
    with pytest.warns(RuntimeWarning, match="take up to 16 noise samples at once, got 17"):
        logits, _ = backend.run(pixels(2), tables(here, 3, 17))
    want, _ = here.reference.run(pixels(2), tables(here, 3, 17))
    assert_close(logits, want)


def test_images_with_noise_of_their_own_are_run_without_a_graph(here, fresh):
    backend, _ = fresh
    table = tables(here, 3, keys=[1, 2])
    with pytest.warns(RuntimeWarning, match="each image has noise of its own"):
        backend.run(pixels(2), table)
    assert backend.report().fallbacks == {"each image has noise of its own": 1}


def test_the_report_says_what_is_captured_and_what_it_takes(here, fresh):
    backend, gpu = fresh
    assert backend.report().loop == "nothing was captured yet; the persistent kernel is there"
    for batch in (1, 4, 4, 5):
        backend.run(pixels(batch), tables(here))
    report = backend.report()
    assert report.device == "NVIDIA L4 (sm89)"
    assert report.buckets == (1, 4, 8)
    assert (report.captures, report.replays, report.fallbacks) == (3, 4, {})
    (engines,) = read_index(here.payload)
    sizes = {name: engine.size for name, engine in engines.engines.items()}
    assert report.memory["weights"] == sum(sizes.values()) - sizes["text"]
    assert report.memory["scratch"] == 1000 * 3 * (1 + 4 + 8)
    held = report.memory["buffers"] + report.memory["loop weights"]
    gc.collect()
    mine = sum(size for _, size in gpu.driver.memory.values())
    assert held <= mine  # others of this file hold some too
    assert report.memory["loop weights"] == 3 * 256 * 256 * 2 + 2 * 256 * 4


def test_captures_that_were_not_used_for_long_are_dropped_with_their_memory(here, fresh):
    backend, gpu = fresh
    backend._captured._most_captures = 2
    table = {k: tables(here, k) for k in (2, 3, 4)}
    for steps in (2, 3):
        backend.run(pixels(1), table[steps])
    gc.collect()
    kept, streams, graphs = (len(x) for x in _held(gpu))
    backend.run(pixels(1), table[4])  # 2 steps are dropped
    gc.collect()
    assert [len(x) for x in _held(gpu)] == [kept, streams, graphs]
    assert backend.report().captures == 3
    backend.run(pixels(1), table[3])
    assert backend.report().captures == 3
    backend.run(pixels(1), table[2])
    assert backend.report().captures == 4


def _held(gpu: PlayedGpu) -> tuple[Any, Any, Any]:
    return gpu.driver.memory, gpu.driver.streams, gpu.driver.graphs


def test_everything_of_a_captured_graph_goes_with_the_backend(here, fresh):
    _, gpu = fresh
    gc.collect()
    before = [set(x) for x in (*_held(gpu), gpu.driver.pinned)]
    backend = open_payload(here.payload, "fp16", None)
    backend.run(pixels(5), tables(here))
    assert len(gpu.driver.memory) > len(before[0])
    del backend
    gc.collect()
    assert [set(x) for x in (*_held(gpu), gpu.driver.pinned)] == before


def test_a_gpu_without_memory_for_a_capture_still_answers(here, fresh):
    backend, gpu = fresh
    backend.encode(pixels(4))
    backend.refine(here.reference.encode(pixels(4)), tables(here))
    gpu.driver.largest = 4 * pixels(4).nbytes // 4  # what the two calls have, they have
    try:
        with pytest.warns(RuntimeWarning, match="cuMemAlloc with CUDA_ERROR_OUT_OF_MEMORY"):
            logits, _ = backend.run(pixels(4), tables(here))
    finally:
        gpu.driver.largest = 1 << 40
    assert_close(logits, here.reference.run(pixels(4), tables(here))[0])


def test_captured_graphs_from_eight_threads_give_what_one_gives(here):
    inputs = [(pixels(1 + i % 9, seed=i), tables(here, 3, seed=i % 3)) for i in range(48)]
    one_after_another = [here.backend.run(*given) for given in inputs]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda given: here.backend.run(*given), inputs))
    for got, want in zip(at_once, one_after_another, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_answers_of_a_captured_graph_belong_to_the_caller(here):
    given, table = pixels(4), tables(here, 3)
    answers = here.backend.run(given, table)
    kept = [array.copy() for array in answers]
    here.backend.run(pixels(4, seed=1), table)
    for array, copy in zip(answers, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
    np.testing.assert_array_equal(given, pixels(4))


# --- arrays on the GPU


@pytest.fixture
def ordered(monkeypatch) -> list[int]:
    """Streams that were made to wait for an array's writers, which needs cuda-core and a driver."""
    found: list[int] = []

    def view(array: Any, stream: Any) -> Any:
        found.append(int(stream))
        interface = array.__cuda_array_interface__
        (address, _), shape = interface["data"], interface["shape"]
        kind = np.dtype(interface["typestr"])
        return SimpleNamespace(
            **{"ptr": address, "shape": shape, "strides": None, "dtype": kind, "device_id": 0},
            is_device_accessible=True,
        )

    monkeypatch.setattr(marnet_sdk.gpu.driver, "_strided_view", view)
    return found


def test_an_array_on_the_gpu_is_read_where_it_lies(here, fresh, ordered):
    (backend, gpu), table = fresh, tables(here, 3)
    given = played_array(gpu.driver, pixels(4))
    want = backend.run(pixels(4), table)
    for _ in range(2):
        gpu.driver.log.clear()
        got = backend.run(backend.device_rows(given), table)
        np.testing.assert_array_equal(got[0], want[0])
    assert gpu.driver.log == ["cuGraphLaunch", "cuStreamSynchronize"]  # no copy of pixels
    assert backend.report().copies == 0
    (program,) = (p for p in backend._captured.programs() if p._shape.address > 0)
    assert int(program._stream) in ordered


# Of 9 rows, 8 and 1 are read in place; of 13, 8.
@pytest.mark.parametrize(
    ("count", "offset", "copies"), [(3, 0, 1), (4, 64, 1), (9, 0, 0), (13, 0, 1)]
)
def test_rows_that_no_graph_can_read_in_place_are_copied_on_the_gpu(
    here, fresh, ordered, count, offset, copies
):
    (backend, gpu), table = fresh, tables(here, 3)
    given = played_array(gpu.driver, pixels(count), offset)
    got = backend.run(backend.device_rows(given), table)
    want = backend.run(pixels(count), table)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    assert ("cuMemcpyDtoDAsync" in gpu.driver.log) == bool(copies)
    assert backend.report().copies == copies
    assert backend.report().fallbacks == {}


def test_more_than_four_arrays_are_copied(here, fresh, ordered):
    (backend, gpu), table = fresh, tables(here, 2)
    arrays = [played_array(gpu.driver, pixels(1, seed)) for seed in range(6)]
    for _ in range(2):
        for seed, array in enumerate(arrays):
            got, _ = backend.run(backend.device_rows(array), table)
            np.testing.assert_array_equal(got, backend.run(pixels(1, seed), table)[0])
    report = backend.report()
    assert (report.captures, report.copies) == (1 + 4 + 1, 4)


def test_what_cannot_be_captured_takes_an_array_on_the_gpu_too(here, fresh, ordered):
    backend, gpu = fresh
    gpu.driver.broken.update(range(10_000))
    rows = backend.device_rows(played_array(gpu.driver, pixels(4)))
    with pytest.warns(RuntimeWarning, match="without a captured graph"):
        got, _ = backend.run(rows, tables(here, 3))
    assert_close(got, here.reference.run(pixels(4), tables(here, 3))[0])
    np.testing.assert_array_equal(backend.encode(rows), backend.encode(pixels(4)))


def test_arrays_of_another_size_are_refused(here, fresh, ordered):
    backend, gpu = fresh
    with pytest.raises(InvalidInput, match=r"\(2, 3, 32, 31\), expected float32 \[B, 3, 32, 32\]"):
        backend.device_rows(played_array(gpu.driver, np.zeros((2, 3, 32, 31), np.float32)))


def test_a_cpu_is_refused(small_payload):
    with pytest.raises(BackendUnavailable, match="tensorrt runs on cuda, got device 'cpu'"):
        open_backend("tensorrt", small_payload, "fp16", None, "cpu")
    with pytest.raises(BackendUnavailable, match="tensorrt runs on cuda, got device 'cpu'"):
        open_text(small_payload, "fp16", None, "cpu")


# --- a whole bundle


def test_a_bundle_opens_on_the_gpu_and_answers_with_one_launch(digits, tmp_path, monkeypatch):
    """Its golden answers come from the graph "refine", and the persistent kernel gives them too."""
    buckets = (8,)  # engines of each take seconds
    monkeypatch.setattr(graphs, "BUCKETS", buckets)
    monkeypatch.setattr(graphs, "BUILDER", replace(graphs.BUILDER, buckets=buckets))
    settings = Settings("tensorrt", "fp16", min_agreement=0.5, text=False, targets=("sm89",))
    checkpoint = write_checkpoint(make_model(steps=10, hidden=32, dim=64), tmp_path / "checkpoint")
    bundle = tmp_path / "b.marnet"
    with in_one_process():
        export_bundle(checkpoint, bundle, settings)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    gpu = play_gpu(monkeypatch)
    classifier = Classifier(bundle)
    report = classifier.runtime
    assert report is not None
    assert (report.loop, report.fallbacks) == ("persistent kernel", {})
    paths = sorted((digits / "test").glob("*.png"))[:8]
    labels = [answer.label for answer in classifier.predict(paths)]
    gpu.driver.log.clear()
    given = classifier.preprocess.pixels(paths)
    logits = classifier.logits(given)
    assert gpu.driver.log == ["cuGraphLaunch", "cuStreamSynchronize"]
    assert [classifier.labels[i] for i in logits.argmax(axis=1)] == labels
    gpu.device["cooperative"] = False
    with pytest.warns(MarnetWarning, match="slower than it could: device"):
        assert_close(Classifier(bundle).logits(given), logits)


# --- on a real one alone


@pytest.mark.gpu
def test_a_hundred_thousand_replays_allocate_nothing_and_give_the_same_bits(here):
    if here.gpu is not None:
        pytest.skip("needs a real GPU")
    backend: Any = here.backend
    given, table = pixels(4), tables(here)
    want = backend.run(given, table)
    gpu = backend._machine.gpu
    with gpu.current():
        before, _ = gpu.memory_info()
    for _ in range(100_000):
        got = backend.run(given, table)
        assert all((a == b).all() for a, b in zip(got, want, strict=True))
    with gpu.current():
        assert gpu.memory_info()[0] == before


@pytest.mark.gpu
def test_arrays_of_torch_on_the_gpu_are_read_in_place(here):
    if here.gpu is not None or not torch.cuda.is_available():
        pytest.skip("needs a real GPU, and a torch with CUDA")
    backend: Any = here.backend
    want = backend.run(pixels(4), tables(here))
    given = torch.from_numpy(pixels(4)).cuda()
    got = backend.run(backend.device_rows(given), tables(here))
    np.testing.assert_array_equal(got[0], want[0])
    with pytest.raises(InvalidInput, match="expected float32"):
        backend.device_rows(given.half())
    with pytest.raises(InvalidInput, match="with strides"):
        backend.device_rows(given.transpose(2, 3))

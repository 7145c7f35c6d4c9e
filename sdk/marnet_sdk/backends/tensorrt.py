"""TensorRT: engines for the GPU of this machine, chosen among those in the payload. No torch.

Each engine has one optimisation profile for each batch size it was built for (its buckets). A batch
takes the smallest bucket that holds it and is padded with its last row; a larger one is split.
Axes: B batch, S steps, K noise samples, R row of the table, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import Backend, Floats, Integers, Tables, TextEncoder
from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput, requires_extra
from marnet_sdk.tensorrt_library import (
    Device,
    Engine,
    EngineSet,
    Library,
    check_engine,
    choose_engines,
    describe_invalidity,
    find_device,
    make_log,
    read_cached,
    read_index,
    runtime_cache_path,
    write_cached,
)

Refine = Callable[[Floats, Tables], tuple[Floats, Floats]]
Batch = tuple[int, int]  # of a profile: least and most


def why_unavailable() -> str | None:
    """Why no engine can run on this machine, or None."""
    try:
        find_device()
    except BackendUnavailable as error:
        return str(error)
    return None


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Load the engines of encoder and loop that were built for this machine's GPU.

    `compute` is a property of the engines, and `threads` has no meaning on a GPU.

    Raises:
        BackendUnavailable: no driver, no GPU, no engine for it, or one that does not load.
        MissingExtra: TensorRT or cuda-bindings is not installed.
    """
    machine = _Machine.of(payload)
    return _TensorRT(machine.graph("encoder"), machine.graph("refine"))


def open_text(payload: Path, compute: str, threads: int | None) -> TextEncoder:
    """Load the engine of the text encoder; as `open_payload`."""
    graph = _Machine.of(payload).graph("text")

    def encode(ids: Integers, mask: Integers) -> Floats:
        graph.check_range("tokens", ids.shape[1])
        return graph({"ids": ids, "mask": mask})["x_s"]

    return encode


class _TensorRT:
    def __init__(self, encoder: _Graph, refine: _Graph) -> None:
        self._encoder, self._refine = encoder, refine

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder({"pixels": pixels}).values()  # torch-tensorrt calls it output0
        return x_v

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        tables = tables.at_least_two_steps()  # the loop runs at least once
        self._refine.check_range("steps", len(tables.coefficients))
        _, most = self._refine.engine.ranges["samples"]
        run = by_samples(self._run, most)
        return by_noise_row(run, x_v, tables)

    def _run(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        shared = {"coefficients": tables.coefficients, "bias": tables.bias}
        found = self._refine({"x_v": x_v}, shared)
        return found["logits"], found["features"]


# --- what needs no GPU


class Piece(NamedTuple):
    """Some rows of a batch, the profile that takes them, and how many rows that is run with."""

    rows: slice
    profile: int
    batch: int


def split_batch(count: int, batches: Sequence[Batch]) -> list[Piece]:
    """How `count` rows are run with profiles that take from `least` to `most` rows each."""
    order = sorted(range(len(batches)), key=lambda i: batches[i][1])
    largest = batches[order[-1]][1]
    pieces = []
    for start in range(0, count, largest):
        size = min(largest, count - start)
        profile = next(i for i in order if batches[i][1] >= size)
        batch = max(size, batches[profile][0])
        pieces.append(Piece(slice(start, start + size), profile, batch))
    return pieces


def pad_rows(array: NDArray, count: int) -> NDArray:
    """The last row again, up to `count` rows: unlike zeros, it is what the model knows."""
    if len(array) == count:
        return array
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def by_noise_row(run: Refine, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
    """Refine with a graph that has one row of noise for all images; own noise is run alone."""
    if tables.bias.shape[1] == 1:
        return run(x_v, tables)
    return _joined(
        [run(x_v[i : i + 1], tables.rows(np.array([i]))) for i in range(len(x_v))], axis=0
    )


def by_samples(run: Refine, most: int) -> Refine:
    """Refine with a graph that takes up to `most` noise samples."""

    def refine(x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        count = tables.bias.shape[2]
        if count <= most:
            return run(x_v, tables)
        starts = range(0, count, most)
        return _joined([run(x_v, tables.samples(i, min(i + most, count))) for i in starts], axis=1)

    return refine


def _joined(answers: Sequence[tuple[Floats, Floats]], axis: int) -> tuple[Floats, Floats]:
    logits, features = (np.concatenate(parts, axis) for parts in zip(*answers, strict=True))
    return logits, features


# --- the GPU


class _Machine:
    """The GPU, the library that runs on it, and the engines of a payload for both."""

    def __init__(self, payload: Path, device: Device, library: Library, chosen: EngineSet) -> None:
        self.payload, self.device, self.library, self.chosen = payload, device, library, chosen
        self.gpu = _Gpu(library)
        self.log = make_log(library.module)
        self.runtime = library.module.Runtime(self.log)

    @classmethod
    def of(cls, payload: Path) -> _Machine:
        """Ask the driver before anything of TensorRT, which can crash where there is none."""
        sets = read_index(payload)
        built = "; ".join(map(str, sets)) or "no GPU at all"
        try:
            device = find_device()
        except BackendUnavailable as error:
            raise BackendUnavailable(
                f"tensorrt: the engines were built by {built}, and this machine has {error}; run "
                "the bundle on a machine with such a GPU, or export one for this machine: "
                "marnet-export --backend auto"
            ) from error
        library, chosen = choose_engines(sets, device)
        return cls(payload, device, library, chosen)

    def graph(self, name: str) -> _Graph:
        """An engine, loaded.

        Raises:
            BackendUnavailable: there is none, or it does not load.
        """
        if name not in self.chosen.engines:
            raise BackendUnavailable(
                f"the payload has no engine {name} for {self.device}; run: marnet-bundle rebuild "
                f"BUNDLE --target {self.device.target}"
            )
        path = self.chosen.file(self.payload, name)
        check_engine(self.library, path)
        engine = self.chosen.engines[name]
        cache = runtime_cache_path(self.library, self.device, engine.sha256)
        return _Graph(self, path, engine, _Kernels(cache) if self.library.is_rtx else None)

    def load(self, path: Path) -> Any:
        """Deserialise an engine.

        Raises:
            BackendUnavailable: with what TensorRT says.
        """
        trt, content = self.library.module, path.read_bytes()
        with self.gpu.current():
            if self.library.is_rtx:
                validity, mask = self.runtime.get_engine_validity(content)
                if validity == trt.EngineValidity.INVALID:
                    raise BackendUnavailable(
                        f"{self.library} cannot run {path} on {self.device}: "
                        f"{describe_invalidity(trt, int(mask))}; run: marnet-bundle rebuild BUNDLE "
                        f"--target {self.device.target}"
                    )
            engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendUnavailable(
                f"{self.library} cannot load {path} on {self.device}: {self.log.sentence()}"
            )
        return engine


class _Graph:
    """An engine, with a lane for each profile that was used."""

    def __init__(
        self, machine: _Machine, path: Path, engine: Engine, kernels: _Kernels | None
    ) -> None:
        self.machine, self.path, self.engine, self.kernels = machine, path, engine, kernels
        self.loaded = machine.load(path)
        trt = machine.library.module
        names = [self.loaded.get_tensor_name(i) for i in range(self.loaded.num_io_tensors)]
        self.outputs = [
            name for name in names if self.loaded.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        ]
        self._lanes: dict[int, _Lane] = {}
        self._lock = Lock()

    def check_range(self, name: str, size: int) -> None:
        """
        Raises:
            InvalidInput: a size that the engine was not built for.
        """
        least, most = self.engine.ranges[name]
        if not least <= size <= most:
            raise InvalidInput(
                f"{name}: got {size}, the engine {self.path.name} takes {least} to {most}"
            )

    def __call__(
        self, rows: Mapping[str, NDArray], shared: Mapping[str, NDArray] | None = None
    ) -> dict[str, Floats]:
        """Run a batch of any size; the outputs by name.

        Args:
            rows: inputs with a row for each image. shared: inputs that are the same for all.
        """
        count = len(next(iter(rows.values())))
        parts = []
        for piece in split_batch(count, self.engine.batches):
            given = {name: pad_rows(a[piece.rows], piece.batch) for name, a in rows.items()}
            outputs = self._lane(piece.profile).run(given | dict(shared or {}))
            size = piece.rows.stop - piece.rows.start
            parts.append({name: output[:size] for name, output in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _lane(self, profile: int) -> _Lane:
        with self._lock:
            if profile not in self._lanes:
                self._lanes[profile] = _Lane(self, profile)
            return self._lanes[profile]

    def make_context(self) -> Any:
        """A context with memory for its own profile; the default is memory for the largest."""
        trt = self.machine.library.module
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self.kernels is None:
            context = self.loaded.create_execution_context(strategy)
        else:
            context = self.kernels.make_context(trt, self.loaded, strategy)
        if context is None:
            raise InferenceError(
                f"{self.machine.library} cannot run {self.path}: {self.machine.log.sentence()}"
            )
        return context


class _Kernels:
    """What TensorRT-RTX compiles for an engine when it first runs, kept for the next process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config: Any = None
        self._cache: Any = None
        self._kept = b""

    def make_context(self, trt: Any, engine: Any, strategy: Any) -> Any:
        if self._config is None:
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(strategy)
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._config.dynamic_shapes_kernel_specialization_strategy = eager
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            self._cache = self._config.create_runtime_cache()
            self._kept = read_cached(self.path)
            if self._kept:
                self._cache.deserialize(self._kept)  # of another machine, it is left empty
            self._config.set_runtime_cache(self._cache)
        return engine.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Write down what is new."""
        content = bytes(self._cache.serialize() or b"")
        if content and content != self._kept:
            write_cached(self.path, content)
            self._kept = content


class _Lane:
    """One profile of an engine: a context, a stream and buffers, for one call at a time."""

    def __init__(self, graph: _Graph, profile: int) -> None:
        self._graph, self._gpu = graph, graph.machine.gpu
        self._lock, self._is_new = Lock(), True
        with self._gpu.current():
            self._stream = self._gpu.make_stream()
            self._context = graph.make_context()
            done = self._context.set_optimization_profile_async(profile, int(self._stream))
            self._check(done, f"set_optimization_profile_async({profile})")
            self._gpu.wait(self._stream)
        self._buffers: dict[str, _Buffer] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, Floats]:
        """Copy the inputs to the GPU, run, and copy the outputs back."""
        arrays = {name: _as_bound(array) for name, array in inputs.items()}
        with self._lock, self._gpu.current():
            try:
                for name, array in arrays.items():
                    self._check(self._context.set_input_shape(name, array.shape), name)
                    self._gpu.upload(self._place(name, array), array, self._stream)
                results = {name: self._make_output(name) for name in self._graph.outputs}
                done = self._context.execute_async_v3(int(self._stream))
                self._check(done, "execute_async_v3")
                for name, result in results.items():
                    self._gpu.download(result, self._buffers[name].address, self._stream)
            finally:
                self._gpu.wait(self._stream)  # copies read and write our arrays until then
            if self._is_new and self._graph.kernels is not None:
                self._graph.kernels.keep()
            self._is_new = False
        return results

    def _make_output(self, name: str) -> Floats:
        shape = tuple(self._context.get_tensor_shape(name))
        result = np.empty(shape, np.float32)
        self._place(name, result)
        return result

    def _place(self, name: str, array: NDArray) -> int:
        """The address on the GPU where a tensor lies, large enough for it."""
        buffer = self._buffers.setdefault(name, _Buffer(self._gpu))
        address = buffer.at_least(array.nbytes)
        self._check(self._context.set_tensor_address(name, address), name)
        return address

    def _check(self, done: bool, what: str) -> None:
        if not done:
            machine = self._graph.machine
            raise InferenceError(
                f"{machine.library} refuses {what} of {self._graph.path}: {machine.log.sentence()}"
            )


def _as_bound(array: NDArray) -> NDArray:
    """As an engine reads it: integers of 64 bits or floats of 32, one after another."""
    return np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)


class _Buffer:
    """Memory on the GPU that grows."""

    def __init__(self, gpu: _Gpu) -> None:
        self._gpu, self._size, self.address = gpu, 0, 0

    def at_least(self, size: int) -> int:
        if size > self._size:
            if self._size:
                self._gpu.free(self.address)
            self._size = 0  # should the next line fail
            self.address = self._gpu.allocate(size)
            self._size = size
        return self.address

    def __del__(self) -> None:
        # When the process ends, the driver may be gone before; it frees everything then.
        with suppress(Exception):
            if self._size:
                with self._gpu.current():
                    self._gpu.free(self.address)


class _Gpu:
    """The calls of the CUDA driver that are needed, on the primary context of the first GPU.

    TensorRT's own calls use that context too, and so do those of other libraries in the process.
    """

    def __init__(self, library: Library) -> None:
        with requires_extra(library.extra, "cuda"):
            from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
        self._driver = driver
        try:
            self._call("cuInit", 0)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", 0))
        except InferenceError as error:
            raise BackendUnavailable(f"tensorrt: {error}") from error

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # cuda.bindings finds no such function to call
            raise InferenceError(f"the CUDA driver cannot be asked for {name}: {error}") from error
        if int(status) != 0:
            raise InferenceError(f"the CUDA driver answers {name} with {status.name}")
        return values[0] if values else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context the calling thread's, and leave the thread as it was."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def make_stream(self) -> Any:
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._call("cuStreamCreate", int(flags))

    def wait(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def upload(self, address: int, array: NDArray, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: NDArray, address: int, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

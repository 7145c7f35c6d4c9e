"""TensorRT's runtime: the engines of a payload on the GPU of this machine, one call at a time.

Every answer of TensorRT is looked at: it says that something went wrong by its result alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput
from marnet_sdk.gpu.captured import pad_rows, split_batch
from marnet_sdk.gpu.driver import Gpu, Memory, Stream
from marnet_sdk.gpu.tensorrt_library import (
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
from marnet_sdk.noise.tables import Floats


class Machine:
    """The GPU, the library that runs on it, and the engines of a payload for both."""

    def __init__(self, payload: Path, device: Device, library: Library, chosen: EngineSet) -> None:
        self.payload, self.device, self.library, self.chosen = payload, device, library, chosen
        try:
            self.gpu = Gpu(library.extra)
        except BackendUnavailable as error:
            raise BackendUnavailable(f"tensorrt: {error}") from error
        self.log = make_log(library.module)
        self.runtime = library.module.Runtime(self.log)

    @classmethod
    def of(cls, payload: Path) -> Machine:
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

    def graph(self, name: str) -> LoadedEngine:
        """Load an engine.

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
        return LoadedEngine(self, path, engine, KernelCache(cache) if self.library.is_rtx else None)

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


class LoadedEngine:
    """An engine, with a lane for each profile that was used."""

    def __init__(
        self, machine: Machine, path: Path, engine: Engine, kernels: KernelCache | None
    ) -> None:
        self.machine, self.path, self.engine, self.kernels = machine, path, engine, kernels
        self.loaded = machine.load(path)
        mode = machine.library.module.TensorIOMode
        names = [self.loaded.get_tensor_name(i) for i in range(self.loaded.num_io_tensors)]
        self.outputs = [n for n in names if self.loaded.get_tensor_mode(n) == mode.OUTPUT]
        self.inputs = [n for n in names if n not in self.outputs]
        self._lanes: dict[int, EngineLane] = {}
        self._lock = Lock()

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output; -1 is what varies."""
        return tuple(self.loaded.get_tensor_shape(name))

    def profile(self, batch: int) -> int:
        """The profile that takes this batch.

        Raises:
            InferenceError: there is none.
        """
        (piece,) = split_batch(batch, self.engine.batches)[:1]
        if piece.batch != batch:
            raise InferenceError(
                f"{self.path} has no profile for a batch of {batch}, only {self.engine.batches}; "
                "run: marnet-bundle rebuild BUNDLE"
            )
        return piece.profile

    def buffer_bytes(self) -> int:
        """The bytes of the lanes' buffers."""
        with self._lock:
            return sum(lane.buffer_bytes for lane in self._lanes.values())

    def check_range(self, name: str, size: int) -> None:
        """Refuse a size out of range.

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
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _lane(self, profile: int) -> EngineLane:
        with self._lock:
            if profile not in self._lanes:
                self._lanes[profile] = EngineLane(self, profile)
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


class KernelCache:
    """The kernels that TensorRT-RTX compiles for an engine, kept for the next process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._config: Any = None
        self._cache: Any = None
        self._kept = b""

    def make_context(self, trt: Any, engine: Any, strategy: Any) -> Any:
        with self._lock:
            if self._config is None:
                self._config = self._configure(trt, engine, strategy)
            return engine.create_execution_context(runtime_config=self._config)

    def _configure(self, trt: Any, engine: Any, strategy: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # `EngineProgram` captures
        self._cache = config.create_runtime_cache()
        self._kept = read_cached(self.path)
        if self._kept:
            self._cache.deserialize(self._kept)  # of another machine, it is left empty
        config.set_runtime_cache(self._cache)
        return config

    def keep(self) -> None:
        """Write down what is new."""
        with self._lock:
            content = bytes(self._cache.serialize() or b"")
            if content and content != self._kept:
                write_cached(self.path, content)
                self._kept = content


class EngineContext:
    """An engine's context for one profile, on one stream. Every answer of TensorRT is looked at."""

    def __init__(self, graph: LoadedEngine, profile: int, stream: Stream) -> None:
        """The GPU must be current, as for all of its methods."""
        self._graph, self._profile, self._stream = graph, profile, stream
        self._context = graph.make_context()
        self._has_run = False
        done = self._context.set_optimization_profile_async(profile, int(stream))
        self._check(done, f"set_optimization_profile_async({profile})")
        graph.machine.gpu.wait(stream)

    @property
    def scratch_bytes(self) -> int:
        """Memory that TensorRT has for this profile; 0 where it does not tell."""
        tell = getattr(self._graph.loaded, "get_device_memory_size_for_profile_v2", None)
        return int(tell(self._profile)) if tell else 0

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shape of every input; there may be others among them."""
        for name in self._graph.inputs:
            self.set_shape(name, shapes[name])

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the outputs, by what they are called outside: `_called`."""
        outputs = self._graph.outputs
        return {_called(self._graph, n): tuple(self._context.get_tensor_shape(n)) for n in outputs}

    def set_addresses(self, at: Mapping[str, int]) -> None:
        """Set the address of every input and output; there may be others among them."""
        for name in (*self._graph.inputs, *self._graph.outputs):
            self.set_address(name, at[_called(self._graph, name)])

    def set_address(self, name: str, address: int) -> None:
        self._check(self._context.set_tensor_address(name, address), f"the address of {name}")

    def enqueue(self) -> None:
        """Enqueue the engine.

        Raises:
            InferenceError: with what TensorRT says.
        """
        self._check(self._context.execute_async_v3(int(self._stream)), "execute_async_v3")

    def keep_kernels(self) -> None:
        """Write down, after the first run, what was compiled for it."""
        if not self._has_run and self._graph.kernels is not None:
            self._graph.kernels.keep()
        self._has_run = True

    def check_capturable(self) -> None:
        """Refuse a capture that TensorRT refuses; to be asked after the first run.

        Raises:
            InferenceError: TensorRT knows that it cannot be, as with some loops.
        """
        self.keep_kernels()
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(int(self._stream)):
            machine = self._graph.machine
            raise InferenceError(
                f"{machine.library} cannot capture {self._graph.path.name} in a CUDA graph"
            )

    def _check(self, done: bool, what: str) -> None:
        if not done:
            machine = self._graph.machine
            raise InferenceError(
                f"{machine.library} refuses {what} of {self._graph.path}: {machine.log.sentence()}"
            )


def _called(graph: LoadedEngine, name: str) -> str:
    """The encoder's one output is x_v, whatever built its engine; torch-tensorrt says output0."""
    return "x_v" if graph.inputs == ["pixels"] and name not in graph.inputs else name


class EngineLane:
    """One profile of an engine: a context, a stream and buffers, for one call at a time."""

    def __init__(self, graph: LoadedEngine, profile: int) -> None:
        self._graph, self._gpu, self._lock = graph, graph.machine.gpu, Lock()
        with self._gpu.current():
            self._stream = self._gpu.make_stream()
            self._context = EngineContext(graph, profile, self._stream)
        self._buffers: dict[str, Memory] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(memory.size for memory in list(self._buffers.values()))

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, Floats]:
        """Copy the inputs to the GPU, run, and copy the outputs back, by what they are called."""
        arrays = {name: as_bound(array) for name, array in inputs.items()}
        with self._lock, self._gpu.current():
            try:
                for name, array in arrays.items():
                    self._context.set_shape(name, array.shape)
                    self._gpu.upload(self._place(name, array.nbytes), array, self._stream)
                shapes = self._context.output_shapes()
                results = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
                at = {name: self._place(name, result.nbytes) for name, result in results.items()}
                self._context.set_addresses(at | {n: self._buffers[n].address for n in arrays})
                self._context.enqueue()
                for name, result in results.items():
                    self._gpu.download(result, at[name], self._stream)
            finally:
                self._gpu.wait(self._stream)  # copies read and write our arrays until then
            self._context.keep_kernels()
        return results

    def _place(self, name: str, size: int) -> int:
        """The address of memory of at least this size, which grows."""
        memory = self._buffers.get(name)
        if memory is None or memory.size < size:
            self._buffers.pop(name, None)
            del memory  # given back before more is taken
            memory = self._buffers[name] = self._gpu.allocate(size)
        return memory.address


def as_bound(array: NDArray) -> NDArray:
    """The array as an engine reads it: integers of 64 bits or floats of 32, one after another."""
    return np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)

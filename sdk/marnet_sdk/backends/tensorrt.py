"""TensorRT: engines for the GPU of this machine, chosen among those in the payload. No torch.

Each engine has one optimisation profile for each batch size it was built for (its buckets). A batch
takes the smallest bucket that holds it and is padded with its last row; a larger one is split.

From pixels to logits, everything of a bucket is one captured CUDA graph: copy in, encoder, reverse
loop, head, copy out. The loop in it is the persistent kernel of `marnet_kernels`, between engines
of what comes before and behind it, where the payload has these and the GPU is large enough; else
the engine "refine". `encode` and `refine` run engine by engine: for noise of an image's own, images
that stop early, and whatever cannot be captured.
Axes: B batch, S steps, K noise samples, R row of the table, L tokens, Hp hidden, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import Backend, TextEncoder, check_device
from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput, MarnetError
from marnet_sdk.gpu.captured import (
    COPIED,
    Answer,
    CapturedPipeline,
    RuntimeReport,
    Shape,
    join,
    pad_rows,
    report,
    split_batch,
    warn_of_operators,
)
from marnet_sdk.gpu.driver import DeviceArray, Gpu, Memory, MemoryPlan, Stream, device_array
from marnet_sdk.gpu.persistent_loop import (
    CONDITION,
    FINISH,
    LOOP,
    LoopWeights,
    PersistentLoop,
    check_shape,
)
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
from marnet_sdk.noise.tables import Floats, Integers, Tables

Refine = Callable[[Floats, Tables], Answer]
_ANSWER = ("logits", "features")  # outputs of the last engine


def why_unavailable() -> str | None:
    """Tell why no engine can run on this machine, or None."""
    try:
        find_device()
    except BackendUnavailable as error:
        return str(error)
    return None


def open_payload(payload: Path, compute: str, threads: int | None, device: str = "cuda") -> Backend:
    """Load the engines of encoder and loop that were built for this machine's GPU.

    `compute` is a property of the engines, and `threads` has no meaning on a GPU.

    Raises:
        BackendUnavailable: no driver, no GPU, no engine for it, or one that does not load.
        MissingExtra: TensorRT or cuda-bindings is not installed.
    """
    check_device("tensorrt", device, "cuda")
    return _TensorRT(_Machine.of(payload))


def open_text(
    payload: Path, compute: str, threads: int | None, device: str = "cuda"
) -> TextEncoder:
    """Load the engine of the text encoder; as `open_payload`."""
    check_device("tensorrt", device, "cuda")
    graph = _Machine.of(payload).graph("text")

    def encode(ids: Integers, mask: Integers) -> Floats:
        graph.check_range("tokens", ids.shape[1])
        return graph({"ids": ids, "mask": mask})["x_s"]

    return encode


class _TensorRT:
    def __init__(self, machine: _Machine) -> None:
        self._machine = machine
        self._encoder, self._refine = machine.graph("encoder"), machine.graph("refine")
        self._kernel, self._why_not = _open_kernel(machine)
        self._loops: dict[int, str] = {}  # rows -> what runs the loop, and why
        # Arrays of other libraries are made to be ordered before this one when they are looked at.
        with machine.gpu.current():
            self._arrivals = machine.gpu.make_stream()
        self._buckets = _common_buckets([self._encoder, self._refine])
        self._captured = CapturedPipeline(self._capture, self._in_two_calls, self._buckets)
        self._lengthened: tuple[Tables, Tables] | None = None

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder({"pixels": _on_host(pixels)}).values()
        return x_v

    def refine(self, x_v: Floats, tables: Tables) -> Answer:
        tables = self._runnable(tables)
        _, most = self._refine.engine.ranges["samples"]
        run = by_samples(self._refine_once, most)
        return by_noise_row(run, x_v, tables)

    def run(self, pixels: Floats | DeviceArray, tables: Tables) -> Answer:
        return self._captured(pixels, self._runnable(tables))

    def device_rows(self, array: Any) -> DeviceArray:
        (_, *shape) = self._encoder.shape_of("pixels")
        with self._machine.gpu.current():
            return device_array(self._machine.gpu, array, tuple(shape), self._arrivals)

    def report(self) -> RuntimeReport:
        memory = {"weights": 0, "scratch": 0, "buffers": 0}
        graphs = [self._encoder, self._refine]
        if self._kernel is not None:
            graphs += [self._kernel.condition, self._kernel.finish]
            memory["loop weights"] = self._kernel.loop.bytes
        for graph in graphs:
            memory["weights"] += graph.engine.size
            memory["buffers"] += graph.buffer_bytes()
        for program in self._captured.programs():
            assert isinstance(program, _Program)
            memory["scratch"] += program.scratch_bytes
            memory["buffers"] += program.buffer_bytes
        device, counts = str(self._machine.device), self._captured.report()
        buckets = self._captured.buckets
        return report(counts, device=device, loop=self._loop(), buckets=buckets, memory=memory)

    def _runnable(self, tables: Tables) -> Tables:
        """Make the tables that the engines take: the loop runs at least once.

        The same object for the same object, by which a program knows what it has on the GPU.
        """
        known = self._lengthened
        if known is None or known[0] is not tables:
            known = self._lengthened = (tables, tables.at_least_two_steps())
        self._refine.check_range("steps", len(known[1].coefficients))
        return known[1]

    def _refine_once(self, x_v: Floats, tables: Tables) -> Answer:
        shared = {"coefficients": tables.coefficients, "bias": tables.bias}
        found = self._refine({"x_v": x_v}, shared)
        return found["logits"], found["features"]

    def _in_two_calls(self, pixels: Floats | DeviceArray, tables: Tables) -> Answer:
        return self.refine(self.encode(_on_host(pixels)), tables)

    def _capture(self, shape: Shape) -> _Program:
        """A program for a shape, with the persistent kernel in it if that can run.

        Raises:
            InferenceError: an engine cannot be captured, or not run with so many samples.
        """
        _, most = self._refine.engine.ranges["samples"]
        if shape.samples > most:
            raise InferenceError(
                f"the engines take up to {most} noise samples at once, got {shape.samples}"
            )
        why_not = self._why_not
        if self._kernel is not None:
            try:
                program = _Program(self._machine.gpu, shape, self._encoder, self._kernel)
                self._loops[shape.batch * shape.samples] = "persistent kernel"
                return program
            except (MarnetError, ValueError, RuntimeError) as error:
                why_not = str(error)
        program = _Program(self._machine.gpu, shape, self._encoder, self._refine)
        why = f"operators in the captured graph, because {why_not}"
        if why_not != self._why_not and why not in self._loops.values():
            warn_of_operators(why)
        self._loops[shape.batch * shape.samples] = why
        return program

    def _loop(self) -> str:
        """Tell what runs the reverse loop, and why, in one line."""
        rows: dict[str, list[str]] = {}
        for count, how in sorted(self._loops.copy().items()):
            rows.setdefault(how, []).append(str(count))
        if not rows:
            return f"nothing was captured yet; {self._why_not or 'the persistent kernel is there'}"
        if len(rows) == 1:
            return next(iter(rows))
        return "; ".join(f"at {', '.join(counts)} rows: {how}" for how, counts in rows.items())


def _on_host(pixels: Floats | DeviceArray) -> Floats:
    return pixels.numpy() if isinstance(pixels, DeviceArray) else pixels


class _Kernel(NamedTuple):
    """The reverse loop as a persistent kernel, and the engines around it."""

    condition: _Graph  # x_v [B, D_v] -> q [B, Hp]
    loop: PersistentLoop  # q -> h3 [B, K, Hp]
    finish: _Graph  # x_v, h3 -> logits, features
    weights: Memory


def _open_kernel(machine: _Machine) -> tuple[_Kernel | None, str]:
    """The kernel and the engines around it; or None, and why there is none."""
    path = machine.payload / LOOP
    if not path.exists() or not {CONDITION, FINISH} <= machine.chosen.engines.keys():
        return None, "the payload has no engines to go around the kernel"
    held: list[Memory] = []

    def allocate(size: int) -> int:
        held.append(machine.gpu.allocate(size))
        return held[-1].address

    try:
        with machine.gpu.current():
            stream = machine.gpu.make_stream()
            loop = PersistentLoop(LoopWeights.load(path), machine.gpu, allocate, stream)
            loop.choose(images=1, samples=1)  # before engines are loaded for nothing
        condition, finish = machine.graph(CONDITION), machine.graph(FINISH)
        widths = {condition.shape_of("q")[1], finish.shape_of("h3")[2], loop.layout.padded}
        if len(widths) > 1:
            raise ValueError(f"its engines and its weights have different widths, {widths}")
    except (MarnetError, ValueError, RuntimeError) as error:
        warn_of_operators(str(error))
        return None, str(error)
    return _Kernel(condition, loop, finish, held[0]), ""


# --- a captured program


class _Program:
    """The way from pixels to logits for one shape, as one captured graph; for one call at a time.

    Every size and every address is set here, once and for all.
    """

    def __init__(self, gpu: Gpu, shape: Shape, encoder: _Graph, behind: _Graph | _Kernel) -> None:
        """Make contexts, memory and the graph.

        Args:
            behind: what makes logits of x_v: the engine "refine", or the kernel and its engines.

        Raises:
            InferenceError: something of it cannot be captured.
            ValueError, RuntimeError: the kernel cannot run it.
        """
        self._gpu, self._shape = gpu, shape
        self._memory: list[Memory] = []
        self._tables: Tables | None = None
        with gpu.current():
            self._stream = gpu.make_stream()
            if isinstance(behind, _Kernel):
                self._prepare_kernel(encoder, behind)
            else:
                self._prepare_operators(encoder, behind)
            for memory in self._memory:
                gpu.clear(memory, self._stream)
            self._work()  # compiles and allocates what a capture must not
            gpu.wait(self._stream)
            for context in self._contexts:
                context.check_capturable()
            self._graph = gpu.capture(self._stream, self._work)
            gpu.wait(self._stream)

    @property
    def scratch_bytes(self) -> int:
        """The bytes that the engines' contexts have for themselves."""
        return sum(context.scratch_bytes for context in self._contexts)

    @property
    def buffer_bytes(self) -> int:
        return sum(memory.size for memory in self._memory)

    def __call__(self, pixels: Floats | DeviceArray, tables: Tables) -> Answer:
        """Run it as `marnet_sdk.gpu.captured.Program` says.

        Raises:
            InferenceError: the driver refuses something.
        """
        with self._gpu.current():
            try:
                if tables is not self._tables:
                    self._tables = None  # should the next line fail
                    self._set_tables(tables, self._stream)
                    self._tables = tables
                self._take(pixels)
                self._gpu.launch(self._graph, self._stream)
            finally:
                self._gpu.wait(self._stream)  # copies read and write our arrays until then
        return self._logits.copy(), self._features.copy()

    # No closure below holds the program itself: its memory goes with its last user.

    def _prepare_operators(self, encoder: _Graph, refine: _Graph) -> None:
        batch, steps, samples = self._shape.batch, self._shape.steps, self._shape.samples
        width = refine.shape_of("bias")[3]
        tables = {"coefficients": (steps, 3), "bias": (steps, 1, samples, width)}
        at = self._bind([encoder, refine], batch, tables)
        self._steps = [context.enqueue for context in self._contexts]
        self._set_tables = _TablesOnGpu(self._gpu, tables, at)

    def _prepare_kernel(self, encoder: _Graph, kernel: _Kernel) -> None:
        batch, steps, samples = self._shape.batch, self._shape.steps, self._shape.samples
        loop = kernel.loop.prepare(batch, samples, steps, self._allocate)
        h3 = (batch, samples, kernel.loop.layout.padded)
        at = self._bind([encoder, kernel.condition, kernel.finish], batch, {"h3": h3})
        first, condition, finish = (context.enqueue for context in self._contexts)
        stream = self._stream
        self._steps = [first, condition, lambda: loop.enqueue(stream, at["q"], at["h3"]), finish]
        self._set_tables = loop.set_tables

    def _bind(
        self, graphs: Sequence[_Graph], batch: int, more: Mapping[str, tuple[int, ...]]
    ) -> dict[str, int]:
        """Make the contexts, and memory for all their inputs and outputs: the addresses.

        Args:
            more: shapes of what no engine before makes, beside the pixels.
        """
        self._contexts = [_Context(graph, graph.profile(batch), self._stream) for graph in graphs]
        shapes: dict[str, tuple[int, ...]] = {**more}
        shapes["pixels"] = (batch, *graphs[0].shape_of("pixels")[1:])
        for context in self._contexts:
            context.set_shapes(shapes)
            shapes |= context.output_shapes()
        self._row_bytes = 4 * prod(shapes["pixels"][1:])
        sizes = {name: 4 * prod(shape) for name, shape in shapes.items()}
        if self._shape.address > 0:
            del sizes["pixels"]
        plan = MemoryPlan(sizes)
        at = plan.addresses(self._allocate(plan.total))
        at.setdefault("pixels", self._shape.address)
        for context in self._contexts:
            context.set_addresses(at)
        if self._shape.address == 0:
            self._pixels = self._gpu.pinned(shapes["pixels"])
        self._logits, self._features = (self._gpu.pinned(shapes[n]) for n in _ANSWER)
        self._at = at
        return at

    def _allocate(self, size: int) -> int:
        self._memory.append(self._gpu.allocate(size))
        return self._memory[-1].address

    def _work(self) -> None:
        """Enqueue everything from the pixels to the answer."""
        if self._shape.address == 0:
            self._gpu.upload(self._at["pixels"], self._pixels, self._stream)
        for enqueue in self._steps:
            enqueue()
        for name, array in zip(_ANSWER, (self._logits, self._features), strict=True):
            self._gpu.download(array, self._at[name], self._stream)

    def _take(self, pixels: Floats | DeviceArray) -> None:
        """Put the pixels where the graph reads them."""
        if isinstance(pixels, np.ndarray):
            if pixels.shape != self._pixels.shape:  # NumPy would spread what is smaller
                raise InvalidInput(
                    f"pixels: got {pixels.shape}, expected {self._pixels.shape}; preprocess makes "
                    "them of images"
                )
            np.copyto(self._pixels, pixels)
            return
        pixels.order_before(self._stream)
        if self._shape.address != COPIED:
            return
        self._gpu.copy(self._at["pixels"], pixels.address, pixels.nbytes, self._stream)
        last = pixels.address + pixels.nbytes - self._row_bytes
        for row in range(len(pixels), self._shape.batch):  # as `pad_rows` does
            to = self._at["pixels"] + row * self._row_bytes
            self._gpu.copy(to, last, self._row_bytes, self._stream)


class _TablesOnGpu:
    """The loop's tables as the engine "refine" reads them."""

    def __init__(
        self, gpu: Gpu, shapes: Mapping[str, tuple[int, ...]], at: Mapping[str, int]
    ) -> None:
        self._gpu, self._shapes, self._at = gpu, shapes, at
        self._arrays: list[NDArray] = []

    def __call__(self, tables: Tables, stream: Stream) -> None:
        """Enqueue the copies.

        Raises:
            InvalidInput: they are not of the shape that there is memory for.
        """
        arrays = {"coefficients": tables.coefficients, "bias": tables.bias}
        for name, array in arrays.items():
            check_shape(name, array, self._shapes[name])
        self._arrays = [_as_bound(array) for array in arrays.values()]  # the copies read them
        for name, array in zip(arrays, self._arrays, strict=True):
            self._gpu.upload(self._at[name], array, stream)


# --- what needs no GPU


def by_noise_row(run: Refine, x_v: Floats, tables: Tables) -> Answer:
    """Refine with a graph that has one row of noise for all images; own noise is run alone."""
    if tables.bias.shape[1] == 1:
        return run(x_v, tables)
    return join([run(x_v[i : i + 1], tables.rows(np.array([i]))) for i in range(len(x_v))], axis=0)


def by_samples(run: Refine, most: int) -> Refine:
    """Refine with a graph that takes up to `most` noise samples."""

    def refine(x_v: Floats, tables: Tables) -> Answer:
        count = tables.bias.shape[2]
        if count <= most:
            return run(x_v, tables)
        starts = range(0, count, most)
        return join([run(x_v, tables.samples(i, min(i + most, count))) for i in starts], axis=1)

    return refine


def _common_buckets(graphs: Sequence[_Graph]) -> list[int]:
    """Find the batch sizes for which every engine has a profile.

    Raises:
        BackendUnavailable: there are none.
    """
    sizes = {most for graph in graphs for _, most in graph.engine.batches}
    found = [
        size
        for size in sorted(sizes)
        if all(any(a <= size <= b for a, b in graph.engine.batches) for graph in graphs)
    ]
    if not found:
        names = " and ".join(graph.path.name for graph in graphs)
        raise BackendUnavailable(
            f"{names} have no batch size in common; run: marnet-bundle rebuild BUNDLE"
        )
    return found


# --- the GPU


class _Machine:
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
        mode = machine.library.module.TensorIOMode
        names = [self.loaded.get_tensor_name(i) for i in range(self.loaded.num_io_tensors)]
        self.outputs = [n for n in names if self.loaded.get_tensor_mode(n) == mode.OUTPUT]
        self.inputs = [n for n in names if n not in self.outputs]
        self._lanes: dict[int, _Lane] = {}
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
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # `_Program` captures
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


class _Context:
    """An engine's context for one profile, on one stream. Every answer of TensorRT is looked at."""

    def __init__(self, graph: _Graph, profile: int, stream: Stream) -> None:
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


def _called(graph: _Graph, name: str) -> str:
    """The encoder's one output is x_v, whatever built its engine; torch-tensorrt says output0."""
    return "x_v" if graph.inputs == ["pixels"] and name not in graph.inputs else name


class _Lane:
    """One profile of an engine: a context, a stream and buffers, for one call at a time."""

    def __init__(self, graph: _Graph, profile: int) -> None:
        self._graph, self._gpu, self._lock = graph, graph.machine.gpu, Lock()
        with self._gpu.current():
            self._stream = self._gpu.make_stream()
            self._context = _Context(graph, profile, self._stream)
        self._buffers: dict[str, Memory] = {}

    @property
    def buffer_bytes(self) -> int:
        return sum(memory.size for memory in list(self._buffers.values()))

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, Floats]:
        """Copy the inputs to the GPU, run, and copy the outputs back, by what they are called."""
        arrays = {name: _as_bound(array) for name, array in inputs.items()}
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


def _as_bound(array: NDArray) -> NDArray:
    """The array as an engine reads it: integers of 64 bits or floats of 32, one after another."""
    return np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)

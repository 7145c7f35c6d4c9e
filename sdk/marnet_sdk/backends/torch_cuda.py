"""Torch on a GPU: encoder, reverse loop and head of a shape captured as one CUDA graph.

For both backends that run with torch. A batch is copied in, the graph is replayed once, and logits
and features are copied out, with one wait. Graphs are captured for the batches in `BUCKETS`; other
batches are padded and split by `marnet_sdk.gpu.captured`. Everything that is captured for one
stream shares one pool of memory, so what runs on a stream runs one after another.

Inside, the loop is either the operators of the bundle's own graph, or, where the bundle computes in
16 bits and its loop is MARNet's, the persistent kernel of `marnet_kernels` between the two halves
of the graph. `RuntimeReport.loop` says which, and why.
Axes: B batch, K noise samples, S steps, R row of the table, H hidden, Hp H padded with zeros.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from marnet_sdk.backends import TextEncoder
from marnet_sdk.cpus import wait_briefly
from marnet_sdk.errors import (
    BackendUnavailable,
    InferenceError,
    InvalidInput,
    MarnetError,
    requires_extra,
)
from marnet_sdk.gpu.captured import (
    MOST_LANES,
    Answer,
    CapturedPipeline,
    DeviceRows,
    Program,
    RuntimeReport,
    Shape,
    report,
    warn_of_operators,
)
from marnet_sdk.gpu.driver import Gpu
from marnet_sdk.gpu.persistent_loop import LoopWeights, PersistentLoop
from marnet_sdk.noise.tables import Floats, Integers, Tables
from marnet_sdk.process import import_apart

# One image as it comes, and batches up to the 64 that `predict` makes when it is not told another
# number. Between them, padding at most doubles a batch, and each graph costs memory.
BUCKETS = (1, 8, 16, 32, 64)
COMPUTE = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
# TorchScript's executor looks at the first run and compiles in the second; libraries load their
# kernels and make their workspaces. None of that may happen while a graph is captured.
WARM_UPS = 3
_EXACT = Lock()  # held to change the process's settings, not while they are as they should be
_exact_users: list[Callable[[], None]] = []  # of each one inside, what puts the settings back


def why_no_cuda() -> str | None:
    """Tell why torch runs on no GPU here, and what to do about it; None: it does.

    Raises:
        MissingExtra: torch is not installed.
    """
    with requires_extra("torch", "torch"):
        import torch
    install = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one with it: {install}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    detail = f" ({' '.join(str(said[0].message).split())})" if said else ""
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU{detail}; look at what "
        "nvidia-smi says, or export for the processor: marnet-export --device cpu"
    )


def check_types(backend: str, compute: str, device: str) -> None:
    """Refuse a device or a type that torch does not compute with here.

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: torch runs on no GPU here, or does not compute in this type there.
    """
    wait_briefly()
    with requires_extra("torch", "torch"):
        import_apart("torch")
    if device == "cuda":
        check_cuda(backend)
    types = COMPUTE[device]
    if compute not in types:
        where = {"cpu": "on a CPU", "cuda": "on a GPU"}[device]
        raise BackendUnavailable(
            f"{backend} computes in {', '.join(types[:-1])} or {types[-1]} {where}, the bundle "
            f"asks {compute}"
        )


def check_cuda(backend: str) -> None:
    """Refuse a GPU where torch has none.

    Raises:
        BackendUnavailable: torch runs on no GPU here; says why.
    """
    if reason := why_no_cuda():
        raise BackendUnavailable(f"{backend} cannot run on cuda: {reason}")


def torch_type(compute: str) -> Any:
    """The type of torch that fp32, bf16 or fp16 stands for."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]


def gpu_name() -> tuple[str, str]:
    """The kind of the GPU that is used, as compilers call it, and its name: sm90, NVIDIA H100."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}", torch.cuda.get_device_name()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 factors keep all their bits: no TF32, which convolutions use.

    These are settings of the process. They are read when work is enqueued, so what was captured
    needs them no longer. Any number of threads may be inside at once: the first changes the
    settings, and the last puts them back.
    """
    with _EXACT:
        _exact_users.append(_exact_users[0] if _exact_users else _set_exact())
    try:
        yield
    finally:
        with _EXACT:
            put_back = _exact_users.pop()
            if not _exact_users:
                put_back()


def _set_exact() -> Callable[[], None]:
    """Change the settings; returns what puts them back."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    newer = (cudnn.conv, cudnn.rnn, matmul)
    # torch can be told in an older and a newer way, and answers with an error where the two
    # differ: where a caller uses the newer one, the older one cannot be asked.
    tf32, precision = _ask(lambda: cudnn.allow_tf32), _ask(torch.get_float32_matmul_precision)
    before = [setting.fp32_precision for setting in newer]

    def put_back() -> None:
        _tell_older(tf32, precision)
        for setting, value in zip(newer, before, strict=True):
            setting.fp32_precision = value

    try:
        _tell_older(None if tf32 is None else False, precision and "highest")
        for setting in newer:
            setting.fp32_precision = "ieee"
    except BaseException:
        put_back()
        raise
    return put_back


def _ask(question: Callable[[], Any]) -> Any:
    """Ask torch; None: it does not answer."""
    try:
        return question()
    except RuntimeError:
        return None


def _tell_older(tf32: bool | None, precision: str | None) -> None:
    import torch

    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


# --- what is captured


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts around MARNet's loop, for a kernel that runs the loop itself."""

    condition: Callable[[Any], Any]  # x_v [B, D_v] -> q [B, 1, H]
    finish: Callable[[Any, Any], tuple[Any, Any]]  # x_v, h3 [B, K, H] -> logits, features
    weights: LoopWeights


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded bundle as calls that take and return tensors on the device."""

    encode: Callable[[Any], Any]  # pixels [B, 3, H, W] -> x_v [B, D_v]
    refine: Callable[[Any, Any, Any], tuple[Any, Any]]  # x_v and tables -> logits, features
    parts: Parts | str  # str: why there are none


class KernelLoop(Protocol):
    """The whole loop as one kernel, for one shape, with memory of its own."""

    @property
    def description(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def hold(self, tables: Tables) -> None:
        """Enqueue the copies of tables, unless it is the very same object that it has."""
        ...

    def __call__(self, q: Any) -> Any:
        """Enqueue the loop: q [B, H] -> h3 of the last step [B, K, H]."""
        ...


def loop_parts(refine: Any, compute: str) -> Parts | str:
    """The parts of a loaded refine.pt, which is not frozen; or why it has none to take."""
    step: Any = getattr(getattr(refine, "loop", None), "step", None)
    names = ("condition", "hidden2", "hidden3", "carry", "output", "slope")
    if not hasattr(refine, "head") or not all(hasattr(step, name) for name in names):
        return "the bundle's loop is not that of MARNet's plan"
    if hasattr(getattr(step, "input", None), "matrix"):
        return "the bundle's loop carries the feature and not the hidden state"
    if compute not in ("fp16", "bf16"):
        return f"the persistent kernel multiplies in fp16 or bf16, the bundle in {compute}"

    def array(tensor: Any) -> Floats:
        return tensor.detach().float().cpu().numpy()

    layers = {"hidden2": step.hidden2, "hidden3": step.hidden3, "carry": step.carry}
    return Parts(
        condition=step.condition,
        finish=lambda x_v, h3: refine.head(x_v, step.output(h3)),
        weights=LoopWeights(
            matrices={name: array(layer.matrix) for name, layer in layers.items()},
            biases={name: array(layers[name].bias) for name in ("hidden2", "hidden3")},
            slope=float(step.slope),
            operand=compute,
        ),
    )


# --- the calls of torch.cuda


class Cuda:
    """The calls of torch.cuda that are needed, on one stream: what is enqueued runs in order."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def name(self) -> str:
        target, name = gpu_name()
        return f"{name} ({target})"

    @property
    def stream(self) -> int:
        """The driver's handle."""
        return self._stream.cuda_stream

    @contextmanager
    def current(self) -> Iterator[None]:
        """Send the thread's work to this stream within the block."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def follow_caller(self) -> None:
        """Make what is enqueued from now on wait for what the calling thread's stream has to do."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def zeros(self, *shape: int) -> Any:
        import torch

        return torch.zeros(shape, device=self.device)

    def pinned(self, *shape: int) -> Any:
        """Memory of the host that the GPU can read and write while the host goes on."""
        import torch

        return torch.zeros(shape, pin_memory=True)

    def at(self, address: int, shape: Sequence[int]) -> Any:
        """The float32 tensor that a caller keeps at an address."""
        import torch

        return torch.as_tensor(_Array(address, tuple(shape)), device=self.device)

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, array: Floats | Integers) -> Any:
        return as_tensor(array).to(self.device)

    def download(self, tensor: Any) -> Floats:
        """Waits until it is there."""
        return tensor.cpu().numpy().copy()

    def capture(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], None], Any]:
        """Capture `run`: what replays it, and the tensors that it then writes to.

        Raises:
            InferenceError: torch cannot capture it; says why.
        """
        import torch

        # cuBLAS's own memory must lie in the graph's pool: who clears it elsewhere in the process
        # (torch.compile does) would give away what the graph writes to.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        clear()
        graph = torch.cuda.CUDAGraph()
        try:
            # The stricter modes forbid to free memory meanwhile, which a collection of garbage
            # does whenever it likes.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"
            ):
                outputs = run()
        except RuntimeError as error:
            self._leave_pool()
            raise InferenceError(f"torch cannot capture a graph: {first_cause(error)}") from error
        finally:
            clear()
        return graph.replay, outputs

    def _leave_pool(self) -> None:
        """End a capture that was broken off, which some versions of torch never do."""
        import torch

        with suppress(Exception):  # others have
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)  # type: ignore[attr-defined]
        self._pool = torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def reserved(self) -> int:
        """The bytes that torch holds on the GPU in this process, for everybody."""
        import torch

        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True)
class _Array:
    """Memory on the GPU, as libraries tell each other of it."""

    address: int
    shape: tuple[int, ...]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = {"data": (self.address, False), "strides": None, "version": 3}
        return {"shape": self.shape, "typestr": "<f4"} | place


def as_tensor(array: np.ndarray) -> Any:
    import torch

    # torch warns of arrays that it must not write to, though nothing here writes to them.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def first_cause(error: BaseException) -> str:
    """Tell in one line what came before the errors that came of it.

    A capture that is broken off fails once more when it is ended, which tells nothing.
    """
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript puts a traceback of its own before what happened.
    scripted = lines and lines[0].startswith("The following operation failed in the TorchScript")
    said = lines[-1] if scripted else " ".join(lines)
    return said[:300] or type(error).__name__


# --- programs


@dataclass(frozen=True, eq=False)
class Rows:
    """A caller's tensor on the GPU, as `marnet_sdk.gpu.captured.DeviceRows`."""

    tensor: Any  # float32 [B, 3, height, width], contiguous

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: slice, /) -> Rows:
        return Rows(self.tensor[rows])


class _Lane:
    """A stream, its pool of memory and what lies in it, for one program at a time."""

    def __init__(self, gpu: Cuda) -> None:
        self.gpu, self._lock = gpu, Lock()
        self._tables: WeakValueDictionary[tuple[int, ...], _Tables] = WeakValueDictionary()

    @contextmanager
    def taken(self, pixels: Any = None) -> Iterator[Cuda]:
        """Give the lane to the calling thread, and send its work there, within the block.

        Args:
            pixels: what is read; where a caller's library may be writing them still, the lane
                waits for that.
        """
        import torch

        with self._lock:
            if isinstance(pixels, Rows):
                self.gpu.follow_caller()
            # A caller's autocast would change the types that the bundle was verified with.
            quiet = torch.autocast(self.gpu.device.type, enabled=False)
            # Not inference_mode: what torch first makes in it cannot be changed outside of it, its
            # random generator's state for graphs included. And no fusers of TorchScript: they
            # compile when a shape comes again, and change the last bits of its answers.
            plain = torch.jit.optimized_execution(False)  # pyright: ignore[reportPrivateImportUsage]
            with self.gpu.current(), torch.no_grad(), quiet, plain:
                try:
                    yield self.gpu
                except BaseException:
                    with suppress(Exception):
                        self.gpu.synchronize()  # what was enqueued reads the caller's memory
                    raise

    def tables(self, shape: Shape, width: int) -> _Tables:
        """The place where the programs of a shape find the loop's tables."""
        key = (shape.steps, shape.samples, width)
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = _Tables(self.gpu, *key)
        return tables

    def table_bytes(self) -> int:
        with self._lock:
            return sum(_nbytes(t.coefficients, t.bias) for t in self._tables.values())


class _Tables:
    """The loop's tables on the GPU, which stay until others are needed."""

    def __init__(self, gpu: Cuda, steps: int, samples: int, width: int) -> None:
        self._gpu = gpu
        self._holds: Tables | None = None
        self.coefficients = gpu.zeros(steps, 3)
        self.bias = gpu.zeros(steps, 1, samples, width)

    def hold(self, tables: Tables) -> None:
        """Enqueue the copies of tables, unless it is the very same object that is there."""
        if tables is self._holds:
            return
        self._holds = None  # should the next lines fail
        self._gpu.copy(self.coefficients, as_tensor(tables.coefficients))
        self._gpu.copy(self.bias, as_tensor(tables.bias))
        self._holds = tables


class _Program:
    """One captured graph with the memory that it reads and writes."""

    def __init__(
        self,
        lane: _Lane,
        model: Model,
        shape: Shape,
        sizes: tuple[int, ...],
        kernel: KernelLoop | None,
    ) -> None:
        """Capture. The lane is taken.

        Args:
            sizes: 3, height and width of an image, and R. kernel: None: the bundle's own loop.

        Raises:
            InferenceError, RuntimeError: it cannot be captured.
        """
        self._lane, gpu = lane, lane.gpu
        *image, width = sizes
        self._kernel = kernel
        self._tables = lane.tables(shape, width) if kernel is None else kernel
        self._in_place = shape.address > 0
        if self._in_place:
            self._pixels = gpu.at(shape.address, (shape.batch, *image))
        else:
            self._pixels = gpu.zeros(shape.batch, *image)
        self._staging = None if shape.address else gpu.pinned(shape.batch, *image)
        run = _work(model, self._pixels, self._tables)
        for _ in range(WARM_UPS):
            run()
        gpu.synchronize()
        self._replay, self._outputs = gpu.capture(run)
        self._results = [gpu.pinned(*output.shape) for output in self._outputs]

    def __call__(self, pixels: Any, tables: Tables) -> Answer:
        with self._lane.taken(pixels) as gpu:
            try:
                self._read(pixels)
                self._tables.hold(tables)
                self._replay()
                for result, output in zip(self._results, self._outputs, strict=True):
                    gpu.copy(result, output)
            finally:
                gpu.synchronize()  # copies read and write our memory until then
            logits, features = (result.numpy().copy() for result in self._results)
        return logits, features

    def _read(self, pixels: Any) -> None:
        """Bring them to where the graph reads them, unless they are there."""
        gpu, count = self._lane.gpu, len(pixels)
        if self._in_place:
            return
        if self._staging is not None:
            np.copyto(self._staging.numpy(), pixels)
            gpu.copy(self._pixels, self._staging)
            return
        gpu.copy(self._pixels[:count], pixels.tensor)
        if count < len(self._pixels):
            gpu.copy(self._pixels[count:], pixels.tensor[-1:])  # any rows: nobody sees their answer

    @property
    def nbytes(self) -> int:
        """The bytes on the GPU, but for what the graph itself needs."""
        own = [] if self._in_place else [self._pixels]
        return _nbytes(*own, *self._outputs)

    @property
    def kernel_nbytes(self) -> int:
        return 0 if self._kernel is None else self._kernel.nbytes


def _work(model: Model, pixels: Any, loop: _Tables | KernelLoop) -> Callable[[], tuple[Any, ...]]:
    """Make the call that enqueues everything from pixels to logits and features."""

    def answers() -> tuple[Any, Any]:
        x_v = model.encode(pixels)
        if isinstance(loop, _Tables):
            return model.refine(x_v, loop.coefficients, loop.bias)
        assert isinstance(model.parts, Parts)
        h3 = loop(model.parts.condition(x_v)[:, 0])
        return model.parts.finish(x_v, h3)

    # Copies to the host need no memory on the GPU then.
    return lambda: tuple(output.contiguous() for output in answers())


def _nbytes(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- the backend

OPERATORS = "operators in the captured graph"


class MakeKernel(Protocol):
    @property
    def nbytes(self) -> int:
        """The bytes that kernels of all shapes share."""
        ...

    def __call__(self, parts: Parts, shape: Shape, gpu: Cuda) -> KernelLoop: ...


class TorchOnCuda:
    """A `Backend` that runs a model of torch on a GPU."""

    def __init__(
        self,
        model: Model,
        make_gpu: Callable[[], Cuda] = Cuda,
        *,
        buckets: Sequence[int] = BUCKETS,
        make_kernel: MakeKernel | None = None,
    ) -> None:
        """Make the lanes.

        Args:
            make_gpu: makes a stream; called once for each lane.
            make_kernel: makes the loop's kernel for a shape, or raises, saying why it cannot.
                None: the one of `marnet_kernels`.
        """
        self._model, self._make_kernel = model, make_kernel or _Kernels()
        self._lanes = [_Lane(make_gpu()) for _ in range(MOST_LANES)]
        self._live: Counter[tuple[Shape, int]] = Counter()  # programs of a shape in a lane
        self._sizes: tuple[int, ...] | None = None
        self._loops: dict[str, set[int]] = {}  # what runs the loop -> for which batches
        self._pipeline = CapturedPipeline(self._capture, self._run_plainly, buckets)

    def encode(self, pixels: Any) -> Floats:
        with self._lanes[0].taken(pixels) as gpu, exact_float32():
            return gpu.download(self._model.encode(_on_device(gpu, pixels)))

    def refine(self, x_v: Floats, tables: Tables) -> Answer:
        with self._lanes[0].taken() as gpu, exact_float32():
            given = map(gpu.upload, (x_v, tables.coefficients, tables.bias))
            logits, features = self._model.refine(*given)
            return gpu.download(logits), gpu.download(features)

    def run(self, pixels: Any, tables: Tables) -> Answer:
        shape = tables.bias.shape
        if len(shape) != 4 or tables.coefficients.shape != (shape[0], 3):
            raise InvalidInput(
                f"got tables {tables.coefficients.shape} and {shape}, expected [steps, 3] and "
                "[steps, 1 or images, samples, width]; make them with make_tables"
            )
        sizes = (*pixels.shape[1:], shape[-1])
        self._sizes = self._sizes or sizes
        if sizes != self._sizes:
            raise InvalidInput(
                f"got images and tables of sizes {sizes} (channels, height, width, table), expected"
                f" {self._sizes}, as in the first call; open the bundle again for others"
            )
        return self._pipeline(pixels, tables)

    def device_rows(self, array: Any) -> DeviceRows:
        """Take a caller's array on the GPU.

        Raises:
            InvalidInput: not float32 [B, 3, height, width] in the memory of this backend's GPU.
        """
        import torch

        device = self._lanes[0].gpu.device
        try:
            tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
        except (AttributeError, TypeError, RuntimeError, BufferError) as error:
            raise InvalidInput(
                f"got {type(array).__name__}, which torch cannot read ({one_line(error)}); "
                "pass an array that has __dlpack__, or a NumPy array"
            ) from error
        if tensor.device != device or tensor.dtype != torch.float32 or tensor.ndim != 4:
            raise InvalidInput(
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"torch.float32 [B, 3, height, width] on {device}"
            )
        return Rows(tensor.detach().contiguous())

    def report(self) -> RuntimeReport:
        counts, programs = self._pipeline.report(), self._pipeline.programs()
        own = [program for program in programs if isinstance(program, _Program)]
        memory = {
            "images and answers": sum(program.nbytes for program in own),
            "tables": sum(lane.table_bytes() for lane in self._lanes),
            "persistent kernel": sum((p.kernel_nbytes for p in own), self._make_kernel.nbytes),
            "torch, all of this process": self._lanes[0].gpu.reserved(),
        }
        return report(
            counts,
            device=self._lanes[0].gpu.name,
            loop=self._loop(),
            buckets=self._pipeline.buckets,
            memory=memory,
        )

    def _loop(self) -> str:
        if not self._loops:
            parts = self._model.parts
            return "nothing is captured yet" + (f"; {parts}" if isinstance(parts, str) else "")
        if len(self._loops) == 1:
            return next(iter(self._loops))
        return "; ".join(
            f"batches of {', '.join(map(str, sorted(batches)))}: {loop}"
            for loop, batches in dict(self._loops).items()
        )

    def _run_plainly(self, pixels: Any, tables: Tables) -> Answer:
        with self._lanes[0].taken(pixels) as gpu, exact_float32():
            x_v = self._model.encode(_on_device(gpu, pixels))
            arrays = map(gpu.upload, (tables.coefficients, tables.bias))
            logits, features = self._model.refine(x_v, *arrays)
            return gpu.download(logits), gpu.download(features)

    def _capture(self, shape: Shape) -> Program:
        """Capture with the persistent kernel where it can run, else with the bundle's own loop."""
        # Programs of one shape go to different streams, so that they can run at the same time.
        number = min(range(len(self._lanes)), key=lambda i: self._live[shape, i])
        self._live[shape, number] += 1
        try:
            program = self._capture_in(self._lanes[number], shape)
        except BaseException:
            self._live[shape, number] -= 1
            raise
        weakref.finalize(program, self._live.subtract, [(shape, number)])
        return program

    def _capture_in(self, lane: _Lane, shape: Shape) -> Program:
        assert self._sizes is not None
        with lane.taken() as gpu, exact_float32():
            kernel = self._kernel(shape, gpu)
            if not isinstance(kernel, str):
                try:
                    program = _Program(lane, self._model, shape, self._sizes, kernel)
                    self._loops.setdefault(kernel.description, set()).add(shape.batch)
                    return program
                except (MarnetError, RuntimeError) as error:
                    kernel = f"the persistent kernel failed: {one_line(error)}"
            program = _Program(lane, self._model, shape, self._sizes, None)
            how = f"{OPERATORS}, because {kernel}"
            if how not in self._loops and not isinstance(self._model.parts, str):
                warn_of_operators(how)
            self._loops.setdefault(how, set()).add(shape.batch)
            return program

    def _kernel(self, shape: Shape, gpu: Cuda) -> KernelLoop | str:
        """The kernel, or why there is none."""
        if isinstance(self._model.parts, str):
            return self._model.parts
        try:
            return self._make_kernel(self._model.parts, shape, gpu)
        except (ImportError, MarnetError, ValueError, RuntimeError) as error:
            return f"the persistent kernel cannot run: {one_line(error)}"


def _on_device(gpu: Cuda, pixels: Any) -> Any:
    return pixels.tensor if isinstance(pixels, Rows) else gpu.upload(pixels)


def plain_text(module: Callable[[Any, Any], Any], gpu: Cuda | None = None) -> TextEncoder:
    """A text encoder on the GPU, which is not captured: texts have any length.

    Args:
        module: ids and mask [B, L] -> x_s [B, D_s], as tensors on the device.
    """
    lane = _Lane(gpu or Cuda())

    def encode(ids: Integers, mask: Integers) -> Floats:
        with lane.taken() as gpu, exact_float32():
            return gpu.download(module(gpu.upload(ids), gpu.upload(mask)))

    return encode


# --- the persistent kernel


class _Kernels:
    """Makes the persistent kernel of `marnet_kernels` for shapes; they share the loop's weights."""

    def __init__(self) -> None:
        self._loop: PersistentLoop | None = None
        self._weights: list[Any] = []  # memory

    def __call__(self, parts: Parts, shape: Shape, gpu: Cuda) -> KernelLoop:
        """Make the kernel for a shape.

        Raises:
            MarnetError, ValueError, RuntimeError: it cannot run here; says why.
        """
        driver = Gpu("cuda", gpu.device.index or 0)
        with driver.current():
            if self._loop is None:
                allocate = partial(_allocate, gpu, self._weights)
                self._loop = PersistentLoop(parts.weights, driver, allocate, gpu.stream)
            return _PersistentKernel(self._loop, shape, gpu)

    @property
    def nbytes(self) -> int:
        return _nbytes(*self._weights)


def _allocate(gpu: Cuda, keep: list[Any], size: int) -> int:
    """Memory of torch on the GPU, which lives as long as `keep`. Its addresses are multiples of
    512."""
    keep.append(gpu.zeros(-(-size // 4)))
    return keep[-1].data_ptr()


class _PersistentKernel:
    """A `KernelLoop`."""

    def __init__(self, loop: PersistentLoop, shape: Shape, gpu: Cuda) -> None:
        self._gpu, self._loop, self._shape = gpu, loop, shape
        self._memory: list[Any] = []
        self._prepared = loop.prepare(
            shape.batch, shape.samples, shape.steps, partial(_allocate, gpu, self._memory)
        )
        padded = loop.layout.padded
        self._q = gpu.zeros(shape.batch, padded)
        self._h3 = gpu.zeros(shape.batch, shape.samples, padded)
        self._holds: Tables | None = None

    @property
    def description(self) -> str:
        return f"persistent kernel ({self._prepared.variant})"

    @property
    def nbytes(self) -> int:
        return _nbytes(*self._memory, self._q, self._h3)

    def hold(self, tables: Tables) -> None:
        if tables is self._holds:
            return
        self._holds = None  # should the next lines fail
        expected = (self._shape.steps, 1, self._shape.samples, self._loop.layout.hidden)
        if tables.bias.shape != expected:  # it would be written beyond its memory
            raise InvalidInput(
                f"got a table of the loop of {tables.bias.shape}, expected {expected}; make it "
                "with make_tables of the bundle's plan"
            )
        with self._loop.gpu.current():
            self._prepared.set_tables(tables, self._gpu.stream)
        self._holds = tables

    def __call__(self, q: Any) -> Any:
        width = self._loop.layout.hidden
        self._q[:, :width].copy_(q)  # behind it, zeros
        with self._loop.gpu.current():
            self._prepared.enqueue(self._gpu.stream, self._q.data_ptr(), self._h3.data_ptr())
        return self._h3[..., :width]

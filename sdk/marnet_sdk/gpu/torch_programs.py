"""Captured graphs of torch: encoder, reverse loop and head of one shape, with what they read.

Everything that is captured for one stream shares one pool of memory, so what runs on a stream runs
one after another.
Axes: B batch, K noise samples, S steps, R row of the table, H hidden, Hp H padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from marnet_sdk.errors import InvalidInput
from marnet_sdk.gpu.captured import Answer, HoldsTables, Shape
from marnet_sdk.gpu.driver import Gpu
from marnet_sdk.gpu.persistent_loop import LoopWeights, PersistentLoop
from marnet_sdk.gpu.torch_stream import Cuda, Rows, as_tensor, nbytes_of
from marnet_sdk.noise.tables import Tables

# TorchScript's executor looks at the first run and compiles in the second; libraries load their
# kernels and make their workspaces. None of that may happen while a graph is captured.
WARM_UPS = 3


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


class MakeKernel(Protocol):
    @property
    def nbytes(self) -> int:
        """The bytes that kernels of all shapes share."""
        ...

    def __call__(self, parts: Parts, shape: Shape, gpu: Cuda) -> KernelLoop: ...


class TorchLane:
    """A stream, its pool of memory and what lies in it, for one program at a time."""

    def __init__(self, gpu: Cuda) -> None:
        self.gpu, self._lock = gpu, Lock()
        self._tables: WeakValueDictionary[tuple[int, ...], TorchTables] = WeakValueDictionary()

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

    def tables(self, shape: Shape, width: int) -> TorchTables:
        """The place where the programs of a shape find the loop's tables."""
        key = (shape.steps, shape.samples, width)
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = TorchTables(self.gpu, *key)
        return tables

    def table_bytes(self) -> int:
        with self._lock:
            return sum(nbytes_of(t.coefficients, t.bias) for t in self._tables.values())


class TorchTables(HoldsTables):
    """The loop's tables as the bundle's own loop reads them."""

    def __init__(self, gpu: Cuda, steps: int, samples: int, width: int) -> None:
        self._gpu = gpu
        self.coefficients = gpu.zeros(steps, 3)
        self.bias = gpu.zeros(steps, 1, samples, width)

    def _copy(self, tables: Tables) -> None:
        self._gpu.copy(self.coefficients, as_tensor(tables.coefficients))
        self._gpu.copy(self.bias, as_tensor(tables.bias))


class TorchProgram:
    """One captured graph with the memory that it reads and writes."""

    def __init__(
        self,
        lane: TorchLane,
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
        return nbytes_of(*own, *self._outputs)

    @property
    def kernel_nbytes(self) -> int:
        return 0 if self._kernel is None else self._kernel.nbytes


def _work(
    model: Model, pixels: Any, loop: TorchTables | KernelLoop
) -> Callable[[], tuple[Any, ...]]:
    """Make the call that enqueues everything from pixels to logits and features."""

    def answers() -> tuple[Any, Any]:
        x_v = model.encode(pixels)
        if isinstance(loop, TorchTables):
            return model.refine(x_v, loop.coefficients, loop.bias)
        assert isinstance(model.parts, Parts)
        h3 = loop(model.parts.condition(x_v)[:, 0])
        return model.parts.finish(x_v, h3)

    # Copies to the host need no memory on the GPU then.
    return lambda: tuple(output.contiguous() for output in answers())


class TorchKernels:
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
            return PersistentKernel(self._loop, shape, gpu)

    @property
    def nbytes(self) -> int:
        return nbytes_of(*self._weights)


def _allocate(gpu: Cuda, keep: list[Any], size: int) -> int:
    """Memory of torch on the GPU, which lives as long as `keep`. Its addresses are multiples of
    512."""
    keep.append(gpu.zeros(-(-size // 4)))
    return keep[-1].data_ptr()


class PersistentKernel(HoldsTables):
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

    @property
    def description(self) -> str:
        return f"persistent kernel ({self._prepared.variant})"

    @property
    def nbytes(self) -> int:
        return nbytes_of(*self._memory, self._q, self._h3)

    def _copy(self, tables: Tables) -> None:
        expected = (self._shape.steps, 1, self._shape.samples, self._loop.layout.hidden)
        if tables.bias.shape != expected:  # it would be written beyond its memory
            raise InvalidInput(
                f"got a table of the loop of {tables.bias.shape}, expected {expected}; make it "
                "with make_tables of the bundle's plan"
            )
        with self._loop.gpu.current():
            self._prepared.set_tables(tables, self._gpu.stream)

    def __call__(self, q: Any) -> Any:
        width = self._loop.layout.hidden
        self._q[:, :width].copy_(q)  # behind it, zeros
        with self._loop.gpu.current():
            self._prepared.enqueue(self._gpu.stream, self._q.data_ptr(), self._h3.data_ptr())
        return self._h3[..., :width]

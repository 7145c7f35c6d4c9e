"""Captured graphs of TensorRT's engines: from pixels to logits for one shape.

The loop in it is the persistent kernel of `marnet_kernels`, between engines of what comes before
and behind it, or the engine "refine".
Axes: B batch, S steps, K noise samples, R row of the table, Hp hidden, padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.errors import InvalidInput, MarnetError
from marnet_sdk.gpu.captured import COPIED, Answer, HoldsTables, Shape, warn_of_operators
from marnet_sdk.gpu.driver import DeviceArray, Gpu, Memory, MemoryPlan, Stream
from marnet_sdk.gpu.persistent_loop import (
    CONDITION,
    FINISH,
    LOOP,
    LoopWeights,
    PersistentLoop,
    check_shape,
)
from marnet_sdk.gpu.tensorrt_runtime import EngineContext, LoadedEngine, Machine, as_bound
from marnet_sdk.noise.tables import Floats, Tables

_ANSWER = ("logits", "features")  # outputs of the last engine


class KernelBetween(NamedTuple):
    """The reverse loop as a persistent kernel, and the engines around it."""

    condition: LoadedEngine  # x_v [B, D_v] -> q [B, Hp]
    loop: PersistentLoop  # q -> h3 [B, K, Hp]
    finish: LoadedEngine  # x_v, h3 -> logits, features
    weights: Memory


def open_kernel(machine: Machine) -> tuple[KernelBetween | None, str]:
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
    return KernelBetween(condition, loop, finish, held[0]), ""


class EngineProgram(HoldsTables):
    """The way from pixels to logits for one shape, as one captured graph; for one call at a time.

    Every size and every address is set here, once and for all.
    """

    def __init__(
        self, gpu: Gpu, shape: Shape, encoder: LoadedEngine, behind: LoadedEngine | KernelBetween
    ) -> None:
        """Make contexts, memory and the graph.

        Args:
            behind: what makes logits of x_v: the engine "refine", or the kernel and its engines.

        Raises:
            InferenceError: something of it cannot be captured.
            ValueError, RuntimeError: the kernel cannot run it.
        """
        self._gpu, self._shape = gpu, shape
        self._memory: list[Memory] = []
        with gpu.current():
            self._stream = gpu.make_stream()
            if isinstance(behind, KernelBetween):
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
                self.hold(tables)
                self._take(pixels)
                self._gpu.launch(self._graph, self._stream)
            finally:
                self._gpu.wait(self._stream)  # copies read and write our arrays until then
        return self._logits.copy(), self._features.copy()

    def _copy(self, tables: Tables) -> None:
        self._set_tables(tables, self._stream)

    # No closure below holds the program itself: its memory goes with its last user.

    def _prepare_operators(self, encoder: LoadedEngine, refine: LoadedEngine) -> None:
        batch, steps, samples = self._shape.batch, self._shape.steps, self._shape.samples
        width = refine.shape_of("bias")[3]
        tables = {"coefficients": (steps, 3), "bias": (steps, 1, samples, width)}
        at = self._bind([encoder, refine], batch, tables)
        self._steps = [context.enqueue for context in self._contexts]
        self._set_tables = EngineTables(self._gpu, tables, at)

    def _prepare_kernel(self, encoder: LoadedEngine, kernel: KernelBetween) -> None:
        batch, steps, samples = self._shape.batch, self._shape.steps, self._shape.samples
        loop = kernel.loop.prepare(batch, samples, steps, self._allocate)
        h3 = (batch, samples, kernel.loop.layout.padded)
        at = self._bind([encoder, kernel.condition, kernel.finish], batch, {"h3": h3})
        first, condition, finish = (context.enqueue for context in self._contexts)
        stream = self._stream
        self._steps = [first, condition, lambda: loop.enqueue(stream, at["q"], at["h3"]), finish]
        self._set_tables = loop.set_tables

    def _bind(
        self, graphs: Sequence[LoadedEngine], batch: int, more: Mapping[str, tuple[int, ...]]
    ) -> dict[str, int]:
        """Make the contexts, and memory for all their inputs and outputs: the addresses.

        Args:
            more: shapes of what no engine before makes, beside the pixels.
        """
        self._contexts = [
            EngineContext(graph, graph.profile(batch), self._stream) for graph in graphs
        ]
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


class EngineTables:
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
        self._arrays = [as_bound(array) for array in arrays.values()]  # the copies read them
        for name, array in zip(arrays, self._arrays, strict=True):
            self._gpu.upload(self._at[name], array, stream)

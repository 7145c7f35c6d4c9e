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

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from marnet_sdk.backends import Backend, RuntimeReport, TextEncoder, check_device
from marnet_sdk.errors import BackendUnavailable, InferenceError
from marnet_sdk.gpu.captured import (
    Answer,
    CapturedPipeline,
    Loops,
    Program,
    Shape,
    join,
    report,
)
from marnet_sdk.gpu.driver import DeviceArray, device_array
from marnet_sdk.gpu.tensorrt_library import find_device
from marnet_sdk.gpu.tensorrt_programs import EngineProgram, open_kernel
from marnet_sdk.gpu.tensorrt_runtime import LoadedEngine, Machine
from marnet_sdk.noise.tables import Floats, Integers, Tables

Refine = Callable[[Floats, Tables], Answer]


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
    return _TensorRT(Machine.of(payload))


def open_text(
    payload: Path, compute: str, threads: int | None, device: str = "cuda"
) -> TextEncoder:
    """Load the engine of the text encoder; as `open_payload`."""
    check_device("tensorrt", device, "cuda")
    graph = Machine.of(payload).graph("text")

    def encode(ids: Integers, mask: Integers) -> Floats:
        graph.check_range("tokens", ids.shape[1])
        return graph({"ids": ids, "mask": mask})["x_s"]

    return encode


class _TensorRT:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._encoder, self._refine = machine.graph("encoder"), machine.graph("refine")
        self._kernel, self._why_not = open_kernel(machine)
        self._loops = Loops("at {} rows")
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
            assert isinstance(program, EngineProgram)
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

    def _capture(self, shape: Shape) -> Program:
        """A program for a shape, with the persistent kernel in it if that can run.

        Raises:
            InferenceError: an engine cannot be captured, or not run with so many samples.
        """
        _, most = self._refine.engine.ranges["samples"]
        if shape.samples > most:
            raise InferenceError(
                f"the engines take up to {most} noise samples at once, got {shape.samples}"
            )
        kernel, gpu = self._kernel, self._machine.gpu
        program = partial(EngineProgram, gpu, shape, self._encoder)
        return self._loops.capture(
            shape.batch * shape.samples,
            self._why_not if kernel is None else lambda: (program(kernel), "persistent kernel"),
            lambda: program(self._refine),
        )

    def _loop(self) -> str:
        """Tell what runs the reverse loop, and why, in one line."""
        nothing = f"nothing was captured yet; {self._why_not or 'the persistent kernel is there'}"
        return str(self._loops) or nothing


def _on_host(pixels: Floats | DeviceArray) -> Floats:
    return pixels.numpy() if isinstance(pixels, DeviceArray) else pixels


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


def _common_buckets(graphs: Sequence[LoadedEngine]) -> list[int]:
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

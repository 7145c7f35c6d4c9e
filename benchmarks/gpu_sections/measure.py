"""Timing with CUDA events around work that is interleaved in rounds, and the lines that it gives.

On a CPU, where the suite is rehearsed, a clock takes the place of events and a call that of a
captured graph: every section runs, and its figures mean nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Call = Callable[[], Any]  # enqueues work on the current stream
Values = NDArray[np.float64]
Line = dict[str, Any]

NO_DEVICE = "needs a CUDA device"
_AHEAD = 200_000  # clock cycles that the GPU sleeps, so that the host is ahead of it: 0.1 ms


@dataclass(frozen=True)
class Machine:
    """The work runs on this device."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def stream(self) -> int:
        """The current stream, as a CUstream."""
        return torch.cuda.current_stream().cuda_stream

    def wait(self) -> None:
        """Wait until all enqueued work is done."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def is_lost(self) -> bool:
        """Tell whether an error of a kernel has left nothing of CUDA in this process."""
        try:
            self.wait()
        except RuntimeError:
            return True
        return False

    def capture(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The work of `call` as one CUDA graph; a replay writes the same tensor each time.

        What `call` holds lives as long as the graph, which reads it by its addresses.
        """
        if not self.is_cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate and compile at the first calls
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The stricter modes forbid what a collection of garbage does, which comes when it likes.
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="relaxed"):
                result = call()
        except RuntimeError:
            torch.cuda.set_stream(torch.cuda.default_stream())  # which torch may not have restored
            with suppress(Exception):  # some versions never end a capture that was broken off
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)  # type: ignore[attr-defined]
            raise
        return _Replay(graph, result, call)

    def milliseconds(self, call: Call, repeats: int = 1) -> float:
        """Time one call, from `repeats` of them enqueued back to back."""
        if not self.is_cuda:
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            return 1e3 * (time.perf_counter() - started) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if isinstance(call, _Replay):  # without it, the first launch counts as work of the GPU
            torch.cuda._sleep(_AHEAD)
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / repeats


@dataclass(frozen=True, eq=False)
class _Replay:
    graph: Any
    result: Tensor
    keeps: Any

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def interleave(
    machine: Machine,
    calls: Mapping[str, Call],
    seconds: float,
    *,
    least: int = 7,
    sample_ms: float = 1.0,
) -> dict[str, Values]:
    """Milliseconds of a call, many samples of each, taken in turn so that all meet the same card.

    Args:
        seconds: for all together. least: samples of each, however long they take.
        sample_ms: a sample is so many calls that it lasts about this long.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        machine.wait()
        once = machine.milliseconds(call)
        repeats[name] = max(1, min(100, math.ceil(sample_ms / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, end, rounds = list(calls), time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for name in order:
            taken[name].append(machine.milliseconds(calls[name], repeats[name]))
        order.reverse()
        rounds += 1
    return {name: np.array(values) for name, values in taken.items()}


def latencies(
    machine: Machine, calls: Mapping[str, Call], seconds: float, *, least: int = 7
) -> dict[str, Values]:
    """Milliseconds on the host's clock from a call to its end, one call at a time, in turn."""
    for call in calls.values():
        for _ in range(2):
            call()
    machine.wait()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, end, rounds = list(calls), time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for name in order:
            started = time.perf_counter()
            calls[name]()
            machine.wait()
            taken[name].append(1e3 * (time.perf_counter() - started))
        order.reverse()
        rounds += 1
    return {name: np.array(values) for name, values in taken.items()}


def compiled(machine: Machine, function: Any, **how: Any) -> Any:
    """Call torch.compile for fixed sizes; in a rehearsal only its tracing, which is quick."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # one for each batch, type and model
    how = how if machine.is_cuda else {"backend": "eager"}
    return torch.compile(function, dynamic=False, **how)


class Memory(dict[str, Tensor]):
    """Buffers of bytes on the device, which a kernel knows by their addresses alone."""

    def __init__(self, machine: Machine, sizes: Mapping[str, int]) -> None:
        """Make the buffers that `sizes` maps from names to bytes."""
        for name, size in sizes.items():
            self[name] = torch.zeros(size, dtype=torch.uint8, device=machine.device)

    def fill(self, **arrays: NDArray[Any]) -> None:
        """Copy arrays of as many bytes as the buffers of their names."""
        for name, array in arrays.items():
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self[name].copy_(torch.from_numpy(content))

    @property
    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.items()}


def spread(values: Values) -> dict[str, float]:
    """Median, 10th, 90th and 99th percentile, and the number of samples."""
    names, found = ("p10", "median", "p90", "p99"), np.percentile(values, (10, 50, 90, 99))
    return {**{n: float(f"{v:.6g}") for n, v in zip(names, found, strict=True)}, "n": len(values)}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest wanted value; infinite where `got` is not finite."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    if got.shape != wanted.shape:
        raise ValueError(f"got shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    error = float((got - wanted).abs().max() / wanted.abs().max())
    return error if math.isfinite(error) else math.inf


def equal_again(call: Callable[[], Tensor]) -> bool:
    """Tell whether two calls on the same input give the same bits."""
    first = call().clone()
    return bool(torch.equal(first, call()))


def reason(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


@dataclass
class Job:
    """A section works with this, and adds its lines to it.

    An error of a kernel that leaves nothing of CUDA in this process is not a line: it ends the
    section, which goes on in another process, without the line that was tried.
    """

    machine: Machine
    tiny: bool  # a rehearsal: sizes that a CPU runs in no time
    seconds: float  # that the section may take
    say: Callable[[str], None] = print
    backends: Sequence[str] = ()  # of ours, that the pipeline runs through
    lines: list[Line] = field(default_factory=list)
    earlier: Sequence[Line] = ()  # of processes of this section that came to an end
    send: Callable[[Line], None] = lambda line: None  # each line, and what is tried
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        return self.started + self.seconds - time.monotonic()

    def add(
        self, line: str, values: Values, unit: str, fidelity: Mapping[str, Any], **more: Any
    ) -> None:
        """A measured line. `fidelity` says how right its answers are."""
        found = spread(values)
        self._found({"line": line, **more, "unit": unit, **found, "fidelity": dict(fidelity)})

    def miss(self, line: str, why: str, **more: Any) -> None:
        """A line that was not measured, and why."""
        self.say(f"  not measured: {line} {more}: {why}")
        self._found({"line": line, **more, "missing": why})

    def _found(self, line: Line) -> None:
        self.lines.append(line)
        self.send({"found": line})

    def was_measured(self, **keys: Any) -> bool:
        """Tell whether a process before this one measured lines with these values."""
        return any("median" in line and keys.items() <= line.items() for line in self.earlier)

    def was_lost(self, line: str, **keys: Any) -> bool:
        """Tell whether a process before this one came to its end when it tried this line."""
        return {"line": line, **keys} in [
            {k: v for k, v in old.items() if k != "missing"} for old in self.earlier
        ]

    @contextmanager
    def attempt(self, line: str, **more: Any) -> Iterator[None]:
        """Whatever is raised inside is why the line is missing; the others are still measured."""
        self.send({"trying": {"line": line, **more}})
        try:
            yield
            self.machine.wait()  # or it would be the next line that fails
        except Exception as error:  # frameworks raise anything
            if self.machine.is_lost():
                raise
            self.miss(line, reason(error), **more)
        self.send({"trying": None})  # what comes next is not to be blamed on it

    def measure(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Values]:
        """Run `interleave` for so long, or for no time at all in a rehearsal."""
        if self.tiny:
            return interleave(self.machine, calls, 0.0, least=3, sample_ms=0.0)
        return interleave(self.machine, calls, seconds)

    def wall(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Values]:
        """Run `latencies` for so long, or for no time at all in a rehearsal."""
        least, seconds = (3, 0.0) if self.tiny else (7, seconds)
        return latencies(self.machine, calls, seconds, least=least)

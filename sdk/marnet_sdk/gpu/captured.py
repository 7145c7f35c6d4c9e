"""Programs of one fixed shape, captured once and replayed: the bookkeeping, without any CUDA.

A backend on a GPU captures all its work for a shape as one graph and replays it for every batch of
that shape. Here is what does not depend on the library that captures: a batch is split and padded
to the sizes that exist, a program is captured when its shape is first met, workers that call at the
same time get programs of their own, the least recently used shapes are dropped, and what cannot be
captured runs plainly, counted and warned of.
Axes: B batch, K noise samples, S steps, C classes, D_f fused features.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Condition, Lock
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import DeviceRows, RuntimeReport
from marnet_sdk.errors import InvalidInput, MarnetError, MarnetWarning, one_line
from marnet_sdk.noise.tables import Floats, Tables

Answer = tuple[Floats, Floats]  # logits [B, K, C] and features [B, K, D_f]
Batch = tuple[int, int]  # of a profile: least and most rows

# Each shape holds memory on the GPU for as long as it is kept, once for each worker.
MOST_CAPTURES, MOST_LANES = 16, 2
# Arrays of a caller that a shape is captured for where they lie; the others are copied.
MOST_ADDRESSES = 4
# Plain runs of a shape after which its capture is tried again: what was in its way may be gone.
RETRIES = (16, 256)
# One capture at a time in the process: beginning one waits for the whole device, which breaks
# another that is under way.
_CAPTURING = Lock()
ALIGNMENT = 256  # bytes, of an array that is read in place
COPIED = -1  # in the place of an address: pixels are copied on the GPU to the program's own memory


@dataclass(frozen=True)
class Shape:
    """The work that a captured program is for. Its sizes never change."""

    batch: int
    steps: int
    samples: int
    # Where the pixels are: 0, they come from the host; an address, a caller's array on the GPU is
    # read in place; COPIED, such an array is copied first.
    address: int = 0


class Program(Protocol):
    """The captured work for one shape. It frees what it holds when it is collected."""

    def __call__(self, pixels: Any, tables: Tables) -> Answer:
        """Run exactly `Shape.batch` rows of pixels to logits [B, K, C], features [B, K, D_f].

        `pixels` is a NumPy array of `Shape.batch` rows, or `DeviceRows`: exactly that many at
        `Shape.address`; for COPIED up to that many, which the program copies and pads.
        """
        ...


class Counts(NamedTuple):
    """The counts of a `CapturedPipeline` since it was made."""

    captures: int
    replays: int
    fallbacks: dict[str, int]
    copies: int


class Piece(NamedTuple):
    """Some rows of a batch, the profile that takes them, and how many rows that is run with."""

    rows: slice
    profile: int
    batch: int


def split_batch(count: int, batches: Sequence[Batch]) -> list[Piece]:
    """Decide how `count` rows are run with profiles that take from `least` to `most` rows each."""
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
    """Repeat the last row up to `count` rows: unlike zeros, it is what the model knows."""
    if len(array) == count:
        return array
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def join(answers: Sequence[Answer], axis: int) -> Answer:
    """Answers for parts of the rows (axis 0) or of the samples (axis 1), in order, as one."""
    if len(answers) == 1:
        return answers[0]
    logits, features = (np.concatenate(parts, axis) for parts in zip(*answers, strict=True))
    return logits, features


class CapturedPipeline:
    """Runs batches of any size with captured programs. May be called from several threads."""

    def __init__(
        self,
        capture: Callable[[Shape], Program],
        plain: Callable[[Any, Tables], Answer],
        buckets: Sequence[int],
        most_captures: int = MOST_CAPTURES,
        most_lanes: int = MOST_LANES,
    ) -> None:
        """Start with nothing captured.

        Args:
            capture: makes a program; never called by two threads at once. A `MarnetError`, a
                `RuntimeError` or a `MemoryError` says that the shape cannot be captured.
            plain: the same work without a captured program, for any number of rows.
            buckets: batch sizes that programs are captured for.
            most_captures: shapes that are kept. most_lanes: programs of one shape, which is how
                many threads run it at the same time; more wait for one.
        """
        self.buckets = tuple(sorted(set(buckets)))
        self._capture, self._plain = capture, plain
        self._most_captures, self._most_lanes = most_captures, most_lanes
        self._changed = Condition()  # guards all that follows
        self._kept: OrderedDict[Shape, _Lanes] = OrderedDict()
        self._refused: dict[Shape, _Refusal] = {}
        self._warned: set[str] = set()
        self._captures = self._replays = self._copies = 0
        self._fallbacks: dict[str, int] = {}

    def __call__(self, pixels: Floats | DeviceRows, tables: Tables) -> Answer:
        """Run pixels [B, 3, height, width] to logits [B, K, C] and features [B, K, D_f].

        Raises:
            InvalidInput: no rows.
        """
        if not len(pixels):
            raise InvalidInput("a batch of no images; give at least one")
        if tables.bias.shape[1] != 1:
            return self._run_plainly("each image has noise of its own", pixels, tables)
        pieces = split_batch(len(pixels), [(size, size) for size in self.buckets])
        parts = [self._run(_part(pixels, piece.rows), piece.batch, tables) for piece in pieces]
        return join(parts, axis=0)

    def report(self) -> Counts:
        with self._changed:
            fallbacks = dict(self._fallbacks)
            return Counts(self._captures, self._replays, fallbacks, self._copies)

    def programs(self) -> list[Program]:
        """The programs that are kept."""
        with self._changed:
            return [p for lanes in self._kept.values() for p in (*lanes.idle, *lanes.busy)]

    def _run(self, rows: Floats | DeviceRows, batch: int, tables: Tables) -> Answer:
        """Run one piece: up to `batch` rows."""
        shape = self._shape(rows, Shape(batch, tables.bias.shape[0], tables.bias.shape[2]))
        borrowed = self._borrow(shape)
        if isinstance(borrowed, str):
            return self._run_plainly(borrowed, rows, tables)
        lanes, program = borrowed
        count = len(rows)
        given = pad_rows(rows, batch) if isinstance(rows, np.ndarray) else rows
        try:
            logits, features = program(given, tables)
        except BaseException:
            self._drop(lanes, program)  # whatever state it is in
            raise
        with self._changed:
            lanes.busy.remove(program)
            lanes.idle.append(program)
            self._replays += 1
            self._changed.notify_all()  # who waits for another shape would eat a single one
        return logits[:count], features[:count]

    def _shape(self, rows: Floats | DeviceRows, shape: Shape) -> Shape:
        """The shape whose program runs these rows: where they lie, or from its own memory."""
        if isinstance(rows, np.ndarray):
            return shape
        here, copied = (replace(shape, address=at) for at in (rows.address, COPIED))
        exact = len(rows) == shape.batch and not rows.address % ALIGNMENT
        with self._changed:
            known = [s for s in self._kept if s.address > 0 and replace(s, address=0) == shape]
            if exact and (here in known or len(known) < MOST_ADDRESSES):
                return here
            self._copies += 1
        return copied

    def _borrow(self, shape: Shape) -> tuple[_Lanes, Program] | str:
        """A program for one call, or the reason why there is none."""
        with self._changed:
            if (refusal := self._refused.get(shape)) and not refusal.is_to_be_tried_again():
                return refusal.reason
            lanes = self._lanes(shape)
            while not lanes.idle and lanes.made == lanes.most:
                self._changed.wait()
                if refusal := self._refused.get(shape):
                    return refusal.reason
            if lanes.idle:
                lanes.busy.append(lanes.idle.pop())
                return lanes, lanes.busy[-1]
            lanes.made += 1
        try:
            with _CAPTURING:
                program = self._capture(shape)
        except (MarnetError, RuntimeError, MemoryError) as error:
            return self._refuse(shape, lanes, str(error) or type(error).__name__)
        except BaseException:
            self._drop(lanes, None)
            with self._changed:
                self._refused.pop(shape, None)  # it was not this that was in its way
            raise
        with self._changed:
            self._captures += 1
            self._refused.pop(shape, None)
            lanes.busy.append(program)
        return lanes, program

    def _refuse(self, shape: Shape, lanes: _Lanes, reason: str) -> str:
        """Capture a shape no more for a while, or no more often than it was."""
        self._drop(lanes, None)
        with self._changed:
            lanes.most = lanes.made
            if not lanes.made:
                self._refused.setdefault(shape, _Refusal()).happened(reason)
                self._kept.pop(shape, None)
        return reason

    def _lanes(self, shape: Shape) -> _Lanes:
        """The lanes of a shape, which is now the one that was used last."""
        lanes = self._kept.setdefault(shape, _Lanes(self._most_lanes))
        self._kept.move_to_end(shape)
        while len(self._kept) > self._most_captures:
            self._kept.popitem(last=False)  # programs that run now go when they return
        return lanes

    def _drop(self, lanes: _Lanes, program: Program | None) -> None:
        """Forget a program of these lanes, or one that could not be made (None)."""
        with self._changed:
            lanes.made -= 1
            if program is not None:
                lanes.busy.remove(program)
            self._changed.notify_all()

    def _run_plainly(self, reason: str, rows: Floats | DeviceRows, tables: Tables) -> Answer:
        with self._changed:
            self._fallbacks[reason] = self._fallbacks.get(reason, 0) + 1
            is_new = reason not in self._warned
            self._warned.add(reason)
        if is_new:
            warnings.warn(
                f"runs without a captured graph, which is slower: {reason}",
                MarnetWarning,
                stacklevel=4,
            )
        return self._plain(rows, tables)


class Loops:
    """The ways in which captured programs run the reverse loop, and the sizes that each is for."""

    def __init__(self, sizes: str) -> None:
        """Start with nothing; `sizes` says what is counted, for example "batches of {}"."""
        self._words = sizes
        self._found: dict[str, set[int]] = {}

    def note(self, how: str, size: int) -> bool:
        """Note what runs it in a program, and tell whether nothing ran it so before."""
        is_new = how not in self._found
        self._found.setdefault(how, set()).add(size)
        return is_new

    def capture(
        self,
        size: int,
        kernel: Callable[[], tuple[Program, str]] | str,
        operators: Callable[[], Program],
    ) -> Program:
        """Capture a program with the persistent kernel in it where that runs, else with operators.

        Args:
            size: what is counted. kernel: captures a program, and says what runs the loop in it; or
                the reason why there is none. operators: captures one without.

        Raises:
            MarnetError, RuntimeError: it cannot be captured with operators either.
        """
        why = kernel
        if not isinstance(kernel, str):
            try:
                program, how = kernel()
                self.note(how, size)
                return program
            except (ImportError, MarnetError, ValueError, RuntimeError) as error:
                why = f"the persistent kernel cannot run: {one_line(error)}"
        program, how = operators(), f"operators in the captured graph, because {why}"
        if self.note(how, size) and not isinstance(kernel, str):
            warn_of_operators(how)
        return program

    def __str__(self) -> str:
        """All that runs it, in one line; empty where nothing is captured yet."""
        found = sorted(((sorted(sizes), how) for how, sizes in self._found.copy().items()))
        if len(found) < 2:
            return "".join(how for _, how in found)
        return "; ".join(
            f"{self._words.format(', '.join(map(str, sizes)))}: {how}" for sizes, how in found
        )


class HoldsTables:
    """Memory on the GPU for the loop's tables, which stay there until others are needed."""

    _held: Tables | None = None

    def hold(self, tables: Tables) -> None:
        """Enqueue the copies of tables, unless it is the very same object that is there."""
        if tables is self._held:
            return
        self._held = None  # should the copy fail
        self._copy(tables)
        self._held = tables

    def _copy(self, tables: Tables) -> None:
        raise NotImplementedError


def warn_of_operators(why: str) -> None:
    """Say that the reverse loop does not run as one kernel though it should."""
    warnings.warn(f"the reverse loop runs slower than it could: {why}", MarnetWarning, stacklevel=3)


class _Lanes:
    """The programs of one shape, at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.idle: list[Program] = []
        self.busy: list[Program] = []
        self.made = 0  # with those that are being captured


class _Refusal:
    """The reason why a shape could not be captured, and when it is tried again."""

    def __init__(self) -> None:
        self.reason, self.failures, self.runs = "", 0, 0

    def happened(self, reason: str) -> None:
        self.reason, self.failures, self.runs = reason, self.failures + 1, 0

    def is_to_be_tried_again(self) -> bool:
        """True once, after so many runs; asked before each."""
        self.runs += 1
        return self.failures <= len(RETRIES) and self.runs == RETRIES[self.failures - 1]


def _part(pixels: Floats | DeviceRows, rows: slice) -> Floats | DeviceRows:
    return cast("Floats | DeviceRows", pixels[rows])


def report(
    counts: Counts, *, device: str, loop: str, buckets: Sequence[int], memory: Mapping[str, int]
) -> RuntimeReport:
    """Make what a backend reports of itself, with the counts of its pipeline."""
    return RuntimeReport(device, loop, tuple(buckets), dict(memory), *counts)

"""The bookkeeping of captured programs: every row once and in order, whoever calls and whatever
fails."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_sdk.backends import RuntimeReport
from marnet_sdk.errors import InferenceError, InvalidInput
from marnet_sdk.gpu.captured import (
    ALIGNMENT,
    COPIED,
    CapturedPipeline,
    HoldsTables,
    Loops,
    Shape,
    join,
    pad_rows,
    report,
    split_batch,
)
from marnet_sdk.noise.tables import Floats, Tables

BATCHES = [(1, 1), (8, 8), (16, 16)]


def tables(steps: int = 3, samples: int = 1, rows: int = 1) -> Tables:
    bias = np.arange(samples, dtype=np.float32)[:, None]
    return Tables(
        np.zeros((steps, 3), np.float32), np.broadcast_to(bias, (steps, rows, samples, 1))
    )


def rows(count: int, start: int = 0) -> Floats:
    return np.arange(start, start + count, dtype=np.float32)[:, None]


def answer(pixels: Floats, table: Tables) -> tuple[Floats, Floats]:
    """Logits that say which row and sample they are of."""
    logits = 100 * pixels[:, None, :] + table.bias[0]
    return logits, np.repeat(logits, 2, axis=2)


class Program:
    """Answers for exactly the rows that it was captured for, one call at a time."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.busy, self.calls = shape, threading.Lock(), 0

    def __call__(self, pixels: Any, table: Tables) -> tuple[Floats, Floats]:
        assert self.busy.acquire(blocking=False), "two threads in one program"
        try:
            self.calls += 1
            values = pixels if isinstance(pixels, np.ndarray) else pixels.values
            assert len(values) == self.shape.batch or self.shape.address == COPIED
            assert table.bias.shape[::2] == (self.shape.steps, self.shape.samples)
            return answer(values, table)
        finally:
            self.busy.release()


class Capture:
    """Makes programs, and counts what is asked of it."""

    def __init__(self, refuse: Callable[[Shape], bool] = lambda shape: False) -> None:
        self.refuse, self.asked, self.alone = refuse, [], threading.Lock()

    def __call__(self, shape: Shape) -> Program:
        assert self.alone.acquire(blocking=False), "two threads capture"
        try:
            self.asked.append(shape)
            if self.refuse(shape):
                raise InferenceError(f"no graph of {shape.batch} rows")
            return Program(shape)
        finally:
            self.alone.release()


@dataclass(frozen=True)
class OnDevice:
    """Rows on a GPU that is not there."""

    values: Floats
    address: int = 4 * ALIGNMENT

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> OnDevice:
        return OnDevice(self.values[part], self.address + ALIGNMENT * (part.start or 0))


# --- splitting and padding


@pytest.mark.parametrize(
    ("count", "batches", "expected"),
    [
        (1, BATCHES, [(0, 1, 0, 1)]),
        (2, BATCHES, [(0, 2, 1, 8)]),
        (8, BATCHES, [(0, 8, 1, 8)]),
        (9, BATCHES, [(0, 9, 2, 16)]),
        (17, BATCHES, [(0, 16, 2, 16), (16, 17, 0, 1)]),
        (40, BATCHES, [(0, 16, 2, 16), (16, 32, 2, 16), (32, 40, 1, 8)]),
        (9, BATCHES[::-1], [(0, 9, 0, 16)]),  # in whatever order they were built
        (3, [(1, 64)], [(0, 3, 0, 3)]),
        (70, [(1, 64)], [(0, 64, 0, 64), (64, 70, 0, 6)]),
        (1, [(4, 4)], [(0, 1, 0, 4)]),
    ],
)
def test_a_batch_takes_the_smallest_bucket_that_holds_it(count, batches, expected):
    pieces = split_batch(count, batches)
    assert [(p.rows.start, p.rows.stop, p.profile, p.batch) for p in pieces] == expected


def test_padding_repeats_the_last_row():
    padded = pad_rows(np.arange(6, dtype=np.float32).reshape(3, 2), 5)
    np.testing.assert_array_equal(padded, np.array([[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]))
    assert pad_rows(padded, 5) is padded


def test_parts_are_joined_along_the_axis_that_was_split():
    whole = answer(rows(4), tables(samples=3))
    for axis, parts in {0: (slice(0, 1), slice(1, 4)), 1: (slice(0, 2), slice(2, 3))}.items():
        index = [(slice(None),) * axis + (part,) for part in parts]
        found = join([(whole[0][i], whole[1][i]) for i in index], axis)
        for one, other in zip(found, whole, strict=True):
            np.testing.assert_array_equal(one, other)


buckets = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), buckets, st.integers(1, 3))
def test_every_row_is_answered_once_and_in_order(counts, sizes, samples):
    """Whatever the batches and the buckets, and with one capture for each shape that was met."""
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, sizes)
    for count in counts:
        table = tables(samples=samples)
        got = pipeline(rows(count), table)
        for one, other in zip(got, answer(rows(count), table), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(set(capture.asked)) == len(capture.asked) == pipeline.report().captures
    assert {shape.batch for shape in capture.asked} <= set(sizes)


@given(st.integers(1, 100), buckets, st.sets(st.integers(1, 40)))
def test_pieces_that_cannot_be_captured_are_answered_in_their_place(count, sizes, refused):
    pipeline = CapturedPipeline(Capture(lambda shape: shape.batch in refused), answer, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = pipeline(rows(count), tables())
    np.testing.assert_array_equal(got[0], answer(rows(count), tables())[0])


@given(st.integers(1, 100), buckets)
def test_no_piece_is_larger_than_it_must_be(count, sizes):
    pieces = split_batch(count, [(size, size) for size in sizes])
    for piece in pieces:
        size = piece.rows.stop - piece.rows.start
        assert piece.batch == min(b for b in sizes if b >= size)
    assert len(pieces) == -(-count // max(sizes))


def _never(*_: Any) -> Any:
    raise AssertionError("a captured program was there to be used")


# --- what is captured, kept and dropped


def test_a_shape_is_captured_once_and_then_replayed():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [2])
    for _ in range(5):
        pipeline(rows(2), tables())
    assert capture.asked == [Shape(2, 3, 1)]
    assert pipeline.report() == (1, 5, {}, 0)


def test_steps_and_samples_are_shapes_of_their_own():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [4])
    for steps, samples in [(3, 1), (4, 1), (3, 2), (3, 1)]:
        pipeline(rows(1), tables(steps, samples))
    assert capture.asked == [Shape(4, 3, 1), Shape(4, 4, 1), Shape(4, 3, 2)]


def test_the_shapes_that_were_not_used_for_longest_are_dropped():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [1], most_captures=2)
    for steps in (2, 3, 2, 4, 2, 3):  # 4 drops 3, and then 3 drops 4
        pipeline(rows(1), tables(steps))
    assert [shape.steps for shape in capture.asked] == [2, 3, 4, 3]


def test_a_program_that_is_dropped_is_gone():
    made: list[weakref.ref] = []

    def capture(shape: Shape) -> Program:
        program = Program(shape)
        made.append(weakref.ref(program))
        return program

    pipeline = CapturedPipeline(capture, _never, [1], most_captures=1)
    pipeline(rows(1), tables(2))
    assert [ref() for ref in made] == pipeline.programs()
    pipeline(rows(1), tables(3))
    gc.collect()
    assert made[0]() is None
    assert [made[1]()] == pipeline.programs()


def test_an_empty_batch_is_refused():
    with pytest.raises(InvalidInput, match="a batch of no images; give at least one"):
        CapturedPipeline(Capture(), answer, [1])(rows(0), tables())


# --- what cannot be captured


def test_what_cannot_be_captured_is_run_plainly_counted_and_warned_of_once():
    capture = Capture(lambda shape: True)
    pipeline = CapturedPipeline(capture, answer, [2, 4])
    expected = r"runs without a captured graph, which is slower: no graph of {} rows"
    with pytest.warns(RuntimeWarning, match=expected.format(2)):
        got = pipeline(rows(2), tables())
    np.testing.assert_array_equal(got[0], answer(rows(2), tables())[0])
    pipeline(rows(2), tables())  # a second warning would be an error
    with pytest.warns(RuntimeWarning, match=expected.format(4)):
        pipeline(rows(4), tables())
    assert capture.asked == [Shape(2, 3, 1), Shape(4, 3, 1)]
    assert pipeline.report() == (0, 0, {"no graph of 2 rows": 2, "no graph of 4 rows": 1}, 0)


@pytest.mark.parametrize("error", [RuntimeError("out of registers"), MemoryError()])
def test_other_libraries_errors_say_that_too(error):
    def capture(shape: Shape) -> Program:
        raise error

    pipeline = CapturedPipeline(capture, answer, [1])
    reason = str(error) or "MemoryError"
    with pytest.warns(RuntimeWarning, match=reason):
        pipeline(rows(1), tables())
    assert pipeline.report().fallbacks == {reason: 1}


def test_a_bug_in_a_capture_is_not_taken_for_a_reason():
    def capture(shape: Shape) -> Program:
        raise TypeError("a bug")

    pipeline = CapturedPipeline(capture, _never, [1])
    for _ in range(2):  # and no program is waited for that never comes
        with pytest.raises(TypeError, match="a bug"):
            pipeline(rows(1), tables())


def test_a_refused_shape_gives_its_place_back():
    capture = Capture(lambda shape: shape.steps > 2)
    pipeline = CapturedPipeline(capture, answer, [1], most_captures=1)
    pipeline(rows(1), tables(2))
    with pytest.warns(RuntimeWarning, match="no graph of 1 rows"):
        pipeline(rows(1), tables(3))
    pipeline(rows(1), tables(2))
    pipeline(rows(1), tables(3))
    pipeline(rows(1), tables(2))
    # 3 took the one place while it was tried, and not when it was met again.
    assert [shape.steps for shape in capture.asked] == [2, 3, 2]


@pytest.mark.filterwarnings("ignore:runs without a captured graph")
def test_a_capture_that_failed_is_tried_again_twice():
    capture = Capture(lambda shape: True)
    pipeline = CapturedPipeline(capture, answer, [1])
    for calls, asked in ((16, 1), (1, 2), (255, 2), (1, 3), (1000, 3)):
        for _ in range(calls):
            pipeline(rows(1), tables())
        assert len(capture.asked) == asked
    assert sum(pipeline.report().fallbacks.values()) == 1273


@pytest.mark.filterwarnings("ignore:runs without a captured graph")
def test_a_shape_is_replayed_once_what_was_in_its_way_is_gone():
    full = True
    pipeline = CapturedPipeline(Capture(lambda shape: full), answer, [1])
    pipeline(rows(1), tables())
    full = False
    for _ in range(20):
        got = pipeline(rows(1), tables())
        np.testing.assert_array_equal(got[0], answer(rows(1), tables())[0])
    assert pipeline.report() == (1, 5, {"no graph of 1 rows": 16}, 0)


def test_noise_of_an_image_s_own_is_run_plainly():
    pipeline = CapturedPipeline(Capture(), answer, [2])
    with pytest.warns(RuntimeWarning, match="each image has noise of its own"):
        got = pipeline(rows(2), tables(rows=2))
    np.testing.assert_array_equal(got[0], answer(rows(2), tables(rows=2))[0])


def test_a_program_that_fails_is_not_used_again():
    class Failing(Program):
        def __call__(self, pixels: Any, table: Tables) -> Any:
            raise InferenceError("the GPU is lost")

    asked: list[Shape] = []

    def capture(shape: Shape) -> Program:
        asked.append(shape)
        return Failing(shape) if len(asked) == 1 else Program(shape)

    pipeline = CapturedPipeline(capture, _never, [1], most_lanes=1)
    with pytest.raises(InferenceError, match="the GPU is lost"):
        pipeline(rows(1), tables())
    pipeline(rows(1), tables())
    assert pipeline.report() == (2, 1, {}, 0)
    assert len(pipeline.programs()) == 1


# --- many callers


class Meeting(Program):
    """A program that waits until as many of its kind run as were told to."""

    met: threading.Barrier

    def __call__(self, pixels: Any, table: Tables) -> tuple[Floats, Floats]:
        self.met.wait(timeout=30)
        return super().__call__(pixels, table)


def test_workers_that_call_at_once_run_at_once(monkeypatch):
    monkeypatch.setattr(Meeting, "met", threading.Barrier(2), raising=False)
    pipeline = CapturedPipeline(Meeting, _never, [1], most_lanes=2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: pipeline(rows(1, i), tables())[0], range(2)))
    assert [int(logits.item()) for logits in found] == [0, 100]
    assert pipeline.report().captures == 2


def test_no_more_programs_than_lanes_however_many_workers_call():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [1, 4, 8], most_captures=99, most_lanes=2)
    inputs = [(rows(1 + i % 17, i), tables(2 + i % 3, 1 + i % 2)) for i in range(400)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda call: pipeline(*call), inputs))
    for got, call in zip(found, inputs, strict=True):
        np.testing.assert_array_equal(got[0], answer(*call)[0])
    assert max(capture.asked.count(shape) for shape in capture.asked) <= 2
    assert len(pipeline.programs()) == len(capture.asked) == pipeline.report().captures


def test_workers_survive_that_what_they_wait_for_is_dropped():
    """Shapes come and go, captures fail and programs are handed on, and no thread is stuck."""
    capture = Capture(lambda shape: shape.steps == 5)
    pipeline = CapturedPipeline(capture, answer, [1, 2], most_captures=2, most_lanes=1)
    inputs = [(rows(1 + i % 5, i), tables(2 + i % 5)) for i in range(300)]
    with warnings.catch_warnings(), ThreadPoolExecutor(12) as pool:
        warnings.simplefilter("ignore", RuntimeWarning)
        found = list(pool.map(lambda call: pipeline(*call), inputs))
    for got, call in zip(found, inputs, strict=True):
        np.testing.assert_array_equal(got[0], answer(*call)[0])


def test_a_second_lane_that_cannot_be_captured_leaves_the_first_in_use(monkeypatch):
    """Its call is answered plainly and counted; later ones wait for the first."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Program):
        def __call__(self, pixels: Any, table: Tables) -> tuple[Floats, Floats]:
            inside.set()
            assert go_on.wait(timeout=30)
            return super().__call__(pixels, table)

    made: list[Shape] = []

    def capture(shape: Shape) -> Program:
        made.append(shape)
        if len(made) > 1:
            raise InferenceError("no memory for a second one")
        return Slow(shape)

    pipeline = CapturedPipeline(capture, answer, [1], most_lanes=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(pipeline, rows(1), tables())
        assert inside.wait(timeout=30)
        with pytest.warns(RuntimeWarning, match="no memory for a second one"):
            second = pipeline(rows(1, 1), tables())
        go_on.set()
        np.testing.assert_array_equal(first.result(30)[0], answer(rows(1), tables())[0])
    np.testing.assert_array_equal(second[0], answer(rows(1, 1), tables())[0])
    pipeline(rows(1), tables())
    assert pipeline.report() == (1, 2, {"no memory for a second one": 1}, 0)


# --- arrays on the device


def test_an_array_on_the_device_is_read_in_place():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [1, 4])
    given = OnDevice(rows(4))
    for _ in range(2):
        got = pipeline(given, tables())
        np.testing.assert_array_equal(got[0], answer(rows(4), tables())[0])
    assert capture.asked == [Shape(4, 3, 1, given.address)]
    assert pipeline.report() == (1, 2, {}, 0)


@pytest.mark.parametrize("given", [OnDevice(rows(3)), OnDevice(rows(4), 4 * ALIGNMENT + 64)])
def test_rows_that_do_not_fill_a_bucket_or_are_not_aligned_are_copied(given):
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [4])
    got = pipeline(given, tables())
    np.testing.assert_array_equal(got[0], answer(given.values, tables())[0])
    assert capture.asked == [Shape(4, 3, 1, COPIED)]
    assert pipeline.report().copies == 1


def test_four_addresses_of_a_shape_are_captured_and_more_are_copied():
    capture = Capture()
    pipeline = CapturedPipeline(capture, _never, [2])
    arrays = [OnDevice(rows(2, i), ALIGNMENT * (i + 1)) for i in range(6)]
    for _ in range(3):
        for array in arrays:
            got = pipeline(array, tables())
            np.testing.assert_array_equal(got[0], answer(array.values, tables())[0])
    shape = Shape(2, 3, 1)
    addresses = [*(array.address for array in arrays[:4]), COPIED]
    assert capture.asked == [replace(shape, address=address) for address in addresses]
    assert pipeline.report() == (5, 18, {}, 6)


def test_a_report_holds_what_the_pipeline_counted():
    pipeline = CapturedPipeline(Capture(), answer, [4, 1])
    pipeline(rows(1), tables())
    memory = {"buffers": 7}
    found = report(
        pipeline.report(), device="a GPU", loop="a", buckets=pipeline.buckets, memory=memory
    )
    assert found == RuntimeReport("a GPU", "a", (1, 4), {"buffers": 7}, 1, 1, {}, 0)


def test_what_runs_the_loop_is_one_line_with_the_sizes_where_there_are_several():
    loops = Loops("at {} rows")
    assert str(loops) == ""
    assert loops.note("kernel", 16)
    assert str(loops) == "kernel"
    assert loops.note("operators, because", 128)
    assert not loops.note("kernel", 8)
    assert str(loops) == "at 8, 16 rows: kernel; at 128 rows: operators, because"


def test_tables_are_copied_where_they_are_others_and_again_after_a_copy_that_failed():
    class Memory(HoldsTables):
        def __init__(self) -> None:
            self.copied: list[Tables] = []
            self.fails = False

        def _copy(self, tables: Tables) -> None:
            self.copied.append(tables)
            if self.fails:
                raise RuntimeError("a copy")

    memory, one, other = Memory(), tables(), tables()
    for these in (one, one, other):
        memory.hold(these)
    memory.fails = True
    with pytest.raises(RuntimeError, match="a copy"):
        memory.hold(one)
    memory.fails = False
    memory.hold(other)  # what lay there may be half overwritten
    assert [next(n for n, t in enumerate((one, other)) if t is c) for c in memory.copied] == [
        0, 1, 0, 1,
    ]  # fmt: skip

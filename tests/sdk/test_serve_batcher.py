"""The threads of the batcher around a model that does nothing, or what the test wants."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from waiting import until

from marnet_sdk.errors import ClassifierClosed, DeadlineExceeded, InferenceError, QueueFull
from marnet_sdk.serve.batcher import Batcher
from marnet_sdk.serve.policy import Batching

SECONDS = 60  # after which a test that waits has failed
KIND = ("kind",)


class Model:
    """Doubles numbers, one batch at a time, and only while `open` is set."""

    def __init__(self) -> None:
        self.open, self.began = threading.Event(), threading.Semaphore(0)
        self.open.set()
        self.batches: list[list[int]] = []
        self.now = 0.0

    def prepare(self, image: Any) -> int:
        if not isinstance(image, int):
            raise ValueError(f"{image} is no number")
        return image

    def run(self, kind: Any, rows: Sequence[int], asks: Sequence[Any]) -> list[Any]:
        self.batches.append(list(rows))
        self.began.release()
        assert self.open.wait(SECONDS)
        if -1 in rows:
            raise RuntimeError("the device is gone")
        if -2 in rows:
            raise SystemExit(3)
        return [(kind, 2 * row, ask) for row, ask in zip(rows, asks, strict=True)]

    def busy(self, batcher: Batcher) -> Future[Any]:
        """Close it while it has a batch of one, so that what follows waits in the queue."""
        while self.began.acquire(blocking=False):
            pass
        self.open.clear()
        future = batcher.submit(0, None, ("first",))
        assert self.began.acquire(timeout=SECONDS)
        return future


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def made(model: Model) -> Iterator[Callable[..., Batcher]]:
    """Knobs -> a batcher with that model, closed at the end."""
    before, batchers = ours(), []

    def make(clock: Callable[[], float] | None = None, **knobs: Any) -> Batcher:
        given: dict[str, Any] = {} if clock is None else {"clock": clock}
        batchers.append(Batcher(model.prepare, model.run, Batching(**knobs), **given))
        return batchers[-1]

    yield make
    model.open.set()
    for batcher in batchers:
        batcher.close()
    assert ours() <= before


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("marnet-")}


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result(SECONDS) for future in futures]


def test_a_lone_request_is_answered_at_once_and_the_threads_start_with_it(made):
    before, batcher = ours(), made(decoders=2, max_delay=1000)
    assert ours() <= before
    assert batcher.stats().accepted == 0
    for number in range(3):
        assert batcher.submit(number, "ask", KIND).result(SECONDS) == ("kind", 2 * number, "ask")
    started = sorted(thread.name for thread in ours() - before)
    assert started == ["marnet-batches", "marnet-decoder-0", "marnet-decoder-1"]


def test_what_waits_while_the_model_is_busy_goes_through_it_together(made, model):
    batcher = made()
    first = model.busy(batcher)
    futures = [batcher.submit(number, None, KIND) for number in range(1, 5)]
    until(lambda: batcher.stats().ready >= 4)
    model.open.set()
    assert results([first, *futures]) == [
        ("first", 0, None),
        *[("kind", 2 * number, None) for number in range(1, 5)],
    ]
    assert model.batches == [[0], [1, 2, 3, 4]]
    stats = batcher.stats()
    assert (stats.accepted, stats.answered) == (5, 5)
    assert stats.images == {"first": 1, "kind": 4}
    assert stats.sizes == {1: 1, 4: 1}
    assert sum(stats.batches.values()) == 2
    assert stats.learned["first"].medians.keys() == {1}


def test_kinds_and_priorities_make_the_batches(made, model):
    batcher = made()
    first = model.busy(batcher)
    asked = [(1, "a", 0), (2, "b", 0), (3, "a", 0), (4, "b", 5)]
    futures = [batcher.submit(n, None, (kind,), priority=p) for n, kind, p in asked]
    until(lambda: batcher.stats().ready >= 4)
    model.open.set()
    results([first, *futures])
    assert model.batches == [[0], [4, 2], [1, 3]]


def test_a_cancelled_request_is_skipped(made, model):
    batcher = made()
    first = model.busy(batcher)
    futures = [batcher.submit(number, None, KIND) for number in (1, 2, 3)]
    assert futures[1].cancel()
    until(lambda: batcher.stats().ready + batcher.stats().cancelled >= 3)
    model.open.set()
    results([first, futures[0], futures[2]])
    with pytest.raises(CancelledError):
        futures[1].result(SECONDS)
    assert model.batches == [[0], [1, 3]]
    assert not futures[0].cancel()
    assert batcher.stats().cancelled == 1


def test_who_waits_for_a_cancelled_request_is_told_wherever_it_was(made, model):
    batcher = made(decoders=1, max_batch=1)
    first = model.busy(batcher)
    futures = [batcher.submit(number, None, KIND) for number in range(1, 5)]
    until(lambda: batcher.stats().ready >= 2)  # the other two are not decoded yet
    assert all(future.cancel() for future in futures)
    model.open.set()
    assert wait(futures, SECONDS).done == set(futures)
    results([first])
    until(lambda: batcher.stats().cancelled >= 4)


def test_the_queue_is_bounded(made, model):
    batcher = made(max_queue=2)
    futures = [model.busy(batcher), *[batcher.submit(n, None, KIND) for n in (1, 2)]]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        batcher.submit(3, None, KIND)
    model.open.set()
    results(futures)
    assert batcher.submit(4, None, KIND).result(SECONDS) == ("kind", 8, None)
    assert batcher.stats().refused == {"queue full": 1}


def test_a_deadline_that_passes_in_the_queue_costs_no_run(made, model):
    batcher = made(clock=lambda: model.now)
    first = model.busy(batcher)
    late, timely = (batcher.submit(n, None, KIND, deadline=d) for n, d in ((1, 1.0), (2, 3.0)))
    model.now = 2.0
    model.open.set()
    message = "the deadline, 1 s after the request, passed while it waited for the model"
    with pytest.raises(DeadlineExceeded, match=message):
        late.result(SECONDS)
    assert timely.result(SECONDS) == ("kind", 4, None)
    assert first.result(SECONDS)
    assert not any(1 in batch for batch in model.batches)
    with pytest.raises(DeadlineExceeded, match=r"got a deadline 0 s .*the deadline has passed"):
        batcher.submit(3, None, KIND, deadline=0)
    stats = batcher.stats()
    assert (stats.expired, stats.refused) == (1, {"deadline": 1})


def test_an_image_that_cannot_be_prepared_fails_alone(made, model):
    batcher = made()
    first = model.busy(batcher)
    futures = [batcher.submit(image, None, KIND) for image in (1, "two", 3)]
    with pytest.raises(ValueError, match="two is no number"):
        futures[1].result(SECONDS)
    model.open.set()
    results([first, futures[0], futures[2]])
    assert batcher.stats().failed == 1


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (-1, RuntimeError, "the device is gone"),
        (-2, InferenceError, r"the thread that answers was ended by SystemExit\(3\); send it aga"),
    ],
)
def test_a_run_that_fails_fails_its_batch_with_the_cause_and_the_next_one_works(
    made, model, number, error, message
):
    batcher = made()
    first = model.busy(batcher)
    futures = [batcher.submit(n, None, KIND) for n in (1, number, 3)]
    until(lambda: batcher.stats().ready >= 3)
    model.open.set()
    for future in futures:
        with pytest.raises(error, match=message):
            future.result(SECONDS)
    assert first.result(SECONDS)
    assert batcher.submit(5, None, KIND).result(SECONDS) == ("kind", 10, None)
    assert batcher.stats().failed == 3


def test_a_callback_that_raises_loses_no_other_answer(made, model, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    batcher = made()
    first = model.busy(batcher)
    futures = [batcher.submit(n, None, KIND) for n in (1, 2)]

    def end(future: Future[Any]) -> None:
        raise SystemExit

    futures[0].add_done_callback(end)
    model.open.set()
    results([first, *futures])
    assert batcher.submit(5, None, KIND).result(SECONDS)
    assert [args.exc_type for args in reported] == [SystemExit]


def test_a_thread_that_is_struck_down_fails_what_waits_and_goes_on(made, model, monkeypatch):
    """The bookkeeping itself fails, as it does for a lack of memory."""
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    batcher = made()
    batcher.submit(0, None, KIND).result(SECONDS)
    queue, errors = batcher._threads._queue, iter([MemoryError("no memory")])
    really = queue.begin

    def begin(*arguments: Any) -> None:
        for error in errors:
            raise error
        really(*arguments)

    monkeypatch.setattr(queue, "begin", begin)
    with pytest.raises(MemoryError, match="no memory"):
        batcher.submit(1, None, KIND).result(SECONDS)
    assert batcher.submit(2, None, KIND).result(SECONDS) == ("kind", 4, None)
    assert [args.exc_type for args in reported] == [MemoryError]


def test_a_decoder_that_is_struck_down_loses_no_request_and_does_not_keep_it_from_closing(
    made, model, monkeypatch
):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    batcher = made(decoders=1)
    batcher.submit(0, None, KIND).result(SECONDS)
    queue, errors = batcher._threads._queue, iter([MemoryError("no memory")])
    really = queue.decoded

    def decoded(*arguments: Any, **more: Any) -> None:
        for error in errors:
            raise error
        really(*arguments, **more)

    monkeypatch.setattr(queue, "decoded", decoded)
    with pytest.raises(MemoryError, match="no memory"):
        batcher.submit(1, None, KIND).result(SECONDS)
    assert batcher.submit(2, None, KIND).result(SECONDS) == ("kind", 4, None)
    assert [args.exc_type for args in reported] == [MemoryError]
    stats = batcher.stats()
    assert (stats.decoding, stats.failed, stats.answered) == (0, 1, 2)
    batcher.close()


def test_where_the_system_gives_no_more_threads_none_is_left_and_the_next_request_may_work(
    made, monkeypatch
):
    before, batcher, start, started = ours(), made(decoders=3), threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        batcher.submit(1, None, KIND)
    monkeypatch.undo()
    assert ours() <= before
    assert batcher.submit(2, None, KIND).result(SECONDS) == ("kind", 4, None)


# --- the end


def test_closing_answers_what_was_accepted_and_refuses_the_rest(made, model):
    before, batcher = ours(), made(max_batch=2)
    futures = [model.busy(batcher), *[batcher.submit(n, None, KIND) for n in range(1, 20)]]
    with ThreadPoolExecutor(2) as pool:
        closing = [pool.submit(batcher.close) for _ in range(2)]
        until(lambda: batcher._threads._queue.closing)
        with pytest.raises(ClassifierClosed, match="this Classifier is closed; open its bundle"):
            batcher.submit(99, None, KIND)
        assert not wait(closing, timeout=0).done
        model.open.set()
        results(closing)
    assert [answer[1] for answer in results(futures)] == [2 * n for n in range(20)]
    assert ours() <= before
    batcher.close()


def test_a_batcher_that_was_never_used_closes_too(made):
    batcher = made()
    batcher.close()
    with pytest.raises(ClassifierClosed):
        batcher.submit(1, None, KIND)


def test_closing_inside_of_a_callback_does_not_wait_for_itself(made, model):
    batcher = made()
    first, closed = model.busy(batcher), threading.Event()
    others = [batcher.submit(n, None, KIND) for n in (1, 2, 3)]

    def close(_: Future[Any]) -> None:
        batcher.close()
        closed.set()

    first.add_done_callback(close)
    model.open.set()
    assert closed.wait(SECONDS)
    assert len(results(others)) == 3


class Owner:
    """Something that has a batcher and is kept by its requests, as a classifier is."""

    def __init__(self, model: Model) -> None:
        self.batcher = Batcher(model.prepare, model.run, Batching(decoders=2))

    def submit(self, number: Any) -> Future[Any]:
        return self.batcher.submit(number, None, KIND, keeps=self)


def test_threads_end_with_the_last_reference_and_a_request_is_one(model):
    before = ours()
    gc.disable()
    try:
        owner = Owner(model)
        assert owner.submit(1).result(SECONDS)
        held = [weakref.ref(x) for x in (owner, owner.batcher, owner.batcher._threads)]
        for bad, error in (("two", ValueError), (-1, RuntimeError), (-2, InferenceError)):
            with pytest.raises(error):
                owner.submit(bad).result(SECONDS)
        model.busy(owner.batcher)
        last = owner.submit(3)
        del owner
        assert held[0]() is not None
        model.open.set()
        assert last.result(SECONDS) == ("kind", 6, None)
        for thread in ours() - before:  # they end by themselves now
            thread.join(SECONDS)
        assert [reference() for reference in held] == [None] * 3
        assert ours() <= before
    finally:
        gc.enable()


def test_nothing_is_left_when_the_last_reference_goes_while_nothing_waits(model):
    before, owner = ours(), Owner(model)
    assert owner.submit(1).result(SECONDS)
    del owner
    assert ours() <= before


# --- many threads


def test_64_threads_get_their_own_answers(made):
    batcher = made(max_batch=16)

    def work(start: int) -> list[bool]:
        numbers = range(start * 50, start * 50 + 50)
        return [batcher.submit(n, n, ("k",)).result(SECONDS) == ("k", 2 * n, n) for n in numbers]

    with ThreadPoolExecutor(64) as pool:
        assert all(all(right) for right in pool.map(work, range(64)))
    stats = batcher.stats()
    assert (stats.accepted, stats.answered, stats.failed) == (3200, 3200, 0)
    assert len(batcher._threads._queue) == 0

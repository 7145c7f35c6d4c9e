"""Every order of events in the queue, against a model that knows where each request is."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from marnet_sdk.errors import DeadlineExceeded, QueueFull
from marnet_sdk.serve.policy import Batching, Waiting
from marnet_sdk.serve.queue import Queue

A = ("a",)
KNOBS = Batching(max_batch=2, max_delay=0.5, max_queue=7)


@dataclass(eq=False, slots=True)
class Asked(Waiting):
    """A request of a caller who may change their mind."""

    gone: bool = False

    @property
    def cancelled(self) -> bool:
        return self.gone


class Events(RuleBasedStateMachine):
    """Callers, decoders and a model, in any order. Each request is in one place of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue[Asked] = Queue(KNOBS)
        self.now = 0.0
        self.place: dict[Asked, str] = {}
        self.running: tuple[Asked, ...] = ()
        self.kind: Hashable = None
        self.idle = 0.0  # since when the model is idle
        self.asked = 0

    def at(self, *places: str) -> list[Asked]:
        found = [request for request, place in self.place.items() if place in places]
        return sorted(found, key=lambda request: request.order)

    def move(self, requests, place: str, *, was: str) -> None:
        for request in requests:
            assert self.place[request] == was
            self.place[request] = place

    def sort_out(self) -> None:
        """Take out what was cancelled or expired, wherever it waited."""
        for request in self.queue.take_dropped():
            assert request.gone or request.deadline <= self.now
            assert self.place[request] in ("waiting", "ready")
            self.place[request] = "cancelled" if request.gone else "expired"

    @rule(
        priority=st.integers(0, 2),
        seconds=st.sampled_from([math.inf, math.inf, -0.1, 0.0, 0.2, 1.0, 3.0]),
        kinds=st.sampled_from([A, A, ("b",), ("a", "c")]),
    )
    def submit(self, priority: int, seconds: float, kinds: tuple[str, ...]) -> None:
        request = Asked(self.asked, priority, self.now + seconds, kinds)
        self.asked += 1
        idle = not len(self.queue) and not self.running
        try:
            self.queue.accept(request, self.now)
        except QueueFull:
            here = [r for r in self.at("waiting", "ready") if r.deadline > self.now and not r.gone]
            assert len(here) + len(self.at("decoding")) == KNOBS.max_queue
        except DeadlineExceeded:
            assert not idle or seconds <= 0
        else:
            assert seconds > 0
            self.place[request] = "waiting"
        self.sort_out()

    @rule()
    def begin_to_decode(self) -> None:
        request = self.queue.next_to_decode(self.now)
        self.sort_out()
        if request is None:
            ahead = 2 * KNOBS.max_batch
            assert len(self.at("ready", "decoding")) >= ahead or not self.at("waiting")
            return
        assert request.deadline > self.now
        assert not [r for r in self.at("waiting") if r.order < request.order]
        self.move([request], "decoding", was="waiting")

    @rule(usable=st.sampled_from([True, True, True, False]), data=st.data())
    @precondition(lambda self: self.at("decoding"))
    def end_to_decode(self, usable: bool, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.at("decoding")))
        self.queue.decoded(request, self.now, usable=usable)
        self.move([request], "ready" if usable else "failed", was="decoding")

    @rule(data=st.data())
    @precondition(lambda self: self.at("waiting", "decoding", "ready"))
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.at("waiting", "decoding", "ready"))).gone = True

    @rule()
    @precondition(lambda self: not self.running)
    def look(self) -> None:
        ready = self.at("ready")
        decision = self.queue.look(self.now)
        self.sort_out()
        left = self.at("ready")
        if not decision.release:
            assert self.now < decision.again or not left
            # Idle, it lets nobody wait for longer than the delay.
            longest = [max(r.ready, self.idle) + KNOBS.max_delay for r in left]
            assert all(decision.again <= at for at in longest)
            return
        batch = list(decision.release)
        assert len(batch) <= KNOBS.max_batch
        assert all(request.deadline > self.now for request in batch)
        live = [request for request in ready if request.deadline > self.now]
        alike = [request for request in live if request.kinds == live[0].kinds]
        assert decision.kind in live[0].kinds
        assert batch == alike[: len(batch)]  # by priority, and first come, first served
        cancelled = [request for request in batch if request.gone]
        self.queue.cancelled(len(cancelled))
        self.move(cancelled, "cancelled", was="ready")
        if run := [request for request in batch if not request.gone]:
            assert decision.reason is not None
            self.queue.begin(run, decision.kind, decision.reason, self.now)
            self.kind = decision.kind
            self.move(run, "running", was="ready")
        self.running = tuple(run)

    @rule(fails=st.booleans(), per_image=st.sampled_from([0.01, 1.0]))
    @precondition(lambda self: self.running)
    def finish(self, fails: bool, per_image: float) -> None:
        seconds = 0.3 + per_image * len(self.running)
        self.now += seconds
        failed = len(self.running) if fails else 0
        self.queue.end(self.running, self.kind, seconds, self.now, failed=failed)
        self.move(self.running, "failed" if fails else "answered", was="running")
        self.running, self.idle = (), self.now

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_bound_holds(self) -> None:
        assert len(self.queue) <= KNOBS.max_queue

    @invariant()
    def counts_are_true(self) -> None:
        stats = self.queue.stats(self.now)
        assert stats.accepted == len(self.place)
        for name in ("answered", "failed", "expired", "cancelled"):
            assert getattr(stats, name) == len(self.at(name)), name
        assert (stats.decoding, stats.running) == (len(self.at("decoding")), len(self.running))
        ended = stats.answered + stats.failed + stats.expired + stats.cancelled
        inside = stats.waiting + stats.decoding + stats.ready + stats.running
        assert ended + inside == stats.accepted

    def teardown(self) -> None:
        """Closing answers or fails each request that was accepted."""
        self.queue.closing = True
        for _ in range(len(self.place) + 1):
            if self.running:
                self.finish(False, 0.01)
            for _ in self.at("waiting"):
                self.begin_to_decode()
            for request in self.at("decoding"):
                self.queue.decoded(request, self.now, usable=True)
                self.move([request], "ready", was="decoding")
            self.look()
        assert self.queue.done
        assert self.at("waiting", "decoding", "ready", "running") == []


TestEvents = Events.TestCase


def test_a_cancelled_or_expired_request_makes_room():
    queue: Queue[Asked] = Queue(Batching(max_queue=2))
    first, second = Asked(0, 0, math.inf, A), Asked(1, 0, 1.0, A)
    for request in (first, second):
        queue.accept(request, 0.0)
    with pytest.raises(
        QueueFull, match=r"2 requests wait already, .*max_queue=2\).* try again lat"
    ):
        queue.accept(Asked(2, 0, math.inf, A), 0.5)
    first.gone = True
    queue.accept(Asked(3, 0, math.inf, A), 0.5)
    queue.accept(Asked(4, 0, math.inf, A), 1.0)
    assert list(queue.take_dropped()) == [first, second]
    stats = queue.stats(2.0)
    assert (stats.waiting, stats.cancelled, stats.expired, stats.oldest) == (2, 1, 1, 1.5)
    assert stats.refused == {"queue full": 1}


def taught(queue: Queue[Asked], seconds: float) -> None:
    """Let the model answer a batch of one and of two."""
    for count in (1, 2):
        batch = [Asked(1000 + i, 0, math.inf, A) for i in range(count)]
        queue.begin(batch, "a", "unknown", 0.0)
        queue.end(batch, "a", seconds * count, 0.0, failed=0)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_one_that_can_is_not():
    queue: Queue[Asked] = Queue(Batching())
    taught(queue, 1.0)
    queue.accept(Asked(0, 0, 0.5, A), 0.0)  # idle: it may have become faster
    for number in (1, 2):
        queue.accept(Asked(number, 0, math.inf, A), 0.0)
    message = r"got a deadline 3\.9 s from now, but an answer takes about 4 s; allow more time"
    with pytest.raises(DeadlineExceeded, match=message) as caught:
        queue.accept(Asked(3, 0, 3.9, A), 0.0)
    assert (caught.value.deadline, caught.value.expected) == pytest.approx((3.9, 4.0))
    queue.accept(Asked(4, 1, 1.5, A), 0.0)  # goes before the others
    queue.accept(Asked(5, 0, 5.5, A), 0.0)
    assert queue.stats(0.0).refused == {"deadline": 1}


def test_a_full_queue_says_when_it_should_have_room():
    queue: Queue[Asked] = Queue(Batching(max_queue=3))
    taught(queue, 0.5)
    for number in range(3):
        queue.accept(Asked(number, 0, math.inf, A), 0.0)
    with pytest.raises(QueueFull, match=r"try again in about 1\.5 s") as caught:
        queue.accept(Asked(3, 0, math.inf, A), 0.0)
    assert caught.value.retry_after == pytest.approx(1.5)


def test_what_was_learned_is_shown_by_kind():
    queue: Queue[Asked] = Queue(Batching())
    taught(queue, 0.25)
    (kind, learned), *_ = queue.stats(0.0).learned.items()
    assert (kind, learned.useful, learned.medians) == ("a", 1, {1: 0.25, 2: 0.5})
    assert (learned.fixed, learned.per_image) == pytest.approx((0.0, 0.25))


def test_no_more_than_two_batches_are_decoded_ahead_but_for_who_goes_first():
    queue: Queue[Asked] = Queue(Batching(max_batch=2))
    for number in range(9):
        queue.accept(Asked(number, 0, math.inf, A), 0.0)
    decoded = 0
    while (request := queue.next_to_decode(0.0)) is not None:
        queue.decoded(request, 0.0, usable=True)
        decoded += 1
    assert decoded == 4
    first = Asked(9, 1, math.inf, A)
    queue.accept(first, 0.0)
    assert queue.next_to_decode(0.0) is first
    queue.decoded(first, 0.0, usable=True)
    assert queue.look(0.0).release[0] is first


def test_callers_who_make_up_kinds_fill_no_memory():
    queue: Queue[Asked] = Queue(Batching())
    for number in range(100):
        batch = [Asked(number, 0, math.inf, (number,))]
        queue.begin(batch, number, "full", 0.0)
        queue.end(batch, number, 1.0, 1.0, failed=0)
    stats = queue.stats(1.0)
    assert stats.learned.keys() == set(range(84, 100))
    assert stats.images.keys() == {None, *range(84, 100)}
    assert sum(stats.images.values()) == 100


def test_who_has_no_choice_says_nothing_about_how_long_the_queue_is():
    """Else a request with samples of its own would end the caution with which a queue goes back."""
    queue: Queue[Asked] = Queue(Batching(patience=1.0))
    for kind, seconds in (("exact", 0.4), ("fast", 0.1)):
        for count in (1, 2):
            batch = [Asked(100 + i, 0, math.inf, (kind,)) for i in range(count)]
            queue.begin(batch, kind, "unknown", 0.0)
            queue.end(batch, kind, seconds * count, 0.0, failed=0)

    def accept(number: int, priority: int, *kinds: str) -> None:
        queue.accept(Asked(number, priority, math.inf, kinds), 0.0)
        request = queue.next_to_decode(0.0)
        assert request is not None
        queue.decoded(request, 0.0, usable=True)

    def run() -> Hashable:
        decision = queue.look(0.0)
        queue.begin(decision.release, decision.kind, "full", 0.0)
        seconds = 0.4 if decision.kind == "exact" else 0.1
        queue.end(decision.release, decision.kind, seconds, 0.0, failed=0)
        return decision.kind

    for number in range(3):
        accept(number, 0, "exact", "fast")
    assert run() == "fast"
    accept(3, 1, "exact")
    assert run() == "exact"
    assert [run(), queue.ready] == [
        "fast",
        1,
    ]  # for two, "exact" would do, and for four it would not

"""The requests of many callers between `submit` and the model.

No threads, no locks, no clock: whoever calls says what time it is, and calls from one thread at a
time. So a test can play every order of events.

A request waits to be decoded, is decoded, and is then ready for the model. About two batches are
ready at a time and no more, because a decoded image is large.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic

from marnet_sdk.errors import DeadlineExceeded, QueueFull
from marnet_sdk.serve.policy import Batching, Decision, R, Reason, decide, expected
from marnet_sdk.serve.service_times import Arrivals, ServiceTimes

_KINDS = 16  # kinds whose service times are kept
_ORDER = attrgetter("order")


@dataclass(frozen=True)
class Learned:
    """The seconds that a batch of n images takes, a + b n, and what that was fitted to."""

    fixed: float  # a
    per_image: float  # b
    useful: int  # images in a batch from where on a larger one is hardly faster per image
    medians: dict[int, float]  # batch size -> seconds, the median of the last few


@dataclass(frozen=True)
class BatchingStats:
    """The state of a classifier's queue, and what happened since its first request."""

    waiting: int = 0  # requests that are not decoded yet
    decoding: int = 0
    ready: int = 0  # decoded, and waiting for the model
    running: int = 0  # images in the batch that the model has now
    oldest: float = 0.0  # seconds since the oldest of those that wait was accepted
    accepted: int = 0  # requests, each of which ends as one of the next four
    answered: int = 0
    failed: int = 0  # by an image that is not usable, or an error of the model
    expired: int = 0  # by a deadline that passed before the model was free
    cancelled: int = 0
    late: int = 0  # of those that were answered, after their deadline
    refused: dict[str, int] = field(default_factory=dict)  # by "queue full" or "deadline"
    batches: dict[Reason, int] = field(default_factory=dict)  # by why they were released
    sizes: dict[int, int] = field(default_factory=dict)  # the same batches, by their images
    # Images in them, by how they were run; those of ways that did not occur lately by None.
    images: dict[Hashable, int] = field(default_factory=dict)
    stepped_down: int = 0  # of these, run otherwise than asked, because the queue was too long
    learned: dict[Hashable, Learned] = field(default_factory=dict)  # by how they were run


class Queue(Generic[R]):
    """Holds the requests that wait, and hands them out in batches."""

    def __init__(self, knobs: Batching) -> None:
        """Begin empty."""
        self.knobs = knobs
        self.closing = False  # no others come
        # Cancelled, or their deadline passed; for the caller to take out and to tell.
        self.dropped: list[R] = []
        self._waiting: list[R] = []
        self._ready: list[R] = []
        self._decoding: set[R] = set()
        self._running, self._busy_until, self._idle = 0, -math.inf, -math.inf
        self._level = 0  # of the last batch: the place of its kind among its kinds
        self._times: dict[Hashable, ServiceTimes] = {}  # the kind seen last stands last
        self._arrivals = Arrivals()
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._batches: Counter[Reason] = Counter()
        self._sizes: Counter[int] = Counter()
        self._images: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._decoding) + len(self._ready)

    @property
    def done(self) -> bool:
        """Tell whether nothing is left, and nothing comes."""
        return self.closing and not len(self)

    def accept(self, request: R, now: float) -> None:
        """Take a request in, to be decoded.

        Raises:
            QueueFull: as many wait already as the knobs allow.
            DeadlineExceeded: it cannot be answered in time, as far as is known. Where nothing
                waits or runs, every deadline that has not passed is accepted: only so is it seen
                that the model became faster.
        """
        if len(self) >= self.knobs.max_queue:
            self._drop(now)
        if len(self) >= self.knobs.max_queue:
            self._refused["queue full"] += 1
            raise _queue_full(len(self), self._fastest(len(self) - 1, request, now) or None)
        if request.deadline < math.inf:
            seconds = self._expected(request, now)
            if request.deadline <= now + seconds:
                self._refused["deadline"] += 1
                raise _cannot_be_met(request.deadline - now, seconds)
        request.accepted = now
        self._counts["accepted"] += 1
        _insert(self._waiting, request)

    def _expected(self, request: R, now: float) -> float:
        if not len(self) and not self._running:
            return 0.0
        before = sum(r.order < request.order for r in (*self._waiting, *self._ready))
        return self._fastest(before + len(self._decoding), request, now)

    def _fastest(self, ahead: int, request: R, now: float) -> float:
        """Estimate the seconds until who has so many ahead is answered, all run the fastest way."""
        busy = max(0.0, self._busy_until - now)
        return min(expected(ahead, busy, self.knobs, self.times(kind)) for kind in request.kinds)

    def _drop(self, now: float) -> None:
        """Drop those that nobody waits for any more."""
        for requests in (self._waiting, self._ready):
            kept: list[R] = []
            for request in requests:
                useless = request.cancelled or request.deadline <= now
                (self.dropped if useless else kept).append(request)
            requests[:] = kept

    def clear(self, lost: Sequence[R] = ()) -> Sequence[R]:
        """Take out all that wait, as failed.

        Args:
            lost: what a thread had that was struck down, and has failed with it.
        """
        requests = [*self._waiting, *self._ready]
        self._waiting, self._ready = [], []
        self._decoding.difference_update(lost)
        self._counts["failed"] += len({*requests, *lost})
        return requests

    def take_dropped(self) -> Sequence[R]:
        """Take out those that were dropped."""
        dropped, self.dropped = self.dropped, []
        for request in dropped:
            self._counts["cancelled" if request.cancelled else "expired"] += 1
        return dropped

    def next_to_decode(self, now: float) -> R | None:
        """Take out the next request to decode; None: there is none, or enough are ready."""
        while self._waiting and self._has_room(self._waiting[0]):
            request = self._waiting.pop(0)
            if not request.cancelled and request.deadline > now:
                self._decoding.add(request)
                return request
            self.dropped.append(request)
        return None

    def _has_room(self, request: R) -> bool:
        ahead = len(self._ready) + len(self._decoding)
        if ahead < 2 * self.knobs.max_batch or not self._ready:
            return True
        return request.priority > self._ready[0].priority

    @property
    def all_decoded(self) -> bool:
        """Tell whether nothing waits to be decoded."""
        return not self._waiting

    def decoded(self, request: R, now: float, *, usable: bool) -> None:
        """Put back what `next_to_decode` gave; an image that is not usable has failed."""
        self._decoding.discard(request)
        if usable:
            request.ready = now
            self._arrivals.observe(now)
            _insert(self._ready, request)
        else:
            self._counts["failed"] += 1

    @property
    def ready(self) -> int:
        """Requests that are ready for the model."""
        return len(self._ready)

    def look(self, now: float) -> Decision[R]:
        """Decide what the idle model runs, and take it out."""
        if not self._ready:
            return Decision()
        decision = decide(
            *(self._ready, now, self.knobs, self.times, self._arrivals.gap),
            idle=self._idle,
            behind=len(self._waiting) + len(self._decoding),
            level=self._level,
            closing=self.closing,
        )
        if gone := {*decision.release, *decision.expired}:
            self._ready = [request for request in self._ready if request not in gone]
            self.dropped += decision.expired
        return decision

    def begin(self, batch: Sequence[R], kind: Hashable, reason: Reason, now: float) -> None:
        """Learn that the model has a batch that `look` released, without those cancelled since."""
        self._batches[reason] += 1
        self._sizes[len(batch)] += 1
        named = kind in self._images or len(self._images) < 2 * _KINDS
        self._images[kind if named else None] += len(batch)
        if len(kinds := batch[0].kinds) > 1:  # others have no choice, and say nothing about it
            self._level = kinds.index(kind)
            self._counts["stepped_down"] += len(batch) if self._level else 0
        self._running = len(batch)
        self._busy_until = now + self.times(kind).seconds(len(batch))

    def end(
        self, batch: Sequence[R], kind: Hashable, seconds: float, now: float, *, failed: int
    ) -> None:
        """Learn that the model is idle again, and how many of the batch got no answer."""
        self._running, self._busy_until, self._idle = 0, -math.inf, now
        self._counts["failed"] += failed
        self._counts["answered"] += len(batch) - failed
        if not failed:
            self._counts["late"] += sum(request.deadline < now for request in batch)
            self.learn(kind, len(batch), seconds)

    def learn(self, kind: Hashable, size: int, seconds: float) -> None:
        """Learn how long a batch of a kind takes."""
        times = self._times[kind] = self._times.pop(kind, None) or ServiceTimes()
        times.observe(size, seconds)
        if len(self._times) > _KINDS:
            self._forget(next(iter(self._times)))

    def _forget(self, kind: Hashable) -> None:
        """Keep of a kind only that there was one: callers may make up any number of them."""
        del self._times[kind]
        self._images[None] += self._images.pop(kind, 0)

    def cancelled(self, count: int) -> None:
        """Learn that requests of a batch were cancelled before it began."""
        self._counts["cancelled"] += count

    def times(self, kind: Hashable) -> ServiceTimes:
        """The service times of those that are run as `kind`."""
        return self._times.get(kind) or ServiceTimes()

    def stats(self, now: float) -> BatchingStats:
        """Describe the state, and what happened until now."""
        queued = (*self._waiting, *self._ready)
        learned = {
            kind: Learned(t.fixed, t.per_image, t.useful(self.knobs.max_batch), t.medians)
            for kind, t in self._times.items()
        }
        return BatchingStats(
            *(len(self._waiting), len(self._decoding), len(self._ready), self._running),
            oldest=max((now - request.accepted for request in queued), default=0.0),
            refused=dict(self._refused),
            batches=dict(self._batches),
            sizes=dict(sorted(self._sizes.items())),
            images=dict(self._images),
            learned=learned,
            **self._counts,
        )


def _insert(requests: list[R], request: R) -> None:
    """Put a request into its place, which is nearly always the end."""
    if not requests or requests[-1].order < request.order:
        requests.append(request)
    else:
        insort(requests, request, key=_ORDER)


def _queue_full(waiting: int, seconds: float | None) -> QueueFull:
    when = "later" if seconds is None else f"in about {seconds:.3g} s"
    return QueueFull(
        f"{waiting} requests wait already, which is as many as Batching(max_queue={waiting}) "
        f"allows; try again {when}, or let fewer come at a time",
        waiting=waiting,
        retry_after=seconds,
    )


def _cannot_be_met(deadline: float, seconds: float) -> DeadlineExceeded:
    took = "the deadline has passed" if deadline <= 0 else f"an answer takes about {seconds:.3g} s"
    return DeadlineExceeded(
        f"got a deadline {deadline:.3g} s from now, but {took}; allow more time, or let fewer "
        "requests wait",
        deadline=deadline,
        expected=seconds,
    )


def passed(deadline: float) -> DeadlineExceeded:
    """Say that a deadline passed while its request waited; `deadline` is seconds from then."""
    return DeadlineExceeded(
        f"the deadline, {deadline:.3g} s after the request, passed while it waited for the model; "
        "allow more time, or let fewer requests wait",
        deadline=deadline,
    )

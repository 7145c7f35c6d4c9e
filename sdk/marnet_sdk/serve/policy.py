"""The policy of dynamic batching: what runs next and why, or when to look again.

Everything here is a pure function of the queue, the clock, the knobs and the learned times.

A batch of n images costs a + b n seconds (`service_times`). While the model is busy, a queue forms
by itself, and what is in it is the next batch. While the model is idle, waiting for one more image
saves a, and costs each of the n that wait the time until it comes. The policy waits where that
saves twice what it costs,

    2 n gap < a

where gap is the time from one arrival to the next, and until nobody came for a / (2 n). A caller
who is alone therefore never waits, and neither does anybody where a is nearly 0, as for large
encoders on few cores. Callers who wait for their answers before they ask again come back together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Literal, NamedTuple, TypeVar

from marnet_sdk.arguments import positive, seconds
from marnet_sdk.errors import InvalidInput, brief
from marnet_sdk.serve.service_times import ServiceTimes

_WORTH = 2  # waiting must save as many times what it costs
Reason = Literal["full", "no gain", "unknown", "quiet", "delay", "deadline", "closing"]
REASONS: dict[Reason, str] = {
    "full": "a larger batch would be hardly faster per image",
    "no gain": "batches are no faster per image than single images",
    "unknown": "how long batches take is not known yet",
    "quiet": "nobody else is expected soon enough to be worth waiting for",
    "delay": "somebody has waited for the longest delay",
    "deadline": "somebody's deadline allows no more waiting",
    "closing": "nobody else comes",
}


@dataclass(frozen=True)
class Batching:
    """The knobs of dynamic batching. The policy finds the rest by itself.

    Raises:
        InvalidInput: a knob of the wrong type or range.
    """

    max_batch: int = 64  # images that go through the model together
    max_delay: float = 0.01  # seconds that images wait for others while the model is idle
    max_queue: int = 1024  # requests that wait for the model, decoded or not
    decoders: int | None = None  # threads that decode; None: as many as the process has cores
    # Operating points that may answer instead, the best first, while the queue is too long.
    brown_out: tuple[str, ...] = ()
    patience: float = 0.2  # seconds from a request to its answer from where on it is too long

    def __post_init__(self) -> None:
        positive("max_batch", self.max_batch)
        positive("max_queue", self.max_queue)
        if self.decoders is not None:
            positive("decoders", self.decoders)
        seconds("max_delay", self.max_delay, 0)
        seconds("patience", self.patience, 0)
        if isinstance(self.brown_out, str):
            raise InvalidInput(
                f"brown_out must be a tuple of operating points, got {brief(self.brown_out)}; pass "
                f"({brief(self.brown_out)},)"
            )


DEFAULT_BATCHING = Batching()


@dataclass(eq=False, slots=True)  # eq: each is itself alone
class Waiting:
    """A request as the policy sees it; all times are of one clock, in seconds."""

    number: int  # in the order in which they were accepted
    priority: int  # the higher goes first
    deadline: float  # when an answer is of no use any more; infinity: it always is
    kinds: tuple[Hashable, ...]  # how it may be run, the best first; alike in all of a batch
    accepted: float = field(default=math.nan, init=False)
    ready: float = field(default=math.nan, init=False)  # when it was decoded

    @property
    def order(self) -> tuple[int, int]:
        """The place in a queue: by priority, and then first come, first served."""
        return -self.priority, self.number

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the answer any more."""
        return False


R = TypeVar("R", bound=Waiting)


class Decision(NamedTuple, Generic[R]):
    """A batch to be run now; where there is none, when to look again."""

    release: Sequence[R] = ()  # to be run at once
    kind: Hashable = None  # one of their kinds, as which they are run
    reason: Reason | None = None  # why they are released
    expired: Sequence[R] = ()  # their deadlines have passed
    again: float = math.inf  # when to look again, if `enough` are not ready before
    enough: int = 1  # as many ready requests are a reason to look again


def decide(
    queue: Sequence[R],
    now: float,
    knobs: Batching,
    times: Callable[[Hashable], ServiceTimes],
    gap: float = math.inf,
    *,
    idle: float = -math.inf,
    behind: int = 0,
    level: int = 0,
    closing: bool = False,
) -> Decision[R]:
    """Decide what an idle model runs.

    Args:
        queue: the requests that are ready, in the order of `Waiting.order`.
        now: what the clock says.
        times: the service times of a kind.
        gap: seconds from one arrival to the next.
        idle: since when the model is idle.
        behind: requests that are not decoded yet.
        level: place of the kind among its kinds that the last batch was run as.
        closing: no others come.
    """
    expired = [request for request in queue if request.deadline <= now]
    live = [request for request in queue if request.deadline > now] if expired else queue
    if not live:
        return Decision(expired=expired)
    kinds = live[0].kinds
    kind = kinds[step(live, now, knobs, [times(kind) for kind in kinds], behind, level)]
    learned = times(kind)
    most = learned.useful(knobs.max_batch)
    batch = list(islice((request for request in live if request.kinds == kinds), most))
    n, reason, again = len(batch), None, -math.inf
    if n == most:
        reason = "no gain" if most == 1 < knobs.max_batch and learned.known else "full"
    elif closing or not learned.known:
        reason = "closing" if closing else "unknown"
    else:
        reason, again = _due(batch, live, knobs, learned, gap, idle)
    if again <= now:
        return Decision(batch, kind, reason, expired)
    enough = min(most, math.ceil(learned.fixed / (_WORTH * gap))) if gap > 0 else most
    return Decision(expired=expired, again=again, enough=len(queue) - len(batch) + enough)


def _due(
    batch: Sequence[R],
    live: Sequence[R],
    knobs: Batching,
    learned: ServiceTimes,
    gap: float,
    idle: float,
) -> tuple[Reason, float]:
    """Find until when a batch waits for more, and why no longer."""
    n, times = len(batch), _WORTH * len(batch)
    newest = max(idle, *(request.ready for request in batch))
    due: dict[Reason, float] = {
        "delay": max(idle, min(request.ready for request in live)) + knobs.max_delay,
        "deadline": min(request.deadline for request in batch) - learned.seconds(n + 1),
        "quiet": -math.inf if times * gap >= learned.fixed else newest + learned.fixed / times,
    }
    reason = min(due, key=due.__getitem__)
    return reason, due[reason]


def step(
    queue: Sequence[R],
    now: float,
    knobs: Batching,
    times: Sequence[ServiceTimes],
    behind: int = 0,
    level: int = 0,
) -> int:
    """Choose how a batch is run: the best way in which nobody in the queue waits for too long.

    Too long is longer than `Batching.patience`, or past the deadline. From a worse way the policy
    goes back to a better one only if a queue of twice the length would do, so that it does not
    swing between the two. Where nothing is known of a way, it is tried.

    Args:
        times: the service times of each way, the best first.
        behind: requests behind those in the queue.
        level: place of the way that was chosen last.

    Returns:
        The place of the chosen way; the last, if none is fast enough.
    """
    for i, learned in enumerate(times[:-1]):
        most, caution = learned.useful(knobs.max_batch), 2 if i < level else 1
        latest = [min(r.deadline, r.accepted + knobs.patience) for r in queue]
        if behind:
            latest.append(now + knobs.patience)
        places = [*range(len(queue)), len(queue) + behind - 1]
        waits = zip(places, latest, strict=False)
        if all(now + _until(caution * place, most, learned) <= at for place, at in waits):
            return i
    return len(times) - 1


def _until(place: int, most: int, learned: ServiceTimes) -> float:
    """Estimate the seconds until an idle model has answered who has this place in the queue."""
    batches, others = divmod(place, most)
    return batches * learned.seconds(most) + learned.seconds(others + 1)


def expected(ahead: int, busy: float, knobs: Batching, learned: ServiceTimes) -> float:
    """Estimate the seconds until a request is answered; 0 where nothing is known.

    Args:
        ahead: requests that go before it.
        busy: seconds until the model is idle.
    """
    return busy + _until(ahead, learned.useful(knobs.max_batch), learned)

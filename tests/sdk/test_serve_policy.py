"""The policy says what an idle model is given, and why; all times are written down."""

from __future__ import annotations

import math
from functools import partial

import pytest

from marnet_sdk.errors import InvalidInput
from marnet_sdk.serve.policy import REASONS, Batching, Waiting, decide, expected, step
from marnet_sdk.serve.service_times import ServiceTimes

KNOBS = Batching(max_batch=8, max_delay=0.5)


def learned(fixed: float, per_image: float) -> ServiceTimes:
    times = ServiceTimes()
    for size in (1, 2, 4, 8):
        times.observe(size, fixed + per_image * size)
    return times


UNKNOWN = ServiceTimes()
GAIN = learned(1.0, 0.0)  # a batch takes as long as one image
NO_GAIN = learned(0.0, 1.0)


def queue(*ready: float, deadline: float = math.inf, kind: str = "a") -> list[Waiting]:
    """Requests that became ready at these times."""
    requests = [Waiting(i, 0, deadline, (kind,)) for i in range(len(ready))]
    for request, at in zip(requests, ready, strict=True):
        request.accepted = request.ready = at
    return requests


def look(requests: list[Waiting], now: float, times=GAIN, gap: float = 0.01, **more):
    return decide(requests, now, KNOBS, lambda kind: times, gap, **more)


def test_nothing_waits_for_ever_for_nothing():
    decision = look([], 0.0)
    assert (decision.release, decision.reason, decision.again) == ((), None, math.inf)
    assert decision.enough == 1


@pytest.mark.parametrize(
    ("requests", "now", "more", "reason", "count"),
    [
        (queue(*[0.0] * 9), 0.0, {}, "full", 8),
        (queue(0.0, 0.0), 0.0, {"times": NO_GAIN}, "no gain", 1),
        (queue(0.0, 0.0), 0.0, {"times": UNKNOWN}, "unknown", 2),
        (queue(0.0), 0.0, {"gap": 0.6}, "quiet", 1),
        (queue(0.0, 0.3), 0.5, {}, "delay", 2),
        (queue(0.0, 0.0, deadline=1.05), 0.1, {}, "deadline", 2),
        (queue(0.0), 0.0, {"closing": True}, "closing", 1),
    ],
)
def test_each_reason_to_release(requests, now, more, reason, count):
    decision = look(requests, now, **more)
    assert (decision.reason, len(decision.release)) == (reason, count)
    assert decision.reason in REASONS
    assert list(decision.release) == requests[:count]


def test_while_others_are_expected_it_waits_for_the_pause_that_costs_what_is_saved():
    decision = look(queue(0.0, 0.01, 0.02), 0.02)
    assert decision.release == ()
    assert decision.again == pytest.approx(0.02 + 1.0 / 6)  # a / (2 n) after the last
    assert decision.enough == 8
    assert look(queue(0.0, 0.01, 0.02), decision.again).reason == "quiet"


def test_as_many_as_arrive_in_half_the_fixed_time_are_worth_waiting_for_and_no_more():
    assert look(queue(*[0.0] * 3), 0.0, gap=0.15).enough == 4
    assert look(queue(*[0.0] * 4), 0.0, gap=0.15).reason == "quiet"


def test_whoever_just_got_an_answer_may_come_back():
    waited_long = queue(0.0, 0.01)
    assert look(waited_long, 5.0).reason == "quiet"
    decision = look(waited_long, 5.0, idle=5.0)
    assert (decision.release, decision.again) == ((), 5.25)


def test_the_delay_bounds_every_wait():
    assert look(queue(0.0), 0.0).again == 0.5


def test_those_who_wait_behind_others_of_another_kind_end_the_waiting_too():
    old, new = queue(0.0, kind="b"), queue(0.4)
    new[0].priority = 1
    decision = look([*new, *old], 0.5)
    assert (list(decision.release), decision.reason) == (new, "delay")


def test_a_batch_has_one_kind_and_keeps_the_order():
    requests = queue(*[0.0] * 6)
    for i in (1, 2, 4):
        requests[i].kinds = ("b",)
    assert list(look(requests, 9.0).release) == [requests[i] for i in (0, 3, 5)]


def test_deadlines_that_have_passed_are_sorted_out():
    requests = queue(*[0.0] * 4)
    requests[0].deadline = requests[2].deadline = 1.0
    decision = look(requests, 1.0)
    assert list(decision.expired) == [requests[0], requests[2]]
    assert list(decision.release) == [requests[1], requests[3]]
    assert look(queue(0.0, deadline=1.0), 1.0).release == ()


def test_the_expected_time_counts_full_batches_and_the_own():
    wait = partial(expected, knobs=KNOBS, learned=learned(1.0, 0.0))
    most = learned(1.0, 0.0).useful(8)
    assert wait(0, 0.0) == pytest.approx(1.0)
    assert wait(most - 1, 0.5) == pytest.approx(1.5)
    assert wait(2 * most, 0.5) == pytest.approx(3.5)
    assert expected(100, 0.0, KNOBS, UNKNOWN) == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_queue": 1.5}, r"max_queue must be an integer, got 1\.5"),
        ({"decoders": 0}, "decoders must be at least 1, got 0"),
        ({"max_delay": -1}, "max_delay must be at least 0 seconds, got -1"),
        ({"max_delay": "soon"}, r"max_delay must be a finite number of seconds, got 'soon' \(str"),
        ({"max_delay": math.nan}, "max_delay must be a finite number of seconds, got nan"),
        ({"max_delay": True}, "max_delay must be a finite number of seconds, got True"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(InvalidInput, match=message):
        Batching(**knobs)


# --- brown-out

BEST, LESS = learned(0.0, 1.0), learned(0.0, 0.1)  # an image takes a second, and a tenth of one
PATIENT = Batching(max_batch=8, patience=5.0)


@pytest.mark.parametrize(
    ("waiting", "behind", "level", "chosen"),
    [
        (1, 0, 0, 0),
        (5, 0, 0, 0),
        (6, 0, 0, 1),  # the sixth would wait for more than five seconds
        (2, 3, 0, 0),
        (2, 4, 0, 1),  # and so would the last of those that are not decoded yet
        (1, 0, 1, 0),
        (3, 0, 1, 0),
        (4, 0, 1, 1),  # twice as many would be too many
        (100, 0, 1, 1),  # there is nothing below
    ],
)
def test_a_queue_that_is_too_long_is_run_otherwise_and_a_short_one_as_asked(
    waiting, behind, level, chosen
):
    requests = queue(*[0.0] * waiting)
    assert step(requests, 0.0, PATIENT, [BEST, LESS], behind, level) == chosen


def test_a_deadline_may_be_shorter_than_the_patience():
    tight = queue(0.0, 0.0, deadline=1.5)
    assert step(tight, 0.0, PATIENT, [BEST, LESS]) == 1
    assert step(tight, 0.0, PATIENT, [BEST]) == 0


def test_of_several_ways_the_best_that_is_fast_enough_runs():
    ways = [BEST, learned(0.0, 0.5), LESS]
    chosen = [step(queue(*[0.0] * n), 0.0, PATIENT, ways) for n in (5, 6, 10, 11)]
    assert chosen == [0, 1, 1, 2]


def test_a_way_of_which_nothing_is_known_is_tried():
    requests = queue(*[0.0] * 50)
    assert step(requests, 0.0, PATIENT, [BEST, UNKNOWN, LESS]) == 1
    assert step(requests, 0.0, PATIENT, [UNKNOWN, LESS]) == 0


def test_a_batch_says_as_which_kind_it_runs():
    requests = queue(*[0.0] * 9)
    for request in requests:
        request.kinds = ("best", "less")
    times = {"best": BEST, "less": LESS}.__getitem__
    decision = decide(requests, 0.0, PATIENT, times)
    assert (decision.kind, decision.reason) == ("less", "no gain")
    assert decide(requests[:2], 0.0, PATIENT, times).kind == "best"


def test_operating_points_are_a_tuple():
    with pytest.raises(InvalidInput, match=r"brown_out must be a tuple .* got 'fast'; pass \('fa"):
        Batching(brown_out="fast")  # pyright: ignore[reportArgumentType]

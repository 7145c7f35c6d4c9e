"""Service times of batches are learned, and sizes are chosen by them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64

from marnet_sdk.serve.service_times import Arrivals, ServiceTimes

SIZES = st.lists(st.integers(1, 64), min_size=2, max_size=30, unique=True)
SECONDS = st.floats(1e-5, 1.0)


def learned(fixed: float, per_image: float, sizes=(1, 2, 4, 8, 16, 32, 64)) -> ServiceTimes:
    times = ServiceTimes()
    for size in sizes:
        times.observe(size, fixed + per_image * size)
    return times


@given(fixed=SECONDS, per_image=SECONDS, sizes=SIZES)
def test_times_on_a_line_give_the_line(fixed, per_image, sizes):
    times = learned(fixed, per_image, sizes)
    assert times.known
    for size in (1, 7, 64):
        assert times.seconds(size) == pytest.approx(fixed + per_image * size, rel=1e3 * FLOAT64)


@given(st.lists(st.tuples(st.integers(1, 100), SECONDS), min_size=1, max_size=60))
def test_whatever_was_seen_no_time_is_negative_and_larger_batches_take_no_less(seen):
    times = ServiceTimes()
    for size, seconds in seen:
        times.observe(size, seconds)
        assert times.fixed >= 0
        assert times.per_image >= 0
        assert 0 < times.seconds(1) <= times.seconds(2)
        assert 1 <= times.useful(64) <= 64
    assert times.medians.keys() <= {size for size, _ in seen}


def test_one_slow_call_of_a_size_is_no_rule():
    times = learned(0.01, 0.001)
    for _ in range(2):
        times.observe(8, 0.018)
    times.observe(8, 5.0)
    assert times.medians[8] == pytest.approx(0.018)
    assert times.seconds(8) == pytest.approx(0.018)


def test_what_changes_is_learned_anew():
    times = learned(0.01, 0.001)
    for _ in range(5):
        for size in (1, 2, 4, 8, 16, 32, 64):
            times.observe(size, 0.1 + 0.002 * size)
    assert times.fixed == pytest.approx(0.1)
    assert times.per_image == pytest.approx(0.002)


def test_sizes_that_do_not_occur_any_more_are_forgotten():
    times = learned(0.0, 1.0, (1, 2))
    assert times.known
    for _ in range(512):
        times.observe(1, 0.5)
    assert times.medians == {1: 0.5}
    assert not times.known


@pytest.mark.parametrize(
    ("fixed", "per_image", "useful"),
    [(0.0, 1.0, 1), (0.04, 1.0, 1), (0.1, 1.0, 2), (1.0, 1.0, 16), (1.0, 0.0, 61), (1.0, 0.01, 60)],
)
def test_batches_need_be_no_larger_than_is_good_for_throughput(fixed, per_image, useful):
    times = learned(fixed, per_image)
    assert times.useful(64) == useful
    best = times.seconds(64) / 64
    assert times.seconds(useful) / useful <= 1.05 * best + FLOAT64
    assert useful == 1 or times.seconds(useful - 1) / (useful - 1) > 1.05 * best


def test_sizes_grow_step_by_step_while_nothing_is_known_of_them():
    times, tried = ServiceTimes(), []
    for _ in range(5):
        tried.append(times.useful(100))
        times.observe(tried[-1], 1.0)
    assert tried == [4, 16, 61, 96, 96]  # 64 and 100, of which 95 % are as good


def test_the_gap_inside_a_burst_counts_and_not_the_pause_between_two():
    arrivals = Arrivals()
    assert arrivals.gap == math.inf
    for burst in range(4):
        for i in range(10):
            arrivals.observe(10.0 * burst + 0.001 * i)
    assert arrivals.gap == pytest.approx(0.001)

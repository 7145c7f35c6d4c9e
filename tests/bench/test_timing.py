"""Timings are fair, and what is said about them holds on data whose truth is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_bench.timing import drift, interleave, speedup_interval, summarise


class Clock:
    """Time passes only while a candidate works. Notes who worked when."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds in turn, the last ones from then on."""
        left = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def test_candidates_take_turns_in_alternating_order():
    clock = Clock()
    workers = {name: clock.worker(name, 1.0) for name in "abc"}
    interleave(workers, warmup=0, duration=0, min_rounds=4, clock=clock)
    assert "".join(clock.calls) == "abc" + "cba" + "abc" + "cba"


def test_warm_up_is_not_measured():
    clock = Clock()
    workers = {"a": clock.worker("a", 50.0, 20.0, 0.25), "b": clock.worker("b", 9.0, 9.0, 0.5)}
    taken = interleave(workers, warmup=2, duration=0, min_rounds=3, clock=clock)
    assert {name: seconds.tolist() for name, seconds in taken.items()} == {
        "a": [0.25] * 3,
        "b": [0.5] * 3,
    }


def test_the_clock_of_the_run_starts_after_the_warm_up():
    clock = Clock()
    workers = {"a": clock.worker("a", 1000.0, 1.0)}
    taken = interleave(workers, warmup=1, duration=20, min_rounds=1, clock=clock)
    assert len(taken["a"]) == 20


@pytest.mark.parametrize(("duration", "rounds"), [(0, 10), (5, 10), (30, 15)])
def test_rounds_fill_the_duration_but_are_never_fewer_than_asked(duration, rounds):
    clock = Clock()
    workers = {"a": clock.worker("a", 1.5), "b": clock.worker("b", 0.5)}
    taken = interleave(workers, warmup=0, duration=duration, clock=clock)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": rounds, "b": rounds}


def test_each_call_is_timed_alone():
    clock = Clock()
    workers = {"a": clock.worker("a", 1.0, 2.0, 4.0), "b": clock.worker("b", 0.5)}
    taken = interleave(workers, warmup=0, duration=0, min_rounds=3, clock=clock)
    assert taken["a"].tolist() == [1, 2, 4]
    assert taken["b"].tolist() == [0.5] * 3


def test_the_real_clock_measures_real_work():
    taken = interleave({"sum": lambda: sum(range(20_000))}, warmup=1, duration=0, min_rounds=5)
    assert (taken["sum"] > 0).all()


def test_a_summary_is_of_percentiles_in_milliseconds_and_images_over_all_time():
    seconds = np.arange(1, 102) / 1000  # 1 to 101 ms
    summary = summarise(np.random.default_rng(0).permutation(seconds), batch=16)
    assert (summary.p50_ms, summary.p90_ms, summary.p99_ms) == pytest.approx((51, 91, 100))
    assert summary.images_per_s == pytest.approx(16 * 101 / seconds.sum())
    assert summary.calls == 101


def noisy(rng: np.random.Generator, median: float, load: np.ndarray) -> np.ndarray:
    """Latencies with a heavy tail, slowed by whatever else the machine does in that round."""
    return median * load * (1 + rng.exponential(0.1, len(load)))


def test_the_interval_holds_the_true_ratio_as_often_as_it_says_and_is_no_wider_than_it_must():
    """True ratio 1.5, 40 rounds; both candidates meet the same load. 95 % are 3.92 sigma."""
    ratios, lows, highs = [], [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        load = 1 + 0.5 * rng.random(40)
        slower, faster = noisy(rng, 0.015, load), noisy(rng, 0.010, load)
        ratio, low, high = speedup_interval(slower, faster, resamples=500)
        assert low <= ratio <= high
        ratios.append(ratio)
        lows.append(low)
        highs.append(high)
    held = (np.array(lows) <= 1.5) & (np.array(highs) >= 1.5)
    assert held.mean() >= 0.9
    width = np.median(np.subtract(highs, lows))
    assert 0.8 < width / (3.92 * np.std(ratios)) < 1.4


def test_rounds_are_resampled_in_pairs_so_that_common_load_cancels():
    """Load varies tenfold and the ratio not at all: then the interval is a point."""
    load = np.random.default_rng(0).uniform(1, 10, 31)
    assert speedup_interval(3 * load, load) == pytest.approx((3, 3, 3))


def test_equal_candidates_are_not_told_apart():
    rng = np.random.default_rng(1)
    _, low, high = speedup_interval(rng.gamma(9, 1, 200), rng.gamma(9, 1, 200))
    assert low < 1 < high


@given(st.lists(st.floats(1e-4, 10), min_size=3, max_size=30), st.integers(0, 5))
def test_the_interval_is_reproducible_and_inverts_with_its_arguments(values, seed):
    slower, faster = np.array(values), np.array(values[::-1])
    first = speedup_interval(slower, faster, resamples=99, seed=seed)
    assert speedup_interval(slower, faster, resamples=99, seed=seed) == first
    inverse = speedup_interval(faster, slower, resamples=99, seed=seed)
    assert inverse[0] == pytest.approx(1 / first[0])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1.0] * 30, 0.0),
        ([1.0] * 10 + [1.2] * 10 + [1.0] * 10, 0.2),  # a slow phase
        ([1.0] * 20 + [2.0] * 10, 1.0),
        (([1.0] * 9 + [5.0]) * 3, 0.0),  # outliers everywhere are spread, not drift
    ],
)
def test_drift_is_the_spread_of_the_medians_of_the_thirds(seconds, expected):
    assert drift(np.array(seconds)) == pytest.approx(expected)

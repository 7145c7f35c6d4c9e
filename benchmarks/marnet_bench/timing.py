"""Timing several candidates fairly: warmed up, interleaved, with spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Statistic = Callable[[Seconds], Any]  # [..., calls] -> [...]
MEDIAN: Statistic = partial(np.median, axis=-1)
_AT_ONCE = 1_000_000  # times that are resampled together


@dataclass(frozen=True)
class Summary:
    """Latency of one call, in milliseconds, and what it means for a stream of images."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float  # all images over all time
    calls: int


def summarise(seconds: Seconds, batch: int) -> Summary:
    """Percentiles of the calls of one candidate, each of which classified `batch` images."""
    p50, p90, p99 = (float(x) for x in np.percentile(seconds, (50, 90, 99)) * 1e3)
    return Summary(p50, p90, p99, float(batch * len(seconds) / seconds.sum()), len(seconds))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    duration: float,
    min_rounds: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Call every candidate once per round, in alternating order, until `duration` seconds passed.

    Interleaving spreads whatever else the machine does over all candidates alike, so that call i
    of one can be compared with call i of another.

    Args:
        warmup: unmeasured rounds before. min_rounds: measured at least, however long they take.
    Returns:
        Seconds of each call, [rounds] per candidate.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    end = clock() + duration
    rounds = 0
    while rounds < min_rounds or clock() < end:
        for name, call in order:
            start = clock()
            call()
            taken[name].append(clock() - start)
        order.reverse()  # so that no candidate always runs in another's wake
        rounds += 1
    return {name: np.array(values) for name, values in taken.items()}


def speedup_interval(
    slower: Seconds, faster: Seconds, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the median times and its 95 % bootstrap interval, rounds resampled in pairs.

    Returns:
        (ratio, low, high); above 1 where `faster` is indeed faster.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(slower), (resamples, len(slower)))
    ratios = np.median(slower[rows], axis=1) / np.median(faster[rows], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(slower) / np.median(faster)), float(low), float(high)


def drift(seconds: Seconds, windows: int = 3) -> float:
    """Spread of the medians of consecutive windows, relative to the overall median."""
    medians = [float(np.median(part)) for part in np.array_split(seconds, windows)]
    return (max(medians) - min(medians)) / float(np.median(seconds))


def independent_interval(
    old: Seconds,
    new: Seconds,
    statistic: Statistic = MEDIAN,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio of a statistic of two runs, which have no rounds in common, and its 95 % interval.

    Calls one after another are alike, so blocks of them are resampled, which wrap around at the end
    (Politis and Romano 1992). A block has the square root of n calls. That is longer than n^(1/3),
    the best order for calls that soon forget (Künsch 1989), because what disturbs a machine lasts.

    Args:
        old, new: seconds in the order in which they were measured.
        statistic: reduces the last axis.

    Returns:
        (ratio, low, high) of old / new; above 1 where `new` is faster.
    """
    rng = np.random.default_rng(seed)

    def drawn(seconds: Seconds) -> Seconds:
        count = len(seconds)
        length = round(count**0.5)
        together = max(1, _AT_ONCE // count)
        found = []
        for first in range(0, resamples, together):
            size = min(together, resamples - first), -(-count // length), 1
            rows = (rng.integers(0, count, size) + np.arange(length)) % count
            found.append(statistic(seconds[rows.reshape(size[0], -1)[:, :count]]))
        return np.concatenate(found)

    low, high = np.percentile(drawn(old) / drawn(new), (2.5, 97.5))
    return float(statistic(old) / statistic(new)), float(low), float(high)

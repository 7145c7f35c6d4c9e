"""Times that a classifier learns as it answers: of a batch by its size, and between two arrivals.

A batch of n images is taken to cost a + b n seconds: a whatever its size, b for each image. BentoML
learns the same two numbers (https://docs.bentoml.com, "adaptive batching") and keeps them to
itself. Here they can be read, and what they were fitted to as well.
"""

from __future__ import annotations

import math
from collections import deque

# A size whose time for each image is so close to that of the largest batch is as good, and answers
# sooner.
NEAR_BEST = 1.05
_KEPT = 9  # times of each size, whose median counts: a first call, or a pause, is no rule
_SIZES = 32  # sizes that are kept
_FORGOTTEN = 512  # batches after which a size that did not occur again is forgotten
_GROWTH = 4  # a batch is at most this many times as large as those that were seen
_GAPS = 15  # gaps between arrivals, whose median counts


class ServiceTimes:
    """Seconds by batch size, for requests of one kind.

    Of every size the last few times are kept, and their median counts. A line is fitted to the
    medians by least squares of the relative error, with neither a nor b below 0.
    """

    def __init__(self) -> None:
        """Begin with nothing known."""
        self.fixed = 0.0  # a, seconds
        self.per_image = 0.0  # b, seconds
        self._times: dict[int, deque[float]] = {}  # the size seen last stands last
        self._medians: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # size -> number of the batch that had it last
        self._batches = 0

    def observe(self, size: int, seconds: float) -> None:
        """Learn that a batch of `size` images took so long."""
        self._batches += 1
        times = self._times.pop(size, None) or deque(maxlen=_KEPT)
        times.append(max(seconds, 1e-9))
        self._times[size], self._seen[size] = times, self._batches
        self._medians[size] = sorted(times)[(len(times) - 1) // 2]
        while self._is_old(size := next(iter(self._times))):
            del self._times[size], self._seen[size], self._medians[size]
        self._fit()

    def _is_old(self, size: int) -> bool:
        unseen = self._batches - self._seen[size]
        return unseen >= _FORGOTTEN or len(self._times) > _SIZES

    def _fit(self) -> None:
        """Minimise sum(((a + b n - t) / t)^2) over the medians t of the sizes n."""
        points = [(n, t, t**-2) for n, t in self._medians.items()]
        weight = sum(w for _, _, w in points)
        n_mean = sum(w * n for n, _, w in points) / weight
        t_mean = sum(w * t for _, t, w in points) / weight
        spread = sum(w * (n - n_mean) ** 2 for n, _, w in points)
        slope = 0.0
        if self.known:
            slope = sum(w * (n - n_mean) * (t - t_mean) for n, t, w in points) / spread
        if slope < 0:
            self.fixed, self.per_image = t_mean, 0.0
        elif not self.known or t_mean <= slope * n_mean:
            squares = sum(w * n * n for n, _, w in points)
            self.fixed, self.per_image = 0.0, sum(w * n * t for n, t, w in points) / squares
        else:
            self.fixed, self.per_image = t_mean - slope * n_mean, slope

    @property
    def known(self) -> bool:
        """Tell whether a and b can be told apart: two sizes at least were seen."""
        return len(self._medians) > 1

    @property
    def medians(self) -> dict[int, float]:
        """Batch size -> median seconds of the last few such batches."""
        return dict(sorted(self._medians.items()))

    def seconds(self, size: int) -> float:
        """Predict the time of a batch; 0 where nothing is known."""
        return self.fixed + self.per_image * size

    def useful(self, largest: int) -> int:
        """Find the smallest batch size that is about as good for throughput as `largest`.

        1 where batches are no faster per image than single images. Sizes far beyond those that were
        seen are not trusted, so the size grows step by step.
        """
        trusted = min(largest, _GROWTH * max(self._medians, default=1))
        best = NEAR_BEST * (self.fixed / trusted + self.per_image)
        if not self.known or best <= self.per_image:
            return trusted
        # The smallest k with a / k + b <= best.
        return min(trusted, max(1, math.ceil(self.fixed / (best - self.per_image))))


class Arrivals:
    """The moments at which requests become ready, and the gap that is usual between two of them."""

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._last = math.nan

    def observe(self, now: float) -> None:
        """Learn that a request became ready."""
        if not math.isnan(self._last):
            self._gaps.append(now - self._last)
        self._last = now

    @property
    def gap(self) -> float:
        """Seconds from one to the next: the median of the last few; infinity before there are two.

        The median of callers who wait for their answers, and then all come again, is the gap inside
        such a burst.
        """
        return sorted(self._gaps)[len(self._gaps) // 2] if self._gaps else math.inf

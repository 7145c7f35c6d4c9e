"""Find how many threads to compute with, on cores that other programs may take."""

from __future__ import annotations

_LEAST_PAUSE, _MOST_PAUSE = 8, 512  # jobs
_LEAST_WEIGHT, _LONG = 0.25, 0.2  # of one job among those before it; seconds of one that decides


class Crowd:
    """This learns how many threads are worth having while other programs take the cores.

    A job whose threads slept where they wait for each other for more than half of their time would
    not have been slower with half as many. Threads that call at once may lose one of their
    observations.
    """

    def __init__(self) -> None:
        self._halvings = 0  # of the number of threads
        self._asleep = 0.0  # the threads' share of late
        self._jobs = 0  # since that number was changed
        self._pause = _LEAST_PAUSE  # jobs until more threads are tried again

    def most(self, wanted: int) -> int:
        """Say how many threads to take where `wanted` would be worth having on idle cores."""
        return max(1, wanted >> self._halvings)

    def learn(self, used: int, asleep: float, seconds: float = 0.0) -> None:
        """A job of so many seconds had `used` threads, which slept for a share of their time.

        A long job counts for more than a short one.
        """
        self._jobs += 1
        if used > 1:
            self._asleep += (asleep - self._asleep) * min(max(_LEAST_WEIGHT, seconds / _LONG), 1.0)
        if self._asleep > 0.5:
            self._pause = min(2 * self._pause, _MOST_PAUSE)
            self._halvings, self._asleep, self._jobs = self._halvings + 1, 0.0, 0
        elif self._jobs >= self._pause:
            # More are tried again: the first jobs decide. Where all are in use, that goes well.
            self._pause = self._pause if self._halvings else _LEAST_PAUSE
            self._asleep = 0.45 if self._halvings else self._asleep
            self._halvings, self._jobs = max(0, self._halvings - 1), 0

"""Ways to run the loop, and what was measured of each.

Accuracies and agreements are shares between 0 and 1. The *exact* candidate is the process as it was
trained; every other is compared with it on the same images. One passes if its accuracy is shown,
with 95 % confidence, to be at most `max_drop` below the exact one's. A candidate of no steps runs
no loop.

Axes: N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_train.measures import paired_interval


def images_needed(max_drop: float) -> int:
    """The fewest images on which a candidate passes that never differs from the exact process."""
    count = max(1, math.floor(1.96 / max_drop) - 2)  # the interval's low end is -1.96 / (N + 2)
    while paired_interval(0, 0, count)[1] < -max_drop:
        count += 1
    return count


@dataclass(frozen=True)
class Candidate:
    """One way to run the loop, and what was measured of it on N images."""

    sampler: str
    eta: float | None  # share of the noise that the sampler keeps, where it has such a setting
    steps: int
    samples: int
    precision: str
    latency_ms: float
    images: int  # N
    accuracy: float
    agreement: float  # share of labels that are the exact process's
    drop: float  # accuracy of the exact process - accuracy
    low: float  # interval of accuracy - accuracy of the exact process
    high: float
    passes: bool
    # accuracy - the zero-step candidate's, as measured, and its interval; None where there is none
    over_zero: tuple[float, float, float] | None = None

    @property
    def process(self) -> tuple[str, float | None, int, int, str]:
        """Return what is run, without what was measured."""
        return self.sampler, self.eta, self.steps, self.samples, self.precision

    def __str__(self) -> str:
        if not self.steps:
            return f"no loop, {self.precision}"
        eta = "" if self.eta is None else f" eta {self.eta:g}"
        counts = f"{plural(self.steps, 'step')}, {plural(self.samples, 'sample')}"
        return f"{self.sampler}{eta}, {counts}, {self.precision}"


def evaluate_candidate(
    labels: NDArray[np.int64],
    reference: NDArray[np.int64],
    truth: NDArray[np.int64],
    *,
    sampler: str,
    steps: int,
    samples: int,
    latency_ms: float,
    max_drop: float,
    eta: float | None = None,
    precision: str = "fp32",
    without_loop: NDArray[np.int64] | None = None,
) -> Candidate:
    """Compare a candidate's labels with the exact process's, on the same images.

    Args:
        labels: class of each image by the candidate, [N].
        reference: by the exact process, [N].
        truth: the true ones, [N].
        max_drop: how much accuracy may be lost, as a share.
        without_loop: by the zero-step candidate, [N].
    """
    right = labels == truth
    difference, low, high = _difference(right, reference == truth)
    over_zero = None
    if without_loop is not None and steps:
        over_zero = _difference(right, without_loop == truth)
    return Candidate(
        sampler=sampler,
        eta=eta,
        steps=steps,
        samples=samples,
        precision=precision,
        latency_ms=latency_ms,
        images=len(truth),
        accuracy=float(right.mean()),
        agreement=float((labels == reference).mean()),
        drop=0.0 - difference,  # not -difference, which makes -0.0 of 0
        low=low,
        high=high,
        passes=low >= -max_drop,
        over_zero=over_zero,
    )


def _difference(
    right: NDArray[np.bool_], reference: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Return `paired_interval` of what two processes have right, bool [N] each."""
    better, worse = int((right & ~reference).sum()), int((~right & reference).sum())
    return paired_interval(better, worse, len(right))


def evaluate_exact(
    labels: NDArray[np.int64], truth: NDArray[np.int64], **settings: Any
) -> Candidate:
    """The exact process itself: it differs from itself by nothing, and passes by definition.

    Args:
        settings: those of `evaluate_candidate`.
    """
    measured = evaluate_candidate(labels, labels, truth, **settings)
    return replace(measured, low=0.0, high=0.0, passes=True)


def non_dominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates to which no other is preferable, fastest first.

    Another one is preferable if it is at least as fast and as accurate and better in one of the
    two; of equals, the one with fewer steps, then fewer samples, then the first by name.
    """
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=fastest_first):
        if not kept or candidate.accuracy > kept[-1].accuracy:
            kept.append(candidate)
    return kept


def fastest_first(candidate: Candidate) -> tuple[Any, ...]:
    """A total order: latency, accuracy, then what is simplest."""
    c = candidate
    eta = -1.0 if c.eta is None else c.eta
    return c.latency_ms, -c.accuracy, c.steps, c.samples, c.sampler, c.precision, eta


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

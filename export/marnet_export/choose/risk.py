"""The score under which an image is left open, so that few of the other answers are wrong.

Coverages and risks are shares between 0 and 1. Axes: N images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_export.choose.candidates import plural
from marnet_sdk.errors import InvalidInput, VerificationFailed, requires_extra

_BETWEEN_STARTS = 3  # 2 to 4 do equally well; one start alone fails where 1 % of labels are wrong


@dataclass(frozen=True, eq=False)  # == on arrays has no single answer
class RiskCoverage:
    """This is what answering only at a score of at least a threshold gives, highest threshold
    first.
    """

    threshold: NDArray[np.float64]  # the distinct scores, descending
    coverage: NDArray[np.float64]  # share of the images that are answered
    risk: NDArray[np.float64]  # share of the answers that are wrong
    answered: NDArray[np.int64]
    errors: NDArray[np.int64]


def risk_coverage(scores: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """Risk and coverage at every threshold; images of equal score are answered together.

    Args:
        scores: how sure each answer is, finite [N].
        correct: whether it is right, bool [N].

    Raises:
        InvalidInput: arrays that do not fit, or scores that are no numbers.
    """
    values, right = np.asarray(scores, np.float64), np.asarray(correct)
    if values.ndim != 1 or values.shape != right.shape or not values.size or right.dtype != bool:
        raise InvalidInput(
            f"got scores {values.shape} and correct {right.shape} ({right.dtype}); expected one "
            "score and one bool for each of at least one image"
        )
    if not np.isfinite(values).all():
        raise InvalidInput("scores: some are NaN or infinite; expected finite numbers")
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equals
    answered = last + 1
    errors = np.cumsum(~right[order])[last]
    return RiskCoverage(ordered[last], answered / len(values), errors / answered, answered, errors)


class RiskThreshold(NamedTuple):
    """Answer when the score is at least `threshold`, and the risk stays below the target."""

    threshold: float
    coverage: float
    risk: float  # as measured
    upper_bound: float  # of the risk, one-sided (Clopper and Pearson 1934), at most the target


def threshold_for_risk(
    scores: ArrayLike, correct: ArrayLike, target: float, confidence: float = 0.95
) -> RiskThreshold:
    """The lowest threshold whose risk is shown to be below `target`.

    Thresholds are tested one after another from the most confident down, each with the exact
    binomial tail, until one fails; since their order is fixed, each may use the whole error
    probability (fixed-sequence testing: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then
    test", 2021; for a classifier that may decline: Geifman and El-Yaniv, "Selective classification
    for deep neural networks", 2017). The first one tested has just enough answers that no error
    among them would show the risk. There, one error ends the sequence; so where there are more
    images, further sequences start at three, nine, ... times as many answers, and all share the
    error probability equally (multiple starts, ibid.).

    It holds for images like these: drawn from the same source, and used for nothing before.

    Args:
        scores, correct: as `risk_coverage` takes them.
        target: the risk that is asked for, between 0 and 1.
        confidence: with which the risk is below it.

    Raises:
        InvalidInput: `target` or `confidence` not between 0 and 1; bad arrays.
        VerificationFailed: too few images, or too many errors among the surest answers.
    """
    for name, value in (("target", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InvalidInput(f"{name}: got {value}; expected more than 0 and less than 1")
    with requires_extra("export", "scipy"):
        from scipy.stats import beta, binom
    curve = risk_coverage(scores, correct)
    images = int(curve.answered[-1])
    sizes, level = _starts(images, target, 1 - confidence)
    starts = np.searchsorted(curve.answered, [size for size in sizes if size <= images])
    shown = binom.cdf(curve.errors, curve.answered, target) <= level
    bounds = beta.ppf(1 - level, curve.errors + 1, curve.answered - curve.errors)
    bounds[curve.errors == curve.answered] = 1.0  # where the formula has no value
    ends = [start + _leading(shown[start:]) - 1 for start in starts if shown[start]]
    if not ends:
        asked = f"a risk below {target:.2%} with {confidence:.0%} confidence"
        raise VerificationFailed(_why_no_threshold(curve, starts, bounds, sizes[0], asked))
    chosen = max(ends)
    return RiskThreshold(
        float(curve.threshold[chosen]),
        float(curve.coverage[chosen]),
        float(curve.risk[chosen]),
        float(bounds[chosen]),
    )


def _starts(images: int, target: float, error: float) -> tuple[list[int], float]:
    """Numbers of answers at which a sequence of tests starts, and the error probability of each.

    The first is the smallest at which no error shows the risk. Known before any answer is seen.
    """
    ratio = max(1.0, images / _answers_needed(target, error))
    count = 1 + math.floor(math.log(ratio, _BETWEEN_STARTS))
    first = _answers_needed(target, error / count)
    return [first * _BETWEEN_STARTS**i for i in range(count)], error / count


def _answers_needed(target: float, error: float) -> int:
    """The smallest n for which n answers without an error show a risk below `target`."""
    from scipy.stats import binom

    count = max(1, math.floor(math.log(error) / math.log1p(-target)))  # (1 - target)^n = error
    while binom.cdf(0, count, target) > error:
        count += 1
    return count


def _leading(shown: NDArray[np.bool_]) -> int:
    """Count how many hold before the first that does not."""
    return len(shown) if shown.all() else int(shown.argmin())


def _why_no_threshold(
    curve: RiskCoverage,
    starts: NDArray[np.intp],
    bounds: NDArray[np.float64],
    needed: int,
    asked: str,
) -> str:
    images = int(curve.answered[-1])
    if not starts.size:
        return (
            f"{plural(images, 'image')} cannot show {asked}: {needed} or more are needed, even "
            "without an error among them. Give more images or allow a larger risk"
        )
    best = starts[bounds[starts].argmin()]
    return (
        f"the score does not show {asked}: of the {curve.answered[best]} surest answers "
        f"{curve.errors[best]} are wrong, which only shows one below {bounds[best]:.2%}. Allow a "
        "larger risk, give more images, or look at these answers: their labels may be wrong"
    )

"""The score under which an image is left open, so that few of the other answers are wrong.

Coverages and risks are shares between 0 and 1. Axes: N images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from marnet_export.choose.candidates import plural
from marnet_export.choose.charts import plot_risk_coverage
from marnet_export.prove.trial import Built
from marnet_export.work import Job
from marnet_sdk.bundle import Sampling
from marnet_sdk.errors import DataError, VerificationFailed, requires_extra
from marnet_sdk.uncertainty import softmax
from marnet_train.checkpoint import write_json

RISK, RISK_PLOT = "risk_coverage.json", "risk_coverage.png"
_ERROR = 0.05  # probability that the risk is not below the target
_BETWEEN_STARTS = 3  # 2 to 4 do equally well; one start alone fails where 1 % of labels are wrong


def with_thresholds(job: Job, built: Built) -> Sampling:
    """Find the score under which each point should abstain; write the risk-coverage curve."""
    sampling, truth = built.sampling, job.images.labels
    target = job.settings.target_risk
    if truth is None:
        if target is not None:
            raise DataError("--target-risk needs images whose classes the checkpoint knows")
        return sampling
    points, curves = dict(sampling.points), {}
    for name, point in sampling.points.items():
        probabilities = softmax(built.samples(name, point.samples)).mean(axis=1)
        scores, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
        curve = risk_coverage(scores, correct)
        curves[name] = {
            key: np.asarray(getattr(curve, key)).tolist()
            for key in ("threshold", "coverage", "risk")
        }
        if target is not None:
            found = threshold_for_risk(scores, correct, target)
            points[name] = replace(point, abstain_below=found.threshold)
            curves[name]["chosen"] = found._asdict() | {"target": target}
            job.say(
                f"{name}: scores below {found.threshold:.4f} are not to be relied on; on "
                f"{len(truth)} images the others ({found.coverage:.1%}) are wrong in "
                f"{found.risk:.2%}, at most {found.upper_bound:.2%} with 95 % confidence"
                + (" if they had not also chosen the point" if len(points) > 1 else "")
            )
            if name == sampling.default:
                plot_risk_coverage(curve, job.fresh / RISK_PLOT, target=target, chosen=found)
    write_json(job.fresh / RISK, {"images": len(truth), "operating_points": curves})
    return replace(sampling, points=points)


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


def risk_coverage(scores: NDArray[np.floating], correct: NDArray[np.bool_]) -> RiskCoverage:
    """Risk and coverage at every threshold; images of equal score are answered together.

    Args:
        scores: how sure each answer is, finite [N].
        correct: whether it is right, [N].
    """
    values = scores.astype(np.float64)
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equals
    answered = last + 1
    errors = np.cumsum(~correct[order], dtype=np.int64)[last]
    return RiskCoverage(ordered[last], answered / len(values), errors / answered, answered, errors)


class RiskThreshold(NamedTuple):
    """Answer when the score is at least `threshold`, and the risk stays below the target."""

    threshold: float
    coverage: float
    risk: float  # as measured
    upper_bound: float  # of the risk, one-sided (Clopper and Pearson 1934), at most the target


def threshold_for_risk(
    scores: NDArray[np.floating], correct: NDArray[np.bool_], target: float
) -> RiskThreshold:
    """The lowest threshold whose risk is shown to be below `target`, with 95 % confidence.

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

    Raises:
        VerificationFailed: too few images, or too many errors among the surest answers.
    """
    with requires_extra("export", "scipy"):
        from scipy.stats import beta, binom
    curve = risk_coverage(scores, correct)
    images = int(curve.answered[-1])
    sizes, level = _starts(images, target, _ERROR)
    starts = np.searchsorted(curve.answered, [size for size in sizes if size <= images])
    shown = binom.cdf(curve.errors, curve.answered, target) <= level
    bounds = beta.ppf(1 - level, curve.errors + 1, curve.answered - curve.errors)
    bounds[curve.errors == curve.answered] = 1.0  # where the formula has no value
    ends = [start + _leading(shown[start:]) - 1 for start in starts if shown[start]]
    if not ends:
        asked = f"a risk below {target:.2%} with 95% confidence"
        raise VerificationFailed(_why_no_threshold(curve, starts, bounds, sizes[0], asked))
    chosen = max(ends)
    found = (curve.threshold, curve.coverage, curve.risk, bounds)
    return RiskThreshold(*(float(array[chosen]) for array in found))


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

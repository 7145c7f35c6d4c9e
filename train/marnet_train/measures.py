"""This module measures what models' answers show: how well they are calibrated and ranked, and
which model is better.

Pure functions of arrays. Accuracies, risks and coverages are shares between 0 and 1.

Axes: N images, K classes, R training runs (seeds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_sdk.errors import InvalidInput, requires_extra

_SUM = 1e-2  # a row of 1,000 float16 probabilities sums to 1 only so nearly
_RESAMPLES = 2_000
_BLOCK = 100  # resamples at a time, or the weights of many images fill the memory
_CELLS = (0.5, 0.5, 1.0)  # images added where only a is right, only b, both or neither


# --- one model


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15
) -> float:
    """Return the mean distance of the top probability p from the accuracy, in bins of equal width.

    ECE = sum over m of |B_m| / N * |accuracy(B_m) - mean p(B_m)|, where B_m holds the images with
    (m - 1) / bins < p <= m / bins: Guo, Pleiss, Sun and Weinberger, "On calibration of modern
    neural networks", ICML 2017, equation 3. Of equal probabilities the first class is the answer.

    It only compares means within bins, so 0 does not prove that a model is calibrated, and on few
    images the error of a calibrated one is well above 0.

    Args:
        probabilities: of each class, rows that sum to 1, [N, K].
        labels: the true class of each image, integers from 0 to K - 1, [N].
        bins: how many, at least one.

    Raises:
        InvalidInput: arrays that do not fit, or values outside these ranges.
    """
    values, true = _probabilities(probabilities), np.asarray(labels)
    count, classes = values.shape
    if true.shape != (count,) or not np.issubdtype(true.dtype, np.integer):
        raise InvalidInput(f"labels: got {true.dtype} {true.shape}; expected {count} integers")
    if true.min() < 0 or true.max() >= classes:
        raise InvalidInput(
            f"labels: got {true.min()} to {true.max()}; expected 0 to {classes - 1}, a column of "
            "the probabilities each"
        )
    if bins < 1:
        raise InvalidInput(f"bins: got {bins}; expected at least one")
    top = values.max(axis=1)
    gap = (values.argmax(axis=1) == true) - top
    index = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, gap, bins)).sum() / count)


def risk_coverage(score: ArrayLike, correct: ArrayLike) -> float:
    """Return the area under the risk-coverage curve: the mean risk over all coverages.

    Lower is better. AURC = 1 / N * sum over k = 1 .. N of (wrong among the k surest) / k: Geifman
    and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017, for the curve.
    Images of equal score count as if each had their mean error, which is the expectation over their
    orders.

    It mixes accuracy and ranking: of two models the more accurate one may have the worse scores.
    `marnet_export.choose.points.risk_coverage` gives the curve itself.

    Args:
        score: how sure each answer is, finite, [N].
        correct: whether it is right, bool [N].

    Raises:
        InvalidInput: arrays that do not fit, or scores that are no numbers.
    """
    right = _right_among_surest(score, correct)
    return float(1 - np.mean(right / np.arange(1, len(right) + 1)))


def accuracy_at_coverage(score: ArrayLike, correct: ArrayLike, coverage: float = 0.8) -> float:
    """Return the accuracy on the surest images, the fewest that make at least the share `coverage`.

    It is (right among the k surest) / k with k = ceil(coverage * N): one minus the selective risk
    of Geifman and El-Yaniv 2017. Where equal scores stand at the border, it is the mean over all
    ways to choose among them.

    Args:
        score: how sure each answer is, finite, [N].
        correct: whether it is right, bool [N].
        coverage: more than 0 and at most 1.

    Raises:
        InvalidInput: arrays that do not fit, scores that are no numbers, or no such coverage.
    """
    if not 0 < coverage <= 1:
        raise InvalidInput(f"coverage: got {coverage}; expected more than 0 and at most 1")
    right = _right_among_surest(score, correct)
    answered = max(1, math.ceil(round(coverage * len(right), 9)))  # 0.07 * 100 is above 7
    return float(right[answered - 1] / answered)


# --- two models


def paired_interval(
    better: int, worse: int, count: int, z: float = 1.96
) -> tuple[float, float, float]:
    """Return the difference of two accuracies on the same images, with its confidence interval.

    It is the adjusted Wald interval: Agresti and Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 24, 2005. Half an image is added to each
    of the four cells, so that two processes that never differed have an interval, too.

    Args:
        better: images that the candidate has right and the reference wrong.
        worse: the reverse.
        count: all images, N.
        z: 1.96 is 95 %.

    Returns:
        (candidate - reference as measured, low, high).

    Raises:
        InvalidInput: counts that cannot be.
    """
    if min(better, worse) < 0 or count < max(1, better + worse):
        raise InvalidInput(
            f"got {better} better and {worse} worse of {count} images; expected counts with "
            "better + worse <= count, and at least one image"
        )
    difference = better - worse
    total = count + 2
    spread = z * math.sqrt(better + worse + 1 - difference**2 / total)
    low, high = (difference - spread) / total, (difference + spread) / total
    return difference / count, max(low, -1.0), min(high, 1.0)


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % Student interval of the mean; (nan, nan) of fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    with requires_extra("train", "scipy"):
        from scipy.stats import t as student
    reach = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


@dataclass(frozen=True)
class PairedDifference:
    """This is the accuracy of a minus the accuracy of b on the same images, with 95 % intervals."""

    mean: float  # over runs and images
    interval: tuple[float, float]  # for other images and, of several runs, other runs
    over_runs: tuple[float, float]  # Student's, for other runs on these images; nan of one run
    images: int  # N
    runs: int  # R
    p: float  # two-sided, of no difference, from the normal law that `interval` takes


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike) -> PairedDifference:
    """Return the difference of the accuracies of two ways to train, with its 95 % intervals.

    mean = 1 / (R N) * sum of D, where D = correct_a - correct_b is -1 to 1, [R, N].

    `interval` of one run is `paired_interval`. Of several it is the same interval, 1.96 standard
    errors to each side of sum(D) / (R (N + 2)), with the standard error of a bootstrap that draws
    runs and images apart from each other: the pigeonhole bootstrap of Owen, Annals of Applied
    Statistics 1, 2007. In each of 2,000 resamples, R - 1 runs are drawn, whose spread is unbiased
    where that of R is too small (Rao and Wu, Journal of the American Statistical Association 83,
    1988), and N + 2 images, among them half an image in each of the four cells as in
    `paired_interval`. The seed is fixed, and the order of the images does not matter; exchanging a
    and b or the order of the runs moves the bounds by some hundredths of the interval's width.

    What it says: where the difference lies on other images from the same source, for other seeds
    of the same two recipes trained on the same data. What it cannot say:

    - anything about another training set, another recipe or images from elsewhere;
    - how runs vary, where they are few. Where they move the difference four times as much as all
      else does, it held the truth in 80, 86 and 90 of 100 simulated cases with two, three and five
      runs, not in 95: where `over_runs` is the wider one, believe that one;
    - how close the truth is at best. Where runs and images interact, as they do where single
      answers flip by chance, it counts that noise up to three times (Owen) and is too wide.

    `p` is the chance of a distance from 0 of at least sum(D) / (R (N + 2)) where there is no
    difference, by a normal law with that standard error: below 0.05 where `interval` leaves 0 out.
    Of twenty comparisons without any difference one has such a p.

    `over_runs` is `student_interval` of the R differences. It takes the images as given: it says
    nothing about others, and with many runs and few images it is far too narrow for them.

    Args:
        correct_a, correct_b: whether each answer is right, bool [R, N], or the share of several
            noise seeds at which it is, 0 to 1; row r of both was trained with the same seed,
            column n of both is the same image.

    Raises:
        InvalidInput: arrays that do not fit.
    """
    a, b = _shares(correct_a, correct_b)
    runs, images = a.shape
    differences = a - b
    mean = float(differences.mean())
    centre = mean * images / (images + 2)
    if runs == 1:  # the adjusted Wald interval of `paired_interval`, written for shares as well
        variance = ((differences**2).sum() + 1) / (images + 2) - centre**2
        error = float(np.sqrt(variance / (images + 2)))
    else:
        error = _standard_error(differences)
    low, high = max(centre - 1.96 * error, -1.0), min(centre + 1.96 * error, 1.0)
    p = math.erfc(abs(centre) / error / math.sqrt(2))
    over_runs = student_interval(differences.mean(axis=1).tolist())
    return PairedDifference(mean, (low, high), over_runs, images, runs, p)


# --- parts


def _probabilities(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Check probabilities and return them as an array, [N, K]."""
    values = np.asarray(probabilities, np.float64)
    if values.ndim != 2 or not values.size:
        raise InvalidInput(
            f"probabilities: got shape {values.shape}; expected [N, K], a row for each of at least "
            "one image"
        )
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise InvalidInput("probabilities: some are negative, NaN or infinite; expected 0 to 1")
    if (worst := np.abs(values.sum(axis=1) - 1).max()) > _SUM:
        raise InvalidInput(
            f"probabilities: a row's sum is off 1 by {worst:.3g}; expected the softmax of logits"
        )
    return values


def _right_among_surest(score: ArrayLike, correct: ArrayLike) -> NDArray[np.float64]:
    """Count the right answers among the k surest, expected over the orders of equals, k = 1 .. N.

    Where G equal scores, g of them right, follow on the B surest, b of them right, it is
    b + (k - B) g / G.
    """
    values, right = np.asarray(score, np.float64), np.asarray(correct)
    if values.ndim != 1 or values.shape != right.shape or not values.size or right.dtype != bool:
        raise InvalidInput(
            f"got score {values.shape} and correct {right.shape} ({right.dtype}); expected one "
            "score and one bool for each of at least one image"
        )
    if not np.isfinite(values).all():
        raise InvalidInput("score: some are NaN or infinite; expected finite numbers")
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    ends = np.cumsum(size)
    return np.interp(
        np.arange(1, len(values) + 1),
        np.append(0, ends),
        np.append(0, np.cumsum(np.bincount(group, right))),
    )


def _shares(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check two arrays [R, N] of 0 to 1, and return them."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    fits = first.shape == second.shape and first.ndim == 2 and first.size
    if not fits or not all(((x >= 0) & (x <= 1)).all() for x in (first, second)):
        raise InvalidInput(
            f"got correct_a {first.shape} and correct_b {second.shape}; expected bools or shares "
            "from 0 to 1, both [R, N] and at least one image"
        )
    return first, second


def _standard_error(differences: NDArray[np.float64]) -> float:
    """Return the mean's deviation over resamples of runs and images, from D [R, N] with R > 1."""
    rng = np.random.default_rng(0)
    runs, images = differences.shape
    # Images with the same differences are drawn together: faster, and their order has no part.
    patterns, counts = np.unique(differences, axis=1, return_counts=True)  # [R, P], [P]
    chances = np.append(counts, _CELLS) / (images + 2)
    run_weights = rng.multinomial(runs - 1, np.full(runs, 1 / runs), _RESAMPLES) / (runs - 1)
    means = []
    for weights in np.split(run_weights, _RESAMPLES // _BLOCK):
        drawn = rng.multinomial(images + 2, chances, _BLOCK)  # [block, P + 3]
        only_a, only_b = drawn[:, -3], drawn[:, -2]
        measured = ((weights @ patterns) * drawn[:, :-3]).sum(axis=1)
        means.append((measured + only_a - only_b) / (images + 2))
    return float(np.std(means))

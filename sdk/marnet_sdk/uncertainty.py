"""The answer that several noise samples give of one image, how sure it is, when to stop drawing.

The loop is driven by noise. K samples of it give K logit vectors of an image, and the answer is the
mean of their K softmax probabilities. The noise between two images is independent or the same; each
image is judged by its own samples alone, so that no answer depends on the rest of its batch.

Axes: B images, K samples in all, n samples drawn so far, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_sdk.errors import InvalidInput


@dataclass(frozen=True, eq=False)  # == on arrays has no single answer
class Answers:
    """The answers that the samples of each image agree on."""

    probabilities: NDArray[np.float64]  # [B, C] mean over the samples
    # [B] share of the samples whose own best class is the winner of the mean. It can be 0: a class
    # that is second in every sample may win.
    vote_share: NDArray[np.float64]
    standard_error: NDArray[np.float64]  # [B] of the winner's mean probability; NaN for one sample
    samples: NDArray[np.int64]  # [B] how many samples the image got

    @property
    def winner(self) -> NDArray[np.int64]:
        """Index of the most probable class, [B]; the first of equals."""
        return self.probabilities.argmax(axis=1)


@np.errstate(invalid="ignore")  # infinity minus itself
def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Probabilities over the last axis, in float64. Logits with NaN or +infinity give NaN."""
    values = np.asarray(logits, np.float64)
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def summarise(probabilities: ArrayLike, counts: ArrayLike | None = None) -> Answers:
    """The answers that the samples of each image give together.

    Args:
        probabilities: of each sample, [B, K, C].
        counts: how many samples each image got, [B], its first ones; what stands behind them is
            not read. None: all K.

    Returns:
        `Answers`. The standard error is sd / sqrt(count), the sd with count - 1 in its denominator.

    Raises:
        InvalidInput: a wrong shape, or counts outside 1 .. K.
    """
    values = _draws(probabilities)
    images, drawn, _ = values.shape
    number = _counts(counts, images, drawn)
    got = np.arange(drawn) < number[:, None]  # [B, K]
    values = np.where(got[:, :, None], values, 0.0)
    mean = values.sum(axis=1) / number[:, None]
    winner = mean.argmax(axis=1)
    votes = (values.argmax(axis=2) == winner[:, None]) & got
    rows = np.arange(images)
    deviations = np.where(got, values[rows, :, winner] - mean[rows, winner][:, None], 0.0)  # [B, K]
    # Mean square deviation over n (n - 1): the squared standard error. One sample: 0 / 0 is NaN.
    with np.errstate(invalid="ignore"):
        error = np.sqrt((deviations**2).sum(axis=1) / (number * (number - 1)))
    return Answers(mean, votes.sum(axis=1) / number, error, number)


def mean_logits(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """One row of logits for each image: its only sample's, or the log of the mean probabilities.

    [B, K, C] -> [B, C].
    """
    if logits.shape[1] == 1:
        return np.asarray(logits[:, 0], np.float32)
    mean = softmax(logits).mean(axis=1)
    return np.log(np.maximum(mean, np.finfo(np.float32).tiny)).astype(np.float32)


def schedule(total: int, first: int = 4) -> tuple[int, ...]:
    """The numbers of samples after which to look: `first`, twice as many each time, `total` last.

    Doubling keeps the work in large batches and the looks, each a chance to be wrong, few. Two
    samples are too few for a first look: where a softmax saturates, both may agree by chance.

    Raises:
        InvalidInput: less than one sample.
    """
    if total < 1 or first < 1:
        raise InvalidInput(f"got {total} samples, the first look after {first}; expected 1 or more")
    looks = []
    while first < total:
        looks.append(first)
        first *= 2
    return (*looks, total)


def settled(probabilities: ArrayLike, total: int, confidence: float = 0.99) -> NDArray[np.bool_]:
    """Tell whether the class that leads after n samples will also lead the mean of all `total`.

    Let d be the lead over another class in one sample, with mean m and standard deviation s over
    the n drawn. The sum over the r = total - n samples to come is predicted to be r m with standard
    deviation s sqrt(r + r^2 / n) = s sqrt(r total / n): the spread of the new samples, and of m
    (the prediction interval of Student's t; Hahn and Meeker, "Statistical intervals", 1991). So
    the leader stays ahead with the confidence asked for where

        total m > t(confidence, n - 1) s sqrt(r total / n)

    It also does where it can no longer be overtaken, whatever comes: d >= -1, so n m > r suffices
    (curtailment). One of the two must hold against every other class. A tie is never settled, and
    neither are probabilities with NaN.

    The confidence is that of one look at one class, for samples that are about normal. Unanimous
    samples have s = 0 and settle at once, hence the first look of `schedule`.

    Args:
        probabilities: of the n samples drawn so far, [B, n, C], each between 0 and 1.
        total: K, how many samples there will be if nobody stops.

    Returns:
        [B]; nothing but curtailment settles an image with one sample.

    Raises:
        InvalidInput: a wrong shape, more samples than `total`, or a confidence outside 0.5 .. 1.
    """
    values = _draws(probabilities)
    images, drawn, _ = values.shape
    if drawn > total:
        raise InvalidInput(f"total: got {total}, but {drawn} samples are drawn already")
    rows = np.arange(images)
    leader = values.sum(axis=1).argmax(axis=1)  # [B]
    lead = values[rows, :, leader][:, :, None] - values  # [B, n, C]
    ahead = lead.sum(axis=1)  # [B, C] n m
    left = total - drawn
    safe = ahead > left
    if drawn > 1:
        spread = student_quantile(confidence, drawn - 1) * lead.std(axis=1, ddof=1)
        safe |= (ahead * (total / drawn) > spread * math.sqrt(left * total / drawn)) & (ahead > 0)
    safe[rows, leader] = True
    return safe.all(axis=1)


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by bisection of its distribution function.

    For whole degrees of freedom this is a finite sum in the angle whose tangent is
    t / sqrt(freedom): Abramowitz and Stegun, "Handbook of mathematical functions", 1964, formulas
    26.7.3 (odd) and 26.7.4 (even).

    Args:
        probability: 0.5 <= probability < 1.
        freedom: degrees of freedom, at least 1.

    Raises:
        InvalidInput: an argument outside its range.
    """
    if not 0.5 <= probability < 1:
        raise InvalidInput(f"confidence: got {probability}; expected at least 0.5 and less than 1")
    if freedom < 1:
        raise InvalidInput(f"freedom: got {freedom}; expected 1 or more")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Probability of |t| < sqrt(freedom) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for i in range(2 + odd, freedom - 1, 2):  # the factors 2/3, 4/5, ... or 1/2, 3/4, ...
        term *= cosine * cosine * (i - 1) / i
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def _draws(probabilities: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(probabilities, np.float64, order="C")
    if values.ndim != 3 or values.shape[1] < 1 or values.shape[2] < 2:
        raise InvalidInput(
            f"probabilities: got shape {values.shape}; expected [B, K, C], images by samples by "
            "classes, with at least one sample and two classes"
        )
    return values


def _counts(counts: ArrayLike | None, images: int, drawn: int) -> NDArray[np.int64]:
    if counts is None:
        return np.full(images, drawn, np.int64)
    number = np.asarray(counts)
    if number.shape != (images,) or (number.size and number.dtype.kind not in "iu"):
        raise InvalidInput(
            f"counts: got {number.dtype} of shape {number.shape}; expected integers [{images}]"
        )
    if number.size and not 1 <= number.min() <= number.max() <= drawn:
        raise InvalidInput(
            f"counts: got {number.min()} .. {number.max()}; expected 1 .. {drawn} samples"
        )
    return number.astype(np.int64)

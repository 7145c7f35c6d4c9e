"""Answers from several samples, against plain loops; and stopping early rarely changes one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64

from marnet_sdk.errors import InvalidInput
from marnet_sdk.uncertainty import (
    Answers,
    schedule,
    settled,
    softmax,
    student_quantile,
    summarise,
)

Floats = np.ndarray
RNG = np.random.default_rng(0)


def draws(images: int, samples: int, classes: int, concentration: float, seed: int = 0) -> Floats:
    """Dirichlet samples [B, K, C] around a mean of each image; a small concentration saturates."""
    rng = np.random.default_rng(seed)
    mean = rng.dirichlet(np.full(classes, 0.1), images) + 1e-3
    shape = np.repeat(concentration * mean[:, None], samples, axis=1)
    weights = rng.gamma(shape) + 1e-300
    return weights / weights.sum(axis=-1, keepdims=True)


# Multiples of 1/64, of which all sums are exact, so that ties are ties.
def exact_draws(classes: st.SearchStrategy[int]) -> st.SearchStrategy[Floats]:
    def build(size: tuple[int, int, int, int]) -> Floats:
        images, samples, count, seed = size
        rng = np.random.default_rng(seed)
        share = rng.dirichlet(np.full(count, 0.7), (images, samples))
        return rng.multinomial(64, share) / 64

    sizes = st.tuples(st.integers(1, 4), st.integers(1, 9), classes, st.integers(0, 2**32))
    return sizes.map(build)


EXACT = exact_draws(st.integers(2, 5))


def answer_slowly(values: Floats) -> tuple[Floats, float, float]:
    """One image [n, C]: mean, share of votes and standard error, from their definitions."""
    count, classes = values.shape
    mean = np.array([math.fsum(values[:, c]) / count for c in range(classes)])
    winner = int(np.argmax(mean))
    share = sum(int(np.argmax(row)) == winner for row in values) / count
    if count == 1:
        return mean, share, math.nan
    squares = math.fsum((p - mean[winner]) ** 2 for p in values[:, winner])
    return mean, share, math.sqrt(squares / (count - 1)) / math.sqrt(count)


def settled_slowly(values: Floats, total: int, confidence: float) -> bool:
    """One image [n, C], class by class; the quantile is SciPy's."""
    scipy_stats = pytest.importorskip("scipy.stats")
    count, classes = values.shape
    leader = int(np.argmax(values.sum(axis=0)))
    left = total - count
    for other in set(range(classes)) - {leader}:
        lead = [row[leader] - row[other] for row in values]
        mean = math.fsum(lead) / count
        if math.fsum(lead) > left:
            continue
        if count == 1 or mean <= 0:
            return False
        sd = math.sqrt(math.fsum((d - mean) ** 2 for d in lead) / (count - 1))
        quantile = scipy_stats.t.ppf(confidence, count - 1)
        spread = sd * math.sqrt(left + left**2 / count)
        if not total * mean > quantile * spread:
            return False
    return True


def test_softmax_is_the_definition_and_does_not_overflow():
    logits = RNG.normal(size=(3, 2, 5)) * 4
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(softmax(logits), expected, rtol=FLOAT64)
    assert softmax(logits.astype(np.float32)).dtype == np.float64
    assert softmax([1e4, 1e4, -1e4]).tolist() == [0.5, 0.5, 0.0]
    assert softmax([0.0, -np.inf]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_softmax_does_not_hide_what_is_no_number(bad):
    got = softmax([[0.0, bad], [0.0, 0.0]])
    assert np.isnan(got[0]).any()
    assert got[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("counted", [True, False])
def test_answers_are_those_of_a_loop_over_images(counted):
    values = draws(40, 7, 4, 3.0)
    counts = RNG.integers(1, 8, 40) if counted else None
    if counts is not None:
        for row, count in zip(values, counts, strict=True):
            row[count:] = np.nan  # never drawn
    got = summarise(values, counts)
    for i in range(40):
        count = 7 if counts is None else counts[i]
        mean, share, error = answer_slowly(values[i, :count])
        assert got.samples[i] == count
        assert got.winner[i] == mean.argmax()
        np.testing.assert_allclose(got.probabilities[i], mean, rtol=FLOAT64)
        assert got.vote_share[i] == pytest.approx(share, rel=FLOAT64)
        assert got.standard_error[i] == pytest.approx(error, rel=FLOAT64, nan_ok=True)


def test_known_answers():
    got = summarise([[[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], [[1, 0, 0], [0.5, 0.25, 0.25]]])
    assert isinstance(got, Answers)
    assert got.probabilities.tolist() == [[0.25, 0.375, 0.375], [0.75, 0.125, 0.125]]
    assert got.winner.tolist() == [1, 0]
    assert got.vote_share.tolist() == [0.0, 1.0]  # second in both samples, first on the average
    assert got.standard_error.tolist() == [0.125, 0.25]
    assert got.samples.tolist() == [2, 2]


def test_one_sample_is_its_own_answer():
    values = draws(5, 1, 3, 2.0)
    got = summarise(values)
    np.testing.assert_array_equal(got.probabilities, values[:, 0])
    assert got.vote_share.tolist() == [1.0] * 5
    assert np.isnan(got.standard_error).all()


@given(EXACT)
def test_probabilities_sum_to_one_and_votes_are_counts(values):
    got = summarise(values)
    np.testing.assert_allclose(got.probabilities.sum(axis=1), 1.0, rtol=FLOAT64)
    votes = got.vote_share * values.shape[1]
    np.testing.assert_allclose(votes, votes.round(), atol=FLOAT64)
    assert (got.vote_share <= 1).all()
    if values.shape[1] > 1:
        assert (got.standard_error >= 0).all()


@given(exact_draws(st.just(2)))
def test_of_two_classes_the_winner_has_a_vote(values):
    assert (summarise(values).vote_share >= 1 / values.shape[1]).all()


@given(EXACT, st.integers(0, 2**32))
def test_the_order_of_images_samples_and_classes_does_not_matter(values, seed):
    rng = np.random.default_rng(seed)
    images, samples, classes = (rng.permutation(size) for size in values.shape)
    before, after = summarise(values), summarise(values[images][:, samples][:, :, classes])
    np.testing.assert_array_equal(before.probabilities[images][:, classes], after.probabilities)
    total = values.shape[1] + 3
    twice = settled(values, total), settled(values[images][:, samples][:, :, classes], total)
    np.testing.assert_array_equal(twice[0][images], twice[1])


def test_an_image_is_judged_alone():
    values = draws(30, 6, 5, 4.0)
    counts = RNG.integers(1, 7, 30)
    together, stop = summarise(values, counts), settled(values, 20)
    for i in range(30):
        alone = summarise(values[i : i + 1, : counts[i]])
        np.testing.assert_array_equal(together.probabilities[i], alone.probabilities[0])
        np.testing.assert_array_equal(together.standard_error[i], alone.standard_error[0])
        assert stop[i] == settled(values[i : i + 1], 20)[0]


@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.9, 0.99, 0.9999])
def test_quantiles_are_scipy_s(confidence):
    scipy_stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 10, 29, 30, 127, 1000):
        expected = scipy_stats.t.ppf(confidence, freedom)
        assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_quantiles_are_the_printed_ones():
    """Abramowitz and Stegun 1964, table 26.10, column 0.98 of the two-sided probability."""
    printed = {1: 31.821, 2: 6.965, 3: 4.541, 7: 2.998, 15: 2.602, 30: 2.457, 120: 2.358}
    for freedom, quantile in printed.items():
        assert round(student_quantile(0.99, freedom), 3) == quantile


@pytest.mark.parametrize("total", [6, 8, 16, 64])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_settled_is_a_loop_over_images_and_classes(total, confidence):
    for drawn in (1, 2, 4, 6):
        values = draws(120, drawn, 4, 10.0, seed=drawn)
        expected = [settled_slowly(row, total, confidence) for row in values]
        assert settled(values, total, confidence).tolist() == expected


def test_settled_on_known_draws():
    same = [[0.6, 0.4]] * 3  # no spread
    tied = [[0.7, 0.3], [0.3, 0.7]]
    assert settled([same], 100).tolist() == [True]
    assert settled([tied], 100).tolist() == settled([tied], 2).tolist() == [False]
    assert settled([[[0.5, 0.5]] * 4], 100).tolist() == [False]
    assert settled([[[0.4, 0.4, 0.2]] * 4], 100).tolist() == [False]  # of three, two are tied
    assert settled([[[0.9, 0.1]]], 3).tolist() == [False]  # one draw, and two to come
    assert settled([[[0.51, 0.49]]], 1).tolist() == [True]  # nothing to come
    # d = 0.8, 0.6: m = 0.7, s = sqrt(0.02); 3 m = 2.1 against 31.82 s sqrt(3/2) = 5.5; but 1.4 > 1.
    assert settled([[[0.9, 0.1], [0.8, 0.2]]], 3).tolist() == [True]
    assert settled([[[0.9, 0.1], [0.8, 0.2]]], 4).tolist() == [False]
    assert not settled([[[np.nan, np.nan]] * 4], 8).any()


@given(EXACT, st.integers(0, 6))
def test_what_cannot_be_overtaken_settles_and_is_not_overtaken(values, left):
    sums = values.sum(axis=1)
    leader, ordered = sums.argmax(axis=1), np.sort(sums, axis=1)
    certain = ordered[:, -1] - ordered[:, -2] > left
    stop = settled(values, values.shape[1] + left)
    assert stop[certain].all()
    if values.shape[1] == 1 or left == 0:  # no spread, or nothing to predict
        assert not stop[~certain].any()
    for rival in range(values.shape[2]):  # to which goes all that is to come
        rest = np.broadcast_to(np.eye(values.shape[2])[rival], (len(values), left, values.shape[2]))
        winner = summarise(np.concatenate([values, rest], axis=1)).winner
        np.testing.assert_array_equal(winner[certain], leader[certain])


# Between samples that saturate, each almost one class alone, and samples that hardly differ.
@pytest.mark.parametrize(
    ("concentration", "total", "share"),
    [(0.1, 16, 0.75), (0.1, 64, 0.5), (2, 16, 0.7), (2, 64, 0.4), (50, 16, 0.45), (50, 64, 0.2)],
)
def test_stopping_early_saves_samples_and_rarely_changes_an_answer(concentration, total, share):
    values = draws(3000, total, 10, concentration)
    full = summarise(values).winner
    used = np.full(len(values), total)
    for look in reversed(schedule(total)):  # the earliest that settles is written last
        used[settled(values[:, :look], total)] = look
    early = summarise(values, used).winner
    assert np.mean(early != full) < 1 - 0.99
    assert used.mean() < share * total


def test_more_confidence_settles_less():
    values = draws(500, 4, 5, 10.0)
    stops = [settled(values, 32, confidence) for confidence in (0.8, 0.95, 0.99, 0.999)]
    for looser, stricter in pairwise(stops):
        assert (looser | ~stricter).all()
    assert stops[0].sum() > stops[-1].sum()


@pytest.mark.parametrize(
    ("arguments", "looks"),
    [
        ((1,), (1,)),
        ((4,), (4,)),
        ((5,), (4, 5)),
        ((16,), (4, 8, 16)),
        ((20,), (4, 8, 16, 20)),
        ((8, 2), (2, 4, 8)),
    ],
)
def test_looks_double(arguments, looks):
    assert schedule(*arguments) == looks


TWO = np.full((2, 3, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarise([[0.5, 0.5]]), r"probabilities: got shape \(1, 2\); expected \[B, K, C"),
        (lambda: summarise(np.ones((2, 3, 1))), "two classes"),
        (lambda: summarise(np.ones((2, 0, 3))), "at least one sample"),
        (lambda: summarise(TWO, [1]), r"counts: got int64 of shape \(1,\); expected integers \[2"),
        (lambda: summarise(TWO, [1.0, 2.0]), "counts: got float64"),
        (lambda: summarise(TWO, [0, 3]), r"counts: got 0 \.\. 3; expected 1 \.\. 3 samples"),
        (lambda: summarise(TWO, [1, 4]), r"counts: got 1 \.\. 4"),
        (lambda: settled(TWO, 2), "total: got 2, but 3 samples are drawn already"),
        (lambda: settled(TWO, 8, 1.0), "confidence: got 1.0; expected at least 0.5"),
        (lambda: settled(TWO, 8, 0.4), "confidence: got 0.4"),
        (lambda: settled(TWO, 8, np.nan), "confidence: got nan"),
        (lambda: student_quantile(0.9, 0), "freedom: got 0; expected 1 or more"),
        (lambda: schedule(0), "got 0 samples"),
        (lambda: schedule(4, 0), "the first look after 0; expected 1 or more"),
    ],
)
def test_errors_say_what_was_expected(call: Any, message: str):
    with pytest.raises(InvalidInput, match=message):
        call()

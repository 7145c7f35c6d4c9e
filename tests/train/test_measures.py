"""Measures have the values worked out by hand; intervals hold the truth as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from quick import kept
from tolerances import BOOTSTRAP, COVERED, FLOAT64

from marnet_sdk.errors import InvalidInput
from marnet_train.measures import (
    accuracy_at_coverage,
    expected_calibration_error,
    paired_difference,
    paired_interval,
    risk_coverage,
    student_interval,
)

SEEDS = st.integers(0, 2**32 - 1)
# Few different scores, so that most are tied.
ANSWERS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)
PROBABILITIES = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]
LABELS = [0, 1, 1, 0]  # right, wrong, right, right


def columns(answers: list[tuple[int, bool]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores and whether they are right, [N] each."""
    return np.array([float(s) for s, _ in answers]), np.array([right for _, right in answers])


def correctness(seed: int, runs: int, images: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.random((runs, images)) < 0.8, rng.random((runs, images)) < 0.7


# --- calibration


# Of 5 bins: .9 alone is off by .1, .8 and .7 together by |-.8 + .3|, .6 alone by .4.
@pytest.mark.parametrize(("bins", "expected"), [(5, 0.25), (1, 0.0), (1000, 1.6 / 4)])
def test_calibration_error_by_hand(bins, expected):
    got = expected_calibration_error(PROBABILITIES, LABELS, bins)
    assert got == pytest.approx(expected, abs=FLOAT64)


def test_certain_answers_are_off_by_their_share_of_errors():
    assert expected_calibration_error(np.eye(4), [0, 1, 2, 0]) == 0.25


def test_the_first_of_equal_probabilities_is_the_answer():
    assert expected_calibration_error([[0.5, 0.5]], [0]) == 0.5
    assert expected_calibration_error([[0.4, 0.4, 0.2]], [1]) == pytest.approx(0.4)


@given(SEEDS, st.integers(1, 30), st.integers(2, 6))
def test_neither_the_order_of_images_nor_that_of_classes_matters_to_calibration(seed, images, k):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.ones(k), images), rng.integers(k, size=images)
    expected = expected_calibration_error(probabilities, labels)
    assert 0 <= expected <= 1
    rows, classes = rng.permutation(images), rng.permutation(k)
    again = expected_calibration_error(probabilities[rows], labels[rows])
    assert again == pytest.approx(expected, abs=FLOAT64)
    renamed = expected_calibration_error(probabilities[:, classes], np.argsort(classes)[labels])
    assert renamed == pytest.approx(expected, abs=FLOAT64)


def test_half_precision_probabilities_are_accepted():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(1000), 50).astype(np.float16)
    assert expected_calibration_error(probabilities, rng.integers(1000, size=50)) > 0


# --- answers that are given or not


@pytest.mark.parametrize(
    ("score", "correct", "expected"),
    [
        ([4, 3, 2, 1], [True, False, True, True], (1 / 2 + 1 / 3 + 1 / 4) / 4),
        ([1, 2, 3, 4], [True, True, False, True], (1 / 2 + 1 / 3 + 1 / 4) / 4),
        ([2, 2, 1], [True, False, True], (1 / 2 + 1 / 2 + 1 / 3) / 3),
        ([0, 0], [False, False], 1.0),
        ([-1.5], [True], 0.0),
    ],
)
def test_the_area_under_the_curve_by_hand(score, correct, expected):
    assert risk_coverage(score, correct) == pytest.approx(expected, abs=FLOAT64)


@pytest.mark.parametrize(
    ("score", "correct", "coverage", "expected"),
    [
        ([5, 4, 3, 2, 1], [True, True, False, True, False], 0.8, 3 / 4),
        ([5, 4, 3, 2, 1], [True, True, False, True, False], 0.5, 2 / 3),  # 2.5 images are 3
        ([5, 4, 3, 2, 1], [True, True, False, True, False], 1.0, 3 / 5),
        ([5, 4, 3, 2, 1], [True, True, False, True, False], 1e-12, 1.0),  # one image at least
        ([2, 1, 1, 1], [True, True, False, False], 0.5, (1 + 1 / 3) / 2),
        (range(100, 0, -1), [True] * 7 + [False] * 93, 0.07, 1.0),  # 7, though 0.07 * 100 > 7
    ],
)
def test_accuracy_at_a_coverage_by_hand(score, correct, coverage, expected):
    got = accuracy_at_coverage(np.array(score), correct, coverage)
    assert got == pytest.approx(expected, abs=FLOAT64)


@given(ANSWERS, st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_ties_count_as_the_mean_over_all_orders(answers, coverage):
    areas, accuracies = [], []
    for order in permutations(answers):
        ranked = sorted(order, key=lambda answer: -answer[0])  # stable: ties keep this order
        right = np.cumsum([right for _, right in ranked])
        k = np.arange(1, len(ranked) + 1)
        answered = math.ceil(coverage * len(ranked))
        areas.append(np.mean(1 - right / k))
        accuracies.append(right[answered - 1] / answered)
    got = risk_coverage(*columns(answers)), accuracy_at_coverage(*columns(answers), coverage)
    assert got == pytest.approx((np.mean(areas), np.mean(accuracies)), abs=FLOAT64)


@given(ANSWERS, st.randoms(use_true_random=False))
def test_neither_the_order_of_images_nor_the_scale_of_scores_matters(answers, random):
    score, correct = columns(answers)
    expected = risk_coverage(score, correct), accuracy_at_coverage(score, correct)
    shuffled = columns(random.sample(answers, len(answers)))
    assert (risk_coverage(*shuffled), accuracy_at_coverage(*shuffled)) == expected
    assert risk_coverage(np.exp(3 * score) - 7, correct) == expected[0]


# --- intervals of one pair of models


# (b - c -+ 1.96 sqrt(b + c + 1 - (b - c)^2 / (N + 2))) / (N + 2), by hand.
@pytest.mark.parametrize(
    ("better", "worse", "count", "expected"),
    [
        (0, 0, 194, (0.0, -0.01, 0.01)),
        (0, 0, 98, (0.0, -0.0196, 0.0196)),
        (1, 2, 98, (-1 / 98, -0.01 - 0.0196 * math.sqrt(3.99), -0.01 + 0.0196 * math.sqrt(3.99))),
        (10, 0, 10, (1.0, (10 - 1.96 * math.sqrt(11 - 100 / 12)) / 12, 1.0)),  # cut at 1
        (0, 1, 1, (-1.0, -1.0, (-1 + 1.96 * math.sqrt(2 - 1 / 3)) / 3)),
    ],
)
def test_intervals_are_those_of_the_formula(better, worse, count, expected):
    assert paired_interval(better, worse, count) == pytest.approx(expected, abs=FLOAT64)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 1000))
def test_intervals_hold_the_difference_and_mirror(better, worse, same):
    count = max(1, better + worse + same)
    difference, low, high = paired_interval(better, worse, count)
    assert -1 <= low <= difference <= high <= 1
    mirrored = paired_interval(worse, better, count)
    assert mirrored == pytest.approx((-difference, -high, -low), abs=FLOAT64)
    wider = paired_interval(better, worse, count, z=2.58)
    assert wider[1] <= low <= high <= wider[2]


def test_intervals_cover_the_truth_in_95_of_100_sets():
    rng = np.random.default_rng(0)
    cells = rng.multinomial(300, [0.02, 0.04, 0.94], size=2000)
    intervals = [paired_interval(int(b), int(c), 300) for b, c, _ in cells]
    covered = np.mean([low <= 0.02 - 0.04 <= high for _, low, high in intervals])
    assert 0.94 <= covered <= 0.98  # four standard errors of a share of 2,000 are 0.02


# --- intervals over runs


def test_the_interval_of_the_mean_is_students():
    # Three values: t with 2 degrees of freedom is 4.303 at 97.5 %, the deviation is 0.1.
    low, high = student_interval([0.5, 0.6, 0.7])
    assert (low + high) / 2 == pytest.approx(0.6)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval():
    assert all(math.isnan(bound) for bound in student_interval([0.5]))


def test_one_run_has_the_interval_of_a_pair():
    a, b = np.zeros((2, 1, 98), bool)
    a[0, 0] = b[0, 1] = b[0, 2] = True
    got = paired_difference(a, b)
    mean, *bounds = paired_interval(1, 2, 98)
    assert (got.mean, *got.interval) == pytest.approx((mean, *bounds), abs=FLOAT64)
    assert all(math.isnan(bound) for bound in got.over_runs)
    assert (got.images, got.runs) == (98, 1)


def test_of_several_runs_mean_and_student_interval_are_those_of_the_differences():
    a = np.array([[True, True, True, True], [True, True, False, False]])
    b = np.array([[True, False, True, False], [False, True, False, False]])
    got = paired_difference(a, b)  # 2 / 4 and 1 / 4
    assert got.mean == 3 / 8
    assert got.over_runs == pytest.approx(student_interval([0.5, 0.25]), abs=FLOAT64)
    assert (got.images, got.runs) == (4, 2)


def test_shares_of_noise_seeds_are_compared_as_shares():
    """Of four images, a is right at 2 of 3 seeds where b never is, and the reverse at 1 of 3."""
    a, b = np.array([[2 / 3, 0, 1, 1]]), np.array([[0, 1 / 3, 1, 1]])
    got = paired_difference(a, b)
    assert got.mean == pytest.approx((2 / 3 - 1 / 3) / 4, abs=FLOAT64)
    centre = (2 / 3 - 1 / 3) / 6
    reach = 1.96 * math.sqrt(((4 / 9 + 1 / 9 + 1) / 6 - centre**2) / 6)
    assert got.interval == pytest.approx((centre - reach, centre + reach), abs=FLOAT64)


@given(SEEDS, st.integers(1, 4), st.integers(1, 40))
def test_shares_of_zero_and_one_are_bools(seed, runs, images):
    a, b = correctness(seed, runs, images)
    got, again = paired_difference(a, b), paired_difference(a.astype(float), b.astype(np.float32))
    assert (got.mean, got.interval) == (again.mean, again.interval)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (20, 10), (98, 0)])
def test_runs_that_agree_have_the_interval_of_one_of_them(better, worse):
    a = np.repeat([True, False, True], [better, worse, 98 - better - worse])
    b = np.repeat([False, True, True], [better, worse, 98 - better - worse])
    _, low, high = paired_interval(better, worse, 98)
    got = paired_difference(np.tile(a, (3, 1)), np.tile(b, (3, 1)))
    assert got.interval == pytest.approx((low, high), abs=BOOTSTRAP * (high - low))
    assert got.interval[0] < got.mean <= got.interval[1]


def test_where_only_runs_differ_the_standard_error_is_that_of_the_runs():
    a, b = np.zeros((2, 4, 10_000), bool)
    for run, better in enumerate((1_000, 2_000, 3_000, 4_000)):  # + 0.1, 0.2, 0.3 and 0.4
        a[run, :better] = True
    a = np.random.default_rng(0).permuted(a, axis=1)
    reach = 1.96 * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2
    got = paired_difference(a, b).interval
    assert got == pytest.approx((0.25 - reach, 0.25 + reach), abs=BOOTSTRAP * 2 * reach)


@given(SEEDS, st.integers(1, 4), st.integers(1, 40))
def test_the_order_of_images_does_not_matter_and_the_interval_is_of_a_difference(
    seed, runs, images
):
    a, b = correctness(seed, runs, images)
    got = paired_difference(a, b)
    order = np.random.default_rng(seed).permutation(images)
    again = paired_difference(a[:, order], b[:, order])
    assert (again.mean, again.interval) == (got.mean, got.interval)
    assert -1 <= got.interval[0] <= got.mean <= got.interval[1] <= 1


@pytest.mark.parametrize("seed", range(5))
def test_exchanging_the_models_mirrors_and_the_order_of_runs_hardly_matters(seed):
    a, b = correctness(seed, 4, 200)
    got, mirrored = paired_difference(a, b), paired_difference(b, a)
    low, high = got.interval
    assert mirrored.mean == -got.mean
    assert mirrored.interval == pytest.approx((-high, -low), abs=BOOTSTRAP * (high - low))
    backwards = paired_difference(a[::-1], b[::-1])
    assert backwards.interval == pytest.approx((low, high), abs=BOOTSTRAP * (high - low))


def simulate(
    rng: np.random.Generator, runs: int, images: int, by_image: float, by_run: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Correct answers of two models whose accuracies differ by 0.04 in truth, [R, N].

    A fifth of the images is hard: there a is right with probability 0.6 and b with 0.4, each moved
    by uniform amounts up to `by_image` for the image and `by_run` for the run.
    """
    hard = rng.random(images) < 0.2
    favour = rng.uniform(-by_image, by_image, images)
    luck = rng.uniform(-by_run, by_run, (2, runs, 1))
    chances = np.array([0.6 + favour + luck[0], 0.4 - favour + luck[1]])  # [2, R, N]
    a, b = (rng.random(chances.shape) < chances) | ~hard
    return a, b


def coverage(runs: int, images: int, by_image: float, by_run: float) -> tuple[float, float]:
    """Share of 300 simulated sets of which `interval` holds the truth, and of which `over_runs`."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        found = paired_difference(*simulate(rng, runs, images, by_image, by_run))
        held.append([low <= 0.04 <= high for low, high in (found.interval, found.over_runs)])
    both, over_runs = np.mean(held, axis=0).tolist()
    return both, over_runs


@pytest.mark.parametrize(
    ("runs", "by_image", "by_run"),
    kept(
        [
            (1, 0.3, 0.0),
            (2, 0.25, 0.05),
            (3, 0.0, 0.0),
            (3, 0.25, 0.1),
            (5, 0.1, 0.1),
            (10, 0.1, 0.25),
        ],
        {(1, 0.3, 0.0), (3, 0.25, 0.1)},
        many=True,
    ),
)
def test_intervals_for_other_runs_and_images_hold_the_truth_in_95_of_100_sets(
    runs, by_image, by_run
):
    assert coverage(runs, 300, by_image, by_run)[0] >= 0.95 - COVERED


@pytest.mark.slow
def test_two_runs_that_differ_a_lot_are_too_few_and_over_runs_says_so():
    both, over_runs = coverage(2, 1000, 0.0, 0.25)
    assert both == pytest.approx(0.80, abs=2 * COVERED)
    assert over_runs == pytest.approx(0.95, abs=COVERED)


@pytest.mark.slow
def test_over_runs_says_nothing_about_other_images():
    both, over_runs = coverage(10, 300, 0.25, 0.0)
    assert over_runs < 0.95 - 2 * COVERED < both


# --- errors


YES = np.ones(3, bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([0.5], [0]), r"got shape \(1,\); expected \[N, K\]"),
        (lambda: expected_calibration_error(np.ones((0, 2)), []), "at least one image"),
        (lambda: expected_calibration_error([[1.5, -0.5]], [0]), "some are negative, NaN"),
        (lambda: expected_calibration_error([[math.nan, 1.0]], [0]), "some are negative, NaN"),
        (lambda: expected_calibration_error([[3.0, 1.0]], [0]), "off 1 by 3; expected the softmax"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [0.0]), r"got float64 \(1,\); expected"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [0, 1]), r"got int64 \(2,\); expected 1"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [2]), "got 2 to 2; expected 0 to 1"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [-1]), "got -1 to -1; expected 0 to 1"),
        (lambda: expected_calibration_error([[0.5, 0.5]], [0], 0), "bins: got 0; expected"),
        (lambda: risk_coverage([1, 2], YES), r"got score \(2,\) and correct \(3,\) \(bool\)"),
        (lambda: risk_coverage([], np.ones(0, bool)), "at least one image"),
        (lambda: risk_coverage([1, 2], [1, 0]), r"\(int64\); expected one score and one bool"),
        (lambda: risk_coverage([1, math.nan, 2], YES), "score: some are NaN or infinite"),
        (lambda: accuracy_at_coverage([1, math.inf, 2], YES), "score: some are NaN or infinite"),
        (lambda: accuracy_at_coverage([1, 2, 3], YES, 0), "coverage: got 0; expected more than 0"),
        (lambda: accuracy_at_coverage([1, 2, 3], YES, 1.1), "coverage: got 1.1"),
        (lambda: paired_interval(-1, 0, 5), "got -1 better and 0 worse of 5 images; expected"),
        (lambda: paired_interval(3, 3, 5), "got 3 better and 3 worse of 5"),
        (lambda: paired_interval(0, 0, 0), "at least one image"),
        (lambda: paired_difference(YES, YES), r"expected bools or shares from 0 to 1, both \[R, N"),
        (lambda: paired_difference(YES[None] * 1.5, YES[None]), "expected bools or shares from 0"),
        (lambda: paired_difference(YES[None] * -0.5, YES[None]), "expected bools or shares from 0"),
        (lambda: paired_difference(YES[None] * math.nan, YES[None]), "expected bools or shares"),
        (lambda: paired_difference(YES[None], YES[None, :2]), r"\(1, 3\) and correct_b \(1, 2\)"),
        (lambda: paired_difference(np.ones((2, 0), bool), np.ones((2, 0), bool)), "at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str):
    with pytest.raises(InvalidInput, match=message):
        call()

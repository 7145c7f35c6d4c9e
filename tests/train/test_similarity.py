"""Measures of alignment have the values worked out by hand, and do not see what they should not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import FLOAT64, SIMILAR

from marnet_sdk.errors import InvalidInput
from marnet_train.tables.similarity import class_cosines, linear_cka, squared_mmd

SEEDS = st.integers(0, 2**32 - 1)


def vectors(seed: int, count: int = 12, width: int = 4) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((count, width))


def rotation(seed: int, width: int = 4) -> NDArray[np.float64]:
    return np.linalg.qr(vectors(seed, width, width))[0]


def test_linear_cka_by_hand():
    # Centred, x is (-1, 0, 1) and y is (-1, 2, -1) / 3 of 3: their product is 0.
    assert linear_cka([[0], [1], [2]], [[0], [1], [0]]) == pytest.approx(0, abs=FLOAT64)
    # Centred, y is (-1, 0, 1) and (1, 0, -1): |Y'X|^2 = 8, |X'X| = 2, |Y'Y| = 4.
    assert linear_cka([[0], [1], [2]], [[0, 2], [1, 1], [2, 0]]) == pytest.approx(1, abs=FLOAT64)
    # Centred, x is (-2, 1, 1) / 3 and y is (-1, 0, 1): 1 / (2 / 3 * 2).
    assert linear_cka([[0], [1], [1]], [[0], [1], [2]]) == pytest.approx(3 / 4, abs=FLOAT64)


@given(SEEDS, st.floats(0.01, 100), st.integers(1, 6))
def test_linear_cka_does_not_see_rotation_scale_and_place(seed, scale, width):
    x, y = vectors(seed), vectors(seed + 1, width=width)
    expected = linear_cka(x, y)
    assert 0 <= expected <= 1 + FLOAT64
    assert linear_cka(y, x) == pytest.approx(expected, abs=SIMILAR)
    moved = scale * x @ rotation(seed) + 3
    assert linear_cka(moved, y) == pytest.approx(expected, abs=SIMILAR)
    assert linear_cka(moved, x) == pytest.approx(1, abs=SIMILAR)


def test_the_mean_discrepancy_by_hand():
    """Two points a distance 1 apart in each set, and 2 between the sets."""
    x, y = [[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 2.0]]
    scale = (2 * 1 + 2 * 1 + 2 * (4 + 5 + 5 + 4)) / 12  # mean squared distance of all pairs

    def kernel(squared: float) -> float:
        return sum(math.exp(-squared / (w * scale)) for w in (0.25, 0.5, 1, 2, 4)) / 5

    expected = 2 * kernel(1) - 2 * (kernel(4) + kernel(5)) / 2
    assert squared_mmd(x, y) == pytest.approx(expected, abs=FLOAT64)


@given(SEEDS, st.floats(0.01, 100))
def test_the_mean_discrepancy_does_not_see_unit_rotation_and_order(seed, scale):
    x, y = vectors(seed), vectors(seed + 1, count=7) + 1
    expected = squared_mmd(x, y)
    assert squared_mmd(y, x) == pytest.approx(expected, abs=SIMILAR)
    assert squared_mmd(scale * x, scale * y) == pytest.approx(expected, abs=SIMILAR)
    turn, order = rotation(seed), np.random.default_rng(seed).permutation(len(x))
    assert squared_mmd(x @ turn, y @ turn) == pytest.approx(expected, abs=SIMILAR)
    assert squared_mmd(x[order], y) == pytest.approx(expected, abs=SIMILAR)


def test_the_mean_discrepancy_is_about_zero_for_one_law_and_grows_with_the_distance():
    x, y = vectors(0, 400), vectors(1, 400)
    near, far = squared_mmd(x, y + 0.5), squared_mmd(x, y + 2)
    assert abs(squared_mmd(x, y)) < near / 5
    assert near < far


def test_equal_vectors_have_no_discrepancy_and_no_alignment():
    same = np.ones((3, 2))
    assert squared_mmd(same, same) == pytest.approx(0, abs=FLOAT64)
    assert math.isnan(linear_cka(same, vectors(0, 3)))


def test_cosines_to_the_own_class_and_to_the_others_by_hand():
    x, centres = [[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]
    own, others = class_cosines(x, centres, [0, 0, 1])
    assert own == pytest.approx((1 + 0 + math.sqrt(0.5)) / 3, abs=FLOAT64)
    assert others == pytest.approx((0 + 1 + math.sqrt(0.5)) / 3, abs=FLOAT64)


@given(SEEDS, st.integers(2, 5))
def test_vectors_that_are_their_class_have_cosine_one_whatever_their_length(seed, classes):
    centres = vectors(seed, classes)
    labels = np.arange(10) % classes
    lengths = np.random.default_rng(seed).uniform(0.1, 9, (10, 1))
    own, others = class_cosines(lengths * centres[labels], centres, labels)
    assert own == pytest.approx(1, abs=SIMILAR)
    assert -1 <= others <= own


X = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cka(X, X[:2]), "got 3 and 2 vectors; expected pairs"),
        (lambda: linear_cka(X[0], X), r"x: got shape \(2,\); expected finite vectors"),
        (lambda: linear_cka(X, X * math.nan), "y: got shape .* expected finite"),
        (
            lambda: squared_mmd(X, X[:, :1]),
            r"got vectors \(3, 2\) and \(3, 1\); expected one width",
        ),
        (lambda: squared_mmd(X[:1], X), "at least two of each"),
        (lambda: class_cosines(X, X[:1], [0, 0, 0]), "at least two classes"),
        (lambda: class_cosines(X, X, [0, 0]), r"labels \(2,\); expected one width"),
        (lambda: class_cosines(X, X, [0, 1, 3]), "a class for each vector"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()

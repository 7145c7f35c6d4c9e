"""Accuracy over training seeds, and the support vector machine beside it."""

from __future__ import annotations

import math

import pytest

from marnet_train.data.dataset import read_data_set
from marnet_train.over_seeds import interval, svm_accuracy


def test_an_svm_on_the_raw_digits_reaches_what_is_known_of_it(digits):
    # scikit-learn's own example of this data set and kernel is at 97 to 99 %.
    assert 0.97 <= svm_accuracy(read_data_set(digits)) <= 1


def test_the_interval_is_students():
    # Three values: t with 2 degrees of freedom is 4.303 at 97.5 %, the deviation is 0.1.
    low, high = interval([0.5, 0.6, 0.7])
    assert (low + high) / 2 == pytest.approx(0.6)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval():
    assert all(math.isnan(bound) for bound in interval([0.5]))

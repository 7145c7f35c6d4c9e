"""Verification lets a sound graph through and stops one that lies, on any image or batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tolerances import FLOAT64

from marnet_export.verify import (
    Fidelity,
    margin,
    measure_fidelity,
    row_invariance,
    wilson_interval,
)

Floats = np.ndarray
Run = Callable[[Floats], Floats]
RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((30, 3, 4, 4)).astype(np.float32)
WEIGHT = RNG.standard_normal((48, 7)).astype(np.float32)


def by_row(pixels: Floats) -> Floats:
    """Seven logits of each image, computed image by image: nothing else can matter."""
    return np.stack([image.reshape(-1) @ WEIGHT for image in pixels])


def nearly(pixels: Floats) -> Floats:
    """The same with the last bits of a batched product."""
    return pixels.reshape(len(pixels), -1) @ WEIGHT


REFERENCE = by_row(PIXELS)


def measure(run: Run, labels=None, reference: Floats = REFERENCE, **limits: float) -> Fidelity:
    limits = {"min_agreement": 0.999, "row_tolerance": 0.02} | limits
    return measure_fidelity(run, PIXELS, reference, labels, **limits)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(270, 270, 0.98597, 1.0), (0, 10, 0.0, 0.27754), (1999, 2000, 0.99717, 0.99991)],
)
def test_intervals_are_the_known_ones(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_intervals_are_scipy_s_and_hold_the_proportion(pair):
    successes, count = pair
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, count, z=1.959963984540054)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=FLOAT64)
    assert -FLOAT64 <= low <= successes / count + FLOAT64
    assert successes / count - FLOAT64 <= high <= 1 + FLOAT64


def test_margin_is_the_lead_of_the_best_label():
    logits = np.array([[1, 5, 3], [2, 2, 0], [-9, -4, -6]], np.float32)
    assert margin(logits).tolist() == [2, 0, 2]


@pytest.mark.parametrize("run", [by_row, nearly])
def test_a_graph_that_treats_every_image_alone_passes(run):
    found = row_invariance(run, PIXELS, run(PIXELS), tolerance=1e-4)
    assert found["flips"] == 0
    assert found["max_difference"] <= 1e-4 * np.abs(REFERENCE).max()
    assert measure(run).problems() == []


def sees_its_neighbours(pixels: Floats) -> Floats:
    return by_row(pixels) + by_row(pixels).mean(axis=0)


def sees_its_position(pixels: Floats) -> Floats:
    return by_row(pixels) + np.arange(len(pixels))[:, None] * np.eye(7)[3]


def breaks_in_small_batches(pixels: Floats) -> Floats:
    return by_row(pixels) if len(pixels) > 8 else np.roll(by_row(pixels), 1, axis=1)


def wrong_when_alone(pixels: Floats) -> Floats:
    return by_row(pixels) if len(pixels) > 1 else -by_row(pixels)


def nan_when_alone(pixels: Floats) -> Floats:
    """Label 0 always wins, and the argmax of NaN is 0 too: only the difference can tell."""
    logits = by_row(pixels) + 100 * np.eye(7, dtype=np.float32)[0]
    return logits if len(pixels) > 1 else np.full((1, 7), np.nan, np.float32)


def reads_the_first_row_only(pixels: Floats) -> Floats:
    """As a graph would that had its batch size traced into it."""
    return by_row(pixels) if len(pixels) == len(PIXELS) else by_row(pixels[[0] * len(pixels)])


def stumbles_over_duplicates(pixels: Floats) -> Floats:
    distinct = len(np.unique(pixels.reshape(len(pixels), -1), axis=0))
    return by_row(pixels) * (1 if distinct == len(pixels) else -1)


@pytest.mark.parametrize(
    "run",
    [
        sees_its_neighbours,
        sees_its_position,
        breaks_in_small_batches,
        wrong_when_alone,
        nan_when_alone,
        reads_the_first_row_only,
        stumbles_over_duplicates,
    ],
)
def test_a_graph_whose_answers_depend_on_the_batch_is_stopped(run):
    found = measure(run, reference=run(PIXELS))
    assert found.top1_agreement == 1
    (problem,) = found.problems()
    assert "an answer depends on the rest of its batch" in problem


def test_a_label_that_was_never_decided_may_flip():
    """Which of two all but equal logits wins is in the last bits, and no fault of the graph."""

    def run(pixels: Floats) -> Floats:
        winner = np.eye(7, dtype=np.float32)[len(pixels) % 7]
        return np.tile(1 + 1e-6 * winner, (len(pixels), 1))

    found = row_invariance(run, PIXELS, run(PIXELS), tolerance=1e-2)
    assert found["flips"] == 0
    assert 0 < found["max_difference"] < 1e-5


def flips_a_label(pixels: Floats) -> Floats:
    """Another label for the one image whose first pixel is the largest."""
    logits = by_row(pixels)
    target = pixels[:, 0, 0, 0] == PIXELS[:, 0, 0, 0].max()
    logits[target] *= -1
    return logits


def test_a_single_changed_label_is_below_the_default_agreement():
    found = measure(flips_a_label)
    assert found.top1_agreement == 29 / 30
    assert found.top1_interval == wilson_interval(29, 30)
    (problem,) = found.problems()
    assert problem.startswith("top-1 agreement is 0.9667 on 30 images (95 % interval 0.8")
    assert "at least 0.999 was asked" in problem
    assert measure(flips_a_label, min_agreement=0.9).problems() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_stopped_even_if_no_label_changes(bad):
    def run(pixels: Floats) -> Floats:
        logits = by_row(pixels)
        worst = logits.argmin(axis=1)
        logits[np.arange(len(logits)), worst] = -bad
        return logits

    found = measure(run, min_agreement=0)
    assert found.non_finite == 30
    assert found.problems()[0] == "30 of its logits are NaN or infinite"


def test_a_reference_that_is_not_finite_is_no_excuse():
    found = measure(by_row, reference=np.full_like(REFERENCE, np.nan), min_agreement=0)
    assert found.problems()


def test_errors_and_accuracies_are_measured_against_reference_and_truth():
    labels = REFERENCE.argmax(axis=1)
    labels[:3] = (labels[:3] + 1) % 7

    def run(pixels: Floats) -> Floats:
        return by_row(pixels) + np.float32(0.25)

    found = measure(run, labels)
    assert found.reference_accuracy == found.bundle_accuracy == pytest.approx(0.9)
    assert found.logit_error_max == pytest.approx(0.25, abs=1e-5)
    assert found.logit_error_mean == pytest.approx(0.25, abs=1e-5)
    assert found.largest_logit == np.abs(REFERENCE).max()
    assert found.top5_agreement == 1
    assert measure(by_row).bundle_accuracy is None


def test_top_5_agreement_compares_sets_of_labels():
    def run(pixels: Floats) -> Floats:
        """The best two swapped for every image, and 5th with 6th for the first ten or so."""
        logits = by_row(pixels)
        order = np.argsort(-logits, axis=1)
        for row, rank in enumerate(order):
            logits[row, rank[[0, 1]]] = logits[row, rank[[1, 0]]]
            if pixels[row, 0, 0, 0] > 0:
                logits[row, rank[[4, 5]]] = logits[row, rank[[5, 4]]]
        return logits

    found = measure(run)
    assert found.top1_agreement == 0
    assert found.top5_agreement == (PIXELS[:, 0, 0, 0] <= 0).mean()

"""Verification lets a sound graph through and stops one that lies, on any image or batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.stats import binomtest
from tiny import plain_refine
from tolerances import FLOAT32_TWICE, FLOAT64

from marnet_export.prove.fidelity import (
    Fidelity,
    margin,
    measure_fidelity,
    row_invariance,
    wilson_interval,
)
from marnet_export.prove.reference import Reference, Store
from marnet_export.prove.trial import Built, Trial, instability_floor, settling
from marnet_sdk import Classifier
from marnet_sdk.backends import open_backend
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import ExportError
from marnet_sdk.run import pixel_key
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.marnet import MARNet

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
    return measure_fidelity(run, PIXELS, run(PIXELS), reference, labels, **limits)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(270, 270, 0.98597, 1.0), (0, 10, 0.0, 0.27754), (1999, 2000, 0.99717, 0.99991)],
)
def test_intervals_are_the_known_ones(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
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


def sizes_run(**how) -> tuple[dict, list[int]]:
    """What `row_invariance` finds in a sound graph, and the batches that it ran."""
    seen = []

    def run(pixels: Floats) -> Floats:
        seen.append(len(pixels))
        return by_row(pixels)

    images = np.concatenate([PIXELS, -PIXELS, PIXELS[:10]])
    return row_invariance(run, images, by_row(images), tolerance=1e-4, **how), seen


def test_batches_of_many_sizes_are_run_for_a_few_more_images():
    found, seen = sizes_run()
    assert found["sizes"] == sorted(set(seen))
    assert {1, 2, 3, 7, 8, 16, 33, 64} <= set(seen)
    assert found["worst_size"] is None
    assert sum(seen) < 3.5 * 64


def test_no_batch_is_larger_than_there_are_images_unless_it_is_asked_for():
    found, seen = sizes_run(limit=20)
    assert max(seen) == 20
    assert found["sizes"] == [1, 2, 3, 4, 5, 7, 8, 16, 20]


def test_each_bucket_and_its_neighbours_can_be_asked_for():
    """More images than there are: they are repeated."""
    found, seen = sizes_run(limit=20, sizes=(31, 32, 33, 8))
    assert {31, 32, 33} <= set(found["sizes"])
    assert 7 not in found["sizes"]
    assert seen.count(8) == 1  # three images and their padding: not run twice
    assert (found["flips"], found["max_difference"]) == (0, 0)


@pytest.mark.parametrize("bad", [-1, np.nan])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_the_size_that_goes_wrong_is_told(size, bad):
    def run(pixels: Floats) -> Floats:
        return by_row(pixels) * (bad if len(pixels) == size else 1)

    found = row_invariance(run, PIXELS, by_row(PIXELS), tolerance=1e-4)
    assert found["worst_size"] == size


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


# --- against a checkpoint


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MARNet:
    return load_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def images(checkpoint: Path) -> Floats:
    loaded = load_checkpoint(checkpoint)
    return loaded.preprocess.pixels(sorted(loaded.samples.glob("*.png"))[:70])


@pytest.mark.parametrize("by_image", [False, True])
def test_the_reference_is_the_checkpoint_with_its_plain_loop(by_image, model, images):
    reference = Reference(model, images, by_image=by_image, batch=32)
    table = sampler_table(model.config.schedule, "dpmpp", 7)
    got = reference.logits(table, 3, 2)
    keys = [pixel_key(row) for row in images] if by_image else None
    x_v = reference.x_v.numpy()
    want, _ = plain_refine(model, table, x_v, seed=3, samples=2, keys=keys)
    assert np.abs(got - want).max() <= FLOAT32_TWICE * np.abs(want).max()
    np.testing.assert_array_equal(reference.logits(table, 3, 2, limit=40), got[:40])


def test_estimates_end_where_the_chain_ends(model, images):
    reference = Reference(model, images)
    table = sampler_table(model.config.schedule, "ddim", 6)
    estimates = reference.estimates(table, 0, np.arange(9))
    assert estimates.shape == (6, 9, 10)
    want = reference.logits(table, 0, limit=9)[:, 0]
    np.testing.assert_allclose(estimates[-1], want, atol=FLOAT32_TWICE * np.abs(want).max())


def test_a_reference_that_leaves_the_finite_numbers_names_the_step(checkpoint, images):
    broken = load_checkpoint(checkpoint).model
    with torch.no_grad():
        broken.denoiser.layer4.weight *= 1e25
    reference = Reference(broken, images[:3])
    table = sampler_table(broken.config.schedule, "ddpm", 10)
    with pytest.raises(ExportError, match=r"from step 2 of 10 on \(t = 90, ddpm\)"):
        reference.logits(table, 0)


@pytest.fixture(scope="module")
def built(bundle_of, images) -> Callable[[str], Built]:
    def open_built(precision: str) -> Built:
        bundle = read_bundle(bundle_of("torchscript", precision))
        plan = load_file(bundle.path / "payload/plan.safetensors")
        compute = bundle.manifest.precision.compute
        backend = open_backend("torchscript", bundle.path / "payload", compute, 1)
        return Built(backend, plan, bundle.manifest.sampling, images)

    return open_built


def test_what_is_built_answers_as_a_classifier_does(built, bundle_of, images):
    want = Classifier(bundle_of("torchscript", "fp32")).logits(images)
    opened = built("fp32")
    for got in (opened.run("default")(images), opened.logits("default")):
        np.testing.assert_allclose(got, want, atol=FLOAT32_TWICE * np.abs(want).max())


def test_what_a_reference_gives_is_shared_with_other_processes(model, images, tmp_path):
    table = sampler_table(model.config.schedule, "ddpm", 3)
    store, nobody = Store(tmp_path / "answers", "a checkpoint"), cast(MARNet, SimpleNamespace())
    alone, first = Reference(model, images), Reference(model, images, store=store)
    want = alone.logits(table, 7, 2)
    np.testing.assert_array_equal(first.logits(table, 7, 2), want)
    second = Reference(nobody, images, store=store)  # it could compute nothing
    np.testing.assert_array_equal(second.x_v.numpy(), alone.x_v.numpy())
    np.testing.assert_array_equal(second.logits(table, 7, 2), want)
    for other in (
        lambda: second.logits(table, 8, 2),
        lambda: Reference(nobody, images[:-1], store=store),
        lambda: Reference(nobody, images, by_image=True, store=store).logits(table, 7, 2),
        lambda: Reference(nobody, images, store=replace(store, checkpoint_sha256="another")),
    ):
        with pytest.raises(AttributeError):
            other()


def trial_of(reference: Reference, built: Built, table: SamplerTable) -> Trial:
    return Trial(
        reference, built, None, {"default": table}, min_agreement=0.999, row_tolerance=0.02
    )


def test_the_trajectory_shows_where_a_built_loop_departs(built, model, images):
    table = sampler_table(model.config.schedule, "ddpm")
    reference, opened = Reference(model, images), built("fp32")
    found = trial_of(reference, opened, table).trajectory("default", most=5)
    assert [(row["step"], row["t"]) for row in found] == [
        (1, 100), (26, 75), (50, 51), (75, 26), (100, 1)
    ]  # fmt: skip
    assert max(row["error"] for row in found) < 1e-2
    spoiled = dict(opened.plan)
    spoiled["coefficients.default"] = spoiled["coefficients.default"].copy()
    spoiled["coefficients.default"][60] *= 1.5  # the 61st step goes too far
    departing = Built(opened.backend, spoiled, opened.sampling, images)
    errors = trial_of(reference, departing, table).trajectory("default", most=100)
    assert max(row["error"] for row in errors[:60]) < 1e-2
    assert errors[61]["error"] > 10 * max(row["error"] for row in errors[:60])


def test_the_instability_floor_counts_labels_that_the_seed_decides(model, images):
    reference = Reference(model, images)
    table = sampler_table(model.config.schedule, "ddpm", 5)
    found = instability_floor(reference, table, seed=2**64 - 2, samples=1)
    seeds = [2**64 - 2, 2**64 - 1, 0, 1, 2]
    labels = np.stack([reference.logits(table, s)[:, 0].argmax(axis=1) for s in seeds])
    assert found["seeds"] == seeds
    assert found["images"] == 70
    assert found["share"] == np.mean([len(set(row)) > 1 for row in labels.T.tolist()])
    limited = instability_floor(reference, table, seed=0, samples=1, most=5 * 5 * 66)
    assert limited["images"] == 66


def test_settling_is_measured_against_all_samples(built, images):
    found = settling(built("fp32"), "default", samples=16, most=10**6)
    assert (found["samples"], found["images"]) == (16, 70)
    assert 4 <= found["mean_samples"] < 16
    assert found["agreement"] >= 0.95
    assert found["interval"][0] <= found["agreement"] <= found["interval"][1]

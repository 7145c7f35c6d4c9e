"""The peer is the checkpoint that the bundle was made from, and computes what the bundle does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from tolerances import BUILT

from marnet_bench.peers import find_checkpoint, load_peer, measured_accuracy
from marnet_sdk import Classifier
from marnet_sdk.bundle import Bundle, OperatingPoint, Sampling, read_bundle
from marnet_sdk.errors import BundleCorrupt, NotFound
from marnet_train.checkpoint import checkpoint_hash, load_checkpoint


@pytest.fixture
def other(checkpoint: Path, tmp_path: Path) -> Path:
    """The same weights with another label map: another checkpoint."""
    folder = tmp_path / "runs/another"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("samples"))
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["0"] = "zero"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("backend", ["torchscript", "onnxruntime"])
def test_the_peer_gives_the_logits_of_the_float32_bundle(backend, bundle_of, checkpoint):
    classifier = Classifier(bundle_of(backend, "fp32"))
    _, peer = load_peer(checkpoint, classifier.bundle.manifest)
    images = sorted((checkpoint / "samples").glob("*.png"))[:40]
    pixels = classifier.preprocess.pixels(images)
    want, got = classifier.logits(pixels), peer.logits(pixels)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= BUILT["fp32"] * np.abs(want).max()


def test_the_peer_runs_the_operating_point_samples_and_noise_of_the_bundle(
    noisy_bundle, swept_bundle, zero_bundle, checkpoint
):
    for path in (noisy_bundle, swept_bundle, zero_bundle("torchscript", "fp32")):
        classifier = Classifier(path)
        _, peer = load_peer(checkpoint, classifier.bundle.manifest)
        images = sorted((checkpoint / "samples").glob("*.png"))[:9]
        pixels = classifier.preprocess.pixels(images)
        want, got = classifier.logits(pixels), peer.logits(pixels)
        assert np.abs(got - want).max() <= BUILT["fp32"] * np.abs(want).max()


def test_the_peer_s_metrics_come_along(bundle_of, checkpoint):
    manifest = Classifier(bundle_of("torchscript", "fp32")).bundle.manifest
    loaded, _ = load_peer(checkpoint, manifest)
    assert loaded.training["metrics"]["marnet"]["test"]["top1"] > 0.5


def test_another_checkpoint_is_refused_as_peer(bundle_of, checkpoint, other):
    manifest = Classifier(bundle_of("torchscript", "fp32")).bundle.manifest
    found, wanted = checkpoint_hash(other)[:12], checkpoint_hash(checkpoint)[:12]
    message = rf"another is not the checkpoint of this bundle \(SHA-256 {found}.*from {wanted}"
    with pytest.raises(NotFound, match=message):
        load_peer(other, manifest)


def test_the_checkpoint_is_found_by_content_whatever_it_is_called(checkpoint, other):
    runs = other.parent
    (runs / "not a checkpoint").mkdir()
    (runs / "a file").write_text("x")
    with pytest.raises(NotFound, match=r"--checkpoint, or .* --no-peer"):
        find_checkpoint(bundle_from(checkpoint_hash(checkpoint)), runs)
    shutil.copytree(checkpoint, runs / "zzz")
    assert find_checkpoint(bundle_from(checkpoint_hash(checkpoint)), runs) == runs / "zzz"
    assert find_checkpoint(bundle_from(checkpoint_hash(other)), runs) == other


def bundle_from(sha256: str) -> Bundle:
    """A bundle of that checkpoint, which it does not hold."""
    return cast(
        Bundle,
        SimpleNamespace(
            manifest=SimpleNamespace(checkpoint_sha256=sha256), has=lambda folder: False
        ),
    )


def test_without_runs_the_way_out_is_named(tmp_path):
    message = r"SHA-256 abcdef012345\.\.\.\) is neither in it nor under"
    with pytest.raises(NotFound, match=message):
        find_checkpoint(bundle_from("abcdef0123456789"), tmp_path / "absent")


def test_the_checkpoint_that_travels_in_the_bundle_is_the_last_resort(
    bundle_of, checkpoint, other, tmp_path
):
    bundle = read_bundle(bundle_of("torchscript", "fp32"))
    found = find_checkpoint(bundle, other.parent)
    assert found == bundle.path / "source"
    assert checkpoint_hash(found) == checkpoint_hash(checkpoint)
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    with (copy / "source/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BundleCorrupt, match=r"source/config\.json"):
        find_checkpoint(read_bundle(copy, lazily=True), tmp_path / "absent")


def sampling_of(timesteps: Sequence[int]) -> Sampling:
    point = OperatingPoint("ddpm", 0.0, tuple(timesteps), 1, None)
    return Sampling({"a": point}, "a", len(timesteps), "shared", seed=0, width=1)


def test_accuracy_is_shown_only_for_the_reverse_process_that_it_was_measured_with(checkpoint):
    training = load_checkpoint(checkpoint).training
    whole = sampling_of(range(100, 0, -1))
    test = training["metrics"]["marnet"]["test"]
    served = measured_accuracy(training, whole)
    assert served is not None
    by_seed = test["top1_over_noise_seeds"]
    assert served["marnet"] == {"top1": by_seed[0], "top5": test["top5"]}
    other_seed = measured_accuracy(training, replace(whole, seed=2))
    assert other_seed is not None
    assert other_seed["marnet"] == {"top1": by_seed[2], "top5": test["top5"]}
    others = [{"sampler": "ddim"}, {"samples": 2}, {"timesteps": (100, 50)}]
    unknown_points = [replace(whole, points={"a": replace(whole.point, **o)}) for o in others]
    for unknown in (replace(whole, seed=9), replace(whole, noise="image"), *unknown_points):
        found = measured_accuracy(training, unknown)
        assert found is not None
        assert found["marnet"] == {"top1": None, "top5": None}
        assert found["baseline"]["top1"] == training["metrics"]["baseline"]["test"]["top1"]


MARNET = {"top1": 0.85, "top5": 0.99, "top1_over_noise_seeds": [0.9, 0.8]}


def known(sampling: Sampling, **marnet: object) -> dict[str, object]:
    """What is known of a model whose training says `marnet` of it."""
    metrics = {"baseline": {"test": {"top1": 0.8, "top5": 1.0}}, "marnet": {"test": marnet}}
    found = measured_accuracy({"metrics": metrics}, sampling)
    assert found is not None
    return found["marnet"]


@pytest.mark.parametrize(("samples", "is_known"), [(1, False), (4, True), (8, False)])
def test_accuracy_is_shown_only_for_the_number_of_samples_that_it_was_measured_with(
    samples, is_known
):
    whole = sampling_of(range(10, 0, -1))
    point = replace(whole.point, samples=samples)
    served = replace(whole, points={"a": point}, seed=1)
    expected = {"top1": 0.8, "top5": 0.99} if is_known else {"top1": None, "top5": None}
    assert known(served, **MARNET, samples=4) == expected


def test_older_trainings_measured_one_sample_and_top5_of_the_first_seed_alone():
    whole = sampling_of(range(10, 0, -1))
    assert known(whole, **MARNET) == {"top1": 0.9, "top5": 0.99}
    assert known(replace(whole, seed=1), **MARNET) == {"top1": 0.8, "top5": None}
    two = replace(whole, points={"a": replace(whole.point, samples=2)})
    assert known(two, **MARNET) == {"top1": None, "top5": None}


def test_without_a_test_split_the_validation_split_is_named():
    marnet = {"top1": 0.9, "top5": 1.0, "top1_over_noise_seeds": [0.9]}
    metrics = {"baseline": {"val": {"top1": 0.8, "top5": 1.0}}, "marnet": {"val": marnet}}
    found = measured_accuracy({"metrics": metrics}, sampling_of([1]))
    assert found is not None
    assert found["split"] == "val"


def test_without_the_loop_the_accuracy_is_the_alignment_branch_s(checkpoint):
    training = load_checkpoint(checkpoint).training
    point = OperatingPoint("none", 0.0, (), 1, None)
    found = measured_accuracy(training, Sampling({"a": point}, "a", 100, "shared", 9, 1))
    assert found is not None
    branch = training["metrics"]["alignment"]["test"]
    assert found["marnet"] == {"top1": branch["top1"], "top5": branch["top5"]}

"""From checkpoint to bundle: all of it, or nothing and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marnet_export.pipeline import Settings, export_bundle
from marnet_sdk import Classifier
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import DataError, ExportError, OutputExists, VerificationFailed
from marnet_train.checkpoint import checkpoint_hash

Weights = dict[str, np.ndarray]


def changed(checkpoint: Path, folder: Path, change: Callable[[Weights], None]) -> Path:
    """A copy of the checkpoint with other weights."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def nearly_tie(weights: Weights) -> None:
    """The same classes in exact arithmetic, told apart by less than fp16 can hold beside 1."""
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = (1 + 0.001 * weights[name]).astype(np.float32)


def overflow(weights: Weights) -> None:
    weights["classifier.weight"][0, 0] = 1e5  # the largest fp16 value is 65504


def quick(**settings) -> Settings:
    return Settings(**{"precision": "fp16", "min_agreement": 0.98} | settings)


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    return tmp_path / "bundles"


def test_the_manifest_says_what_was_asked_and_what_was_built(checkpoint, bundles):
    settings = quick(steps=10, seed=3)
    export_bundle(checkpoint, bundles / "b", settings)
    manifest = read_bundle(bundles / "b").manifest
    assert (manifest.method, manifest.backend) == ("marnet", "torchscript")
    assert manifest.labels == tuple("0123456789")
    assert (manifest.precision.asked, manifest.precision.compute) == ("fp16", "fp32")
    assert manifest.precision.storage["fp16"] > 0.95
    assert manifest.sampling.timesteps == (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)
    assert (manifest.sampling.train_steps, manifest.sampling.seed) == (100, 3)
    assert manifest.checkpoint_sha256 == checkpoint_hash(checkpoint)
    assert manifest.built_for.device == "cpu"
    assert {"python", "torch", "numpy"} <= manifest.built_for.packages.keys()
    assert Classifier(bundles / "b").preprocess.output_shape == (3, 32, 32)


def test_fidelity_travels_with_the_bundle(checkpoint, bundles):
    fidelity = export_bundle(checkpoint, bundles / "b", quick())
    written = json.loads((bundles / "b/fidelity.json").read_text())
    assert written == json.loads(json.dumps(fidelity.to_dict()))
    assert written["images"] == 270
    assert written["top1_agreement"] >= 0.98
    assert 0.8 < written["reference_accuracy"] < 1
    assert written["bundle_accuracy"] == pytest.approx(written["reference_accuracy"], abs=0.01)


def test_golden_images_are_of_different_classes(bundle_of):
    classifier = Classifier(bundle_of("torchscript", "fp16"))
    images = sorted((bundle_of("torchscript", "fp16") / "golden/images").iterdir())
    answers = classifier.predict(images)
    assert len(images) == 8
    assert len({answer.label for answer in answers}) >= 7
    assert all(answer.score > 0.5 for answer in answers)  # of clear cases, too


def test_two_exports_of_one_checkpoint_answer_alike(checkpoint, bundles):
    images = sorted((checkpoint / "samples").glob("*.png"))[:20]
    answers = []
    for name in ("a", "b"):
        export_bundle(checkpoint, bundles / name, quick())
        answers.append(Classifier(bundles / name).predict(images))
    assert answers[0] == answers[1]


def test_labels_that_fp16_would_change_stop_the_export_and_leave_nothing(
    checkpoint, tmp_path, bundles
):
    lossy = changed(checkpoint, tmp_path / "lossy", nearly_tie)
    message = r"fp16: top-1 agreement is 0\.\d+ on 270 images.*No bundle was written.*fp32"
    with pytest.raises(VerificationFailed, match=message):
        export_bundle(lossy, bundles / "b", quick())
    assert list(bundles.iterdir()) == []
    export_bundle(lossy, bundles / "b", quick(precision="fp32"))  # as the message proposes


def test_a_failed_export_keeps_the_bundle_that_it_would_have_replaced(
    checkpoint, tmp_path, bundles
):
    export_bundle(checkpoint, bundles / "b", quick())
    before = (bundles / "b/manifest.json").read_bytes()
    lossy = changed(checkpoint, tmp_path / "lossy", nearly_tie)
    with pytest.raises(VerificationFailed):
        export_bundle(lossy, bundles / "b", quick(), overwrite=True)
    assert [entry.name for entry in bundles.iterdir()] == ["b"]
    assert (bundles / "b/manifest.json").read_bytes() == before
    export_bundle(checkpoint, bundles / "b", quick(seed=1), overwrite=True)
    assert read_bundle(bundles / "b").manifest.sampling.seed == 1


def test_an_interrupted_export_leaves_nothing(checkpoint, bundles):
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, bundles / "b", quick(), say=interrupt)
    assert list(bundles.iterdir()) == []


def test_a_weight_that_fp16_cannot_hold_is_named_and_bf16_proposed(checkpoint, tmp_path, bundles):
    large = changed(checkpoint, tmp_path / "large", overflow)
    message = r"classifier.weight holds 1e\+05, beyond the largest fp16 .*--precision bf16 or fp32"
    with pytest.raises(ExportError, match=message):
        export_bundle(large, bundles / "b", quick())
    assert list(bundles.iterdir()) == []
    export_bundle(large, bundles / "b", quick(precision="bf16", min_agreement=0.9))


def test_an_existing_output_is_refused_before_any_work(checkpoint, bundles):
    said: list[str] = []
    (bundles / "b").mkdir(parents=True)
    with pytest.raises(OutputExists, match=r"already exists.*--force"):
        export_bundle(checkpoint, bundles / "b", quick(), say=said.append)
    assert said == []


@pytest.mark.parametrize("unknown", [0, 1, 40])
def test_images_of_other_classes_verify_but_have_no_accuracy(
    checkpoint, tmp_path, bundles, unknown
):
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i, image in enumerate(sorted((checkpoint / "samples").glob("*.png"))[:40]):
        shutil.copy(image, data)
        label = "unheard of" if i < unknown else "7"
        lines.append(json.dumps({"file_name": image.name, "label": label}))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    fidelity = export_bundle(checkpoint, bundles / "b", quick(), data=data)
    assert fidelity.images == 40
    assert (fidelity.reference_accuracy is None) == (unknown > 0)
    assert fidelity.bundle_accuracy == fidelity.reference_accuracy


def test_a_checkpoint_without_samples_asks_for_data(checkpoint, digits, tmp_path, bundles):
    bare = changed(checkpoint, tmp_path / "bare", lambda weights: None)
    shutil.rmtree(bare / "samples")
    with pytest.raises(DataError, match="--no-samples, so name images to verify on with --data"):
        export_bundle(bare, bundles / "b", quick())
    assert export_bundle(bare, bundles / "b", quick(), data=digits).images == 270

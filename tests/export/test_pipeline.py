"""From checkpoint to bundle: all of it, or nothing and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import in_two_processes
from quick import kept
from safetensors.numpy import load_file, save_file

from marnet_export import seal, work
from marnet_export.build import torchscript
from marnet_export.build.types import Unread
from marnet_export.choose import steps
from marnet_export.job import export_bundle
from marnet_export.prove.bundle import check_receipt
from marnet_export.prove.checks import SKIPPED
from marnet_export.prove.fidelity import Fidelity
from marnet_export.settings import Settings
from marnet_sdk import Classifier
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import (
    BackendUnavailable,
    DataError,
    ExportError,
    InvalidInput,
    OutputExists,
    VerificationFailed,
)
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
    return Settings(
        **{"backend": "torchscript", "precision": "fp16", "min_agreement": 0.98, "text": False}
        | settings
    )


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    return tmp_path / "bundles"


@pytest.fixture(scope="module")
def ten_steps(checkpoint, tmp_path_factory) -> tuple[Fidelity, Path]:
    """This holds what an export returned, and the bundle."""
    path = tmp_path_factory.mktemp("bundles") / "b"
    with in_two_processes():
        return export_bundle(checkpoint, path, quick(steps=10, seed=3)), path


def test_the_manifest_says_what_was_asked_and_what_was_built(ten_steps, checkpoint):
    _, path = ten_steps
    manifest = read_bundle(path).manifest
    assert (manifest.method, manifest.backend) == ("marnet", "torchscript")
    assert manifest.labels == tuple("0123456789")
    assert (manifest.precision.asked, manifest.precision.compute) == ("fp16", "fp32")
    share = manifest.precision.receipt["all"]
    assert share.storage["fp16"] > 0.95
    assert share.compute == {"fp32": 1.0}
    assert manifest.settings["steps"] == 10
    assert manifest.sampling.point.timesteps == (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)
    assert (manifest.sampling.point.sampler, manifest.sampling.point.samples) == ("ddpm", 1)
    assert (manifest.sampling.noise, list(manifest.sampling.points)) == ("shared", ["default"])
    assert (manifest.sampling.train_steps, manifest.sampling.seed) == (100, 3)
    assert manifest.checkpoint_sha256 == checkpoint_hash(checkpoint)
    assert manifest.built_for.device == "cpu"
    assert {"python", "torch", "numpy"} <= manifest.built_for.packages.keys()
    assert manifest.batch_times is not None
    sizes, seconds = zip(*manifest.batch_times.seconds, strict=True)
    assert sizes == (1, 4, 16)
    assert all(0 < taken < 60 for taken in seconds)
    classifier = Classifier(path)
    assert manifest.batch_times.threads == classifier.runtime.threads
    assert classifier.preprocess.output_shape == (3, 32, 32)


@pytest.mark.slow
def test_a_receipt_that_cannot_be_read_stops_no_export_that_is_right(
    checkpoint, bundles, monkeypatch
):
    """It says so, as do the manifest, `inspect` and `verify`; the answers are compared as ever."""

    def unread(*_):
        raise Unread("it calls _new_kernel, which this version cannot count")

    export_bundle(checkpoint, bundles / "read", quick(steps=3))
    monkeypatch.setattr(torchscript, "BUILDER", replace(torchscript.BUILDER, products=unread))
    said: list[str] = []
    fidelity = export_bundle(checkpoint, bundles / "b", quick(steps=3), say=said.append)
    assert fidelity.top1_agreement >= 0.98
    assert any("not read back: it calls _new_kernel" in line for line in said)
    read, not_read = (
        read_bundle(bundles / name).manifest.precision.receipt for name in ("read", "b")
    )
    for part, share in not_read.items():
        assert share.storage == share.compute == {"not read back": 1.0}
        assert share.multiply_adds == read[part].multiply_adds
    check = check_receipt(read_bundle(bundles / "b"))
    assert (check.outcome, check.detail[:32]) == (SKIPPED, "not read back: it calls _new_ker")


def test_fidelity_travels_with_the_bundle(ten_steps):
    fidelity, path = ten_steps
    written = json.loads((path / "fidelity.json").read_text())
    own = json.loads(json.dumps(asdict(fidelity)))
    assert {key: written[key] for key in own} == own
    assert written["operating_points"] == {"default": own}
    assert written["images"] == 270
    assert "its golden logits differ by up to" in written["second_process"]
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


def test_the_checkpoint_travels_without_the_baseline_that_no_bundle_needs(checkpoint, bundle_of):
    source = bundle_of("torchscript", "fp32") / "source"
    kept = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    written = {p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()}
    assert written - kept == {Path("baseline.safetensors")}
    assert kept < written
    assert checkpoint_hash(source) == checkpoint_hash(checkpoint)


@pytest.mark.slow
def test_two_exports_of_one_checkpoint_answer_alike(checkpoint, bundles):
    images = sorted((checkpoint / "samples").glob("*.png"))[:20]
    answers = []
    for name in ("a", "b"):
        export_bundle(checkpoint, bundles / name, quick())
        answers.append(Classifier(bundles / name).predict(images))
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_labels_that_fp16_would_change_stop_the_export_and_leave_nothing(
    checkpoint, tmp_path, bundles
):
    lossy = changed(checkpoint, tmp_path / "lossy", nearly_tie)
    message = r"fp16: top-1 agreement is 0\.\d+ on 270 images.*No bundle was written.*fp32"
    with pytest.raises(VerificationFailed, match=message):
        export_bundle(lossy, bundles / "b", quick())
    assert list(bundles.iterdir()) == []
    export_bundle(lossy, bundles / "b", quick(precision="fp32"))  # as the message proposes


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("unknown", kept([0, 1, 40], {1}))
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


def test_a_checkpoint_without_samples_asks_for_data(checkpoint, tmp_path, bundles):
    bare = changed(checkpoint, tmp_path / "bare", lambda weights: None)
    shutil.rmtree(bare / "samples")
    with pytest.raises(DataError, match="--no-samples, so name images to verify on with --data"):
        export_bundle(bare, bundles / "b", quick())


def test_the_error_along_the_trajectory_and_the_instability_floor_are_reported(bundle_of):
    found = json.loads((bundle_of("torchscript", "fp32") / "fidelity.json").read_text())
    assert [row["step"] for row in found["trajectory"]][::11] == [1, 100]
    assert [row["t"] for row in found["trajectory"]][::11] == [100, 1]
    assert all(0 <= row["error"] < 1e-2 for row in found["trajectory"])
    floor = found["instability"]
    assert (floor["seeds"], floor["images"]) == ([0, 1, 2, 3, 4], 270)
    low, high = floor["interval"]
    assert low <= floor["share"] <= high
    settled = found["settled"]
    assert settled["samples"] == 8
    assert 4 <= settled["mean_samples"] < 8
    assert settled["agreement"] >= 0.97
    assert found["latency_ms"] > 0


@pytest.mark.slow
def test_half_precision_errs_along_the_whole_trajectory(bundle_of):
    def errors(precision: str) -> np.ndarray:
        file = bundle_of("torchscript", precision) / "fidelity.json"
        return np.array([row["error"] for row in json.loads(file.read_text())["trajectory"]])

    assert (errors("bf16") > 10 * errors("fp32")).all()


# --- operating points


def test_a_sweep_names_its_points_and_says_all_that_it_measured(swept_bundle):
    report = json.loads((swept_bundle / "pareto.json").read_text())
    sampling = read_bundle(swept_bundle).manifest.sampling
    names = {"exact", "fast", "balanced", "zero"}
    assert sampling.points.keys() == report["points"].keys() == names
    assert sampling.default == report["picked"]
    for name, point in sampling.points.items():
        told = report["points"][name]
        assert (point.sampler, len(point.timesteps), point.samples) == (
            *(told["sampler"], told["steps"], told["samples"]),
        )
    exact, fast = sampling.points["exact"], sampling.points["fast"]
    assert (exact.sampler, len(exact.timesteps), exact.samples) == ("ddpm", 100, 1)
    assert len(fast.timesteps) * fast.samples < 20
    measured = {(c["sampler"], c["steps"], c["samples"]) for c in report["candidates"]}
    samplers, steps = ("ddpm", "ddim", "dpmpp"), (1, 2, 5, 10, 20, 50, 100)
    with_loop = {(s, n, k) for s in samplers for n in steps for k in (1, 2, 4, 8)}
    assert measured == {*with_loop, ("none", 0, 1)}
    assert report["images"] == 270
    assert report["enough_images"]
    assert (swept_bundle / "pareto.png").read_bytes()[1:4] == b"PNG"
    assert not list(swept_bundle.glob("sweep*"))  # the graphs of the sweep are the payload


def test_every_point_is_verified_against_its_own_float32_process(swept_bundle):
    found = json.loads((swept_bundle / "fidelity.json").read_text())["operating_points"]
    assert found.keys() == {"exact", "fast", "balanced", "zero"}
    assert all(point["top1_agreement"] >= 0.95 for point in found.values())
    assert all(point["row_invariance"]["flips"] == 0 for point in found.values())


def test_the_fast_point_keeps_the_accuracy_on_images_that_chose_nothing(swept_bundle, digits):
    lines = (digits / "test/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    images = [digits / "test" / row["file_name"] for row in rows]
    truth = [row["label"] for row in rows]

    def accuracy(point: str) -> float:
        answers = Classifier(swept_bundle, operating_point=point).predict(images)
        return float(np.mean([a.label == t for a, t in zip(answers, truth, strict=True)]))

    assert accuracy("fast") >= accuracy("exact") - 0.03


def test_the_zero_step_point_is_served_unless_the_loop_is_shown_to_help(swept_bundle):
    report = json.loads((swept_bundle / "pareto.json").read_text())
    rows = report["candidates"]
    (zero,) = [row for row in rows if row["steps"] == 0]
    assert zero == report["points"]["zero"] | {"non_dominated": zero["non_dominated"]}
    best = max(row["over_zero"][1] for row in rows if row["steps"])
    helps = "is shown to help" if best > 0 else "is not shown to help"
    assert report["picked"] == ("fast" if best > 0 else "zero")
    assert f"the loop {helps} here" in report["reason"]
    assert all(
        row["over_zero"][0] == pytest.approx(row["accuracy"] - zero["accuracy"])
        for row in rows
        if row["steps"]
    )


@pytest.mark.slow
def test_a_set_too_small_to_tell_says_how_many_images_would_do(checkpoint, bundles):
    said: list[str] = []
    settings = quick(steps="auto", sampler="ddim", samples=1, max_drop=0.001)
    export_bundle(checkpoint, bundles / "b", settings, say=said.append)
    sampling = read_bundle(bundles / "b").manifest.sampling
    assert sampling.points["fast"] == sampling.points["exact"]
    if sampling.default == "zero":
        need = "to show at most 0.10%, 1958 images or more are needed"
    else:
        need = "270 images cannot show"
    assert any(need in line for line in said)
    assert not json.loads((bundles / "b/pareto.json").read_text())["enough_images"]


@pytest.mark.slow
def test_a_latency_budget_that_nothing_keeps_is_refused(checkpoint, bundles):
    settings = quick(steps="auto", sampler="ddim", samples=1, max_drop=0.05, latency_budget_ms=1e-6)
    with pytest.raises(VerificationFailed, match="no candidate that passes takes at most 1e-06 ms"):
        export_bundle(checkpoint, bundles / "b", settings)
    assert list(bundles.iterdir()) == []


@pytest.mark.slow
def test_precision_can_be_swept_too(checkpoint, bundles):
    settings = quick(precision="auto", steps="auto", sampler="ddim", samples=1, max_drop=0.05)
    export_bundle(checkpoint, bundles / "b", settings)
    report = json.loads((bundles / "b/pareto.json").read_text())
    assert {c["precision"] for c in report["candidates"]} == {"fp32", "bf16", "fp16"}
    manifest = read_bundle(bundles / "b").manifest
    asked = {point["precision"] for point in report["points"].values()}
    # A bundle holds one graph, so its points are chosen among those of the precision picked.
    assert manifest.precision.receipt["all"].storage[manifest.precision.asked] > 0.9
    assert manifest.precision.asked in {c["precision"] for c in report["candidates"]}
    assert asked <= {"fp32", "bf16", "fp16"}
    assert not list((bundles / "b").glob("sweep*"))


@pytest.fixture
def no_fp16(monkeypatch) -> Settings:
    """A sweep of precisions where fp16 builds and does not open."""
    opened = work.open_built

    def refuse(backend, payload, compute, device):
        if payload.name == "sweep-fp16":
            raise BackendUnavailable("no fp16 on this processor")
        return opened(backend, payload, compute, device)

    monkeypatch.setattr(work, "open_built", refuse)
    return quick(precision="auto", steps="auto", sampler="ddim", samples=1, max_drop=0.05)


@pytest.mark.slow
def test_a_precision_that_cannot_be_opened_leaves_nothing_in_the_bundle(
    checkpoint, bundles, monkeypatch, no_fp16
):
    monkeypatch.setattr(steps, "FLOATS", ("fp16", "fp32"))
    said: list[str] = []
    export_bundle(checkpoint, bundles / "b", no_fp16, say=said.append)
    assert "fp16 is left out: no fp16 on this processor" in said
    bundle = read_bundle(bundles / "b")
    assert bundle.manifest.precision.asked == "fp32"
    assert not [name for name in bundle.manifest.files if name.startswith("sweep")]


def test_where_no_precision_can_be_opened_each_is_named(checkpoint, bundles, monkeypatch, no_fp16):
    monkeypatch.setattr(steps, "FLOATS", ("fp16",))
    message = r"no precision can be built: fp16 is left out: no fp16 on this processor"
    with pytest.raises(ExportError, match=message):
        export_bundle(checkpoint, bundles / "none", no_fp16)
    assert list(bundles.iterdir()) == []


def test_a_bundle_of_tensorrt_names_the_library_that_its_engines_depend_on(monkeypatch):
    monkeypatch.setattr(seal, "versions", lambda packages: dict.fromkeys(packages, "1"))
    found = seal.built_for(Settings("tensorrt", device="cuda")).packages
    assert {"tensorrt", "tensorrt_rtx"} <= found.keys()
    assert "tensorrt_rtx" not in seal.built_for(Settings("openvino")).packages


def test_a_sweep_needs_classes_that_the_checkpoint_knows(checkpoint, tmp_path, bundles):
    data = tmp_path / "data"
    data.mkdir()
    image = min((checkpoint / "samples").glob("*.png"))
    shutil.copy(image, data)
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": image.name, "label": "cow"}))
    for settings, match in (
        (quick(steps="auto"), "--steps auto compares accuracies"),
        (quick(target_risk=0.1), "--target-risk needs images whose classes"),
    ):
        with pytest.raises(DataError, match=match):
            export_bundle(checkpoint, bundles / "b", settings, data=data)


# --- risk


def test_the_threshold_of_a_target_risk_travels_with_its_curve(swept_bundle):
    sampling = read_bundle(swept_bundle).manifest.sampling
    report = json.loads((swept_bundle / "risk_coverage.json").read_text())
    assert report["operating_points"].keys() == sampling.points.keys()
    for name, curve in report["operating_points"].items():
        chosen = curve["chosen"]
        assert chosen["threshold"] == sampling.points[name].abstain_below
        assert chosen["risk"] <= chosen["upper_bound"] <= chosen["target"] == 0.04
        at = curve["threshold"].index(chosen["threshold"])
        assert curve["coverage"][at] == chosen["coverage"]
        assert curve["coverage"][-1] == 1
    assert (swept_bundle / "risk_coverage.png").read_bytes()[1:4] == b"PNG"


def test_without_a_target_the_curve_is_written_and_no_threshold(bundle_of):
    path = bundle_of("torchscript", "fp16")
    report = json.loads((path / "risk_coverage.json").read_text())
    assert "chosen" not in report["operating_points"]["default"]
    assert read_bundle(path).manifest.sampling.point.abstain_below is None


def test_a_risk_that_cannot_be_shown_stops_the_export(checkpoint, bundles):
    with pytest.raises(VerificationFailed, match=r"270 images cannot show a risk below 0\.10%"):
        export_bundle(checkpoint, bundles / "b", quick(target_risk=0.001))
    assert list(bundles.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "onnx"}, "backend: got 'onnx', expected one of"),
        ({"sampler": "euler"}, "sampler: got 'euler', expected one of ddpm, ddim, dpmpp"),
        ({"route": "torch-tensorrt"}, "route: got 'torch-tensorrt' for torchscript; it is for"),
        ({"route": "trt"}, "route: got 'trt', expected one of onnx, torch-tensorrt"),
        ({"noise": "none"}, "noise: got 'none', expected one of shared, image"),
        ({"sampler": "dpmpp", "eta": 0.5}, "eta: got 0.5, but it is for ddim"),
        ({"eta": 0.5}, "eta: got 0.5, but it is for ddim: add --sampler ddim"),
        ({"max_drop": 1.0}, "max_drop: got 1.0, expected more than 0, less than 1"),
        ({"target_risk": 0.0}, "target_risk: got 0.0, expected more than 0, less than 1"),
        (
            {"steps": "auto", "latency_budget_ms": 0},
            "latency_budget_ms: got 0, expected more than 0, less than inf",
        ),
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected 0"),
        ({"precision": "auto"}, "precision: got 'auto', expected one of fp32, bf16, fp16"),
        ({"latency_budget_ms": 3.0}, "a latency budget is for choosing steps: add --steps auto"),
    ],
)
def test_settings_that_do_not_exist_are_refused(setting, message):
    with pytest.raises(InvalidInput, match=message):
        quick(**setting)


@pytest.mark.parametrize(
    ("backend", "device", "built_for", "targets"),
    [
        ("torchscript", None, "cpu", ()),
        ("torchscript", "cuda", "cuda", ("sm90 NVIDIA H100",)),
        ("aotinductor", "cuda", "cuda", ("sm90 NVIDIA H100",)),
        ("onnxruntime", None, "cpu", ()),
    ],
)
def test_the_manifest_says_which_device_and_which_gpu_it_was_built_for(
    monkeypatch, tmp_path, backend, device, built_for, targets
):
    monkeypatch.setattr(seal, "gpu_name", lambda: ("sm90", "NVIDIA H100"))
    found = seal.built_for(Settings(backend, device=device))
    assert (found.device, found.targets) == (built_for, targets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["torchscript", "aotinductor"])
def test_a_bundle_for_this_machine_s_gpu_is_verified_on_it(
    checkpoint, tmp_path, backend, precision
):
    settings = Settings(backend, precision, device="cuda", min_agreement=0.98)
    export_bundle(checkpoint, tmp_path / "b", settings)
    classifier = Classifier(tmp_path / "b")
    manifest = classifier.bundle.manifest
    assert (manifest.built_for.device, manifest.precision.compute) == ("cuda", precision)
    report = classifier.runtime
    assert report is not None
    assert report.fallbacks == {}
    assert report.replays > 0

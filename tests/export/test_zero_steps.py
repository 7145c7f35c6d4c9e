"""The zero-step point is built, measured, verified and rebuilt as every other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from tiny import make_model
from tolerances import FLOAT32_LAYER

from marnet_export import work
from marnet_export.build.builder import USUAL
from marnet_export.build.types import Arithmetic, Types
from marnet_export.bundle_cli import main
from marnet_export.choose import steps as choose_steps
from marnet_export.choose.steps import explain
from marnet_export.job import export_bundle
from marnet_export.lower.methods import lower
from marnet_export.lower.zero_steps import (
    alignment_head,
    check_branch,
    process_table,
    write_head,
)
from marnet_export.prove.departure import diagnose
from marnet_export.prove.reference import Reference
from marnet_export.prove.trial import Built, Trial
from marnet_export.settings import Settings
from marnet_sdk import Classifier
from marnet_sdk.backends import open_backend
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.errors import ExportError, InvalidInput
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import ScheduleConfig, sampler_table


def bundle_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def zero(zero_bundle) -> Path:
    return zero_bundle("torchscript", "fp32")


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 16 images."""
    folder = tmp_path_factory.mktemp("data") / "few"
    shutil.copytree(digits / "val", folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()[:16]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


# --- parts


def test_no_steps_are_a_table_without_rows_and_others_the_sampler_s():
    schedule = ScheduleConfig(steps=9)
    none = process_table(schedule, "ddim", 0)
    assert (none.sampler, none.timesteps, none.coefficients.shape) == ("none", (), (0, 4))
    for steps in (3, None):
        got, want = process_table(schedule, None, steps), sampler_table(schedule, "ddpm", steps)
        assert got.timesteps == want.timesteps
        np.testing.assert_array_equal(got.coefficients, want.coefficients)


@torch.inference_mode()
def test_the_reference_without_a_loop_is_the_alignment_branch():
    model = make_model()
    pixels = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
    table = process_table(model.config.schedule, None, 0)
    x_v = model.vision(torch.from_numpy(pixels))
    want = model.alignment_classifier(model.align_vision(x_v)).numpy()
    got = Reference(model, pixels).logits(table, seed=3)
    np.testing.assert_allclose(got, want[:, None], atol=FLOAT32_LAYER)
    assert len(Reference(model, pixels).logits(table, 0, limit=2)) == 2
    model.alignment_classifier.bias[0] = torch.nan
    with pytest.raises(ExportError, match=r"the alignment branch of the float32 checkpoint gives"):
        Reference(model, pixels).logits(table, 0)


def test_a_method_without_the_branch_has_no_head_and_a_broken_one_is_named(tmp_path):
    model = make_model()
    lowered = lower(model)
    for alignment in (None, replace(lowered.alignment, classifier=None)):
        bare = replace(lowered, alignment=alignment)
        assert alignment_head(bare) is None
        with pytest.raises(ExportError, match="method 'other' has none; choose 1 or more steps"):
            check_branch(bare, "other")
    with torch.no_grad():
        model.alignment_classifier.weight[0, 0] = torch.inf
    with pytest.raises(ExportError, match="classifier_weight of the alignment branch holds NaN"):
        write_head(lower(model), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"sampler": "ddim"}, {"samples": 4}, {"sampler": "ddim", "eta": 0.5}],
)
def test_what_needs_a_loop_is_refused_without_one(settings):
    with pytest.raises(InvalidInput, match=r"steps: got 0, so nothing is sampled, .*leave these"):
        Settings("torchscript", steps=0, **settings)
    Settings("torchscript", steps=0, samples=1)


# --- a bundle


def test_zero_steps_answer_and_the_process_as_trained_is_there_too(zero):
    manifest = read_bundle(zero).manifest
    points = manifest.sampling.points
    assert points.keys() == {"exact", "zero"}
    assert manifest.sampling.default == "zero"
    assert (points["exact"].sampler, len(points["exact"].timesteps)) == ("ddpm", 100)
    assert (points["zero"].sampler, points["zero"].timesteps) == ("none", ())
    assert points["zero"].samples == 1
    assert "payload/tables.safetensors" not in manifest.files  # nothing reads them


def test_every_point_is_verified_and_nothing_is_said_of_noise(zero):
    found = json.loads((zero / "fidelity.json").read_text())
    points = found["operating_points"]
    assert points.keys() == {"exact", "zero"}
    assert points["zero"]["top1_agreement"] >= 0.98
    assert points["zero"]["row_invariance"]["flips"] == 0
    assert found["top1_agreement"] == points["zero"]["top1_agreement"]
    assert found["trajectory"] == []
    assert not {"instability", "settled"} & found.keys()


def test_the_receipt_counts_the_encoder_and_the_two_matrices(zero, bundle_of):
    found = read_bundle(zero).manifest.precision.receipt
    plain = read_bundle(bundle_of("torchscript", "fp32")).manifest.precision.receipt
    arrays = load_file(zero / "payload/alignment.safetensors")
    assert found.keys() == {"encoder", "head", "all"}
    assert found["encoder"] == plain["encoder"]
    own = arrays["vision_weight"].size + arrays["classifier_weight"].size
    assert found["head"].multiply_adds == own
    assert found["all"].multiply_adds == own + plain["encoder"].multiply_adds


@pytest.mark.slow
def test_the_head_is_float32_whatever_the_precision(zero_bundle):
    arrays = load_file(zero_bundle("torchscript", "fp16") / "payload/alignment.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_explaining_no_loop_says_so(checkpoint):
    rows, sentence = explain(checkpoint, Settings("torchscript", steps=0))
    assert rows
    assert sentence.startswith("no reverse loop: the alignment branch answers")


def test_inspect_and_verify_know_it(zero, few):
    said = one_line(bundle_command("inspect", zero).stdout)
    assert "zero (answers) none 0 1 - " in said
    result = bundle_command("verify", zero, "--data", few)
    assert result.exit_code == 0, result.stderr
    said = one_line(result.stdout)
    for text in (
        "golden answers, zero passed reproduced in no loop",
        "golden answers, exact passed reproduced in 100 ddpm steps",
        "alignment branch passed it is the checkpoint's",
        "agreement, zero passed",
        "agreement, exact passed",
    ):
        assert text in said


@pytest.mark.slow
def test_verify_finds_a_head_that_changes_no_answer_by_much(zero, few, tmp_path):
    copy = shutil.copytree(zero, tmp_path / "b")
    file = copy / "payload/alignment.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"vision_bias": 1.0001 * arrays["vision_bias"]}, file)
    reseal_bundle(copy)
    result = bundle_command("verify", copy, "--data", few)
    assert result.exit_code == 3
    assert "vision_bias is not the checkpoint's" in one_line(result.stderr)


@pytest.mark.slow
def test_verify_says_that_the_head_departs_where_the_encoder_agrees(zero, few, tmp_path):
    copy = shutil.copytree(zero, tmp_path / "b")
    file = copy / "payload/alignment.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"classifier_weight": -arrays["classifier_weight"]}, file)
    reseal_bundle(copy)
    result = bundle_command("verify", copy, "--data", few)
    assert result.exit_code == 3
    assert "what is left is the alignment branch's head behind them" in one_line(result.stderr)


def test_an_encoder_that_agrees_leaves_nothing_to_blame(zero, checkpoint):
    model = load_checkpoint(checkpoint).model
    bundle = read_bundle(zero)
    images = sorted((checkpoint / "samples").glob("*.png"))[:8]
    pixels = bundle.manifest.preprocessing.pixels(images)
    plan = load_file(bundle.path / "payload/plan.safetensors")
    backend = open_backend("torchscript", bundle.path / "payload", "fp32", 1)
    built = Built(backend, plan, bundle.manifest.sampling, pixels)
    tables = {"zero": process_table(model.config.schedule, None, 0)}
    trial = Trial(
        Reference(model, pixels), built, None, tables, min_agreement=0.999, row_tolerance=0.02
    )
    types = Arithmetic(Types("fp32", "fp32"), Types("fp32", "fp32"))
    what = (bundle.path / "payload", lower(model), "torchscript", types, USUAL)
    found = diagnose(trial, "zero", *what)
    assert found.part == "none"
    assert "what is left is the alignment branch's head behind them" in found.sentence


@pytest.mark.slow
def test_a_bundle_is_rebuilt_without_the_loop_and_with_it_again(bundle_of, few, tmp_path):
    out = tmp_path / "zero"
    plain = shutil.copytree(bundle_of("onnxruntime", "fp32"), tmp_path / "plain")
    more = ("--data", few, "--min-agreement", "0.9", "--no-text")
    changed = ("--steps", "5", "--sampler", "ddim", "--samples", "2")
    result = bundle_command("rebuild", plain, *changed, *more)
    assert result.exit_code == 0, result.stderr
    result = bundle_command("rebuild", plain, "--steps", "0", "-o", out, *more)
    assert result.exit_code == 0, result.stderr
    assert read_bundle(out).manifest.sampling.default == "zero"
    said = one_line(bundle_command("diff", plain, out, "--no-run").stdout)
    assert "payload/alignment.safetensors" in said
    assert bundle_command("diff", plain, out).exit_code in (0, 1)  # other labels, or not
    result = bundle_command("rebuild", out, "--samples", "4", *more)
    assert result.exit_code == 2
    assert "steps: got 0, so nothing is sampled" in one_line(result.stderr)


@pytest.mark.slow
def test_int8_ranges_of_the_loop_are_those_of_the_process_as_trained(checkpoint, tmp_path):
    settings = Settings("onnxruntime", "int8", steps=0, min_agreement=0.9, text=False)
    export_bundle(checkpoint, tmp_path / "b", settings)
    receipt = read_bundle(tmp_path / "b").manifest.precision.receipt
    assert receipt["encoder"].compute["int8"] > 0.9
    assert receipt["head"].compute == {"fp32": 1.0}
    images = sorted((checkpoint / "samples").glob("*.png"))[:5]
    exact = Classifier(tmp_path / "b", operating_point="exact")
    assert np.isfinite(exact.embed(images)).all()


# --- how many samples


@pytest.mark.slow
def test_an_export_takes_the_checkpoint_s_number_of_samples(checkpoint, tmp_path, monkeypatch):
    def loaded(path: Path):
        found = load_checkpoint(path)
        object.__setattr__(found.model.config, "samples", 3)
        return found

    for module in (work, choose_steps):
        monkeypatch.setattr(module, "load_checkpoint", loaded)
    lenient = Settings("torchscript", steps=2, min_agreement=0.9, text=False)
    export_bundle(checkpoint, tmp_path / "b", lenient)
    assert read_bundle(tmp_path / "b").manifest.sampling.point.samples == 3
    assert "3 chains an image" in explain(checkpoint, lenient)[1]
    export_bundle(checkpoint, tmp_path / "c", replace(lenient, samples=1))
    assert read_bundle(tmp_path / "c").manifest.sampling.point.samples == 1
    swept = replace(lenient, steps="auto", sampler="ddim", samples=1, max_drop=0.05)
    export_bundle(checkpoint, tmp_path / "d", swept)
    assert read_bundle(tmp_path / "d").manifest.sampling.points["exact"].samples == 3

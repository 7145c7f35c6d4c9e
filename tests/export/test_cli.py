"""marnet-export as it is typed."""

from __future__ import annotations

import os
import re
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from marnet_export.choose import race
from marnet_export.cli import main
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import ExportError


@pytest.fixture
def workplace(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/older and runs/newer, and nothing else."""
    for age, name in enumerate(("newer", "older")):
        shutil.copytree(checkpoint, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name, (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def one_line(text: str) -> str:
    """Messages without the line breaks of a narrow terminal."""
    return " ".join(text.split())


# A model that was trained for seconds has labels with small margins.
LENIENT = ("--min-agreement", "0.98", "--no-text", "--loop", "graph")
TORCHSCRIPT = ("--backend", "torchscript", *LENIENT)


@pytest.mark.slow
def test_the_newest_checkpoint_becomes_a_bundle_of_the_fastest_backend(workplace, monkeypatch):
    backends = ("onnxruntime", "tensorrt", "torchscript")
    chosen = {name: race.BUILDERS[name] for name in backends}
    monkeypatch.setattr(race, "BUILDERS", chosen)
    reasons = {"tensorrt": "no driver"}
    monkeypatch.setattr(race, "why_unavailable", reasons.get)
    result = export("--precision", "fp16", "--steps", "10", *LENIENT)
    assert result.exit_code == 0, result.stderr
    assert [entry.name for entry in Path("bundles").iterdir()] == ["newer-fp16.marnet"]
    backend = read_bundle("bundles/newer-fp16.marnet").manifest.backend
    said = one_line(result.stderr)
    assert f"{backend} is the fastest here" in said
    assert all(re.search(rf"{name}: [\d.]+ ms for 1, ", said) for name in ("onnxruntime", backend))
    assert "tensorrt: unavailable: no driver" in said
    assert "verified on 270 images: top-1 agreement" in said
    assert "Next: marnet-classify IMAGE --model bundles/newer-fp16.marnet" in said


def test_the_newest_checkpoint_becomes_a_bundle_named_after_it(workplace):
    result = export("--precision", "fp16", *TORCHSCRIPT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert [entry.name for entry in Path("bundles").iterdir()] == ["newer-torchscript-fp16.marnet"]
    said = one_line(result.stderr)
    assert "checkpoint runs/newer (the newest" in said
    assert "fp16: weights stored in fp16, products computed in fp32, because" in said
    assert "verified on 270 images: top-1 agreement" in said
    assert "wrote bundles/newer-torchscript-fp16.marnet" in said
    next_line = "Next: marnet-classify IMAGE --model bundles/newer-torchscript-fp16.marnet"
    assert next_line in said


@pytest.mark.slow
def test_by_default_the_same_export_replaces_its_bundle_and_another_one_has_its_own(workplace):
    """The default name is of our own choosing; a name that was given is protected, see below."""
    for seed in ("1", "2", "2"):
        chosen = ("--precision", "fp16", "--seed", seed, *TORCHSCRIPT)
        result = export(*chosen)
        assert result.exit_code == 0, result.stderr
    assert "replaced bundles/newer-torchscript-fp16-2.marnet" in one_line(result.stderr)
    first, second = (Path(f"bundles/newer-torchscript-fp16{x}.marnet") for x in ("", "-2"))
    assert sorted(Path("bundles").iterdir()) == sorted([first, second])
    assert [read_bundle(x).manifest.sampling.seed for x in (first, second)] == [1, 2]


@pytest.mark.slow
def test_a_checkpoint_called_dot_still_names_its_bundle_after_its_folder(workplace, monkeypatch):
    monkeypatch.chdir(workplace / "runs/older")
    assert export("--checkpoint", ".", *TORCHSCRIPT).exit_code == 0
    assert Path("bundles/older-torchscript-fp32.marnet/manifest.json").is_file()


def test_disagreement_exits_with_3_and_writes_nothing(workplace):
    file = workplace / "runs/newer/model.safetensors"
    weights = load_file(file)
    for name in ("classifier.weight", "classifier.bias"):  # classes told apart by less than 2^-11
        weights[name] = (1 + 0.001 * weights[name]).astype(np.float32)
    save_file(weights, file)
    result = export("--precision", "fp16", "--checkpoint", "runs/newer", *TORCHSCRIPT[:2])
    assert result.exit_code == 3
    said = one_line(result.stderr)
    assert "torchscript fp16: top-1 agreement is" in said
    assert "at least 0.999 was asked" in said
    assert "No bundle was written" in said
    assert list(Path("bundles").iterdir()) == []


def test_the_verification_images_can_be_named(workplace, digits):
    (workplace / "data").mkdir()
    shutil.copytree(digits / "test", workplace / "data/val")
    lines = (workplace / "data/val/metadata.jsonl").read_text().splitlines()
    (workplace / "data/val/metadata.jsonl").write_text("\n".join(lines[:25]))
    result = export("--data", "data", *TORCHSCRIPT)
    assert result.exit_code == 0, result.stderr
    assert "verified on 25 images" in one_line(result.stderr)


def test_a_type_that_the_backend_cannot_compute_in_is_refused_with_one_that_can(workplace):
    result = export("--backend", "onnxruntime", "--compute", "bf16")
    assert result.exit_code == 1
    assert "onnxruntime cannot compute in bf16 here" in one_line(result.stderr)
    assert "--backend aotinductor or openvino" in one_line(result.stderr)
    assert not Path("bundles").exists()


@pytest.mark.slow
def test_an_existing_bundle_of_a_given_name_is_replaced_only_by_force(workplace):
    assert export("-o", "b", *TORCHSCRIPT).exit_code == 0
    refused = export("-o", "b", "--seed", "1", *TORCHSCRIPT)
    assert refused.exit_code == 2
    assert "already exists" in refused.stderr
    assert "--force" in refused.stderr
    assert read_bundle("b").manifest.sampling.seed == 0
    assert export("-o", "b", "--seed", "1", "--force", *TORCHSCRIPT).exit_code == 0
    assert read_bundle("b").manifest.sampling.seed == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp61"), "Did you mean 'fp16'?"),
        (("--backend", "onnx"), "Did you mean 'onnxruntime'?"),
        (("--backend", "torch-script"), "Did you mean 'torchscript'?"),
        (("--steps", "-1"), "'--steps': -1 is not in the range x>=0"),
        (("--steps", "0", "--samples", "4"), "steps: got 0, so nothing is sampled"),
        (("--steps", "otto"), "'otto' is not a valid integer"),
        (("--sampler", "dpmp"), "Did you mean 'dpmpp'?"),
        (("--device", "gpu"), "'gpu' is not one of 'cpu', 'cuda'"),
        (("--max-drop", "0"), "0.0 is not in the range 0<x<100"),
        (("--target-risk", "1"), "1.0 is not in the range 0<x<1"),
        (("--latency-budget-ms", "3"), "a latency budget is for choosing steps: add --steps auto"),
        (("--precision", "auto"), "precision: got 'auto', expected one of fp32, bf16, fp16, int8"),
        (("--steps", "101"), "got 101 sampling steps; the model was trained with T = 100"),
        (("--min-agreement", "99.9"), "99.9 is not in the range 0<=x<=1"),
        (("--checkpoint", "runs"), "runs is not a checkpoint: it needs config.json"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_right(workplace, arguments, message):
    result = export("--backend", "torchscript", *arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_without_a_checkpoint_the_command_that_trains_one_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export("--precision", "fp16")
    assert result.exit_code == 2
    assert "train one with: marnet-train fit" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("backend", "code", "message"),
    [
        ("torchscript", 5, "torchscript cannot run on cuda: torch "),
        ("aotinductor", 5, "is built without CUDA; install one with it: pip install torch --index"),
        (
            "onnxruntime",
            1,
            "onnxruntime builds for cpu alone, got --device cuda; leave --devi",
        ),
        ("auto", 5, "nothing runs on cuda here: aotinductor: "),
    ],
)
def test_without_a_gpu_the_export_for_one_ends_before_anything_is_built(
    workplace, monkeypatch, backend, code, message
):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(race, "why_unavailable", lambda name: "no driver")
    result = export("--device", "cuda", "--precision", "fp16", "--backend", backend)
    assert result.exit_code == code
    assert message in one_line(result.stderr)
    assert not Path("bundles").exists()


def test_explain_says_what_the_rewrite_saves_and_builds_nothing(workplace):
    chosen = ("--sampler", "ddim", "--steps", "5", "--samples", "3", "--noise", "image")
    result = export("--explain", *chosen)
    assert result.exit_code == 0, result.stderr
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in result.stdout.splitlines()}
    before, after = rows["multiply-adds, per image and step"]
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
    assert rows["matrix products one after another, per step"] == ["4", "3"]
    assert any(row.startswith("weights read, bytes per step") for row in rows)
    said = one_line(result.stderr)
    assert "5 ddim steps, 3 chains an image, the hidden state carried" in said
    assert "noise keyed by image:" in said
    assert not Path("bundles").exists()


def test_what_is_asked_for_reaches_the_bundle_and_its_name(workplace):
    built = ("--backend", "torchscript", "--precision", "fp16", "--device", "cpu")
    process = ("--steps", "10", "--sampler", "ddim", "--eta", "0.5", "--samples", "2")
    noise = ("--noise", "image", "--seed", "11")
    result = export("--checkpoint", "runs/older", *built, *process, *noise, *LENIENT)
    assert result.exit_code == 0, result.stderr
    (path,) = Path("bundles").iterdir()
    assert path.name == "older-torchscript-cpu-fp16.marnet"
    manifest = read_bundle(path).manifest
    assert manifest.backend == "torchscript"
    assert (manifest.built_for.device, manifest.settings["device"]) == ("cpu", "cpu")
    assert (manifest.precision.asked, manifest.precision.compute) == ("fp16", "fp32")
    sampling, point = manifest.sampling, manifest.sampling.point
    assert (point.sampler, point.eta, len(point.timesteps), point.samples) == ("ddim", 0.5, 10, 2)
    assert (sampling.noise, sampling.seed) == ("image", 11)
    assert "noise keyed by image:" in one_line(result.stderr)
    assert "instability floor:" in one_line(result.stderr)


def test_help_shows_the_usual_command_and_the_defaults():
    text = one_line(export("--help").stdout)
    assert "marnet-export --precision fp16" in text
    assert "[auto|aotinductor|onnxruntime|openvino|tensorrt|torchscript]" in text
    assert "[fp32|bf16|fp16|int8|auto]" in text
    assert "[cpu|cuda] What the bundle runs on: the processor, or cuda, an NVIDIA GPU" in text
    assert "[default: auto]" in text


def test_three_calls_lead_from_the_command_to_the_exporter(workplace, monkeypatch):
    """So a reader finds what writes a graph."""
    calls: list[str] = []

    def stop(**_: object) -> None:
        stack = traceback.extract_stack()
        calls.extend(frame.name for frame in stack if "marnet_export" in frame.filename)
        raise ExportError("far enough")

    monkeypatch.setattr(torch.onnx, "export", stop)
    result = export("--backend", "onnxruntime", *LENIENT)
    assert "far enough" in result.stderr
    assert calls == ["main", "export_bundle", "build_encoder"]

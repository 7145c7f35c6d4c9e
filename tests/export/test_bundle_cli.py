"""marnet-bundle as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper
from quick import kept
from safetensors.numpy import load_file, save_file

from marnet_export import rebuild as rebuilding
from marnet_export.bundle_cli import main
from marnet_export.prove import trial
from marnet_export.prove.bundle import verify_again
from marnet_export.prove.checks import check_second_process
from marnet_export.settings import Settings
from marnet_sdk import Classifier
from marnet_sdk.bundle import Manifest, read_bundle, seal_bundle
from marnet_sdk.commands.classify import main as classify

Change = Callable[[Path], None]


def bundle_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    """Messages without the line breaks and columns of a table."""
    return " ".join(text.split())


def reseal(bundle: Path, copy: Path, change: Change | None = None, **changed: Any) -> Path:
    """A copy with a changed file or field and a manifest that is right about all its bytes."""
    shutil.copytree(bundle, copy)
    manifest = read_bundle(copy).manifest
    if change is not None:
        change(copy)
    kept = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "files"}
    seal_bundle(copy, kept | changed)
    return copy


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop_source(bundle: Path) -> None:
    shutil.rmtree(bundle / "source")


@pytest.fixture(scope="module")
def bundle(bundle_of) -> Path:
    return bundle_of("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory) -> Path:
    """Sixteen images to verify on."""
    folder = tmp_path_factory.mktemp("data") / "few"
    shutil.copytree(digits / "test", folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:16]))
    return folder


@pytest.fixture
def moved(bundle_of, tmp_path, monkeypatch) -> Path:
    """A copy, as another machine gets it, in the working directory and without text encoder."""
    monkeypatch.chdir(tmp_path)
    original = bundle_of("torchscript", "fp32")
    settings = read_bundle(original).manifest.settings | {"text": False, "steps": 5}
    return reseal(
        original, tmp_path / "moved.marnet", lambda b: shutil.rmtree(b / "text"), settings=settings
    )


# --- inspect


def test_inspect_says_what_a_bundle_is(bundle_of):
    path = bundle_of("torchscript", "fp16")
    result = bundle_command("inspect", path)
    assert result.exit_code == 0, result.stderr
    said = one_line(result.stdout)
    manifest = read_bundle(path).manifest
    for text in (
        "method marnet",
        "labels 10: 0, 1, 2, 3, 4, ...",
        "backend torchscript",
        "precision asked fp16, loop fp16",
        "noise shared, seed 0",
        "golden images 8,",
        "fidelity verified on 270 images: top-1 agreement",
        "default (answers) ddpm 100 1 -",
        f"torch {manifest.built_for.packages['torch']} {manifest.built_for.packages['torch']}",
        "holds besides the text encoder and the checkpoint",
        manifest.checkpoint_sha256,
        json.loads((path / "manifest.json").read_text())["digest"],
    ):
        assert text in said
    receipt = manifest.precision.receipt
    for part in ("encoder", "loop", "head", "all"):
        share = receipt[part].storage["fp16"]
        assert f"{part} {receipt[part].multiply_adds:,}" in said
        assert f"fp16 {share:.2%}" in said
    assert f"Next: marnet-bundle verify {path}" in one_line(result.stderr)


def test_inspect_gives_json(swept_bundle):
    result = bundle_command("inspect", swept_bundle, "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    manifest = read_bundle(swept_bundle).manifest
    assert list(found["sampling"]["points"]) == list(manifest.sampling.points)
    assert found["here"]["differ"] == {}
    assert (found["text"], found["source"]) == (False, True)
    total = sum(entry["bytes"] for entry in manifest.files.values())
    assert sum(size["bytes"] for size in found["sizes"].values()) == total
    assert found["fidelity"] == json.loads((swept_bundle / "fidelity.json").read_text())


def test_inspect_names_the_versions_that_differ_here(bundle, tmp_path):
    built_for = read_bundle(bundle).manifest.built_for
    packages = built_for.packages | {"numpy": "1.0", "unheard-of": "2"}
    changed = replace(built_for, machine="riscv64", packages=packages, targets=("sm90",))
    copy = reseal(bundle, tmp_path / "b", built_for=changed)
    said = one_line(bundle_command("inspect", copy).stdout)
    assert "machine cpu riscv64 (sm90)" in said
    assert f"numpy 1.0 {built_for.packages['numpy']} (differs)" in said
    assert "unheard-of 2 not installed (differs)" in said


def test_inspect_lists_the_backends_that_were_tried(bundle, tmp_path):
    def race(copy: Path) -> None:
        file = copy / "fidelity.json"
        tried = [
            {"backend": "onnxruntime", "outcome": "passed", "milliseconds": {"1": 1.5, "16": 9.25}},
            {"backend": "openvino", "outcome": "refused", "reason": "it does not agree"},
        ]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"backends": tried}))

    said = one_line(bundle_command("inspect", reseal(bundle, tmp_path / "b", race)).stdout)
    assert "onnxruntime passed 1.5 for 1, 9.25 for 16" in said
    assert "openvino refused - it does not agree" in said


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from marnet_export.bundle_cli import main
main()
"""


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_inspect_needs_no_torch(bundle_of):
    result = without_torch("inspect", bundle_of("torchscript", "fp16"), "--format", "json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["backend"] == "torchscript"


def test_inspect_of_a_damaged_bundle_names_the_file(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    damage(copy / "payload/plan.safetensors")
    result = bundle_command("inspect", copy)
    assert result.exit_code == 1
    assert "plan.safetensors does not have the SHA-256 of the manifest" in one_line(result.stderr)


# --- verify


def test_verify_does_the_whole_verification_again(bundle):
    result = bundle_command("verify", bundle)
    assert result.exit_code == 0, result.stderr
    said = one_line(result.stdout)
    exported = json.loads((bundle / "fidelity.json").read_text())
    for name in ("bytes", "golden answers, default", "golden texts", "second process", "manifest",
                 "receipt", "agreement, default", "agreement, texts"):  # fmt: skip
        assert f"{name} passed" in said
    assert "images 270 270" in said
    agreement = f"{exported['top1_agreement']:.2%}"
    assert f"top-1 agreement {agreement} {agreement}" in said
    assert f"Next: marnet-classify IMAGE --model {bundle}" in one_line(result.stderr)


@pytest.mark.slow
def test_verify_gives_json_of_every_operating_point(swept_bundle, few):
    result = bundle_command("verify", swept_bundle, "--data", few, "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] is True
    points = set(read_bundle(swept_bundle).manifest.sampling.points)
    assert found["here"].keys() == points
    assert {one["images"] for one in found["here"].values()} == {16}
    names = {check["name"] for check in found["checks"]}
    assert {f"golden answers, {point}" for point in points} <= names
    assert all(row["error"] < 0.01 for row in found["trajectory"])


@pytest.mark.parametrize(
    "name",
    kept(["text/tokenizer.json", "source/model.safetensors", "manifest.json"], {"manifest.json"}),
)
def test_verify_finds_a_changed_bit_in_what_is_never_read_to_classify(bundle, tmp_path, name):
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    damage(copy / name)
    result = bundle_command("verify", copy)
    assert result.exit_code == 3
    assert "bytes failed" in one_line(result.stdout)
    assert name in one_line(result.stderr)


def change_encoder(bundle: Path) -> None:
    """Other weights, in a graph that is as sound as before."""
    file = bundle / "payload/encoder.onnx"
    model = onnx.load(file)
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    array = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(array[::-1].copy(), largest.name))
    onnx.save(model, file)


def test_verify_refuses_other_weights_however_well_they_are_sealed(bundle, tmp_path, few):
    copy = reseal(bundle, tmp_path / "b", change_encoder)
    result = bundle_command("verify", copy, "--data", few, "--format", "json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["passed"] is False
    broken = {check["name"] for check in found["checks"] if check["outcome"] == "failed"}
    assert broken == {"golden answers, default", "agreement, default"}
    said = one_line(result.stderr)
    assert "top-1 agreement is" in said
    assert "encoder departs" in said
    assert "built once more, it agrees with the reference" in said
    assert f"Next: marnet-bundle rebuild {copy}" in said
    assert "golden texts" not in broken


@pytest.mark.slow
def test_verify_finds_a_table_that_changes_no_answer_by_much(bundle, tmp_path, few):
    def touch(copy: Path) -> None:
        file = copy / "payload/plan.safetensors"
        plan = load_file(file)
        plan["time_bias"][40] *= 1.001
        save_file(plan, file)

    result = bundle_command("verify", reseal(bundle, tmp_path / "b", touch), "--data", few)
    assert result.exit_code == 3
    assert "agreement, default passed" in one_line(result.stdout)
    assert "sampling plan: time_bias is off by up to" in one_line(result.stderr)


@pytest.mark.slow
def test_verify_names_the_step_from_which_a_loop_departs(bundle, tmp_path, few):
    def spoil(copy: Path) -> None:
        file = copy / "payload/plan.safetensors"
        plan = load_file(file)
        plan["time_bias"][3 - 1] += 100  # t = 3, which step 98 of 100 visits
        save_file(plan, file)

    result = bundle_command("verify", reseal(bundle, tmp_path / "b", spoil), "--data", few)
    assert result.exit_code == 3
    assert "departs from step 98 of 100 (t = 3) on" in one_line(result.stderr)


@pytest.mark.slow
def test_verify_holds_the_text_encoder_against_the_checkpoint_too(bundle, tmp_path, few):
    def stretch(copy: Path) -> None:
        """What golden texts do not show, as they are of length 1."""
        file = copy / "text/alignment.safetensors"
        arrays = load_file(file)
        stretched = {name: 2 * arrays[name] for name in ("text_weight", "text_bias")}
        save_file(arrays | stretched, file)

    copy = reseal(bundle, tmp_path / "b", stretch)
    result = bundle_command("verify", copy, "--data", few)
    assert result.exit_code == 3
    assert "golden texts passed" in one_line(result.stdout)
    assert "fails 1 of 10 checks: agreement, texts: text_weight of" in one_line(result.stderr)


@pytest.mark.slow
def test_verify_refuses_labels_that_are_not_the_checkpoint_s(bundle, tmp_path, few):
    copy = reseal(bundle, tmp_path / "b", labels=tuple("1023456789"))
    result = bundle_command("verify", copy, "--data", few)
    assert result.exit_code == 3
    assert "manifest: not the checkpoint's: labels" in one_line(result.stderr)


@pytest.mark.slow
def test_golden_answers_that_are_off_where_all_else_agrees_are_another_machine(
    bundle, tmp_path, few
):
    def shift(copy: Path) -> None:
        file = copy / "golden/answers.safetensors"
        golden = load_file(file)
        save_file(golden | {"logits": golden["logits"] + 3}, file)

    result = bundle_command("verify", reseal(bundle, tmp_path / "b", shift), "--data", few)
    assert result.exit_code == 5
    assert "golden logits differ by 3 (bound" in one_line(result.stderr)
    assert "agreement, default passed" in one_line(result.stdout)


def test_verify_without_a_checkpoint_says_what_it_checked_and_what_it_needs(
    bundle, tmp_path, few, checkpoint
):
    copy = reseal(bundle, tmp_path / "b", drop_source)
    result = bundle_command("verify", copy)
    assert result.exit_code == 2
    said = one_line(result.stderr)
    assert "bytes: passed" in said
    assert "golden answers, default: passed" in said
    assert "not held against the float32 checkpoint" in said
    assert "holds no checkpoint: it was exported with --no-source" in said
    assert "with --checkpoint" in said
    named = bundle_command("verify", copy, "--checkpoint", checkpoint, "--data", few)
    assert named.exit_code == 0, named.stderr


@pytest.mark.slow
def test_verify_refuses_another_checkpoint(bundle, tmp_path, checkpoint):
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    damage(other / "model.safetensors")
    result = bundle_command("verify", bundle, "--checkpoint", other)
    assert result.exit_code == 2
    assert f"{other} is another checkpoint than {bundle} was made from" in one_line(result.stderr)
    copy = reseal(bundle, tmp_path / "b", lambda b: damage(b / "source/model.safetensors"))
    assert bundle_command("verify", copy).exit_code == 3


@pytest.mark.slow
def test_verify_holds_a_bundle_to_the_agreement_that_is_asked(bundle_of, few, tmp_path):
    """Fidelity that was asked for at the export is the default."""

    def ask(copy: Path) -> None:
        file = copy / "fidelity.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"min_agreement": 1.5}))

    copy = reseal(bundle_of("onnxruntime", "fp32"), tmp_path / "b", ask)
    result = bundle_command("verify", copy, "--data", few)
    assert result.exit_code == 3
    assert "at least 1.5 was asked" in one_line(result.stderr)
    said = one_line(result.stderr).lower()
    assert "no layer or step departs by more than its types explain" in said
    lenient = bundle_command("verify", copy, "--data", few, "--min-agreement", "0.9")
    assert lenient.exit_code == 0, lenient.stderr


def test_verify_without_the_export_extra_names_it_after_what_can_be_checked(bundle):
    result = without_torch("verify", bundle)
    assert (result.returncode, result.stdout) == (5, "")
    assert "golden answers, default: passed" in result.stderr
    assert 'run: pip install "marnet[export]"' in result.stderr


# --- diff


def test_diff_shows_what_another_precision_changes(bundle_of):
    fp32, fp16 = (bundle_of("torchscript", precision) for precision in ("fp32", "fp16"))
    result = bundle_command("diff", fp32, fp16)
    assert result.exit_code == 0, result.stderr
    said = one_line(result.stdout)
    assert "settings.precision fp32 fp16" in said
    assert "payload/refine.pt" in said
    assert "loop.storage.fp16 -" in said
    assert "logit_error_max" in said
    assert "labels: " not in said
    talk = one_line(result.stderr)
    assert "golden images get the same label; logits up to" in talk
    assert f"Next: marnet-bundle verify {fp32}" in talk


def test_diff_exits_with_1_where_a_label_differs(bundle, tmp_path):
    copy = reseal(bundle, tmp_path / "b", labels=tuple("1023456789"))
    result = bundle_command("diff", bundle, copy, "--format", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["manifest"] == {"labels": [list("0123456789"), list("1023456789")]}
    assert found["files"] == found["fidelity"] == found["receipt"] == {}
    differ = found["answers"]["differ"]
    assert {tuple(labels) for _, *labels in differ} <= {("0", "1"), ("1", "0")}
    assert differ
    assert found["answers"]["logit_difference"] is None
    without_answers = bundle_command("diff", bundle, copy, "--no-run")
    assert without_answers.exit_code == 0
    assert "labels" in without_answers.stdout
    assert "golden images" not in without_answers.stderr


@pytest.mark.slow
def test_diff_of_a_bundle_and_its_copy_finds_nothing(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    result = bundle_command("diff", bundle, copy)
    assert (result.exit_code, result.stdout) == (0, "")
    said = one_line(result.stderr)
    assert "the bundles hold the same" in said
    assert "8 of 8 golden images get the same label; logits" in said
    assert "differ by up to 0 " in said


def test_a_second_process_may_print_what_it_likes(bundle, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('a library that greets')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = check_second_process(read_bundle(bundle), Classifier(bundle))
    assert found.outcome == "passed", found.detail


def test_verify_tries_the_batch_sizes_that_the_bundle_was_built_for(
    bundle, checkpoint, few, tmp_path, monkeypatch
):
    copy = reseal(bundle, tmp_path / "copy", buckets=(1, 5))
    tried = []
    measure = trial.measure_fidelity

    def watched(run, *arguments, **options):
        tried.append(options["buckets"])
        return measure(run, *arguments, **options)

    monkeypatch.setattr(trial, "measure_fidelity", watched)
    verified = verify_again(read_bundle(copy), checkpoint, data=few)
    assert tried == [(1, 5)]
    assert {check.outcome for check in verified.checks} <= {"passed", "skipped"}


# --- replay


@pytest.fixture(scope="module")
def answered(bundle, digits, tmp_path_factory) -> tuple[Path, list[Path]]:
    """The answers to three images, of which one is none, as JSON lines; and the images."""
    folder = tmp_path_factory.mktemp("answers")
    images = sorted((digits / "test").glob("*.png"))[:2]
    (folder / "bad.png").write_text("no image")
    images.append(folder / "bad.png")
    chosen = ("-m", bundle, "--provenance", "-o", folder / "answers.jsonl")
    done = CliRunner().invoke(classify, [str(word) for word in (*images, *chosen)])
    assert done.exit_code == 1, done.stderr
    return folder / "answers.jsonl", images


def test_an_answer_is_derived_again_from_its_image_and_bundle(bundle, answered):
    answers, images = answered
    for image in images[:2]:
        result = bundle_command("replay", answers, image, "--model", bundle)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == "equal to the bit\n"
    shown = bundle_command("replay", answers, images[0], "-m", bundle, "--format", "json")
    (found,) = json.loads(shown.stdout)
    first = json.loads(answers.read_text().splitlines()[0])
    assert (found["equal"], found["tolerance"], found["differences"]) == (True, None, [])
    assert found["answer"] == {key: value for key, value in first.items() if key != "image"}


def test_the_bundle_of_an_answer_is_found_by_its_digest(
    bundle, bundle_of, answered, tmp_path, monkeypatch
):
    answers, images = answered
    monkeypatch.chdir(tmp_path)
    missing = bundle_command("replay", answers, images[0])
    assert missing.exit_code == 2
    assert "name its folder with --model" in one_line(missing.stderr)
    for name, path in (("a", bundle), ("b", bundle_of("torchscript", "fp16"))):
        shutil.copytree(path, tmp_path / "bundles" / name)
    assert bundle_command("replay", answers, images[0]).exit_code == 0


def test_an_answer_that_is_not_what_the_image_gives_is_exit_code_3(
    bundle, bundle_of, answered, tmp_path
):
    answers, images = answered
    row = json.loads(answers.read_text().splitlines()[0])
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(row | {"label": "X"}))
    result = bundle_command("replay", forged, images[0], "-m", bundle)
    assert result.exit_code == 3
    assert f"is not what {images[0]} gives: label: X, again {row['label']}" in result.stderr
    single = tmp_path / "single.json"
    single.write_text(json.dumps([row]))
    for image, path, what in (
        (images[1], bundle, "the image: its file was"),
        (images[0], bundle_of("torchscript", "fp16"), "the bundle: it was"),
    ):
        result = bundle_command("replay", single, image, "-m", path)
        assert result.exit_code == 3
        assert what in one_line(result.stderr)
    other = bundle_command("replay", answers, images[2], "-m", bundle)
    assert other.exit_code == 3
    assert "none of the 2 answers" in one_line(other.stderr)


# --- rebuild


def settings_again(bundle: Path, exported: Settings, **changes: Any) -> Settings:
    """Of a bundle whose export was asked for `exported`, as its manifest has them."""
    manifest = read_bundle(bundle).manifest
    told = json.loads(json.dumps(asdict(exported)))
    return rebuilding.changed_settings(
        replace(read_bundle(bundle), manifest=replace(manifest, settings=told)), changes
    )


def test_a_swept_bundle_can_be_rebuilt_with_steps_of_one_s_choice(bundle):
    swept = Settings("onnxruntime", "auto", steps="auto", latency_budget_ms=5, eta=0.5)
    fixed = settings_again(bundle, swept, steps=10)
    assert (fixed.steps, fixed.precision, fixed.latency_budget_ms, fixed.eta) == (
        10,
        "fp32",
        None,
        0,
    )
    assert settings_again(bundle, swept, steps=10, sampler="ddim").eta == 0.5
    assert settings_again(bundle, swept, steps=10, precision="fp16").precision == "fp16"
    assert settings_again(bundle, swept, steps=0).steps == 0
    assert settings_again(bundle, swept, seed=3) == replace(swept, seed=3)  # swept again


def test_a_moved_bundle_is_all_that_another_machine_needs_to_make_another(moved, few):
    result = bundle_command("rebuild", moved, "--precision", "fp16", "--data", few)
    assert result.exit_code == 0, result.stderr
    manifest = read_bundle(moved).manifest
    assert (manifest.backend, manifest.precision.asked) == ("torchscript", "fp16")
    assert len(manifest.sampling.point.timesteps) == 5
    assert manifest.settings["precision"] == "fp16"
    assert (moved / "source/model.safetensors").is_file()
    assert not (moved / "text").exists()
    assert [entry.name for entry in moved.parent.iterdir()] == [moved.name]
    said = one_line(result.stderr)
    assert "verified on 16 images" in said
    assert f"replaced {moved}" in said
    assert f"marnet-classify IMAGE --model {moved}" in said


@pytest.mark.slow
def test_rebuild_writes_elsewhere_with_another_backend(moved, few):
    before = (moved / "manifest.json").read_bytes()
    asked = ("--backend", "openvino", "--loop", "graph", "--seed", "7")
    chosen = (*asked, "--no-source", "--data", few)
    result = bundle_command("rebuild", moved, "-o", "other", *chosen)
    assert result.exit_code == 0, result.stderr
    manifest = read_bundle("other").manifest
    assert (manifest.backend, manifest.sampling.seed) == ("openvino", 7)
    assert not Path("other/source").exists()
    assert (moved / "manifest.json").read_bytes() == before
    assert f"marnet-bundle diff {moved} other" in one_line(result.stderr)
    again = bundle_command("rebuild", moved, "-o", "other")
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_a_rebuild_that_fails_leaves_the_bundle_as_it_was(moved, few):
    before = (moved / "manifest.json").read_bytes()
    chosen = ("--backend", "onnxruntime", "--compute", "bf16", "--data", few)
    result = bundle_command("rebuild", moved, *chosen)
    assert result.exit_code == 1
    assert "onnxruntime cannot compute in bf16" in one_line(result.stderr)
    assert (moved / "manifest.json").read_bytes() == before
    assert [entry.name for entry in moved.parent.iterdir()] == [moved.name]


def test_rebuild_needs_the_checkpoint_and_takes_no_other(bundle, tmp_path, checkpoint):
    copy = reseal(bundle, tmp_path / "b", drop_source)
    result = bundle_command("rebuild", copy)
    assert result.exit_code == 2
    assert "with --checkpoint" in one_line(result.stderr)
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    damage(other / "model.safetensors")
    result = bundle_command("rebuild", copy, "--checkpoint", other)
    assert result.exit_code == 2
    assert "another checkpoint" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm86"), "adds engines to a bundle of tensorrt, and"),
        (("--target", "sm86", "--seed", "1"), "targets: got sm86 for torchscript, which"),
        (("--backend", "onnx"), "Did you mean 'onnxruntime'?"),
        (("--precision", "fp61"), "Did you mean 'fp16'?"),
        (("--eta", "0.5"), "add --sampler ddim"),
    ],
)
def test_wrong_use_of_rebuild_exits_with_2_and_says_what_is_right(moved, arguments, message):
    result = bundle_command("rebuild", moved, *arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_settings_of_a_newer_version_are_named(moved):
    settings = read_bundle(moved).manifest.settings | {"wings": 2}
    copy = reseal(moved, moved.parent / "newer", settings=settings)
    result = bundle_command("rebuild", copy)
    assert result.exit_code == 1
    assert "'wings'" in one_line(result.stderr)
    assert "upgrade marnet" in one_line(result.stderr)


@pytest.mark.parametrize("command", ["inspect", "verify", "rebuild"])
def test_what_is_no_bundle_is_named(command, tmp_path):
    result = bundle_command(command, tmp_path)
    assert result.exit_code == 2
    assert "has no manifest.json, so it is not a bundle" in one_line(result.stderr)


def test_a_wrong_command_gets_the_nearest():
    result = bundle_command("inspct")
    assert result.exit_code == 2
    assert "Did you mean 'inspect'?" in one_line(result.stderr)


# --- rebuild --target


@pytest.fixture(scope="module")
def engines(bundle, checkpoint, tmp_path_factory) -> Path:
    """A bundle of TensorRT with engines for one kind of GPU, which is not the one here."""
    from marnet_export.build.tensorrt.graphs import build_encoder, build_refine
    from marnet_export.build.types import Types
    from marnet_export.lower.methods import lower
    from marnet_train.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("engines")
    lowered = lower(load_checkpoint(checkpoint).model)
    how: dict[str, Any] = {"targets": ("sm86",), "buckets": (1,)}

    def build(copy: Path) -> None:
        shutil.rmtree(copy / "text")
        payload, types = copy / "payload", Types("fp16", "fp16")
        for graph in payload.glob("*.onnx*"):
            graph.unlink()
        build_encoder(lowered, torch.zeros(2, 3, 32, 32), types, payload, **how)
        build_refine(lowered, types, payload, **how)

    built_for = replace(read_bundle(bundle).manifest.built_for, targets=("sm86",))
    changed = {"backend": "tensorrt", "buckets": (1,), "built_for": built_for}
    return reseal(bundle, folder / "engines.marnet", build, **changed)


@pytest.mark.slow
def test_engines_for_another_gpu_are_added_and_nothing_else_changes(engines, tmp_path):
    out = tmp_path / "more.marnet"
    result = bundle_command("rebuild", engines, "--target", "sm89,sm120", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "not tried, because it does not run here" in one_line(result.stderr)
    old, new = read_bundle(engines).manifest, read_bundle(out).manifest
    assert new.settings["targets"] == ["sm86", "sm89", "sm120"]
    assert all(name in str(new.built_for.targets) for name in new.settings["targets"])
    assert {name for name, entry in old.files.items() if new.files[name] != entry} == {
        "payload/engines.json"
    }
    assert any(name.endswith(".engine") for name in new.files.keys() - old.files.keys())
    assert "sm120" in bundle_command("inspect", out).stdout


@pytest.mark.slow
def test_engines_for_a_gpu_that_is_unknown_leave_the_bundle_as_it_is(engines):
    before = (engines / "manifest.json").read_bytes()
    result = bundle_command("rebuild", engines, "--target", "sm90")
    assert result.exit_code == 1
    assert "TensorRT-RTX does not build for sm90 (Hopper)" in one_line(result.stderr)
    assert (engines / "manifest.json").read_bytes() == before

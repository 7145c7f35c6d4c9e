"""Checkpoints: what is written is what is read, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marnet_sdk.errors import CheckpointError, NotFound
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import (
    BASELINE,
    checkpoint_hash,
    copy_files,
    is_checkpoint,
    load_baseline,
    load_checkpoint,
    newest_checkpoint,
    write_baseline,
    write_json,
    write_model,
)
from marnet_train.diffusion import sampler_table, trajectory_tensors
from marnet_train.models.marnet import MARNet


@torch.no_grad()
def logits(model: MARNet) -> torch.Tensor:
    table = sampler_table(model.config.schedule, "ddpm", 10)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = draw_trajectory(0, table.timesteps, table.train_steps, model.denoiser.dim)
    return model(pixels, table, *trajectory_tensors(noise, 2, pixels))[0]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The three files that decide the answers, to be damaged."""
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    return tmp_path


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text("utf-8"))
    change(content)
    write_json(folder / "config.json", content)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_written_and_read_again_a_model_gives_the_same_logits(
    checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(checkpoint)
    write_model(tmp_path, loaded.model, loaded.preprocess)
    again = load_checkpoint(tmp_path)
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.model.config == loaded.model.config
    assert again.preprocess == loaded.preprocess
    assert again.sha256 == loaded.sha256 == checkpoint_hash(checkpoint)


def test_a_loaded_model_is_float32_and_in_evaluation_mode(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint).model
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_nothing_in_a_checkpoint_can_hold_a_pickle(checkpoint: Path) -> None:
    suffixes = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".md", ".png", ".safetensors"}


def test_a_checkpoint_without_its_training_record_is_still_read(copy: Path) -> None:
    assert load_checkpoint(copy).training == {}


def test_the_hash_follows_what_decides_the_answers_and_nothing_else(copy: Path) -> None:
    before = checkpoint_hash(copy)
    (copy / "README.md").write_text("edited")
    assert checkpoint_hash(copy) == before
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        with (copy / name).open("ab") as file:
            file.write(b" ")
        assert checkpoint_hash(copy) != before
        before = checkpoint_hash(copy)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_weights_that_were_cut_short_are_refused(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged \(.*copy or train it"):
        load_checkpoint(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(copy: Path, value: float) -> None:
    edit_weights(copy, lambda state: state["denoiser.layer2.bias"].__setitem__(3, value))
    with pytest.raises(CheckpointError, match=r"denoiser\.layer2\.bias holds NaN or infinite"):
        load_checkpoint(copy)


def test_a_missing_weight_is_refused_by_name(copy: Path) -> None:
    edit_weights(copy, lambda state: state.pop("classifier.bias"))
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit its config\.json.*classifier\.bias"
    ):
        load_checkpoint(copy)


def test_a_configuration_of_another_size_is_refused(copy: Path) -> None:
    edit_config(copy, lambda content: content.update(hidden=97))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its config\.json.*\[97"):
        load_checkpoint(copy)


@pytest.mark.parametrize("key", ["vision", "text", "id2label", "schedule"])
def test_a_configuration_without_a_key_is_refused(copy: Path, key: str) -> None:
    edit_config(copy, lambda content: content.pop(key))
    with pytest.raises(CheckpointError, match=rf"config\.json: incomplete or malformed.*'{key}'"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "seda2"}, r"method 'seda2' is unknown; this version has \['marnet'"),
        ({"method": None}, "method None is unknown"),
        ({"method": ["marnet"]}, r"method \['marnet'\] is unknown; this version has"),
        ({"method": {}}, r"method \{\} is unknown"),
        ({"surprise": 1}, "malformed: .*surprise"),
        ({"fusion": "cat"}, "malformed: fusion 'cat' is unknown"),
        ({"schedule": {"steps": 0}}, "malformed: a schedule needs at least 1 step"),
        ({"schedule": 100}, "malformed"),
        ({"id2label": {"1": "a", "2": "b"}}, r"malformed: id2label must .* got '1', '2'"),
        ({"id2label": {"0": "a", "1": 7}}, "malformed: id2label must map to strings, got 7"),
        ({"id2label": ["a", "b"]}, 'malformed: id2label must map "0", .* got list'),
        ({"hidden": -3}, "malformed"),
        ({"hidden": "wide"}, "malformed"),
        ({"vision": {"model_type": "vitt"}}, "malformed: encoder .*vitt"),
        ({"vision": {"pretrained": "some/model"}}, "vision must be a whole configuration"),
        ({"text": "bert"}, "malformed"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(copy, lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    copy: Path, name: str, content: bytes, message: str
) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        load_checkpoint(copy)


def test_preprocessing_that_cannot_be_reproduced_is_refused(copy: Path) -> None:
    write_json(copy / "preprocessor_config.json", {"do_resize": False})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: do_resize is false"):
        load_checkpoint(copy)


def test_a_missing_preprocessing_file_is_refused(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing from the"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_model_or_configuration_is_no_checkpoint(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert not is_checkpoint(copy)
    with pytest.raises(
        NotFound,
        match=r"it needs config\.json and model\.safetensors; train one with: marnet-train fit",
    ):
        load_checkpoint(copy)


# --- fusions element by element


def elementwise(folder: Path) -> MARNet:
    """A checkpoint in `folder` that fuses element by element; its model."""
    torch.manual_seed(0)
    loaded = load_checkpoint(folder)
    width = loaded.model.text.dim
    model = MARNet(replace(loaded.model.config, fusion="add", dim=width)).eval()
    write_model(folder, model, loaded.preprocess)
    return model


def test_an_elementwise_fusion_is_written_and_read_with_its_statistics(copy: Path) -> None:
    model = elementwise(copy)
    for name in ("aligned", "refined"):
        model.set_statistics(name, 3 + torch.randn(20, model.config.dim))
    write_model(copy, model, load_checkpoint(copy).preprocess)
    assert torch.equal(logits(load_checkpoint(copy).model), logits(model))


def test_weights_of_another_fusion_are_refused(copy: Path) -> None:
    width = load_checkpoint(copy).model.text.dim
    edit_config(copy, lambda content: content.update(fusion="add", dim=width))
    with pytest.raises(
        CheckpointError, match=r"size mismatch .*take both from the same checkpoint"
    ):
        load_checkpoint(copy)


# --- the image-only baseline


@torch.no_grad()
def test_the_baseline_is_read_as_it_was_written(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    baseline = load_baseline(loaded)
    assert not any(module.training for module in baseline.modules())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = baseline.alignment_logits(baseline.vision(pixels))
    own = loaded.model.alignment_logits(loaded.model.vision(pixels))
    assert not torch.equal(found, own)  # it learned without any text
    write_model(tmp_path, loaded.model, loaded.preprocess)
    write_baseline(tmp_path, baseline)
    again = load_baseline(load_checkpoint(tmp_path))
    assert torch.equal(again.alignment_logits(again.vision(pixels)), found)


def test_a_checkpoint_without_a_baseline_says_where_there_is_one(copy: Path) -> None:
    with pytest.raises(NotFound, match=r"baseline\.safetensors is missing, as it is in bundles"):
        load_baseline(load_checkpoint(copy))


def test_the_baseline_travels_with_a_saved_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    path = load_checkpoint(checkpoint).save_pretrained(tmp_path / "again")
    assert (path / BASELINE).read_bytes() == (checkpoint / BASELINE).read_bytes()


def test_the_baseline_is_no_part_of_what_decides_the_answers(checkpoint: Path, copy: Path) -> None:
    shutil.copy(checkpoint / BASELINE, copy)
    assert checkpoint_hash(copy) == checkpoint_hash(checkpoint)


def test_files_may_be_left_out_of_a_copy(checkpoint: Path, tmp_path: Path) -> None:
    copy_files(checkpoint, tmp_path / "whole")
    copy_files(checkpoint, tmp_path / "part", without=[BASELINE, "README.md"])
    whole, part = (
        {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "whole", tmp_path / "part")
    )
    assert whole - part == {BASELINE, "README.md"}
    assert part < whole


def test_a_damaged_or_foreign_baseline_is_refused_by_name(checkpoint: Path, copy: Path) -> None:
    (copy / BASELINE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"baseline\.safetensors: damaged \("):
        load_baseline(load_checkpoint(copy))
    state = load_file(checkpoint / BASELINE)
    save_file({**state, "alignment_classifier.bias": torch.zeros(3)}, copy / BASELINE)
    with pytest.raises(CheckpointError, match=r"baseline\.safetensors does not fit its config"):
        load_baseline(load_checkpoint(copy))
    state["project_vision.bias"][0] = float("nan")
    save_file(state, copy / BASELINE)
    with pytest.raises(CheckpointError, match=r"baseline\.safetensors: project_vision\.bias holds"):
        load_baseline(load_checkpoint(copy))


def make_run(path: Path, written: int, *, weights: bool = True) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if weights:
        (path / "model.safetensors").write_bytes(b"")
    os.utime(path, (written, written))


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    make_run(tmp_path / "z-old", 1000)
    make_run(tmp_path / "a-new", 3000)
    make_run(tmp_path / "middle", 2000)
    make_run(tmp_path / "unfinished", 4000, weights=False)
    make_run(tmp_path / ".hidden", 5000)
    (tmp_path / "notes.txt").write_text("no folder")
    assert newest_checkpoint(tmp_path) == tmp_path / "a-new"


@pytest.mark.parametrize("is_there", [True, False])
def test_without_a_checkpoint_the_command_that_makes_one_is_named(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_there:
        (tmp_path / "runs").mkdir()
    with pytest.raises(NotFound, match=r"under \./runs; train one with: marnet-train fit --data"):
        newest_checkpoint()

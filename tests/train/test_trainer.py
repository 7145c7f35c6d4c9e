"""From data set and recipe to a checkpoint folder: its content, determinism, and refusals."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_LAYER

from marnet_sdk.errors import (
    DataError,
    EnvironmentMismatch,
    InvalidInput,
    NotFound,
    OutputExists,
    RecipeError,
)
from marnet_train import trainer
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.dataset import data_hash, read_data_set
from marnet_train.data.examples import Example
from marnet_train.data.imagefolder import read_split, write_split
from marnet_train.diffusion import ScheduleConfig
from marnet_train.evaluate import evaluate_checkpoint, pick_device
from marnet_train.hub import files_of
from marnet_train.models.backbones import load_backbone
from marnet_train.recipe import Recipe
from marnet_train.trainer import fit


@pytest.fixture(scope="module")
def recipe(quick_recipe: Recipe) -> Recipe:
    """One to two seconds of training; what it learns does not matter here."""
    return replace(
        quick_recipe,
        dim=16,
        hidden=32,
        time_dim=8,
        image=quick_recipe.image | {"size": {"height": 8, "width": 8}},
        vision=quick_recipe.vision | {"embedding_size": 4, "hidden_sizes": [4, 8, 8]},
        text=quick_recipe.text | {"hidden_size": 8, "intermediate_size": 16},
        schedule=ScheduleConfig(steps=10),
        text_phase=replace(quick_recipe.text_phase, epochs=2),
        alignment=replace(quick_recipe.alignment, epochs=2),
        refinement=replace(quick_recipe.refinement, epochs=2),
        fusion_phase=replace(quick_recipe.fusion_phase, epochs=2),
    )


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 digits to train on, 40 to validate, 30 to test."""
    folder = tmp_path_factory.mktemp("small")
    for split, count in {"train": 200, "val": 40, "test": 30}.items():
        rows = read_split(digits / split, needs_text=True)[:count]
        write_split(
            folder / split, ((e.image.name, e.image.read_bytes(), e.label, e.text) for e in rows)
        )
    return folder


@pytest.fixture(scope="module")
def run(data: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    fit(data, recipe, out, name="tiny")
    return out


@pytest.fixture(scope="module")
def training(run: Path) -> dict[str, Any]:
    return json.loads((run / "training.json").read_text("utf-8"))


def test_a_checkpoint_folder_holds_what_its_documentation_names(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "README.md",
        "baseline.safetensors",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "preprocessor_config.json",
        "samples",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert [path.name for path in run.parent.iterdir()] == ["first"]  # nothing left beside it


def test_training_json_says_how_the_model_came_to_be(
    training: dict[str, Any], data: Path, recipe: Recipe
) -> None:
    assert (training["recipe"], training["seed"]) == ("tiny", 0)
    assert training["settings"] == json.loads(json.dumps(recipe.to_dict()))
    assert training["data"]["sha256"] == data_hash(read_data_set(data))
    assert training["data"]["images"] == {"train": 200, "val": 40, "test": 30}
    assert training["versions"]["torch"] == torch.__version__
    assert training["seconds"] > 0
    assert training["machine"] == {
        "threads": torch.get_num_threads(),
        "device": str(pick_device("auto")),
        "processor": platform.machine(),
    }


def test_baseline_and_every_branch_are_measured_on_val_and_test(training: dict[str, Any]) -> None:
    metrics = training["metrics"]
    assert set(metrics) == {"baseline", "alignment", "mlp", "refined", "marnet"}
    for branch, splits in metrics.items():
        assert {split: found["images"] for split, found in splits.items()} == {
            "val": 40,
            "test": 30,
        }
        for found in splits.values():
            assert 0 <= found["top1"] <= found["top5"] <= 1
            by_seed = found["top1_over_noise_seeds"]
            assert found["top1"] == pytest.approx(sum(by_seed) / len(by_seed))
            noisy = branch in ("refined", "marnet")
            assert (len(by_seed), found["samples"]) == ((3, 1) if noisy else (1, 0))


def test_differences_between_branches_come_with_intervals(training: dict[str, Any]) -> None:
    assert training["chosen"] == {}
    for split, found in training["differences"].items():
        assert list(found) == [
            "alignment - baseline",
            "mlp - alignment",
            "refined - mlp",
            "marnet - alignment",
            "marnet - baseline",
        ]
        for pair, seen in found.items():
            one, other = (training["metrics"][name][split]["top1"] for name in pair.split(" - "))
            assert seen["mean"] == pytest.approx(one - other, abs=FLOAT32_LAYER)
            assert seen["low"] <= seen["mean"] <= seen["high"]


def test_there_is_one_line_of_metrics_per_epoch_of_each_phase(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = ("text", "baseline", "alignment", "+MLP", "refinement", "refined head", "fusion")
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        (phase, epoch) for phase in phases for epoch in (1, 2)
    ]


@pytest.mark.parametrize("name", ["a.jfif", "a.Jpg", "a", "a.image", "a.jpg"])
def test_samples_travel_whatever_their_files_are_called(tmp_path, photographs, name):
    shutil.copy(photographs[0], tmp_path / name)
    trainer._write_samples(tmp_path / "samples", [Example(tmp_path / name, "shop", "a shop")], 0)
    (kept,) = read_split(tmp_path / "samples", needs_text=True)
    assert (kept.image.name, kept.text) == ("000000.jpg", "a shop")
    assert "samples/000000.jpg" in files_of(tmp_path)


def test_samples_are_the_validation_images_with_label_and_text(run: Path, data: Path) -> None:
    kept = read_split(run / "samples", needs_text=True)
    original = read_split(data / "val", needs_text=True)
    assert [(e.label, e.text, e.image.read_bytes()) for e in kept] == [
        (e.label, e.text, e.image.read_bytes()) for e in original
    ]


def test_the_model_card_names_the_accuracy_and_the_next_command(
    run: Path, training: dict[str, Any]
) -> None:
    card = (run / "README.md").read_text("utf-8")
    assert f"{training['metrics']['marnet']['test']['top1']:.2%}" in card
    assert f"marnet-export --checkpoint {run} --precision fp16" in card
    assert training["data"]["sha256"] in card


def test_the_same_seed_gives_the_same_bytes(
    run: Path, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "once more" / "again"
    fit(data, recipe, out, name="tiny")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    assert f"--checkpoint {shlex.quote(str(out))} --precision" in (out / "README.md").read_text()


def test_the_number_of_threads_is_used_recorded_and_put_back(
    data: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    train = trainer.train_all

    def spy(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return train(*arguments)

    monkeypatch.setattr(trainer, "train_all", spy)
    before = torch.get_num_threads()
    monkeypatch.setattr("marnet_sdk.cpus.os.cpu_count", lambda: before + 1)
    training = fit(data, recipe, tmp_path / "run", threads=before + 1, device="cpu")
    assert used == [training["machine"]["threads"]] == [before + 1]
    assert json.loads((tmp_path / "run" / "training.json").read_text()) == training
    assert torch.get_num_threads() == before


def test_more_threads_than_the_machine_has_are_refused(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="threads: got 100000, but this machine has"):
        fit(data, recipe, tmp_path / "run", threads=100_000)


def test_test_images_choose_nothing_and_may_be_left_out(
    run: Path, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """Without them the weights are the same."""
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    out = tmp_path / "other"
    training = fit(tmp_path / "data", recipe, out)
    for name in ("model.safetensors", "baseline.safetensors", "config.json", "metrics.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    assert list(training["metrics"]["marnet"]) == list(training["differences"]) == ["val"]


def test_another_seed_gives_other_weights_and_samples_may_be_left_out(
    run: Path, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    fit(data, recipe, out, seed=1, keep_samples=False)
    assert (out / "model.safetensors").read_bytes() != (run / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert not (out / "samples").exists()


def test_baseline_and_model_start_from_the_same_weights(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """Without any epoch, the baseline and the alignment branch are one model."""
    untrained = replace(
        recipe,
        text_phase=None,
        alignment=replace(recipe.alignment, epochs=0),
        refinement=replace(recipe.refinement, epochs=0),
        fusion_phase=replace(recipe.fusion_phase, epochs=0),
    )
    metrics = fit(data, untrained, tmp_path / "run", seed=3)["metrics"]
    baseline, alignment = (
        [(found["top1"], found["top5"]) for found in metrics[branch].values()]
        for branch in ("baseline", "alignment")
    )
    assert baseline == alignment


def test_pretrained_encoders_are_needed_to_train_but_not_to_load(
    run: Path, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """Both encoders, image settings and tokenizer from local folders in the hub's layout."""
    text = recipe.text | {"vocab_size": 500, "pad_token_id": 0}
    for name, description in (("vision", recipe.vision), ("text", text)):
        load_backbone(description).save_pretrained(tmp_path / name)
    shutil.copy(run / "preprocessor_config.json", tmp_path / "vision")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, tmp_path / "text")
    pretrained = replace(
        recipe,
        vision={"pretrained": str(tmp_path / "vision")},
        text={"pretrained": str(tmp_path / "text")},
        image=None,
        text_phase=None,
        alignment=replace(recipe.alignment, epochs=1, lr_text=0.0),
    )
    training = fit(data, pretrained, tmp_path / "run")
    for name in ("vision", "text"):
        shutil.rmtree(tmp_path / name)
    found = evaluate_checkpoint(tmp_path / "run", data, "val", "cpu")
    assert found["marnet"] == training["metrics"]["marnet"]["val"]


def pretrained_folder(recipe: Recipe, folder: Path, encoder: str) -> Recipe:
    """The recipe with one encoder from a folder that holds weights and nothing else."""
    text = recipe.text | {"vocab_size": 500, "pad_token_id": 0}
    load_backbone(text if encoder == "text" else recipe.vision).save_pretrained(folder)
    return replace(recipe, **{encoder: {"pretrained": str(folder)}})


def test_a_text_folder_without_a_tokenizer_is_refused(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """transformers makes one of five tokens, to which every word is unknown."""
    spoilt = pretrained_folder(recipe, tmp_path / "bert", "text")
    with pytest.raises(RecipeError, match=rf"tokenizer.*{tmp_path}/bert.*put the encoder's token"):
        fit(data, spoilt, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vision_folder_without_image_settings_is_refused(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    spoilt = replace(pretrained_folder(recipe, tmp_path / "vit", "vision"), image=None)
    with pytest.raises(
        RecipeError,
        match=rf"(?s)no preprocessor_config\.json .*'{tmp_path}/vit'.*write an \[image\] table",
    ):
        fit(data, spoilt, tmp_path / "run")


def test_evaluating_again_gives_the_accuracy_of_the_training(
    run: Path, data: Path, training: dict[str, Any]
) -> None:
    found = evaluate_checkpoint(run, data, "test", device="cpu")
    expected = {branch: training["metrics"][branch]["test"] for branch in found}
    assert found == expected
    assert set(found) == {"alignment", "refined", "marnet"}


def test_an_existing_output_is_neither_replaced_nor_trained_for(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExists, match=r"taken already exists; .* --force"):
        fit(data, recipe, tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "keep me"


def test_even_when_forced_only_a_checkpoint_is_replaced(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExists, match=r"photos holds something else: .* choose another"):
        fit(data, recipe, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("out", ["data", "data/runs", ".", "runs/../data", "link"])
def test_an_output_in_or_around_the_data_is_refused(
    out: str, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match=r"--out .* two folders apart: choose another --out"):
        fit(tmp_path / "data", recipe, tmp_path / out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def without_image_settings(recipe: Recipe) -> Recipe:
    return replace(recipe, image=None)


def with_narrow_fusion(recipe: Recipe) -> Recipe:
    return replace(recipe, fusion="add", dim=10)


def with_long_texts(recipe: Recipe) -> Recipe:
    return replace(recipe, max_tokens=65)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_image_settings, r"from scratch needs an \[image\] table"),
        (with_narrow_fusion, r"dim \(10\) must equal the width of the text features \(8\)"),
        (with_long_texts, "max_tokens is 65, but .* max_position_embeddings = 64"),
    ],
)
def test_an_impossible_recipe_is_refused_and_leaves_nothing_behind(
    spoil: Any, message: str, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        fit(data, spoil(recipe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_read_is_named_before_any_training(
    data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    damaged = read_split(tmp_path / "data" / "val", needs_text=False)[3].image
    damaged.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=rf"1 problem in the images of val:\s+.*metadata.jsonl:4: .*{damaged.name}"
    ):
        fit(tmp_path / "data", recipe, tmp_path / "out")


def test_a_class_that_the_checkpoint_does_not_know_is_refused(run: Path, data: Path) -> None:
    split = data.parent / f"{data.name}-other" / "test"
    image = read_split(data / "test", needs_text=False)[0].image.read_bytes()
    write_split(split, [("a.png", image, "3", None), ("b.png", image, "eleven", None)])
    with pytest.raises(DataError, match=r"was not trained on: \['eleven'\]; it knows \['0', '1'"):
        evaluate_checkpoint(run, split.parent, "test", device="cpu")


def test_a_split_that_is_not_there_is_refused(run: Path, data: Path) -> None:
    with pytest.raises(
        NotFound,
        match=r"no split 'tset'; choose --split from: test, train, val\. Did you mean 'test'\?",
    ):
        evaluate_checkpoint(run, data, "tset", device="cpu")


def test_a_data_folder_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        NotFound, match=r"nowhere: no such folder; expected one that holds train/ and val/"
    ):
        evaluate_checkpoint(run, tmp_path / "nowhere", "test", device="cpu")


def test_a_folder_that_is_no_checkpoint_is_refused(data: Path) -> None:
    with pytest.raises(NotFound, match=r"is not a checkpoint: it needs config\.json and model"):
        evaluate_checkpoint(data, data, "test", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_cuda_device_where_there_is_none_is_an_environment_mismatch(
    name: str, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentMismatch, match=f"--device {name}: no CUDA .* --device cpu"):
        fit(data, recipe, tmp_path / "out", device=name)


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:0", "cuda:", "cuda:-1", "CPU", ""])
def test_only_four_kinds_of_device_are_accepted(name: str) -> None:
    with pytest.raises(
        InvalidInput, match=f"--device '{name}' is unknown; choose auto, cpu, cuda or cuda:N"
    ):
        pick_device(name)


def test_auto_is_the_cpu_unless_there_is_a_cuda_device() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_loaded_model_answers_without_text(run: Path) -> None:
    loaded = load_checkpoint(run)
    assert loaded.labels == tuple("0123456789")
    assert loaded.preprocess.output_shape == (3, 8, 8)
    assert loaded.training["recipe"] == "tiny"


def test_a_misspelt_image_setting_is_refused_with_the_nearest_name(digits, quick_recipe, tmp_path):
    recipe = replace(quick_recipe, image=quick_recipe.image | {"image_stdd": [1, 1, 1]})
    with pytest.raises(RecipeError, match=r"\[image\]: unknown setting 'image_stdd'.*image_std"):
        fit(digits, recipe, tmp_path / "run")


def test_texts_longer_than_the_encoder_can_take_are_refused(digits, quick_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"max_tokens is 65, .* max_position_embeddings = 64"):
        fit(digits, replace(quick_recipe, max_tokens=65), tmp_path / "run")

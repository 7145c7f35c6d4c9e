"""The accuracy script: every row over seeds, and what it makes of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from quick import kept

from marnet_train.data.imagefolder import read_split, write_split
from marnet_train.measures import paired_difference

SCRIPTS = Path(__file__).parents[2] / "benchmarks/scripts"
RECIPE = """
dim = 10
hidden = 16
time_dim = 4
samples = 2
[image]
size = { height = 8, width = 8 }
[vision]
model_type = "resnet"
embedding_size = 4
hidden_sizes = [4, 8]
depths = [1, 1]
layer_type = "basic"
[text]
model_type = "bert"
hidden_size = 10
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16
[schedule]
steps = 6
[alignment]
epochs = 1
LR
[refinement]
epochs = 1
views = 1
norm_weight = "auto"
[fusion_phase]
epochs = 1
draws = 1
"""
KINDS = ("blur", "noise", "jpeg", "darkness", "occlusion")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # as where it is run; it imports corruptions.py beside it
        spec = importlib.util.spec_from_file_location("accuracy", SCRIPTS / "accuracy.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def call(script: ModuleType, *words: str | Path | int) -> Result:
    result = CliRunner().invoke(script.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 digits of each split, and a recipe for each way to train."""
    folder = tmp_path_factory.mktemp("accuracy")
    for split in ("train", "val", "test"):
        rows = read_split(digits / split, needs_text=True)[:30]
        write_split(
            folder / "data" / split,
            ((e.image.name, e.image.read_bytes(), e.label, e.text) for e in rows),
        )
    (folder / "learning.toml").write_text(RECIPE.replace("LR", ""))
    (folder / "frozen.toml").write_text(RECIPE.replace("LR", "lr_backbone = 0"))
    return folder


def measure(script: ModuleType, folder: Path, recipe: str, seed: int, *more: str) -> dict[str, Any]:
    out = folder / "results" / f"{recipe}-{seed}.json"
    words = ("--data", folder / "data", "--recipe", folder / f"{recipe}.toml", "--out", out)
    call(script, "run", *words, "--seed", seed, *more)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(script: ModuleType, folder: Path) -> dict[str, Any]:
    """One seed with all rows; 10 test images are damaged, which is no multiple of 8."""
    return measure(script, folder, "learning", 0, "--corruptions", "10")


def test_one_seed_has_a_row_for_every_part_and_corruption(whole) -> None:
    steps = [f"{n}, {s} steps, K = {k}" for s in (1, 2, 5, 6) for n in ("refined", "MARNet")
             for k in (1, 8)]  # fmt: skip
    damaged = [
        f"{kind} {strength}: {name}"
        for kind in KINDS
        for strength in (1, 2, 3)
        for name in ("baseline", "alignment", "+MLP", "refined", "MARNet")
    ]
    assert set(whole["rows"]) == {
        *("baseline", "alignment", "+MLP", "refined", "MARNet"),
        *("CE alone", "CE alone, on the baseline"),
        *("+MLP on the baseline", "+CDR on the baseline"),
        *("refined, gamma = 1", "refined, gamma = 1 / D"),
        *("refined, t uniform", "refined, half of the rows at t = T"),
        *(*steps, *damaged),
    }
    assert {row["images"] for name, row in whole["rows"].items() if name not in damaged} == {30}
    assert {whole["rows"][name]["images"] for name in damaged} == {10}
    assert list(whole["chosen"]) == ["refinement.norm_weight"]
    assert (whole["seed"], whole["test_images"]) == (0, 30)
    assert whole["seconds"]["all"] > whole["seconds"]["training"] > 0


def test_rows_hold_which_images_each_answer_has_right(script, whole) -> None:
    for name, row in whole["rows"].items():
        right = script.right_answers([whole], name)
        assert right.shape == (1, row["images"])
        assert right.mean() == pytest.approx(row["top1"])
        assert 0 <= row["ece"] <= 1
        assert row["at_80"] >= 0
    assert len(whole["rows"]["MARNet"]["right"]) == 4  # 8 noise samples, 2 in each answer
    assert len(whole["rows"]["MARNet, 6 steps, K = 1"]["right"]) == 8
    assert len(whole["rows"]["alignment"]["right"]) == 1
    assert "at_80_by_votes" in whole["rows"]["MARNet, 6 steps, K = 8"]


def test_a_frozen_encoder_is_measured_without_what_is_not_asked_for(script, folder) -> None:
    rows = measure(script, folder, "frozen", 0, "--not-again")["rows"]
    assert len(rows) == 5 + 16
    assert not any(":" in name or name.startswith("CE") for name in rows)


def test_seeds_are_joined_into_a_table(script, folder, whole) -> None:
    other = measure(script, folder, "learning", 1, "--not-again")
    first = folder / "results/learning-0.json"
    (folder / "few.json").write_text(
        json.dumps({**whole, "rows": {name: whole["rows"][name] for name in other["rows"]}})
    )
    out = folder / "joined.json"
    result = call(
        script, "table", folder / "few.json", folder / "results/learning-1.json", "--out", out
    )
    assert "2 seeds, 30 test images" in result.stdout
    assert "calibration and selective prediction" in result.stdout
    joined = json.loads(out.read_text())
    top1 = [run["rows"]["MARNet"]["top1"] for run in (whole, other)]
    seen = joined["summary"]["MARNet"]
    assert seen["top1_by_seed"] == top1
    assert seen["top1"] == pytest.approx(np.mean(top1))
    assert joined["summary"]["baseline"]["minus_baseline"] == 0
    assert len(joined["runs"]) == 2
    alone = call(script, "table", first)
    assert "1 seeds, 30 test images" in alone.stdout


def test_a_damaged_image_is_compared_with_the_baseline_on_the_same_one(script, whole) -> None:
    """On its own ten images, and no others."""
    found = script.summarise([whole])
    rows = whole["rows"]
    for name in ("blur 3: MARNet", "noise 1: alignment"):
        peer = f"{name.partition(': ')[0]}: baseline"
        expected = rows[name]["top1"] - rows[peer]["top1"]
        assert found[name]["minus_baseline"] == pytest.approx(expected)
        one, other = (script.right_answers([whole], n) for n in (name, peer))
        assert tuple(found[name]["interval"]) == paired_difference(one, other).interval


@pytest.mark.parametrize("kind", kept(["labels", "moving", "joint"], {"labels"}))
def test_a_control_is_added_to_the_file_of_its_seed(script, folder, whole, kind: str) -> None:
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(whole))
    call(script, "control", "--data", folder / "data", "--kind", kind, file)
    added = json.loads(file.read_text())
    names = {f"{kind}: {part}" for part in ("alignment", "+MLP", "refined", "MARNet")}
    assert set(added["rows"]) - set(whole["rows"]) == names
    found = script.summarise([added])
    expected = added["rows"][f"{kind}: MARNet"]["top1"] - added["rows"]["baseline"]["top1"]
    assert found[f"{kind}: MARNet"]["minus_baseline"] == pytest.approx(expected)


def test_a_control_on_other_data_is_refused(script, folder, digits, whole) -> None:
    file = folder / "other.json"
    file.write_text(json.dumps(whole))
    words = ["control", "--data", str(digits), "--kind", "labels", str(file)]
    result = CliRunner().invoke(script.main, words)
    assert result.exit_code == 2
    assert "is not the data set that" in result.output


def test_figures_of_a_row_by_hand(script) -> None:
    """Two noise seeds, three images of class 0; votes as sure as they say."""
    rows = script.Rows(torch.zeros(3, dtype=torch.int64))
    first = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    second = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    rows.add("row", [first, second], votes=np.array([1.0, 0.5, 0.5]))
    row = rows.found["row"]
    assert row["top1"] == 0.5
    answers = script.right_answers([{"rows": rows.found}], "row")
    assert answers.tolist() == [[1.0, 0.5, 0.0]]
    losses = [-np.log(p[:, 0].numpy()).mean() for p in (first, second)]
    assert row["log_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert row["risk_coverage_by_votes"] == pytest.approx((0 + 1 / 4 + 1 / 3) / 3)

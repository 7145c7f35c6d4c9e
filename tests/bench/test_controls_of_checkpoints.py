"""The script that trains controls on the encoders of finished trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner
from tiny_training import TINY, change, write_small

from marnet_train.tables.checkpoints import evaluate_seeds
from marnet_train.trainer import fit

RECIPE = change(
    TINY, alignment={"learn_from": "encoder.stages.1"}, refinement={"norm_weight": "auto"}
)


@pytest.mark.slow  # a training of its own
def test_rows_of_a_checkpoint_are_those_that_evaluate_has_and_controls_stand_beside(
    digits: Path, tmp_path: Path
) -> None:
    data, run = write_small(digits, tmp_path / "data"), tmp_path / "run"
    fit(data, RECIPE, run, seed=3)
    script, output = load_script("scripts/controls_of_checkpoints.py"), tmp_path / "found.json"
    asked = ["--data", str(data), "--checkpoint", str(run), "--output", str(output)]
    result = CliRunner().invoke(script.main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    (own,) = found["runs"]
    assert own["seed"] == 3
    (evaluated,) = evaluate_seeds([run], data, "test")["runs"]
    for name, row in evaluated["rows"].items():
        assert own["rows"][name]["top1"] == row["top1"], name
    trained = {"CE alone", "CE alone, on the baseline", "CE alone, fused"}
    trained |= {"+MLP on the baseline", "+CDR on the baseline"}
    assert own["rows"].keys() == evaluated["rows"].keys() | trained
    assert "MARNet - CE alone, fused" in found["pairs"]

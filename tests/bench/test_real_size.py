"""Real sizes: exports of minutes, which run with `pytest -m slow` and keep what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner

from marnet_export.build.builder import BUILDERS
from marnet_export.build.types import PRECISIONS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/real_size.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("real_size.py")


def test_every_backend_is_exported_in_every_precision(script):
    asked = {(settings.backend, settings.precision) for settings in script.builds()}
    assert asked == {(b, p) for b in BUILDERS for p in PRECISIONS}


def test_the_fastest_bundle_is_held_to_the_fastest_peer_of_its_precision(script):
    medians = {"marnet a bf16": 2, "marnet b bf16": 3, "marnet c int8": 1, "x bf16": 8, "y bf16": 4}
    precision = {name: name.split()[-1] for name in medians}
    taken = {name: np.full(9, float(median)) for name, median in medians.items()}
    found = [(r["bundle"], r["peer"], r["ratio"]) for r in script.ratios(taken, precision)]
    assert found == [("marnet a bf16", "y bf16", 2.0), ("marnet c int8", "y bf16", 4.0)]


def test_a_bundle_may_be_built_with_both_loops_where_there_is_a_place_for_the_native_one(script):
    chosen = script.builds(only=("onnxruntime int8", "torchscript fp32"), loops=("graph", "native"))
    found = {(settings.backend, settings.loop) for settings in chosen}
    assert found == {("torchscript", "graph"), ("onnxruntime", "graph"), ("onnxruntime", "native")}


def test_the_fastest_native_loop_is_held_to_the_fastest_graph(script):
    medians = {"marnet a int8 native": 2, "marnet a int8 graph": 5, "marnet b int8 graph": 4}
    taken = {name: np.full(9, float(median)) for name, median in medians.items()}
    found = list(script.ratios(taken, dict.fromkeys(medians, "int8")))
    pairs = [(r["bundle"], r["peer"], r["ratio"]) for r in found]
    assert pairs == [("marnet a int8 native", "marnet b int8 graph", 2.0)]


def test_a_trained_checkpoint_has_no_automatic_choice(script, tmp_path):
    options = ["--checkpoint", str(tmp_path), "--auto", "int8", "--output", str(tmp_path / "f")]
    result = CliRunner().invoke(script.main, options)
    assert result.exit_code == 2
    assert "--auto goes with --model, not with --checkpoint: leave one out" in result.stderr


@pytest.mark.hour
@pytest.mark.parametrize("model", ["vit-b16", "swin-t", "resnet-50"])
def test_a_model_of_real_size_is_exported_and_measured_in_every_form(model):
    day = datetime.now(UTC).date().isoformat()
    output = ROOT / f"benchmarks/results/{day}-cpu-real-size-{model}.json"
    subprocess.run([sys.executable, SCRIPT, "--model", model, "--output", output], check=True)
    report = json.loads(output.read_text())
    exported = [row for row in report["rows"] if "backend" in row]
    for row in exported:
        assert "refused" in row or 0 <= row["agreement"] <= 1, row["name"]
        assert row["peak_mb"] > 0
    delivered = {(row["backend"], row["precision"]) for row in exported if "refused" not in row}
    lacking = {  # what this processor cannot compute
        (row["backend"], row["precision"])
        for row in exported
        if "arithmetic, and openvino would emulate it" in row.get("refused", "")
    }
    assert {("openvino", p) for p in PRECISIONS} <= delivered | lacking
    assert {(b, "fp32") for b in BUILDERS} <= delivered

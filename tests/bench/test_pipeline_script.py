"""The comparison with transformers' pipeline is of equal weights, and says what it found."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner


def load(name: str) -> ModuleType:
    return load_script(f"scripts/{name}.py")


@pytest.mark.slow
def test_both_give_the_same_labels(tmp_path):
    script, out = load("pipeline"), tmp_path / "pipeline.json"
    options = ["--model", "tiny", "--backend", "onnxruntime", "--steps", 4, "--threads", 1]
    options += ["--side", 96, "--side", 640, "--duration", 0, "--warmup", 0, "--out", out]
    result = CliRunner().invoke(script.main, [*map(str, options)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    names = [script.PEER, script.ZERO, script.FAST, script.LOOP]
    assert [(row["side"], row["name"]) for row in found["rows"]] == [
        (side, name) for side in (96, 640) for name in names
    ]
    rows = {(row["side"], row["name"]): row for row in found["rows"]}
    for side in (96, 640):
        assert rows[side, script.ZERO]["same_label_as_peer"] == 6
        assert rows[side, script.ZERO]["low"] <= rows[side, script.ZERO]["ratio"]
    near = [rows[side, script.FAST]["beside_exact"] for side in (96, 640)]
    assert near[0]["largest_grey_levels"] == 0  # too small for another scale
    assert near[1]["largest_grey_levels"] > 0
    assert "6 of 6" in result.output


def test_an_environment_with_torch_is_refused(tmp_path, bundle_of, photographs):
    script = load("cold_start")
    options = ["--model", bundle_of("onnxruntime", "fp32"), "--image", photographs[0]]
    options += ["--python", sys.executable, "--out", tmp_path / "cold.json"]
    result = CliRunner().invoke(script.main, [*map(str, options)])
    assert result.exit_code == 1
    assert "expected an environment without torch" in " ".join(result.stderr.split())


def test_starts_and_sizes_are_kept(tmp_path, bundle_of, photographs, monkeypatch):
    script, out = load("cold_start"), tmp_path / "cold.json"
    site = tmp_path / "site"
    (site / "numpy/core").mkdir(parents=True)
    (site / "numpy/core/a.so").write_bytes(bytes(1000))
    (site / "six.py").write_bytes(bytes(10))
    (site / "pip").mkdir()
    (site / "pip/a.py").write_bytes(bytes(99))
    monkeypatch.setattr(script, "_ABOUT", f"print('[[], {json.dumps(str(site))}]')")
    options = ["--model", bundle_of("onnxruntime", "fp32"), "--image", photographs[0]]
    options += ["--python", sys.executable, "--starts", 2, "--out", out]
    result = CliRunner().invoke(script.main, [*map(str, options)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    assert found["bytes"] == {"numpy": 1000, "six.py": 10}
    assert len(found["starts"]) == 2
    for start in found["starts"]:
        assert start["whole_s"] > sum(start[part] for part in script.PARTS) > 0
    assert "installed" in result.output

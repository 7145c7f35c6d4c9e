"""The record of a measurement beside other work holds what its table shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from benchmark_scripts import load_script
from click.testing import CliRunner

from marnet_bench.cli import main as measure


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, on a machine where no control group can be made."""
    module = load_script("scripts/busy.py")
    monkeypatch.setattr(module, "GROUPS", tmp_path / "no groups")
    monkeypatch.setattr(module, "TURNS", 1)
    return module


def in_this_process(command: list[str], **_: object) -> SimpleNamespace:
    """Run the command here: a process of its own takes seconds to import torch."""
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(measure, command[command.index("-c") + 2 :])
    finally:
        torch.set_num_threads(threads)
    return SimpleNamespace(returncode=result.exit_code, stderr=result.output)


def test_a_backend_is_measured_and_what_cannot_be_is_left_out(
    script, bundle_of, tmp_path, monkeypatch
):
    played = SimpleNamespace(run=in_this_process, DEVNULL=None, PIPE=None)
    monkeypatch.setattr(script, "subprocess", played)
    (tmp_path / "onnxruntime.marnet").symlink_to(bundle_of("onnxruntime", "fp32"))
    out = tmp_path / "busy.json"
    options = ["--bundles", tmp_path, "--backend", "onnxruntime", "--batch", 1, "--out", out]
    chosen = ["--duration", 0, "--condition", "idle", "--condition", "quota of 1"]
    result = CliRunner().invoke(script.main, [*map(str, options), *map(str, chosen)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    (line,) = found["lines"]
    times = line["bytes"]
    assert min(times[f"{name}_ms"] for name in ("ours", "peer", "alone", "one_thread")) > 0
    assert times["low"] <= times["ratio"] <= times["high"]
    assert f"{times['ours_ms']:.1f} ms, {times['peer_ms']:.1f} ms" in result.stdout
    assert "quota of 1: left out" in result.stderr


def test_a_command_that_fails_says_why(script, tmp_path):
    options = ["--bundles", tmp_path, "--backend", "openvino", "--out", tmp_path / "busy.json"]
    result = CliRunner().invoke(script.main, [*map(str, options), "--condition", "idle"])
    assert result.exit_code == 1
    assert "marnet_bench ended with" in result.stderr
    assert "openvino.marnet" in result.stderr


@pytest.mark.slow
def test_all_loops_are_measured_beside_each_other(script, tmp_path):
    out = tmp_path / "busy.json"
    options = ["--loop", 1, "--steps", 2, "--duration", 0, "--condition", "idle", "--out", out]
    result = CliRunner().invoke(script.main, [*map(str, options)])
    assert result.exit_code == 0, result.output
    (loop,) = json.loads(out.read_text("utf-8"))["loops"]
    assert (loop["condition"], loop["steps"]) == ("idle", 2)
    found = {(line["model"], line["precision"]) for line in loop["lines"]}
    assert found >= {("marnet onnxruntime", "int8"), ("TorchScript", "fp32")}
    assert "idle: 2 steps, batch 1, ms" in result.stdout


def test_nothing_to_measure_is_said(script, tmp_path):
    result = CliRunner().invoke(script.main, ["--out", str(tmp_path / "busy.json")])
    assert result.exit_code == 2
    assert "give --bundles, --data or --loop" in result.stderr

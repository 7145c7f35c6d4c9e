"""marnet-bench as it is typed, and the report that others read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from marnet_bench.cli import main
from marnet_bench.photographs import golden_images
from marnet_bench.report import print_report
from marnet_sdk.bundle import read_bundle, reseal_bundle

SHORT = ("--warmup", "1", "--duration", "0")


@pytest.fixture(scope="module")
def bundle(bundle_of) -> str:
    return str(bundle_of("torchscript", "fp16"))


@pytest.fixture
def workplace(
    bundle: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Holds the bundle and its checkpoint, both under other names."""
    shutil.copytree(checkpoint, tmp_path / "runs/renamed")
    shutil.copytree(bundle, tmp_path / "bundles/mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def report(bundle, checkpoint) -> dict[str, Any]:
    """What --format json prints for a bundle and its peer."""
    chosen = ("--batch", "4", "--checkpoint", str(checkpoint), "--format", "json")
    result = bench("-m", bundle, *chosen, *SHORT)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_report_says_what_was_measured_on_what(report, bundle):
    assert report["bundle"] == Path(bundle).name
    assert (report["batch"], report["steps"]) == (4, 100)
    assert report["precision"]["asked"] == "fp16"
    assert report["precision"]["compute"] == "fp32"
    assert report["fidelity"] == json.loads((Path(bundle) / "fidelity.json").read_text())
    assert report["accuracy"]["marnet"]["top1"] > 0.5
    assert report["accuracy"]["split"] == "test"
    machine = report["machine"]
    assert machine["threads"] >= 1
    assert machine["memory_gib"] > 0
    assert {"marnet", "torch", "numpy"} <= machine["packages"].keys()
    assert machine["date"].startswith("20")


def test_both_inputs_of_both_models_are_measured(report):
    pairs = [(line["model"], line["input"]) for line in report["lines"]]
    models = ("bundle", "plain PyTorch")
    assert sorted(pairs) == sorted((m, kind) for m in models for kind in ("bytes", "pixels"))
    for line in report["lines"]:
        assert len(line["seconds"]) == line["calls"] >= 10
        assert 0 < line["p50_ms"] <= line["p90_ms"] <= line["p99_ms"]
        rate = 4 * line["calls"] / sum(line["seconds"])
        assert line["images_per_s"] == pytest.approx(rate, rel=1e-3)
        assert line["drift"] >= 0


def test_speed_ups_are_ratios_of_medians_with_an_interval(report):
    medians = {(line["model"], line["input"]): line["p50_ms"] for line in report["lines"]}
    assert [ratio["input"] for ratio in report["speedups"]] == ["bytes", "pixels"]
    for ratio in report["speedups"]:
        kind = ratio["input"]
        expected = medians["plain PyTorch", kind] / medians["bundle", kind]
        assert ratio["ratio"] == pytest.approx(expected, rel=1e-3)
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert ratio["over"] == "plain PyTorch"


def test_json_of_the_newest_bundle_can_be_written_beside_the_table(workplace):
    result = bench("--batch", "2", "-o", "deep/er/report.json", *SHORT)
    assert result.exit_code == 0, result.stderr
    assert "model bundles/mine (the newest" in one_line(result.stderr)
    content = json.loads((workplace / "deep/er/report.json").read_text())
    assert content["batch"] == 2
    assert len(content["lines"]) == 4  # the checkpoint was found by its content
    assert "wrote deep/er/report.json" in one_line(result.stderr)
    table = result.stdout
    assert "batch 2, 100 steps" in table
    assert "MARNet, bundle" in table
    for line in content["lines"]:
        assert f"{line['p50_ms']:.2f}" in table
    assert f"{content['accuracy']['baseline']['top1']:.1%}" in table
    assert "95 % interval" in one_line(result.stderr)
    assert "Next: marnet-bench --batch 1" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (
            {"ratio": 1.02, "low": 0.97, "high": 1.08},
            "no difference from plain PyTorch can",
        ),
        ({"ratio": 1.52, "low": 1.4, "high": 1.6}, "1.52 times the speed of plain PyTorch"),
        ({"ratio": 0.8, "low": 0.7, "high": 0.9}, "0.80 times the speed of plain PyTorch"),
    ],
)
def test_a_difference_within_the_noise_is_not_called_one(report, capsys, ratio, verdict):
    print_report(report | {"speedups": [report["speedups"][0] | ratio]})
    assert f"from bytes: {verdict}" in one_line(capsys.readouterr().err)


def test_a_checkpoint_without_metrics_leaves_accuracy_blank(report, capsys):
    print_report(report | {"accuracy": None})
    out = capsys.readouterr().out
    assert "image baseline" not in out
    assert out.count("MARNet, PyTorch") == 2


def test_a_bundle_can_be_measured_alone_and_needs_no_checkpoint(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = bench("-m", bundle, "--no-peer", "--format", "json", *SHORT)
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert [line["model"] for line in content["lines"]] == ["bundle", "bundle"]
    assert content["speedups"] == []
    assert content["accuracy"] is None


def test_the_number_of_threads_holds_for_bundle_and_peer(bundle, checkpoint):
    before = torch.get_num_threads()
    try:
        chosen = ("--checkpoint", str(checkpoint), "--threads", "1", "--format", "json")
        assert bench("-m", bundle, *chosen, *SHORT).exit_code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_without_a_bundle_the_command_that_makes_one_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = bench("--batch", "64")
    assert result.exit_code == 2
    assert "marnet-export --precision fp16" in one_line(result.stderr)


def test_without_its_checkpoint_both_ways_out_are_named(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(bundle, tmp_path / "b.marnet")
    shutil.rmtree(copy / "source")
    reseal_bundle(copy)
    result = bench("-m", str(copy), *SHORT)
    assert result.exit_code == 2
    assert "name it with --checkpoint" in one_line(result.stderr)
    assert "--no-peer" in one_line(result.stderr)


def test_a_report_that_cannot_be_written_is_one_line(bundle):
    chosen = ("--no-peer", "--format", "json", "--output", "/dev/full")
    result = bench("-m", bundle, *chosen, *SHORT)
    assert result.exit_code == 1
    assert "/dev/full: no space left on its file system" in one_line(result.stderr)
    blocked = bench("-m", bundle, *chosen[:-1], f"{bundle}/manifest.json/x.json", *SHORT)
    assert blocked.exit_code == 1
    assert "x.json: cannot be written (" in one_line(blocked.stderr)


def test_drift_beyond_the_limit_exits_with_4_after_the_report(bundle, monkeypatch):
    monkeypatch.setattr("marnet_bench.scenarios.drift", lambda seconds: 0.25)
    chosen = ("--no-peer", "--max-drift", "0.2", "--format", "json")
    result = bench("-m", bundle, *chosen, *SHORT)
    assert result.exit_code == 4
    said = one_line(result.stderr)
    assert "drift by 25% during the run, 20% was allowed; close other programs" in said
    assert len(json.loads(result.stdout)["lines"]) == 2
    patient = bench("-m", bundle, "--no-peer", "--max-drift", "0.3", "--format", "json", *SHORT)
    assert patient.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "0 is not in the range x>=1"),
        (("--format", "jsno"), "Did you mean 'json'?"),
        (("-m", "nowhere"), "nowhere is not a directory, so it is not a bundle"),
        (("--duration", "-1"), "-1.0 is not in the range x>=0"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_right(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_help_shows_the_usual_command():
    text = one_line(bench("--help").stdout)
    assert "marnet-bench --batch 64" in text
    assert "Default: the newest" in text


@pytest.mark.parametrize("count", [1, 8, 20])
def test_golden_images_are_repeated_to_fill_a_batch(bundle, count):
    folder = Path(bundle) / "golden/images"
    stored = [(folder / f"{i % 8}.png").read_bytes() for i in range(count)]
    assert golden_images(read_bundle(bundle), count) == stored

"""The comparison of servers finds the rate of a real one, and keeps what its table shows."""

from __future__ import annotations

import json
from types import ModuleType

import click
import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/serving.py")


def test_a_server_is_asked_and_its_rates_are_kept(script, bundle_of, tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_bench.traffic._MOST_RUNS", 2)  # of a search that ends nowhere
    out = tmp_path / "serving.json"
    options = ["--model", bundle_of("onnxruntime", "fp32"), "--no-peer", "--turns", 1]
    chosen = [*options, "--duration", 0.1, "--latency", 60_000, "--out", out]
    result = CliRunner().invoke(script.main, [*map(str, chosen)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    ((name, (turn,)),) = found["runs"].items()
    assert name == script.OURS
    assert turn["rate"] == max(run["images_per_s"] for run in turn["runs"])
    assert turn["processor_ms"] > 0
    assert f"{turn['processor_ms']:.2f} ms" in result.output


def test_a_server_that_does_not_start_is_one_line(script, tmp_path):
    with (
        pytest.raises(click.ClickException, match="a server did not start"),
        script.serving(tmp_path / "none.marnet", script.Candidate()),
    ):
        pass


@pytest.mark.slow
def test_several_processes_have_a_line_of_their_own(script, bundle_of, tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_bench.traffic._MOST_RUNS", 2)
    out = tmp_path / "serving.json"
    options = ["--model", bundle_of("onnxruntime", "fp32"), "--no-peer", "--turns", 1]
    chosen = [*options, "--processes", 2, "--duration", 0.1, "--latency", 60_000, "--out", out]
    result = CliRunner().invoke(script.main, [*map(str, chosen)])
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert list(runs) == [script.OURS, f"{script.OURS}, 2 processes"]
    assert all(turn["rate"] > 0 for (turn,) in runs.values())


def test_the_lines_of_both_servers_say_how_many_processes_they_have(script):
    candidates = [script.Candidate(delay, count) for count in (1, 2) for delay in (None, 2.0)]
    assert [candidate.name for candidate in candidates] == [
        "marnet-serve",
        "LitServe, 2 ms",
        "marnet-serve, 2 processes",
        "LitServe, 2 ms, 2 workers",
    ]

"""The record of what the batcher adds to a model holds what its table shows."""

from __future__ import annotations

import json

from benchmark_scripts import load_script
from click.testing import CliRunner


def test_the_batcher_is_measured_alone_and_in_batches(tmp_path):
    script = load_script("scripts/batcher.py")
    out = tmp_path / "batcher.json"
    few = ["--requests", 5, "--batches", 4, "--batch", 8, "--model-ms", 0.1, "--repeat", 2]
    result = CliRunner().invoke(script.main, [*map(str, few), "--out", str(out)])
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert len(runs) == 2
    for run in runs:
        assert 0 < run["alone"]["p50_us"] <= run["alone"]["p99_us"]
        assert 1 <= run["in_batches"]["batch"] <= 8
        assert run["in_batches"]["processor_us"] > 0
    assert "a lone request" in result.stdout
    assert "at most 150" in result.stdout

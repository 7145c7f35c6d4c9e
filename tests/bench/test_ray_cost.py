"""The measurement of what Ray costs meets three servers, and compares what they answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from local_ray import run_python

SCRIPT = Path(__file__).parents[2] / "benchmarks/scripts/ray_cost.py"


@pytest.mark.slow
def test_three_servers_are_asked_and_their_rates_are_kept(bundle_of, tmp_path):
    out = tmp_path / "ray.json"
    options = ["--model", bundle_of("onnxruntime", "fp32"), "--turns", "1", "--threads", "1"]
    short = ["--duration", "0.1", "--latency", "60000", "--out", out]
    said = run_python(SCRIPT, *options, *short, cwd=tmp_path)
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert list(runs) == ["marnet-serve", "Ray Serve, ours", "Ray Serve, @serve.batch"]
    for (turn,) in runs.values():
        assert 0 < turn["lone"]["p50_ms"] <= turn["lone"]["p99_ms"]
        assert turn["rate"] == max(run["images_per_s"] for run in turn["runs"])
        assert f"{turn['rate']:.0f}" in said

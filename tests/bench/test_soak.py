"""The soak in its short form: nothing is left behind, and the record holds what its table shows."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner
from quick import kept


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/soak.py")


@pytest.mark.parametrize(
    ("target", "requests"),
    kept(
        [("in process", 60), ("in process", 300), ("marnet-serve", 300)],
        {("in process", 60)},
        many=True,
    ),
)
def test_requests_and_two_reloads_leave_nothing_behind(
    script, bundle_of, zero_bundle, tmp_path, target, requests
):
    out = tmp_path / "soak.json"
    bundles = ["--model", bundle_of("onnxruntime", "fp32")]
    bundles += ["--other", zero_bundle("onnxruntime", "fp32")]
    options = [*bundles, "--requests", requests, "--reloads", 3, "--callers", 4, "--out", out]
    if target == "marnet-serve":
        options.append("--server")
    result = CliRunner().invoke(script.main, [*map(str, options)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    assert (found["target"], found["requests"], found["reloads"]) == (target, requests, 2)
    assert sum(found["outcomes"].values()) == requests
    assert found["outcomes"].keys() >= {"answered", "no image", "given up"}
    assert found["outcomes"]["answered"] > requests * 2 // 3
    assert found["same_at_the_end"]
    assert [look["requests"] for look in found["looks"]] == [*range(requests)]
    assert "resident MiB" in result.output


def test_a_change_of_memory_is_told_from_none(script):
    noise = np.random.default_rng(0).normal(0, 0.2, 240)
    flat = [{"requests": 100 * i, "mib": 50 + noise[i]} for i in range(240)]
    rising = [look | {"mib": look["mib"] + 0.001 * look["requests"]} for look in flat]
    still, leak = script.slope(flat), script.slope(rising)
    assert still["low"] < 0 < still["high"]
    assert 0 < leak["low"] < 1024 < leak["high"]
    assert script.slope(flat[:20])["kib"] is None


def test_what_is_left_is_named(script):
    before = {"mib": 1.0, "threads": 3, "fds": 9}
    assert script.left(before, before | {"mib": 9.0, "fds": 8}) == []
    assert script.left(before, before | {"threads": 4}) == ["threads"]

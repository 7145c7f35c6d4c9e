"""Two reports are compared line by line, and only where they measured the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from quick import kept

from marnet_bench.cli import main
from marnet_bench.compare import FASTER, SAME, SLOWER, compare, read_report
from marnet_bench.timing import independent_interval
from marnet_sdk.errors import DataError, InvalidInput

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def report(slowness: float = 1.0, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A report of a bundle and its peer, whose bundle takes so many times as long."""
    rng = np.random.default_rng(seed)
    lines = []
    for model, times in (("bundle", slowness), ("plain PyTorch", 3.0)):
        seconds = 0.01 * times * rng.gamma(50, 0.02, 200)
        lines.append({"model": model, "input": "bytes", "seconds": seconds.tolist()})
    machine = {"processor": "Xeon", "architecture": "x86_64", "cpus": "2"}
    machine |= {"packages": {"numpy": "2"}}
    whole = {"scenario": "batches", "batch": 1, "bundle": "digits", "checkpoint_sha256": "aa"}
    return whole | {"threads": 2, "lines": lines, "machine": machine} | more


def searched(best: float, late: float, seed: int = 0) -> dict[str, Any]:
    runs = [{"rate": best / 2, "p99_ms": 5.0}, {"rate": best, "p99_ms": 90.0}]
    runs.append({"rate": late, "p99_ms": 300.0})
    more = {"scenario": "server", "searched": True, "latency_ms": 100.0, "runs": runs}
    line = {"traffic": "server", "rate": best, "seconds": [0.01] * 20}
    return report(seed=seed) | more | {"best": runs[1], "lines": [line]}


def test_a_bundle_that_became_slower_is_told_and_its_peer_is_not():
    changes, notes = compare(report(), report(1.3, seed=1))
    bundle, peer = changes
    assert (bundle.line, bundle.measure) == ("bundle, from bytes", "median")
    assert bundle.ratio == pytest.approx(1 / 1.3, rel=0.1)
    assert bundle.low < bundle.ratio < bundle.high < 1
    assert (bundle.verdict, peer.verdict) == (SLOWER, SAME)
    assert bundle.old == pytest.approx(10, rel=0.1)  # milliseconds
    assert bundle.regressed(0.05)
    assert not bundle.regressed(0.5)
    assert notes == []
    assert compare(report(1.3), report(seed=1))[0][0].verdict == FASTER


def test_what_is_not_shown_to_be_slower_than_the_margin_is_no_regression():
    (bundle, _), _ = compare(report(), report(1.04, seed=1))
    assert not bundle.regressed(0.05)


@pytest.mark.parametrize("drift", kept([0.0, 0.3], {0.0}))
def test_runs_of_one_program_are_seldom_told_apart(drift):
    """Calls one after another are alike, and yet 95 of 100 intervals hold 1, or nearly so many."""

    def run(rng: np.random.Generator) -> np.ndarray:
        noise = np.convolve(rng.normal(size=310), np.ones(11) / 11, "valid")
        return 0.01 * (1 + drift * noise + 0.02 * rng.exponential(size=300))

    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        _, low, high = independent_interval(run(rng), run(rng), resamples=300)
        held += low <= 1 <= high
    assert held >= 0.8 * 40


def test_an_interval_inverts_with_its_arguments():
    rng = np.random.default_rng(0)
    old, new = rng.gamma(9, 1, 100), rng.gamma(9, 2, 60)
    ratio, low, high = independent_interval(old, new)
    inverse = independent_interval(new, old)
    assert inverse[0] == pytest.approx(1 / ratio)
    assert low < ratio < high < 1 < inverse[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scenario": "stages"}, "measured different things: scenario batches and stages"),
        ({"batch": 64}, "batch 1 and 64; measure one again"),
    ],
)
def test_reports_of_different_things_are_refused(more, message):
    for anyway in (False, True):
        with pytest.raises(InvalidInput, match=message):
            compare(report(), report(**more), anyway=anyway)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"checkpoint_sha256": "bb"}, "checkpoint_sha256 aa and bb"),
        ({"checkpoint_sha256": None, "bundle": "plates"}, "bundle digits and plates"),
        ({"threads": 4}, "threads 2 and 4"),
        ({"machine": report()["machine"] | {"processor": "EPYC"}}, "processor Xeon and EPYC"),
    ],
)
def test_other_models_and_machines_are_refused_unless_asked(more, message):
    with pytest.raises(InvalidInput, match=f"{message}; .*--anyway"):
        compare(report(), report(**more))
    changes, notes = compare(report(), report(**more), anyway=True)
    assert len(changes) == 2
    assert message in notes


def test_another_bundle_of_the_same_checkpoint_is_compared_and_said():
    changes, notes = compare(report(), report(bundle="digits-int8", backend="openvino"))
    assert len(changes) == 2
    assert notes == ["bundle digits and digits-int8"]


def test_lines_of_one_report_alone_are_said():
    alone = report()
    alone["lines"] = alone["lines"][:1]
    changes, notes = compare(report(), alone)
    assert [change.line for change in changes] == ["bundle, from bytes"]
    assert notes == ["only in the old report: plain PyTorch, from bytes"]
    alone["lines"] = []
    with pytest.raises(InvalidInput, match="no line in common"):
        compare(report(), alone)


def test_rates_that_searches_found_are_bounded_by_what_was_too_late():
    (change,), _ = compare(searched(100, 106), searched(150, 159))
    assert (change.measure, change.old, change.new) == ("images/s", 100, 150)
    assert (change.ratio, change.low, change.high) == pytest.approx((1.5, 150 / 106, 1.59))
    assert change.verdict == FASTER
    (same,), _ = compare(searched(100, 106), searched(103, 109))
    assert same.verdict == SAME


def test_a_server_at_one_rate_is_held_to_its_99th_percentile_too():
    old, new = (searched(100, 106) | {"searched": False} for _ in range(2))
    changes, _ = compare(old, new)
    assert [change.measure for change in changes] == ["median", "99th percentile"]


def run(old: Any, new: Any, tmp_path: Path, *more: str) -> Result:
    for name, content in (("old", old), ("new", new)):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    words = [str(tmp_path / "old"), str(tmp_path / "new"), *more]
    return CliRunner().invoke(main, ["compare", *words])


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_command_prints_a_table_and_exits_with_6_on_a_regression(tmp_path):
    result = run(report(), report(1.3, seed=1), tmp_path)
    assert result.exit_code == 6
    assert "REGRESSION" in result.stdout
    assert "no difference" in result.stdout
    assert "slower by more than 5%: bundle, from bytes, median: 0.7" in one_line(result.stderr)
    assert run(report(), report(1.3, seed=1), tmp_path, "--margin", "0.5").exit_code == 0
    assert run(report(1.3), report(seed=1), tmp_path).exit_code == 0


def test_the_comparison_can_be_written_as_json(tmp_path):
    result = run(report(), report(), tmp_path, "--format", "json", "-o", str(tmp_path / "c.json"))
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "c.json").read_text())
    assert [line["verdict"] for line in content["lines"]] == ["no difference"] * 2
    assert content["margin"] == 0.05


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"scenario": 1, "lines": [], "machine": {}}', "\x00"]
)
def test_what_is_no_report_is_one_line(content, tmp_path):
    result = run(report(), content, tmp_path)
    assert result.exit_code == 1
    assert "expected JSON of marnet-bench --output" in one_line(result.stderr)


def test_lines_without_times_say_what_to_do(tmp_path):
    bare = copy.deepcopy(report())
    for line in bare["lines"]:
        del line["seconds"]
    with pytest.raises(DataError, match=r"a line without its times .* measure it again"):
        compare(report(), bare)
    assert run(bare, report(), tmp_path).exit_code == 1


def test_reports_that_were_committed_can_be_compared():
    (path,) = RESULTS.glob("*-cpu-digits-openvino-fp16-batch1.json")
    old = read_report(path)
    changes, _ = compare(old, old)
    assert {change.verdict for change in changes} == {SAME}
    assert len(changes) == len(old["lines"])


def test_options_of_a_measurement_before_the_command_are_refused(tmp_path):
    result = CliRunner().invoke(main, ["--batch", "64", "compare", "a", "b"])
    assert result.exit_code == 2
    assert "--batch is of a measurement, not of compare" in one_line(result.stderr)
    assert CliRunner().invoke(main, ["compaer"]).exit_code == 2
    shown = one_line(CliRunner().invoke(main, ["compare", "--help"]).stdout)
    assert "The exit code is 6" in shown

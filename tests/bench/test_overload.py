"""The overload of a bundle: with brown-out nobody is refused, and the record says who answered."""

from __future__ import annotations

import json

from benchmark_scripts import load_script
from click.testing import CliRunner


def test_an_overload_is_measured_with_brown_out_and_without(swept_bundle, digits, tmp_path):
    script = load_script("scripts/overload.py")
    out = tmp_path / "overload.json"
    options = ["--model", swept_bundle, "--data", digits, "--duration", 0.2, "--turns", 1]
    result = CliRunner().invoke(script.main, [*map(str, options), "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text("utf-8"))
    (run,) = found["runs"]["with brown-out"]
    assert run["rate"] == 1.5 * found["capacity"][0]
    assert sum(run["points"].values()) + run["refused"] == run["images"]
    assert run["points"].keys() <= {"exact", "fast"}
    assert found["runs"]["without"][0]["points"].keys() == {"exact"}
    assert found["accuracy"].keys() == found["pareto"].keys() == {"exact", "fast"}
    assert 0 < run["accuracy"] <= 1
    assert "with brown-out" in result.output

"""A first run on a GPU: the plan, and what becomes of parts that fail, hang or have no time."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from waiting import until

from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.gpu.tensorrt_library import find_device

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_run")


def no_gpu() -> str:
    """Why there is none; else the test is skipped."""
    try:
        find_device()
    except BackendUnavailable as error:
        return str(error)
    pytest.skip("there is a GPU here")


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(script, tmp_path, capsys):
    reason = no_gpu()
    assert script.main(["--output", str(tmp_path / "out")]) == 5
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "", f"no GPU here: {reason}; to walk the plan, add --dry-run\n"
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_plan_has_every_file_with_tests_for_a_gpu_but_the_suite_s_own(script):
    planned = {word for part in script.PLAN for word in part.tests if word.endswith(".py")}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu\b|def test_\w+\(machine\b", path.read_text("utf-8"))
        and path != Path(__file__)
    }
    assert planned == found - {"tests/bench/test_gpu_suite.py"}


def test_the_runtimes_and_the_suite_fit_into_the_time_whatever_they_take(script):
    names = [part.name for part in script.PLAN]
    first = script.PLAN[: names.index("suite") + 1]
    assert {"loop kernel", "torch runtime", "TensorRT runtime"} < {part.name for part in first}
    assert sum(part.seconds for part in first) <= script.BUDGET <= 12 * 60


# What stands for a part: it ends at once, fails, or never ends.
PARTS = {
    "good": "print('1 passed')",
    "bad": "raise SystemExit('1 failed')",
    "hangs": "print('begun', flush=True); import threading; threading.Event().wait()",
    "late": "raise AssertionError('there is no time for it')",
}


def test_a_part_that_fails_hangs_or_has_no_time_is_told_and_the_others_run(
    script, tmp_path, monkeypatch, capsys
):
    plan = [script.Part(name, 60) for name in ("bad", "hangs", "good")]
    plan.append(script.Part("late", 0.1))
    monkeypatch.setattr(script, "LEAST", 0.2)
    monkeypatch.setattr(script, "PLAN", plan)
    monkeypatch.setattr(
        script, "_command", lambda part, *_: [sys.executable, "-S", "-c", PARTS[part.name]]
    )
    out = tmp_path / "new" / "out"

    class Impatient(subprocess.Popen):
        """A process whose time is over once it hangs, however long it took to come to that."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and PARTS["hangs"] in self.args:
                until(lambda: b"\nbegun\n" in (out / "log.txt").read_bytes())
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(script.subprocess, "Popen", Impatient)
    assert script.main(["--output", str(out), "--dry-run"]) == 1
    report = json.loads((out / "run.json").read_text())
    found = {part["name"]: (part["outcome"], part["says"]) for part in report["parts"]}
    assert found == {
        "bad": ("failed", "1 failed"),
        "hangs": ("ended", "begun"),
        "good": ("passed", "1 passed"),
        "late": ("left out", "0 s were left for it"),
    }
    said = capsys.readouterr().out
    assert re.search(r"^late: left out after 0.0 s: 0 s were left for it$", said, re.MULTILINE)
    assert said.endswith(f"{out}: 2 of 4 parts failed\n")
    log = (out / "log.txt").read_text()
    assert log.index("1 failed") < log.index("begun") < log.index("1 passed")
    with pytest.raises(SystemExit, match="2"):  # what a first run has said is not overwritten
        script.main(["--output", str(out), "--dry-run"])
    assert "has files in it; name a new folder, as in make gpu OUT=DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_walks_the_whole_plan(script, tmp_path):
    no_gpu()
    assert script.main(["--output", str(tmp_path), "--dry-run", "--seconds", "1200"]) == 0
    report = json.loads((tmp_path / "run.json").read_text())
    assert {part["outcome"] for part in report["parts"]} == {"passed"}
    assert json.loads((tmp_path / "suite.json").read_text())["dry_run"]

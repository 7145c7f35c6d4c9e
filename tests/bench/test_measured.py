"""The tables of the pages are what benchmarks/results/ gives, and so are figures in sentences."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import load_script

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/measured.md"]


@pytest.fixture(scope="module")
def measured() -> ModuleType:
    return load_script("scripts/measured.py")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_tables_of_the_results(measured: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert measured.written(text) == text, "run python benchmarks/scripts/measured.py"


def test_every_part_is_on_a_page(measured: ModuleType) -> None:
    text = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
    assert [name for name in measured.PARTS if text.count(f"<!-- /{name} -->") != 1] == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("report", ["plates-accuracy", "grocery-accuracy", "grocery-tuned"])
def test_the_gain_that_a_sentence_names_is_the_one_that_was_measured(
    measured: ModuleType, page: str, report: str
) -> None:
    joined = measured.tuned() if report == "grocery-tuned" else measured.read(f"cpu-{report}")
    found = joined["summary"]["MARNet"]
    text = (ROOT / page).read_text("utf-8")
    assert f"{100 * found['minus_baseline']:+.1f} points" in text
    assert f"({measured.points(found['interval'])})" in text


def test_the_newest_report_of_a_name_is_read(
    measured: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    for date in ("2026-11-21", "2026-12-01", "2026-11-30"):
        (tmp_path / f"{date}-cpu-loop.json").write_text(f'{{"date": "{date}"}}')
    (tmp_path / "2026-12-02-cpu-loop-of-another.json").write_text("{}")
    assert measured.read("cpu-loop") == {"date": "2026-12-01"}


def test_a_control_that_was_measured_has_its_rows(measured: ModuleType) -> None:
    row = {"top1": 0.5, "minus_baseline": 0.01, "interval": [0.0, 0.02], "seeds": [0, 1]}
    found = {"shuffled: MARNet": {**row, "interval_over_seeds": [-0.0001, 0.03]}}
    line = "| shuffled texts: MARNet | 50.0 % | +1.0 | +0.0 to +2.0 | -0.0 to +3.0 | 2 |"
    assert line in measured.controls(found)
    assert "not measured" in measured.controls({})

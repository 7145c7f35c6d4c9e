"""Rows of several seeds joined: figures by hand, and tables in every format."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64

from marnet_train.measures import paired_interval, student_interval
from marnet_train.tables.answers import right_answers, row_of
from marnet_train.tables.joined import average, compare, summarise
from marnet_train.tables.written import section_of, tables, write_tables

CORRECT = st.lists(st.booleans(), min_size=1, max_size=20)


def row(correct: list[bool], **more: float) -> dict[str, Any]:
    """The row of answers that are right for some of the images, of two classes."""
    p = torch.tensor([[0.9, 0.1] if right else [0.2, 0.8] for right in correct])
    return row_of([p], torch.zeros(len(correct), dtype=torch.int64)) | more


def run(seed: int, **rows: list[bool]) -> dict[str, Any]:
    return {"seed": seed, "rows": {name: row(correct) for name, correct in rows.items()}}


# --- one row


def test_figures_of_a_row_by_hand() -> None:
    """Two noise samples, three images of class 0; votes as sure as they say."""
    first = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    second = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    labels = torch.zeros(3, dtype=torch.int64)
    found = row_of([first, second], labels, votes=np.array([1.0, 0.5, 0.5]))
    assert (found["images"], found["top1"], found["top5"]) == (3, 0.5, 1.0)
    losses = [-np.log(p[:, 0].numpy()).mean() for p in (first, second)]
    assert found["log_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["risk_coverage_by_votes"] == pytest.approx((0 + 1 / 4 + 1 / 3) / 3)
    answers = right_answers([{"rows": {"row": found}}], "row")
    assert answers.tolist() == [[1.0, 0.5, 0.0]]


@given(CORRECT)
def test_a_row_remembers_which_images_it_has_right(correct: list[bool]) -> None:
    runs = [{"rows": {"row": json.loads(json.dumps(row(correct)))}}]
    assert right_answers(runs, "row").tolist() == [[float(right) for right in correct]]


# --- several seeds


def test_one_seed_has_the_paired_interval_worked_out_by_hand() -> None:
    """Of 98 images the row alone has one right, and the baseline alone two."""
    base, other = [True] * 98, [True] * 98
    base[0] = other[1] = other[2] = False
    found = summarise([run(0, baseline=base, alignment=other)])["alignment"]
    reach = 0.0196 * math.sqrt(3.99)  # 1.96 sqrt(1 + 2 + 1 - 1 / 100) / 100
    assert found["minus_baseline"] == pytest.approx(-1 / 98, abs=FLOAT64)
    assert found["interval"] == pytest.approx((-0.01 - reach, -0.01 + reach), abs=FLOAT64)
    assert found["interval"] == pytest.approx(paired_interval(1, 2, 98)[1:], abs=FLOAT64)
    assert found["p"] == pytest.approx(math.erfc(0.01 * 1.96 / reach / math.sqrt(2)), abs=FLOAT64)
    assert all(math.isnan(bound) for bound in found["interval_over_seeds"])


def test_seeds_have_students_interval_of_their_differences_and_accuracies() -> None:
    """Differences of 1/4 and 2/4, accuracies of 3/4 and 4/4: t of one degree of freedom is 12.7."""
    half = [True, True, False, False]
    found = summarise(
        [
            run(0, baseline=half, MARNet=[True, True, True, False]),
            run(1, baseline=half, MARNet=[True] * 4),
        ]
    )["MARNet"]
    assert found["top1_by_seed"] == [0.75, 1.0]
    assert found["top1"] == 0.875
    reach = 12.706205 * math.sqrt(2) * 0.125 / math.sqrt(2)
    assert found["top1_interval"] == pytest.approx((0.875 - reach, 0.875 + reach), rel=1e-6)
    assert found["interval_over_seeds"] == pytest.approx((0.375 - reach, 0.375 + reach), rel=1e-6)
    assert found["interval"][0] < 0.375 < found["interval"][1]


@given(CORRECT, st.data())
def test_a_row_that_is_the_baseline_differs_in_nothing(correct, data) -> None:
    other = data.draw(st.permutations(correct))
    runs = [run(0, baseline=correct, MARNet=correct), run(1, baseline=other, MARNet=other)]
    found = summarise(runs)["MARNet"]
    assert found["minus_baseline"] == 0
    assert found["p"] == 1
    assert found["interval"][0] < 0 < found["interval"][1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 60))
def test_p_is_below_one_in_twenty_where_the_interval_leaves_zero_out(seed, count, images) -> None:
    rng = np.random.default_rng(seed)
    runs = [
        run(
            s,
            baseline=(rng.random(images) < 0.3).tolist(),
            MARNet=(rng.random(images) < 0.8).tolist(),
        )
        for s in range(count)
    ]
    found = summarise(runs)["MARNet"]
    low, high = found["interval"]
    assert 0 <= found["p"] <= 1
    if low > 0 or high < 0:
        assert found["p"] < 0.05
    if low < -FLOAT64 and high > FLOAT64:
        assert found["p"] > 0.0499  # 1.96 is 95.0004 %


def test_damaged_images_are_compared_with_the_baseline_on_the_same_ones() -> None:
    rows = {
        "baseline": row([True, False, True, True]),
        "blur 3: baseline": row([False, False]),
        "blur 3: MARNet": row([True, False]),
    }
    found = summarise([{"seed": 0, "rows": rows}])
    assert found["blur 3: MARNet"]["minus_baseline"] == 0.5
    assert found["blur 3: MARNet"]["interval"] == pytest.approx(paired_interval(1, 0, 2)[1:])


def test_rows_that_only_some_seeds_have_are_joined_over_those() -> None:
    base = [True, False]
    runs = [run(3, baseline=base), run(5, baseline=base, refined=[True, True])]
    found = summarise(runs)
    assert found["baseline"]["seeds"] == [3, 5]
    assert found["refined"]["seeds"] == [5]


@pytest.mark.parametrize("kind", ["shuffled", "swd"])
def test_pairs_are_differences_of_rows_on_the_same_images(kind: str) -> None:
    """Those with a control, and those with another alignment loss."""
    rows = {"alignment": row([True, True]), f"{kind}: alignment": row([True, False])}
    found = compare([{"seed": 0, "rows": rows}])
    assert list(found) == [f"alignment - {kind}: alignment"]
    assert found[f"alignment - {kind}: alignment"]["mean"] == 0.5


def test_figures_are_averaged_over_the_seeds_where_they_mean_something() -> None:
    found = average([{"x_v": {"cka": 0.2, "mmd": None}}, {"x_v": {"cka": 0.4, "mmd": None}}])
    assert found["x_v"]["cka"]["mean"] == pytest.approx(0.3)
    assert found["x_v"]["cka"]["interval"] == pytest.approx(student_interval([0.2, 0.4]))
    assert "mmd" not in found["x_v"]
    assert average([]) == {}


# --- for people


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("baseline", "parts"),
        ("+CDR on the baseline", "parts"),
        ("+MLP", "on the aligned encoder"),
        ("CE alone, fused", "cross-entropy alone"),
        ("random: MARNet", "controls"),
        ("fusion: hm, logit", "other fusions"),
        ("refined, t uniform", "other settings of phase B"),
        ("refined, 10 steps, K = 1", "operating points"),
        ("MARNet, ddim 10 steps, K = 8", "operating points"),
        ("blur 1: MARNet", "damaged images"),
        ("whatever else", "other rows"),
    ],
)
def test_every_row_has_its_table(name: str, section: str) -> None:
    assert section_of(name) == section


def test_a_table_is_written_as_markdown_csv_and_json(tmp_path: Path) -> None:
    runs = [run(s, baseline=[True, False] * 10, MARNet=[True] * 20) for s in (0, 1)]
    joined = {
        "summary": summarise(runs),
        "pairs": compare(runs),
        "spaces": average([{"x_EMA": {"cka": 0.25, "mmd": None}}]),
        "left_out": {"labels": "12 classes and a width of 8"},
    }
    write_tables(tmp_path, "ablation", "MARNet on digits", joined)
    text = (tmp_path / "ablation.md").read_text()
    assert text.startswith("# MARNet on digits\n")
    assert "| baseline: image only | 2 | 50.00 % | 50.0 to 50.0 | 100.00 % | | | | |" in text
    assert "| +Fusion: the whole | 2 | 100.00 % | 100.0 to 100.0 | 100.00 % | +50.00 | " in text
    assert "| x_EMA | 0.250 | | | |" in text
    assert "| labels | 12 classes and a width of 8 |" in text
    rows = {
        r["row"]: r for r in csv.DictReader(io.StringIO((tmp_path / "ablation.csv").read_text()))
    }
    assert float(rows["MARNet"]["minus_baseline"]) == 0.5
    assert float(rows["MARNet"]["low"]) == joined["summary"]["MARNet"]["interval"][0]
    assert rows["MARNet"]["seeds"] == "0 1"
    assert json.loads((tmp_path / "ablation.json").read_text())["left_out"] == joined["left_out"]


def test_the_whole_of_seda_is_not_called_marnet(tmp_path: Path) -> None:
    names = (
        "baseline",
        "MARNet",
        "marnet: MARNet",
        "progressive: MARNet",
        "MARNet, 2 steps, K = 1",
    )
    runs = [run(0, **{name: [True, False] for name in names})]
    joined = {"method": "seda", "summary": summarise(runs), "pairs": compare(runs)}
    write_tables(tmp_path, "ablation", "SeDA on digits", joined)
    text = (tmp_path / "ablation.md").read_text()
    for row in ("SeDA - marnet: MARNet", "SeDA - progressive: SeDA", "SeDA, 2 steps, K = 1"):
        assert f"| {row} |" in text
    assert text.count("MARNet") == 2  # the peer, and SeDA minus the peer
    rows = csv.DictReader(io.StringIO((tmp_path / "ablation.csv").read_text()))
    assert {row["row"] for row in rows} >= {"SeDA", "progressive: SeDA", "marnet: MARNet"}


def test_one_seed_has_no_interval_over_seeds_in_any_format(tmp_path: Path) -> None:
    joined = {"summary": summarise([run(0, baseline=[True, False], MARNet=[True, True])])}
    assert tables(joined)[0].rows[1][3] == ""
    write_tables(tmp_path, "ablation", "one seed", joined)
    assert "nan" not in (tmp_path / "ablation.md").read_text().lower()
    assert "nan" not in (tmp_path / "ablation.csv").read_text().lower()
    text = (tmp_path / "ablation.json").read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read["summary"]["MARNet"]["top1_interval"] == [None, None]
    assert tables(read)[0].rows == tables(joined)[0].rows

"""Rows of answers in every format."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_sdk.commands.rows import LINES, check_parquet, make_row, print_tables, write_rows
from marnet_sdk.errors import ImageError, MissingExtra
from marnet_sdk.prediction import Prediction, Score

NAMES = st.text(st.characters(exclude_characters="\0\r\n"), min_size=1, max_size=8)


@st.composite
def answers(draw: Any) -> tuple[Path, Prediction | ImageError]:
    path = Path(draw(NAMES))
    if draw(st.booleans()):
        return path, ImageError("image", draw(NAMES))
    score = draw(st.floats(0, 1))
    top = tuple(Score(draw(NAMES), i, score / (i + 1)) for i in range(draw(st.integers(1, 3))))
    error = draw(st.none() | st.floats(0, 1))
    spread = {"samples": draw(st.integers(1, 9)), "standard_error": error}
    abstain = draw(st.none() | st.booleans())
    best = (top[0].label, top[0].index, top[0].score)
    return path, Prediction(*best, top, abstain=abstain, **spread)


ROWS = st.lists(answers().map(lambda pair: make_row(*pair)), max_size=5)


@given(ROWS)
def test_json_is_one_array_and_json_lines_are_one_row_each(rows):
    assert "\n".join(LINES["json"](iter(rows))) == json.dumps(rows, indent=2)
    lines = list(LINES["jsonl"](iter(rows)))
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(rows))
    assert all(line.isascii() and line.isprintable() for line in lines)


@given(ROWS)
def test_csv_is_read_as_it_was(rows):
    text = "".join(f"{line}\n" for line in LINES["csv"](rows))
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    first = [line for line in found if line["rank"] in ("", "1")]
    assert [line["image"] for line in first] == [row["image"] for row in rows]
    assert [line["error"] for line in first] == [row.get("error", "") for row in rows]
    tops = [top["label"] for row in rows for top in row.get("top", ())]
    assert [line["label"] for line in found if line["rank"]] == tops


def test_parquet_has_a_row_for_each_image_with_types(tmp_path):
    import pyarrow.parquet

    best = Prediction("cat", 3, 0.75, (Score("cat", 3, 0.75), Score("dog", 0, 0.25)), samples=4)
    odd = Path("raw\udcffname.jpg")
    rows = [make_row(odd, best), make_row(Path("b.jpg"), ImageError("b.jpg", "no image"))]
    write_rows(rows, "parquet", tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    good, bad = table.to_pylist()
    assert good["image"] == "raw\\udcffname.jpg"
    assert (good["label"], good["index"], good["score"], good["samples"]) == ("cat", 3, 0.75, 4)
    assert good["top"][1] == {"label": "dog", "index": 0, "score": 0.25}
    assert good["error"] is None
    assert (bad["image"], bad["error"], bad["label"]) == ("b.jpg", "no image", None)
    assert str(table.schema.field("score").type) == "double"


def test_a_file_without_rows_is_still_one_of_its_format(tmp_path):
    import pyarrow.parquet

    for form in (*LINES, "parquet"):
        write_rows([], form, tmp_path / form)
    assert json.loads((tmp_path / "json").read_text()) == []
    assert (tmp_path / "jsonl").read_text() == ""
    assert (tmp_path / "csv").read_text().count("\n") == 1
    assert pyarrow.parquet.read_table(tmp_path / "parquet").num_rows == 0


def test_without_pyarrow_the_line_that_installs_it_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[datasets\]"'):
        check_parquet()


def test_tables_end_after_a_thousand_rows(capsys):
    answer = Prediction("cat", 0, 1.0, (Score("cat", 0, 1.0),))
    print_tables((make_row(Path(f"{i}.jpg"), answer) for i in range(1001)), several=False)
    out = capsys.readouterr().out
    assert out.count("image ") == 2
    assert out.count(".jpg") == 1001

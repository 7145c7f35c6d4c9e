"""Answers as rows, and rows as a table, JSON, JSON lines, CSV or Parquet: a few rows at a time.

A row is what JSON says of one image: its name, and the answer or the error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marnet_sdk.console import csv_line, print_table, say
from marnet_sdk.errors import ImageError, InferenceError, requires_extra
from marnet_sdk.prediction import Prediction

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]
_TABLE = 1000  # rows of one table: its columns are as wide as what they hold
_GROUP = 10_000  # rows of one row group of a Parquet file
_SPREAD = ("samples", "vote_share", "standard_error", "abstain")


def make_row(image: Path | str, answer: Prediction | ImageError | InferenceError) -> Row:
    """The row of an image."""
    if isinstance(answer, ImageError):
        return {"image": str(image), "error": answer.problem}
    if isinstance(answer, InferenceError):
        return {"image": str(image), "error": str(answer)}
    row = {"image": str(image)} | asdict(answer)
    if answer.provenance is None:
        del row["provenance"]
    return row


# --- for people


def print_tables(rows: Iterator[Row], *, several: bool) -> None:
    """Print rows as tables, one for each thousand.

    Args:
        several: with columns for what several noise samples say.
    """
    spread = ("+-", "votes") if several else ()
    columns, abstains = ("image", "label", "score", *spread, "then"), False
    while block := list(islice(rows, _TABLE)):
        print_table("", columns, [_cells(row, several=several) for row in block])
        abstains = abstains or any(row.get("abstain") for row in block)
    if abstains:
        say("(abstain): the score is below the threshold that the export found for its target risk")


def _cells(row: Row, *, several: bool) -> list[str]:
    if "error" in row:
        return [row["image"], "error", *[""] * (3 if several else 1), row["error"]]
    label = f"{row['label']} (abstain)" if row["abstain"] else row["label"]
    cells = [row["image"], label, f"{row['score']:.2%}"]
    if several:
        error = row["standard_error"]
        votes = f"{row['vote_share']:.0%} of {row['samples']}"
        cells += ["" if error is None else f"{error:.2%}", votes]
    return [*cells, ", ".join(f"{top['label']} {top['score']:.1%}" for top in row["top"][1:])]


# --- for programs


def _json(rows: Iterable[Row]) -> Iterator[str]:
    """One array, as `json.dumps(list(rows), indent=2)` writes it."""
    rest = iter(rows)
    row = next(rest, None)
    if row is None:
        yield "[]"
        return
    yield "["
    while row is not None:
        text = json.dumps(row, indent=2).replace("\n", "\n  ")
        row = next(rest, None)
        yield f"  {text}" if row is None else f"  {text},"
    yield "]"


def _json_lines(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row)


def _csv(rows: Iterable[Row]) -> Iterator[str]:
    """A header, and one line for each of the top classes of each image."""
    yield csv_line(["image", "rank", "label", "index", "score", *_SPREAD, "error"])
    for row in rows:
        if "error" in row:
            yield csv_line([row["image"], *[""] * 8, row["error"]])
            continue
        for rank, top in enumerate(row["top"], 1):
            # What is said of the answer is said once.
            spread = [row[name] if rank == 1 else None for name in _SPREAD]
            line = [row["image"], rank, top["label"], top["index"], f"{top['score']:.6f}", *spread]
            yield csv_line(["" if value is None else value for value in [*line, ""]])


LINES: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    "json": _json,
    "jsonl": _json_lines,
    "csv": _csv,
}
"""Rows as the lines of a text, by the name of its format."""


def write_rows(rows: Iterable[Row], form: str, path: Path) -> None:
    """Write rows to a file: json, jsonl and csv in UTF-8, or parquet.

    Raises:
        MissingExtra: parquet, and pyarrow is not installed.
    """
    if form == "parquet":
        _write_parquet(iter(rows), path)
        return
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.writelines(f"{line}\n" for line in LINES[form](rows))


def check_parquet() -> None:
    """Refuse to write Parquet where that cannot be done.

    Raises:
        MissingExtra: pyarrow is not installed; it comes with the extra `datasets`.
    """
    with requires_extra("datasets", "pyarrow"):
        import pyarrow.parquet  # noqa: F401


def arrow_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as a table of Arrow, with the columns of every Parquet file of answers.

    Texts have a form in UTF-8 there, as names of files need not; provenance is one text of JSON.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    check_parquet()
    import pyarrow as pa

    return pa.Table.from_pylist([_storable(row) for row in rows], schema=_arrow_schema())


def _arrow_schema() -> pa.Schema:
    import pyarrow as pa

    scores = pa.struct([("label", pa.string()), ("index", pa.int64()), ("score", pa.float64())])
    return pa.schema(
        [
            *(("image", pa.string()), ("label", pa.string()), ("index", pa.int64())),
            *(("score", pa.float64()), ("top", pa.list_(scores)), ("samples", pa.int64())),
            *(("vote_share", pa.float64()), ("standard_error", pa.float64())),
            *(("abstain", pa.bool_()), ("provenance", pa.string()), ("error", pa.string())),
        ]
    )


def _write_parquet(rows: Iterator[Row], path: Path) -> None:
    check_parquet()
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, _arrow_schema()) as writer:
        while group := list(islice(rows, _GROUP)):
            writer.write_table(arrow_table(group))


def _storable(row: Row) -> dict[str, Any]:
    """A row with texts that have a form in UTF-8, as names of files need not, and JSON in one."""
    ready = dict(row)
    if "provenance" in row:
        ready["provenance"] = json.dumps(row["provenance"])
    texts = ("image", "label", "error")
    ready |= {name: encodable(row[name]) for name in texts if name in row}
    if "top" in row:
        ready["top"] = [top | {"label": encodable(top["label"])} for top in row["top"]]
    return ready


def encodable(text: str) -> str:
    """A text with escapes for what has no form in UTF-8, as in names of files."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

"""CSV files that anybody may have written: rows with their line, and what is wrong with the rest.

UTF-8 with or without a byte-order mark, a header, fields quoted as in RFC 4180.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from marnet_sdk.errors import nearest
from marnet_train.data.examples import Problems, check_regular
from marnet_train.data.image_names import is_encodable, quoted

Row = tuple[int, dict[str, str | None]]  # 1-based line on which it starts; None for an empty field


def read_csv(path: Path, required: Sequence[str], problems: Problems) -> Iterator[Row]:
    """Yield the good rows of a CSV file. Blank lines are skipped, columns not in `required` kept.

    Args:
        required: columns that the header must have.
        problems: is told of every bad row with file and line. Nothing is raised.
    """
    try:
        check_regular(path)
        # Bytes that are not UTF-8 become half surrogate pairs, and are found in their row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _named_rows(path, _rows(path, file, problems), required, problems)
    except FileNotFoundError:
        problems.add(f"{path}: missing; write a CSV file with the header {','.join(required)}")
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror}); expected a text file")


def _rows(path: Path, lines: Iterator[str], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of every row that is CSV and UTF-8."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on at the next line
            problems.add(
                f"{path}:{line}: not CSV ({error}); put a text with commas, quotes or line ends "
                'in quotes, and write "" for a quote inside'
            )
            continue
        if odd := next((field for field in row if not is_encodable(field)), None):
            value = next(ord(c) - 0xDC00 for c in odd if 0xDC00 <= ord(c) < 0xDD00)
            problems.add(f"{path}:{line}: not UTF-8 (byte 0x{value:02x}); save it as UTF-8")
        elif row:
            yield line, row


def _named_rows(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    required: Sequence[str],
    problems: Problems,
) -> Iterator[Row]:
    """Yield rows as column -> field. Without a usable header there are none."""
    before = problems.count
    line, header = next(rows, (1, []))
    if problems.count > before:  # the header itself is unreadable, and that has been said
        return
    if fault := _header_fault(header, required):
        problems.add(f"{path}:{line}: {fault}")
        return
    for number, row in rows:
        if len(row) != len(header):
            problems.add(
                f"{path}:{number}: got {len(row)} fields, expected {len(header)} "
                f"({quoted(','.join(header))}); put a text with commas in quotes"
            )
            continue
        yield number, {key: field or None for key, field in zip(header, row, strict=True)}


def _header_fault(header: Sequence[str], required: Sequence[str]) -> str | None:
    expected = f"expected the header {','.join(required)}"
    if not header:
        return f"empty, {expected}"
    for column in required:
        if column not in header:
            near = nearest(column, header).replace("Did you mean", "Is it spelt")
            return f"no column {column!r} in {quoted(','.join(header))}, {expected}.{near}"
        if header.count(column) > 1:
            return f"column {column!r} is there {header.count(column)} times, {expected}"
    return None

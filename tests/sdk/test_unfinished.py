"""An output that is interrupted keeps its rows, and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marnet_sdk.commands.rows import Row, write_rows
from marnet_sdk.commands.unfinished import unfinished
from marnet_sdk.errors import DataError, InvalidInput, OutputBusy, OutputError, OutputExists

MADE_BY = {"bundle": "0123", "seed": 0}


class Cut(Exception):
    """Stands for whatever ends a run."""


def rows(names: range) -> Iterator[Row]:
    return ({"image": f"{i}.jpg", "label": "ü", "score": i / 7} for i in names)


def write(output: Path, names: range, cut: int | None = None, **how) -> list[Row]:
    """Write rows, until `cut` of them are written; returns those that were there."""
    kept: list[Row] = []
    options = {"resume": False, "force": False, "made_by": MADE_BY} | how
    finish = lambda content, path: write_rows(content, "jsonl", path)  # noqa: E731
    with unfinished(output, seen=kept.append, finish=finish, **options) as begun:
        for number, _ in enumerate(begun.add(rows(names)), 1):
            if number == cut:
                raise Cut
    return kept


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_run_leaves_the_output_alone(tmp_path, capsys):
    assert write(tmp_path / "out.jsonl", range(3)) == []
    assert read(tmp_path / "out.jsonl") == list(rows(range(3)))
    assert names(tmp_path) == ["out.jsonl"]
    assert capsys.readouterr().err == ""


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "new/out.jsonl"
    with pytest.raises(Cut):
        write(out, range(9), cut=4)
    assert not out.exists()
    assert "4 rows are in" in capsys.readouterr().err
    with pytest.raises(OutputExists, match=r"--resume goes on with them, --force begins again"):
        write(out, range(9))
    assert write(out, range(4, 9), resume=True) == list(rows(range(4)))
    assert read(out) == list(rows(range(9)))
    assert names(out.parent) == ["out.jsonl"]


def test_a_run_that_ends_before_its_first_row_leaves_nothing(tmp_path, capsys):
    finish = lambda content, path: None  # noqa: E731
    options = {"resume": False, "force": False, "seen": print, "finish": finish}
    with pytest.raises(Cut), unfinished(tmp_path / "out.jsonl", MADE_BY, **options):
        raise Cut
    assert names(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_resuming_what_was_not_begun_begins(tmp_path):
    assert write(tmp_path / "out.jsonl", range(2), resume=True) == []
    assert len(read(tmp_path / "out.jsonl")) == 2


@given(st.data())
def test_a_row_that_was_cut_off_anywhere_is_written_again(data):
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        partial = out.with_name("out.jsonl.partial")
        with pytest.raises(Cut):
            write(out, range(5), cut=3)
        content = partial.read_bytes()
        size = data.draw(st.integers(0, len(content)))
        partial.write_bytes(content[:size])
        kept = write_on(out, size, content)
        assert kept == list(rows(range(len(kept))))
        assert read(out) == list(rows(range(5)))


def write_on(out: Path, size: int, content: bytes) -> list[Row]:
    """Go on after as many rows as are whole in the first `size` bytes."""
    whole = max(content[:size].count(b"\n") - 1, 0)
    return write(out, range(whole, 5), resume=True)


def test_rows_of_another_bundle_or_setting_are_not_mixed_in(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(Cut):
        write(out, range(3), cut=1)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InvalidInput, match=r"other settings: seed \(0, now 1\); resume with those"):
        write(out, range(3), resume=True, made_by=MADE_BY | {"seed": 1})
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    assert write(out, range(3), force=True) == []
    assert len(read(out)) == 3


def test_a_damaged_row_is_not_skipped(tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(Cut):
        write(out, range(3), cut=3)
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines[:2], b"{\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"line 3 is no row; pass --force without --resume"):
        write(out, range(3), resume=True)


def test_an_output_that_is_there_stays_unless_it_may_be_replaced(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(OutputExists, match="already exists; choose another output or pass --force"):
        write(out, range(1), resume=True)
    with pytest.raises(Cut):
        write(out, range(2), cut=1, force=True)
    assert out.read_text() == "mine"
    write(out, range(1, 2), force=True, resume=True)
    assert len(read(out)) == 2


def test_one_process_writes_at_a_time(tmp_path):
    out = tmp_path / "out.jsonl"
    options = {"resume": False, "force": True, "seen": print, "finish": print}
    with (
        pytest.raises(OutputBusy, match="is at work there"),
        unfinished(out, MADE_BY, **options),  # type: ignore[arg-type]
    ):
        write(out, range(1), force=True)


def test_a_folder_that_must_not_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file/out.jsonl", range(1))


def test_rows_are_on_disk_before_the_next_is_made(tmp_path):
    seen: list[int] = []

    def looked() -> Iterator[Row]:
        for row in rows(range(3)):
            seen.append((tmp_path / "out.jsonl.partial").read_bytes().count(b"\n"))
            yield row

    finish = lambda content, path: None  # noqa: E731
    options = {"resume": False, "force": False, "seen": seen.append, "finish": finish}
    with pytest.raises(Cut), unfinished(tmp_path / "out.jsonl", MADE_BY, **options) as begun:
        raise Cut(len(list(begun.add(looked()))))
    assert seen == [1, 2, 3]

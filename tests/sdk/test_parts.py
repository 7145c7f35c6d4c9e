"""A folder of answers is whole at every moment, and an interrupted run goes on with it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

from marnet_sdk.commands.parts import RECORD, open_parts
from marnet_sdk.commands.rows import arrow_table
from marnet_sdk.errors import DataError, InvalidInput, MissingExtra, OutputBusy, OutputExists

MADE_BY = {"bundle": "0123", "top_k": 5}


def write(folder: Path, *names: str, resume: bool = False, **made_by) -> list[str]:
    """Write a file with a row for each name; returns the names that had one before."""
    with open_parts(folder, MADE_BY | made_by, resume=resume) as parts:
        before = parts.names().to_pylist()
        parts.write(arrow_table({"image": name, "error": "none"} for name in names))
    return before


def images(folder: Path) -> list[str]:
    return pyarrow.parquet.read_table(folder)["image"].to_pylist()


def test_a_run_goes_on_with_the_rows_that_are_there(tmp_path):
    folder = tmp_path / "new/answers"
    assert write(folder, "a", "b") == []
    assert write(folder, "c", resume=True) == ["a", "b"]
    assert write(folder, resume=True) == ["a", "b", "c"]
    assert images(folder) == ["a", "b", "c"]  # what Parquet's readers make of the folder


def test_resuming_begins_where_there_is_nothing(tmp_path):
    assert write(tmp_path, "a", resume=True) == []
    assert images(tmp_path) == ["a"]


def test_rows_are_not_added_to_by_accident(tmp_path):
    write(tmp_path, "a")
    with pytest.raises(OutputExists, match="resume=True goes on with them"):
        write(tmp_path, "b")
    assert images(tmp_path) == ["a"]


def test_rows_that_something_else_made_are_not_gone_on_with(tmp_path):
    write(tmp_path, "a")
    with pytest.raises(InvalidInput, match=r"other settings: top_k \(5, now 3\); resume with"):
        write(tmp_path, "b", resume=True, top_k=3)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(OutputExists, match=r"holds something else \(photo.jpg\)"):
        write(tmp_path, "a", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_record_that_says_nothing_is_named(tmp_path, content):
    write(tmp_path, "a")
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(DataError, match="does not say what made the answers"):
        write(tmp_path, "b", resume=True)


def test_a_damaged_file_is_named_and_does_not_count_as_answered(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", resume=True)
    damaged = tmp_path / "part-000000.parquet"
    damaged.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-000000.parquet is no file of answers .* remove it"):
        write(tmp_path, "c", resume=True)
    damaged.unlink()
    assert write(tmp_path, "a", resume=True) == ["b"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    write(tmp_path, "a")
    (tmp_path / ".part-000001.parquet.99.99").write_bytes(b"PAR1")
    write(tmp_path, "b", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        RECORD, "part-000000.parquet", "part-000001.parquet",
    ]  # fmt: skip


def test_one_process_writes_at_a_time(tmp_path):
    with (
        open_parts(tmp_path, MADE_BY, resume=False),
        pytest.raises(OutputBusy, match="is at work there"),
        open_parts(tmp_path, MADE_BY, resume=True),
    ):
        pass


def test_without_pyarrow_the_pip_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match="pip install"):
        write(tmp_path / "new", "a")
    assert not (tmp_path / "new").exists()

"""Answers in a folder of Parquet files, from which an interrupted run goes on.

`_made_by.json` says what makes the answers. Each `part-NUMBER.parquet` appears whole, so whatever
ends a run, all rows that are there can be read, and what has no row yet is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marnet_sdk.commands.rows import check_parquet
from marnet_sdk.commands.unfinished import differences
from marnet_sdk.errors import DataError, InvalidInput, OutputExists
from marnet_sdk.outputs import atomic_file, exclusive, writable

if TYPE_CHECKING:
    import pyarrow as pa

RECORD = "_made_by.json"  # readers of Parquet leave out what begins with _ or .


class Parts:
    """The files of a folder, in the process that alone writes there."""

    def __init__(self, folder: Path) -> None:
        """Find the files that are there."""
        self.folder = folder
        self._paths = sorted(folder.glob("part-*.parquet"))
        self._next = 1 + max(
            (int(path.stem.removeprefix("part-")) for path in self._paths), default=-1
        )

    def names(self) -> pa.ChunkedArray:
        """Read the names of the images that have a row.

        Raises:
            DataError: a file is damaged.
        """
        import pyarrow as pa

        columns = [_names_of(path) for path in self._paths]
        return pa.chunked_array([chunk for c in columns for chunk in c.chunks], pa.string())

    def write(self, table: pa.Table) -> None:
        """Write rows to the next file.

        Raises:
            OutputError: no space left, or the folder must not be written to.
        """
        from pyarrow.parquet import write_table

        path = self.folder / f"part-{self._next:06d}.parquet"
        with writable(path), atomic_file(path) as fresh:
            write_table(table, fresh)
        self._next += 1


@contextmanager
def open_parts(folder: Path, made_by: Mapping[str, Any], *, resume: bool) -> Iterator[Parts]:
    """Let the block add files to a folder, which no other process adds to meanwhile.

    Args:
        folder: is made where it is not there.
        made_by: what makes the rows, as JSON: rows that something else made are not gone on with.
        resume: go on with the rows that are there, if any are.

    Raises:
        OutputExists: rows are there without `resume`, or the folder holds something else.
        InvalidInput: the rows that are there were made with other settings.
        OutputBusy, OutputError: another process writes there; no space left, or not writable.
        MissingExtra: pyarrow is not installed.
    """
    check_parquet()
    lock = folder / ".lock"
    with exclusive(lock):
        try:
            _begin(folder, made_by, resume=resume)
            yield Parts(folder)
        finally:
            lock.unlink(missing_ok=True)


def _begin(folder: Path, made_by: Mapping[str, Any], *, resume: bool) -> None:
    record = folder / RECORD
    now = json.loads(json.dumps(made_by))
    if record.exists():
        _check(folder, _recorded(record), now, resume=resume)
    elif others := [e.name for e in folder.iterdir() if not e.name.startswith(".")]:
        raise OutputExists(
            f"{folder} holds something else ({others[0]}); choose another folder for the answers"
        )
    else:
        with writable(record), atomic_file(record) as fresh:
            fresh.write_text(json.dumps(now, indent=1) + "\n", "utf-8")
    for left in folder.glob(".part-*"):  # by a writer that was killed
        left.unlink(missing_ok=True)


def _check(folder: Path, before: Any, now: dict[str, Any], *, resume: bool) -> None:
    if not resume:
        raise OutputExists(
            f"{folder} holds answers of an earlier run; resume=True goes on with them, or choose "
            "another folder"
        )
    if before != now:
        raise InvalidInput(
            f"{folder} was begun with other settings: {differences(before, now)}; resume with "
            "those, or choose another folder"
        )


def _recorded(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{record} does not say what made the answers; choose another folder")
    return found


def _names_of(path: Path) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path).read(["image"])["image"]
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(
            f"{path} is no file of answers ({type(error).__name__}); remove it, and its images "
            "are classified again"
        ) from error

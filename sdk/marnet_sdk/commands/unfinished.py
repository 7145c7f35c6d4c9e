"""Rows of an output that is being written: FILE.partial, from which an interrupted run goes on.

Its first line says what makes the rows, and each line behind it is one row, both as JSON. FILE
itself appears whole, when all rows are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from marnet_sdk.commands.rows import Row
from marnet_sdk.console import say
from marnet_sdk.errors import DataError, InvalidInput, OutputExists, brief
from marnet_sdk.outputs import atomic_file, exclusive, writable


class Unfinished:
    """The rows that there are so far, on disk."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Take FILE.partial, which need not be there, and what makes its rows, as JSON."""
        self.path, self.count = path, 0
        self._first = _line(made_by)
        self._file: BinaryIO | None = None

    def open(self, *, resume: bool, seen: Callable[[Row], None]) -> None:
        """Open the file to add rows to, behind those that are there with `resume`.

        A last line that was cut off is dropped.

        Args:
            seen: is called with each row that is there.

        Raises:
            InvalidInput: the rows that are there were made in another way.
            DataError: the file is damaged.
        """
        with writable(self.path):
            again = resume and self.path.exists()
            self._file = self.path.open("r+b" if again else "w+b")
            kept = self._check(self._file, seen)
            self._file.truncate(kept)
            self._file.seek(kept)
            if not kept:
                self._file.write(self._first)
                self._file.flush()

    def close(self) -> None:
        """Close the file; what was written is there already."""
        if self._file is not None:
            with suppress(OSError):  # of a row that could not be written, which has been said
                self._file.close()

    def rows(self) -> Iterator[Row]:
        """Read the rows, one by one."""
        with self.path.open("rb") as file:
            for line in islice(file, 1, None):
                yield json.loads(line)

    def add(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Write rows, each before it is passed on."""
        assert self._file is not None
        for row in rows:
            with writable(self.path):
                self._file.write(_line(row))
                self._file.flush()
            self.count += 1
            yield row

    def _check(self, file: BinaryIO, seen: Callable[[Row], None]) -> int:
        """Check that the rows can be gone on with; returns how many bytes are whole lines."""
        kept = 0
        for number, line in enumerate(file):
            row = _parsed(line)
            if row is None:
                if file.read(1):
                    raise DataError(
                        f"{self.path}: line {number + 1} is no row; pass --force without --resume "
                        "to begin again"
                    )
                break
            if number:
                self.count += 1
                seen(row)
            elif line != self._first:
                changed = differences(row, json.loads(self._first))
                raise InvalidInput(
                    f"{self.path} was begun with other settings: {changed}; resume "
                    "with those, or pass --force without --resume to begin again"
                )
            kept += len(line)
        return kept


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings of which an output that was begun differs from one that is asked for."""
    return ", ".join(
        f"{key} ({brief(before.get(key))}, now {brief(now.get(key))})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


@contextmanager
def unfinished(
    output: Path,
    made_by: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
    seen: Callable[[Row], None],
    finish: Callable[[Iterator[Row], Path], None],
) -> Iterator[Unfinished]:
    """Let the block add rows; then `finish` writes them to `output`, which appears whole.

    Whatever ends the block before, the rows stay in FILE.partial.

    Args:
        made_by: what makes the rows, as JSON: rows that something else made are not gone on with.
        resume: go on with the rows that are there.
        force: replace `output`, and, without `resume`, what is there of a run that did not finish.
        seen: is called with each row that is there.
        finish: writes rows to a path beside `output`, which is then renamed.

    Raises:
        OutputExists: `output` is there, or an unfinished one that is neither to be gone on with nor
            to be replaced.
        InvalidInput, DataError: the rows that are there cannot be gone on with.
        OutputBusy, OutputError: another process writes there; no space left, or not writable.
    """
    if os.path.lexists(output) and not force:
        raise OutputExists(
            f"{output} already exists; choose another output or pass --force to replace it"
        )
    partial = output.with_name(f"{output.name}.partial")
    lock = output.with_name(f".{output.name}.lock")
    with exclusive(lock):
        try:
            if partial.exists() and not (resume or force):
                raise OutputExists(
                    f"{partial} holds rows of a run that did not finish; --resume goes on with "
                    "them, --force begins again"
                )
            begun = Unfinished(partial, made_by)
            try:
                begun.open(resume=resume, seen=seen)
                with _kept(output, begun):
                    yield begun
                with writable(output), atomic_file(output) as fresh:
                    finish(begun.rows(), fresh)
                partial.unlink()
            finally:
                begun.close()
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _kept(output: Path, begun: Unfinished) -> Iterator[None]:
    """Say how to go on when the block does not finish; leave nothing where it made no row."""
    try:
        yield
    except BaseException:
        if begun.count:
            say(
                f"{output} is not finished: {begun.count:,} rows are in {begun.path}; the same "
                "command with --resume goes on with them"
            )
        else:
            begun.path.unlink(missing_ok=True)
        raise


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line as JSON; None where it was cut off or is something else."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode("ascii") + b"\n"

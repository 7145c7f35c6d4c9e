"""The image files that a person means by files, folders, patterns and lists of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from marnet_sdk.errors import NotFound

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
)
"""The ends of the files that are taken from a folder, in small letters."""

LIST = Path("-")  # stands for a list on standard input


def image_paths(sources: Iterable[Path], listed: BinaryIO, *, null: bool = False) -> Iterator[Path]:
    """Yield the image files that the sources name, one by one and in a fixed order.

    A file is itself, whatever it is called. A folder stands for the image files in it and in the
    folders below, by their suffix and sorted by name; hidden ones, and folders behind symbolic
    links, are left out. A pattern with * ? or [ ] that is not the name of a file stands for what it
    matches; with ** in it, for files alone. `-` stands for the sources that `listed` names. What is
    not there or cannot be read is yielded as it is, so that whoever opens it says why.

    The names of one folder, and of those around it, are in memory at a time, and no others.

    Args:
        listed: one source a line; empty lines are skipped.
        null: its sources end with a null byte and not with the line, as of find -print0.

    Raises:
        NotFound: there is no image file at all, when all sources have been looked through.
    """
    named, found = [], False
    for source in sources:
        named.append(source)
        for one in _listed(listed, null=null) if source == LIST else (source,):
            for path in _meant(one):
                found = True
                yield path
    if not found:
        names = ", ".join("standard input" if source == LIST else str(source) for source in named)
        raise NotFound(
            f"no image files in {names}; name files, or folders that hold some "
            f"({', '.join(SUFFIXES)})"
        )


def _listed(file: BinaryIO, *, null: bool) -> Iterator[Path]:
    for entry in _until_null(file) if null else file:
        name = entry.rstrip(b"\0") if null else entry.rstrip(b"\r\n")
        if name:
            yield Path(os.fsdecode(name))


def _until_null(file: BinaryIO) -> Iterator[bytes]:
    """Split a file at its null bytes, a piece at a time."""
    rest = b""
    while piece := file.read(65536):
        *whole, rest = (rest + piece).split(b"\0")
        yield from whole
    yield rest


def _meant(source: Path) -> Iterator[Path]:
    name = str(source)
    if _is_folder(source):
        yield from _in_folder(source)
    elif glob.has_magic(name) and not os.path.lexists(source):
        yield from _matching(name) or (source,)
    else:
        yield source


def _matching(pattern: str) -> list[Path]:
    found: list[Path] = []
    for name in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207, which is relative
        if not _is_folder(name):
            found.append(Path(name))
        elif "**" not in pattern:  # which matches what is in the folder, too
            found += _in_folder(name)
    return found


def _is_folder(path: str | Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112, which raises where a folder above is closed


def _in_folder(folder: str | Path) -> Iterator[Path]:
    """Walk a folder depth first. No recursion: folders may be nested deeper than calls."""
    todo: list[Iterator[os.DirEntry[str] | Path]] = [_entries(folder)]
    while todo:
        entry = next(todo[-1], None)
        if entry is None:
            todo.pop()
        elif isinstance(entry, Path):
            yield entry
        elif entry.is_dir(follow_symlinks=False):
            todo.append(_entries(entry.path))
        elif entry.name.lower().endswith(SUFFIXES):
            yield Path(entry.path)


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str] | Path]:
    """List what is in a folder, sorted by name; the folder itself where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        yield Path(folder)
        return
    yield from sorted(found, key=lambda entry: entry.name)

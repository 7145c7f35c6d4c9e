"""Directories that appear whole or not at all, and finding the newest of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from marnet_sdk.errors import OutputExists


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it onto `target` if the block succeeds.

    The folder is removed if the block fails. With `overwrite`, an existing target is moved aside
    first and deleted last, so that a kill leaves the old one, the new one or none, never a mix.

    Raises:
        OutputExists: `target` exists and `overwrite` is False (checked before the block runs).
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(
            f"{target} already exists; choose another output or pass --force to replace it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A dot-prefixed sibling: the same file system, so the rename is atomic, and hidden from
    # `newest`, so an interrupted write is never picked up.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        _sync_tree(fresh)
        if os.path.lexists(target):
            target.rename(work / "old")
        fresh.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    """Flush every file and folder below `root` to disk, so that the rename cannot outrun them."""
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest(folder: Path, is_candidate: Callable[[Path], bool]) -> Path | None:
    """The most recently written sub-folder of `folder` that satisfies `is_candidate`."""
    if not folder.is_dir():
        return None
    found = [
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and is_candidate(entry)
    ]
    return max(found, key=lambda entry: entry.stat().st_mtime_ns, default=None)

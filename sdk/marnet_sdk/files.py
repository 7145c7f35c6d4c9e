"""Questions about files that are there: their checksum, and which folder is the newest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


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

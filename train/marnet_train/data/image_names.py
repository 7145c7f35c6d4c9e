"""Tells which `file_name`s of a split are safe and exist, with one scan of a directory.

`file_name` comes out of a file that anybody may have written, so a name is trusted only if it is
a plain relative path and what it leads to, symbolic links followed, lies inside the split. In a
snapshot of the hub's cache every file is a link to `blobs`, which the cache itself made.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

from marnet_train.data.looks import Looks, spelt_otherwise


def is_encodable(text: str) -> bool:
    """Tell whether `text` has a UTF-8 form. JSON can spell lone surrogates, which have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quoted(text: str) -> str:
    """Write `text` for an error message: quoted, on one line, printable anywhere, not endless."""
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}..."


def name_fault(name: str) -> str | None:
    """Say what is wrong with `name` as a path in a split, by its letters alone; None if nothing."""
    shown = quoted(name)
    parts = name.split("/")
    if "\0" in name or not is_encodable(name):
        return f'"file_name" {shown} holds a NUL or half a surrogate pair; rename the file'
    if name.startswith("/") or PureWindowsPath(name).drive:
        return f'"file_name" {shown} is absolute; make it relative to the folder of the metadata'
    if "\\" in name:
        return f'"file_name" {shown} holds a backslash; write / between folder and file'
    if ".." in parts:
        return f'"file_name" {shown} leads upwards (..); keep images below the metadata'
    if "" in parts or "." in parts:
        return f'"file_name" {shown} has an empty or "." part; write folder/file.png'
    return None


def _blobs(split: Path) -> list[str]:
    """List where the files of a split lie, if it is in a hub cache.

    It is REPOSITORY/snapshots/COMMIT/samples there.
    """
    snapshots = split.parents[1] if len(split.parents) > 2 else split
    blobs = snapshots.parent / "blobs"
    return [str(blobs)] if snapshots.name == "snapshots" and blobs.is_dir() else []


class ImageNames:
    """These are usable image names of a split folder, looked up by the `file_name` of a line."""

    def __init__(self, directory: Path) -> None:
        self._root = os.path.realpath(directory)
        self._roots = (self._root, *_blobs(Path(self._root)))
        self._listings: dict[str, frozenset[str]] = {}  # "" or "sub/folder/" -> names in it
        self._looks: dict[str, Looks] = {}  # path of a folder -> names in it, however usable

    def fault(self, name: str) -> str | None:
        """Say what is wrong with `name`, or None if it is a file inside the split."""
        # The slash stays with the folder, so that "/x.png" is not mistaken for "x.png".
        folder = name[: name.rfind("/") + 1]
        if folder not in self._listings:
            self._listings[folder] = self._scan(folder)
        if name[len(folder) :] in self._listings[folder]:
            return None
        return name_fault(name) or self._explain(name)

    def _scan(self, folder: str) -> frozenset[str]:
        """List the files in `folder` that lie inside the split; none if it is off limits."""
        if folder and name_fault(folder[:-1]):
            return frozenset()
        path = os.path.realpath(os.path.join(self._root, folder))
        if not self._is_inside(path):
            return frozenset()
        try:
            with os.scandir(path) as entries:
                return frozenset(entry.name for entry in entries if self._is_usable(entry))
        except OSError:  # no such folder, not a folder, name too long: each name in it is missing
            return frozenset()

    def _is_usable(self, entry: os.DirEntry[str]) -> bool:
        # A directory entry knows its own type, so only symbolic links cost system calls.
        if not entry.is_symlink():
            return entry.is_file()
        target = os.path.realpath(entry.path)
        return self._is_inside(target) and Path(target).is_file()

    def _is_inside(self, path: str) -> bool:
        return any(
            path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in self._roots
        )

    def _explain(self, name: str) -> str:
        shown = quoted(name)
        if not self._is_inside(os.path.realpath(os.path.join(self._root, name))):
            return f'"file_name" {shown} is a link out of the split; copy the image into it'
        hint = spelt_otherwise(self._spelt_otherwise(name))
        return f"no image file {shown}{hint}; restore it or remove the line"

    def _spelt_otherwise(self, name: str) -> str | None:
        """Find a file or folder in the split whose name looks like `name`."""
        found: list[str] = []
        for part in name.split("/"):
            folder = os.path.realpath(os.path.join(self._root, *found))
            if not self._is_inside(folder):
                return None
            if folder not in self._looks:
                entries = Path(folder).iterdir() if Path(folder).is_dir() else ()
                self._looks[folder] = Looks(entry.name for entry in entries)
            like = self._looks[folder].like(part)
            if like is None:
                return None
            found.append(like)
        other = "/".join(found)
        return other if other != name else None

"""Directories that appear whole or not at all, and finding the newest of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from marnet_sdk.errors import OutputExists

_STALE_AFTER = 3600  # seconds


def _read_umask() -> int:
    """It can only be read by setting it; what another thread makes meanwhile is private."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


_UMASK = _read_umask()  # once, as setting it concerns every thread


@contextmanager
def atomic_directory(
    target: Path,
    *,
    overwrite: bool = False,
    replaceable: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it onto `target` if the block succeeds.

    The folder is removed if the block fails. With `overwrite`, an existing target is moved aside
    first and deleted last: an exception leaves the old one or the new one, a kill perhaps none,
    but never a mix. Modes follow the umask, whatever the block gave its files.

    What a killed write leaves, `.<name>.xxxxxxxx`, is removed by the next successful write to the
    same target once it is an hour old, whoever made it and whatever it holds.

    Args:
        replaceable: whether an existing directory is of the kind that `overwrite` may replace;
            default: every directory is.

    Raises:
        OutputExists: `target` exists and `overwrite` is False, or it is no directory, not
            `replaceable`, or holds the working directory (checked before the block runs).
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target):
        _check_replaceable(target, overwrite, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A dot-prefixed sibling: the same file system, so the rename is atomic, and hidden from
    # `newest`, so an interrupted write is never picked up.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        _set_modes(fresh)
        _sync_tree(fresh)
        if os.path.lexists(target):
            target.rename(work / "old")
        fresh.rename(target)
        _sync(target.parent)
        _remove_stale(target)
    finally:
        if os.path.lexists(work / "old") and not os.path.lexists(target):
            (work / "old").rename(target)
        shutil.rmtree(work, ignore_errors=True)


def _check_replaceable(
    target: Path, overwrite: bool, replaceable: Callable[[Path], bool] | None
) -> None:
    if not overwrite:
        raise OutputExists(
            f"{target} already exists; choose another output or pass --force to replace it"
        )
    if not target.is_dir():
        problem = "is not a directory"
    elif _holds_working_directory(target):
        problem = "is or contains the current working directory"
    elif replaceable is not None and not replaceable(target):
        problem = "holds something else"
    else:
        return
    raise OutputExists(
        f"{target} {problem}: it does not look like what would be replaced, so it is left alone; "
        "choose another output, or remove it yourself"
    )


def _holds_working_directory(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder.resolve())
    except FileNotFoundError:  # the working directory was deleted
        return False


def _remove_stale(target: Path) -> None:
    """Remove what killed writes to `target` left; see `atomic_directory`."""
    made_here = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names them
    for entry in target.parent.iterdir():
        if made_here.fullmatch(entry.name) and _is_stale(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _is_stale(work: Path) -> bool:
    """Whether it is an hour old and holds what a write makes, not a user's hidden folder."""
    try:
        old = time.time() - work.lstat().st_mtime > _STALE_AFTER
        return old and {entry.name for entry in work.iterdir()} <= {"new", "old"}
    except OSError:  # another writer was faster, or it is no folder
        return False


def _set_modes(root: Path) -> None:
    """Give all below `root` the modes of ordinary files: some writers make private ones."""
    for folder, _, names in os.walk(root):
        Path(folder).chmod(0o777 & ~_UMASK)
        for path in (Path(folder) / name for name in names):
            if not path.is_symlink():
                path.chmod(0o666 & ~_UMASK)


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

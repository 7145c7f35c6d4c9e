"""Files and directories that appear whole or not at all, and locks: for whoever writes."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from marnet_sdk.errors import MarnetError, OutputBusy, OutputError, OutputExists

_STALE_AFTER = 3600  # seconds
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2


def _read_umask() -> int:
    """Read the umask by setting it: what another thread makes meanwhile is private."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


_UMASK = _read_umask()  # once, as setting it concerns every thread
_FILE_MODE = 0o666 & ~_UMASK  # of ordinary files: some writers make private ones


@contextmanager
def atomic_directory(
    target: Path,
    *,
    overwrite: bool = False,
    replaceable: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it onto `target` if the block succeeds.

    The folder is removed if the block fails. With `overwrite`, old and new change places in one
    step where the file system can do that, as those of Linux can: whatever happens, the old one or
    the new one is at `target`. Elsewhere a kill in the middle leaves none. Modes follow the umask,
    whatever the block gave its files.

    What a killed write leaves, `.<name>.xxxxxxxx`, is removed by the next successful write to the
    same target once it is an hour old, whoever made it and whatever it holds.

    Args:
        replaceable: whether an existing directory is of the kind that `overwrite` may replace;
            default: every directory is.

    Raises:
        OutputExists: see `check_output`, which runs before the block, and again after it: what
            came to `target` meanwhile, and is not to be replaced, is still there.
        OutputError: no space left, or the folder around `target` must not be written to.
    """
    check_output(target, overwrite=overwrite, replaceable=replaceable)
    target = Path(os.path.abspath(target))
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A dot-prefixed sibling: the same file system, so the rename is atomic, and hidden from
        # `newest`, so an interrupted write is never picked up.
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with enough_space(target):
            fresh = work / "new"
            fresh.mkdir()
            yield fresh
            _set_modes(fresh)
            _sync_tree(fresh)
            check = partial(check_output, target, overwrite=overwrite, replaceable=replaceable)
            _put_in_place(fresh, target, work / "old", check)
            _sync(target.parent)
            _remove_stale(target)
    finally:
        if os.path.lexists(work / "old") and not os.path.lexists(target):
            (work / "old").rename(target)
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(fresh: Path, target: Path, aside: Path, check: Callable[..., None]) -> None:
    """Rename `fresh` to `target`; what was at `target` stays at `fresh` or `aside`.

    Args:
        check: raises if what is at `target`, or was and is at `found` now, must stay.
    """
    if _rename(fresh, target, _NOREPLACE):
        return
    check()
    if not os.path.lexists(target):  # a file system that cannot do that
        fresh.rename(target)
    elif _rename(fresh, target, _EXCHANGE):
        try:
            check(found=fresh)  # another process may have been between the check and this
        except OutputExists:
            _rename(fresh, target, _EXCHANGE)
            raise
    else:
        target.rename(aside)
        check(found=aside)
        fresh.rename(target)


def _rename(one: Path, other: Path, how: int) -> bool:
    """Rename in one step without replacing, or let two paths change places; False where that
    cannot be done.

    renameat2 of Linux, which Python does not offer.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here = -100  # AT_FDCWD
    return rename(here, os.fsencode(one), here, os.fsencode(other), how) == 0


def check_output(
    target: Path,
    *,
    overwrite: bool = False,
    replaceable: Callable[[Path], bool] | None = None,
    found: Path | None = None,
) -> None:
    """Refuse a `target` that `atomic_directory` may not write to; for asking long before it does.

    Args:
        found: where what was at `target` is now; default: there.

    Raises:
        OutputExists: `target` exists and `overwrite` is False, or it is no directory, not
            `replaceable`, or holds the working directory.
    """
    target = Path(os.path.abspath(target))
    found = target if found is None else found
    if not os.path.lexists(found):
        return
    if not overwrite:
        raise OutputExists(
            f"{target} already exists; choose another output or pass --force to replace it"
        )
    if not found.is_dir():
        problem = "is not a directory"
    elif _holds_working_directory(found):
        problem = "is or contains the current working directory"
    elif replaceable is not None and not replaceable(found):
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
    """Tell whether it is an hour old and holds what a write makes, not a user's hidden folder."""
    try:
        old = time.time() - work.lstat().st_mtime > _STALE_AFTER
        return old and {entry.name for entry in work.iterdir()} <= {"new", "old"}
    except OSError:  # another writer was faster, or it is no folder
        return False


def _set_modes(root: Path) -> None:
    """Give all below `root` the modes of ordinary files and folders."""
    for folder, _, names in os.walk(root):
        Path(folder).chmod(0o777 & ~_UMASK)
        for path in (Path(folder) / name for name in names):
            if not path.is_symlink():
                path.chmod(_FILE_MODE)


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


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; flush what the block writes there and rename it into place.

    Its mode follows the umask, as in `atomic_directory`.

    Raises:
        OutputError: no space left.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        with enough_space(target):
            yield fresh
            fresh.chmod(_FILE_MODE)
            _sync(fresh)
            fresh.replace(target)
            _sync(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def enough_space(place: Path) -> Iterator[None]:
    """Say so in one line when the block fails because the file system of `place` is full.

    Libraries report a full disk in many ways, so after any failure the disk itself is asked.

    Raises:
        OutputError: no space left.
    """
    try:
        yield
    except MarnetError:
        raise
    except Exception as error:
        reported = isinstance(error, OSError) and error.errno in _NO_SPACE
        if not reported and os.strerror(errno.ENOSPC) not in str(error) and not _is_full(place):
            raise
        raise OutputError(
            f"{place}: no space left on its file system; what was there before is unchanged. "
            "Free some space and run the same command again"
        ) from error


def _is_full(place: Path) -> bool:
    """Tell whether not even a page is free where `place` is, or would be."""
    place = Path(os.path.abspath(place))
    existing = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(existing).free < 4096


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """Say in one line when nothing can be written at `place`: permissions, file for a folder."""
    with enough_space(place):
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            raise OutputError(
                f"{place}: cannot be written ({error.strerror}: {error.filename}); choose another "
                "output, or change the permissions of the folder"
            ) from error


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold the file `lock`, which is made with its folder, so that one process works at a time.

    The kernel lets go of it when the process ends, however it ends.

    Raises:
        OutputBusy: another process holds it.
        OutputError: no space left, or the folder must not be written to.
    """
    with writable(lock):
        descriptor = _open_locked(lock)
    try:
        yield
    finally:
        os.close(descriptor)


def _open_locked(lock: Path) -> int:
    import fcntl  # only here: a process that classifies needs none, and Windows has none

    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file before letting go: then take the new one.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputBusy(
                f"{lock.parent}: {owner} is at work there; wait for it, stop it, or choose "
                "another output"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise

"""The compiled loop: shipped with the package, or kept in the user's cache, or compiled now.

It is one shared library without Python's ABI, loaded with ctypes. Its name holds a hash of what it
was compiled from, so a changed source is never answered with old code. `python -m
marnet_kernels.native` compiles the one that a wheel ships.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

SHIPPED = Path(__file__).parent
"""The folder that `make native` puts the library into; a source tree and some wheels lack it."""

MACHINES = ("x86_64", "aarch64")
"""A wheel has the library for these, where compilers of both are there."""

_SOURCES = ("reverse_loop.cpp", "products.h")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-fno-exceptions", "-Wl,--as-needed"),  # it needs the C library alone
    # Sums are rounded as they are written, so that a row has the same bits in any batch.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
)
_lock = Lock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # In a child, whoever had it at the fork is not there to give it back.
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=Lock()))
_loaded: ctypes.CDLL | None = None


def library(*, compile_it: bool = False) -> ctypes.CDLL:
    """The library, loaded once a process.

    Args:
        compile_it: compile it into the cache where it is not there yet.

    Raises:
        RuntimeError: it is not there, or cannot be compiled or loaded; says what to do.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load(_find(compile_it=compile_it))
        return _loaded


def why_missing(*, compile_it: bool = False) -> str | None:
    """Say why the library cannot be loaded here, or return None where it can; see `library`."""
    try:
        library(compile_it=compile_it)
    except RuntimeError as error:
        return str(error)
    return None


def build(folder: Path, flags: Sequence[str] = (), machine: str | None = None) -> Path:
    """Compile the library into a folder.

    Args:
        flags: of the compiler, beside the usual ones.
        machine: another kind of machine than this, as `platform.machine()` names it, for which
            there is a cross compiler.

    Raises:
        RuntimeError: there is no compiler, or it refuses. OSError: the folder is not writable.
    """
    compiler = compiler_for(machine)
    if shutil.which(compiler) is None:
        package = "g++" if machine is None else f"g++-{machine.replace('_', '-')}-linux-gnu"
        raise RuntimeError(
            f"the native loop is compiled with {compiler}, which is not installed; install a "
            f"compiler of C++ (Debian, Ubuntu: sudo apt install {package}), or name one in CXX"
        )
    path = folder / file_name(machine)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    source = str(SHIPPED / _SOURCES[0])
    command = [compiler, *FLAGS, *flags, source, "-o", str(temporary)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{compiler} refuses the native loop: got exit code {done.returncode}, expected 0; "
                f"try another compiler in CXX:\n{done.stderr.strip()[:2000]}"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_dir() -> Path:
    """Return $MARNET_CACHE/native, or ~/.cache/marnet/native."""
    root = os.environ.get("MARNET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "marnet") / "native"


def compiler_for(machine: str | None = None) -> str:
    """Return the name of the compiler for a kind of machine; None: for this one."""
    if machine in (None, platform.machine()):
        return os.environ.get("CXX", "g++")
    return f"{machine}-linux-gnu-g++"


def file_name(machine: str | None = None) -> str:
    """Return the name of the library that this version compiles for a kind of machine.

    Args:
        machine: as `platform.machine()` names it; None: this one.
    """
    sources = [(SHIPPED / name).read_text("utf-8") for name in _SOURCES]
    parts = json.dumps([sources, FLAGS, machine or platform.machine(), sys.platform])
    return f"libmarnet_loop-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"


def _find(*, compile_it: bool) -> Path:
    """Find the library, or compile it.

    Raises:
        RuntimeError: there is none, and it is not to be compiled, or cannot be.
    """
    name = file_name()
    for folder in (SHIPPED, cache_dir()):
        if (folder / name).is_file():
            return folder / name
    if not compile_it:
        raise RuntimeError(
            f"the native loop is not compiled: no {name} in {SHIPPED} or {cache_dir()}; in a "
            "checkout run: make native; elsewhere: python -m marnet_kernels.native"
        )
    try:
        return build(cache_dir())
    except OSError as error:
        raise RuntimeError(
            f"the native loop cannot be kept in {cache_dir()} ({error}); set MARNET_CACHE to a "
            "writable folder"
        ) from error


def _load(path: Path) -> ctypes.CDLL:
    """Load the library from its file.

    Raises:
        RuntimeError: the system refuses it.
    """
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"the native loop cannot be loaded ({error}); delete {path}, and compile it again with:"
            " make native"
        ) from error
    found.marnet_loop_set.restype = ctypes.c_char_p
    return found

"""Forking a process, and ending it, while native code runs in its threads.

A fork copies the calling thread alone: locks that others hold stay locked in the child for ever.
When the interpreter ends, a daemon thread that comes back from C++ is unwound there, which ends
the process with an abort. So both wait for native calls to return, and let none begin meanwhile.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from threading import Condition, Lock, get_ident
from typing import Any, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class _State:
    def __init__(self) -> None:
        self.changed = Condition()
        self.depth: Counter[int] = Counter()  # thread -> native calls that it is in
        self.holder: int | None = None  # the thread that forks or ends the interpreter
        self.ending = False
        self.forked_with_torch = False


_state = _State()
_left: WeakSet[Any] = WeakSet()


@contextmanager
def native() -> Iterator[None]:
    """Run native code in the block; a thread may be in several at once.

    While another thread forks, it waits to begin; when the interpreter ends, for ever.
    """
    me = get_ident()
    with _state.changed:
        while _state.holder not in (None, me) and not _state.depth[me]:
            _state.changed.wait()
        _state.depth[me] += 1
    try:
        yield
    finally:
        with _state.changed:
            _state.depth[me] -= 1
            if not _state.depth[me]:
                del _state.depth[me]
            _state.changed.notify_all()


def forked_with_torch() -> bool:
    """Tell whether this process was forked from one that had torch loaded.

    The threads of its OpenMP may have been started there and are missing here: whatever computes
    with several of them waits for ever.
    """
    return _state.forked_with_torch


def left_to_the_parent(native_object: T) -> T:
    """Return the object, which is never destroyed in a forked child.

    Its destructor would wait there for threads that exist in the parent alone.
    """
    _left.add(native_object)
    return native_object


def import_apart(name: str) -> None:
    """Import a module in a thread of its own.

    Importing torch leaves frames behind in a cycle, and with them all that called it: the function
    that opened a classifier, and what that holds.
    """
    if sys.modules.get(name) is None:  # None: it may not be imported, and says so
        with ThreadPoolExecutor(1) as thread:
            thread.submit(import_module, name).result()


def lock_free_in_children() -> Any:
    """A lock that no other thread holds at the moment of a fork."""
    lock = Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock


def _hold() -> None:
    """Wait until no other thread is in native code, and let none begin."""
    me = get_ident()
    with _state.changed:
        while _state.holder not in (None, me):
            _state.changed.wait()
        _state.holder = me
        while any(depth and thread != me for thread, depth in _state.depth.items()):
            _state.changed.wait()


def _let_go() -> None:
    with _state.changed:
        if not _state.ending:
            _state.holder = None
        _state.changed.notify_all()


def _begin_child() -> None:
    """Begin anew in a forked child, whose only thread is the one that forked."""
    global _state
    mine = _state.depth[get_ident()]
    _state = _State()
    _state.depth[get_ident()] = mine
    _state.forked_with_torch = "torch" in sys.modules
    for native_object in list(_left):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native_object))


def _end() -> None:
    _hold()
    _state.ending = True


atexit.register(_end)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_begin_child)

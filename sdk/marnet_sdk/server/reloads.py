"""This module tells when a server should open its bundle again: when asked, or for another one."""

from __future__ import annotations

import os
from pathlib import Path

# Of each file below a folder: its name, and what another file or other bytes have otherwise.
Content = frozenset[tuple[str, int, int, int]]


def content(folder: Path) -> Content:
    """Describe what is in a folder, or behind a symbolic link, without reading it.

    Empty where there is no folder, as in the moment in which one takes another's place.
    """
    found = set()
    try:
        for path in folder.resolve().rglob("*"):
            stat = path.stat()
            found.add((os.fspath(path), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
        return frozenset()
    return frozenset(found)


class Reloads:
    """Tells when the bundle should be opened again."""

    def __init__(self, watched: Path | None = None) -> None:
        """Remember what is in `watched`, which is about to be opened; None: nothing is watched."""
        self._watched, self._asked, self._heard = watched, 0, 0
        self._opened = self._before = self._look()

    def ask(self) -> None:
        """Have it opened again; a handler of signals may call this."""
        self._asked += 1

    def due(self) -> bool:
        """Tell whether it should be opened now; called again and again, with pauses.

        A folder that has changed is left alone until it is the same twice, as somebody may be
        copying a bundle there.
        """
        now = self._look()
        settled, self._before = now == self._before, now
        changed = settled and now != self._opened
        asked = self._asked
        due, self._heard = changed or asked > self._heard, asked
        if due:
            self._opened = now
        return due

    def _look(self) -> Content:
        return frozenset() if self._watched is None else content(self._watched)

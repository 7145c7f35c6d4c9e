"""Waiting for what another thread or process does, however long that takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 60.0  # seconds until a test that waits gives up; nothing waits for so long


def until(holds: Callable[[], T], patience: float = PATIENCE, look: float = 0.005) -> T:
    """Wait until something holds, and stays so; returns what was waited for.

    Args:
        look: seconds between two looks.
    """
    pause, end = Event(), time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < end, "it never happened"
        pause.wait(look)
    return found

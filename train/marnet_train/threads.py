"""This module chooses the number of CPU threads of a training: one, from its start to its end.

Sums depend on it in their last bit, and so do the weights that a training ends with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.console import say
from marnet_sdk.cpus import check_threads, cpus

_LOOK = 0.5  # seconds


@contextmanager
def training_threads(asked: int | None, unfinished: int | None = None) -> Iterator[None]:
    """Let torch compute with one number of CPU threads inside the block.

    Where nobody says how many, it is one for each core that no other program takes at the start: a
    thread that has to wait for its core keeps all the others waiting, at the end of each operation.

    Args:
        asked: how many; None: as many as OMP_NUM_THREADS says, else as an interrupted training
            has, else as there are free cores.
        unfinished: the threads of the interrupted training that goes on, if there is one.

    Raises:
        InvalidInput: `asked` is more than the machine has CPUs.
    """
    before = torch.get_num_threads()
    most = use_threads(check_threads(asked))
    try:
        if asked is None and most > 1 and "OMP_NUM_THREADS" not in os.environ:
            use_threads(_unasked(most, unfinished))
        yield
    finally:
        torch.set_num_threads(before)


def _unasked(most: int, unfinished: int | None) -> int:
    """Return the number where nobody says one, and tell it if it is less than there may be."""
    if unfinished is not None and unfinished <= cpus().machine:
        return unfinished
    free = free_cpus()
    if (threads := max(1, min(most, round(free)))) < most:
        say(
            f"computing with {threads} of {most} threads, because other programs leave "
            f"{free:.1f} of {cpus().allowed} CPUs; --threads {most} takes them all"
        )
    return threads


def free_cpus() -> float:
    """Look for half a second how many of the CPUs of this process nobody uses."""
    used = psutil.cpu_percent(_LOOK, percpu=True)
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(used))
    return sum(100 - used[cpu] for cpu in mask if cpu < len(used)) / 100

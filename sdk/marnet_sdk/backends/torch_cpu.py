"""The number of threads that torch computes with on the processor: one for the whole process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from time import perf_counter, thread_time

from marnet_kernels.crowd import Crowd
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import WrongProcess
from marnet_sdk.process import forked_with_torch


def use_threads(threads: int | None) -> int:
    """Set torch's number of threads for the whole process, and return it.

    Args:
        threads: how many; None: those that torch is set to, or fewer where `cpus` says so and
            OMP_NUM_THREADS does not, and one in a process that was forked from one with torch.

    Raises:
        WrongProcess: several in such a process.
    """
    import torch

    now = torch.get_num_threads()
    if forked_with_torch():
        if threads is not None and threads > 1:
            raise WrongProcess(
                f"threads: got {threads} in a process that was forked from one with torch loaded, "
                "where torch would wait for threads that exist there alone; leave threads out for "
                'one thread, or start the process with "spawn"'
            )
        wanted = 1
    else:
        most = now if "OMP_NUM_THREADS" in os.environ else cpus().threads
        wanted = min(now, most) if threads is None else threads
    if wanted != now:
        torch.set_num_threads(wanted)
    return wanted


def threads_now() -> int:
    """The number of threads that torch computes with."""
    import torch

    return torch.get_num_threads()


class _Calls:
    """The calls that compute now, and torch's number of threads around them."""

    def __init__(self) -> None:
        self.lock, self.running, self.full = Lock(), 0, 1
        self.crowd = Crowd()


_calls = _Calls()
_keeping: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def keeping_threads() -> Iterator[None]:
    """Compute with torch's number of threads in the block, whatever other programs take.

    Answers that are to be derived again to the last bit need it.
    """
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


@contextmanager
def computing(*, adapts: bool) -> Iterator[None]:
    """Compute with torch in the block: with fewer threads where they mostly wait for each other.

    They do where other programs take the cores: a thread that waits for a time slice keeps the
    others waiting at the end of every operation. Behind the block torch's number is what it was. In
    a process that was forked from one with torch, it is one for good.

    Args:
        adapts: False keeps the number, and with it the last bit of every sum.
    """
    import torch

    adapts = adapts and not _keeping.get()
    if forked_with_torch():
        _set_threads(1)
        yield
        return
    with _calls.lock:
        # The first look of a thread at torch's number sets its own, perhaps to that of a call.
        if not _calls.running:
            _calls.full = torch.get_num_threads()
        _calls.running += 1
        full = _calls.full
    try:
        used = _calls.crowd.most(full) if adapts else full
        _set_threads(used)
        wall, cpu = perf_counter(), thread_time()
        yield
        if adapts:
            seconds = max(perf_counter() - wall, 1e-9)
            _calls.crowd.learn(used, 1 - (thread_time() - cpu) / seconds, seconds)
    finally:
        _set_threads(full)
        with _calls.lock:
            _calls.running -= 1


def _set_threads(threads: int) -> None:
    """Set the number of threads of torch and of the OpenMP of the thread that calls."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

"""The number of threads that torch computes with on the processor: one for the whole process."""

from __future__ import annotations

import os

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


def settle_threads() -> None:
    """Settle, before torch computes, on one thread in a process forked from one with torch.

    Elsewhere this hands torch's number to OpenMP, which keeps one for each thread that computes.
    """
    import torch

    if torch.get_num_threads() > 1 and forked_with_torch():
        torch.set_num_threads(1)

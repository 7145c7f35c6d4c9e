"""A part of the suite in a process of its own, which a kernel that fails takes with it.

The process is forked, so it has what was imported; CUDA must not have been used before. What it
finds comes back as messages, one JSON object each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

Message = dict[str, Any]
Send = Callable[[Message], None]


def run_apart(
    work: Callable[[Send], None], receive: Callable[[Message], None], seconds: float
) -> str | None:
    """Run `work` in a forked process and pass on what it sends.

    Returns:
        Why it did not come to its end, or None if it did.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        end = time.monotonic() + seconds
        while wait([ours, process.sentinel], max(end - time.monotonic(), 0)):
            if not ours.poll():  # it has ended, and all that it sent was read
                process.join()
                return _how_it_ended(process.exitcode)
            try:
                receive(json.loads(ours.recv_bytes()))
            except EOFError:
                process.join()
                return _how_it_ended(process.exitcode)
        return f"given up: it had not ended after {seconds:.0f} s"
    finally:
        process.kill()
        process.join(10)  # one that is stuck in the driver is left behind
        ours.close()


def _run(work: Callable[[Send], None], connection: Connection) -> None:
    work(lambda message: connection.send_bytes(json.dumps(message).encode()))
    connection.close()
    os._exit(0)  # without the end of CUDA, which may wait for what never comes


def _how_it_ended(code: int | None) -> str | None:
    if not code:
        return None
    return f"its process ended with {f'signal {-code}' if code < 0 else f'exit status {code}'}"

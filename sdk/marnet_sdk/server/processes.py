"""Several processes of a server behind one listening socket, and the parent that looks after them.

The parent loads neither a bundle nor a web framework. uvicorn's own supervisor
(`uvicorn.supervisors.Multiprocess`, 0.54) does not do by its public face: its processes run
`uvicorn.Server` and no subclass, so neither our drain nor our time limits; SIGHUP replaces its
processes instead of their bundles; and one that dies at its start is started again for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

from marnet_sdk.console import say
from marnet_sdk.errors import MarnetError, ServerFailed

_SPAWN = multiprocessing.get_context("spawn")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK = 0.1  # seconds between two looks at signals
_SOON = 30.0  # seconds after it was ready: a process that ends before has failed
_MOST_FAILURES = 5  # in a row, of one process and those that took its place
_PAUSE = 0.5  # seconds before the third start in a row, and twice as many before each other one


class Place(NamedTuple):
    """A process of the server, as its parent describes it to it."""

    first: bool  # it accepts at once, and says that the bundle is being opened
    metrics: Path  # the file for its metrics, beside those of the others
    report: Connection  # it sends None once it is ready, or the error for which it cannot be


def end_mark(metrics: Path) -> Path:
    """Name the file that is there while nobody lives who writes this file of metrics."""
    return metrics.with_suffix(".ended")


def run_processes(count: int, target: Callable[[Place], None], listener: socket.socket) -> int:
    """Run `target` in several processes until SIGTERM or Ctrl-C, and replace those that end.

    SIGTERM reaches all of them, and so does SIGHUP. None outlives this process.

    Args:
        target: can be pickled; raises a `MarnetError` where it cannot begin.
        listener: what they accept from; it is closed here when they are told to end.

    Returns:
        The exit code: 0 where all of them ended with it.

    Raises:
        MarnetError: what the first of them raised that could not begin.
        ServerFailed: they end soon after their start, again and again.
    """
    heard: list[int] = []
    before = {one: signal.signal(one, lambda number, _: heard.append(number)) for one in _SIGNALS}
    with tempfile.TemporaryDirectory(prefix="marnet-serve-") as folder:
        parent = _Parent(count, target, listener, Path(folder))
        try:
            while parent.goes_on:
                parent.step(heard)
        finally:
            parent.kill()
            for one, handler in before.items():
                signal.signal(one, handler)
    if parent.failure is not None:
        raise parent.failure
    return parent.exit_code


@dataclass(eq=False)
class _Worker:
    """A process, and what is known of those whose place it took."""

    metrics: Path
    process: SpawnProcess | None = None
    report: Connection = field(init=False)
    ready_at: float | None = None
    error: MarnetError | None = None  # why it could not begin
    failures: int = 0  # in a row
    due: float = 0.0  # when to start another one


class _Parent:
    def __init__(
        self, count: int, target: Callable[[Place], None], listener: socket.socket, folder: Path
    ) -> None:
        self.failure: MarnetError | None = None
        self.exit_code = 0
        self._target, self._listener = target, listener
        self._workers = [_Worker(folder / f"{number}.json") for number in range(count)]
        self._begun = self._was_ready = self._draining = False

    @property
    def goes_on(self) -> bool:
        return not self._draining or bool(self._running())

    def step(self, heard: list[int]) -> None:
        """Start what is due, wait for a moment, and see to what has happened."""
        for worker in self._workers:
            if worker.process is None and not self._draining and worker.due <= time.monotonic():
                self._start(worker)
        running = self._running()
        reports = [worker.report for worker, _ in running if not worker.report.closed]
        found = wait([*reports, *(process.sentinel for _, process in running)], _LOOK)
        while heard:
            self._obey(heard.pop(0))
        for worker, process in running:
            if worker.report in found:
                self._read(worker, process)
            if process.sentinel in found:
                self._note_end(worker, process)

    def kill(self) -> None:
        """End at once what still runs."""
        for _, process in self._running():
            process.kill()
            process.join()

    def _running(self) -> list[tuple[_Worker, SpawnProcess]]:
        return [(one, one.process) for one in self._workers if one.process is not None]

    def _start(self, worker: _Worker) -> None:
        worker.report, writer = _SPAWN.Pipe(duplex=False)
        worker.error = None
        place = Place(not self._begun, worker.metrics, writer)
        self._begun = True
        process = _SPAWN.Process(target=_run, args=(self._target, place))
        # It inherits what is blocked. Ctrl-C, which a terminal sends to all processes, concerns the
        # parent alone; SIGHUP waits until it is listened for.
        resource_tracker.ensure_running()  # `start` would do it, and unblock SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        worker.process = process
        writer.close()

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            for _, process in self._running():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGHUP)
        elif not self._draining:
            self._drain()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _drain(self) -> None:
        self._draining = True
        self._listener.close()
        for _, process in self._running():
            process.terminate()

    def _read(self, worker: _Worker, process: SpawnProcess) -> None:
        """Read the only message of a process."""
        with worker.report as report:
            try:
                worker.error = report.recv()
            except EOFError:  # it has ended without one
                return
        if worker.error is not None:
            return
        worker.ready_at = time.monotonic()
        if self._was_ready:
            say(f"process {process.pid} is ready")
        elif all(one.ready_at is not None for one in self._workers):
            self._was_ready = True
            say(f"ready: the self-test passed in {len(self._workers)} processes")

    def _note_end(self, worker: _Worker, process: SpawnProcess) -> None:
        process.join()
        worker.process, code = None, process.exitcode or 0
        end_mark(worker.metrics).touch()
        if self._draining:
            if code not in (0, -signal.SIGTERM):  # by the signal ends one that has not begun
                self.exit_code = self.exit_code or max(code, 1)
            return
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        how = how if worker.error is None else str(worker.error)
        now = time.monotonic()
        failed = worker.ready_at is None or now - worker.ready_at < _SOON
        worker.failures = worker.failures + 1 if failed else 0
        worker.ready_at = None
        worker.due = now + (_PAUSE * 2 ** (worker.failures - 2) if worker.failures > 1 else 0)
        if worker.error is not None and not self._was_ready:
            self.failure = worker.error
        elif worker.failures >= _MOST_FAILURES:
            self.failure = ServerFailed(
                f"a process of the server ended {worker.failures} times in a row, each within "
                f"{_SOON:g} s of being ready or before; the last one: {how}. Try --processes 1. "
                "Signal 9 may mean that memory is used up: take fewer --processes, or add memory"
            )
        if self.failure is None:
            say(f"process {process.pid} ended, another one takes its place: {how}")
        else:
            self._drain()


def _run(target: Callable[[Place], None], place: Place) -> None:
    folder = place.metrics.parent
    threading.Thread(target=_end_with_the_parent, args=(folder,), daemon=True).start()
    try:
        target(place)
    except MarnetError as error:
        place.report.send(error)
        sys.exit(error.exit_code)


def _end_with_the_parent(folder: Path) -> None:
    """Wait until the parent is gone, which tells its processes to end unless it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)

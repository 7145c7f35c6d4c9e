"""A backend that is used only while it is open, and only where its threads are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marnet_sdk.backends import Backend, RuntimeReport
from marnet_sdk.errors import ClassifierClosed, WrongProcess
from marnet_sdk.process import native


class Guarded:
    """Holds a backend until `close`, for the process that opened it.

    With a single thread of the processor, a backend has none of its own, and also works in
    processes that are forked from that one.
    """

    def __init__(self, backend: Backend, bundle: Path) -> None:
        """Hold a backend; `bundle` is what errors tell the user to open again."""
        self._backend: Backend | None = backend
        self._bundle, self._process = bundle, os.getpid()
        report = backend.report()
        self._alone = report.device == "cpu" and report.threads == 1

    def close(self) -> None:
        """Let go of the backend: it ends with the last call that is running."""
        self._backend = None

    def check(self) -> Backend:
        """The backend, if it may be used here and now.

        Raises:
            ClassifierClosed: after `close`.
            WrongProcess: in another process than the one that opened it.
        """
        backend = self._backend
        if backend is None:
            raise ClassifierClosed(f"this Classifier is closed; open {self._bundle} again")
        if os.getpid() != self._process and not self._alone:
            raise WrongProcess(
                f"this Classifier was opened in process {self._process}, and its threads do not "
                f"exist in process {os.getpid()}, which was forked from that one; open "
                f"{self._bundle} in each process, or open it with threads=1 before they are forked"
            )
        return backend

    def replace(self, backend: Backend) -> None:
        """Use another backend in its place from now on, such as one that watches it."""
        self._backend = backend

    @contextmanager
    def calling(self) -> Iterator[Backend]:
        """Give the backend to the block, which may call it.

        Raises:
            ClassifierClosed, WrongProcess: as `check` does.
        """
        backend = self.check()
        with native():
            yield backend

    def report(self) -> RuntimeReport:
        """Ask the backend how it runs."""
        with self.calling() as backend:
            return backend.report()

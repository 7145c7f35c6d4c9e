"""A backend that is used only while it is open, and only where its threads are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marnet_sdk.backends import Backend
from marnet_sdk.errors import ClassifierClosed, WrongProcess
from marnet_sdk.gpu.captured import DeviceRows, RuntimeReport
from marnet_sdk.noise.tables import Floats, Tables
from marnet_sdk.process import native


class Guarded:
    """The same backend, until `close`, in the process that opened it.

    With a single thread of the processor, a backend has none of its own, and also works in
    processes that are forked from that one.
    """

    def __init__(self, backend: Backend, bundle: Path) -> None:
        """`bundle` is what errors tell the user to open again."""
        self._backend: Backend | None = backend
        self._bundle, self._process = bundle, os.getpid()
        report = backend.report()
        self._alone = report.device == "cpu" and report.threads == 1

    def close(self) -> None:
        """Let go of the backend: it ends with the last call that is running."""
        self._backend = None

    def check(self) -> Backend:
        """The backend.

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

    @contextmanager
    def _calling(self) -> Iterator[Backend]:
        backend = self.check()
        with native():
            yield backend

    def encode(self, pixels: Any) -> Floats:
        with self._calling() as backend:
            return backend.encode(pixels)

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        with self._calling() as backend:
            return backend.refine(x_v, tables)

    def run(self, pixels: Any, tables: Tables) -> tuple[Floats, Floats]:
        with self._calling() as backend:
            return backend.run(pixels, tables)

    def device_rows(self, array: Any) -> DeviceRows:
        with self._calling() as backend:
            return backend.device_rows(array)

    def report(self) -> RuntimeReport:
        with self._calling() as backend:
            return backend.report()

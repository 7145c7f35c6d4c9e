"""The gate that every request passes: it may enter, it is measured, and it is logged."""

from __future__ import annotations

import hmac
import json
import queue
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marnet_sdk.server.metrics import Metrics
from marnet_sdk.server.service import Service, logger

PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
WATCHED = (*PROBES, "/metrics")  # answered while the server stops or has too many connections
OPEN = (*PROBES, "/", "/docs", "/openapi.json")  # without a token: nothing of them is secret
_SHOWN = 200  # characters of a path in a line of the log
_WAITING = 10_000  # lines of the log that may wait to be written


class AccessLog:
    """One JSON object for each request, a line each, written by a thread of its own.

    A disk that is full or a pipe that nobody reads costs lines, which are counted, and no request.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Start the thread.

        Args:
            stream: without a buffer, in which lines would be kept that could not be written.
        """
        self.lost = 0
        self._stream, self._closed = stream, False
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Have a line written, without waiting for it."""
        try:
            self._lines.put_nowait(json.dumps(entry))
        except queue.Full:
            self.lost += 1

    def close(self, patience: float = 1.0) -> None:
        """Wait until all lines are written, or for so many seconds where nobody takes them."""
        self._closed = True
        with suppress(queue.Full):
            self._lines.put_nowait(None)  # wakes the thread; where it is full, it is awake
        self._thread.join(patience)

    def _write(self) -> None:
        while not (self._closed and self._lines.empty()):
            if (line := self._lines.get()) is None:
                continue
            try:
                self._stream.write(f"{line}\n".encode())
            except (OSError, ValueError):  # ValueError: the stream was closed
                self.lost += 1


class Gate:
    """An ASGI application around another: it refuses, measures and logs."""

    def __init__(
        self, app: ASGIApp, service: Service, metrics: Metrics, log: AccessLog | None
    ) -> None:
        self.app, self.service, self.metrics, self.log = app, service, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500  # which uvicorn sends where nothing was sent

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.service.in_flight += 1
        try:
            await (self._refusal(scope) or self.app)(scope, receive, watched)
        except Exception as error:
            # Starlette has answered already; only what it was is left to be said.
            logger.error("a request failed", exc_info=error)
        finally:
            self.service.in_flight -= 1
            self._note(scope, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that may not enter."""
        service = self.service
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in OPEN and not self._is_known(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            return _refuse(401, "send the server's token: Authorization: Bearer TOKEN", headers)
        if path in WATCHED:
            return None
        if service.draining:
            return _refuse(503, "the server is stopping", {"Retry-After": "1"})
        if service.connections() > service.limits.connections:
            headers = {"Retry-After": "1", "Connection": "close"}
            return _refuse(503, "too many connections are open; come again later", headers)
        return None

    def _is_known(self, scope: Scope) -> bool:
        if self.service.token is None:
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = sent.partition(b" ")
        same = hmac.compare_digest(token.strip(), self.service.token.encode())
        return same and scheme.lower() == b"bearer"

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.count_request(route, status, seconds)
        if self.log is None:
            return
        self.log.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": (scope.get("client") or (None,))[0],
                "method": scope["method"],
                "path": scope["path"][:_SHOWN],
                "status": status,
                "milliseconds": round(1e3 * seconds, 3),
            }
        )


def _refuse(status: int, reason: str, headers: dict[str, str]) -> ASGIApp:
    return JSONResponse({"error": reason}, status, headers=headers)

"""All that the requests of a server share: the classifier, the limits, and the refusals."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import (
    ClassifierClosed,
    DeadlineExceeded,
    ImageError,
    InvalidInput,
    QueueFull,
)

T = TypeVar("T")
logger = logging.getLogger("marnet_sdk.server")
_FEW = 2**14  # bytes that are taken apart in less time than another thread takes to wake


@dataclass(frozen=True)
class ServerLimits:
    """The most that a server bears before it works. The pixels of an image are in `Limits`."""

    body_bytes: int = 32 * 2**20  # of one request
    buffered_bytes: int = 2**30  # of the bodies of all requests that are being answered
    images: int = 64  # of one request
    samples: int = 64  # noise samples that a request may ask for
    connections: int = 256  # that are open at once
    waiting: int = 64  # requests with preprocessed pixels
    header_seconds: float = 10.0  # until the header of a request is there
    body_seconds: float = 30.0  # until its body is there
    keep_alive_seconds: int = 15  # that a connection may idle between two requests
    drain_seconds: float = 30.0  # that accepted requests have after SIGTERM


class Refused(Exception):
    """A request that is answered with an error: status, reason, headers and further fields."""

    def __init__(
        self, status: int, reason: str, headers: dict[str, str] | None = None, **fields: Any
    ) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
        self.headers, self.fields = headers or {}, fields


async def beside(size: int, call: Callable[..., T], *args: Any) -> T:
    """Call what takes long for many bytes in a thread, beside the event loop; for few, at once."""
    return call(*args) if size < _FEW else await asyncio.to_thread(call, *args)


def come_again(status: int, reason: str) -> Refused:
    """Refuse for now: the client may come again after a second."""
    return Refused(status, reason, {"Retry-After": "1"})


def refusal_of(error: Exception) -> Refused | None:
    """Say how an error of the classifier is answered; None for one that is the server's own.

    Only errors about the request itself are repeated: the messages of others hold paths.
    """
    if isinstance(error, QueueFull):
        seconds = max(1, math.ceil(error.retry_after or 1))
        reason = "too many images are waiting; come again later"
        return Refused(429, reason, {"Retry-After": str(seconds)})
    if isinstance(error, DeadlineExceeded):
        return Refused(504, "the deadline passes before the answer; allow more time or send fewer")
    if isinstance(error, ClassifierClosed):
        return come_again(503, "the server is stopping")
    if isinstance(error, (InvalidInput, ImageError)):
        return Refused(400, str(error))
    return None


class Service:
    """The state of one server, in the thread of its event loop."""

    def __init__(
        self,
        open_classifier: Callable[[], Classifier],
        limits: ServerLimits,
        *,
        name: str,
        token: str | None = None,
    ) -> None:
        """Prepare to serve; `open` opens the bundle.

        Args:
            name: what the model is called by clients of the Open Inference Protocol.
            token: what clients must send as a bearer token.
        """
        self.limits, self.name, self.token = limits, name, token
        self.failure: Exception | None = None  # why there is no classifier and will be none
        self.draining = False
        self.in_flight = 0  # requests that were accepted and are not answered yet
        self.connections: Callable[[], int] = lambda: 0  # that are open; the HTTP server knows
        self._open_classifier = open_classifier
        self._classifier: Classifier | None = None
        self.held = 0  # bytes of the bodies of all requests that are being answered
        self._lone = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._waiting = 0  # requests that `alone` has not answered

    def open_now(self) -> None:
        """Open the classifier, which tests itself, in this thread.

        Raises:
            MarnetError: why it cannot be opened.
        """
        self._classifier = self._open_classifier()

    async def open(self) -> None:
        """Open the classifier beside the event loop, unless it is open."""
        try:
            if self._classifier is None:
                await asyncio.to_thread(self.open_now)
        except Exception as error:
            self.failure = error

    async def close(self) -> None:
        """Close the classifier, which answers or fails what it has accepted."""
        self._lone.shutdown(cancel_futures=True)
        if self._classifier is not None:
            await asyncio.to_thread(self._classifier.close)

    @property
    def ready(self) -> bool:
        """Tell whether the bundle passed its self-test and requests are taken."""
        return self._classifier is not None and not self.draining

    def check_ready(self) -> None:
        """Refuse with 503 until the bundle passed its self-test, and while the server stops."""
        if not self.ready:
            reason = "the server is stopping" if self.draining else "the bundle is being opened"
            raise come_again(503, reason)

    @property
    def opened(self) -> Classifier | None:
        """The classifier, if it is open."""
        return self._classifier

    @property
    def classifier(self) -> Classifier:
        """The classifier, for a request that needs it.

        Raises:
            Refused: 503, it is not open yet.
        """
        if self._classifier is None:
            raise come_again(503, "the bundle is being opened")
        return self._classifier

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body of a request, and count its bytes for as long as the block runs.

        Raises:
            Refused: 413 for too many bytes, as soon as they are announced or there; 408 for a
                sender that is too slow; 415 for a compressed body; 503 for too much at once.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed bodies are not read; send it without Content-Encoding")
        announced = request.headers.get("content-length", "0")
        if int(announced) > self.limits.body_bytes:  # the HTTP server has seen that it is a number
            raise self._too_large(announced)
        data = bytearray()
        try:
            await self._read(request, data)
            yield data
        finally:
            self.held -= len(data)

    async def _read(self, request: Request, data: bytearray) -> None:
        seconds = self.limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    self.held += len(chunk)
                    data += chunk
                    self._check_size(len(data))
        except TimeoutError as error:
            reason = f"the body did not arrive within {seconds:g} s"
            raise Refused(408, reason, {"Connection": "close"}) from error

    def _check_size(self, size: int) -> None:
        if size > self.limits.body_bytes:
            raise self._too_large(f"more than {self.limits.body_bytes}")
        if self.held > self.limits.buffered_bytes:
            raise come_again(503, "too many bytes of other requests are held; come again later")

    def _too_large(self, got: str) -> Refused:
        return Refused(
            413,
            f"the body has {got[:20]} bytes, at most {self.limits.body_bytes} are accepted; send "
            "fewer or smaller images",
        )

    async def alone(self, call: Callable[[], T], deadline: float | None) -> T:
        """Run what cannot be batched with other requests, in a thread, one after another.

        Args:
            deadline: seconds from now.

        Raises:
            Refused: 429 for too many that wait, 504 where the deadline passes.
        """
        if self._waiting >= self.limits.waiting:
            raise come_again(429, "too many requests are waiting; come again later")
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._lone, call)
        except TimeoutError as error:
            raise Refused(504, "the deadline passed before the answer; allow more time") from error
        finally:
            self._waiting -= 1

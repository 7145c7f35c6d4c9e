"""All that the requests of a server share: the classifier, the limits, and the refusals."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from marnet_sdk.serve.deployment import Deployment
from marnet_sdk.server.reloads import Reloads

T = TypeVar("T")
logger = logging.getLogger("marnet_sdk.server")
_FEW = 2**14  # bytes that are taken apart in less time than another thread takes to wake
_POLL_SECONDS = 0.5  # between two looks at whether the bundle should be opened again
READY = "ready: the self-test passed"  # what is told once requests are taken


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
        watched: Path | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare to serve.

        Args:
            open_classifier: opens the bundle, and again whenever there is another one.
            name: what the model is called by clients of the Open Inference Protocol.
            token: what clients must send as a bearer token.
            watched: the bundle's folder or a link to it, to be opened again when it changes.
            tell: is told what happens to the bundle, a line at a time.
        """
        self.limits, self.name, self.token = limits, name, token
        self.failure: Exception | None = None  # why there is no classifier and will be none
        self.draining = False
        self.in_flight = 0  # requests that were accepted and are not answered yet
        self.connections: Callable[[], int] = lambda: 0  # that are open; the HTTP server knows
        self.reloads = Reloads(watched)
        self.reloaded = {"done": 0, "refused": 0}
        self.held = 0  # bytes of the bodies of all requests that are being answered
        # The file of its metrics, beside those of the other processes; None: there are no others.
        self.shared: Path | None = None
        self._open_classifier, self._tell = open_classifier, tell
        self._deployment: Deployment | None = None
        self._lone = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._waiting = 0  # requests that `alone` has not answered

    def open_now(self) -> None:
        """Open the classifier, which tests itself, in this thread.

        Raises:
            MarnetError: why it cannot be opened.
        """
        self._deployment = Deployment(self._open_classifier)

    async def open(self) -> None:
        """Open the classifier beside the event loop, unless it is open."""
        try:
            if self._deployment is None:
                await asyncio.to_thread(self.open_now)
        except Exception as error:
            self.failure = error
        else:
            self._tell(READY)

    async def keep_current(self) -> None:
        """Open the bundle again whenever `reloads` says so, until this task is cancelled."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            if self.ready and await asyncio.to_thread(self.reloads.due):
                await self._reload()

    async def _reload(self) -> None:
        assert self._deployment is not None
        try:
            digest = await asyncio.to_thread(self._deployment.reload)
        except Exception as error:
            self.reloaded["refused"] += 1
            self._tell(f"not reloaded, the bundle before goes on: {error}")
        else:
            self.reloaded["done"] += 1
            self._tell(f"reloaded: bundle {digest}")

    async def close(self) -> None:
        """Close the classifier, which answers or fails what it has accepted."""
        self._lone.shutdown(cancel_futures=True)
        if self._deployment is not None:
            await asyncio.to_thread(self._deployment.close)

    @property
    def opened(self) -> bool:
        """Tell whether the bundle passed its self-test."""
        return self._deployment is not None

    @property
    def ready(self) -> bool:
        """Tell whether the bundle passed its self-test and requests are taken."""
        return self.opened and not self.draining

    def check_ready(self) -> None:
        """Refuse with 503 until the bundle passed its self-test, and while the server stops."""
        if not self.ready:
            reason = "the server is stopping" if self.draining else "the bundle is being opened"
            raise come_again(503, reason)

    @contextmanager
    def using(self) -> Iterator[Classifier]:
        """Lend the classifier to the block, all of which is answered by one bundle.

        Raises:
            Refused: 503, it is not open yet.
        """
        if self._deployment is None:
            raise come_again(503, "the bundle is being opened")
        with self._deployment.using() as classifier:
            yield classifier

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

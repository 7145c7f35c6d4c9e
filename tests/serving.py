"""Servers for the tests: one in a thread, on a free port of loopback, and a classifier to play."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from waiting import PATIENCE, until

from marnet_sdk import ImageError, Prediction, Score
from marnet_sdk.errors import (
    ClassifierClosed,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    QueueFull,
)
from marnet_sdk.serve.many_callers import Kind
from marnet_sdk.serve.queue import BatchingStats, Learned
from marnet_sdk.server.gate import AccessLog
from marnet_sdk.server.listener import listen
from marnet_sdk.server.network import DrainingServer, make_server
from marnet_sdk.server.service import ServerLimits, Service

MAIN = "from marnet_sdk.server.cli import main; main()"


@dataclass
class Running:
    """A server that runs, and how to reach it."""

    service: Service
    server: DrainingServer
    port: int
    written: io.BytesIO
    told: list[str]  # of its bundle

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> httpx.Client:
        # No certificates, whose reading takes longer than most tests.
        return httpx.Client(base_url=self.url, timeout=PATIENCE, verify=False, **more)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def log(self, lines: int) -> list[dict[str, Any]]:
        """The access log, once it has so many lines."""
        until(lambda: self.written.getvalue().count(b"\n") >= lines)
        return [json.loads(line) for line in self.written.getvalue().splitlines()]

    def idle(self) -> None:
        """Wait until nothing of any request is left."""
        until(lambda: not self.service.in_flight and not self.service.connections())


def read_all(connection: socket.socket) -> bytes:
    """All that a server sends until it closes the connection."""
    got = b""
    try:
        while part := connection.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


@contextmanager
def running(
    open_classifier: Callable[[], Any],
    *,
    token: str | None = None,
    wait: bool = True,
    **limits: Any,
) -> Iterator[Running]:
    """Serve in a thread until the block ends.

    Args:
        wait: begin the block once the classifier is open.
        limits: fields of `ServerLimits`.
    """
    written, told = io.BytesIO(), list[str]()
    service = Service(
        open_classifier, ServerLimits(**limits), name="digits", token=token, tell=told.append
    )
    log = AccessLog(written)
    server, listener = make_server(service, log), listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        if wait:
            until(lambda: told)
        yield Running(service, server, port, written, told)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        log.close()
        assert not thread.is_alive()


LABELS = ("zero", "one", "<b>two</b>")
SHAPE = (3, 4, 4)


@dataclass
class Played:
    """A classifier whose answer to an image is what the image's bytes say."""

    labels: tuple[str, ...] = LABELS
    operating_point: str = "exact"
    samples: int = 1
    calls: list[dict[str, Any]] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    preprocess = SimpleNamespace(output_shape=SHAPE)
    bundle = SimpleNamespace(
        manifest=SimpleNamespace(backend="played", precision=SimpleNamespace(asked="fp32")),
        digest="0" * 64,
        golden_images=lambda: [],
    )

    async def apredict(self, image: bytes, *, top_k: int = 5, **more: Any) -> Prediction:
        self.calls.append({"top_k": top_k, **more})
        image = bytes(image)
        errors = {
            b"full": QueueFull("7 wait", waiting=7, retry_after=2.5),
            b"late": DeadlineExceeded("too late", deadline=0.1),
            b"bad": ImageError("image", "no image <_io.BytesIO object at 0x7f00aa>"),
            b"invalid": InvalidInput("samples: got 3, but there is no loop"),
            b"closed": ClassifierClosed("closed"),
            b"nan": InferenceError("NaN; see /srv/secret/bundle"),
            b"bug": RuntimeError("/srv/secret/bundle"),
        }
        if image in errors:
            raise errors[image]
        if image == b"wait":
            await self._wait()
        order = (2, 0, 1)[:top_k]
        top = tuple(Score(LABELS[i], i, 0.5 / (rank + 1)) for rank, i in enumerate(order))
        return Prediction(top[0].label, top[0].index, top[0].score, top)

    async def _wait(self) -> None:
        self.waiting.set()
        try:
            end = time.monotonic() + PATIENCE
            while not self.go_on.is_set() and time.monotonic() < end:
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        self.waiting.set()
        if pixels[0, 0, 0, 0] == 99:
            assert self.go_on.wait(PATIENCE)
        means = pixels.mean(axis=(1, 2, 3))
        return np.stack([means, 2 * means, -means], axis=1).astype(np.float32)

    def batching_stats(self) -> BatchingStats:
        kind = Kind("exact", 1)
        return BatchingStats(
            waiting=3,
            batches={"full": 2, "quiet": 1},
            sizes={2: 2, 5: 1},
            images={kind: 9},
            refused={"deadline": 1},
            learned={kind: Learned(0.5, 0.25, 8, {})},
        )

    def close(self) -> None:
        self.closed = True


@contextmanager
def process(bundle: Path, *arguments: str, **more: Any) -> Iterator[tuple[subprocess.Popen, str]]:
    """marnet-serve as a process of its own on a free port, and its address; ready to answer."""
    command = [sys.executable, "-W", "error", "-c", MAIN, "-m", str(bundle), "--port", "0"]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    with subprocess.Popen([*command, *arguments], **more) as served:
        try:
            assert served.stderr is not None
            first = served.stderr.readline()
            found = re.search(r"http://\S+/", first)
            assert found, first + served.stderr.read()
            assert "the self-test passed" in served.stderr.readline()
            yield served, found[0]
        finally:
            served.kill()


class Load:
    """Callers who ask one server again and again, each over a connection that stays open."""

    def __init__(self, port: int, image: bytes) -> None:
        self.port, self.image, self.enough = port, image, threading.Event()
        self.answers: list[tuple[int, dict[str, Any]]] = []

    def call(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        while not self.enough.wait(0.01):  # a pause, in which the server has the processor
            connection.request("POST", "/predict", self.image, {"Content-Type": "image/png"})
            response = connection.getresponse()
            self.answers.append((response.status, json.loads(response.read())))
        connection.close()

    def wait_for(self, digest: str) -> None:
        seen = len(self.answers)
        until(lambda: any(answer.get("bundle") == digest for _, answer in self.answers[seen:]))

    def check(self, points: Mapping[str, str]) -> None:
        """Every request was answered, by one bundle: digest -> the point that it alone has."""
        assert {status for status, _ in self.answers} == {200}
        for _, content in self.answers:
            seen = {answer["operating_point"] for answer in content["answers"]}
            assert seen == {points[content["bundle"]]}


def said(served: subprocess.Popen, start: str) -> str:
    """The next line of its messages that starts so."""
    assert served.stderr is not None
    return next(line for line in served.stderr if line.startswith(start))


def point_to(link: Path, bundle: Path) -> None:
    """Let a link point elsewhere, in one step."""
    (fresh := link.with_name("fresh")).symlink_to(bundle)
    fresh.rename(link)

"""A classifier behind HTTP, asked over connections that are kept open.

It is marnet-serve, by its own /predict or by the Open Inference Protocol, or what answers like it.
"""

from __future__ import annotations

import http.client
import json
import queue
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self
from urllib.parse import SplitResult, urlsplit

from marnet_sdk.errors import InferenceError, InvalidInput

CONNECTIONS = 64
_PATIENCE = 120  # seconds that an answer may take
_OPEN_INFERENCE = "/v2/models/"
_HEADER_LENGTH = "Inference-Header-Content-Length"
Sent = tuple[bytes, dict[str, str]]  # the body of a request, and its headers


@dataclass(frozen=True)
class Indexed:
    """The likeliest class, as a server said it."""

    index: int


class Server:
    """Sends images to a server, as many at once as there are connections; the others wait here."""

    def __init__(
        self,
        url: str,
        body: Callable[[bytes], Sent] | None = None,
        *,
        token: str | None = None,
    ) -> None:
        """Get ready; nothing is sent yet.

        Args:
            url: http://HOST:PORT for /predict, or .../v2/models/NAME for the Open Inference
                Protocol.
            body: makes a request of what is sent to /predict; None: it is the bytes of an image.
            token: is sent as the bearer token.

        Raises:
            InvalidInput: it is no such URL.
        """
        parts = _split(url)
        self.url = url
        self._path, self._body = parts.path, body or _raw
        if _OPEN_INFERENCE in parts.path:
            self._path, self._body = f"{parts.path.rstrip('/')}/infer", _open_inference
        elif not parts.path.endswith("/predict"):
            self._path = f"{parts.path.rstrip('/')}/predict"
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # The last one first, as a server closes those that idle.
        self._free: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        for _ in range(CONNECTIONS):
            kept = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PATIENCE)
            self._free.put(kept)
        self._threads = ThreadPoolExecutor(CONNECTIONS)

    def submit(self, image: bytes) -> Future[Indexed]:
        """Send an image; a future of its class."""
        return self._threads.submit(self.ask, image)

    def ask(self, image: bytes) -> Indexed:
        """Send an image, and wait for its class.

        Raises:
            InferenceError: the server is not there, or answers something else.
        """
        body, headers = self._body(image)
        connection = self._free.get()
        try:
            try:
                status, text = self._exchange(connection, body, headers)
            except ConnectionError:  # the server closed it while it idled
                connection.close()
                status, text = self._exchange(connection, body, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise InferenceError(
                f"{self.url} cannot be asked ({error}); start it with: marnet-serve --model BUNDLE"
            ) from error
        finally:
            self._free.put(connection)
        if status != http.client.OK:
            raise InferenceError(f"{self.url} answered {status}: {text[:200]!r}; expected 200")
        return Indexed(_index(self.url, text))

    def _exchange(
        self, connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        """Send a request, and wait for the status and the body of its answer."""
        connection.request("POST", self._path, body, headers | self._headers)
        response = connection.getresponse()
        return response.status, response.read()

    def predict(self, images: Iterable[bytes]) -> list[Indexed]:
        """Ask for one image after another."""
        return [self.ask(image) for image in images]

    def close(self) -> None:
        """End threads and connections."""
        self._threads.shutdown()
        for _ in range(CONNECTIONS):
            self._free.get().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number
        pass
    raise InvalidInput(
        f"got the URL {url!r}; expected http://HOST:PORT, or http://HOST:PORT/v2/models/NAME for "
        "the Open Inference Protocol"
    )


def _raw(image: bytes) -> Sent:
    return image, {"Content-Type": "application/octet-stream"}


def _open_inference(image: bytes) -> Sent:
    """Ask for the likeliest class of an image, which follows the JSON as a binary tensor."""
    tensor = struct.pack("<I", len(image)) + image
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "images",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}],
        }
    ).encode()
    kind = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(head))}
    return head + tensor, kind


def _index(url: str, text: bytes) -> int:
    """The class in an answer of either protocol, or of a server that gives its `index` alone."""
    try:
        found = json.loads(text)
        if "outputs" in found:  # "value:index:label"
            return int(found["outputs"][0]["data"][0].split(":")[1])
        return int((found.get("answers") or [found])[0]["index"])
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InferenceError(
            f"{url} gave an answer without a class: {text[:200]!r}; expected one of marnet-serve"
        ) from error

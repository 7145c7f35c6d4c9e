"""Requests to `infer` of the Open Inference Protocol: JSON, and binary tensors behind it.

A model has two inputs, of which a request gives one: `images`, encoded files, or `pixels`,
preprocessed. Tensors are JSON numbers or the bytes of the binary extension.

Axes: B images, H and W of the model's input.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.errors import brief
from marnet_sdk.server.bodies import Asked
from marnet_sdk.server.service import Refused

HEADER_LENGTH = "Inference-Header-Content-Length"
IMAGES, PIXELS = "images", "pixels"
LABELS, PROBABILITIES, LOGITS = "labels", "probabilities", "logits"
OUTPUTS = {IMAGES: (LABELS, PROBABILITIES), PIXELS: (LABELS, PROBABILITIES, LOGITS)}


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    binary: bool
    classes: int = 0  # of the classification extension: so many "value:index:label"; 0: all values


@dataclass
class Inference:
    """A request to `infer`, taken apart and checked as far as it goes without the model."""

    input: str  # IMAGES or PIXELS
    images: list[bytes]
    pixels: NDArray[np.float32]  # [B, 3, H, W]
    asked: Asked
    outputs: list[Wanted]
    id: str | None = None


@dataclass
class _Rest:
    """The binary tensors behind the JSON, taken from the front."""

    data: memoryview
    at: int = field(default=0)

    def take(self, size: Any, name: str) -> memoryview:
        left = len(self.data) - self.at
        if not _is_count(size) or size > left:
            refuse(f"input {name}: binary_data_size is {brief(size)}, {left} bytes are left")
        self.at += size
        return self.data[self.at - size : self.at]


SCHEMA = {  # of the JSON, for the OpenAPI document
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"enum": [IMAGES, PIXELS]},
                    "datatype": {"enum": ["BYTES", "FP32"]},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "parameters": {"type": "object"},
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"enum": [LABELS, PROBABILITIES, LOGITS]},
                    "parameters": {"type": "object"},
                },
            },
        },
    },
}


def read_inference(
    body: bytes | bytearray, header_length: str | None, shape: tuple[int, ...], most: int
) -> Inference:
    """Take a request to `infer` apart.

    Args:
        header_length: bytes of its JSON; the binary tensors follow. None: it is all JSON.
        shape: of the pixels of one image.
        most: images that a request may have.

    Raises:
        Refused: 400 for anything that is not such a request, 413 for too many images.
    """
    content, rest = _split(body, header_length)
    inputs = _objects(content, "inputs")
    if len(inputs) != 1:
        refuse(f"inputs: got {len(inputs)}, expected one, {IMAGES!r} or {PIXELS!r}")
    given = inputs[0]
    name, dims = given.get("name"), given.get("shape")
    expected = {IMAGES: "BYTES", PIXELS: "FP32"}
    if not isinstance(name, str) or name not in expected:
        refuse(f"inputs: got {brief(name)}, expected {IMAGES!r} or {PIXELS!r}")
    if given.get("datatype") != expected[name]:
        refuse(f"input {name}: got datatype {brief(given.get('datatype'))}, expected "
                f"{expected[name]}")  # fmt: skip
    if not isinstance(dims, list) or not all(map(_is_count, dims)):
        refuse(f"input {name}: shape is {brief(dims)}, expected a list of sizes")
    if dims and dims[0] > most:
        raise Refused(413, f"input {name}: got {dims[0]} images, at most {most} are accepted")
    images: list[bytes] = []
    pixels = np.empty((0, *shape), np.float32)
    if name == IMAGES:
        images = _images(given, dims, rest)
    else:
        pixels = _pixels(given, dims, rest, shape)
    if rest.at < len(rest.data):
        refuse(f"{len(rest.data) - rest.at} bytes follow the last tensor")
    parameters = _parameters(content, ("binary_data_output", "timeout", "samples"))
    return Inference(
        *(name, images, pixels, _asked(parameters)),
        _wanted(content, name, bool(parameters.get("binary_data_output"))),
        _id(content),
    )


def _split(body: bytes | bytearray, header_length: str | None) -> tuple[dict[str, Any], _Rest]:
    head, data = body, memoryview(b"")
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit():
            refuse(f"{HEADER_LENGTH}: got {brief(header_length)}, expected a number of bytes")
        if (size := int(header_length[:20])) > len(body):
            refuse(f"{HEADER_LENGTH}: got {size}, the body has {len(body)} bytes")
        head, data = body[:size], memoryview(body)[size:]
    try:
        content = json.loads(head, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        refuse("the body is not a JSON object")
    return content, _Rest(data)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _objects(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        refuse(f"{name}: expected a list of objects")
    return found


def _parameters(holder: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    found = holder.get("parameters", {})
    if not isinstance(found, dict):
        refuse("parameters: expected an object")
    if unknown := [name for name in found if name not in known]:
        refuse(f"parameters: {brief(unknown[0])} is none of {', '.join(known)}")
    return found


def _asked(parameters: dict[str, Any]) -> Asked:
    """Read what the parameters ask for; `timeout` is in microseconds, 0 for none."""
    timeout, samples = parameters.get("timeout", 0), parameters.get("samples")
    if not _is_count(timeout):
        refuse(f"timeout: got {brief(timeout)}, expected microseconds")
    if samples is not None and not (_is_count(samples) and samples):
        refuse(f"samples: got {brief(samples)}, expected 1 or more")
    return Asked(top_k=1, samples=samples, deadline_ms=timeout / 1e3 or None)


def _id(content: dict[str, Any]) -> str | None:
    name = content.get("id")
    if name is not None and not (isinstance(name, str) and len(name) <= 1000):
        refuse(f"id: got {brief(name)}, expected a short string")
    return name


def _wanted(content: dict[str, Any], input: str, binary: bool) -> list[Wanted]:
    wanted = []
    for one in _objects(content, "outputs"):
        name = one.get("name")
        if not isinstance(name, str) or name not in OUTPUTS[input]:
            refuse(f"outputs: got {brief(name)}; for {input} there are {', '.join(OUTPUTS[input])}")
        found = _parameters(one, ("binary_data", "classification"))
        classes = found.get("classification", 0)
        if not _is_count(classes) or (classes and name == LABELS):
            refuse(f"output {name}: classification is {brief(classes)}, expected a number, of "
                    f"{PROBABILITIES} or {LOGITS}")  # fmt: skip
        wanted.append(Wanted(name, bool(found.get("binary_data", binary)), classes))
    return wanted or [Wanted(name, binary) for name in OUTPUTS[input]]


def _images(given: dict[str, Any], dims: list[int], rest: _Rest) -> list[bytes]:
    """Encoded images, from a tensor [B] or [B, 1] of BYTES."""
    if len(dims) not in (1, 2) or dims[1:] not in ([], [1]) or not dims[0]:
        refuse(f"input {IMAGES}: shape is {dims}, expected [B] or [B, 1]")
    parameters = _parameters(given, ("binary_data_size",))
    if "binary_data_size" in parameters:
        images = _unpacked(rest.take(parameters["binary_data_size"], IMAGES))
    else:
        images = [_from_base64(text, i) for i, text in enumerate(_flat(given.get("data"), IMAGES))]
    if len(images) != dims[0]:
        refuse(f"input {IMAGES}: got {len(images)} images, the shape says {dims[0]}")
    return images


def _unpacked(data: memoryview) -> list[bytes]:
    """Split BYTES: each element stands behind its length, 4 bytes, the lowest first."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            refuse(f"image {len(found)}: its length is cut off")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            refuse(f"image {len(found)}: it has {length} bytes, fewer are there")
        found.append(bytes(data[at - length : at]))
    return found


def _from_base64(text: Any, position: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Refused(
            400, f"image {position}: expected base64 in JSON; or send binary tensors",
            position=position,
        ) from error  # fmt: skip


def _pixels(
    given: dict[str, Any], dims: list[int], rest: _Rest, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Preprocessed images, from a tensor [B, 3, H, W] of FP32."""
    if tuple(dims[1:]) != shape or not dims[0]:
        refuse(f"input {PIXELS}: shape is {dims}, expected [B, {', '.join(map(str, shape))}]")
    parameters = _parameters(given, ("binary_data_size",))
    if "binary_data_size" in parameters:
        data = rest.take(parameters["binary_data_size"], PIXELS)
        if len(data) != 4 * math.prod(dims):
            refuse(f"input {PIXELS}: got {len(data)} bytes, its shape needs {4 * math.prod(dims)}")
        values = np.frombuffer(data, "<f4")
    else:
        values = _numbers(_flat(given.get("data"), PIXELS))
    if values.size != math.prod(dims):
        refuse(f"input {PIXELS}: got {values.size} numbers, its shape needs {math.prod(dims)}")
    if not np.isfinite(values).all():
        refuse(f"input {PIXELS}: NaN or infinity; expected finite numbers")
    return values.reshape(dims).astype(np.float32)


def _flat(data: Any, name: str) -> list[Any]:
    """The elements of a JSON tensor, which may be nested as its shape is."""
    if not isinstance(data, list):
        refuse(f"input {name}: no data; expected a list, or binary_data_size")
    while data and isinstance(data[0], list):
        if not all(isinstance(row, list) for row in data):
            refuse(f"input {name}: its lists are not nested evenly")
        data = [value for row in data for value in row]
    return data


def _numbers(data: list[Any]) -> NDArray[np.float32]:
    if not all(type(value) in (int, float) for value in data):
        refuse(f"input {PIXELS}: expected numbers")
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return np.array(data, np.float32)
    except OverflowError as error:
        raise Refused(400, f"input {PIXELS}: a number is too large") from error


def refuse(reason: str) -> NoReturn:
    """Refuse the request with 400."""
    raise Refused(400, reason)

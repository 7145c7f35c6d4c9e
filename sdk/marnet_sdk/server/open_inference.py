"""The Open Inference Protocol, version 2, as KServe and Triton's clients speak it over HTTP.

A model has two inputs, of which a request gives one: `images`, encoded files, or `pixels`,
preprocessed. Tensors are JSON numbers or, behind the JSON, the bytes of the binary extension.

Axes: B images, C classes, H and W of the model's input.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from starlette.responses import JSONResponse, Response

import marnet_sdk
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import brief
from marnet_sdk.server.answering import (
    WORK,
    answer_all,
    problems,
    settings_for,
    unless_hung_up,
)
from marnet_sdk.server.bodies import Asked
from marnet_sdk.server.service import Refused, Service, beside
from marnet_sdk.uncertainty import softmax

VERSION = "1"  # of the model; a server has one
HEADER_LENGTH = "Inference-Header-Content-Length"
IMAGES, PIXELS = "images", "pixels"
LABELS, PROBABILITIES, LOGITS = "labels", "probabilities", "logits"
OUTPUTS = {IMAGES: (LABELS, PROBABILITIES), PIXELS: (LABELS, PROBABILITIES, LOGITS)}
Tensor = NDArray[np.float32] | list[bytes]


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
            _refuse(f"input {name}: binary_data_size is {brief(size)}, {left} bytes are left")
        self.at += size
        return self.data[self.at - size : self.at]


def add_open_inference(app: FastAPI, service: Service) -> None:
    """Add the routes of the protocol."""
    _add_health(app, service)
    _add_metadata(app, service)

    async def answer(request: Request, name: str, version: str) -> Response:
        _check_name(service, name, version)
        started, classifier = time.perf_counter(), service.classifier
        async with service.body(request) as body:
            length = request.headers.get(HEADER_LENGTH)
            shape = classifier.preprocess.output_shape
            most = service.limits.images
            asked = await beside(len(body), read_inference, body, length, shape, most)
            settings = settings_for(asked.asked, classifier, service.limits, started)
            if asked.input == PIXELS:
                tensors = await _of_pixels(request, service, asked, settings)
            else:
                tensors = await _of_images(request, classifier, asked, settings)
        return _response(service.name, asked, tensors, classifier.labels)

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}}
    more: dict[str, Any] = {
        "responses": problems(*WORK, 404), "openapi_extra": body, "response_class": Response
    }  # fmt: skip

    @app.post("/v2/models/{name}/infer", **more)
    async def infer(request: Request, name: str) -> Response:
        """Run the model on encoded images or on preprocessed pixels."""
        return await answer(request, name, VERSION)

    @app.post("/v2/models/{name}/versions/{version}/infer", **more)
    async def infer_version(request: Request, name: str, version: str) -> Response:
        """Run a version of the model; there is one."""
        return await answer(request, name, version)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Tell that the process answers."""
        return {"live": True}

    @app.get("/v2/health/ready", responses=problems(503))
    async def ready() -> dict[str, bool]:
        """Tell whether the bundle passed its self-test and requests are taken."""
        service.check_ready()
        return {"ready": True}


def _add_metadata(app: FastAPI, service: Service) -> None:
    @app.get("/v2", responses=problems(401, 503))
    async def server_metadata() -> dict[str, Any]:
        """Name the server and the extensions that it speaks."""
        return {
            "name": "marnet-serve",
            "version": marnet_sdk.__version__,
            "extensions": ["binary_tensor_data", "classification"],
        }

    unlike = problems(401, 404, 503)

    @app.get("/v2/models/{name}", responses=unlike)
    async def model_metadata(name: str) -> dict[str, Any]:
        """Describe the inputs and outputs of the model."""
        return await version_metadata(name, VERSION)

    @app.get("/v2/models/{name}/versions/{version}", responses=unlike)
    async def version_metadata(name: str, version: str) -> dict[str, Any]:
        """Describe the inputs and outputs of a version of the model; there is one."""
        _check_name(service, name, version)
        return _metadata(service.name, service.classifier)

    @app.get("/v2/models/{name}/ready", responses=unlike)
    async def model_ready(name: str) -> dict[str, Any]:
        """Tell whether the model answers."""
        return await version_ready(name, VERSION)

    @app.get("/v2/models/{name}/versions/{version}/ready", responses=unlike)
    async def version_ready(name: str, version: str) -> dict[str, Any]:
        """Tell whether a version of the model answers; there is one."""
        _check_name(service, name, version)
        service.check_ready()
        return {"name": service.name, "ready": True}


def _metadata(name: str, classifier: Classifier) -> dict[str, Any]:
    classes = len(classifier.labels)

    def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": [-1, *shape]}

    return {
        "name": name,
        "versions": [VERSION],
        "platform": f"marnet_{classifier.bundle.manifest.backend}",
        "inputs": [
            tensor(IMAGES, "BYTES"),
            tensor(PIXELS, "FP32", *classifier.preprocess.output_shape),
        ],
        "outputs": [
            tensor(LABELS, "BYTES"),
            tensor(PROBABILITIES, "FP32", classes),
            tensor(LOGITS, "FP32", classes),
        ],
    }


def _check_name(service: Service, name: str, version: str) -> None:
    if (name, version) != (service.name, VERSION):
        raise Refused(404, f"no model {brief(name)} of version {brief(version)}; there is "
                      f"{service.name!r} of version {VERSION!r}")  # fmt: skip


def _refuse(reason: str) -> NoReturn:
    raise Refused(400, reason)


# --- answers --------------------------------------------------------------------------------------


async def _of_images(
    request: Request, classifier: Classifier, asked: Inference, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Classify encoded images, batched with those of other requests."""
    classes = len(classifier.labels)
    all_classes = settings | {"top_k": classes}
    answers = await answer_all(request, classifier, asked.images, all_classes)
    probabilities = np.zeros((len(answers), classes), np.float32)
    for row, answer in zip(probabilities, answers, strict=True):
        row[[top.index for top in answer.top]] = [top.score for top in answer.top]
    return {
        LABELS: [answer.label.encode() for answer in answers],
        PROBABILITIES: probabilities,
    }


async def _of_pixels(
    request: Request, service: Service, asked: Inference, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Classify preprocessed pixels, one request after another and outside of other batches."""
    classifier = service.classifier
    if settings["samples"] not in (None, classifier.samples):
        _refuse(
            f"samples: pixels are answered with the server's {classifier.samples}; leave it out"
        )
    call = service.alone(lambda: classifier.logits(asked.pixels), settings["deadline"])
    logits = await unless_hung_up(request, call)
    probabilities = softmax(logits).astype(np.float32)
    return {
        LABELS: [classifier.labels[i].encode() for i in probabilities.argmax(axis=1)],
        PROBABILITIES: probabilities,
        LOGITS: logits,
    }


def _response(
    name: str, asked: Inference, tensors: dict[str, Tensor], labels: Sequence[str]
) -> Response:
    described, behind = [], []
    for wanted in asked.outputs:
        one, data = _output(wanted, tensors[wanted.name], labels)
        described.append(one)
        behind.append(data)
    content: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": described}
    if asked.id is not None:
        content["id"] = asked.id
    if not any(wanted.binary for wanted in asked.outputs):
        return JSONResponse(content)
    head = json.dumps(content).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return Response(b"".join([head, *behind]), headers=headers)


def _output(wanted: Wanted, tensor: Tensor, labels: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Describe one output, with its data inside or behind."""
    if wanted.classes:
        assert isinstance(tensor, np.ndarray)
        tensor, shape = _classification(tensor, wanted.classes, labels)
    else:
        shape = list(np.shape(tensor))
    is_bytes = isinstance(tensor, list)
    one: dict[str, Any] = {
        "name": wanted.name,
        "datatype": "BYTES" if is_bytes else "FP32",
        "shape": shape,
    }
    if not wanted.binary:
        one["data"] = [t.decode() for t in tensor] if is_bytes else tensor.ravel().tolist()
        return one, b""
    if is_bytes:
        data = b"".join(struct.pack("<I", len(text)) + text for text in tensor)
    else:
        data = np.ascontiguousarray(tensor, "<f4").tobytes()
    one["parameters"] = {"binary_data_size": len(data)}
    return one, data


def _classification(
    values: NDArray[np.float32], count: int, labels: Sequence[str]
) -> tuple[list[bytes], list[int]]:
    """The best classes as "value:index:label", [B, count], by the classification extension."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[k]:f}:{k}:{labels[k]}".encode()
        for row, best in zip(values, order, strict=True)
        for k in best
    ]
    return texts, list(order.shape)


# --- requests -------------------------------------------------------------------------------------

_SCHEMA = {
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
        _refuse(f"inputs: got {len(inputs)}, expected one, {IMAGES!r} or {PIXELS!r}")
    given = inputs[0]
    name, dims = given.get("name"), given.get("shape")
    expected = {IMAGES: "BYTES", PIXELS: "FP32"}
    if not isinstance(name, str) or name not in expected:
        _refuse(f"inputs: got {brief(name)}, expected {IMAGES!r} or {PIXELS!r}")
    if given.get("datatype") != expected[name]:
        _refuse(f"input {name}: got datatype {brief(given.get('datatype'))}, expected "
                f"{expected[name]}")  # fmt: skip
    if not isinstance(dims, list) or not all(map(_is_count, dims)):
        _refuse(f"input {name}: shape is {brief(dims)}, expected a list of sizes")
    if dims and dims[0] > most:
        raise Refused(413, f"input {name}: got {dims[0]} images, at most {most} are accepted")
    images: list[bytes] = []
    pixels = np.empty((0, *shape), np.float32)
    if name == IMAGES:
        images = _images(given, dims, rest)
    else:
        pixels = _pixels(given, dims, rest, shape)
    if rest.at < len(rest.data):
        _refuse(f"{len(rest.data) - rest.at} bytes follow the last tensor")
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
            _refuse(f"{HEADER_LENGTH}: got {brief(header_length)}, expected a number of bytes")
        if (size := int(header_length[:20])) > len(body):
            _refuse(f"{HEADER_LENGTH}: got {size}, the body has {len(body)} bytes")
        head, data = body[:size], memoryview(body)[size:]
    try:
        content = json.loads(head, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        _refuse("the body is not a JSON object")
    return content, _Rest(data)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _objects(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        _refuse(f"{name}: expected a list of objects")
    return found


def _parameters(holder: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    found = holder.get("parameters", {})
    if not isinstance(found, dict):
        _refuse("parameters: expected an object")
    if unknown := [name for name in found if name not in known]:
        _refuse(f"parameters: {brief(unknown[0])} is none of {', '.join(known)}")
    return found


def _asked(parameters: dict[str, Any]) -> Asked:
    """Read what the parameters ask for; `timeout` is in microseconds, 0 for none."""
    timeout, samples = parameters.get("timeout", 0), parameters.get("samples")
    if not _is_count(timeout):
        _refuse(f"timeout: got {brief(timeout)}, expected microseconds")
    if samples is not None and not (_is_count(samples) and samples):
        _refuse(f"samples: got {brief(samples)}, expected 1 or more")
    return Asked(top_k=1, samples=samples, deadline_ms=timeout / 1e3 or None)


def _id(content: dict[str, Any]) -> str | None:
    name = content.get("id")
    if name is not None and not (isinstance(name, str) and len(name) <= 1000):
        _refuse(f"id: got {brief(name)}, expected a short string")
    return name


def _wanted(content: dict[str, Any], input: str, binary: bool) -> list[Wanted]:
    wanted = []
    for one in _objects(content, "outputs"):
        name = one.get("name")
        if not isinstance(name, str) or name not in OUTPUTS[input]:
            _refuse(
                f"outputs: got {brief(name)}; for {input} there are {', '.join(OUTPUTS[input])}"
            )
        found = _parameters(one, ("binary_data", "classification"))
        classes = found.get("classification", 0)
        if not _is_count(classes) or (classes and name == LABELS):
            _refuse(f"output {name}: classification is {brief(classes)}, expected a number, of "
                    f"{PROBABILITIES} or {LOGITS}")  # fmt: skip
        wanted.append(Wanted(name, bool(found.get("binary_data", binary)), classes))
    return wanted or [Wanted(name, binary) for name in OUTPUTS[input]]


def _images(given: dict[str, Any], dims: list[int], rest: _Rest) -> list[bytes]:
    """Encoded images, from a tensor [B] or [B, 1] of BYTES."""
    if len(dims) not in (1, 2) or dims[1:] not in ([], [1]) or not dims[0]:
        _refuse(f"input {IMAGES}: shape is {dims}, expected [B] or [B, 1]")
    parameters = _parameters(given, ("binary_data_size",))
    if "binary_data_size" in parameters:
        images = _unpacked(rest.take(parameters["binary_data_size"], IMAGES))
    else:
        images = [_from_base64(text, i) for i, text in enumerate(_flat(given.get("data"), IMAGES))]
    if len(images) != dims[0]:
        _refuse(f"input {IMAGES}: got {len(images)} images, the shape says {dims[0]}")
    return images


def _unpacked(data: memoryview) -> list[bytes]:
    """Split BYTES: each element stands behind its length, 4 bytes, the lowest first."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            _refuse(f"image {len(found)}: its length is cut off")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            _refuse(f"image {len(found)}: it has {length} bytes, fewer are there")
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
        _refuse(f"input {PIXELS}: shape is {dims}, expected [B, {', '.join(map(str, shape))}]")
    parameters = _parameters(given, ("binary_data_size",))
    if "binary_data_size" in parameters:
        data = rest.take(parameters["binary_data_size"], PIXELS)
        if len(data) != 4 * math.prod(dims):
            _refuse(f"input {PIXELS}: got {len(data)} bytes, its shape needs {4 * math.prod(dims)}")
        values = np.frombuffer(data, "<f4")
    else:
        values = _numbers(_flat(given.get("data"), PIXELS))
    if values.size != math.prod(dims):
        _refuse(f"input {PIXELS}: got {values.size} numbers, its shape needs {math.prod(dims)}")
    if not np.isfinite(values).all():
        _refuse(f"input {PIXELS}: NaN or infinity; expected finite numbers")
    return values.reshape(dims).astype(np.float32)


def _flat(data: Any, name: str) -> list[Any]:
    """The elements of a JSON tensor, which may be nested as its shape is."""
    if not isinstance(data, list):
        _refuse(f"input {name}: no data; expected a list, or binary_data_size")
    while data and isinstance(data[0], list):
        if not all(isinstance(row, list) for row in data):
            _refuse(f"input {name}: its lists are not nested evenly")
        data = [value for row in data for value in row]
    return data


def _numbers(data: list[Any]) -> NDArray[np.float32]:
    if not all(type(value) in (int, float) for value in data):
        _refuse(f"input {PIXELS}: expected numbers")
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return np.array(data, np.float32)
    except OverflowError as error:
        raise Refused(400, f"input {PIXELS}: a number is too large") from error

"""The Open Inference Protocol, version 2, as KServe and Triton's clients speak it over HTTP.

Axes: B images, C classes.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from typing import Any

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
from marnet_sdk.server.inference_request import (
    HEADER_LENGTH,
    IMAGES,
    LABELS,
    LOGITS,
    PIXELS,
    PROBABILITIES,
    SCHEMA,
    Inference,
    Wanted,
    read_inference,
    refuse,
)
from marnet_sdk.server.service import Refused, Service, beside
from marnet_sdk.uncertainty import softmax

VERSION = "1"  # of the model; a server has one
BUNDLE = "bundle"  # the digest of the one that answers
Tensor = NDArray[np.float32] | list[bytes]


def add_open_inference(app: FastAPI, service: Service) -> None:
    """Add the routes of the protocol."""
    _add_health(app, service)
    _add_metadata(app, service)

    async def answer(request: Request, name: str, version: str) -> Response:
        _check_name(service, name, version)
        started = time.perf_counter()
        service.check_ready()
        async with service.body(request) as body:
            with service.using() as classifier:
                return await _answer(request, service, classifier, body, started)

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}
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
        with service.using() as classifier:
            return _metadata(service.name, classifier)

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
        BUNDLE: classifier.bundle.digest,
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


# --- answers --------------------------------------------------------------------------------------


async def _answer(
    request: Request, service: Service, classifier: Classifier, body: bytearray, started: float
) -> Response:
    length = request.headers.get(HEADER_LENGTH)
    shape, most = classifier.preprocess.output_shape, service.limits.images
    asked = await beside(len(body), read_inference, body, length, shape, most)
    settings = settings_for(asked.asked, classifier, service.limits, started)
    if asked.input == PIXELS:
        tensors = await _of_pixels(request, service, classifier, asked, settings)
    else:
        tensors = await _of_images(request, classifier, asked, settings)
    return _response(service.name, classifier, asked, tensors)


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
    request: Request,
    service: Service,
    classifier: Classifier,
    asked: Inference,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Classify preprocessed pixels, one request after another and outside of other batches."""
    if settings["samples"] not in (None, classifier.samples):
        refuse(f"samples: pixels are answered with the server's {classifier.samples}; leave it out")
    call = service.alone(lambda: classifier.logits(asked.pixels), settings["deadline"])
    logits = await unless_hung_up(request, call)
    probabilities = softmax(logits).astype(np.float32)
    return {
        LABELS: [classifier.labels[i].encode() for i in probabilities.argmax(axis=1)],
        PROBABILITIES: probabilities,
        LOGITS: logits,
    }


def _response(
    name: str, classifier: Classifier, asked: Inference, tensors: dict[str, Tensor]
) -> Response:
    described, behind = [], []
    for wanted in asked.outputs:
        one, data = _output(wanted, tensors[wanted.name], classifier.labels)
        described.append(one)
        behind.append(data)
    content: dict[str, Any] = {
        "model_name": name,
        "model_version": VERSION,
        "parameters": {BUNDLE: classifier.bundle.digest},
        "outputs": described,
    }
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

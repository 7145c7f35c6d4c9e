"""Answers the images of a request, and describes how a refusal looks."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import ImageError, brief
from marnet_sdk.prediction import Prediction
from marnet_sdk.server.bodies import Asked
from marnet_sdk.server.service import Refused, ServerLimits

T = TypeVar("T")


class RefusedImage(BaseModel):
    """An image that is not usable, and where it stood in the request."""

    position: int
    reason: str


class Problem(BaseModel):
    """The reason why a request was refused. Where images were, the answers to the others."""

    error: str
    position: int | None = None  # of the first image that was refused
    refused: list[RefusedImage] | None = None
    answers: list[Prediction | None] | None = None


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the OpenAPI document."""
    reasons = {
        400: "A body or an image that cannot be used, with its position",
        401: "No bearer token, or a wrong one",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "Too many bytes or images",
        415: "Another kind of body",
        422: "A parameter of the query that is unknown or out of range",
        429: "Too many images are waiting; see Retry-After",
        500: "The model gave no answer",
        503: "Not open yet, stopping, or too much at once; see Retry-After",
        504: "The deadline passes before the answer",
    }
    return {code: {"model": Problem, "description": reasons[code]} for code in statuses}


WORK = (400, 401, 408, 413, 415, 429, 500, 503, 504)  # refusals of what classifies


def settings_for(
    asked: Asked, classifier: Classifier, limits: ServerLimits, started: float
) -> dict[str, Any]:
    """Turn what a request asks for into arguments of `Classifier.apredict`.

    Args:
        started: when the request came, by `time.perf_counter`; its deadline counts from there.

    Raises:
        Refused: 400 for another operating point or too many samples, 504 for a deadline that has
            passed already.
    """
    point = classifier.operating_point
    if asked.operating_point not in (None, point):
        raise Refused(
            400,
            f"operating_point: got {brief(asked.operating_point)}, this server opened {point!r}; "
            "leave it out, or ask a server that was started with another --operating-point",
        )
    if asked.samples and asked.samples > limits.samples:
        raise Refused(
            400, f"samples: got {asked.samples}, this server draws at most {limits.samples}"
        )
    deadline = None
    if asked.deadline_ms is not None:
        deadline = asked.deadline_ms / 1e3 - (time.perf_counter() - started)
        if deadline <= 0:
            raise Refused(504, "the deadline passed while the body arrived; allow more time")
    samples = asked.samples
    if samples is None and asked.operating_point is not None:
        samples = classifier.samples  # which keeps it from being answered at another point
    top_k = min(asked.top_k, len(classifier.labels))
    return {"top_k": top_k, "samples": samples, "deadline": deadline}


async def answer_all(
    request: Request,
    classifier: Classifier,
    images: Sequence[bytes | bytearray],
    settings: dict[str, Any],
) -> list[Prediction]:
    """Classify the images of one request.

    Args:
        settings: arguments of `Classifier.apredict`.

    Raises:
        Refused: 400, some are not usable images; holds the answers to the others.
        QueueFull, DeadlineExceeded, ...: the first other error; all images are cancelled then.
        ClientDisconnect: the client closed the connection; the same.
    """

    async def one(image: bytes | bytearray) -> Prediction | ImageError:
        try:
            return await classifier.apredict(image, **settings)
        except ImageError as error:
            return error

    async def each() -> list[Prediction | ImageError]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(image)) for image in images]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]

    found = await unless_hung_up(request, each())
    if any(isinstance(answer, ImageError) for answer in found):
        raise _unusable(found)
    return [answer for answer in found if isinstance(answer, Prediction)]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _unusable(found: Sequence[Prediction | ImageError]) -> Refused:
    refused = [
        RefusedImage(position=i, reason=_without_addresses(answer.problem))
        for i, answer in enumerate(found)
        if isinstance(answer, ImageError)
    ]
    first = f"image {refused[0].position}: {refused[0].reason}"
    more = f"; and {len(refused) - 1} more, see refused" if len(refused) > 1 else ""
    problem = Problem(
        error=first + more,
        position=refused[0].position,
        refused=refused,
        answers=[None if isinstance(answer, ImageError) else answer for answer in found],
    )
    return Refused(400, problem.error, **problem.model_dump(exclude={"error"}, mode="json"))


def _without_addresses(reason: str) -> str:
    """Leave out where an object of a decoder lay in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", reason)


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for the work, and cancel it once nobody waits for its answer any more.

    Raises:
        ClientDisconnect: the client closed the connection.
    """

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

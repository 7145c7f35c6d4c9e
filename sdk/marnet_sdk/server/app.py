"""The web application of `marnet-serve`: its routes, what they answer, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

import marnet_sdk
from marnet_sdk.errors import MarnetError, brief
from marnet_sdk.prediction import Prediction
from marnet_sdk.server.answering import WORK, answer_all, problems, settings_for
from marnet_sdk.server.bodies import REQUEST_BODY, Asked, is_raw, merged, read_upload
from marnet_sdk.server.gate import AccessLog, Gate
from marnet_sdk.server.metrics import Metrics
from marnet_sdk.server.open_inference import add_open_inference
from marnet_sdk.server.service import Refused, Service, beside, logger, refusal_of

HUNG_UP = 499  # the client closed the connection before its answer; nobody reads it


class Answers(BaseModel):
    """The answers to the images of a request, in their order."""

    answers: list[Prediction]
    bundle: str  # its digest; one has answered all of them
    milliseconds: float  # from the request's header to this answer


def create_app(service: Service, log: AccessLog | None) -> Gate:
    """Build the application of a server, whose lifespan opens and closes the classifier.

    Args:
        log: None: whoever runs the application has a log of its own.
    """
    metrics = Metrics(service, log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(service.open())
        reloading = asyncio.create_task(service.keep_current())
        sharing = asyncio.create_task(metrics.keep_shared())
        yield
        reloading.cancel()
        sharing.cancel()
        await asyncio.gather(opening, reloading, sharing, return_exceptions=True)
        await service.close()

    app = FastAPI(
        title="marnet-serve",
        description=f"Labels of images, by the model `{service.name}`.",
        version=marnet_sdk.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other servers
        redoc_url=None,
        exception_handlers={
            Refused: _on_refused,
            HTTPException: _on_http,
            RequestValidationError: _on_invalid_query,
            MarnetError: _on_marnet,
            ClientDisconnect: _on_hang_up,
            Exception: _on_bug,
        },
    )
    _add_pages(app)
    _add_probes(app, service, metrics)
    _add_predict(app, service)
    add_open_inference(app, service)
    return Gate(app, service, metrics, log)


def _add_predict(app: FastAPI, service: Service) -> None:
    body = {"requestBody": REQUEST_BODY}

    @app.post(
        "/predict",
        responses=problems(*WORK, 422),
        openapi_extra=body,
        response_model_exclude={"answers": {"__all__": {"provenance"}}},  # a server's has none
    )
    async def predict(request: Request, query: Annotated[Asked, Query()]) -> Answers:
        """Classify the images of the body: the bytes of one, several files, or base64 in JSON."""
        started = time.perf_counter()
        service.check_ready()
        async with service.body(request) as body:
            kind = request.headers.get("content-type", "")
            size = 0 if is_raw(kind) else len(body)
            upload = await beside(size, read_upload, kind, body, service.limits)
            asked = merged(query, upload.settings)
            with service.using() as classifier:
                settings = settings_for(asked, classifier, service.limits, started)
                answers = await answer_all(request, classifier, upload.images, settings)
                digest = classifier.bundle.digest
        taken = 1e3 * (time.perf_counter() - started)
        return Answers(answers=answers, bundle=digest, milliseconds=taken)


def _add_probes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses=problems(503))
    async def readyz() -> dict[str, str]:
        """Tell whether the bundle passed its self-test and requests are taken."""
        service.check_ready()
        return {"status": "ready"}

    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses=text | problems(401, 503), response_class=Response)
    async def show_metrics(request: Request) -> Response:
        """Show metrics in Prometheus' text format."""
        page, kind = metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": kind})


def _add_pages(app: FastAPI) -> None:
    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        html = resources.files("marnet_sdk.server").joinpath(file).read_text("utf-8")
        headers = {"Content-Security-Policy": _policy(html), "Referrer-Policy": "no-referrer"}
        page = HTMLResponse(html, headers=headers)

        async def show(_: Request, page: HTMLResponse = page) -> HTMLResponse:
            return page

        app.add_route(path, show, methods=["GET"], include_in_schema=False)


def _policy(html: str) -> str:
    """A content security policy that allows the page's own script and style, and nothing else."""

    def allowed(tag: str) -> str:
        code = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in code)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; img-src blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


# --- refusals -------------------------------------------------------------------------------------


def _answer(refused: Refused) -> JSONResponse:
    content = {"error": refused.reason, **refused.fields}
    return JSONResponse(content, refused.status, headers=refused.headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(Refused(error.status_code, str(error.detail), dict(error.headers or {})))


async def _on_invalid_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return _answer(Refused(422, f"{brief(place)}: {first['msg']}"))


async def _on_marnet(_: Request, error: Exception) -> Response:
    if (refused := refusal_of(error)) is None:
        logger.error("a request failed", exc_info=error)
        refused = Refused(500, "the model gave no answer; the server's log says why")
    return _answer(refused)


async def _on_hang_up(_: Request, __: Exception) -> Response:
    return Response(status_code=HUNG_UP)


async def _on_bug(_: Request, __: Exception) -> Response:
    return _answer(Refused(500, "the server failed; its log says why"))

"""The Ray Serve application answers as marnet-serve does, and survives the death of a replica."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from local_ray import run_with_ray
from serving import Played

from marnet_sdk import Classifier
from marnet_sdk.errors import ClassifierClosed, InvalidInput, MissingExtra, NotFound, QueueFull
from marnet_sdk.serve import ray_app
from marnet_sdk.serve.ray_app import Replica, build
from marnet_sdk.server.cli import read_options
from marnet_sdk.server.service import ServerLimits, Service


def options(model: Any, **more: Any) -> dict[str, Any]:
    read = read_options({"model": model, "threads": 1, **more})
    for name in ("host", "port", "processes"):
        del read[name]
    return read


@asynccontextmanager
async def answering(replica: Replica):
    """A client of a replica's application, as Ray runs it."""
    gate = replica.__serve_build_asgi_app__()
    async with gate.app.router.lifespan_context(gate.app):
        transport = httpx.ASGITransport(app=gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
            yield client


# --- a replica, without Ray -----------------------------------------------------------------------


def test_a_replica_answers_as_the_classifier_does(bundle_of, digits):
    bundle, image = bundle_of("onnxruntime", "fp32"), min((digits / "test").glob("*.png"))
    with Classifier(bundle) as classifier:
        expected = classifier.predict(image)
    replica = Replica(options(bundle, name="digits", max_images=1), has_token=False)

    async def ask() -> tuple[httpx.Response, ...]:
        async with answering(replica) as client:
            await replica.check_health()
            content = image.read_bytes()
            files = [("images", (name, content)) for name in ("one.png", "two.png")]
            return (
                await client.post("/predict", params={"top_k": 2}, content=content),
                await client.post("/predict", files=files),
                await client.get("/readyz"),
                await client.get("/v2/models/digits"),
                await client.get("/metrics"),
            )

    answered, too_many, ready, model, metrics = asyncio.run(ask())
    (answer,) = answered.json()["answers"]
    assert (answer["label"], len(answer["top"])) == (expected.label, 2)
    assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
    assert (too_many.status_code, ready.status_code) == (413, 200)
    assert model.json()["platform"] == "marnet_onnxruntime"
    assert 'marnet_images_total{end="answered"} 2.0' in metrics.text  # one of them for its health
    assert "marnet_log_lines_lost" not in metrics.text
    with pytest.raises(ClassifierClosed):
        asyncio.run(replica.check_health())


def test_a_replica_without_its_bundle_does_not_begin(tmp_path):
    with pytest.raises(NotFound, match="is not a bundle"):
        Replica(options(tmp_path / "none.marnet"), has_token=False)


def test_a_replica_that_lacks_the_token_does_not_answer_everybody(tmp_path, monkeypatch):
    monkeypatch.delenv("MARNET_SERVE_TOKEN", raising=False)
    with pytest.raises(InvalidInput, match="and not in the replica; set it in env_vars"):
        Replica(options(tmp_path), has_token=True)


def test_probes_need_no_token_behind_a_prefix_either(monkeypatch, tmp_path):
    service = Service(Played, ServerLimits(), name="digits", token="secret")
    monkeypatch.setattr(ray_app, "make_service", lambda **_: service)
    gate = Replica(options(tmp_path), has_token=True).__serve_build_asgi_app__()

    async def statuses(*paths: str) -> list[int]:
        transport = httpx.ASGITransport(app=gate, root_path="/second")
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
            return [(await client.get(path)).status_code for path in paths]

    paths = ("/second/readyz", "/second/metrics", "/second/v2/models/digits")
    assert asyncio.run(statuses(*paths)) == [200, 401, 401]


class Busy(Played):
    """A classifier whose queue is full."""

    answered = 0

    async def apredict(self, image: Any, **_: Any) -> Any:
        raise QueueFull("7 wait")

    def batching_stats(self) -> Any:
        return type(super().batching_stats())(answered=self.answered)


def test_a_full_queue_is_healthy_as_long_as_it_moves(monkeypatch, tmp_path):
    busy = Busy()
    service = Service(lambda: busy, ServerLimits(), name="digits")
    monkeypatch.setattr(ray_app, "make_service", lambda **_: service)
    replica = Replica(options(tmp_path), has_token=False)
    for busy.answered in (0, 7, 8):
        asyncio.run(replica.check_health())
    with pytest.raises(QueueFull):
        asyncio.run(replica.check_health())


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({}, "no model; name a bundle"),
        ({"model": "x", "port": 80}, "port: Ray's proxies listen"),
        ({"model": "x", "max-connections": 80}, "max-connections: Ray's proxies listen"),
        ({"model": "x", "processes": 2}, "processes: Ray starts and replaces them; say how many"),
        ({"model": "x", "max_batch": "many"}, "'--max-batch': 'many' is not a valid integer"),
        ({"model": "x", "max_bach": 3}, "No such option"),
        ({"model": "x", "help": True}, "'--help' does not take a value"),
        ({"model": "x", "replicas": "8-1"}, "replicas: got '8-1', expected a number, or two"),
        ({"model": "x", "replicas": "none"}, "replicas: got 'none'"),
        ({"model": "x", "replicas": 0}, "replicas: got 0"),
        ({"model": "x", "target_ongoing": "0"}, "target_ongoing: got '0', expected a number above"),
        ({"model": "x", "target_ongoing": "nan"}, "target_ongoing: got 'nan'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(args, reason):
    with pytest.raises(InvalidInput, match=reason):
        build(args)


def test_options_of_a_configuration_are_those_of_the_command(tmp_path):
    read = read_options(
        {"model": tmp_path, "brown_out": ["fast", "zero"], "max-delay": "2.5", "samples": None,
         "watch": "true", "fast_decode": False}
    )  # fmt: skip
    assert read["model"] == tmp_path
    assert read["brown_out"] == ("fast", "zero")
    assert (read["max_delay"], read["samples"], read["max_batch"]) == (2.5, None, 64)
    assert (read["watch"], read["fast_decode"]) == (True, False)


@pytest.mark.parametrize("package", ["ray", "fastapi"])
def test_without_the_extra_the_pip_line_is_told(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(("ray.", "marnet_sdk.server.a"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[ray\]"'):
        build({"model": "x"})


# --- on Ray ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(bundle_of, digits, tmp_path_factory) -> dict[str, Any]:
    """The answers of two replicas of a local Ray, one of which was killed in the middle."""
    folder = tmp_path_factory.mktemp("served")
    return run_with_ray("serving", bundle_of("onnxruntime", "fp32"), digits / "test", cwd=folder)


@pytest.fixture(scope="module")
def expected(bundle_of, digits) -> list[str]:
    with Classifier(bundle_of("onnxruntime", "fp32")) as classifier:
        paths = sorted((digits / "test").glob("*.png"))
        return [answer.label for answer in classifier.predict(paths)]


@pytest.mark.slow
def test_each_image_is_answered_once_though_a_replica_is_killed(served, expected):
    assert served["labels"] == expected
    assert served["killed"]
    assert served["replicas_after"] == {"RUNNING": 2}


@pytest.mark.slow
def test_requests_and_refusals_are_those_of_marnet_serve(served, expected):
    assert served["forms"] == [[expected[0]], expected[:2], [expected[0]]]
    assert served["statuses"] == {
        "bad image": 400, "no body": 400, "unknown parameter": 422, "too many": 413,
        "too large": 413, "no token": 401, "ready": 200, "model": 200, "nothing there": 404,
    }  # fmt: skip
    assert served["refusal"]["refused"][0]["position"] == 0
    assert served["prefixed"] == [expected[0]]
    assert served["prefixed probe"] == 200  # needs no token


@pytest.mark.slow
def test_a_replica_computes_with_the_cpus_that_are_reserved_for_it(served):
    assert served["reserved"] == [1, 3]


@pytest.mark.slow
def test_a_bundle_that_is_not_there_is_named_in_the_status(served):
    assert "none.marnet is not a directory" in served["failure"]

"""A bundle under LoadGen's traffic: what is reported, and that wrong answers are found."""

from __future__ import annotations

import io
import itertools
import json
from concurrent.futures import Future
from dataclasses import replace

import pytest
from click.testing import CliRunner
from PIL import Image
from serving import Played, running

from marnet_bench.cli import TRAFFIC, main
from marnet_bench.http_client import Server
from marnet_bench.photographs import images_of
from marnet_bench.traffic import BATCHING, Run, Traffic, run_traffic, seconds_of
from marnet_sdk import Classifier
from marnet_sdk.errors import InferenceError, QueueFull


@pytest.fixture(scope="module")
def classifier(bundle_of):
    with Classifier(bundle_of("onnxruntime", "fp32"), threads=1, batching=BATCHING) as opened:
        yield opened


@pytest.mark.parametrize("scenario", TRAFFIC)
def test_every_scenario_asks_for_images_and_checks_the_answers(scenario, classifier):
    images = images_of(classifier.bundle, [])
    rate = 200.0 if scenario == "server" else None
    report = run_traffic(
        classifier, images, scenario, duration=0.1, together=3, rate=rate, latency_ms=1e6
    )
    (run,) = report["runs"]
    assert run["images"] >= (100 if scenario == "server" else 10)  # 99 of 100 are spoken of
    assert run["images"] % (3 if scenario == "multi-stream" else 1) == 0
    assert 0 < run["p50_ms"] <= run["p90_ms"] <= run["p99_ms"]
    assert run["images_per_s"] > 0
    assert 0 < report["checked"] <= len(images)
    assert sum(report["batching"]["batches"].values()) > 0
    (line,) = report["lines"]
    assert min(line["seconds"]) >= 0
    assert max(line["seconds"]) > 0
    if scenario != "offline":  # whose one query takes longer than an image
        assert len(line["seconds"]) * report["together"] == run["images"]


def test_the_rate_that_is_answered_in_time_is_closed_in_on(monkeypatch):
    """Offline it does 64 images/s, which batches help; from 60 on each is late otherwise."""
    sent = []

    def run(scenario, rate=None):
        sent.append(rate)
        p99 = 200.0 if rate and rate > 60 else 20.0
        return Run(rate, 10, rate or 64.0, 1.0, 2.0, p99)

    traffic = Traffic(lambda _: Future(), [b""], duration=1, fastest=1)
    monkeypatch.setattr(traffic, "run", run)
    runs = traffic.search(100.0)
    assert sent == [None, 32, 48, 72, 60, 66, 63]
    assert [run.rate for run in runs if run.p99_ms <= 100] == [32, 48, 60]


def test_a_search_ends_where_no_rate_is_answered_in_time(monkeypatch):
    traffic = Traffic(lambda _: Future(), [b""], duration=1, fastest=1)
    monkeypatch.setattr(
        traffic, "run", lambda scenario, rate=None: Run(rate, 10, 64.0, 200.0, 200.0, 200.0)
    )
    assert len(traffic.search(100.0)) == 12


def test_another_answer_than_that_of_a_single_call_is_an_error(classifier, monkeypatch):
    images = images_of(classifier.bundle, [])

    def submit(image):
        future: Future = Future()
        answer = classifier.predict(images[1] if image == images[0] else images[0])
        future.set_result(answer)
        return future

    assert classifier.predict(images[0]).label != classifier.predict(images[1]).label
    monkeypatch.setattr(classifier, "submit", submit)
    with pytest.raises(InferenceError, match=r"image \d+: got the classes .* predict says"):
        run_traffic(classifier, images[:2], "single-stream", duration=0.05)


def test_a_request_that_is_refused_is_an_error_and_hangs_nothing(classifier, monkeypatch):
    def submit(image):
        raise QueueFull("1 request waits, and 1 may; come again later")

    monkeypatch.setattr(classifier, "submit", submit)
    with pytest.raises(QueueFull, match="come again later"):
        run_traffic(classifier, images_of(classifier.bundle, [])[:2], "offline", duration=0.05)


def test_photographs_have_the_side_that_was_asked_for():
    files = images_of(None, [300])
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert {image.format for image in images} == {"JPEG"}
    assert {max(image.size) for image in images} == {300}
    assert len(set(files)) == len(files)


def test_photographs_of_several_sides_are_mixed():
    sides = [max(Image.open(io.BytesIO(file)).size) for file in images_of(None, [100, 60])]
    assert sorted(sides) == [60] * 6 + [100] * 6


def test_the_seconds_of_a_run_are_those_of_its_queries_in_order():
    """Answers come in any order; a query of several images ends with the last of them."""
    assert seconds_of([(2.0, 2.5), (1.0, 3.0)], "server") == (2.0, 0.5)
    grouped = [(1.0, 2.0), (1.0, 4.0), (5.0, 5.5), (5.0, 5.25)]
    assert seconds_of(grouped, "multi-stream") == (3.0, 0.5)


def test_offline_the_seconds_are_those_of_an_image():
    ends = [(10.0, 10.0 + 0.5 * i) for i in range(1, 201)]
    found = seconds_of(ends, "offline")
    assert found == pytest.approx([0.5] * 50)
    assert sum(seconds_of(ends[:7], "offline")) == pytest.approx(3.5)


@pytest.mark.parametrize("path", ["", "/v2/models/digits"])
@pytest.mark.parametrize("scenario", ["single-stream", "server"])
def test_a_server_is_asked_over_http(path, scenario):
    played = Played()
    with running(lambda: played) as server, Server(server.url + path) as asked:
        rate = 200.0 if scenario == "server" else None
        report = run_traffic(asked, [b"a", b"b"], scenario, duration=0.1, rate=rate)
    (run,) = report["runs"]
    assert report["url"] == server.url + path
    assert report["batching"] is None
    assert report["checked"] == 2
    assert len(played.calls) == run["images"] + 2  # and the single calls before


def test_another_answer_of_a_server_than_to_a_single_call_is_an_error(monkeypatch):
    played, numbers = Played(), itertools.count()
    answered = played.apredict

    async def apredict(image, **more):
        answer = await answered(image, **more)
        return replace(answer, index=next(numbers))

    monkeypatch.setattr(played, "apredict", apredict)
    match = pytest.raises(InferenceError, match=r"got the classes .* under traffic")
    with running(lambda: played) as server, Server(server.url) as asked, match:
        run_traffic(asked, [b"a"], "single-stream", duration=0.05)


def test_the_command_asks_a_server_and_draws_its_latency(tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_bench.traffic._MOST_RUNS", 2)
    picture, written = tmp_path / "deep/latency.png", tmp_path / "report.json"
    chosen = ["--scenario", "server", "--photographs", "32", "--latency", "60000"]
    with running(Played) as server:
        words = [*chosen, "--url", server.url, "--duration", "0.05", "--plot", str(picture)]
        result = CliRunner().invoke(main, [*words, "-o", str(written)])
    assert result.exit_code == 0, result.output
    assert server.url in result.output
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    report = json.loads(written.read_text())
    assert (report["searched"], report["photographs"]) == (True, [32])
    assert report["best"]["images_per_s"] > 0


def test_the_command_prints_a_table_and_the_learned_times(bundle_of):
    chosen = ["--scenario", "server", "--rate", "200", "--duration", "0.1", "--threads", "1"]
    result = CliRunner().invoke(main, [*chosen, "-m", str(bundle_of("onnxruntime", "fp32"))])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "200.0" in said
    assert "99 of 100 within 100 ms: " in said
    assert "images are those of single calls" in said
    assert "marnet-serve --model" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "5"], "--rate is for --scenario server"),
        (["--scenario", "offline", "--latency", "5"], "--latency is for --scenario server"),
        (["--photographs", "500"], "--photographs is for --scenario single-stream"),
        (["--scenario", "server", "--batch", "4"], "--batch only with multi-stream"),
        (["--scenario", "server", "--plot", "a.png", "--rate", "5"], "leave --rate out"),
        (["--scenario", "offline", "--plot", "a.png"], "--plot is for --scenario server"),
        (["--url", "http://127.0.0.1:1"], "--url is for --scenario single-stream"),
        (
            ["--scenario", "offline", "--url", "http://127.0.0.1:1", "--fast-decode"],
            "start marnet-serve with them",
        ),
    ],
)
def test_options_of_another_scenario_are_refused(words, message):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())

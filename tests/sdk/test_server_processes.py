"""Several processes of marnet-serve behind one socket answer, end, reload and are replaced."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from serving import Load, point_to, process, read_all, said
from waiting import PATIENCE, until

from marnet_sdk import Classifier
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import InvalidInput, ServerFailed
from marnet_sdk.server import processes
from marnet_sdk.server.cli import main
from marnet_sdk.server.listener import listen
from marnet_sdk.server.processes import end_mark, run_processes
from marnet_sdk.server.shared_metrics import SharedMetrics

TWO = ("--processes", "2", "--threads", "1")


def answering(parent: int) -> list[int]:
    """The processes that answer; multiprocessing's tracker of resources is none of them."""
    children = psutil.Process(parent).children()
    return [one.pid for one in children if any("spawn_main" in word for word in one.cmdline())]


def ask(connection: http.client.HTTPConnection, image: bytes | None = None) -> dict[str, Any]:
    if image is None:
        connection.request("GET", "/healthz")
    else:
        connection.request("POST", "/predict", image)
    return json.loads(connection.getresponse().read())


@contextmanager
def one_to_each(port: int, pids: list[int]) -> Iterator[dict[int, http.client.HTTPConnection]]:
    """An open connection to each process."""
    found: dict[int, http.client.HTTPConnection] = {}
    with ExitStack() as stack:

        def connect() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            stack.callback(connection.close)
            ask(connection)
            here = connection.sock.getsockname()[1]
            for pid in pids:
                others = psutil.Process(pid).net_connections("tcp")
                if here in [other.raddr.port for other in others if other.raddr]:
                    found[pid] = connection
            return len(found) == len(pids)

        until(connect)
        yield found


def port_of(url: str) -> int:
    return int(url.rstrip("/").rpartition(":")[2])


def test_two_processes_answer_as_one_add_up_what_they_counted_and_drain(bundle_of, digits):
    bundle, image = bundle_of("onnxruntime", "fp32"), min((digits / "test").glob("*.png"))
    body = image.read_bytes()
    with Classifier(bundle, threads=1) as classifier:
        expected = classifier.predict(image)
    with process(bundle, *TWO) as (served, url), httpx.Client(timeout=PATIENCE) as client:
        with one_to_each(port_of(url), answering(served.pid)) as connections:
            for connection in [*connections.values()] * 3:
                (answer,) = ask(connection, body)["answers"]
                assert answer["label"] == expected.label
                assert answer["score"] == pytest.approx(expected.score, abs=1e-6)
        six = 'marnet_requests_total{route="/predict",status="200"} 6.0'
        until(lambda: six in client.get(f"{url}metrics").text, look=0.1)
        metrics = client.get(f"{url}metrics").text
        for line in ("marnet_ready 2.0", 'marnet_images_total{end="answered"} 6.0'):
            assert line in metrics.splitlines()
        with socket.create_connection(("127.0.0.1", port_of(url)), timeout=PATIENCE) as accepted:
            head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            accepted.sendall(head + body[:50])
            in_flight = "marnet_requests_in_flight 2.0"  # with the one that asks
            until(lambda: in_flight in client.get(f"{url}metrics").text, look=0.1)
            served.send_signal(signal.SIGTERM)
            until(lambda: not_ready(client, url), look=0.1)
            accepted.sendall(body[50:])
            assert read_all(accepted).startswith(b"HTTP/1.1 200 OK")
        assert served.wait(PATIENCE) == 0
        assert served.stderr is not None
        assert served.stderr.read() == ""


def not_ready(client: httpx.Client, url: str) -> bool:
    return client.get(f"{url}readyz").status_code == 503


class Insistent:
    """Callers who open another connection where they lose theirs."""

    def __init__(self, url: str, image: bytes) -> None:
        self.url, self.image, self.ended = url, image, False
        self.statuses: list[int] = []
        self.lost: list[httpx.TransportError] = []

    def call(self) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not self.ended:
                try:
                    answer = client.post(f"{self.url}predict", content=self.image)
                except httpx.TransportError as error:
                    self.lost.append(error)
                else:
                    self.statuses.append(answer.status_code)


@pytest.mark.slow
def test_a_process_that_is_killed_under_load_is_replaced_while_the_other_answers(bundle_of, digits):
    body = min((digits / "test").glob("*.png")).read_bytes()
    bundle = bundle_of("onnxruntime", "fp32")
    with process(bundle, *TWO, stdout=subprocess.DEVNULL) as (served, url):
        first, second = answering(served.pid)
        load = Insistent(url, body)
        with ThreadPoolExecutor(4) as pool, one_to_each(port_of(url), [first, second]) as kept:
            callers = [pool.submit(load.call) for _ in range(4)]
            try:
                until(lambda: len(load.statuses) > 20)
                os.kill(first, signal.SIGKILL)
                with pytest.raises((ConnectionError, http.client.HTTPException)):
                    ask(kept[first], body)
                assert "answers" in ask(kept[second], body)
                line = f"process {first} ended, another one takes its place: signal 9, Killed\n"
                assert said(served, "process ") == line
                ready = re.fullmatch(r"process (\d+) is ready\n", said(served, "process "))
                assert ready is not None
                third = int(ready[1])
                assert sorted(answering(served.pid)) == sorted([second, third])
                with one_to_each(port_of(url), [third]) as fresh:
                    assert "answers" in ask(fresh[third], body)
            finally:
                load.ended = True
            for caller in callers:
                caller.result(PATIENCE)
        assert set(load.statuses) == {200}
        assert len(load.lost) <= len(callers)  # each loses one connection at most
        until(lambda: "marnet_ready 2.0" in httpx.get(f"{url}metrics").text, look=0.1)
        served.send_signal(signal.SIGTERM)
        assert served.wait(PATIENCE) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--watch", "SIGHUP"])
def test_all_processes_change_their_bundle_and_drop_and_mix_nothing(
    bundle_of, zero_bundle, digits, tmp_path, way
):
    bundles = {"default": bundle_of("onnxruntime", "fp32"),
               "zero": zero_bundle("onnxruntime", "fp32")}  # fmt: skip
    digests = {read_bundle(path).digest: point for point, path in bundles.items()}
    default, zero = digests
    link = tmp_path / "current.marnet"
    point_to(link, bundles["default"])
    watch = ["--watch"] if way == "--watch" else []
    with process(link, *TWO, *watch, stdout=subprocess.DEVNULL) as (served, url):
        load = Load(port_of(url), min((digits / "test").glob("*.png")).read_bytes())
        pids = answering(served.pid)
        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(load.call) for _ in range(4)]
            try:
                load.wait_for(default)
                point_to(link, bundles["zero"])
                if way == "SIGHUP":
                    served.send_signal(signal.SIGHUP)
                lines = {said(served, "process ") for _ in pids}
                assert lines == {f"process {pid}: reloaded: bundle {zero}\n" for pid in pids}
                before = len(load.answers)
                until(lambda: len(load.answers) > before + 8)
            finally:
                load.enough.set()
            for caller in callers:
                caller.result(PATIENCE)
        served.send_signal(signal.SIGTERM)
        assert served.wait(PATIENCE) == 0
    load.check(digests)
    assert {content["bundle"] for _, content in load.answers[before + 4 :]} == {zero}


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed_and_leave_nothing(bundle_of, tmp_path):
    surroundings = {"env": os.environ | {"TMPDIR": str(tmp_path), "MARNET_CACHE": str(tmp_path)}}
    with process(bundle_of("onnxruntime", "fp32"), *TWO, **surroundings) as (served, url):
        pids = answering(served.pid)
        assert len(list(tmp_path.iterdir())) == 1  # their metrics
        served.kill()
        until(lambda: not any(map(psutil.pid_exists, pids)))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}healthz")
    assert list(tmp_path.iterdir()) == []


# --- what is refused, and when it gives up --------------------------------------------------------


@pytest.fixture
def no_process(monkeypatch):
    monkeypatch.setattr(processes, "run_processes", lambda *_: pytest.fail("one was started"))


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["-m", "none.marnet"], 2, "none.marnet is not a directory, so it is not a bundle"),
        (["--operating-point", "fast"], 2, "operating_point: got 'fast'"),
        (["--brown-out", "zero"], 2, "operating_point: got 'zero'"),
        (["--threads", "100000"], 2, "threads: got 100000, but this machine has"),
        (["--token-file", "none"], 2, "--token-file none cannot be read"),
        (["--processes", "0"], 2, "'--processes': 0 is not in the range"),
    ],
)
def test_what_no_process_could_use_is_refused_before_any(
    bundle_of, no_process, options, code, reason
):
    words = ["-m", str(bundle_of("onnxruntime", "fp32")), "--port", "0", *TWO, *options]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, reason in result.stderr) == (code, True), result.stderr


def test_a_busy_port_is_refused_before_any_process(bundle_of, no_process):
    with listen("127.0.0.1", 0) as busy:
        port = str(busy.getsockname()[1])
        words = ["-m", str(bundle_of("onnxruntime", "fp32")), "--port", port, *TWO]
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr


@pytest.mark.slow
def test_the_error_of_a_process_that_cannot_begin_is_the_server_s():
    with (
        listen("127.0.0.1", 0) as listener,
        pytest.raises(InvalidInput, match="as a bundle; expected the path of its folder"),
    ):
        run_processes(2, read_bundle, listener)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_processes_that_die_at_once_are_not_started_for_ever(monkeypatch, capfd):
    monkeypatch.setattr(processes, "_MOST_FAILURES", 2)
    with (
        listen("127.0.0.1", 0) as listener,
        pytest.raises(ServerFailed, match=r"ended 2 times in a row.*exit code 1.*--processes 1"),
    ):
        run_processes(1, itemgetter(9), listener)
    assert capfd.readouterr().err.count("another one takes its place: exit code 1") == 1


# --- metrics --------------------------------------------------------------------------------------


def counted(requests: int, oldest: float, seconds: float) -> CollectorRegistry:
    """Make the metrics of one process."""
    registry = CollectorRegistry()
    Counter("asked", "Requests.", ["route"], registry=registry).labels("/x").inc(requests)
    Gauge("marnet_queue_oldest_seconds", "Oldest.", registry=registry).set(oldest)
    Gauge("marnet_ready", "Ready.", registry=registry).set(1)
    Histogram("took", "Seconds.", buckets=[1, 2], registry=registry).observe(seconds)
    return registry


def test_metrics_of_processes_are_added_and_those_that_ended_keep_what_they_counted(tmp_path):
    known = {"0": (1, 0.5, 0.5), "1": (20, 0.25, 1.5), "2": (300, 9.0, 1.75)}
    shared = {
        name: SharedMetrics(counted(*one), tmp_path / f"{name}.json") for name, one in known.items()
    }
    for one in shared.values():
        one.write()
    end_mark(tmp_path / "2.json").touch()
    lines = generate_latest(shared["0"]).decode().splitlines()
    for line in (
        'asked_total{route="/x"} 321.0',
        "marnet_queue_oldest_seconds 0.5",
        "marnet_ready 2.0",
        'took_bucket{le="1.0"} 1.0',
        'took_bucket{le="2.0"} 3.0',
        'took_bucket{le="+Inf"} 3.0',
        "took_count 3.0",
        "took_sum 3.75",
    ):
        assert line in lines
    created = [float(line.split()[1]) for line in lines if line.startswith("took_created")]
    written = json.loads((tmp_path / "0.json").read_text("utf-8"))
    (own,) = [v for *_, samples in written for name, _, v in samples if name == "took_created"]
    assert created == [own]


def test_a_process_counts_on_from_the_one_whose_place_it_takes(tmp_path):
    file = tmp_path / "0.json"
    for asked in (1, 20, 300):
        end_mark(file).touch()
        taking_over = SharedMetrics(counted(asked, 1 / asked, 0.5), file)
        taking_over.write()
    lines = generate_latest(taking_over).decode().splitlines()
    assert 'asked_total{route="/x"} 321.0' in lines
    assert "took_count 3.0" in lines
    assert "marnet_ready 1.0" in lines
    assert f"marnet_queue_oldest_seconds {1 / 300}" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]

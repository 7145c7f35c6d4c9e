"""marnet-serve beside slow, broken and hostile clients, and at its end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from serving import MAIN, Played, process, read_all, running
from uvicorn.protocols.http.flow_control import FlowControl
from waiting import PATIENCE, until

from marnet_sdk import Classifier
from marnet_sdk import classifier as classifier_module
from marnet_sdk.errors import BundleCorrupt
from marnet_sdk.serve.policy import Batching
from marnet_sdk.server import network
from marnet_sdk.server.cli import main
from marnet_sdk.server.gate import AccessLog
from marnet_sdk.server.listener import listen
from marnet_sdk.server.network import serve
from marnet_sdk.server.service import ServerLimits, Service

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\n"
POOL = 32 + 4  # threads that asyncio may start for what would hold up its loop


@pytest.fixture(scope="module")
def server():
    """A server that takes 20 bytes at most."""
    with running(Played, body_bytes=20) as server:
        yield server


@pytest.fixture(scope="module")
def impatient():
    """Such a server that does not wait for long."""
    seconds = {"header_seconds": 0.5, "body_seconds": 0.5, "keep_alive_seconds": 1}
    with running(Played, **seconds, body_bytes=20) as server:
        yield server


def alive(server) -> None:
    with server.client() as client:
        assert client.post("/predict", content=b"x").status_code == 200


# --- slow and broken clients ----------------------------------------------------------------------


def test_a_client_that_sends_no_header_is_closed_out(impatient):
    with impatient.connect() as silent, impatient.connect() as slow:
        slow.sendall(b"POST /predict HT")
        assert read_all(silent) == b""
        assert read_all(slow).startswith(b"HTTP/1.1 408 ")
    impatient.idle()


def test_a_client_that_sends_header_bytes_one_by_one_gains_no_time(impatient):
    with impatient.connect() as connection:
        closed = threading.Event()

        def trickle() -> None:
            with suppress(OSError):  # reset, or a broken pipe
                while not closed.wait(0.01):
                    connection.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        got = read_all(connection)
        closed.set()
        thread.join(PATIENCE)
    assert got == b"" or got.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_too_slowly_is_refused(impatient):
    with impatient.connect() as connection:
        connection.sendall(HEAD + b"content-length: 9\r\n\r\nhalf")
        got = read_all(connection)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.5 s" in got


def test_the_rest_of_a_refused_body_is_not_read_for_ever(impatient):
    with impatient.connect() as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"10\r\n" + b"x" * 16)
        connection.sendall(b"\r\n10\r\n" + b"x" * 16 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"
        read_all(connection)
    impatient.idle()


def test_a_client_that_takes_no_answers_is_closed_out(impatient, monkeypatch):
    paused, pause = threading.Event(), FlowControl.pause_writing

    def noted(flow: FlowControl) -> None:
        paused.set()
        pause(flow)

    monkeypatch.setattr(FlowControl, "pause_writing", noted)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", impatient.port))
        with suppress(ConnectionError):
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert paused.wait(PATIENCE)
        impatient.idle()


def test_half_a_body_and_a_hang_up_leave_nothing_behind(server):
    for hard in (False, True):
        with server.connect() as connection:
            connection.sendall(HEAD + b"content-length: 9\r\n\r\nhalf")
            if hard:  # a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.idle()
    assert server.service.held == 0
    alive(server)


def test_requests_that_are_sent_ahead_are_answered_in_their_order(server):
    with server.connect() as connection:
        first = HEAD + b"content-length: 1\r\n\r\nx"
        second = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        connection.sendall(first + first + second)
        bodies = re.findall(rb'"(answers|alive)"', read_all(connection))
    assert bodies == [b"answers", b"answers", b"alive"]


def test_a_client_that_asks_first_is_told_before_it_sends(server):
    with server.connect() as connection:
        connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 1\r\n\r\n")
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"[:25]
        connection.sendall(b"x")
        assert connection.recv(12) == b"HTTP/1.1 200"
    with server.connect() as connection:
        connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 99\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


MALFORMED = [
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),  # TLS
    HEAD + b"content-length: -1\r\n\r\n",
    HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nx",
    HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"x: " + b"y" * 70_000,
    b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
]


@pytest.mark.parametrize("request_", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_http_is_refused_and_the_server_goes_on(server, request_):
    with server.connect() as connection:
        with suppress(OSError):  # it may be refused before all of it is sent
            connection.sendall(request_)
        got = read_all(connection)
    assert re.match(rb"HTTP/1.1 4\d\d |$", got)
    assert b"Traceback" not in got
    alive(server)


@given(st.lists(st.sampled_from([b"GET ", b"POST ", b"/predict", b" HTTP/1.1", b"\r\n", b"\r\n\r\n",
                                 b"host: x", b"content-length: 3", b"transfer-encoding: chunked",
                                 b"3\r\nabc\r\n", b"\0", b"expect: 100-continue",
                                 b"connection: upgrade", b"upgrade: websocket", b":"])
                | st.binary(max_size=5), max_size=12).map(b"".join))  # fmt: skip
def test_no_bytes_bring_the_server_down(server, request_):
    with server.connect() as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        got = read_all(connection)
    assert b" 500 " not in got
    assert b"Traceback" not in got


def test_surplus_connections_are_told_and_probes_still_answered():
    with running(Played, connections=2) as server, server.client() as client:
        with server.connect(), server.connect():
            until(lambda: server.service.connections() == 2)
            response = client.post("/predict", content=b"x")
            assert (response.status_code, response.headers["connection"]) == (503, "close")
            assert client.get("/healthz").status_code == 200
        until(lambda: server.service.connections() < 2)
        assert client.post("/predict", content=b"x").status_code == 200


def test_bodies_of_all_requests_together_have_a_limit():
    with running(Played, buffered_bytes=15) as server, server.client() as client:
        with server.connect() as connection:
            connection.sendall(HEAD + b"content-length: 11\r\n\r\n0123456789")
            until(lambda: server.service.held == 10)
            response = client.post("/predict", content=b"012345")
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert client.post("/predict", content=b"01234").status_code == 200
            connection.sendall(b"x")
            assert connection.recv(12) == b"HTTP/1.1 200"
        until(lambda: server.service.held == 0)


def test_nothing_is_left_of_many_requests_of_every_kind(server):
    def round_of_requests() -> None:
        with server.client() as client:
            for content in (b"x", b"bad", b"full", b"nan", b"x" * 21, b""):
                client.post("/predict", content=content)
            client.post("/predict", files=[("f", ("x", b"x"))] * 3)
            client.get("/metrics")
        for broken in (b"", b"POST", HEAD + b"content-length: 9\r\n\r\nhalf", HEAD + b"\0\r\n"):
            with server.connect() as connection:
                connection.sendall(broken)
        server.idle()

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    for _ in range(2):  # until the pools of threads have their size
        round_of_requests()
    before = held()
    for _ in range(4):
        round_of_requests()
    until(lambda: held()[0] <= before[0])
    assert held()[1] <= before[1] + POOL
    assert server.service.held == 0


# --- the access log -------------------------------------------------------------------------------


def test_a_log_on_a_full_disk_costs_lines_and_no_request():
    with open("/dev/full", "wb", buffering=0) as full:
        log = AccessLog(full)
        log.write({"status": 200})
        until(lambda: log.lost == 1)
        log.close()


def test_a_log_that_nobody_reads_holds_up_nobody():
    before = set(threading.enumerate())
    reader, writer = os.pipe()
    with open(writer, "wb", buffering=0) as pipe, open(reader, "rb", buffering=0) as stalled:
        log = AccessLog(pipe)
        for _ in range(20_000):
            log.write({"path": "x" * 200})
        assert log.lost > 0
        log.close(patience=0.01)
        stalled.close()
        until(lambda: set(threading.enumerate()) <= before)


def test_lines_are_written_before_the_log_is_closed():
    written = io.BytesIO()
    log = AccessLog(written)
    for number in range(100):
        log.write({"number": number})
    log.close()
    assert [json.loads(line)["number"] for line in written.getvalue().splitlines()] == [*range(100)]


# --- the end --------------------------------------------------------------------------------------


def test_a_request_that_hangs_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr(network, "_LAST_SECONDS", 0)
    classifier = Played()
    with running(lambda: classifier, drain_seconds=0.1) as server, server.connect() as connection:
        connection.sendall(HEAD + b"content-length: 4\r\n\r\nwait")
        until(classifier.waiting.is_set)
        server.server.handle_exit(signal.SIGTERM, None)
        assert b" 200 " not in read_all(connection)
        until(classifier.cancelled.is_set)
    assert [entry["status"] for entry in server.log(1)] == [500]


def test_sigterm_while_the_bundle_is_being_opened_closes_it_afterwards():
    go_on, classifier = threading.Event(), Played()

    def open_late() -> Played:
        assert go_on.wait(PATIENCE)
        return classifier

    with running(open_late, wait=False) as server:
        until(lambda: server.server.started)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.server.should_exit)
        go_on.set()
    assert classifier.closed


# --- the process ----------------------------------------------------------------------------------


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(bundle_of, digits):
    image = min((digits / "test").glob("*.png")).read_bytes()
    with (
        process(bundle_of("onnxruntime", "fp32")) as (served, url),
        httpx.Client(timeout=PATIENCE) as client,
    ):
        assert client.post(f"{url}predict", content=image).status_code == 200
        host, port = re.findall(r"//(.*):(\d+)/", url)[0]
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as accepted:
            length = b"content-length: %d\r\n\r\n" % len(image)
            accepted.sendall(HEAD + length + image[:50])
            until(lambda: "marnet_requests_in_flight 2.0" in client.get(f"{url}metrics").text)
            served.send_signal(signal.SIGTERM)
            until(lambda: client.get(f"{url}readyz").status_code == 503)
            for path in ("healthz", "metrics"):
                assert client.get(f"{url}{path}").status_code == 200
            refused = client.post(f"{url}predict", content=image)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            accepted.sendall(image[50:])
            assert read_all(accepted).startswith(b"HTTP/1.1 200 OK")
        assert served.wait(PATIENCE) == 0
        assert served.stdout is not None
        assert served.stderr is not None
        lines = [json.loads(line) for line in served.stdout.read().splitlines()]
        assert {line["status"] for line in lines if line["path"] == "/predict"} == {200, 503}
        assert served.stderr.read() == ""


def test_a_damaged_bundle_ends_the_server_with_the_reason(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    service = Service(lambda: Classifier(tmp_path), ServerLimits(), name="digits")
    with pytest.raises(BundleCorrupt, match="is damaged"):
        serve(service, [listen("127.0.0.1", 0)], AccessLog(io.BytesIO()))


def test_a_port_that_is_taken_is_told_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["-m", str(tmp_path), "--port", port])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr


def test_answers_do_not_wait_for_acknowledgements():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_knobs_of_the_queue_reach_the_classifier(tmp_path, monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(classifier_module, "Classifier", lambda _, **more: seen.update(more))

    def serve_nothing(service: Service, sockets: list[socket.socket], log: AccessLog) -> None:
        service._open_classifier()
        log.close()
        for listener in sockets:
            listener.close()

    monkeypatch.setattr(network, "serve", serve_nothing)
    knobs = {"max-batch": 8, "max-delay": 2, "max-queue": 9, "brown-out": "fast", "patience": 50}
    given = [f"--{name}={value}" for name, value in knobs.items()]
    main.main(["-m", str(tmp_path), "--port=0", *given], standalone_mode=False)
    assert seen["batching"] == Batching(8, 0.002, 9, brown_out=("fast",), patience=0.05)


@pytest.mark.parametrize("content", ["", " \n", "two words", "ümlaut"])
def test_a_token_that_no_header_can_carry_is_refused(tmp_path, monkeypatch, content):
    file = tmp_path / "token"
    file.write_text(content)
    result = CliRunner().invoke(main, ["-m", str(tmp_path), "--token-file", str(file)])
    assert (result.exit_code, "bearer token" in result.stderr) == (2, True)
    monkeypatch.setenv("MARNET_SERVE_TOKEN", content)
    assert CliRunner().invoke(main, ["-m", str(tmp_path)]).exit_code == 2


def test_without_the_extra_the_pip_line_is_told(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("marnet_sdk.server.")]:
        if name != "marnet_sdk.server.cli":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(main, ["-m", str(tmp_path)])
    assert result.exit_code == 5
    assert 'pip install "marnet[serve]"' in result.stderr


# --- kills and full disks -------------------------------------------------------------------------


def test_a_server_that_is_killed_under_load_leaves_nothing_and_comes_back(
    bundle_of, digits, tmp_path
):
    """Clients see that it is gone, and the same command answers at once."""
    bundle, image = bundle_of("onnxruntime", "fp32"), min((digits / "test").glob("*.png"))
    body, outcomes = image.read_bytes(), []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    surroundings: dict[str, Any] = {
        "cwd": scratch,
        "env": os.environ | {"TMPDIR": str(scratch), "MARNET_CACHE": str(scratch)},
        "stdout": subprocess.DEVNULL,
    }

    def call(url: str) -> None:
        with httpx.Client(timeout=PATIENCE) as client, suppress(httpx.TransportError):
            while True:
                outcomes.append(client.post(f"{url}predict", content=body).status_code)

    with process(bundle, "--threads", "1", **surroundings) as (served, url):
        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(call, url) for _ in range(4)]
            until(lambda: len(outcomes) > 40)
            mapped = Path(f"/proc/{served.pid}/maps").read_text()
            served.kill()
            for caller in callers:
                caller.result(PATIENCE)
        assert served.wait(PATIENCE) == -signal.SIGKILL
    assert set(outcomes) == {200}
    assert "/dev/shm" not in mapped
    assert list(scratch.iterdir()) == []
    port = url.rstrip("/").rpartition(":")[2]
    with process(bundle, "--threads", "1", "--port", port, **surroundings) as (_, again):
        assert again == url
        assert httpx.post(f"{again}predict", content=body).status_code == 200


def test_a_server_whose_messages_and_log_find_a_full_disk_answers(bundle_of, digits):
    body = min((digits / "test").glob("*.png")).read_bytes()
    bundle = str(bundle_of("onnxruntime", "fp32"))
    command = [sys.executable, "-W", "error", "-c", MAIN, "-m", bundle, "--port", "0"]
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(command, stdout=full, stderr=full) as served,
        httpx.Client(timeout=PATIENCE) as client,
    ):
        sockets = psutil.Process(served.pid).net_connections
        try:
            until(lambda: sockets("tcp") or served.poll() is not None)
            client.base_url = f"http://127.0.0.1:{sockets('tcp')[0].laddr.port}"
            until(lambda: client.get("/readyz").status_code == 200)
            answers = [client.post("/predict", content=content) for content in (body, b"x", body)]
            assert [answer.status_code for answer in answers] == [200, 400, 200]
            lost = re.search(r"marnet_log_lines_lost (\d+)", client.get("/metrics").text)
            assert lost is not None
            assert int(lost[1]) >= 3
            served.send_signal(signal.SIGTERM)
            assert served.wait(PATIENCE) == 1  # what could not be said is told by the exit code
        finally:
            served.kill()

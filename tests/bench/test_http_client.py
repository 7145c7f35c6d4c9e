"""The client of the benchmark gets a class from either protocol, or says what went wrong."""

from __future__ import annotations

import io
import socket

import pytest
from pictures import encode, make_picture
from serving import LABELS, Played, running

from marnet_bench.http_client import Indexed, Server
from marnet_sdk import Classifier
from marnet_sdk.errors import InferenceError, InvalidInput


@pytest.mark.parametrize("path", ["", "/", "/predict", "/v2/models/digits", "/v2/models/digits/"])
def test_both_protocols_give_the_likeliest_class(path):
    with running(Played) as server, Server(server.url + path) as asked:
        assert asked.predict([b"a", b"b"]) == [Indexed(2), Indexed(2)]
        assert asked.submit(b"c").result() == Indexed(2)
        assert LABELS[2] == "<b>two</b>"  # whose text has no part in it


def test_the_class_of_a_real_bundle_is_that_of_predict(bundle_of):
    image = encode(make_picture(), "JPEG")
    with Classifier(bundle_of("onnxruntime", "fp32"), threads=1) as classifier:
        wanted = Indexed(classifier.predict(image).index)
    path = bundle_of("onnxruntime", "fp32")
    with running(lambda: Classifier(path, threads=1)) as server:
        for place in ("", "/v2/models/digits"):
            with Server(server.url + place) as asked:
                assert asked.ask(image) == wanted


def test_a_token_is_sent():
    with running(Played, token="secret") as server:
        with Server(server.url, token="secret") as asked:
            assert asked.ask(b"a") == Indexed(2)
        with Server(server.url) as asked, pytest.raises(InferenceError, match="answered 401"):
            asked.ask(b"a")


def test_a_connection_that_the_server_closed_meanwhile_is_opened_again():
    body = b'{"index": 4}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Server(f"http://127.0.0.1:{listener.getsockname()[1]}") as asked,
    ):
        for _ in range(2):
            found = asked.submit(b"a")
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as file:
                _read_request(file)
                connection.sendall(answer)
                assert found.result() == Indexed(4)


def _read_request(file: io.BufferedIOBase) -> None:
    while file.readline().strip():
        pass
    file.read(1)


@pytest.mark.parametrize(
    ("image", "message"),
    [(b"full", "answered 429"), (b"bad", "answered 400"), (b"bug", "answered 500")],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_refusal_is_an_error_with_its_status(image, message):
    with running(Played) as server, Server(server.url) as asked:
        with pytest.raises(InferenceError, match=message):
            asked.ask(image)
        assert asked.ask(b"good") == Indexed(2)


def test_a_server_that_is_not_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        Server(f"http://127.0.0.1:{port}") as asked,
        pytest.raises(InferenceError, match="start it with: marnet-serve"),
    ):
        asked.ask(b"a")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "https://host", "http://", "http://host:x", "http://host:99999", ""]
)
def test_what_is_no_such_url_is_refused(url):
    with pytest.raises(InvalidInput, match="expected http://HOST:PORT"):
        Server(url)

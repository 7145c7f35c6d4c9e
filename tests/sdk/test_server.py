"""What marnet-serve answers: labels, refusals, probes, metrics and pages."""

from __future__ import annotations

import base64
import io
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from quick import kept
from serving import Played, running
from waiting import until

from marnet_sdk import Classifier
from marnet_sdk.inputs.images import Limits
from marnet_sdk.server.bodies import read_upload
from marnet_sdk.server.service import Refused, ServerLimits

SECRETS = re.compile(r"0x[0-9a-f]{4}|/srv|/home|/tmp|/usr|Traceback|File \"|site-packages")


@pytest.fixture(scope="module")
def classifier(bundle_of):
    limits = Limits(max_pixels=500_000)
    with Classifier(bundle_of("onnxruntime", "fp32"), limits=limits) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def server(classifier):
    """A server of a real bundle, which takes at most 5 images and 200 kB."""
    with running(lambda: _kept_open(classifier), images=5, body_bytes=200_000) as server:
        yield server


class _KeptOpen:
    """A classifier that the tests use after the server."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    def __getattr__(self, name: str):
        return getattr(self._classifier, name)

    def close(self) -> None:
        pass


def _kept_open(classifier: Classifier) -> _KeptOpen:
    return _KeptOpen(classifier)


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def images(digits: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((digits / "test").glob("*.png"))[:4]]


@pytest.fixture(scope="module")
def answers(classifier, images):
    return classifier.predict(images)


@pytest.fixture(scope="module")
def playing():
    """A server whose classifier does what the image says."""
    classifier = Played()
    with running(lambda: classifier, samples=4) as server, server.client() as client:
        yield client, classifier


@pytest.fixture
def played(playing):
    """A client of that server, and the classifier."""
    playing[1].calls.clear()
    return playing


@pytest.fixture
def own():
    """A client of a server of one's own, the server and its classifier."""
    classifier = Played()
    with running(lambda: classifier) as server, server.client() as client:
        yield client, server, classifier
        classifier.go_on.set()


def files(images: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]


def check_same(answered: dict, expected) -> None:
    """One answer as JSON is the same as the SDK's, to the last bits that batching may move."""
    assert answered.keys() == asdict(expected).keys() - {"provenance"}
    assert (answered["label"], answered["index"]) == (expected.label, expected.index)
    assert answered["score"] == pytest.approx(expected.score, abs=1e-5)
    assert [top["label"] for top in answered["top"]] == [top.label for top in expected.top]


# --- images in their three forms ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", None])
def test_the_bytes_of_an_image_are_classified(client, images, answers, kind):
    headers = {"content-type": kind} if kind else {}
    response = client.post("/predict", content=images[0], headers=headers)
    assert response.status_code == 200
    content = response.json()
    (answered,) = content["answers"]
    check_same(answered, answers[0])
    assert content["milliseconds"] > 0


def test_several_files_are_answered_in_their_order(client, images, answers):
    response = client.post("/predict", files=files(images), data={"top_k": "2"})
    assert response.status_code == 200
    for answered, expected in zip(response.json()["answers"], answers, strict=True):
        assert answered["label"] == expected.label
        assert [top["label"] for top in answered["top"]] == [t.label for t in expected.top[:2]]


def test_json_holds_images_in_base64(client, images, answers):
    body = {"images": [base64.b64encode(image).decode() for image in images], "top_k": 1}
    response = client.post("/predict", json=body)
    assert response.status_code == 200
    got = [answer["label"] for answer in response.json()["answers"]]
    assert got == [answer.label for answer in answers]
    assert {len(answer["top"]) for answer in response.json()["answers"]} == {1}


def test_many_requests_at_once_get_their_own_answers(client, images, answers):
    def ask(number: int) -> str:
        response = client.post("/predict", content=images[number % 4])
        return response.json()["answers"][0]["label"]

    with ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(ask, range(32)))
    assert labels == [answers[i % 4].label for i in range(32)]


def test_hostile_files_among_good_ones_lose_no_answer(client, images, answers):
    hostile = [images[1][:60], b"GIF89a" + b"\xff" * 40]
    sent = [images[0], hostile[0], images[2], hostile[1], images[3]]
    response = client.post("/predict", files=files(sent))
    assert response.status_code == 400
    content = response.json()
    assert content["position"] == 1
    assert content["error"].startswith("image 1: ")
    assert [one["position"] for one in content["refused"]] == [1, 3]
    assert [answer and answer["label"] for answer in content["answers"]] == [
        answers[0].label, None, answers[2].label, None, answers[3].label,
    ]  # fmt: skip
    assert not SECRETS.search(response.text)


def damaged(image: bytes, rng: random.Random) -> bytes:
    """The file cut short, with other bytes in it, or with a part that stands there twice."""
    at, length = rng.randrange(len(image)), rng.randrange(1, 20)
    return rng.choice(
        [
            image[:at],
            image[:at] + rng.randbytes(length) + image[at + length :],
            image[:at] + image[at // 2 :],
            rng.randbytes(4) + image[4:],
            image[: rng.randrange(4, 30)] + rng.randbytes(length * 5),
        ]
    )


@pytest.mark.parametrize("count", kept([40, 2000], {40}))
def test_damaged_files_hurt_nobody(client, images, answers, count):
    rng = random.Random(0)
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    kinds = [images[1]]
    for name in ("JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        picture.save(file := io.BytesIO(), name)
        kinds.append(file.getvalue())
    for _ in range(count // 4):
        sent = [damaged(rng.choice(kinds), rng) for _ in range(4)]
        response = client.post("/predict", files=files([*sent, images[0]]))
        assert response.status_code in (200, 400)
        assert response.json()["answers"][-1]["label"] == answers[0].label
        assert not SECRETS.search(response.text)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(client):
    huge = b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + (10**4).to_bytes(4, "little") * 2
    huge += b"\x01\0\x18\0" + bytes(24)
    response = client.post("/predict", content=huge)
    assert response.status_code == 400
    assert "at most 500000 are accepted" in response.json()["error"]


# --- what may be asked for ------------------------------------------------------------------------


def test_the_query_and_the_form_and_json_ask_for_the_same_things(played):
    client, classifier = played
    query = {"top_k": 2, "samples": 3, "operating_point": "exact", "deadline_ms": 5000}
    given = [
        client.post("/predict", params=query, content=b"x"),
        client.post("/predict", data=query, files=files([b"x"])),
        client.post("/predict", json={"images": ["eA=="], **query}),
    ]
    assert [response.status_code for response in given] == [200, 200, 200]
    for call in classifier.calls:
        assert (call["top_k"], call["samples"]) == (2, 3)
        assert 0 < call["deadline"] <= 5


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ({"top_k": "0"}, 422, "top_k"),
        ({"top_k": "two"}, 422, "top_k"),
        ({"topk": "2"}, 422, "topk"),
        ({"samples": "-1"}, 422, "samples"),
        ({"samples": "5"}, 400, "at most 4"),
        ({"deadline_ms": "nan"}, 422, "deadline_ms"),
        ({"deadline_ms": "1e-9"}, 504, "deadline"),
        ({"operating_point": "fast"}, 400, "this server opened 'exact'"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(played, query, status, reason):
    client, classifier = played
    response = client.post("/predict", params=query, content=b"x")
    assert response.status_code == status
    assert reason in response.json()["error"]
    assert classifier.calls == []


def test_what_is_asked_for_twice_is_refused(played):
    client, _ = played
    response = client.post("/predict?top_k=1", json={"images": ["eA=="], "top_k": 2})
    assert response.status_code == 400
    assert "top_k stands in the query and in the body" in response.json()["error"]


# --- bodies that cannot be used -------------------------------------------------------------------

BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\ncontent-disposition: form-data; name="f"; filename="x"\r\n\r\nbytes\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "status", "reason"),
    [
        ("image/png", b"", 400, "image 0: "),
        ("text/plain", b"x", 415, "expected|send the bytes of an image"),
        ("application/x-www-form-urlencoded", b"x", 415, "multipart/form-data"),
        ("application/json", b"{", 400, "JSON"),
        ("application/json", b"[]", 400, "object"),
        ("application/json", b'{"images": []}', 400, "images"),
        ("application/json", b'{"images": ["eA=="], "top_k": "2"}', 400, "top_k"),
        ("application/json", b'{"images": ["eA==", "*"]}', 400, "image 1: not base64"),
        (
            "application/json",
            b'{"images": ["data:image/png;base64,eA=="]}',
            400,
            "behind its comma",
        ),
        ("application/json", b'{"images": ["","","","","",""]}', 413, "more than 5 images"),
        ("multipart/form-data", PART, 400, "boundary"),
        (BOUNDARY, PART, 400, "ends before its last boundary"),
        (BOUNDARY, PART * 6 + b"--b--\r\n", 413, "more than 5 images"),
        (BOUNDARY, b"--b--\r\n", 400, "no image"),
        (BOUNDARY, b"--c\r\n", 400, "not a multipart body"),
        (BOUNDARY, PART.replace(b"name", b"nome") + b"--b--", 400, "not a multipart body"),
    ],
)
def test_a_body_that_cannot_be_used_is_refused_with_the_reason(client, kind, body, status, reason):
    response = client.post("/predict", content=body, headers={"content-type": kind})
    assert (response.status_code, bool(re.search(reason, response.json()["error"]))) == (
        status,
        True,
    ), response.text


def test_a_compressed_body_is_refused(client, images):
    response = client.post("/predict", content=images[0], headers={"content-encoding": "gzip"})
    assert response.status_code == 415


def test_too_many_bytes_are_refused_before_and_while_they_are_read(client, images):
    announced = client.post("/predict", content=bytes(200_001))
    assert announced.status_code == 413
    assert "200001 bytes, at most 200000" in announced.json()["error"]
    streamed = client.post("/predict", content=iter([bytes(100_000)] * 3))
    assert streamed.status_code == 413
    assert client.post("/predict", content=images[0]).status_code == 200


@given(
    st.sampled_from(["application/json", BOUNDARY, "multipart/form-data; boundary=\xe9", "x/y; ="]),
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from([b"--b", b"--", b"\r\n", b"\r\n\r\n", b"content-disposition: form-data",
                             b'; name="f"', b'; filename="\xff"', b":", b"x", b"{", b'"images"',
                             b"content-transfer-encoding: base64"])
        ).map(b"".join),
    ),
)  # fmt: skip
def test_any_body_is_taken_apart_or_refused(kind, body):
    with suppress(Refused):  # and nothing else
        assert 1 <= len(read_upload(kind, bytearray(body), ServerLimits(images=3)).images) <= 3


# --- refusals of the classifier -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "status"),
    [("full", 429), ("late", 504), ("invalid", 400), ("closed", 503), ("nan", 500), ("bug", 500)],
)
def test_errors_of_the_classifier_become_status_codes_without_secrets(played, image, status):
    client, _ = played
    response = client.post("/predict", files=files([b"x", image.encode()]))
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert not SECRETS.search(response.text)
    assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)
    assert client.post("/predict", content=b"x").status_code == 200


def test_an_answer_does_not_tell_where_objects_lay_in_memory(played):
    response = played[0].post("/predict", content=b"bad")
    assert response.json()["error"] == "image 0: no image <_io.BytesIO object>"


def test_a_client_that_hangs_up_cancels_its_images(own):
    _, server, classifier = own
    with server.connect() as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nwait")
        until(classifier.waiting.is_set)
    until(classifier.cancelled.is_set)
    assert [entry["status"] for entry in server.log(1)] == [499]


# --- probes, token, metrics, log ------------------------------------------------------------------


def test_it_is_alive_at_once_and_ready_once_the_bundle_is_open():
    opened = threading.Event()

    def open_late() -> Played:
        assert opened.wait(30)
        return Played()

    with running(open_late, wait=False) as server, server.client() as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/readyz", "/v2/health/ready", "/v2/models/digits/ready"):
            response = client.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert client.post("/predict", content=b"x").status_code == 503
        assert "marnet_ready 0.0" in client.get("/metrics").text
        opened.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/predict", content=b"x").status_code == 200


def test_a_server_whose_bundle_cannot_be_opened_stops():
    def fail() -> Played:
        raise RuntimeError("no bundle")

    with running(fail, wait=False) as server:
        until(lambda: server.service.failure)


def test_the_classifier_is_closed_with_the_server():
    classifier = Played()
    with running(lambda: classifier):
        assert not classifier.closed
    assert classifier.closed


def test_with_a_token_only_those_who_send_it_are_answered():
    with running(Played, token="sesame") as server, server.client() as client:
        for wrong in ("Bearer sesam", "sesame", "Bearer sesame2", "Basic sesame", "", None):
            sent = {} if wrong is None else {"authorization": wrong}
            for path in ("/metrics", "/v2", "/v2/models/digits"):
                assert client.get(path, headers=sent).status_code == 401
            response = client.post("/predict", content=b"x", headers=sent)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        known = {"authorization": "bearer sesame"}
        assert client.post("/predict", content=b"x", headers=known).status_code == 200
        assert client.get("/metrics", headers=known).status_code == 200
        for path in ("/healthz", "/readyz", "/v2/health/live", "/"):
            assert client.get(path).status_code == 200


def test_metrics_count_requests_and_show_the_queue(own):
    client, server, _ = own
    client.post("/predict", content=b"x")
    client.post("/predict", content=b"full")
    client.get("/nowhere")
    server.log(3)
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = response.text.splitlines()
    for line in (
        'marnet_requests_total{route="/predict",status="200"} 1.0',
        'marnet_requests_total{route="/predict",status="429"} 1.0',
        'marnet_requests_total{route="other",status="404"} 1.0',
        'marnet_request_seconds_count{route="/predict"} 2.0',
        "marnet_ready 1.0",
        "marnet_requests_in_flight 1.0",
        "marnet_connections 1.0",
        'marnet_queue_images{state="waiting"} 3.0',
        'marnet_batches_total{reason="full"} 2.0',
        'marnet_batch_images_bucket{le="2.0"} 2.0',
        'marnet_batch_images_bucket{le="8.0"} 3.0',
        'marnet_batch_images_bucket{le="+Inf"} 3.0',
        "marnet_batch_images_sum 9.0",
        'marnet_batched_images_total{operating_point="exact",samples="1"} 9.0',
        'marnet_images_total{end="refused: deadline"} 1.0',
        'marnet_batch_seconds{operating_point="exact",samples="1",term="per_image"} 0.25',
    ):
        assert line in lines
    assert [line for line in lines if line.startswith("marnet_model_info{")]
    assert [line for line in lines if line.startswith("process_open_fds")]


def test_each_request_is_one_json_line(own):
    client, server, _ = own
    client.post("/predict?top_k=1", content=b"x")
    client.get("/%0a%22evil%22" + "x" * 500)
    first, second = server.log(2)
    assert first["milliseconds"] > 0
    assert {**first, "time": "", "milliseconds": 0} == {
        "time": "", "client": "127.0.0.1", "method": "POST", "path": "/predict", "status": 200,
        "milliseconds": 0,
    }  # fmt: skip
    assert second["path"].startswith('/\n"evil"x')
    assert len(second["path"]) == 200


def test_what_is_not_there_is_told_as_json(played):
    client, _ = played
    missing, wrong = client.get("/nowhere"), client.get("/predict")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found"})
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_needs_no_other_server_and_runs_only_its_own_script(played, path):
    response = played[0].get(path)
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"(https?:)?//", response.text)
    assert "innerHTML" not in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2  # a script and a style
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_openapi_document_names_every_status(played):
    document = played[0].get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["responses"]) >= {"200", "400", "401", "413", "415", "422", "429", "503"}
    assert "application/json" in predict["requestBody"]["content"]

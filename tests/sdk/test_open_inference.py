"""The Open Inference Protocol, as Triton's own client speaks it and as others might."""

from __future__ import annotations

import base64
import json
import struct
from contextlib import suppress

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from serving import LABELS, SHAPE, Played, running
from tritonclient.utils import InferenceServerException

from marnet_sdk import Classifier
from marnet_sdk.server.inference_request import read_inference
from marnet_sdk.server.service import Refused


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def classifier(bundle):
    with Classifier(bundle) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def server(bundle):
    with running(lambda: Classifier(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def images(digits) -> list[bytes]:
    return [path.read_bytes() for path in sorted((digits / "test").glob("*.png"))[:3]]


@pytest.fixture(scope="module")
def played():
    classifier = Played()
    with running(lambda: classifier, images=4, waiting=1) as server, server.client() as client:
        yield server, client, classifier
        classifier.go_on.set()


def encoded(images: list[bytes], *, column: bool = False, binary: bool = True):
    array = np.array(images, dtype=object)
    if not binary:
        array = np.array([base64.b64encode(image) for image in images], dtype=object)
    array = array[:, None] if column else array
    return triton.InferInput("images", array.shape, "BYTES").set_data_from_numpy(
        array, binary_data=binary
    )


def preprocessed(pixels: np.ndarray, *, binary: bool = True):
    made = triton.InferInput("pixels", pixels.shape, "FP32")
    return made.set_data_from_numpy(pixels, binary_data=binary)


def test_the_client_finds_server_and_model(client, classifier):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("other")
    about = client.get_model_metadata("digits")
    assert about["name"] == "digits"
    shape = [-1, *classifier.preprocess.output_shape]
    assert {"name": "pixels", "datatype": "FP32", "shape": shape} in about["inputs"]
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_encoded_images_give_labels_and_probabilities(client, classifier, images, binary, column):
    result = client.infer("digits", [encoded(images, column=column, binary=binary)])
    expected = classifier.predict(images, top_k=len(classifier.labels))
    labels = [label.decode() for label in result.as_numpy("labels")]
    assert labels == [answer.label for answer in expected]
    probabilities = result.as_numpy("probabilities")
    assert probabilities.dtype == np.float32
    for row, answer in zip(probabilities, expected, strict=True):
        wanted = [top.score for top in sorted(answer.top, key=lambda top: top.index)]
        assert row == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_preprocessed_pixels_give_the_logits_of_the_sdk(client, classifier, images, binary):
    pixels = classifier.preprocess.pixels(images)
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("logits", "labels", "probabilities")
    ]
    result = client.infer("digits", [preprocessed(pixels, binary=binary)], outputs=outputs)
    logits = classifier.logits(pixels)
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-5, atol=1e-5)
    best = [classifier.labels[i] for i in logits.argmax(axis=1)]
    got = result.as_numpy("labels")
    assert [label.decode() if binary else label for label in got] == best
    assert result.as_numpy("probabilities").sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_only_the_outputs_that_were_asked_for_are_sent(client, images):
    wanted = [triton.InferRequestedOutput("labels", binary_data=False)]
    result = client.infer("digits", [encoded(images)], outputs=wanted, request_id="7")
    assert [one["name"] for one in result.get_response()["outputs"]] == ["labels"]
    assert result.get_response()["id"] == "7"


def test_the_classification_extension_names_the_best_classes(client, classifier, images):
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer("digits", [encoded(images)], outputs=wanted, model_version="1")
    expected = classifier.predict(images)
    for row, answer in zip(result.as_numpy("probabilities"), expected, strict=True):
        for text, top in zip(row, answer.top[:2], strict=True):
            score, index, label = text.decode().split(":")
            assert (int(index), label) == (top.index, top.label)
            assert float(score) == pytest.approx(top.score, abs=1e-5)


def test_refusals_reach_the_client_with_status_and_reason(client, images):
    def refused(*inputs, **more) -> tuple[str | None, str]:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("digits", list(inputs), **more)
        return caught.value.status(), caught.value.message()

    status, reason = refused(encoded([images[0], b"no image"]))
    assert (status, reason[:8]) == ("400", "image 1:")
    logits = [triton.InferRequestedOutput("logits")]
    assert (
        "for images there are labels, probabilities" in refused(encoded(images), outputs=logits)[1]
    )
    assert refused(encoded(images), sequence_id=3, sequence_start=True)[0] == "400"
    assert refused(encoded(images), timeout=1)[0] == "504"
    with pytest.raises(InferenceServerException, match="there is 'digits'"):
        client.infer("other", [encoded(images)])


def test_the_client_compresses_nothing_that_is_not_taken(client, images):
    with pytest.raises(InferenceServerException, match="compressed bodies are not read"):
        client.infer("digits", [encoded(images)], request_compression_algorithm="gzip")


# --- requests as others might write them ----------------------------------------------------------


def body(**changes) -> dict:
    data = np.arange(2 * np.prod(SHAPE), dtype=np.float32).tolist()
    one = {"name": "pixels", "datatype": "FP32", "shape": [2, *SHAPE], "data": data}
    return {"inputs": [one | changes.pop("input", {})], **changes}


def test_json_tensors_may_be_nested(played):
    _, client, _ = played
    nested = np.arange(2 * np.prod(SHAPE), dtype=np.float32).reshape(2, *SHAPE).tolist()
    flat = client.post("/v2/models/digits/infer", json=body())
    deep = client.post("/v2/models/digits/infer", json=body(input={"data": nested}))
    assert flat.status_code == 200
    assert flat.json() == deep.json()
    assert [one["shape"] for one in flat.json()["outputs"]] == [[2], [2, 3], [2, 3]]
    assert set(flat.json()["outputs"][0]["data"]) <= set(LABELS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "not a JSON object"),
        ({}, "got 0, expected one"),
        ({"inputs": 3}, "list of objects"),
        (body(input={"name": "x"}), "'images' or 'pixels'"),
        (body(input={"name": []}), "'images' or 'pixels'"),
        (body(input={"datatype": "FP16"}), "expected FP32"),
        (body(input={"shape": [2, 3, 4]}), "expected [B, 3, 4, 4]"),
        (body(input={"shape": [-2, *SHAPE]}), "list of sizes"),
        (body(input={"shape": [3, *SHAPE]}), "its shape needs 144"),
        (body(input={"data": None}), "no data"),
        (body(input={"data": ["1"] * 96}), "expected numbers"),
        (body(input={"data": [True] * 96}), "expected numbers"),
        (body(input={"data": [[1], 2]}), "nested evenly"),
        (body(input={"data": [1e39] * 96}), "NaN or infinity"),
        (body(input={"data": [10**400] * 96}), "too large"),
        (body(input={"parameters": {"shared_memory_region": "x"}}), "shared_memory_region"),
        (body(input={"parameters": {"binary_data_size": 4}}), "0 bytes are left"),
        (body(parameters={"priority": 1}), "priority"),
        (body(parameters={"timeout": -1}), "timeout"),
        (body(parameters={"samples": 0}), "samples"),
        (body(outputs=[{"name": "x"}]), "labels, probabilities, logits"),
        (body(outputs=[{"name": "labels", "parameters": {"classification": 1}}]), "classification"),
        (body(id=3), "short string"),
        (body(input={"name": "images", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}),
         "the shape says 2"),
        (body(input={"name": "images", "datatype": "BYTES", "shape": [1], "data": ["*"]}),
         "image 0: expected base64"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_used_is_refused_with_the_reason(content, reason):
    with pytest.raises(Refused) as caught:
        read_inference(json.dumps(content).encode(), None, SHAPE, 4)
    assert caught.value.status == 400
    assert reason in caught.value.reason


def test_too_many_images_are_refused():
    with pytest.raises(Refused, match="at most 4 are accepted") as caught:
        read_inference(json.dumps(body(input={"shape": [5, *SHAPE]})).encode(), None, SHAPE, 4)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("length", "reason"),
    [("x", "a number of bytes"), ("999999", "the body has"), ("3", "not JSON"), ("²", "number")],
)
def test_a_wrong_length_of_the_header_is_refused(length, reason):
    with pytest.raises(Refused, match=reason):
        read_inference(json.dumps(body()).encode(), length, SHAPE, 4)


def _bytes_input(behind: bytes, size: int | None = None) -> tuple[bytes, str]:
    parameters = {"binary_data_size": len(behind) if size is None else size}
    one = {"name": "images", "datatype": "BYTES", "shape": [2], "parameters": parameters}
    head = json.dumps({"inputs": [one]}).encode()
    return head + behind, str(len(head))


def test_binary_tensors_that_do_not_fit_are_refused():
    two = struct.pack("<I", 1) + b"a" + struct.pack("<I", 2) + b"bc"
    assert read_inference(*_bytes_input(two), SHAPE, 4).images == [b"a", b"bc"]
    for data, size, reason in (
        (two[:-1], None, "fewer are there"),
        (two + b"\0", None, "cut off"),
        (two + b"x", len(two), "1 bytes follow the last tensor"),
        (two[:5], None, "the shape says 2"),
        (two, 10**6, "bytes are left"),
    ):
        with pytest.raises(Refused, match=reason):
            read_inference(*_bytes_input(data, size), SHAPE, 4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.one_of(
        json_values,
        json_values.map(lambda value: body(input={"data": value})),
        json_values.map(lambda value: body(input={"shape": value})),
        json_values.map(lambda value: body(parameters=value, outputs=value)),
    ).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=8),
    st.none() | st.integers(0, 400).map(str),
)
def test_any_request_is_taken_apart_or_refused(head, behind, length):
    with suppress(Refused):  # and nothing else
        assert read_inference(head + behind, length, SHAPE, 4).pixels.shape[1:] == SHAPE


# --- pixels wait for each other -------------------------------------------------------------------


def test_pixels_that_wait_too_long_are_refused(played):
    server, client, classifier = played
    slow = body(input={"data": [99.0] * 96})
    with server.connect() as connection:
        content = json.dumps(slow).encode()
        head = f"POST /v2/models/digits/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}"
        classifier.waiting.clear()
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        assert classifier.waiting.wait(30)
        refused = client.post("/v2/models/digits/infer", json=body())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        classifier.go_on.set()
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_pixels_keep_to_a_deadline(played):
    _, client, classifier = played
    classifier.go_on.clear()
    slow = body(input={"data": [99.0] * 96}, parameters={"timeout": 20_000})
    response = client.post("/v2/models/digits/infer", json=slow)
    classifier.go_on.set()
    assert response.status_code == 504


def test_pixels_have_the_samples_of_the_server(played):
    _, client, _ = played
    response = client.post("/v2/models/digits/infer", json=body(parameters={"samples": 2}))
    assert response.status_code == 400
    assert "leave it out" in response.json()["error"]

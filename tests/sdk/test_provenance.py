"""Answers that carry what made them are derived again, to the bit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from quick import kept

from marnet_sdk import Classifier, ImageError
from marnet_sdk.backends import torch_cpu
from marnet_sdk.bundle import reseal_bundle
from marnet_sdk.errors import DataError, InvalidInput
from marnet_sdk.prediction import Prediction
from marnet_sdk.provenance import predict_with_provenance, provenance_of, read_answers, replay


@pytest.fixture(scope="module")
def images(digits: Path) -> list[Path]:
    return sorted((digits / "test").glob("*.png"))[:7]


@pytest.fixture(scope="module")
def bundle(bundle_of) -> Path:
    return bundle_of("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def recorded(bundle, images) -> list[Prediction]:
    """The answers to seven images, in batches of four."""
    with Classifier(bundle) as classifier:
        found = list(predict_with_provenance(classifier, images, batch_size=4))
    assert not any(isinstance(answer, ImageError) for answer in found)
    return found


def test_answers_are_those_of_predict_and_say_what_made_them(bundle, images, recorded):
    with Classifier(bundle) as classifier:
        plain = classifier.predict(images, batch_size=4)
        threads = classifier.runtime.threads
    assert [replace(answer, provenance=None) for answer in recorded] == plain
    made = [provenance_of(answer) for answer in recorded]
    assert [(one.batch, one.row) for one in made] == [(4, i) for i in range(4)] + [
        (3, i) for i in range(3)
    ]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in images]
    assert [one.image for one in made] == digests
    content = json.loads((bundle / "manifest.json").read_text())
    first = made[0]
    assert (first.bundle, first.backend, first.precision) == (
        content["digest"],
        "onnxruntime",
        "fp32",
    )
    assert (first.operating_point, first.samples, first.seed, first.stop) == ("default", 1, 0, None)
    assert (first.threads, first.device) == (threads, "cpu")
    assert {"python", "numpy", "pillow", "onnxruntime"} <= first.packages.keys()


BUNDLES = (
    ("onnxruntime", "fp32", "graph"),
    ("torchscript", "fp16", "graph"),
    ("openvino", "fp32", "graph"),
    ("onnxruntime", "fp16", "native"),
)


@pytest.mark.parametrize(("backend", "precision", "loop"), kept(BUNDLES, BUNDLES[:1], many=True))
def test_every_answer_of_a_batch_is_derived_again_to_the_bit(
    backend, precision, loop, bundle_of, native_bundle, images, tmp_path
):
    path = (bundle_of if loop == "graph" else native_bundle)(backend, precision)
    with Classifier(path) as classifier:
        answers = list(predict_with_provenance(classifier, images, batch_size=4))
    (tmp_path / "answers.json").write_text(json.dumps([asdict(answer) for answer in answers]))
    for answer, image in zip(read_answers(tmp_path / "answers.json"), images, strict=True):
        again = replay(answer, image, path)
        assert (again.differences, again.surroundings, again.tolerance) == ((), (), None)


def test_several_samples_their_seed_and_an_early_stop_are_derived_again(noisy_bundle, images):
    with Classifier(noisy_bundle, samples=6, seed=3) as classifier:
        plain = next(predict_with_provenance(classifier, images[:2], batch_size=2))
        (early,) = predict_with_provenance(classifier, images[:1], batch_size=1, stop="settled")
    assert isinstance(plain, Prediction)
    assert isinstance(early, Prediction)
    assert (plain.samples, early.samples) == (6, 4)
    for answer in (plain, early):
        assert replay(answer, images[0], noisy_bundle).differences == ()


def test_answers_that_are_to_be_derived_again_keep_torch_s_threads(
    noisy_bundle, images, monkeypatch
):
    adapted = []
    monkeypatch.setattr(torch_cpu._calls.crowd, "most", lambda n: adapted.append(n) or n)
    with Classifier(noisy_bundle) as classifier:
        classifier.predict(images[0])
        assert adapted  # as other programs may have the cores
        adapted.clear()
        next(predict_with_provenance(classifier, images[:1]))
    assert adapted == []


def test_an_early_stop_in_a_batch_is_refused(bundle, images):
    refused = pytest.raises(InvalidInput, match=r"with batches of 64; .* pass a batch size of 1")
    with Classifier(bundle, samples=6) as classifier, refused:
        predict_with_provenance(classifier, images, stop="settled")


def test_unusable_images_are_in_their_place_and_in_no_batch(bundle, images):
    with Classifier(bundle) as classifier:
        given = [images[0], b"no image", "nowhere.png", images[1]]
        good, bad, missing, last = predict_with_provenance(classifier, given, top_k=2)
    assert isinstance(bad, ImageError)
    assert isinstance(missing, ImageError)
    assert isinstance(good, Prediction)
    assert isinstance(last, Prediction)
    assert (provenance_of(last).batch, provenance_of(last).row) == (2, 1)
    assert len(good.top) == 2
    assert replay(last, images[1], bundle).equal


def test_pixels_without_a_file_are_told_apart_by_what_the_model_sees(bundle, images):
    with Image.open(images[0]) as image:
        array = np.asarray(image.convert("RGB"))
    with Classifier(bundle) as classifier:
        (answer,) = predict_with_provenance(classifier, [array])
        (same,) = predict_with_provenance(classifier, [io.BytesIO(images[0].read_bytes())])
    assert isinstance(answer, Prediction)
    assert isinstance(same, Prediction)
    assert provenance_of(answer).image is None
    assert provenance_of(answer).pixels == provenance_of(same).pixels
    assert replay(answer, images[0], bundle).equal
    assert "what the model sees" in replay(answer, images[1], bundle).differences[0]


def test_a_million_images_are_a_batch_at_a_time(bundle, images):
    taken = count()
    endless = (images[next(taken) % 7] for _ in count())
    with Classifier(bundle) as classifier:
        answers = predict_with_provenance(classifier, endless, batch_size=3)
        for _ in range(4):
            next(answers)
    assert next(taken) == 6


def test_another_image_or_bundle_is_named_and_nothing_is_derived(
    bundle, bundle_of, images, recorded
):
    other = replay(recorded[0], images[1], bundle)
    assert not other.equal
    assert other.answer is None
    digest = hashlib.sha256(images[1].read_bytes()).hexdigest()
    assert f"the image: its file was {provenance_of(recorded[0]).image}, this is {digest}" in (
        other.differences
    )
    (difference,) = replay(recorded[0], images[0], bundle_of("torchscript", "fp16")).differences
    assert difference.startswith(f"the bundle: it was {provenance_of(recorded[0]).bundle}, ")


def test_a_changed_answer_is_found_and_where(bundle, images, recorded):
    answer = recorded[0]
    nudged = float(np.nextafter(answer.score, 0))
    found = replay(replace(answer, score=nudged), images[0], bundle)
    assert found.differences == (f"score: {nudged}, again {answer.score}",)
    claimed = replace(provenance_of(answer), precision="int8")
    found = replay(replace(answer, provenance=claimed), images[0], bundle)
    assert found.differences == ("precision: it was int8, the bundle says fp32",)


def elsewhere(answer: Prediction) -> Prediction:
    """The answer as another machine might have given it."""
    there = replace(provenance_of(answer), processor="a processor of another make")
    return replace(answer, provenance=there)


def test_elsewhere_probabilities_may_differ_by_what_the_self_test_allows(
    bundle, images, recorded, tmp_path
):
    answer = elsewhere(recorded[0])
    same = replay(answer, images[0], bundle)
    assert same.equal
    assert same.tolerance is not None
    (part,) = same.surroundings
    assert part.startswith("processor: a processor of another make, here ")

    def moved(by: float) -> Prediction:
        top = [replace(s, score=s.score * np.exp(by * same.tolerance)) for s in answer.top]
        return replace(answer, score=top[0].score, top=tuple(top))

    assert replay(moved(0.9), images[0], bundle).equal
    far = replay(moved(1.1), images[0], bundle)
    assert len(far.differences) == len(answer.top)
    assert far.differences[0].startswith(f"score of {answer.label!r}: ")
    (flipped,) = replay(replace(answer, label="X"), images[0], bundle).differences
    assert flipped == f"label: X, again {answer.label}"


def test_more_threads_than_this_machine_has_are_other_surroundings(bundle, images, recorded):
    made = replace(provenance_of(recorded[0]), threads=100_000)
    found = replay(replace(recorded[0], provenance=made), images[0], bundle)
    assert found.equal
    assert [part.split(":")[0] for part in found.surroundings] == ["threads"]


def test_an_operating_point_that_the_bundle_does_not_have_is_named(bundle, images, recorded):
    made = replace(provenance_of(recorded[0]), operating_point="fastest")
    with pytest.raises(InvalidInput, match=r"operating_point: got 'fastest'"):
        replay(replace(recorded[0], provenance=made), images[0], bundle)


def test_a_bundle_that_was_sealed_again_is_another(bundle, images, recorded, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    assert replay(recorded[0], images[0], copy).equal
    reseal_bundle(copy, created="later")
    assert replay(recorded[0], images[0], copy).differences[0].startswith("the bundle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is no file of answers"),
        ("[1]", "answer 1 is not an answer"),
        ('{"label": "3"}', "answer 1 does not say what made it; .* --provenance gives"),
        ('{"provenance": {}}', "answer 1 is not an answer of this version"),
    ],
)
def test_what_holds_no_such_answers_is_refused(content, message, tmp_path):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_answers(tmp_path / "answers.json"))


@pytest.mark.parametrize("changed", [{"row": 4}, {"batch": "4"}, {"seed": 0.5}, {"new": 1}])
def test_a_provenance_that_cannot_be_is_refused(changed, recorded, tmp_path):
    row = asdict(recorded[0])
    row["provenance"] |= changed
    (tmp_path / "answers.jsonl").write_text(json.dumps({"error": "no image"}) + "\n")
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps(row))
    with pytest.raises(DataError, match="answer 2 is not an answer of this version"):
        list(read_answers(tmp_path / "answers.jsonl"))


def test_the_bits_of_a_row_do_not_depend_on_what_other_images_show(bundle, images):
    """The property that a replay stands on."""
    with Classifier(bundle) as classifier:
        pixels = classifier.preprocess.pixels(images)
        alone = np.repeat(pixels[2:3], len(pixels), axis=0)
        together, repeated = (classifier.predict_pixels(x)[2] for x in (pixels, alone))
    assert together == repeated

"""What a deployed process relies on: order, errors that lose nothing, the same answer each time."""

from __future__ import annotations

import re
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tolerances import BUILT, FLOAT32_LAYER

import marnet_sdk.classifier
from marnet_sdk import Classifier, ImageError, InvalidImages
from marnet_sdk.backends import InTwoCalls, RuntimeReport
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.errors import (
    BackendUnavailable,
    BundleFormatError,
    ImageTooLarge,
    InferenceError,
    InvalidInput,
    MarnetError,
    SelfTestFailed,
)
from marnet_sdk.inputs import batches
from marnet_sdk.inputs.images import Limits
from marnet_train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def classifier(bundle_of) -> Classifier:
    return Classifier(bundle_of("torchscript", "fp32"))


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    """Eleven test images."""
    return sorted((digits / "test").glob("*.png"))[:11]


@pytest.fixture(scope="module")
def labels(classifier, paths) -> list[str]:
    return [classifier.predict(path).label for path in paths]


def reseal(bundle: Path, copy: Path, change: Callable[[Path], None] | None = None, **fields_: Any):
    """A copy with a changed file or field and a manifest that is right about all its bytes."""
    shutil.copytree(bundle, copy)
    if change is not None:
        change(copy)
    reseal_bundle(copy, **fields_)
    return copy


def array(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


INPUTS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": Path,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "PIL": Image.open,
    "array": array,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_image_gives_the_same_answer(kind, classifier, paths):
    expected = classifier.predict(paths[0])
    assert classifier.predict(INPUTS[kind](paths[0])) == expected
    assert expected.label == classifier.labels[expected.index]


def test_a_list_a_generator_and_a_stacked_array_are_answered_in_order(classifier, paths, labels):
    def names(answers) -> list[str]:
        return [answer.label for answer in answers]

    assert len(set(labels)) > 3  # else order could not be told
    assert names(classifier.predict(paths)) == labels
    assert names(classifier.predict(path for path in paths)) == labels
    assert names(classifier.predict(tuple(map(str, paths)))) == labels
    assert names(classifier.predict(np.stack([array(path) for path in paths]))) == labels


def test_kinds_may_be_mixed(classifier, paths, labels):
    mixed = [INPUTS[kind](path) for kind, path in zip(INPUTS, paths, strict=False)]
    assert [answer.label for answer in classifier.predict(mixed)] == labels[: len(mixed)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 1000])
def test_batch_size_changes_no_answer(classifier, paths, batch_size):
    expected = classifier.predict(paths)
    got = classifier.predict(paths, batch_size=batch_size)
    assert [answer.label for answer in got] == [answer.label for answer in expected]
    scores = np.array([[top.score for top in answer.top] for answer in got])
    wanted = np.array([[top.score for top in answer.top] for answer in expected])
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=BUILT["fp32"])


def test_a_generator_s_images_are_let_go_batch_by_batch(classifier, paths):
    """So that a folder of a million images never lies in memory."""
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def images():
        for path in paths * 3:
            image = array(path)
            made.append(weakref.ref(image))
            alive.append(sum(reference() is not None for reference in made))
            yield image

    assert len(classifier.predict(images(), batch_size=4)) == 33
    assert max(alive) <= 2 * 4 + 1


def test_no_images_no_answers(classifier):
    assert classifier.predict([]) == []
    assert classifier.predict(np.empty((0, 8, 8, 3), np.uint8)) == []
    width = classifier.embed([]).shape[1]
    assert classifier.embed([]).shape == (0, width)
    assert classifier.logits(np.empty((0, 3, 32, 32), np.float32)).shape == (0, 10)


def test_top_k_is_sorted_starts_with_the_answer_and_sums_to_one(classifier, paths):
    for answer in classifier.predict(paths, top_k=100):
        scores = [top.score for top in answer.top]
        assert len(answer.top) == 10  # there are no more classes
        assert sum(scores) == pytest.approx(1, abs=1e-12)
        assert scores == sorted(scores, reverse=True)
        assert {top.label for top in answer.top} == set(classifier.labels)
        best = answer.top[0]
        assert (best.label, best.index, best.score) == (answer.label, answer.index, answer.score)
    assert [len(answer.top) for answer in classifier.predict(paths, top_k=2)] == [2] * 11


def test_scores_are_the_softmax_of_the_logits(classifier, paths):
    logits = classifier.logits(classifier.preprocess.pixels(paths)).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, answer in zip(expected, classifier.predict(paths, top_k=10), strict=True):
        got = {top.index: top.score for top in answer.top}
        assert got == pytest.approx(dict(enumerate(row)), abs=1e-9)


def test_labels_are_the_checkpoint_s_and_mostly_right(classifier, checkpoint, digits, paths):
    loaded = load_checkpoint(checkpoint)
    assert classifier.labels == loaded.labels == tuple("0123456789")
    lines = (digits / "test/metadata.jsonl").read_text().splitlines()
    truth = {m[1]: m[2] for m in (re.search(r'e": "(.+?)".*label": "(.)"', x) for x in lines) if m}
    right = [classifier.predict(path).label == truth[path.name] for path in paths]
    assert sum(right) >= 8


def test_embeddings_are_one_row_per_image(classifier, paths):
    together = classifier.embed(paths, batch_size=4)
    alone = classifier.embed(paths[5])
    assert together.shape == (11, len(alone))
    assert together.dtype == np.float32
    np.testing.assert_allclose(together[5], alone, atol=BUILT["fp32"] * np.abs(alone).max())
    assert np.abs(together - together[5]).max(axis=1).argmin() == 5


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (np.zeros((3, 32, 32), np.float32), r"got float32 \(3, 32, 32\)"),
        (np.zeros((1, 3, 32, 32), np.float64), r"got float64 \(1, 3, 32, 32\)"),
        (np.zeros((1, 32, 32, 3), np.uint8), r"got uint8 \(1, 32, 32, 3\)"),
        (np.zeros((2, 3, 31, 32), np.float32), r"got float32 \(2, 3, 31, 32\)"),
        ("digit.png", "got 'digit.png'"),
    ],
)
def test_logits_of_anything_but_preprocessed_pixels_are_refused(classifier, pixels, got):
    message = rf"float32 \[B, 3, 32, 32\], {got}; for images use predict\(\)"
    with pytest.raises(InvalidInput, match=message):
        classifier.logits(pixels)


def test_pixels_need_not_be_contiguous(classifier, paths):
    pixels = classifier.preprocess.pixels(paths)
    every_other = classifier.logits(pixels[::2])
    expected = classifier.logits(np.ascontiguousarray(pixels[::2]))
    np.testing.assert_array_equal(every_other, expected)


@pytest.fixture
def spoiled(paths, tmp_path) -> list[Path]:
    """Five files; the one in the middle is no image."""
    bad = tmp_path / "notes.jpg"
    bad.write_bytes(b"these are not pixels")
    return [*paths[:2], bad, *paths[2:4]]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_one_bad_image_of_five_loses_no_other_answer(
    classifier, labels, spoiled, tmp_path, batch_size
):
    with pytest.raises(InvalidImages, match=r"1 of 5 inputs are not usable images") as caught:
        classifier.predict(spoiled, batch_size=batch_size)
    error = caught.value
    assert list(error.errors) == [2]
    assert error.errors[2].source == f"image 2 ({tmp_path / 'notes.jpg'})"
    assert str(tmp_path / "notes.jpg") in str(error)
    got = [answer and answer.label for answer in error.predictions]
    assert got == [*labels[:2], None, *labels[2:4]]


def test_errors_can_be_returned_in_place_of_answers(classifier, labels, spoiled):
    answers = classifier.predict(spoiled, on_error="return")
    assert isinstance(answers[2], ImageError)
    del answers[2]
    assert [answer.label for answer in answers] == labels[:4]
    assert all(
        isinstance(answer, ImageError)
        for answer in classifier.predict([b"x"] * 5, batch_size=2, on_error="return")
    )


def test_a_single_bad_image_is_named_by_its_path(classifier, spoiled):
    with pytest.raises(ImageError, match=re.escape(f"{spoiled[2]}: ")):
        classifier.predict(spoiled[2])
    with pytest.raises(ImageError, match=r"^image 0: "):
        classifier.predict(b"x")
    with pytest.raises(ImageError, match=re.escape(f"image 2 ({spoiled[2]}): ")):
        classifier.embed(spoiled, batch_size=2)


@pytest.mark.parametrize("image", [None, 7, np.zeros((8, 8, 3)), np.zeros((2, 2, 2, 2, 2))])
def test_what_is_no_image_at_all_is_an_image_error_too(classifier, image):
    with pytest.raises(ImageError):
        classifier.predict(image)


def test_a_file_that_does_not_exist_is_an_image_error(classifier, tmp_path):
    with pytest.raises(ImageError, match=r"missing\.png"):
        classifier.predict(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 1, got -1"),
        ({"top_k": 2.5}, r"top_k must be an integer, got 2\.5 \(float\); pass 1 or more"),
        ({"top_k": "5"}, r"top_k must be an integer, got '5' \(str\)"),
        ({"top_k": None}, r"top_k must be an integer, got None"),
        ({"batch_size": 1.5}, r"batch_size must be an integer, got 1\.5 \(float\)"),
        ({"on_error": "ignore"}, 'on_error must be "raise" or "return", got \'ignore\''),
    ],
)
def test_impossible_arguments_are_refused(classifier, paths, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        classifier.predict(paths, **arguments)


def test_embedding_checks_its_batch_size_too_and_numpy_s_integers_pass(classifier, paths):
    with pytest.raises(InvalidInput, match=r"batch_size must be an integer, got 1\.5"):
        classifier.embed(paths, batch_size=1.5)
    (answer,) = classifier.predict(paths[:1], batch_size=np.int64(2), top_k=np.uint8(3))
    assert len(answer.top) == 3


@pytest.mark.parametrize("backend", ["torchscript", "onnxruntime"])
@pytest.mark.parametrize(
    ("threads", "message"),
    [
        (1.5, r"threads must be an integer, got 1\.5 \(float\)"),
        ("2", r"threads must be an integer, got '2' \(str\)"),
        (0, "threads must be at least 1, got 0"),
        (-1, "threads must be at least 1, got -1"),
    ],
)
def test_an_impossible_number_of_threads_is_refused(bundle_of, backend, threads, message):
    with pytest.raises(InvalidInput, match=message):
        Classifier(bundle_of(backend, "fp16"), threads=threads)


def test_a_classifier_of_nothing_is_refused():
    with pytest.raises(InvalidInput, match=r"got None \(NoneType\) as a bundle; expected the path"):
        Classifier(None)  # pyright: ignore[reportArgumentType]


def test_an_open_file_is_one_image_and_not_many_lines(classifier, paths):
    expected = classifier.predict(paths[0])
    with paths[0].open("rb") as file:
        assert classifier.predict(file) == expected
    with paths[0].open("rb") as file:
        assert classifier.predict([paths[1], file]) == classifier.predict([paths[1], paths[0]])
    with paths[0].open() as file, pytest.raises(ImageError, match="open it in binary mode"):
        classifier.predict(file)


def test_a_row_or_a_tensor_is_one_input_that_is_refused(classifier):
    for wrong, kind in (({"image": 1}, "dict"), (torch.zeros(2, 3, 8, 8), "Tensor")):
        with pytest.raises(ImageError, match=f"got {kind}; expected a path"):
            classifier.predict(wrong)


def test_the_limits_of_images_can_be_set(bundle_of, paths):
    classifier = Classifier(bundle_of("torchscript", "fp32"), limits=Limits(max_pixels=63))
    with pytest.raises(ImageTooLarge, match="got 8 x 8 pixels; at most 63 are accepted"):
        classifier.predict(paths[0])
    answers = classifier.predict(paths[:2], on_error="return")
    assert [type(answer) for answer in answers] == [ImageTooLarge, ImageTooLarge]
    with pytest.raises(ImageTooLarge):
        classifier.embed(paths[:2])


class Spoiling(InTwoCalls):
    """A backend whose answers for some rows hold a value that is no number."""

    def __init__(self, backend: Any, value: float, rows: list[int]) -> None:
        self.backend, self.value, self.rows = backend, value, rows

    def encode(self, pixels):
        return self.backend.encode(pixels)

    def refine(self, x_v, tables):
        logits, features = self.backend.refine(x_v, tables)
        # Of whole batches alone: the step is looked for with one image.
        logits[[row for row in self.rows if len(x_v) > 1], :, 3] = self.value
        return logits, features


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_rows(
    classifier, paths, spoiled, monkeypatch, value
):
    spoiling = Spoiling(classifier._guard.check(), value, [0, 2])
    monkeypatch.setattr(classifier._guard, "_backend", spoiling)
    cause = "hold NaN or infinity, from step .* expected finite numbers: check the pixels .* export"
    with pytest.raises(InferenceError, match=f"the logits of row 0, row 2 {cause}"):
        classifier.logits(classifier.preprocess.pixels(paths))
    # The file in the middle is refused, so the third row is the image with the number 3.
    names = re.escape(f"image 0 ({spoiled[0]}), image 3 ({spoiled[3]}) ") + cause
    with pytest.raises(InferenceError, match=names):
        classifier.predict(spoiled)
    with pytest.raises(InferenceError, match=re.escape(f"of image 0 ({paths[6]}), image 2 ")):
        classifier.embed(paths[6:], batch_size=3)


class Exploding(InTwoCalls):
    """A backend whose chains leave the finite numbers at some step."""

    def __init__(self, backend: Any, step: int) -> None:
        self.backend, self.step, self.calls = backend, step, 0

    def encode(self, pixels):
        return self.backend.encode(pixels)

    def refine(self, x_v, tables):
        self.calls += 1
        logits, features = self.backend.refine(x_v, tables)
        return logits * (1 if len(tables.coefficients) < self.step else np.nan), features


@pytest.mark.parametrize("step", [1, 2, 37, 99, 100])
def test_the_step_at_which_a_chain_left_the_finite_numbers_is_named(
    classifier, paths, monkeypatch, step
):
    exploding = Exploding(classifier._guard.check(), step)
    monkeypatch.setattr(classifier._guard, "_backend", exploding)
    with pytest.raises(InferenceError, match=f"from step {step} of 100 of the reverse loop on"):
        classifier.predict(paths[:3])
    assert exploding.calls <= 1 + 7


def test_pixels_that_are_no_numbers_are_named_and_a_long_list_is_cut(classifier, paths):
    pixels = classifier.preprocess.pixels(paths)
    pixels[2:] = np.nan
    message = "of row 2, row 3, row 4, row 5, row 6 and 4 more hold NaN .*from the encoder on"
    with pytest.raises(InferenceError, match=message):
        classifier.logits(pixels)


def test_the_seed_is_a_parameter_of_the_model(bundle_of, classifier, paths):
    pixels = classifier.preprocess.pixels(paths)
    default = classifier.logits(pixels)
    path = bundle_of("torchscript", "fp32")
    np.testing.assert_array_equal(Classifier(path, seed=0).logits(pixels), default)
    other = Classifier(path, seed=1).logits(pixels)
    np.testing.assert_array_equal(Classifier(path, seed=1).logits(pixels), other)
    assert np.abs(other - default).max() > 0.01
    assert (other.argmax(axis=1) == default.argmax(axis=1)).mean() > 0.8


def test_a_seed_at_load_needs_no_other_export_whatever_the_backend(bundle_of, classifier, paths):
    pixels = classifier.preprocess.pixels(paths)
    torchscript = Classifier(bundle_of("torchscript", "fp32"), seed=2**63 + 5)
    onnxruntime = Classifier(bundle_of("onnxruntime", "fp32"), seed=2**63 + 5)
    want = torchscript.logits(pixels)
    assert np.abs(onnxruntime.logits(pixels) - want).max() <= BUILT["fp32"] * np.abs(want).max()
    assert np.abs(want - classifier.logits(pixels)).max() > 0.01


# --- several noise samples


def test_samples_are_averaged_probabilities_of_single_chains(bundle_of, paths):
    several = Classifier(bundle_of("onnxruntime", "fp32"), samples=5)
    pixels = several.preprocess.pixels(paths)
    tables = several._run._tables(pixels, 0, 5, 5)
    x_v = several._guard.check().encode(pixels)
    single = [
        several._guard.check().refine(x_v, tables.samples(k, k + 1))[0][:, 0].astype(np.float64)
        for k in range(5)
    ]
    chances = np.stack([np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in single], axis=1)
    mean = chances.mean(axis=1)
    for i, answer in enumerate(several.predict(paths, top_k=10)):
        got = {top.index: top.score for top in answer.top}
        assert got == pytest.approx(dict(enumerate(mean[i])), abs=1e-5)
        best = mean[i].argmax()
        assert answer.samples == 5
        assert answer.vote_share == (chances[i].argmax(axis=1) == best).mean()
        error = chances[i, :, best].std(ddof=1) / 5**0.5
        assert answer.standard_error == pytest.approx(error, abs=1e-5)
    np.testing.assert_allclose(several.logits(pixels), np.log(mean), atol=1e-4)


def test_samples_can_be_asked_for_at_load_or_in_a_call(bundle_of, classifier, paths):
    at_load = Classifier(bundle_of("torchscript", "fp32"), samples=3).predict(paths)
    assert classifier.predict(paths, samples=3) == at_load
    assert {answer.samples for answer in classifier.predict(paths)} == {1}
    assert {answer.standard_error for answer in classifier.predict(paths)} == {None}
    assert "3 samples" in repr(Classifier(bundle_of("torchscript", "fp32"), samples=3))


class Counting(InTwoCalls):
    """A backend that counts what goes through its two graphs."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.encoded, self.chains = backend, 0, 0

    def encode(self, pixels):
        self.encoded += len(pixels)
        return self.backend.encode(pixels)

    def refine(self, x_v, tables):
        self.chains += len(x_v) * tables.bias.shape[2]
        return self.backend.refine(x_v, tables)


def test_the_encoder_runs_once_however_many_samples(classifier, paths, monkeypatch):
    counting = Counting(classifier._guard.check())
    monkeypatch.setattr(classifier._guard, "_backend", counting)
    classifier.predict(paths, samples=8)
    assert (counting.encoded, counting.chains) == (11, 88)


def test_settled_images_draw_no_more_and_keep_their_labels(classifier, digits, monkeypatch):
    images = sorted((digits / "test").glob("*.png"))[:120]
    full = classifier.predict(images, samples=16)
    counting = Counting(classifier._guard.check())
    monkeypatch.setattr(classifier._guard, "_backend", counting)
    early = classifier.predict(images, samples=16, stop="settled")
    drawn = [answer.samples for answer in early]
    assert set(drawn) <= {4, 8, 16}
    assert counting.chains == sum(drawn) < 0.6 * 16 * len(images)
    assert counting.encoded == len(images)
    same = [a.label == b.label for a, b in zip(full, early, strict=True)]
    assert np.mean(same) >= 0.98
    # The samples of an image are the first ones of all of them.
    for whole, part in zip(full, early, strict=True):
        if part.samples == 16:
            assert (part.label, part.vote_share) == (whole.label, whole.vote_share)
            assert part.score == pytest.approx(whole.score, abs=FLOAT32_LAYER)


def test_stopping_does_not_depend_on_the_batch(classifier, paths):
    alone = [classifier.predict(path, samples=16, stop="settled") for path in paths]
    together = classifier.predict(paths, samples=16, stop="settled")
    assert [a.samples for a in alone] == [a.samples for a in together]
    assert [a.label for a in alone] == [a.label for a in together]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": 2.0}, r"samples must be an integer, got 2\.0"),
        ({"stop": "soon"}, "stop must be \"settled\" or None, got 'soon'"),
        (
            {"stop": "settled"},
            r"looks after 4 samples .*needs more than that, got samples=1; ask for",
        ),
    ],
)
def test_impossible_samples_are_refused(classifier, paths, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        classifier.predict(paths, **arguments)


def test_embeddings_are_the_mean_over_the_samples(bundle_of, paths):
    three = Classifier(bundle_of("onnxruntime", "fp32"), samples=3)
    tables = three._run._tables(three.preprocess.pixels(paths), 0, 3, 3)
    x_v = three._guard.check().encode(three.preprocess.pixels(paths))
    want = three._guard.check().refine(x_v, tables)[1].mean(axis=1)
    np.testing.assert_allclose(three.embed(paths), want, atol=1e-5 * np.abs(want).max())


# --- operating points


def test_an_operating_point_is_chosen_at_load(swept_bundle, paths):
    served = Classifier(swept_bundle)
    default = served.bundle.manifest.sampling.default
    same, exact = (Classifier(swept_bundle, operating_point=p) for p in (default, "exact"))
    assert served.operating_point == default != "exact"
    assert "100 ddpm steps" in repr(exact)
    assert "100 ddpm steps" not in repr(served)
    pixels = served.preprocess.pixels(paths)
    assert np.abs(served.logits(pixels) - exact.logits(pixels)).max() > 1e-3
    np.testing.assert_array_equal(served.logits(pixels), same.logits(pixels))


def test_the_exact_point_is_the_bundle_without_a_sweep(swept_bundle, classifier, paths):
    pixels = classifier.preprocess.pixels(paths)
    exact = Classifier(swept_bundle, operating_point="exact")
    np.testing.assert_array_equal(exact.logits(pixels), classifier.logits(pixels))


def test_an_operating_point_that_is_not_there_is_refused_with_those_that_are(swept_bundle):
    message = (
        r"got 'slow'; .*has balanced, exact, fast, zero\. More are made by exporting it again with "
        "marnet-export --steps auto$"
    )
    with pytest.raises(InvalidInput, match=message):
        Classifier(swept_bundle, operating_point="slow")


def test_an_answer_abstains_below_the_threshold_of_its_point_and_only_for_it(
    swept_bundle, classifier, digits
):
    images = sorted((digits / "test").glob("*.png"))
    swept = Classifier(swept_bundle, operating_point="exact")
    threshold = swept.bundle.manifest.sampling.points["exact"].abstain_below
    answers = swept.predict(images)
    assert [a.abstain for a in answers] == [a.score < threshold for a in answers]
    # Another number of samples, rule or seed is another score, for which no threshold was found.
    asked = 2 * swept.samples
    assert {a.abstain for a in swept.predict(images[:3], samples=asked)} == {None}
    other = Classifier(swept_bundle, operating_point="exact", seed=1)
    assert {a.abstain for a in other.predict(images[:3])} == {None}
    assert {a.abstain for a in classifier.predict(images[:3])} == {None}


def test_the_operating_point_that_is_asked_for_is_tested_too(swept_bundle, tmp_path):
    def spoil(bundle: Path) -> None:
        file = bundle / "payload/plan.safetensors"
        plan = load_file(file)
        save_file(plan | {"coefficients.exact": 1.1 * plan["coefficients.exact"]}, file)

    copy = reseal(swept_bundle, tmp_path / "b", spoil)
    Classifier(copy)
    with pytest.raises(SelfTestFailed, match=r"golden logits differ|hold NaN or infinity"):
        Classifier(copy, operating_point="exact")


def test_a_graph_that_the_manifest_does_not_list_is_not_opened(swept_bundle, tmp_path):
    copy = shutil.copytree(swept_bundle, tmp_path / "b")
    (copy / "payload/extra.pt").write_bytes(b"code")
    with pytest.raises(BundleFormatError, match=r"lists no payload/extra\.pt"):
        Classifier(copy)


def test_tables_of_a_few_numbers_of_samples_are_kept_and_no_more(bundle_of, paths):
    classifier = Classifier(bundle_of("onnxruntime", "fp32"))
    first = classifier.predict(paths[0], samples=2)
    for samples in range(1, 12):
        classifier.predict(paths[0], samples=samples)
    assert classifier._run._shared.cache_info().currsize <= 4
    assert classifier.predict(paths[0], samples=2) == first


def test_what_answers_cannot_be_changed_behind_the_tables(classifier):
    for name in ("operating_point", "samples", "seed"):
        with pytest.raises(AttributeError):
            setattr(classifier, name, 1)


def test_noise_keyed_by_image_is_drawn_for_the_samples_that_are_used(noisy_bundle, paths):
    noisy = Classifier(noisy_bundle)
    full = noisy.predict(paths, samples=16)
    early = noisy.predict(paths, samples=16, stop="settled")
    assert min(answer.samples for answer in early) == 4
    assert [a.label for a in early] == [a.label for a in full]


# --- noise keyed by image


def test_noise_keyed_by_image_depends_on_its_pixels_and_on_nothing_else(noisy_bundle, paths):
    noisy = Classifier(noisy_bundle)
    pixels = noisy.preprocess.pixels(paths)
    tables = noisy._run._tables(pixels, 0, 2, 2)
    assert tables.bias.shape[1] == 11
    assert len({tables.bias[0, i].tobytes() for i in range(11)}) == 11
    order = np.array([3, 3, 0])
    again = noisy._run._tables(pixels[order], 0, 2, 2)
    np.testing.assert_allclose(again.bias, tables.bias[:, order], atol=1e-6)
    changed = pixels.copy()
    changed[0, 0, 0, 0] += 1e-3
    other = noisy._run._tables(changed, 0, 2, 2)
    assert np.abs(other.bias[:, 0] - tables.bias[:, 0]).max() > 0.1
    np.testing.assert_allclose(other.bias[:, 1:], tables.bias[:, 1:], atol=1e-6)


# --- an answer depends on its image alone


@pytest.fixture(scope="module", params=["torchscript", "onnxruntime", "noise keyed by image"])
def served(request, bundle_of) -> tuple[Classifier, np.ndarray, np.ndarray]:
    """A classifier, 40 images as pixels, and what each gives alone."""
    if request.param == "noise keyed by image":
        classifier = Classifier(request.getfixturevalue("noisy_bundle"), threads=1)
    else:
        classifier = Classifier(bundle_of(request.param, "fp32"), threads=1)
    folder = request.getfixturevalue("digits") / "test"
    pixels = classifier.preprocess.pixels(sorted(folder.glob("*.png"))[:40])
    return classifier, pixels, np.concatenate([classifier.logits(row[None]) for row in pixels])


@given(rows=st.lists(st.integers(0, 39), min_size=1, max_size=24))
def test_any_split_permutation_padding_or_duplication_changes_no_answer(served, rows):
    classifier, pixels, alone = served
    got, want = classifier.logits(pixels[rows]), alone[rows]
    bound = classifier.bundle.manifest.golden_tolerance * np.abs(alone).max()
    assert np.abs(got - want).max() <= bound
    best = np.sort(want, axis=1)
    decided = best[:, -1] - best[:, -2] > bound
    assert (got.argmax(axis=1) == want.argmax(axis=1))[decided].all()
    assert decided.mean() > 0.3 or len(rows) < 8  # else nothing would be claimed


def test_two_backends_agree_on_every_label(bundle_of, classifier, digits):
    images = sorted((digits / "test").glob("*.png"))[:100]
    other = Classifier(bundle_of("onnxruntime", "fp32"))
    got = [answer.label for answer in other.predict(images)]
    assert got == [answer.label for answer in classifier.predict(images)]


@pytest.mark.parametrize("backend", ["torchscript", "onnxruntime"])
def test_eight_threads_get_the_answers_of_one(bundle_of, backend, paths):
    classifier = Classifier(bundle_of(backend, "fp32"))
    expected = [classifier.predict(path) for path in paths]

    def work(start: int) -> list[tuple[int, Any]]:
        places = [(start + i) % len(paths) for i in range(20)]
        return [(place, classifier.predict(paths[place])) for place in places]

    with ThreadPoolExecutor(8) as pool:
        answers = [pair for pairs in pool.map(work, range(8)) for pair in pairs]
    assert len(answers) == 160
    assert all(answer == expected[place] for place, answer in answers)


def test_repr_says_which_bundle_and_what_it_runs(classifier, bundle_of):
    path = str(bundle_of("torchscript", "fp32"))
    assert repr(classifier) == (
        f"Classifier({path!r}: 10 classes, torchscript fp32, 100 ddpm steps)"
    )


def alter(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """A change of the golden answers."""

    def change(bundle: Path) -> None:
        file = bundle / "golden/answers.safetensors"
        golden = load_file(file)
        save_file(golden | {name: f(golden[name]) for name, f in changes.items()}, file)

    return change


def lose_the_best(logits: np.ndarray) -> np.ndarray:
    """NaN in place of the best logit: no label changes, as NaN counts as the largest."""
    return np.where(logits == logits.max(axis=1, keepdims=True), np.float32(np.nan), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (alter(logits=lambda x: x + 3), r"golden logits differ by 3 \(bound"),
        (alter(logits=lose_the_best), r"golden logits differ by nan .*, 0 of 8 labels differ"),
        (alter(logits=lambda x: np.roll(x, 1, axis=0)), "[5-8] of 8 labels differ"),
        (alter(pixels=lambda x: x + np.float32(0.1)), r"golden images differ by 0\.1 \(bound 0\.0"),
        (alter(pixels=lambda x: x[::-1].copy()), "golden images differ by"),
        (
            alter(pixels=lambda x: x * np.nan),
            "row 0, row 1, .* hold NaN or infinity, from the encoder",
        ),
    ],
)
def test_a_bundle_that_does_not_give_its_golden_answers_is_refused(
    bundle_of, tmp_path, change, message
):
    copy = reseal(bundle_of("torchscript", "fp16"), tmp_path / "b", change)
    with pytest.raises(SelfTestFailed, match=message) as caught:
        Classifier(copy)
    assert caught.value.exit_code == 5
    text = str(caught.value)
    assert re.search(r"Built for cpu \S+; running on \S+; versions that differ: none", text)
    assert "marnet-export --backend torchscript --precision fp16" in text


def test_a_golden_label_that_changes_is_refused_however_small_the_difference(bundle_of, tmp_path):
    def swap_the_best_two(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        for row in logits[:2]:
            best, second = row.argsort()[-1], row.argsort()[-2]
            row[[best, second]] = row[[second, best]]
        return logits

    original, change = bundle_of("torchscript", "fp16"), alter(logits=swap_the_best_two)
    copy = reseal(original, tmp_path / "b", change, golden_tolerance=2.0)
    with pytest.raises(SelfTestFailed, match="2 of 8 labels differ"):
        Classifier(copy)


def test_a_refused_bundle_names_the_versions_that_differ(bundle_of, tmp_path):
    original = bundle_of("torchscript", "fp16")
    built_for = read_bundle(original).manifest.built_for
    packages = built_for.packages | {"torch": "1.0", "python": "3.0", "unheard-of": "2"}
    built_for = replace(built_for, machine="riscv64", packages=packages)
    change = alter(logits=lambda x: -x)
    copy = reseal(original, tmp_path / "b", change, built_for=built_for)
    with pytest.raises(SelfTestFailed, match="Built for cpu riscv64") as caught:
        Classifier(copy)
    assert re.search(r"differ: (python 3.0|torch 1.0) \(here [^)]+\), ", str(caught.value))
    assert "unheard-of" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backend": "coreml"},
            "'coreml' is unknown .*has aotinductor, onnxruntime, .*torchscript; upgrade",
        ),
        ({"preprocess": {"size": {"height": 16, "width": 16}}}, "answers do not fit .* preproc"),
        ({"labels": ("a", "b")}, "golden answers do not fit the labels"),
    ],
)
def test_a_manifest_that_does_not_fit_its_payload_is_refused(bundle_of, tmp_path, changes, message):
    copy = reseal(bundle_of("torchscript", "fp32"), tmp_path / "b", **changes)
    with pytest.raises(MarnetError, match=message):
        Classifier(copy)


def test_a_bundle_without_its_plan_is_refused(bundle_of, tmp_path):
    def drop(bundle: Path) -> None:
        (bundle / "payload/plan.safetensors").unlink()

    copy = reseal(bundle_of("torchscript", "fp32"), tmp_path / "b", drop)
    with pytest.raises(BundleFormatError, match=r"lists no payload/plan\.safetensors"):
        Classifier(copy)


# --- devices


class AtOnce(InTwoCalls):
    """A backend that runs everything in one call, and reads arrays of its own GPU."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.ran, self.split = backend, [], 0

    def encode(self, pixels):
        self.split += 1
        return self.backend.encode(getattr(pixels, "values", pixels))

    def refine(self, x_v, tables):
        self.split += 1
        return self.backend.refine(x_v, tables)

    def run(self, pixels, tables):
        self.ran.append((pixels, tables))
        x_v = self.backend.encode(getattr(pixels, "values", pixels))
        return self.backend.refine(x_v, tables)

    def device_rows(self, array):
        return array

    def report(self):
        return RuntimeReport("a GPU", "persistent kernel", (1, 8))


class OnGpu:
    """An array that says that it is on a GPU."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> OnGpu:
        return OnGpu(self.values[rows])


@pytest.mark.parametrize(("kind", "on_device"), [(1, False), (3, False), (11, False), (2, True)])
def test_pinned_memory_is_the_host_s(kind, on_device):
    array = OnGpu(np.zeros(1))
    array.__dlpack_device__ = lambda: (kind, 0)
    assert batches.is_on_device(array) == on_device


@pytest.fixture
def at_once(classifier, monkeypatch) -> AtOnce:
    backend = AtOnce(classifier._guard.check())
    monkeypatch.setattr(classifier._guard, "_backend", backend)
    return backend


def test_shared_noise_is_one_call_of_the_backend_with_the_same_tables(classifier, at_once, paths):
    want = classifier.predict(paths)
    assert classifier.predict(paths) == want
    assert classifier.embed(paths).shape[0] == len(paths)
    first, second, third = (tables for _, tables in at_once.ran)
    assert first is second is third
    assert at_once.split == 0
    classifier.predict(paths, samples=8, stop="settled")
    assert len(at_once.ran) == 3
    assert at_once.split > 1


def test_a_bundle_opens_with_one_call_for_the_golden_images(bundle_of, monkeypatch):
    made: list[AtOnce] = []
    real = marnet_sdk.classifier.open_backend

    def opened(*arguments: Any) -> AtOnce:
        made.append(AtOnce(real(*arguments)))
        return made[-1]

    monkeypatch.setattr(marnet_sdk.classifier, "open_backend", opened)
    Classifier(bundle_of("torchscript", "fp32"))
    assert (len(made[0].ran), made[0].split) == (1, 0)


def test_an_array_on_the_gpu_goes_to_the_backend_as_it_is(classifier, at_once, paths):
    pixels = classifier.preprocess.pixels(paths)
    given = OnGpu(pixels)
    np.testing.assert_array_equal(classifier.logits(given), classifier.logits(pixels))
    assert at_once.ran[0][0] is given
    assert classifier.logits(OnGpu(pixels[:0])).shape == (0, len(classifier.labels))


def test_an_array_on_the_gpu_with_nan_names_its_rows(classifier, at_once, paths):
    pixels = classifier.preprocess.pixels(paths)
    pixels[[1, 4], 0, 0, 0] = np.nan
    with pytest.raises(InferenceError, match=r"logits of row 1, row 4 .*from the encoder on"):
        classifier.logits(OnGpu(pixels))


def test_an_array_on_a_gpu_is_refused_by_a_backend_of_the_cpu(classifier, paths):
    given = OnGpu(classifier.preprocess.pixels(paths))
    with pytest.raises(InvalidInput, match=r"host's memory, got OnGpu .*as in pixels.cpu\(\)"):
        classifier.logits(given)


def test_noise_keyed_by_image_needs_the_pixels_on_the_host(noisy_bundle, monkeypatch):
    classifier = Classifier(noisy_bundle)
    monkeypatch.setattr(classifier._guard, "_backend", AtOnce(classifier._guard.check()))
    with pytest.raises(InvalidInput, match=r"keys its noise by the bytes .* pass a NumPy"):
        classifier.logits(OnGpu(np.zeros((1, *classifier.preprocess.output_shape), np.float32)))


def test_the_runtime_is_what_the_backend_reports(bundle_of, at_once, classifier):
    assert classifier.runtime == RuntimeReport("a GPU", "persistent kernel", (1, 8))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_for_cpus_is_refused_on_a_gpu(bundle_of, backend):
    bundle = bundle_of(backend, "fp32")
    with pytest.raises(BackendUnavailable, match=f"{backend} runs on cpu, got device 'cuda'"):
        Classifier(bundle, device="cuda")
    assert Classifier(bundle, device="cpu").runtime.device == "cpu"


def test_an_unknown_device_is_refused(bundle_of):
    with pytest.raises(InvalidInput, match="device: got 'tpu', expected cpu or cuda; leave it out"):
        Classifier(bundle_of("onnxruntime", "fp32"), device="tpu")

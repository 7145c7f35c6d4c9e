"""Without the loop, the alignment branch answers: on every backend, as it does in torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick import kept
from safetensors.numpy import load_file, save_file
from tiny import make_model
from tolerances import BUILT, FLOAT32_LAYER

from marnet_sdk import Classifier
from marnet_sdk.alignment import AlignmentHead, WithAlignment, product, read_head
from marnet_sdk.backends import InTwoCalls
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.errors import BundleFormatError, InferenceError, InvalidInput, SelfTestFailed
from marnet_sdk.noise.tables import Tables
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.marnet import MARNet

BACKENDS = ("torchscript", "onnxruntime", "openvino")
NO_STEP = Tables(np.empty((0, 3), np.float32), np.empty((0, 1, 4, 12), np.float32))


def head_of(model: MARNet) -> AlignmentHead:
    layers = (model.project_vision, model.alignment_classifier)
    arrays = [p.detach().numpy().copy() for x in layers for p in (x.weight, x.bias)]
    return AlignmentHead(*arrays)


@torch.inference_mode()
def in_torch(model: MARNet, x_v: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The slow twin: logits [B, C] and x_EMA [B, D]."""
    aligned = model.align_vision(x_v)
    return model.alignment_classifier(aligned).numpy(), aligned.numpy()


@pytest.fixture(scope="module")
def paths(digits: Path) -> list[Path]:
    return sorted((digits / "test").glob("*.png"))[:9]


@pytest.fixture(scope="module")
def zero(zero_bundle) -> Classifier:
    return Classifier(zero_bundle("torchscript", "fp32"))


@pytest.fixture(scope="module")
def want(zero, checkpoint, paths) -> tuple[np.ndarray, np.ndarray]:
    model = load_checkpoint(checkpoint).model
    with torch.inference_mode():
        x_v = model.vision(torch.from_numpy(zero.preprocess.pixels(paths)))
    return in_torch(model, x_v)


# --- the head


def test_the_head_is_torch_s_branch():
    model = make_model()
    x_v = torch.randn(5, 10)
    for got, twin in zip(head_of(model)(x_v.numpy()), in_torch(model, x_v), strict=True):
        assert got.shape == (5, 1, twin.shape[1])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[:, 0], twin, atol=FLOAT32_LAYER)


class Looped(InTwoCalls):
    """A backend whose loop answers with ones, as many as there are samples."""

    def encode(self, pixels):
        return pixels.reshape(len(pixels), -1)

    def refine(self, x_v, tables):
        ones = np.ones((len(x_v), tables.bias.shape[2], 3), np.float32)
        return ones, ones


def test_a_step_runs_the_loop_and_none_the_branch_once_whatever_the_samples():
    head = head_of(make_model())
    backend = WithAlignment(Looped(), head)  # pyright: ignore[reportArgumentType]
    pixels = np.random.default_rng(0).normal(size=(2, 10, 1, 1)).astype(np.float32)
    one_step = Tables(np.ones((1, 3), np.float32), np.ones((1, 1, 4, 12), np.float32))
    x_v = backend.encode(pixels)
    for logits in (backend.run(pixels, one_step)[0], backend.refine(x_v, one_step)[0]):
        np.testing.assert_array_equal(logits, np.ones((2, 4, 3)))
    for logits in (backend.run(pixels, NO_STEP)[0], backend.refine(x_v, NO_STEP)[0]):
        np.testing.assert_array_equal(logits, head(x_v)[0])
    assert (backend.report().device, backend.report().threads) == ("cpu", 1)
    with pytest.raises(InvalidInput, match="reads arrays in the host's memory"):
        backend.device_rows(pixels)


def test_a_head_is_read_as_it_was_written_and_refused_in_part(tmp_path):
    assert read_head(tmp_path) is None
    head = head_of(make_model())
    file = tmp_path / "alignment.safetensors"
    save_file(asdict(head), file)
    found = read_head(tmp_path)
    assert found is not None
    for name, array in vars(head).items():
        np.testing.assert_array_equal(vars(found)[name], array)
    arrays = asdict(head)
    short: dict[str, Any] = {"classifier_bias": arrays["classifier_bias"][:-1]}
    for damaged in (arrays | short, {"vision_bias": arrays["vision_bias"]}):
        save_file(damaged, file)
        with pytest.raises(BundleFormatError, match=r"without the loop needs: .*export the bundle"):
            read_head(tmp_path)


# --- a bundle without the loop


@pytest.mark.parametrize("backend", kept(BACKENDS, {"torchscript"}))
def test_every_backend_answers_as_the_checkpoint_s_branch(backend, zero_bundle, paths, want):
    classifier = Classifier(zero_bundle(backend, "fp32"))
    logits, aligned = want
    got = classifier.logits(classifier.preprocess.pixels(paths))
    assert np.abs(got - logits).max() <= BUILT["fp32"] * np.abs(logits).max()
    embedded = classifier.embed(paths, batch_size=4)
    assert np.abs(embedded - aligned).max() <= BUILT["fp32"] * np.abs(aligned).max()
    assert classifier.embed([]).shape == (0, aligned.shape[1])
    assert "no loop" in repr(classifier)


def test_an_answer_is_one_sample_that_is_sure_of_itself(zero, paths, want):
    answers = zero.predict(paths)
    assert [answer.index for answer in answers] == want[0].argmax(axis=1).tolist()
    for answer in answers:
        assert (answer.samples, answer.vote_share, answer.standard_error) == (1, 1.0, None)
    assert zero.samples == 1
    assert zero.predict(paths, samples=1) == answers


def test_the_loop_is_not_run(zero, paths, monkeypatch):
    opened = zero._guard.check()

    class NoLoop(Looped):
        encode = opened.backend.encode

        def refine(self, x_v, tables):
            raise AssertionError("the loop is run")

    expected = zero.predict(paths)
    backend = WithAlignment(NoLoop(), opened.head)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(zero._guard, "_backend", backend)
    assert zero.predict(paths) == expected


def test_another_seed_changes_nothing(zero_bundle, zero, paths):
    assert Classifier(zero_bundle("torchscript", "fp32"), seed=7).predict(paths) == zero.predict(
        paths
    )


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"samples": 4}, "samples: got 4"),
        ({"samples": 4, "stop": "settled"}, "samples: got 4"),
        ({"stop": "settled"}, "stop: got 'settled'"),
    ],
)
def test_noise_samples_are_refused_with_the_point_that_has_them(zero, paths, arguments, got):
    message = (
        rf"{got}, but operating point 'zero' has no reverse loop, and so no noise to draw; leave "
        r"it out, or choose operating_point='exact'"
    )
    with pytest.raises(InvalidInput, match=message):
        zero.predict(paths, **arguments)
    if "stop" not in arguments:
        with pytest.raises(InvalidInput, match=message):
            Classifier(zero.bundle.path, **arguments)


def test_the_process_as_trained_stays_available(zero, bundle_of, paths):
    exact = Classifier(zero.bundle.path, operating_point="exact", samples=2)
    plain = Classifier(bundle_of("torchscript", "fp32"), samples=2)
    pixels = exact.preprocess.pixels(paths)
    np.testing.assert_array_equal(exact.logits(pixels), plain.logits(pixels))


def test_a_bundle_without_the_point_says_how_to_get_it(bundle_of):
    message = (
        r"got 'zero'; .* has default\. More are made by exporting it again with marnet-export "
        "--steps auto or --steps 0, which add 'zero'"
    )
    with pytest.raises(InvalidInput, match=message):
        Classifier(bundle_of("torchscript", "fp32"), operating_point="zero")


def test_noise_of_an_image_s_own_is_met_by_the_loop_alone(zero, paths, tmp_path):
    copy = tmp_path / "b"
    shutil.copytree(zero.bundle.path, copy)
    sampling = replace(zero.bundle.manifest.sampling, noise="image")
    reseal_bundle(copy, sampling=sampling)
    pixels = zero.preprocess.pixels(paths)
    np.testing.assert_array_equal(Classifier(copy).logits(pixels), zero.logits(pixels))


def test_a_threshold_holds_for_any_seed(zero, paths, tmp_path):
    copy = tmp_path / "b"
    shutil.copytree(zero.bundle.path, copy)
    sampling = zero.bundle.manifest.sampling
    point = replace(sampling.point, abstain_below=0.9)
    reseal_bundle(copy, sampling=replace(sampling, points=sampling.points | {"zero": point}))
    for answer in Classifier(copy, seed=5).predict(paths):
        assert answer.abstain == (answer.score < 0.9)


def test_numbers_that_are_none_are_blamed_on_the_branch(zero, paths, monkeypatch):
    wrapped = zero._guard.check()
    bias = np.full_like(wrapped.head.classifier_bias, np.nan)
    monkeypatch.setattr(
        zero._guard,
        "_backend",
        WithAlignment(wrapped.backend, replace(wrapped.head, classifier_bias=bias)),
    )
    message = "the logits of .* hold NaN or infinity, in the alignment branch behind the encoder"
    with pytest.raises(InferenceError, match=message):
        zero.predict(paths)


def test_a_bundle_that_lost_its_head_says_to_export_it_again(zero, tmp_path):
    copy = tmp_path / "b"
    shutil.copytree(zero.bundle.path, copy)
    (copy / "payload/alignment.safetensors").unlink()
    reseal_bundle(copy)
    message = r"operating point 'zero' needs payload/alignment\.safetensors; export it again"
    with pytest.raises(BundleFormatError, match=message):
        read_bundle(copy)


def test_golden_answers_hold_the_head_to_its_export(zero, tmp_path):
    copy = tmp_path / "b"
    shutil.copytree(zero.bundle.path, copy)
    file = copy / "payload/alignment.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"classifier_weight": -arrays["classifier_weight"]}, file)
    reseal_bundle(copy)
    with pytest.raises(SelfTestFailed, match="golden logits differ by"):
        Classifier(copy)


OTHER_THREADS = """
import os
from pathlib import Path

import numpy as np

from marnet_sdk.alignment import AlignmentHead

def ran():  # how long the other threads of this process did, in nanoseconds
    tasks = (Path("/proc/self/task") / task for task in os.listdir("/proc/self/task"))
    others = (task for task in tasks if task.name != str(os.getpid()))
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in others}

ones = lambda *shape: np.ones(shape, np.float32)
head = AlignmentHead(ones(384, 1280), ones(384), ones(1000, 384), ones(1000))
before = ran()
for rows in (1, 2, 3, 16, 17, 64):
    head(ones(rows, 1280))
print([task for task, nanoseconds in ran().items() if nanoseconds != before.get(task)])
"""


def test_the_head_leaves_all_cores_but_one_to_the_encoder():
    """Threads of NumPy would wait for more work on them, while the next images are encoded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "OPENBLAS_"))}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_THREADS],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


@given(st.integers(0, 40), st.integers(1, 3000), st.integers(1, 300))
def test_a_product_in_parts_is_the_product(rows, width, outputs):
    rng = np.random.default_rng(rows + width + outputs)
    x, weight = rng.standard_normal((rows, width)), rng.standard_normal((outputs, width))
    got = product(x.astype(np.float32), weight.astype(np.float32))
    assert got.dtype == np.float32
    assert got.shape == (rows, outputs)
    np.testing.assert_allclose(got, x @ weight.T, rtol=0, atol=FLOAT32_LAYER * np.sqrt(width) * 10)

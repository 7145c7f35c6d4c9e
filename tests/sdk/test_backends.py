"""Backends are leaves: opened by name, fed with NumPy, and clear about what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from marnet_sdk.backends import BACKENDS, Tables, make_tables, open_backend
from marnet_sdk.backends.onnxruntime import _at_least_two_steps
from marnet_sdk.bundle import read_bundle
from marnet_sdk.errors import BackendUnavailable, BundleFormatError
from marnet_sdk.trajectory import draw_trajectory, fold

SAMPLING = {"seed": 3, "timesteps": (9, 5, 2), "train_steps": 9, "width": 4}


@pytest.fixture
def plan(tmp_path):
    def write(**extra: np.ndarray):
        rng = np.random.default_rng(0)
        tensors = {
            "coefficients": rng.random((3, 4), np.float32),
            "time_bias": rng.random((3, 6), np.float32),
        }
        save_file(tensors | extra, tmp_path / "plan.safetensors")
        return tmp_path / "plan.safetensors"

    return write


def test_tables_fold_the_noise_where_the_plan_carries_the_hidden_state(plan):
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    tables = make_tables(plan(input_weight=weight), **SAMPLING)
    trajectory = draw_trajectory(3, (9, 5, 2), 9, 4)
    expected = fold(trajectory, weight)
    np.testing.assert_array_equal(tables.initial, expected[0])
    np.testing.assert_array_equal(tables.noise, expected[1])
    assert (tables.initial.shape, tables.noise.shape) == ((1, 6), (3, 6))


def test_tables_hold_the_noise_itself_where_the_plan_carries_the_feature(plan):
    tables = make_tables(plan(), **SAMPLING)
    trajectory = draw_trajectory(3, (9, 5, 2), 9, 4)
    np.testing.assert_array_equal(tables.noise, trajectory.steps.astype(np.float32))
    np.testing.assert_array_equal(tables.initial[0], trajectory.initial.astype(np.float32))
    assert {array.dtype for array in tables.named().values()} == {np.dtype(np.float32)}


def test_the_order_of_the_tables_is_that_of_the_graphs_inputs(bundle_of):
    import onnxruntime

    model = bundle_of("onnxruntime", "fp16") / "payload/model.onnx"
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    empty = np.empty(0, np.float32)
    assert names == ["pixels", *Tables(empty, empty, empty, empty).named()]
    assert [entry.name for entry in session.get_outputs()] == ["logits", "features"]


def test_a_single_step_is_preceded_by_one_that_changes_nothing():
    """x = 1 x + 0 x0 + 0 previous + 0 z; two steps and more are left as they are."""
    one = Tables(
        initial=np.ones((1, 4), np.float32),
        coefficients=np.array([[0, 1, 0, 0]], np.float32),
        time_bias=np.full((1, 6), 2, np.float32),
        noise=np.full((1, 4), 3, np.float32),
    )
    two = _at_least_two_steps(one)
    assert two.coefficients.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert (two.time_bias.shape, two.noise.shape) == ((2, 6), (2, 4))
    assert two.time_bias[1].tolist() == one.time_bias[0].tolist()
    assert _at_least_two_steps(two) is two


def test_an_unknown_backend_is_refused_with_those_that_are_known(tmp_path):
    message = "backend 'openvino' is unknown to this version.*onnxruntime, torchscript; upgrade"
    with pytest.raises(BundleFormatError, match=message):
        open_backend("openvino", tmp_path / "payload", "fp32", None)


@pytest.mark.parametrize(
    ("backend", "compute", "message"),
    [
        ("onnxruntime", "bf16", "onnxruntime computes in fp32 on a CPU, the bundle asks bf16"),
        ("torchscript", "fp16", "torchscript computes in fp32 or bf16, the bundle asks fp16"),
    ],
)
def test_a_type_that_a_backend_cannot_compute_in_is_refused(tmp_path, backend, compute, message):
    with pytest.raises(BackendUnavailable, match=message):
        open_backend(backend, tmp_path, compute, None)


@pytest.mark.parametrize(
    ("backend", "name"), [("onnxruntime", "model.onnx"), ("torchscript", "model.pt")]
)
def test_a_graph_that_cannot_be_loaded_names_file_and_version(tmp_path, backend, name):
    (tmp_path / name).write_bytes(b"not a graph")
    with pytest.raises(BackendUnavailable, match=rf" \d+\.\d+\S* cannot (open|load) .*{name}"):
        open_backend(backend, tmp_path, "fp32", None)


@pytest.fixture
def inputs(bundle_of) -> Callable[[str], tuple[Path, np.ndarray, Tables]]:
    """backend -> the payload of an fp16 bundle, its golden pixels, its tables."""

    def make(backend: str):
        bundle = read_bundle(bundle_of(backend, "fp16"))
        sampling = bundle.manifest.sampling
        tables = make_tables(
            bundle.path / "payload/plan.safetensors",
            seed=sampling.seed,
            timesteps=sampling.timesteps,
            train_steps=sampling.train_steps,
            width=sampling.width,
        )
        pixels = load_file(bundle.path / "golden/answers.safetensors")["pixels"]
        return bundle.path / "payload", pixels, tables

    return make


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_arrays_that_must_not_be_written_to_are_taken_silently(backend, inputs):
    payload, pixels, tables = inputs(backend)
    opened = open_backend(backend, payload, "fp32", 1)
    expected = opened.run(pixels, tables)[0]
    for array in (pixels, *tables.named().values()):
        array.flags.writeable = False
    np.testing.assert_array_equal(opened.run(pixels, tables)[0], expected)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_caller_s_autocast_does_not_change_what_torchscript_answers(compute, inputs):
    import torch

    payload, pixels, tables = inputs("torchscript")
    opened = open_backend("torchscript", payload, compute, 1)
    expected = opened.run(pixels, tables)
    with torch.autocast("cpu", torch.bfloat16):
        got = opened.run(pixels, tables)
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_onnxruntime_s_idle_threads_do_not_spin(inputs):
    opened: Any = open_backend("onnxruntime", inputs("onnxruntime")[0], "fp32", 2)
    options = opened._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_backend_takes_and_gives_float32_arrays_and_changes_none(backend, inputs):
    payload, pixels, tables = inputs(backend)
    arrays = [pixels, *tables.named().values()]
    before = [array.copy() for array in arrays]
    opened = open_backend(backend, payload, "fp32", 1)
    logits, features = opened.run(pixels, tables)
    again = opened.run(pixels, tables)[0]
    assert (type(logits), type(features)) == (np.ndarray, np.ndarray)
    assert (logits.dtype, features.dtype) == (np.float32, np.float32)
    assert (len(logits), len(features)) == (8, 8)
    np.testing.assert_array_equal(again, logits)
    for array, original in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, original)

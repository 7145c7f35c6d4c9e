"""Backends are leaves: opened by name, fed with NumPy, and clear about what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick import kept
from safetensors.numpy import load_file
from tolerances import FLOAT32_LAYER

from marnet_sdk.backends import BACKENDS, open_backend
from marnet_sdk.bundle import OperatingPoint, Sampling, read_bundle
from marnet_sdk.errors import BackendUnavailable, BundleFormatError
from marnet_sdk.noise.tables import Tables, make_tables
from marnet_sdk.noise.trajectory import draw_trajectory, fold

RNG = np.random.default_rng(0)
TIMESTEPS = (9, 5, 2)
SAMPLING = Sampling(
    points={
        "exact": OperatingPoint("ddpm", 0.0, TIMESTEPS, 1, None),
        "fast": OperatingPoint("ddim", 0.0, (9,), 1, None),
    },
    default="exact",
    train_steps=9,
    noise="shared",
    seed=0,
    width=4,
)
PLAN = {
    "time_bias": RNG.random((9, 6), np.float32),
    "input_weight": RNG.standard_normal((6, 4)).astype(np.float32),
    "output_bias": RNG.random(4, np.float32),
    "coefficients.exact": RNG.random((3, 4)),
    "coefficients.fast": RNG.random((1, 4)),
}


def folded(seed: int, trajectories: list[int]) -> np.ndarray:
    """The bias of the operating point "exact", [S, K, H], folded by hand."""
    drawn = [draw_trajectory(seed, TIMESTEPS, 9, 4, trajectory=k) for k in trajectories]
    rows = PLAN["time_bias"][[8, 4, 1]]  # t = 9, 5, 2
    table = PLAN["coefficients.exact"]
    return fold(drawn, table, rows, PLAN["input_weight"], PLAN["output_bias"]).astype(np.float32)


def test_tables_hold_the_noise_and_the_time_of_the_steps_that_are_visited():
    tables = make_tables(PLAN, SAMPLING, "exact", seed=3, samples=1)
    np.testing.assert_array_equal(tables.bias[:, 0], folded(3, [0]))
    want = PLAN["coefficients.exact"][:, :3].astype(np.float32)
    np.testing.assert_array_equal(tables.coefficients, want)
    assert tables.bias.dtype == tables.coefficients.dtype == np.float32
    fast = make_tables(PLAN, SAMPLING, "fast", seed=3, samples=1)
    assert (fast.bias.shape, fast.coefficients.shape) == ((1, 1, 1, 6), (1, 3))


def test_samples_are_trajectories_of_one_seed():
    tables = make_tables(PLAN, SAMPLING, "exact", seed=3, samples=4)
    assert tables.bias.shape == (3, 1, 4, 6)
    np.testing.assert_array_equal(tables.bias[:, 0], folded(3, [0, 1, 2, 3]))
    np.testing.assert_array_equal(tables.samples(1, 3).bias[:, 0], folded(3, [1, 2]))
    assert len({row.tobytes() for row in tables.bias[0, 0]}) == 4


def test_noise_keyed_by_image_has_a_row_for_each_that_depends_on_its_key_alone():
    keys = [7, 2**64 - 1, 7]
    tables = make_tables(PLAN, SAMPLING, "exact", seed=3, samples=2, keys=keys)
    assert tables.bias.shape == (3, 3, 2, 6)
    np.testing.assert_array_equal(tables.bias[:, 0], folded(3, [7, 8]))
    np.testing.assert_array_equal(tables.bias[:, 1], folded(3, [2**64 - 1, 0]))  # wraps around
    np.testing.assert_array_equal(tables.bias[:, 2], tables.bias[:, 0])
    chosen = tables.rows(np.array([1]))
    np.testing.assert_array_equal(chosen.bias, tables.bias[:, 1:2])
    shared = make_tables(PLAN, SAMPLING, "exact", seed=3, samples=2)
    assert shared.rows(np.array([1, 0])) is shared


def test_a_single_step_is_preceded_by_one_that_changes_nothing():
    """x = 1 x + 0 x0 + 0 previous; two steps and more are left as they are."""
    one = Tables(np.array([[0, 1, 0]], np.float32), np.full((1, 1, 2, 6), 2, np.float32))
    two = one.at_least_two_steps()
    assert two.coefficients.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert two.bias.shape == (2, 1, 2, 6)
    assert two.bias[1].tolist() == one.bias[0].tolist()
    assert two.at_least_two_steps() is two


def test_an_unknown_backend_is_refused_with_those_that_are_known(tmp_path):
    message = f"backend 'abacus' is unknown to this version.*{', '.join(sorted(BACKENDS))}; upgrade"
    with pytest.raises(BundleFormatError, match=message):
        open_backend("abacus", tmp_path / "payload", "fp32", None)


# A bundle of aotinductor takes a minute of g++; `make test` has it in test_builder_aotinductor.
ON_A_CPU = kept(sorted(set(BACKENDS) - {"tensorrt"}), {"onnxruntime", "openvino", "torchscript"})


@pytest.mark.parametrize(
    ("backend", "compute", "message"),
    [
        (
            "onnxruntime",
            "bf16",
            "onnxruntime computes in fp32 on a CPU, the bundle asks bf16",
        ),
        (
            "torchscript",
            "fp16",
            "torchscript computes in fp32 or bf16 on a CPU, the bundle asks fp16",
        ),
    ],
)
def test_a_type_that_a_backend_cannot_compute_in_is_refused(tmp_path, backend, compute, message):
    with pytest.raises(BackendUnavailable, match=message):
        open_backend(backend, tmp_path, compute, None)


@pytest.mark.parametrize(("backend", "suffix"), [("onnxruntime", "onnx"), ("torchscript", "pt")])
@pytest.mark.parametrize("broken", ["encoder", "refine"])
def test_a_graph_that_cannot_be_loaded_names_file_and_version(
    tmp_path, bundle_of, backend, suffix, broken
):
    for graph in ("encoder", "refine"):
        name = f"{graph}.{suffix}"
        sound = (bundle_of(backend, "fp16") / "payload" / name).read_bytes()
        (tmp_path / name).write_bytes(b"not a graph" if graph == broken else sound)
    message = rf" \d+\.\d+\S* cannot (open|load) .*{broken}.{suffix}"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend(backend, tmp_path, "fp32", None)


Inputs = Callable[[str], tuple[Path, np.ndarray, Tables]]


@pytest.fixture
def inputs(bundle_of) -> Inputs:
    """backend -> the payload of a bundle, its golden pixels, tables of two samples."""

    def make(backend: str):
        bundle = read_bundle(bundle_of(backend, "fp32"))
        plan = load_file(bundle.path / "payload/plan.safetensors")
        sampling = bundle.manifest.sampling
        tables = make_tables(plan, sampling, sampling.default, seed=0, samples=2)
        pixels = load_file(bundle.path / "golden/answers.safetensors")["pixels"]
        return bundle.path / "payload", pixels, tables

    return make


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_arrays_that_must_not_be_written_to_are_taken_silently(backend, inputs):
    payload, pixels, tables = inputs(backend)
    opened = open_backend(backend, payload, "fp32", 1)
    x_v = opened.encode(pixels)
    expected = opened.refine(x_v, tables)[0]
    for array in (pixels, x_v, tables.coefficients, tables.bias):
        array.flags.writeable = False
    np.testing.assert_array_equal(opened.encode(pixels), x_v)
    np.testing.assert_array_equal(opened.refine(x_v, tables)[0], expected)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_caller_s_autocast_does_not_change_what_torchscript_answers(compute, inputs):
    import torch

    payload, pixels, tables = inputs("torchscript")
    opened = open_backend("torchscript", payload, compute, 1)
    x_v = opened.encode(pixels)
    expected = opened.refine(x_v, tables)
    with torch.autocast("cpu", torch.bfloat16):
        got = (opened.encode(pixels), *opened.refine(x_v, tables))
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(got, (x_v, *expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_onnxruntime_s_threads_spin_inside_a_call_only(inputs):
    opened: Any = open_backend("onnxruntime", inputs("onnxruntime")[0], "fp32", 2)
    options = opened._encoder.get_session_options()  # all sessions are opened by one function
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_backend_takes_and_gives_float32_arrays_and_changes_none(backend, inputs):
    payload, pixels, tables = inputs(backend)
    opened = open_backend(backend, payload, "fp32", 1)
    x_v = opened.encode(pixels)
    arrays = [pixels, x_v, tables.coefficients, tables.bias]
    before = [array.copy() for array in arrays]
    logits, features = opened.refine(x_v, tables)
    again = opened.refine(x_v, tables)[0]
    assert [type(a) for a in (x_v, logits, features)] == [np.ndarray] * 3
    assert [a.dtype for a in (x_v, logits, features)] == [np.float32] * 3
    assert (len(x_v), logits.shape[:2], features.shape[:2]) == (8, (8, 2), (8, 2))
    np.testing.assert_array_equal(again, logits)
    for array, original in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_noise_may_have_one_row_for_all_images_or_one_for_each(backend, inputs):
    payload, pixels, tables = inputs(backend)
    opened = open_backend(backend, payload, "fp32", 1)
    x_v = opened.encode(pixels)
    expected = opened.refine(x_v, tables)[0]
    each = replace(tables, bias=np.repeat(tables.bias, len(x_v), axis=1))
    each.bias[:, 3] += 1  # one image's noise is its own
    got = opened.refine(x_v, each)[0]
    others = np.arange(len(x_v)) != 3
    scale = np.abs(expected).max()
    assert np.abs(got - expected)[others].max() <= FLOAT32_LAYER * scale
    assert np.abs(got - expected)[3].max() > 100 * FLOAT32_LAYER * scale

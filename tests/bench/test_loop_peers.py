"""The plain loop in every framework is the model's own loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bf16 import HAS_BF16
from compilers import need_compiler
from quick import kept
from tiny import make_model
from tolerances import FLOAT32_LAYER

from loop_peers import PEERS
from marnet_bench.plain_loop import (
    PRECISIONS,
    Logits,
    Problem,
    make_problem,
    reference,
)
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats

# Weights or activations of 8 bits, or products of bfloat16, in seven steps of a tiny network.
COARSE = 2e-2
WIDTH = 10  # of x_v
DIM = {"dim": 768}  # the fused width, which element by element must be the text's
SAMPLERS, STEPS = ("ddpm", "dpmpp"), (2, 7)
ABSENT = {
    ("ONNX Runtime Scan", "bf16"): "no bfloat16",
    ("OpenVINO Loop", "int8"): "keeps float32 weights",
}
UNCOMPILED = [name for name in PEERS if name != "torch.compile"]


@pytest.fixture(
    scope="module",
    params=kept([(s, n) for s in SAMPLERS for n in STEPS], {("dpmpp", 7)}),
    ids=str,
)
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(make_model(), *request.param, seed=3)


def features(count: int) -> Floats:
    """Random x_v, [count, D_v], of about the scale that the tiny model standardises."""
    return (3 * np.random.default_rng(0).standard_normal((count, WIDTH))).astype(np.float32)


def relative_error(logits: Logits, problem: Problem, count: int) -> float:
    x_v = features(count)
    wanted = reference(problem)(x_v)
    got = logits(x_v)
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def test_the_reference_is_the_model_itself(problem):
    x_v = torch.from_numpy(features(5))
    initial = problem.initial.expand(5, -1)
    with torch.no_grad():
        refined = problem.model.refine(x_v, problem.table, initial, problem.noise)
        wanted = problem.model.classifier(problem.model.fuse(x_v, refined))
    np.testing.assert_array_equal(reference(problem)(x_v.numpy()), wanted.numpy())


@pytest.mark.parametrize("name", UNCOMPILED)
def test_every_peer_runs_the_same_loop_at_any_batch_size(problem, name):
    peer = PEERS[name]
    if "fp32" not in peer.precisions:
        return
    logits = peer.open(problem, "fp32", 1)
    for count in (1, 5, 64):
        assert relative_error(logits, problem, count) < FLOAT32_LAYER


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("name", UNCOMPILED)
def test_coarser_precisions_stay_near_or_say_why_they_are_absent(problem, name, precision):
    if precision not in PEERS[name].precisions:
        return
    if (name, precision) in ABSENT:
        with pytest.raises(BackendUnavailable, match=ABSENT[name, precision]):
            PEERS[name].open(problem, precision, 1)
        return
    if precision == "bf16" and name.startswith("OpenVINO") and not HAS_BF16:
        with pytest.raises(BackendUnavailable, match="openvino would emulate it slowly"):
            PEERS[name].open(problem, precision, 1)
        return
    logits = PEERS[name].open(problem, precision, 1)
    for count in (1, 5):
        assert 0 <= relative_error(logits, problem, count) < COARSE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_a_compiled_step_is_the_same_loop():
    """Once: compiling takes seconds."""
    need_compiler()
    problem = make_problem(make_model(), "dpmpp", 7)
    assert relative_error(PEERS["torch.compile"].open(problem, "fp32", 1), problem, 5) < 1e-5
    with pytest.raises(BackendUnavailable, match="packed weights"):
        PEERS["torch.compile"].open(problem, "int8", 1)


@pytest.mark.parametrize("fusion", kept(["add", "mul"], {"add"}))
@pytest.mark.parametrize("name", ["ONNX Runtime Scan", "OpenVINO TensorIterator", "TorchScript"])
def test_other_fusions_are_written_out_as_well(name, fusion):
    problem = make_problem(make_model(fusion=fusion, **DIM), "ddpm", 3)
    assert relative_error(PEERS[name].open(problem, "fp32", 1), problem, 5) < FLOAT32_LAYER


@pytest.mark.parametrize("name", ["ONNX Runtime Scan", "OpenVINO TensorIterator"])
def test_a_fusion_that_a_graph_lacks_is_named(name):
    problem = make_problem(make_model(fusion="hm", **DIM), "ddpm", 3)
    with pytest.raises(BackendUnavailable, match="not for hm"):
        PEERS[name].open(problem, "fp32", 1)


def test_noise_and_its_scale_reach_every_step():
    """Another seed gives other logits; the noise of the last step is not used."""
    model = make_model()
    one, other = (make_problem(model, "ddpm", 7, seed=seed) for seed in (0, 1))
    assert not np.allclose(reference(one)(features(3)), reference(other)(features(3)))
    scaled = one.scaled_noise.numpy()
    assert (np.abs(scaled[:-1]).max(axis=(1, 2)) > 0).all()
    assert not scaled[-1].any()


def test_only_samplers_of_second_order_carry_the_estimate_before():
    model = make_model()
    assert [make_problem(model, s, 7).second_order for s in SAMPLERS] == [False, True]


def test_every_peer_is_asked_for_known_precisions():
    for peer in PEERS.values():
        assert set(peer.precisions) <= set(PRECISIONS)

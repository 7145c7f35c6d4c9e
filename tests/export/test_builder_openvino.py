"""What is built for OpenVINO: one file for every table, in the types that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from bf16 import bf16_only
from calibration import calibrate
from quick import kept
from tiny import make_model, plain_refine, tables_of
from tolerances import BF16_LAYER, BUILT, FLOAT32_LAYER

from marnet_export.build.builder import Order
from marnet_export.build.openvino.graphs import ENCODER, REFINE, build_encoder, build_refine
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import SamplingPlan, make_plan
from marnet_sdk.backends import Backend, open_backend
from marnet_sdk.backends.openvino import load_openvino
from marnet_sdk.noise.tables import Floats, Tables
from marnet_train.diffusion import SAMPLERS, sampler_table
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone
from marnet_train.models.marnet import MARNet

CORE = load_openvino().Core()
HOW = [
    pytest.param("fp32", "fp32", marks=pytest.mark.slow),
    ("fp16", "fp32"),
    pytest.param("bf16", "fp32", marks=pytest.mark.slow),
    pytest.param("bf16", "bf16", marks=(bf16_only, pytest.mark.slow)),
    ("int8", "fp32"),
]
KEYS = [5, 2**64 - 4, 5, 0, 7]
TRANSFORMER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 24, "image_size": 32, "patch_size": 8, **TRANSFORMER},
    "dinov2": {"hidden_size": 24, "image_size": 32, "patch_size": 8, **TRANSFORMER},
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2],
             "num_heads": [2, 2], "window_size": 4},
    "convnext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
}  # fmt: skip


def build(model: MARNet, types: Types, payload: Path, carry: str | None = None) -> SamplingPlan:
    """Trace with an image of noise: values must not matter."""
    payload.mkdir()
    plan = make_plan(model, carry)
    lowered = lower_marnet(model, plan)
    calibration = calibrate(model, plan=plan)
    build_encoder(lowered, torch.rand(2, 3, 32, 32), types, payload, Order(calibration=calibration))
    build_refine(lowered, types, payload, Order(calibration=calibration))
    return plan


Built = tuple[MARNet, SamplingPlan, Backend]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[..., Built]:
    """Storage and compute type, carry -> a small model, its plan and what was built of it."""
    known: dict[tuple[str, ...], Built] = {}

    def make(storage: str = "fp32", compute: str = "fp32", carry: str = "hidden") -> Built:
        key = storage, compute, carry
        if key not in known:
            payload = tmp_path_factory.mktemp("built") / "payload"
            model = make_model(hidden=16, dim=64, condition=16)
            plan = build(model, Types(storage, compute), payload, carry)
            known[key] = model, plan, open_backend("openvino", payload, compute, 1)
        return known[key]

    return make


def features_of(model: MARNet, count: int) -> Floats:
    """x_v [count, D_v], spread as the model's statistics say."""
    noise = np.random.default_rng(1).standard_normal((count, len(model.vision_mean)))
    return (noise * model.vision_std.numpy() + model.vision_mean.numpy()).astype(np.float32)


def assert_close(got: Floats, want: Floats, tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", kept([1, 2, 7, 100], {1, 7}))
def test_one_file_serves_every_sampler_length_batch_and_kind_of_noise(built, carry, sampler, steps):
    model, plan, backend = built(carry=carry)
    assert plan.carry == carry
    table = sampler_table(model.config.schedule, sampler, steps)
    x_v = features_of(model, 5)
    for samples in (1, 3):
        for keys in (None, KEYS):
            for batch in (1, 2, 5):
                noise = {"seed": 9, "samples": samples, "keys": keys and keys[:batch]}
                got = backend.refine(x_v[:batch], tables_of(model, plan, table, **noise))
                want = plain_refine(model, table, x_v[:batch], **noise)
                for one, other in zip(got, want, strict=True):
                    assert_close(one, other, FLOAT32_LAYER)


@pytest.mark.parametrize("row", [0, 5])
def test_a_single_step_that_looks_back_is_enough_to_look_back(built, row):
    """The file holds two loops; whether C is zero in every step decides."""
    model, plan, backend = built()
    table = sampler_table(model.config.schedule, "ddpm", 7)
    coefficients = table.coefficients.copy()
    coefficients[row, 2] = 0.5
    changed = replace(table, coefficients=coefficients)
    x_v = features_of(model, 2)
    plain, back = (backend.refine(x_v, tables_of(model, plan, t))[0] for t in (table, changed))
    # Before the first step there is no estimate.
    assert (np.abs(plain - back).max() > 1e-4) == (row > 0)
    if row == 0:
        assert_close(back, plain, FLOAT32_LAYER)


@pytest.mark.parametrize("fusion", kept(["concat", "add", "mul", "sum", "hm"], {"concat", "hm"}))
def test_every_fusion_is_built(fusion, tmp_path):
    model = make_model(fusion=fusion, dim=768)  # as wide as the image features
    plan = build(model, Types("fp32", "fp32"), tmp_path / "payload")
    table = sampler_table(model.config.schedule, "ddim", 5)
    x_v = features_of(model, 3)
    x_v[2] *= 1e3  # sums and products that exp and log of float32 do not reach
    backend = open_backend("openvino", tmp_path / "payload", "fp32", 1)
    got = backend.refine(x_v, tables_of(model, plan, table, samples=2))
    want = plain_refine(model, table, x_v, samples=2)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, FLOAT32_LAYER)


def encoder(kind: str) -> VisionEncoder:
    torch.manual_seed(0)
    config = backbone_config({"model_type": kind, **VISION[kind]})
    return VisionEncoder(build_backbone(config)).eval()


def model_around(vision: VisionEncoder) -> MARNet:
    model = make_model(condition=vision.dim)
    model.vision = vision
    return model


@pytest.mark.parametrize("kind", kept(VISION, {"vit"}))
def test_encoders_of_every_family_take_any_batch(kind, tmp_path):
    model = model_around(encoder(kind))
    build(model, Types("fp32", "fp32"), tmp_path / "payload")
    backend = open_backend("openvino", tmp_path / "payload", "fp32", 1)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        want = model.vision(pixels).numpy()
    for batch in (1, 2, 5):
        assert_close(backend.encode(pixels[:batch].numpy()), want[:batch], FLOAT32_LAYER)


@bf16_only
def test_layer_normalisation_stays_in_float32_where_products_are_in_bfloat16(tmp_path):
    model = model_around(encoder("vit"))
    build(model, Types("bf16", "bf16"), tmp_path / "payload")
    settings = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = CORE.compile_model(tmp_path / "payload/encoder.xml", "CPU", settings)
    ran: dict[str, set[str]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        ran.setdefault(about["layerType"], set()).add(about["runtimePrecision"])
    assert ran["MVN"] == {"f32"}
    assert ran["FullyConnected"] == {"bf16"}


@bf16_only
@pytest.mark.parametrize(
    "shares", kept([(1.0, 0.0), (0.5, 0.5)], {(0.5, 0.5)}), ids=["B", "B and C"]
)
def test_the_loop_s_state_is_summed_in_float32(shares, tmp_path):
    """2,000 steps of 2^-10 each: a sum in bfloat16 would stop growing at 1 / 4."""
    width, one = 16, np.eye(16)
    constant = np.outer(one[0], one[15])  # what channel 15 holds, into channel 0
    model = make_model(hidden=width, dim=width)
    plan = replace(
        make_plan(model, "hidden"),
        condition_weight=np.zeros((width, 10)),
        hidden2=(one - np.outer(one[15], one[15]), one[15]),  # channel 15 holds 1
        hidden3=(one, 0 * one[0]),
        carry_weight=constant,  # channel 0 of the state counts the steps
        output=(one, 0 * one[0]),
    )
    types = Types("bf16", "bf16")
    lowered = lower_marnet(model, plan)
    build_encoder(lowered, torch.rand(2, 3, 32, 32), types, tmp_path)
    build_refine(lowered, types, tmp_path)
    steps = 2001
    coefficients = np.tile(np.array([[1, *shares]]) * [1, 2**-10, 2**-10], (steps, 1))
    bias = np.zeros((steps, 1, 1, width), np.float32)
    tables = Tables(coefficients.astype(np.float32), bias)
    features = open_backend("openvino", tmp_path, "bf16", 1).refine(features_of(model, 1), tables)[
        1
    ]
    assert features[0, 0, -width] == pytest.approx(2000 / 1024, rel=BF16_LAYER)


@pytest.mark.parametrize(("storage", "compute"), HOW)
def test_labels_are_those_of_the_float32_model_whatever_the_types(built, storage, compute):
    model, plan, backend = built(storage, compute)
    table = sampler_table(model.config.schedule, "ddpm", 50)
    x_v = features_of(model, 200)
    got = backend.refine(x_v, tables_of(model, plan, table))[0]
    want = plain_refine(model, table, x_v)[0]
    tolerance = BUILT.get(storage, BUILT["bf16"])
    assert_close(got, want, tolerance)
    ranked = np.sort(want, axis=-1)
    decided = ranked[..., -1] - ranked[..., -2] > tolerance * np.abs(want).max()
    assert decided.mean() > 0.5
    assert (got.argmax(-1) == want.argmax(-1))[decided].all()


STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}


def stored_elements(payload: Path) -> dict[torch.dtype, int]:
    """Number of stored weights per type, read back from the built files."""
    counts: dict[torch.dtype, int] = {}
    for name in (ENCODER, REFINE):
        # Two constants of the same content are one place in the file.
        places = {
            (data.get("offset"), data.get("size")): data
            for data in ElementTree.parse(payload / name).iter("data")
            if data.get("offset") is not None
        }
        for data in places.values():
            if dtype := STORED.get(data.get("element_type", "")):
                size = int(data.get("size", 0)) // dtype.itemsize
                counts[dtype] = counts.get(dtype, 0) + size
    return counts


@pytest.mark.parametrize("storage", kept(["fp32", "fp16", "bf16"], {"fp16"}))
def test_matrices_are_stored_in_the_type_that_was_asked(storage, tmp_path):
    model = make_model(hidden=48, dim=32)
    build(model, Types(storage, "fp32"), tmp_path / "payload")
    stored = stored_elements(tmp_path / "payload")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    assert set(stored) == {dtype, torch.float32}  # vectors stay in float32
    assert stored[dtype] / sum(stored.values()) > 0.9
    parts = (model.vision, model.project_vision, model.classifier)
    weights = sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1)
    plan = make_plan(model)
    weights += sum(matrix.size for matrix in plan.matrices().values())  # each once
    if storage != "fp32":
        assert stored[dtype] == weights


def test_a_row_of_zeros_is_stored_in_int8_too(tmp_path):
    model = make_model(hidden=48, dim=32)
    with torch.no_grad():
        model.denoiser.layer2.weight[3] = 0
    plan = build(model, Types("int8", "fp32"), tmp_path / "payload")
    backend = open_backend("openvino", tmp_path / "payload", "fp32", 1)
    table = sampler_table(model.config.schedule, "ddpm", 7)
    x_v = features_of(model, 2)
    got = backend.refine(x_v, tables_of(model, plan, table))[0]
    assert_close(got, plain_refine(model, table, x_v)[0], BUILT["bf16"])


def test_the_loop_is_an_iterator_and_its_weights_are_in_the_file_once(tmp_path):
    sizes = {}
    for steps in (10, 1000):
        model = make_model(steps=steps, hidden=64, dim=48)
        build(model, Types("fp16", "fp32"), tmp_path / str(steps))
        sizes[steps] = (tmp_path / str(steps) / "refine.bin").stat().st_size
    assert sizes[10] == sizes[1000]
    weights = sum(matrix.size for matrix in make_plan(model).matrices().values())
    weights += model.project_vision.weight.numel() + model.classifier.weight.numel()
    assert sizes[10] < 1.1 * 2 * weights
    layers = ElementTree.parse(tmp_path / "10" / "refine.xml").iter("layer")
    kinds = [layer.get("type") for layer in layers]
    assert (kinds.count("TensorIterator"), kinds.count("If")) == (2, 0)


def test_building_leaves_the_model_as_it_was(tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build(model, Types("fp16", "fp32"), tmp_path / "payload")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted(path.name for path in (tmp_path / "payload").iterdir()) == [
        "encoder.bin", "encoder.xml", "refine.bin", "refine.xml",
    ]  # fmt: skip

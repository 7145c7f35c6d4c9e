"""The receipt is read from what was built: every product, its size, and its types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bf16 import bf16_only
from calibration import calibrate
from quick import kept
from tiny import make_model
from torch import nn

from marnet_export.build.builder import Order, builder
from marnet_export.build.types import Product, Types
from marnet_export.lower.class_token import for_class_token
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_export.prove.receipt import NOT_READ, check_delivered, count_products
from marnet_sdk.errors import VerificationFailed
from marnet_train.models.marnet import MARNet

SHAPE = (3, 32, 32)
VIT = {
    "model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
# backend, storage, compute
HOW = [
    pytest.param("openvino", "fp32", "fp32", marks=pytest.mark.slow),
    ("openvino", "fp16", "fp32"),
    ("openvino", "int8", "fp32"),
    pytest.param("openvino", "bf16", "bf16", marks=(bf16_only, pytest.mark.slow)),
    pytest.param("openvino", "int8", "bf16", marks=(bf16_only, pytest.mark.slow)),
    pytest.param("onnxruntime", "fp32", "fp32", marks=pytest.mark.slow),
    ("onnxruntime", "bf16", "fp32"),
    pytest.param("onnxruntime", "int8", "fp32", marks=pytest.mark.slow),
]
# Without the one that takes longest to build.
QUICKER = [*HOW[:6], pytest.param(*HOW[6], marks=pytest.mark.slow), *HOW[7:]]
Receipt = tuple[MARNet, list[Product]]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[..., Receipt]:
    """backend, types of encoder and loop, kind of encoder -> the model and its receipt."""
    known: dict[tuple[Any, ...], Receipt] = {}

    def make(
        backend: str,
        encoder: Types,
        loop: Types,
        *,
        kind: str = "resnet",
        carry: str = "hidden",
    ) -> Receipt:
        key = backend, encoder, loop, kind, carry
        if key not in known:
            size = {"hidden": 48, "dim": 32, "condition": 40}
            model = make_model(**size) if kind == "resnet" else make_model(**size, vision=VIT)
            plan, payload = make_plan(model, carry), tmp_path_factory.mktemp("receipt")
            lowered, calibration = lower_marnet(model, plan), calibrate(model, plan=plan, steps=4)
            module, pixels = builder(backend), torch.rand(2, *SHAPE)
            module.build_encoder(lowered, pixels, encoder, payload, Order(calibration=calibration))
            module.build_refine(lowered, loop, payload, Order(calibration=calibration))
            known[key] = model, module.products(payload, loop, SHAPE)
        return known[key]

    return make


def counted(receipt: list[Product], part: str) -> Counter[tuple[str, str]]:
    """Multiply-adds of a part by storage and compute type."""
    found: Counter[tuple[str, str]] = Counter()
    for product in receipt:
        if product.part == part:
            found[product.storage, product.compute] += product.multiply_adds
    return found


def weighted(module: nn.Module, *example: torch.Tensor) -> int:
    """Multiply-adds of the layers of a torch module for an input, counted as it runs."""
    total = 0

    def count(layer: nn.Linear | nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        module(*example)
    for handle in handles:
        handle.remove()
    return total


def multiplied_in(storage: str, compute: str) -> str:
    return "int8" if storage == "int8" else compute


@pytest.mark.parametrize(("backend", "storage", "compute"), HOW)
def test_every_product_of_a_convolutional_model_has_its_size_and_types(
    backend, storage, compute, built
):
    types = Types(storage, compute)
    model, receipt = built(backend, types, types)
    multiplied = multiplied_in(storage, compute)
    encoder = weighted(model.vision, torch.zeros(1, *SHAPE))
    assert counted(receipt, "encoder") == {(storage, multiplied): encoder}
    assert counted(receipt, "loop") == {(storage, multiplied): 3 * 48 * 48}
    plan = make_plan(model)
    once = 2 * 48 * 48 + plan.condition_weight.size + plan.output[0].size
    once += model.project_vision.weight.numel() + model.classifier.weight.numel()
    assert counted(receipt, "head").total() == once
    assert len({(p.part, p.name) for p in receipt}) == len(receipt)


@pytest.mark.parametrize(("backend", "storage", "compute"), QUICKER)
def test_attention_is_counted_and_has_no_stored_factor(backend, storage, compute, built):
    types = Types(storage, compute)
    model, receipt = built(backend, types, types, kind="vit")
    found = counted(receipt, "encoder")
    tokens, width, layers = 17, 24, 2
    attention = {k: n for k, n in found.items() if k[0] == "activation"}
    last = 2 * tokens * width  # of which the class token alone is read
    assert sum(attention.values()) == (layers - 1) * 2 * tokens * tokens * width + last
    if storage != "int8":
        assert {kind for _, kind in attention} == {compute}
    else:
        assert {kind for _, kind in attention} <= {"int8", compute}
    weights = {k: n for k, n in found.items() if k[0] != "activation"}
    expected = weighted(for_class_token(model.vision), torch.zeros(1, *SHAPE))
    assert weights == {(storage, multiplied_in(storage, compute)): expected}


@pytest.mark.parametrize("backend", kept(["onnxruntime", "openvino"], {"openvino"}))
@pytest.mark.parametrize(
    "parts", kept([("int8", "fp32"), ("fp32", "int8")], {("int8", "fp32")}), ids=str
)
def test_a_part_that_stayed_float_shows(parts, backend, built):
    """Whatever the types it is asked with, which are those of the loop."""
    encoder, loop = (Types(storage, "fp32") for storage in parts)
    _, receipt = built(backend, encoder, loop)
    for part, storage in zip(("encoder", "loop"), parts, strict=True):
        assert counted(receipt, part).keys() == {(storage, storage)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_loop_that_carries_the_feature_has_four_products(backend, built):
    types = Types("int8", "fp32")
    _, receipt = built(backend, types, types, carry="feature")
    assert counted(receipt, "loop") == {("int8", "int8"): 2 * 48 * 48 + 2 * 48 * 32}
    assert len([p for p in receipt if p.part == "loop"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_done_once_per_image_stays_float_in_int8(backend, built):
    types = Types("int8", "fp32")
    model, receipt = built(backend, types, types)
    found = counted(receipt, "head")
    assert found["int8", "int8"] == 2 * 48 * 48  # the last step
    plan = make_plan(model)
    once = plan.condition_weight.size + plan.output[0].size
    once += model.project_vision.weight.numel() + model.classifier.weight.numel()
    assert found["fp32", "fp32"] == once


@pytest.mark.parametrize("kind", kept(["resnet", "vit"], {"resnet"}))
def test_what_cannot_be_read_back_is_counted_on_the_model(kind, built):
    """As many multiply-adds of weights as are read from a graph that was built of it."""
    types = Types("bf16", "fp32")
    model, receipt = built("onnxruntime", types, types, kind=kind)
    found = count_products(lower_marnet(model, make_plan(model, "hidden")), SHAPE)
    assert {(p.storage, p.compute) for p in found} == {("not read back", "not read back")}
    read = {part: sum(p.multiply_adds for p in receipt if p.part == part) for part in
            ("encoder", "loop", "head")}  # fmt: skip
    assert {p.part: p.multiply_adds for p in found} == read


def test_what_cannot_be_read_back_is_no_reason_to_refuse():
    unread = [Product(part, part, 7, NOT_READ, NOT_READ) for part in ("encoder", "loop", "head")]
    fp16 = Types("fp16", "fp32")
    check_delivered(unread, {"encoder": fp16, "loop": fp16}, "torchscript")
    wrong = [Product("encoder", "layer", 7, "fp32", "fp32"), *unread[1:]]
    with pytest.raises(VerificationFailed, match="the encoder was asked to be stored in fp16"):
        check_delivered(wrong, {"encoder": fp16, "loop": fp16}, "torchscript")

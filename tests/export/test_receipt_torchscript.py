"""The receipt of a TorchScript payload: what the loaded modules execute, in which types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick import kept
from tiny import make_model
from torch import Tensor, nn

from marnet_export.build.torchscript import build_encoder, build_refine, products
from marnet_export.build.tracing import quiet
from marnet_export.build.types import Product, Types, Unread
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone

HOW = [("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
SHAPE = (3, 32, 32)
VIT = {"model_type": "vit", "hidden_size": 24, "image_size": 32, "patch_size": 8,
       "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}  # fmt: skip


def part(found: list[Product], name: str) -> list[Product]:
    return [product for product in found if product.part == name]


def types_of(found: list[Product]) -> set[tuple[str, str]]:
    return {(product.storage, product.compute) for product in found}


@pytest.mark.parametrize(
    ("storage", "compute"), kept(HOW, {("fp32", "fp32"), ("bf16", "bf16")}, many=True)
)
@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_every_product_is_counted_once_in_the_types_it_has(tmp_path, carry, storage, compute):
    model, types = make_model(hidden=48, dim=32), Types(storage, compute)
    lowered = lower_marnet(model, make_plan(model, carry))
    build_encoder(lowered, torch.rand(2, *SHAPE), types, tmp_path)
    build_refine(lowered, types, tmp_path)
    found = products(tmp_path, types, SHAPE)
    carried = [48 * 48] if carry == "hidden" else [32 * 48, 48 * 32]
    loop = part(found, "loop")
    assert sorted(p.multiply_adds for p in loop) == sorted([*carried, 48 * 48, 48 * 48])
    once = lowered.image_width * 48 + 2 * 48 * 48 + 48 * 32 + (carry == "feature") * 32 * 48
    head = model.project_vision.weight.numel() + model.classifier.weight.numel()
    assert sum(p.multiply_adds for p in part(found, "head")) == once + head
    assert sum(p.multiply_adds for p in part(found, "encoder")) == convolutions(model.vision)
    assert types_of(loop) == types_of(part(found, "encoder")) == {(storage, compute)}
    assert types_of(part(found, "head")) == {(storage, compute), (storage, "fp32")}


def convolutions(module: nn.Module) -> int:
    """Multiply-adds of the convolutions that a module runs for one image."""
    counted = []

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counted.append(layer.weight.numel() * out[0, 0].numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        module(torch.zeros(1, *SHAPE))
    return sum(counted)


@pytest.fixture
def vit_payload(tmp_path) -> Path:
    torch.manual_seed(0)
    vision = VisionEncoder(build_backbone(backbone_config(VIT))).eval()
    lowered, types = lower_marnet(make_model(condition=24)), Types("bf16", "bf16")
    build_encoder(replace(lowered, encoder=vision), torch.rand(2, *SHAPE), types, tmp_path)
    build_refine(lowered, types, tmp_path)
    return tmp_path


def test_attention_multiplies_activations_in_float32(vit_payload):
    encoder = part(products(vit_payload, Types("bf16", "bf16"), SHAPE), "encoder")
    tokens, width, layers = 17, 24, 2
    attention = [p for p in encoder if p.storage == "activation"]
    assert [(p.multiply_adds, p.compute) for p in attention] == [
        (2 * tokens**2 * width, "fp32")
    ] * layers
    weights = [p for p in encoder if p not in attention]
    assert types_of(weights) == {("bf16", "bf16")}
    patches = 16 * width * 3 * 8 * 8
    of_layers = layers * tokens * (4 * width**2 + 2 * width * 48)
    assert sum(p.multiply_adds for p in weights) == patches + of_layers
    assert "backbone.embeddings.patch_embeddings.projection.matrix" in {p.name for p in weights}


def test_types_are_read_from_the_file_and_not_from_what_was_asked(vit_payload):
    lied = products(vit_payload, Types("fp32", "bf16"), SHAPE)
    assert lied == products(vit_payload, Types("bf16", "bf16"), SHAPE)


def test_weights_that_cannot_be_told_apart_are_not_guessed(tmp_path):
    """Two layers of one size in two types: nothing says which of them is multiplied."""
    lowered, types = lower_marnet(make_model(hidden=48, dim=32)), Types("fp32", "fp32")
    build_encoder(lowered, torch.rand(2, *SHAPE), types, tmp_path)
    build_refine(lowered, types, tmp_path)
    with quiet():
        module = torch.jit.load(str(tmp_path / "refine.pt"))
        layer = module.loop.step.hidden2.matrix
        layer.data = layer.data.bfloat16()
        torch.jit.save(module, str(tmp_path / "refine.pt"))
    with pytest.raises(Unread, match=r"a weight \[48, 48\] may be any of .*hidden2.matrix"):
        products(tmp_path, types, SHAPE)


class Padded(nn.Module):
    """A convolution whose padding is a word, as MobileNet's and EfficientNet's in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding="same", bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.convolution(pixels).mean(dim=(2, 3))


def test_a_convolution_whose_padding_is_a_word_is_counted(tmp_path):
    lowered, types = lower_marnet(make_model(condition=8)), Types("fp32", "fp32")
    build_encoder(replace(lowered, encoder=Padded()), torch.rand(2, *SHAPE), types, tmp_path)
    build_refine(lowered, types, tmp_path)
    encoder = part(products(tmp_path, types, SHAPE), "encoder")
    assert [(p.multiply_adds, p.storage) for p in encoder] == [(32 * 32 * 8 * 3 * 9, "fp32")]

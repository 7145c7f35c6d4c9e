"""The last layer of a vision transformer, for the class token alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import make_model
from tolerances import BUILT, FLOAT32_LAYER
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from marnet_export.choose.steps import explain
from marnet_export.lower.class_token import ClassTokenLayer, for_class_token
from marnet_export.lower.modules import with_compute, with_rounded_results
from marnet_export.settings import Settings
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.checkpoint import write_model
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 24, "image_size": 32}
SIZES |= {"patch_size": 8}
TOKENS, WIDTH, INNER = 17, 24, 40
VIT = {"model_type": "vit", **SIZES, "intermediate_size": INNER}


def encoder(model_type: str, **settings: Any) -> VisionEncoder:
    """Fresh weights, with biases, scales and norms that are far from doing nothing."""
    torch.manual_seed(0)
    description = {"model_type": model_type, **settings}
    vision = VisionEncoder(build_backbone(backbone_config(description))).eval()
    for parameter in vision.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vision.requires_grad_(False)


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(**settings: Any) -> VisionEncoder:
    return encoder("vit", **SIZES, intermediate_size=INNER, **settings)


TRANSFORMERS = {
    "vit": {"intermediate_size": INNER},
    "vit without biases": {"intermediate_size": INNER, "qkv_bias": False},
    "vit of another activation": {"intermediate_size": INNER, "hidden_act": "gelu_pytorch_tanh"},
    "deit": {"intermediate_size": INNER},
    "dinov2": {"mlp_ratio": 2, "layerscale_value": 0.3},
    "dinov2 trained with dropped paths": {"mlp_ratio": 2, "drop_path_rate": 0.1},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_class_token_is_what_the_whole_layer_makes_of_it(name):
    vision = encoder(name.partition(" ")[0], **SIZES, **TRANSFORMERS[name])
    narrow = for_class_token(vision)
    assert sum(isinstance(m, ClassTokenLayer) for m in narrow.modules()) == 1
    assert torch.allclose(narrow(pixels()), vision(pixels()), rtol=FLOAT32_LAYER, atol=1e-5)
    wide = copy.deepcopy(vision).double()
    exact = for_class_token(wide)
    assert exact is not wide
    torch.testing.assert_close(
        exact(pixels().double()), wide(pixels().double()), rtol=1e-10, atol=0
    )


def test_only_keys_and_values_are_made_of_all_tokens():
    vision = vit(attn_implementation="eager")
    counts = []
    for module in (vision, for_class_token(vision)):
        with FlopCounterMode(display=False) as counter:
            module(pixels(1))
        counts.append(counter.get_total_flops() // 2)
    attention = 2 * TOKENS * WIDTH
    before = TOKENS * (4 * WIDTH**2 + 2 * WIDTH * INNER) + TOKENS * attention
    after = 2 * TOKENS * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * INNER + attention
    assert counts[0] - counts[1] == before - after


def test_the_encoder_that_it_is_made_of_stays_as_it_was():
    vision = vit()
    wanted, names = vision(pixels()), list(vision.state_dict())
    narrow = for_class_token(vision)
    assert torch.equal(vision(pixels()), wanted)
    assert vision.backbone(pixels()).last_hidden_state.shape == (3, TOKENS, WIDTH)
    assert list(narrow.state_dict()) == names  # so reports name the layers that users know
    theirs = {p.data_ptr() for p in vision.parameters()}
    assert {p.data_ptr() for p in narrow.parameters()} == theirs


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
def test_its_products_run_in_the_type_that_is_asked_for(compute):
    vision = vit()
    low = with_compute(for_class_token(vision), compute)
    last = low.get_submodule("backbone.layers.2")
    assert {p.dtype for p in last.parameters() if p.ndim == 2} == {compute}
    wanted, kind = vision(pixels()), "fp16" if compute == torch.float16 else "bf16"
    for module in (low, with_rounded_results(for_class_token(vision), compute)):
        assert (module(pixels()) - wanted).abs().max() < BUILT[kind] * wanted.abs().max()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}),
        ("swin", {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2],
                  "num_heads": [2], "window_size": 4}),
        ("beit", {**SIZES, "intermediate_size": INNER}),  # its attention has a bias of positions
        ("dinov2", {**SIZES, "use_swiglu_ffn": True}),
    ],
)  # fmt: skip
def test_what_is_not_recognised_is_left_as_it_is(model_type, settings):
    vision = encoder(model_type, **settings)
    assert for_class_token(vision) is vision


def test_a_layer_that_computes_something_else_is_left_as_it_is():
    class PostNorm(type(vit().backbone.layers[0])):  # pyright: ignore
        def forward(self, x: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
            x = x + self.attention(self.layernorm_before(x))[0]
            return self.layernorm_after(x + self.mlp(x))

    vision = vit()
    vision.backbone.layers[-1].__class__ = PostNorm  # pyright: ignore
    assert for_class_token(vision) is vision


def test_a_layer_with_more_parameters_than_are_used_is_left_as_it_is():
    vision = vit()
    vision.backbone.layers[-1].extra = nn.Parameter(torch.ones(WIDTH))  # pyright: ignore
    assert for_class_token(vision) is vision


def test_a_weight_that_is_no_number_is_left_to_be_found_and_named():
    vision = vit()
    vision.backbone.layers[-1].mlp.fc1.weight[0, 0] = torch.nan  # pyright: ignore
    assert for_class_token(vision) is vision


@pytest.mark.parametrize(("vision", "told"), [(VIT, True), ({}, False)], ids=["vit", "resnet"])
def test_explain_says_so(vision, told, tmp_path):
    width = {"vision": vision, "condition": WIDTH} if vision else {}
    write_model(tmp_path, make_model(steps=4, **width), Preprocess(size=(32, 32)))
    _, sentence = explain(tmp_path, Settings("torchscript"))
    assert ("last layer is run for the class token alone" in sentence) == told

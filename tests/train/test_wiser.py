"""WISeR: slices of the whole width beside a trunk that may be any encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import TINY
from tolerances import FLOAT64
from torch import nn

from marnet_sdk.errors import InvalidInput, RecipeError
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.assemble import make_preprocess
from marnet_train.models.backbones import (
    VisionEncoder,
    backbone_config,
    build_backbone,
    load_backbone,
    plain_config,
)

RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
          "layer_type": "basic"}  # fmt: skip
WISER: dict[str, Any] = {"model_type": "wiser", "image_size": 24, "slices": 6, "hidden_size": 10}


def build(description: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return load_backbone(description).eval()


@torch.no_grad()
def test_the_vector_joins_the_trunk_and_the_strongest_slices() -> None:
    wiser: Any = build({**WISER, "trunk": RESNET}).double()
    wiser.slice_norm.bias.normal_()
    pixels = torch.randn(2, 3, 24, 24).double()
    rows = pixels.unfold(2, 5, 1)  # [2, 3, 20, 24, 5]: every 5 rows of pixels, the whole width
    found = torch.einsum("bchwk,fckw->bfh", rows, wiser.slice.weight)
    norm = wiser.slice_norm
    slices = F.relu(found / (1 + norm.eps) ** 0.5 + norm.bias[:, None])  # [2, 6, 20]
    strongest = slices.unflatten(2, (4, 5)).amax(dim=3).mean(dim=2)
    expected = F.relu(wiser.joined(torch.cat([wiser.trunk(pixels), strongest], dim=1)))
    encoder = VisionEncoder(wiser)
    assert encoder.dim == 10
    torch.testing.assert_close(encoder(pixels), expected, rtol=FLOAT64, atol=FLOAT64)


@torch.no_grad()
def test_a_pretrained_trunk_keeps_its_weights_and_is_described_whole(tmp_path: Path) -> None:
    trunk = build(RESNET)
    trunk.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    torch.manual_seed(1)
    wiser: Any = load_backbone({**WISER, "trunk": {"pretrained": str(tmp_path)}})
    for name, value in trunk.state_dict().items():
        assert torch.equal(wiser.trunk.backbone.state_dict()[name], value)
    described = plain_config(wiser)
    for path in tmp_path.iterdir():
        path.unlink()
    assert described["trunk"]["hidden_sizes"] == [4, 8]
    assert "pretrained" not in described["trunk"]  # so a checkpoint needs no other folder
    again = build_backbone(backbone_config(described))
    again.load_state_dict(wiser.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trunk": {"pretrained": "somewhere"}}, "trunk must be a whole configuration"),
        ({"image_size": 9}, "image_size 9 must be at least twice slice_height, 5"),
        ({"trunk": {"hidden_size": 3}}, "an encoder needs model_type"),
    ],
)
def test_what_makes_no_wiser_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_backbone(backbone_config({**WISER, "trunk": RESNET, **settings}))


def test_images_of_another_width_are_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"got images of \[24, 32\] pixels, expected a width of 24"
    ):
        build({**WISER, "trunk": RESNET})(torch.zeros(1, 3, 24, 32))


def test_images_are_prepared_as_for_a_pretrained_trunk(tmp_path: Path) -> None:
    build(RESNET).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    expected = Preprocess(size=(24, 24), mean=(0.1, 0.2, 0.3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(expected.to_dict()))
    vision = {**WISER, "trunk": {"pretrained": str(tmp_path)}}
    assert make_preprocess(replace(TINY, vision=vision, image=None)) == expected

"""RepMLPNet: its block against the formula, its size against the paper, and wrong sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOAT64
from torch import nn

from marnet_sdk.errors import InvalidInput, RecipeError
from marnet_train.models.backbones import backbone_config, build_backbone
from marnet_train.models.repmlpnet import RepMLP, RepMLPNet, RepMLPNetConfig


@torch.no_grad()
def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    channels, edge, sets = 6, 4, 3
    block = RepMLP(channels, edge, RepMLPNetConfig(local_kernels=[1, 3]), sets).double().eval()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.bias.normal_()
    x = torch.randn(2, channels, edge, edge).double()
    shrink = 1 / (1 + norms[0].eps) ** 0.5  # of a norm whose statistics are 0 and 1
    matrices = block.channel.weight.reshape(sets, edge**2, edge**2)
    expected = torch.empty_like(x)
    for c in range(channels):
        s = c % sets
        total = (matrices[s] @ x[:, c].flatten(1).T).T.reshape(2, 1, edge, edge) * shrink
        total = total + norms[0].bias[s]
        for branch, size in zip(block.local, (1, 3), strict=True):
            convolution, norm = branch[0], branch[1]  # pyright: ignore[reportIndexIssue]
            kernel = convolution.weight[s][None]
            total = total + F.conv2d(x[:, c : c + 1], kernel, padding=size // 2) * shrink
            total = total + norm.bias[s]
        expected[:, c] = total[:, 0]
    _, first, _, second, _ = block.gate
    hidden = F.relu(x.mean(dim=(2, 3)) @ first.weight[:, :, 0, 0].T + first.bias)  # pyright: ignore
    gate = torch.sigmoid(hidden @ second.weight[:, :, 0, 0].T + second.bias)  # pyright: ignore
    wanted = expected * gate[:, :, None, None]
    torch.testing.assert_close(block(x), wanted, rtol=FLOAT64, atol=FLOAT64)


def test_the_defaults_are_repmlpnet_b224() -> None:
    with torch.device("meta"):
        model = RepMLPNet(RepMLPNetConfig())
    count = sum(p.numel() for p in model.parameters())
    classifier = 768 * 1000 + 1000
    assert (count + classifier) / 1e6 == pytest.approx(68.2, abs=0.1)  # table 4 of the paper
    perceptrons = [m for m in model.modules() if isinstance(m, RepMLP)]
    assert [m.shape for m in perceptrons] == (
        [(96, 56, 56)] * 2 + [(192, 28, 28)] * 2 + [(384, 14, 14)] * 12 + [(768, 7, 7)] * 2
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": [1, 1]}, "must have one number for each stage"),
        ({"image_size": 200}, "image_size 200 must be a multiple of 32: patch_size, halved 3"),
        ({"share_sets": [1, 5, 32, 128]}, "must be multiples of share_sets"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        build_backbone(backbone_config({"model_type": "repmlpnet", **settings}))


def test_images_of_another_size_are_refused() -> None:
    model = RepMLPNet(RepMLPNetConfig(image_size=16, hidden_sizes=[8], depths=[1], share_sets=[2]))
    with pytest.raises(InvalidInput, match=r"got images of \[16, 32\] pixels, expected \[16, 16\]"):
        model(torch.zeros(1, 3, 16, 32))

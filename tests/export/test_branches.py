"""Branches of an encoder's training, merged: the same numbers with fewer layers."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import make_model
from tolerances import FLOAT32_LAYER, FLOAT64
from torch import Tensor, nn

from marnet_export.lower.branches import with_merged_branches
from marnet_export.lower.methods import lower_marnet
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone
from marnet_train.models.repmlpnet import RepMLP

REPMLPNET = {"model_type": "repmlpnet", "image_size": 16, "hidden_sizes": [8, 16],
             "depths": [2, 1], "share_sets": [2, 4], "local_kernels": [1, 3, 5]}  # fmt: skip


def encoder(description: dict) -> VisionEncoder:
    """Fresh weights, with norms that are far from doing nothing."""
    torch.manual_seed(0)
    vision = VisionEncoder(build_backbone(backbone_config(description))).eval()
    for module in vision.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                values.data.normal_()  # pyright: ignore
            module.running_var.data.uniform_(0.5, 2)  # pyright: ignore
    return vision.requires_grad_(False)


def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_locality_is_injected_without_changing_a_number():
    vision = encoder(REPMLPNET).double()
    wanted = vision(pixels().double())
    blocks = [m for m in vision.modules() if isinstance(m, RepMLP)]
    assert [len(block.local) for block in blocks] == [3, 3, 3]
    for block in blocks:
        block.inject_locality()
    assert [len(block.local) for block in blocks] == [0, 0, 0]
    torch.testing.assert_close(vision(pixels().double()), wanted, rtol=FLOAT64, atol=FLOAT64)


def test_the_deployed_encoder_has_one_matrix_where_training_has_branches():
    vision = encoder(REPMLPNET)
    wanted, names = vision(pixels()), list(vision.state_dict())
    merged = with_merged_branches(vision)
    assert not [name for name in merged.state_dict() if ".local." in name or "channel_norm" in name]
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(merged(pixels()), wanted, rtol=0, atol=FLOAT32_LAYER)
    assert list(vision.state_dict()) == names  # which stays as it was
    assert torch.equal(vision(pixels()), wanted)


def test_a_method_is_lowered_with_merged_branches():
    encoder = lower_marnet(make_model(vision=REPMLPNET)).encoder
    assert not [name for name in encoder.state_dict() if ".local." in name]


def test_an_encoder_without_branches_is_left_as_it_is():
    vision = make_model().vision
    assert with_merged_branches(vision) is vision


def no_merge(block: RepMLP) -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (
            lambda block: block.channel.weight.zero_(),
            "one layer for each block gives other numbers",
        ),
        (no_merge, "no such kernel"),
    ],
)
def test_one_that_cannot_be_merged_is_left_as_it_is_and_told(merge, reason, monkeypatch, capsys):
    monkeypatch.setattr(RepMLP, "inject_locality", merge)
    vision = encoder(REPMLPNET)
    assert with_merged_branches(vision) is vision
    assert capsys.readouterr().err.endswith(
        f"keeps its branches, which is right and slower: {reason}\n"
    )


def test_a_weight_that_is_no_number_is_left_to_be_found_and_named():
    vision = copy.deepcopy(encoder(REPMLPNET))
    next(vision.parameters())[0] = torch.nan
    assert with_merged_branches(vision) is vision

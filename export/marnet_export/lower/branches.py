"""Branches that an encoder has for its training, merged into one layer: RepVGG's, RepMLPNet's, and
those of other models of timm.

In evaluation mode the branches of such a block are linear, so their sum is one layer of the same
kind. It is computed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from marnet_sdk.console import say
from marnet_sdk.errors import one_line
from marnet_train.models.backbones import VisionEncoder, image_size
from marnet_train.models.repmlpnet import RepMLP

_TOLERANCE = 1e-4  # of the largest value: timm writes some of its merged layers in float32
_MERGES = ("reparameterize", "fuse", "switch_to_deploy")  # methods of timm's blocks


def with_merged_branches(vision: VisionEncoder) -> VisionEncoder:
    """Return the encoder in evaluation mode, pixels [B, 3, H, W] -> x_v, with a layer a block.

    One without such blocks is returned as it is, and so is one that does not merge to the same
    numbers, which is said.
    """
    if next(_mergeable(vision), None) is None:
        return vision
    wide = copy.deepcopy(vision).double().eval()
    reason = "one layer for each block gives other numbers"
    try:
        merged = _merged(copy.deepcopy(wide))
        if _is_same(wide, merged):
            return merged.to(next(vision.parameters())).eval()
    except Exception as error:  # whatever code of a model raises
        reason = one_line(error)
    say(f"the encoder keeps its branches, which is right and slower: {reason}")
    return vision


def _merged(vision: VisionEncoder) -> VisionEncoder:
    """Merge the branches of an encoder in float64, in place."""
    for block in list(_mergeable(vision)):
        if isinstance(block, RepMLP):
            block.inject_locality()
        else:
            import timm.utils  # an extra  # pyright: ignore[reportMissingImports]

            timm.utils.reparameterize_model(block, inplace=True)
    return vision.double()


def _mergeable(vision: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks that are written here, and whole models of timm that have such blocks."""
    for module in vision.modules():
        if isinstance(module, RepMLP):
            yield module
        inner = getattr(module, "timm_model", None)
        if inner is not None and any(hasattr(m, name) for m in inner.modules() for name in _MERGES):
            yield inner


@torch.no_grad()
def _is_same(one: VisionEncoder, other: VisionEncoder) -> bool:
    """Tell whether both make the same vector of an image of noise; not where a weight is NaN."""
    size = image_size(one.backbone)
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    wanted, got = one(pixels), other(pixels)
    return bool((wanted - got).abs().max() <= _TOLERANCE * wanted.abs().max())

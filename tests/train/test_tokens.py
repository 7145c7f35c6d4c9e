"""The vectors of single tokens, of encoders that make tokens and of those that make maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TINY, make_ready

from marnet_sdk.errors import RecipeError
from marnet_train.tokens import LastTokens, image_tokens, token_widths

VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
WISER = {"model_type": "wiser", "trunk": TINY.vision, "image_size": 8, "slice_height": 2}
WISER |= {"slices": 6, "hidden_size": 10}


def test_places_of_a_map_are_tokens() -> None:
    hidden = torch.arange(2 * 5 * 2 * 3.0).view(2, 5, 2, 3)
    tokens = image_tokens(hidden, 5)
    assert tokens.shape == (2, 6, 5)
    assert torch.equal(tokens[1, 4], hidden[1, :, 1, 1])
    assert torch.equal(image_tokens(hidden, 40), tokens)  # x_v may have another width
    assert torch.equal(image_tokens(hidden.movedim(1, 3), 5), tokens)  # channels behind


def test_tokens_stay_as_they_are() -> None:
    hidden = torch.rand(2, 6, 5)
    assert image_tokens(hidden, 5) is hidden


def test_an_encoder_without_tokens_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"got \[2, 5\]; choose another loss, or another enc"):
        image_tokens(torch.rand(2, 5), 5)


@pytest.mark.parametrize(
    ("vision", "width", "count"),
    [(TINY.vision, 8, 1), (VIT, 8, 5), (WISER, 6, 7)],
    ids=["ResNet", "ViT", "WISeR"],
)
@torch.no_grad()
def test_widths_and_tokens_of_an_encoder(
    vision: dict[str, Any], width: int, count: int, digits: Path
) -> None:
    """The class token is one, and the vector of WISeR is wider than what it makes of a slice."""
    ready = make_ready(digits, replace(TINY, vision=vision))
    assert token_widths(ready.model) == (12, width)
    last = LastTokens()
    ids, mask = ready.data.input_ids[:2], ready.data.attention_mask[:2]
    with last.of(ready.model):
        ready.model.vision(torch.rand(2, 3, 8, 8))
        x_s = ready.model.text(ids, mask)
    tokens = last.of_batch(2)
    assert tokens.images.shape == (2, count, width)
    assert torch.equal(tokens.mask, mask)
    pooled = (tokens.texts * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(pooled, x_s)
    ready.model.vision(torch.rand(1, 3, 8, 8))
    assert last.of_batch(2).images is tokens.images  # nothing is kept any more

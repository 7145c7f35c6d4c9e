"""The vectors of single tokens, before an encoder pools them to x_v or x_s: what a loss on tokens
reads. Vision transformers make one of each patch, convolutional networks one of each place of the
last map.

Axes: B batch, N image tokens, L text tokens, D_v, D_s the widths of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.losses.team import Tokens
from marnet_train.models.backbones import image_size
from marnet_train.models.marnet import MARNet
from marnet_train.parallel import gathered


class LastTokens:
    """These are the tokens of the last images and of the last texts that passed the encoders."""

    images: Tensor  # [B, N, D_v]; of several processes, those of its own share
    texts: Tensor  # [B, L, D_s]
    mask: Tensor  # [B, L]

    @contextmanager
    def of(self, model: MARNet) -> Iterator[None]:
        """Keep the tokens of whatever passes the encoders of a model inside the block."""

        def see_images(_: nn.Module, __: Any, out: Any) -> None:
            self.images = image_tokens(out.last_hidden_state, model.vision.dim)

        def see_texts(_: nn.Module, __: Any, given: Mapping[str, Tensor], out: Any) -> None:
            self.texts, self.mask = out.last_hidden_state, given["attention_mask"]

        hooks = (
            model.vision.backbone.register_forward_hook(see_images),
            model.text.backbone.register_forward_hook(see_texts, with_kwargs=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of_batch(self, count: int) -> Tokens:
        """Return the tokens of a batch of `count` pairs, with the images of all processes."""
        return Tokens(gathered(self.images, count), self.texts, self.mask)


def image_tokens(hidden: Tensor, dim: int) -> Tensor:
    """Return what an image encoder makes of its images as tokens, [B, N, D_v].

    Args:
        hidden: [B, N, D_v], or a map with the channels before or behind its places.
        dim: the width of x_v, which tells where the channels are.

    Raises:
        RecipeError: something else.
    """
    if hidden.ndim == 3:
        return hidden
    if hidden.ndim != 4:
        raise RecipeError(
            "the alignment loss team reads tokens, [B, N, D], or maps, [B, D, h, w], of the image "
            f"encoder, got {list(hidden.shape)}; choose another loss, or another encoder"
        )
    if hidden.shape[1] != dim == hidden.shape[3]:  # Swin of timm
        return hidden.flatten(1, 2)
    return hidden.flatten(2).mT


@torch.no_grad()
def token_widths(model: MARNet) -> tuple[int, int]:
    """Find D_s and D_v, the latter on a blank image: x_v may have another width.

    The image encoder is left in evaluation mode.

    Raises:
        RecipeError: as of `image_tokens`.
    """
    vision, last = model.vision.eval(), LastTokens()
    with last.of(model):
        vision(torch.zeros(1, 3, *image_size(vision.backbone), device=model.device))
    return model.text.dim, last.images.shape[2]

"""This module makes what plays x_s, the semantic vector of an image, in training: its text, or a
control.

A control answers what the text itself contributes. All stand still while the images are learnt.
    text      F_s of the image's own text
    labels    the class as a one-hot vector: no text at all
    random    a random vector for each class: neither text nor meaning
    shuffled  the text of an image of another class, the same other class for all of a class: right
              statistics, and still one class's words for each class, but wrong meaning
Axes: N images, D_s width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marnet_sdk.errors import RecipeError


def semantic_vectors(kind: str, texts: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """Make x_s of every training image, [N, D_s], for one of `recipe.SEMANTICS`.

    Args:
        texts: F_s of every image's text, [N, D_s]. labels: class indices, [N].

    Raises:
        RecipeError: one-hot vectors of more classes than D_s.
    """
    width = texts.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if kind == "labels":
        if classes > width:
            raise RecipeError(
                f'semantics = "labels" needs a text width of at least {classes}, one for each '
                f'class, got {width}; use "random"'
            )
        return torch.eye(classes, width, device=texts.device)[labels]
    if kind == "random":
        return torch.randn(classes, width, generator=generator).to(texts)[labels]
    if kind == "shuffled":
        return texts[_rows_of_other_classes(labels.cpu(), classes, generator).to(texts.device)]
    return texts


def _rows_of_other_classes(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Draw for each image a row of the next class, in a random cycle of the classes. [N]."""
    cycle = torch.randperm(classes, generator=generator)
    rows = torch.empty_like(labels)
    for own, other in zip(cycle.tolist(), cycle.roll(1).tolist(), strict=True):
        mine, theirs = (torch.nonzero(labels == k).flatten() for k in (own, other))
        drawn = torch.randint(len(theirs), (len(mine),), generator=generator)
        rows[mine] = theirs[drawn]
    return rows

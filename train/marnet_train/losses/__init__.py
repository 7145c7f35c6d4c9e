"""Losses of MARNet, each a small pure function of tensors.

Axes: B batch, D feature, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_similarity_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Compute Sim(a_i, b_j) of all pairs, MARNet eq. (5). [B, D], [B, D] -> [B, B]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def ita_loss(
    visual: Tensor,
    semantic: Tensor,
    temperature: float | Tensor = 0.07,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the image-text alignment L_ITA = L_v2s + L_s2v, MARNet eq. (9)-(11), in float32.

    The two directions are summed, each averaged over the batch.

    Args:
        visual, semantic: projected features x_v', x_s', [B, D]; row i of both is one pair.
        groups: [B], equal where two texts are the same: such pairs are no negatives of each other.
    Returns:
        Scalar; 2 ln B when all similarities are equal and `groups` is None.
    """
    with torch.autocast(visual.device.type, enabled=False):  # bf16 / 0.07 is off by up to 0.05
        wide = torch.promote_types(visual.dtype, torch.float32)
        scores = cosine_similarity_matrix(visual.to(wide), semantic.to(wide)) / temperature
        if groups is not None:
            same = groups[:, None] == groups
            same.fill_diagonal_(False)
            scores = scores.masked_fill(same, -torch.inf)
        target = torch.arange(scores.shape[0], device=scores.device)
        return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute L_CE, MARNet eq. (12), averaged over the batch. [B, K], [B] -> scalar."""
    return F.cross_entropy(logits, labels)


def reconstruction_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Compute L_MSE, MARNet eq. (19): the squared norm of the error, averaged over the batch only.

    It is a sum over dimensions, so it is D times `torch.nn.functional.mse_loss`.
    Shapes: [B, D], [B, D] -> scalar.
    """
    return F.mse_loss(estimate, target) * target.shape[1]


def refinement_loss(
    logits: Tensor,
    labels: Tensor,
    estimate: Tensor,
    target: Tensor,
    *,
    ce_weight: float,
    norm_weight: float,
) -> Tensor:
    """Compute L_CDR = alpha_2 L_CE + gamma L_MSE, MARNet eq. (20)."""
    ce = classification_loss(logits, labels)
    return ce_weight * ce + norm_weight * reconstruction_loss(estimate, target)

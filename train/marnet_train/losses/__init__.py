"""Losses of MARNet, each a small pure function of tensors.

Axes: B batch, D feature, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_similarity_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Sim(a_i, b_j) of all pairs, MARNet eq. (5). [B, D], [B, D] -> [B, B]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def ita_loss(visual: Tensor, semantic: Tensor, temperature: float = 0.07) -> Tensor:
    """Image-text alignment L_ITA = L_v2s + L_s2v, MARNet eq. (9)-(11).

    The two directions are summed, each averaged over the batch.

    Args:
        visual, semantic: projected features x_v', x_s', [B, D]; row i of both is one pair.
    Returns:
        Scalar; 2 ln B when all similarities are equal.
    """
    scores = cosine_similarity_matrix(visual, semantic) / temperature  # [B, B]
    target = torch.arange(scores.shape[0], device=scores.device)
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE, MARNet eq. (12), averaged over the batch. [B, K], [B] -> scalar."""
    return F.cross_entropy(logits, labels)


def alignment_loss(
    logits: Tensor,
    labels: Tensor,
    visual: Tensor,
    semantic: Tensor,
    *,
    ce_weight: float,
    ita_weight: float,
    temperature: float,
) -> Tensor:
    """L_EMA = alpha_1 L_CE + beta L_ITA, MARNet eq. (13)."""
    ce = classification_loss(logits, labels)
    return ce_weight * ce + ita_weight * ita_loss(visual, semantic, temperature)


def reconstruction_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """L_MSE, MARNet eq. (19), as the mean over batch and dimensions. [B, D], [B, D] -> scalar.

    The paper writes the squared norm, which is D times this; the weight in eq. (20) absorbs it.
    """
    return F.mse_loss(estimate, target)


def refinement_loss(
    logits: Tensor,
    labels: Tensor,
    estimate: Tensor,
    target: Tensor,
    *,
    ce_weight: float,
    mse_weight: float,
) -> Tensor:
    """L_CDR = alpha_2 L_CE + gamma L_MSE, MARNet eq. (20)."""
    ce = classification_loss(logits, labels)
    return ce_weight * ce + mse_weight * reconstruction_loss(estimate, target)

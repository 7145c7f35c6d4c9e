"""Alignment losses of other papers, for phase A in place of ITA: on paired images and texts whose
classes are known.

All compute total = CE(visual) + weight * loss, so `[alignment] loss` of a recipe names one and
`ita_weight` is its weight. Those papers adapt a classifier to another domain, match images with
texts, or both; here the text is the source domain and the image the target, all are labelled, and
the adaptation is this project's. Their settings are kept where they are no matter of the data.
Axes: B batch, D width of the common space, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_train.losses import (
    classification_loss,
    cosine_similarity_matrix,
    ita_loss,
)
from marnet_train.losses.team import Team, Tokens

DIRECTIONS = 128  # of SWD
_SSAN = {"alpha": 0.1, "beta": 0.004, "gamma": 0.1, "temperature": 5.0}


@dataclass(frozen=True)
class Pairs:
    """This is a batch in the common space: row i of everything is one image with its text."""

    visual: Tensor  # x_v', [B, D]
    semantic: Tensor  # x_s', [B, D]
    visual_logits: Tensor  # of the classifier that both share, [B, K]
    semantic_logits: Tensor
    labels: Tensor  # [B]
    groups: Tensor | None  # [B], equal where texts are; None: every text counts as another
    temperature: Tensor  # tau
    progress: float  # share of the phase that is over, 0 to 1
    tokens: Tokens | None = None  # for a loss that reads them

    def in_float32(self) -> Pairs:
        """Return the batch in float32, or wider where it is wider."""
        names = ("visual", "semantic", "visual_logits", "semantic_logits")
        wide = torch.promote_types(self.visual.dtype, torch.float32)
        tokens = None if self.tokens is None else self.tokens.to(wide)
        return replace(self, tokens=tokens, **{n: getattr(self, n).to(wide) for n in names})


def sliced_wasserstein(p: Tensor, q: Tensor, directions: Tensor) -> Tensor:
    """Compute the sliced Wasserstein distance of two sets of class scores, squared.

    Lee, Batra, Baig and Ulbricht, "Sliced Wasserstein discrepancy for unsupervised domain
    adaptation", CVPR 2019: project both onto random directions, sort each projection, and average
    the squared differences over rows and directions. It never asks which rows are pairs.

    Args:
        p, q: [B, K]. directions: of unit length, [K, M].
    """
    one, other = ((x @ directions).sort(dim=0).values for x in (p, q))
    return (one - other).square().mean()


def similarity_distribution(pairs: Pairs) -> Tensor:
    """Compute SDM: KL(p || q) of similarities p and matches q, in both directions.

    Jiang and Ye, "Cross-modal implicit relation reasoning and aligning for text-to-image person
    retrieval", CVPR 2023: p_ij = softmax over j of cos(x_v'_i, x_s'_j) / tau, and q_ij is 1 / n
    for the n texts j of the class of i, 0 elsewhere; 1e-8 is added to q. Means over i, summed.
    """
    same = (pairs.labels[:, None] == pairs.labels).to(pairs.visual.dtype)
    scores = cosine_similarity_matrix(pairs.visual, pairs.semantic) / pairs.temperature
    log_q = (same / same.sum(dim=1, keepdim=True) + 1e-8).log()  # symmetric but for the counts

    def divergence(of: Tensor) -> Tensor:
        log_p = of.log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()

    return divergence(scores) + divergence(scores.T)


def contrastive_discrepancy(source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Compute CDD: texts and images of one class attract, those of two classes repel each other.

    Kang, Jiang, Yang and Hauptmann, "Contrastive adaptation network for unsupervised domain
    adaptation", CVPR 2019: the mean over classes of D(c, c) minus the mean over pairs of D(c, d),

        D(c, d) = mean k(S_c, S_c) + mean k(T_d, T_d) - 2 mean k(S_c, T_d)

    with k the sum of five Gaussian kernels exp(-d^2 / (g 2^j)), j = -2 .. 2, and g the mean squared
    distance within both blocks together, without gradient and at least 1e-5. Batches need several
    images of a class: `per_class` of a recipe.

    Args:
        source, target: [B, D]. labels: of both, [B].
    """
    classes = labels.unique()
    blocks = [(source[labels == c], target[labels == c]) for c in classes]
    within, between = [], []
    for i, (s, _) in enumerate(blocks):
        for j, (_, t) in enumerate(blocks):
            (within if i == j else between).append(_block_discrepancy(s, t))
    loss = torch.stack(within).mean()
    return loss - torch.stack(between).mean() if between else loss


def _block_discrepancy(s: Tensor, t: Tensor) -> Tensor:
    """Compute D of two blocks, [n, D] and [m, D]."""
    both, n = torch.cat([s, t]), len(s)
    distances = (both[:, None] - both).square().sum(dim=2)
    with torch.no_grad():
        scale = (distances.sum() / (len(both) * (len(both) - 1))).clamp(min=1e-5)
    kernel = sum(torch.exp(-distances / (scale * 2.0**j)) for j in range(-2, 3))
    assert isinstance(kernel, Tensor)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def soft_label_alignment(pairs: Pairs, temperature: float) -> Tensor:
    """Compute SSAN's implicit alignment: images follow the mean soft label of their class's texts.

    -sum over classes k of the mean over images of k of sum over c of q_k(c) log(p(c) + 1e-5), with
    q_k the mean over texts of k of softmax(logits / temperature).
    """
    onehot = F.one_hot(pairs.labels, pairs.visual_logits.shape[1]).to(pairs.visual.dtype)
    share = onehot / onehot.sum(dim=0).clamp(min=1)  # [B, K], columns of present classes sum to 1
    soft = share.T @ (pairs.semantic_logits / temperature).softmax(dim=1)  # q, [K, K]
    log_p = (pairs.visual_logits.softmax(dim=1) + 1e-5).log()
    return -(soft * (share.T @ log_p)).sum()


def centroid_alignment(visual: Tensor, semantic: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Compute SSAN's explicit alignment: squared distances of class centroids, summed.

    Those of texts, images and both together, three distances for each class of the batch.
    Shapes: [B, D], [B, D], [B] -> scalar.
    """
    onehot = F.one_hot(labels, classes).to(visual.dtype)
    share = onehot / onehot.sum(dim=0).clamp(min=1)
    of_texts, of_images = share.T @ semantic, share.T @ visual  # [K, D], 0 of absent classes
    both = (of_texts + of_images) / 2  # as many of each
    pairs = ((of_texts, of_images), (of_texts, both), (of_images, both))
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


class _Reversed(torch.autograd.Function):
    """This passes values on and turns the gradient round, times a strength."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength  # pyright: ignore[reportAttributeAccessIssue]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None  # pyright: ignore[reportAttributeAccessIssue]


class Alignment(nn.Module):
    """This is an alignment loss by name, with what it learns: SSAN and TEAM learn something."""

    def __init__(self, name: str, dim: int, token_widths: tuple[int, int] | None = None) -> None:
        """Make the loss `name`, one of `recipe.ALIGNMENTS`, for a common space of width D.

        Args:
            token_widths: D_s and D_v of single tokens, for TEAM.
        """
        super().__init__()
        self.loss = _LOSSES[name]
        self.discriminator = nn.Linear(dim, 1) if name == "ssan" else None
        self.team = None if token_widths is None else Team(*token_widths)

    def forward(self, pairs: Pairs) -> Tensor:
        """Compute the loss of a batch in float32, a scalar."""
        with torch.autocast(pairs.visual.device.type, enabled=False):
            return self.loss(self, pairs.in_float32())


def _ita(_: Alignment, pairs: Pairs) -> Tensor:
    return ita_loss(pairs.visual, pairs.semantic, pairs.temperature, pairs.groups)


def _swd(_: Alignment, pairs: Pairs) -> Tensor:
    """Compute SWD of both modalities' probabilities, and the text's own cross-entropy."""
    p, q = pairs.visual_logits.softmax(dim=1), pairs.semantic_logits.softmax(dim=1)
    directions = F.normalize(torch.randn(p.shape[1], DIRECTIONS, device=p.device), dim=0)
    text = classification_loss(pairs.semantic_logits, pairs.labels)
    return sliced_wasserstein(p, q, directions.to(p)) + text


def _sdm(_: Alignment, pairs: Pairs) -> Tensor:
    return similarity_distribution(pairs)


def _cdd(_: Alignment, pairs: Pairs) -> Tensor:
    """Compute CDD of features and of probabilities, and the text's own cross-entropy."""
    layers = (
        (pairs.semantic, pairs.visual),
        (pairs.semantic_logits.softmax(dim=1), pairs.visual_logits.softmax(dim=1)),
    )
    found = [contrastive_discrepancy(s, t, pairs.labels) for s, t in layers]
    return found[0] + found[1] + classification_loss(pairs.semantic_logits, pairs.labels)


def _ssan(self: Alignment, pairs: Pairs) -> Tensor:
    """Compute SSAN: Li, Xie, Wu, Zhao, Liu and Ding, "Simultaneous semantic alignment network for
    heterogeneous domain adaptation", ACM Multimedia 2020.

    With weight 1 the total is CE of the texts + (1 - alpha) CE of the images + alpha times the
    implicit, beta times the explicit alignment, and gamma times a linear discriminator's
    cross-entropy behind a gradient that is reversed, with strength 2 / (1 + exp(-10 r)) - 1 after
    the share r of the training. Features have unit length. Images are labelled here, so its
    pseudo-labels drop out.
    """
    assert self.discriminator is not None
    visual, semantic = (F.normalize(x, dim=1) for x in (pairs.visual, pairs.semantic))
    strength = 2 / (1 + math.exp(-10 * pairs.progress)) - 1
    features = torch.cat([semantic, visual])
    is_text = torch.cat([torch.ones(len(semantic)), torch.zeros(len(visual))]).to(features)
    guess = self.discriminator(_Reversed.apply(features, strength))[:, 0]
    classes = pairs.visual_logits.shape[1]
    return (
        classification_loss(pairs.semantic_logits, pairs.labels)
        - _SSAN["alpha"] * classification_loss(pairs.visual_logits, pairs.labels)
        + _SSAN["alpha"] * soft_label_alignment(pairs, _SSAN["temperature"])
        + _SSAN["beta"] * centroid_alignment(visual, semantic, pairs.labels, classes)
        + _SSAN["gamma"] * F.binary_cross_entropy_with_logits(guess, is_text)
    )


def _team(self: Alignment, pairs: Pairs) -> Tensor:
    """Compute TEAM: its loss of tokens, see `losses.team`, and the mean of both parts of ITA."""
    assert self.team is not None
    assert pairs.tokens is not None
    assert pairs.groups is not None
    whole = ita_loss(pairs.visual, pairs.semantic, pairs.temperature, pairs.groups) / 2
    similar = cosine_similarity_matrix(pairs.visual, pairs.semantic) / pairs.temperature
    return whole + self.team(pairs.tokens, similar, pairs.groups)


_LOSSES: dict[str, Callable[[Alignment, Pairs], Tensor]] = {
    "ita": _ita,
    "swd": _swd,
    "ssan": _ssan,
    "cdd": _cdd,
    "sdm": _sdm,
    "team": _team,
}

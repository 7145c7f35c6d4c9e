"""TEAM, an alignment loss on the vectors of single tokens, for phase A in place of ITA.

Xie et al., "Token Embeddings Alignment for Cross-Modal Retrieval", ACM Multimedia 2022. The tokens
of a text ask an image, in blocks of attention, for what they stand for, and a pair scores by how
near the answers are to the questions. That paper matches images with texts and has no classes, so
its use beside a classifier, on labelled pairs, is this project's adaptation. Two blocks stand in
place of six, because the texts are short, and pairs of the same text are no negatives.
Axes: B pairs, L text tokens, N image tokens, D_s, D_v the widths of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 2
WIDTH = 512  # of the space in which answers and questions are compared
HEAD = 64  # width of a head of attention
DROPOUT = 0.1


@dataclass(frozen=True)
class Tokens:
    """These are the vectors of the tokens of a batch: row i of each is one image with its text."""

    images: Tensor  # [B, N, D_v]
    texts: Tensor  # [B, L, D_s]
    mask: Tensor  # 1 for a token, 0 for padding, [B, L]

    def to(self, kind: torch.dtype) -> Tokens:
        """Return the vectors in another type."""
        return replace(self, images=self.images.to(kind), texts=self.texts.to(kind))


class Block(nn.Module):
    """In this block the tokens of a text compare what they have found, and ask the image again."""

    def __init__(self, text_width: int, image_width: int) -> None:
        """Make it for tokens of widths D_s and D_v."""
        super().__init__()
        heads = text_width // HEAD if text_width % HEAD == 0 else 1
        self.norms = nn.ModuleList([nn.LayerNorm(text_width) for _ in range(3)])
        self.compare = nn.MultiheadAttention(text_width, heads, batch_first=True)
        self.ask = nn.MultiheadAttention(
            text_width, heads, kdim=image_width, vdim=image_width, batch_first=True
        )
        self.widen = nn.Sequential(
            nn.Linear(text_width, 2 * text_width),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(2 * text_width, text_width),
        )
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, found: Tensor, tokens: Tokens) -> Tensor:
        """Return what the text tokens have found then, [B, L, D_s]; `found`: before, the same."""
        values, padding = self.norms[0](found), tokens.mask == 0
        asked = tokens.texts + values
        seen = self.compare(asked, asked, values, key_padding_mask=padding, need_weights=False)[0]
        found = found + self.drop(seen)
        asked = tokens.texts + self.norms[1](found)
        seen = self.ask(asked, tokens.images, tokens.images, need_weights=False)[0]
        found = found + self.drop(seen)
        return found + self.drop(self.widen(self.norms[2](found)))


class Team(nn.Module):
    """This is the part of TEAM that reads tokens, with what it learns. No checkpoint has it."""

    def __init__(self, text_width: int, image_width: int) -> None:
        """Make it for tokens of widths D_s and D_v."""
        super().__init__()
        self.blocks = nn.ModuleList([Block(text_width, image_width) for _ in range(BLOCKS)])
        self.answer, self.question = (nn.Linear(text_width, WIDTH) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def scores(self, tokens: Tokens) -> Tensor:
        """Compute the score of each pair behind each block, [blocks, B].

        It is the mean over text tokens of the cosine of what a token has found and itself, both
        projected: -1 to 1.
        """
        weight = tokens.mask.to(tokens.texts.dtype)
        questions, found = self.question(tokens.texts), torch.zeros_like(tokens.texts)
        scores = []
        for block in self.blocks:
            found = block(found, tokens)
            cosines = F.cosine_similarity(self.answer(found), questions, dim=2)
            scores.append((cosines * weight).sum(dim=1) / weight.sum(dim=1))
        return torch.stack(scores)

    def forward(self, tokens: Tokens, similar: Tensor, groups: Tensor) -> Tensor:
        """Compute the cross-entropy of the score of each pair among three, summed over blocks.

        The others are those of its text with a hard negative image and of its image with a hard
        negative text. The scores are multiplied by a learned scale of at most 100. Where all texts
        of the batch are the same there is no negative, and the loss is 0.

        Args:
            similar: similarities of x_v'_i and x_s'_j, divided by tau, [B, B].
            groups: [B], equal where two texts are the same: such pairs are no negatives.
        """
        others = groups[:, None] != groups
        text, image = (hard_negatives(of.detach(), others) for of in (similar, similar.T))
        three = Tokens(
            torch.cat([tokens.images, tokens.images[image], tokens.images]),
            torch.cat([tokens.texts, tokens.texts, tokens.texts[text]]),
            torch.cat([tokens.mask, tokens.mask, tokens.mask[text]]),
        )
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        scores = scale * self.scores(three).view(BLOCKS, 3, -1)  # [blocks, 3, B]
        losses = -scores.log_softmax(dim=1)[:, 0].sum(dim=0)  # [B]
        return losses.mean() * others.any()


def hard_negatives(similar: Tensor, others: Tensor) -> Tensor:
    """Draw a column for each row in proportion to the softmax of `similar`, among `others`.

    Args:
        similar, others: [B, B]. A row without any other gets any column.

    Returns:
        Indices of the columns, [B].
    """
    allowed = others | ~others.any(dim=1, keepdim=True)
    chances = similar.masked_fill(~allowed, -torch.inf).softmax(dim=1)
    return torch.multinomial(chances, 1)[:, 0]

"""The fusion operators of MARNet eq. (24): how x_EMA and x_CDR become one vector.

All take a, b of shape [B, D]; `concat` gives [B, 2D], the others [B, D]. SUM and HM follow the
definitions of Niu et al. 2021 (counterfactual VQA), evaluated so that large inputs stay finite.
There a and b are logits; eq. (24) fuses representations. `fusion_level` chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fuse_concat(a: Tensor, b: Tensor) -> Tensor:
    """Return [a ; b]."""
    return torch.cat([a, b], dim=-1)


def fuse_add(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b."""
    return a + b


def fuse_mul(a: Tensor, b: Tensor) -> Tensor:
    """Return a * b, element by element."""
    return a * b


def fuse_sum(a: Tensor, b: Tensor) -> Tensor:
    """Compute SUM: log sigma(a + b)."""
    return F.logsigmoid(a + b)


def fuse_hm(a: Tensor, b: Tensor) -> Tensor:
    """Compute HM (harmonic): log(h / (1 + h)) with h = sigma(a) sigma(b)."""
    log_h = F.logsigmoid(a) + F.logsigmoid(b)
    return log_h - torch.log1p(torch.exp(log_h))


FUSION_LEVELS = ("feature", "logit")
FUSIONS = {
    "concat": fuse_concat,
    "add": fuse_add,
    "mul": fuse_mul,
    "sum": fuse_sum,
    "hm": fuse_hm,
}

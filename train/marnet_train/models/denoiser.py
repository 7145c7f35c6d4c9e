"""The denoiser X_theta of MARNet: four linear layers that estimate the clean semantic vector."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.01  # MARNet eq. (6)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Return cos and sin of t at dim / 2 geometric frequencies. [B] -> [B, dim].

    It is the embedding of Vaswani et al. 2017.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].to(frequency) * frequency  # [B, dim / 2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """This is tau(t): a sinusoidal table followed by Linear-SiLU-Linear. [B] -> [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        table = sinusoidal_embedding(t, self.dim).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(table)))


class Denoiser(nn.Module):
    """This is X_theta(x_s^t, t, x_v) -> x_s^0, the network of MARNet eq. (19).

    It is Linear-LeakyReLU three times, then Linear. The first layer sees
    [x_t ; condition ; tau(t)], in that order: `split_input_weight` gives its three column blocks to
    whoever rewrites the loop. A progressive one sees [x_t ; r] where others see x_t: r is its own
    estimate in the step before, and zero in the first.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        hidden: int,
        time_dim: int,
        *,
        progressive: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.condition_dim, self.progressive = dim, condition_dim, progressive
        self.state_dim = 2 * dim if progressive else dim  # of x_t, or of [x_t ; r]
        self.time = TimeEmbedding(time_dim)
        self.layer1 = nn.Linear(self.state_dim + condition_dim + time_dim, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(hidden, hidden)
        self.layer4 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Estimate the clean vector: x [B, D], t [B] in 1..T, condition [B, D_c] -> [B, D].

        For a progressive denoiser x is [x_t ; r], [B, 2 D].
        """
        h = torch.cat([x, condition, self.time(t)], dim=-1)  # [B, ... + D_c + E]
        h = F.leaky_relu(self.layer1(h), LEAKY_SLOPE)  # [B, H]
        h = F.leaky_relu(self.layer2(h), LEAKY_SLOPE)
        h = F.leaky_relu(self.layer3(h), LEAKY_SLOPE)
        return self.layer4(h)  # [B, D]

    def estimate(
        self, x: Tensor, t: Tensor, condition: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate the clean vector as training does it: x_t [B, D], t [B], condition -> [B, D].

        In half of the calls a progressive denoiser gets its own estimate of the same x_t as r, made
        without a gradient, and else zero: self-conditioning, algorithm 1 of Chen, Zhang and Hinton,
        "Analog Bits", ICLR 2023 (arXiv 2208.04202).
        """
        if not self.progressive:
            return self(x, t, condition)
        r = torch.zeros_like(x)
        if torch.rand((), generator=generator) < 0.5:
            with torch.no_grad():
                r = self(torch.cat([x, r], dim=-1), t, condition)
        return self(torch.cat([x, r], dim=-1), t, condition)

    def given(self, condition: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Make the same estimates for the steps of a chain: (x, t [B], all equal) -> [B, D].

        The condition's share of the first layer is the same in every step, so it is computed once.
        """
        w_x, w_c, w_t = self.split_input_weight()
        share = F.linear(condition, w_c, self.layer1.bias)  # [B, H]

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            of_time = F.linear(self.time(t[:1]), w_t)  # [1, H]
            h = F.leaky_relu(torch.addmm(share + of_time, x, w_x.T), LEAKY_SLOPE)
            h = F.leaky_relu(self.layer2(h), LEAKY_SLOPE)
            h = F.leaky_relu(self.layer3(h), LEAKY_SLOPE)
            return self.layer4(h)

        return denoise

    def split_input_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_x [H, D or 2 D], W_c [H, D_c], W_t [H, E] of the first layer."""
        parts = [self.state_dim, self.condition_dim, self.time.dim]
        w_x, w_c, w_t = self.layer1.weight.split(parts, dim=1)
        return w_x, w_c, w_t

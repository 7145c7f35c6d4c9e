"""Noise schedules, sampler tables and the reference sampling loop.

Notation (DDPM, Ho et al. 2020; arrays are indexed by the paper's t = 1..T through element t - 1):
beta_t variance added at step t, alpha_t = 1 - beta_t, abar_t = product of alpha_1..alpha_t,
abar_0 = 1.
Axes: B batch, S sampling steps, D feature.

Every sampler here is nothing but a table. With x0 the network's estimate of the clean vector,
    x_next = A_i x + B_i x0_i + C_i x0_{i-1} + S_i z_i .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marnet_sdk.errors import InvalidInput
from marnet_sdk.trajectory import NoiseTrajectory

SCHEDULES = ("cosine",)
SAMPLERS = ("ddpm",)


@dataclass(frozen=True)
class ScheduleConfig:
    """Which noise schedule a model is trained with."""

    kind: str = "cosine"
    steps: int = 100  # T
    offset: float = 0.008  # s of the cosine schedule
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise InvalidInput(f"schedule kind {self.kind!r} is unknown; choose from {SCHEDULES}")
        if self.steps < 1:
            raise InvalidInput(f"a schedule needs at least 1 step, got {self.steps}")
        if not (self.offset >= 0 and 0 < self.max_beta < 1):
            raise InvalidInput(
                f"a schedule needs offset >= 0 and 0 < max_beta < 1, got offset {self.offset} and "
                f"max_beta {self.max_beta}"
            )


def cosine_betas(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> NDArray[np.float64]:
    """beta_1..beta_T of the cosine schedule, eq. (17) of Nichol & Dhariwal 2021. Shape [T]."""
    t = np.arange(steps + 1, dtype=np.float64) / steps
    f = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def alphas_cumprod(config: ScheduleConfig) -> NDArray[np.float64]:
    """abar_0..abar_T in float64, with abar_0 = 1. Shape [T + 1]."""
    betas = cosine_betas(config.steps, config.offset, config.max_beta)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0): MARNet eq. (15).

    Args:
        x0, noise: [B, D]. t: [B] integers in 1..T. abar: [T + 1] as from `alphas_cumprod`.
    """
    a = abar[t][:, None]  # [B, 1]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def sampling_timesteps(train_steps: int, steps: int) -> list[int]:
    """The S timesteps t_1 > ... > t_S >= 1 that a sampler of S <= T steps visits: round(T k / S).

    Raises:
        InvalidInput: S is not in 1..T.
    """
    if not 1 <= steps <= train_steps:
        raise InvalidInput(
            f"got {steps} sampling steps; the model was trained with T = {train_steps}, "
            f"so choose 1 to {train_steps}"
        )
    # floor(x + 1/2), not round(): Python rounds halves to even, which would depend on k.
    return [(2 * train_steps * k + steps) // (2 * steps) for k in range(steps, 0, -1)]


@dataclass(frozen=True)
class SamplerTable:
    """A sampler: which timesteps, and the row (A, B, C, S) of each."""

    sampler: str
    train_steps: int  # T
    timesteps: tuple[int, ...]  # S of them, decreasing, 1-based
    coefficients: NDArray[np.float64]  # [S, 4]: A, B, C, S


def ddpm_table(abar: NDArray[np.float64], timesteps: list[int]) -> NDArray[np.float64]:
    """Rows (A, B, 0, S) of ancestral sampling: MARNet eq. (21)-(23), on any subset of timesteps.

    For consecutive visited timesteps t > p: alpha = abar_t / abar_p takes the place of alpha_t.
    The last row is (0, 1, 0, 0): the chain ends in the network's own estimate.

    Args:
        abar: [T + 1]. timesteps: S of them, decreasing.
    Returns:
        [S, 4] float64.
    """
    a_t = abar[timesteps]
    a_p = abar[[*timesteps[1:], 0]]
    alpha = a_t / a_p
    beta = 1 - alpha
    from_x0 = np.sqrt(a_p) * beta / (1 - a_t)
    from_x = np.sqrt(alpha) * (1 - a_p) / (1 - a_t)
    sigma = np.sqrt(beta * (1 - a_p) / (1 - a_t))
    return np.stack([from_x, from_x0, np.zeros_like(sigma), sigma], axis=1)


def sampler_table(config: ScheduleConfig, sampler: str, steps: int | None = None) -> SamplerTable:
    """The table of a sampler for a model trained with `config`; `steps` defaults to T."""
    if sampler not in SAMPLERS:
        raise InvalidInput(f"sampler {sampler!r} is unknown; choose from {SAMPLERS}")
    timesteps = sampling_timesteps(config.steps, config.steps if steps is None else steps)
    table = ddpm_table(alphas_cumprod(config), timesteps)
    return SamplerTable(sampler, config.steps, tuple(timesteps), table)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    table: SamplerTable,
    initial: Tensor,
    noise: Tensor,
) -> Tensor:
    """The reverse chain as the paper writes it: the slow, obvious twin of every exported loop.

    Args:
        denoise: (x [B, D], t [B]) -> estimate of x_0 [B, D].
        initial: x_T, [B, D]. noise: z of every step, [S, 1 or B, D] (the last row is not used).
    Returns:
        x_0, [B, D].
    """
    x = initial
    previous = torch.zeros_like(x)
    for i, (t, (a, b, c, s)) in enumerate(
        zip(table.timesteps, table.coefficients.tolist(), strict=True)
    ):
        x0 = denoise(x, torch.full((x.shape[0],), t, device=x.device))
        x = a * x + b * x0 + c * previous + s * noise[i]
        previous = x0
    return x


def trajectory_tensors(
    trajectory: NoiseTrajectory, batch: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """A shared noise trajectory as (initial [B, D], noise [S, 1, D]) for `sample`."""
    initial = torch.as_tensor(trajectory.initial).to(like).expand(batch, -1)
    return initial, torch.as_tensor(trajectory.steps).to(like)[:, None]

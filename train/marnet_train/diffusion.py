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
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marnet_sdk.errors import InvalidInput
from marnet_sdk.noise.trajectory import NoiseTrajectory

SCHEDULES = ("cosine", "linear")


@dataclass(frozen=True)
class ScheduleConfig:
    """This says which noise schedule a model is trained with."""

    kind: str = "cosine"
    steps: int = 100  # T
    offset: float = 0.008  # cosine: s
    max_beta: float = 0.999  # cosine: no beta_t is larger
    first_beta: float = 1e-4  # linear: beta_1
    last_beta: float = 0.02  # linear: beta_T

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
        if not 0 < self.first_beta <= self.last_beta < 1:
            raise InvalidInput(
                "a schedule needs 0 < first_beta <= last_beta < 1, got first_beta "
                f"{self.first_beta} and last_beta {self.last_beta}"
            )

    def alone(self, steps: int | None = None) -> ScheduleConfig:
        """Return the schedule as no stage of a chain, with another T if one is given."""
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(ScheduleConfig)}
        settings["steps"] = self.steps if steps is None else steps
        return ScheduleConfig(**settings)


@dataclass(frozen=True)
class StageConfig(ScheduleConfig):
    """This is the part of a noise schedule that one of two stages has, of the same chain.

    The stage counts its levels by itself: it begins at t = `steps`, and ends at t = 0. The second
    stage is a bridge. Where it begins, the mean of x_t is what the first stage led to, and it moves
    from there to x_0 by a share of 1 / T a level. What the first stage led to is known, and x_t is
    held without it, which leaves the share 1 - t / T of the signal (see `signal_share`).
    """

    above: int = 0  # levels of the first stage, which this one carries on
    below: int = 0  # levels of the second stage, which carries this one on

    @property
    def whole(self) -> ScheduleConfig:
        """Return the schedule of the whole chain."""
        return self.alone(self.above + self.steps + self.below)


# Named settings, for recipes. `group_linear20` is what the authors' group uses in related work
# (DDPM's betas, 20 steps). Its abar_T is 0.82, so training never sees anything like the pure noise
# that sampling starts from: it is here to compare with.
SCHEDULE_PRESETS = {
    "cosine100": ScheduleConfig(),
    "group_linear20": ScheduleConfig("linear", steps=20),
}


def cosine_betas(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> NDArray[np.float64]:
    """Make beta_1..beta_T of the cosine schedule: eq. (17) of Nichol & Dhariwal 2021. Shape [T]."""
    t = np.arange(steps + 1, dtype=np.float64) / steps
    f = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], max_beta)


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> NDArray[np.float64]:
    """Make beta_1..beta_T of the linear schedule of Ho et al. 2020, section 4. Shape [T]."""
    return np.linspace(first, last, steps, dtype=np.float64)


def alphas_cumprod(config: ScheduleConfig) -> NDArray[np.float64]:
    """Make abar_0..abar_T in float64, with abar_0 = 1. Shape [T + 1].

    Those of a stage are a part of its whole chain's, and abar_0 is where the stage ends.
    """
    if isinstance(config, StageConfig):
        return alphas_cumprod(config.whole)[config.below : config.below + config.steps + 1]
    if config.kind == "linear":
        betas = linear_betas(config.steps, config.first_beta, config.last_beta)
    else:
        betas = cosine_betas(config.steps, config.offset, config.max_beta)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def signal_share(config: ScheduleConfig) -> NDArray[np.float64]:
    """Make the share of sqrt(abar_t) that the mean of x_t has of x_0, for t = 0..T. Shape [T + 1].

    It is 1, but of a bridge 1 - t / T.
    """
    if isinstance(config, StageConfig) and config.above:
        return 1 - np.arange(config.steps + 1) / config.steps
    return np.ones(config.steps + 1)


def first_deviation(config: ScheduleConfig) -> float:
    """Return the standard deviation of the noise that x_T is drawn with: 1.

    But of a bridge it is that of its level, because there is more than noise above it.
    """
    if isinstance(config, StageConfig) and config.above:
        return float(np.sqrt(1 - alphas_cumprod(config)[-1]))
    return 1.0


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0): MARNet eq. (15).

    Args:
        x0: [B, D]; of a bridge, times its `signal_share` at t. noise: [B, D]. t: [B] integers in
            1..T. abar: [T + 1] as from `alphas_cumprod`.
    """
    a = abar[t][:, None]  # [B, 1]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def sampling_timesteps(train_steps: int, steps: int) -> list[int]:
    """List the timesteps t_1 > ... > t_S >= 1 of a sampler of S <= T steps: round(T k / S).

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
    """This is a sampler: which timesteps it visits, and the row (A, B, C, S) of each."""

    sampler: str
    train_steps: int  # T
    timesteps: tuple[int, ...]  # S of them, decreasing, 1-based
    coefficients: NDArray[np.float64]  # [S, 4]: A, B, C, S
    eta: float = 0.0  # of ddim


# Each sampler makes its rows from abar at the timesteps it visits and, last, at the one where it
# ends: `nodes`, [S + 1], increasing. t is where a step begins, p where it ends. Where abar_p = 1,
# every sampler's row is (0, 1, 0, 0): the chain ends in the network's own estimate.


def ddpm_rows(nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make the rows of ancestral sampling, MARNet eq. (21)-(23). [S + 1] -> [S, 4].

    It works on any subset of timesteps: alpha = abar_t / abar_p takes the place of alpha_t.
    """
    a_t, a_p = nodes[:-1], nodes[1:]
    alpha = a_t / a_p
    beta = 1 - alpha
    from_x0 = np.sqrt(a_p) * beta / (1 - a_t)
    from_x = np.sqrt(alpha) * (1 - a_p) / (1 - a_t)
    sigma = np.sqrt(beta * (1 - a_p) / (1 - a_t))
    return np.stack([from_x, from_x0, np.zeros_like(sigma), sigma], axis=1)


def ddim_rows(nodes: NDArray[np.float64], eta: float = 0.0) -> NDArray[np.float64]:
    """Make the rows of DDIM, eq. (12) and (16) of Song et al. 2021. [S + 1] -> [S, 4].

    Args:
        eta: 0 adds no noise after the start; 1 is `ddpm`.

    Raises:
        InvalidInput: eta is negative, not finite, or asks for more noise than a step ends with.
    """
    a_t, a_p = nodes[:-1], nodes[1:]
    share = (1 - a_t / a_p) / (1 - a_t)  # sigma^2 at eta = 1, over 1 - a_p; rounds to 1 at most
    largest = (1 / np.sqrt(share[a_p < 1])).min(initial=np.inf)
    if not (0 <= eta <= largest and np.isfinite(eta)):
        raise InvalidInput(f"eta: got {eta}; expected 0 to {largest:.3g} for these timesteps")
    sigma = eta * np.sqrt((1 - a_p) * share)
    direction = (1 - a_p) * (1 - eta**2 * share).clip(0)  # variance left along estimated noise
    from_x = np.sqrt(direction / (1 - a_t))
    from_x0 = np.sqrt(a_p) - from_x * np.sqrt(a_t)
    return np.stack([from_x, from_x0, np.zeros_like(sigma), sigma], axis=1)


def dpmpp_rows(
    nodes: NDArray[np.float64], share: NDArray[np.float64] | float = 1.0
) -> NDArray[np.float64]:
    """Make the rows of DPM-Solver++(2M), algorithm 2 of Lu et al. 2022. [S + 1] -> [S, 4].

    The paper is arXiv 2211.01095. The first step, and a last one that ends at abar_p = 1, are of
    first order. So is the second of a bridge, because the first begins without a signal.

    Args:
        share: of the signal, [S + 1].
    """
    alpha, sigma = share * np.sqrt(nodes), np.sqrt(1 - nodes)
    ratio = sigma[1:] / sigma[:-1]
    from_x0 = alpha[1:] - ratio * alpha[:-1]  # alpha_p (1 - exp(-h)), also where h is infinite
    previous = np.zeros_like(from_x0)
    with np.errstate(divide="ignore"):
        step = np.diff(np.log(alpha / sigma))  # h_i, in the half log of the signal-to-noise ratio
    second = np.arange(1, len(step))
    second = second[np.isfinite(step[second])]
    extrapolate = step[second] / (2 * step[second - 1])  # 1 / (2 r_i)
    previous[second] = -from_x0[second] * extrapolate
    from_x0[second] *= 1 + extrapolate
    return np.stack([ratio, from_x0, previous, np.zeros_like(ratio)], axis=1)


SAMPLERS = ("ddpm", "ddim", "dpmpp")


def sampler_table(
    config: ScheduleConfig, sampler: str, steps: int | None = None, eta: float = 0.0
) -> SamplerTable:
    """Make the table of a sampler for a model trained with `config`; `steps` defaults to T.

    Raises:
        InvalidInput: an unknown sampler, steps outside 1..T, or an eta that it cannot have.
    """
    if sampler not in SAMPLERS:
        raise InvalidInput(f"sampler {sampler!r} is unknown; choose from {SAMPLERS}")
    if eta and sampler != "ddim":
        raise InvalidInput(f"eta: got {eta} for {sampler}; only ddim has it, so leave it at 0")
    timesteps = sampling_timesteps(config.steps, config.steps if steps is None else steps)
    visited = [*timesteps, 0]
    nodes, share = alphas_cumprod(config)[visited], signal_share(config)[visited]
    if sampler == "dpmpp":
        rows = dpmpp_rows(nodes, share)
    else:
        rows = ddpm_rows(nodes) if sampler == "ddpm" else ddim_rows(nodes, eta)
        if share.min() < 1:  # as much noise as without; the mean goes from its place to the next
            signal = share * np.sqrt(nodes)
            rows[:, 1] = signal[1:] - rows[:, 0] * signal[:-1]
    if nodes[-1] == 1:
        rows[-1] = 0, 1, 0, 0  # exactly
    return SamplerTable(sampler, config.steps, tuple(timesteps), rows, eta)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    table: SamplerTable,
    initial: Tensor,
    noise: Tensor,
    watch: Callable[[int, Tensor], None] = lambda step, x0: None,
    *,
    progressive: bool = False,
) -> Tensor:
    """Run the reverse chain as the paper writes it: the slow, obvious twin of every exported loop.

    Args:
        denoise: (x [B, D], t [B]) -> estimate of x_0 [B, D].
        initial: x_T, [B, D]. noise: z of every step, [S, 1 or B, D] (the last row is not used).
        watch: is told each step's index and estimate of x_0.
        progressive: `denoise` gets [x ; r], [B, 2 D], where r is its estimate in the step before,
            and zero in the first.
    Returns:
        x_0, [B, D].
    """
    x = initial
    previous = torch.zeros_like(x)
    for i, (t, (a, b, c, s)) in enumerate(
        zip(table.timesteps, table.coefficients.tolist(), strict=True)
    ):
        seen = torch.cat([x, previous], dim=-1) if progressive else x
        x0 = denoise(seen, torch.full((x.shape[0],), t, device=x.device))
        watch(i, x0)
        x = a * x + b * x0 + c * previous + s * noise[i]
        previous = x0
    return x


def trajectory_tensors(
    trajectory: NoiseTrajectory, batch: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a shared noise trajectory as (initial [B, D], noise [S, 1, D]) for `sample`."""
    initial = torch.as_tensor(trajectory.initial).to(like).expand(batch, -1)
    return initial, torch.as_tensor(trajectory.steps).to(like)[:, None]

"""Phase B: the denoiser learns to estimate x_s (eq. 20), and how it is judged on the way.

Axes: N images, V cached views of each, B batch, D_v, D_s feature widths, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_train.diffusion import (
    ScheduleConfig,
    alphas_cumprod,
    q_sample,
    sample,
    sampler_table,
    signal_share,
)
from marnet_train.losses import refinement_loss
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet
from marnet_train.optimise import batches
from marnet_train.phases import Features, Training, learn

LOOK_STEPS, LOOK_SAMPLES = 25, 4  # of the chains that phase B is judged by on the way


class Refiner(nn.Module):
    """This holds what phase B learns: the denoiser and the classifier of its estimates."""

    def __init__(self, denoiser: Denoiser, classifier: nn.Linear, schedule: ScheduleConfig) -> None:
        super().__init__()
        self.denoiser, self.classifier, self.schedule = denoiser, classifier, schedule

    @classmethod
    def of(cls, model: MARNet) -> Refiner:
        """Return the model's own refiner."""
        return cls(model.denoiser, model.semantic_classifier, model.config.schedule)

    def one_pass(self, condition: Tensor) -> Tensor:
        """Make the estimate without any noise: x_t = 0 at t = T. [B, D_v] -> [B, D_s]."""
        x = condition.new_zeros(len(condition), self.denoiser.state_dim)
        t = torch.full((len(condition),), self.schedule.steps, device=condition.device)
        return self.denoiser(x, t, condition)


def train_refinement(
    refiner: Refiner,
    condition: Tensor,
    features: Features,
    training: Training,
    title: str = "refinement",
    *,
    look: Callable[[], float],
    one_pass: bool = False,
) -> float:
    """Run phase B: minimise L_CDR (eq. 20), t ~ Uniform{1..T} for each row, but for a share of
    `pure_noise` at t = T. The weights are kept that score best on validation.

    Args:
        condition: standardised x_v, [V * N, D_v].
        look: the score of the refiner as it is, higher is better.
        one_pass: train the same network as a plain regression, without noise or steps: the
            control "+MLP".
    Returns:
        The best score.
    """
    phase, schedule, device = training.recipe.refinement, refiner.schedule, condition.device
    generator, steps = training.generator(), schedule.steps
    abar, share = (
        torch.as_tensor(levels, dtype=torch.float32, device=device)
        for levels in (alphas_cumprod(schedule), signal_share(schedule))
    )
    learner = training.learner([(refiner, phase.lr)], phase, title, len(condition))
    assert phase.norm_weight != "auto"
    weights = {"ce_weight": phase.ce_weight, "norm_weight": phase.norm_weight}

    def loss(rows: Tensor) -> Tensor:
        seen = F.dropout(condition[rows.to(device)], phase.dropout)
        x0 = features.x_s[rows.to(device)]  # [B, D_s]
        if one_pass:
            estimate = refiner.one_pass(seen)
        else:
            t = torch.randint(1, steps + 1, (len(rows),), generator=generator)
            pure = torch.rand(len(rows), generator=generator) < phase.pure_noise
            t = torch.where(pure, steps, t).to(device)
            noise = torch.randn(len(rows), x0.shape[1], generator=generator).to(device)
            x_t = q_sample(share[t][:, None] * x0, t, noise, abar)
            estimate = refiner.denoiser.estimate(x_t, t, seen, generator)
        labels = features.labels[rows.to(device)]
        return refinement_loss(refiner.classifier(estimate), labels, estimate, x0, **weights)

    order = partial(batches, len(condition), phase.batch, generator)
    learn(training, learner, phase.epochs, generator, order, loss, look)
    return learner.score


@torch.no_grad()
def refiner_probabilities(
    refiner: Refiner, model: MARNet, x_v: Tensor, seed: int, *, one_pass: bool
) -> Tensor:
    """Compute the probabilities of the refined branch alone, [N, C]: in one pass, or as the mean
    over `LOOK_SAMPLES` chains of at most `LOOK_STEPS` steps, each row with noise of its own.

    Args:
        model: whose condition and start the refiner gets.
        x_v: what everything behind the encoder gets of the images.
    """
    if one_pass:
        return refiner.classifier(refiner.one_pass(model.condition(x_v))).softmax(dim=1)
    schedule, denoiser = refiner.schedule, refiner.denoiser
    table = sampler_table(schedule, "ddpm", min(LOOK_STEPS, schedule.steps))
    generator, found = torch.Generator().manual_seed(seed), []
    for rows in x_v.split(1024):
        shape = (len(table.timesteps), len(rows), denoiser.dim)
        total, denoise = torch.zeros((), device=rows.device), denoiser.given(model.condition(rows))
        for _ in range(LOOK_SAMPLES):
            initial = torch.randn(shape[1:], generator=generator).to(rows)
            noise = torch.randn(shape, generator=generator).to(rows)
            start = model.start(rows, initial)
            x = sample(denoise, table, start, noise, progressive=denoiser.progressive)
            total = total + refiner.classifier(x).softmax(dim=1)
        found.append(total / LOOK_SAMPLES)
    return torch.cat(found)

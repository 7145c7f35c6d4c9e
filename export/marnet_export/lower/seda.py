"""SeDA, lowered: its first stage becomes a part of the image encoder.

The semantic learner draws no noise, so what it makes of an image is a function of the image, like
x_v. The encoder gives both, [x_v ; s], and everything behind it is MARNet's. If stage 2 carries the
chain on, the encoder also gives what stage 1 left, [x_v ; s ; left], and the loop starts from it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_export.lower.methods import Floats, Lowered, lower_marnet
from marnet_export.lower.modules import Head
from marnet_export.lower.plan import SamplingPlan, make_plan, rewrite
from marnet_train.diffusion import first_deviation
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.seda import SeDA


def lower_seda(model: SeDA) -> Lowered:
    """SeDA as it is deployed."""
    width = model.vision.dim
    seen = 3 * width if model.config.carries else 2 * width
    plan = seeing_plan(model)
    lowered = lower_marnet(model, plan)
    assert lowered.alignment is not None
    weight, bias = lowered.alignment.vision
    return replace(
        lowered,
        encoder=SeeingEncoder(lowered.encoder, LoweredLearner(model)).eval(),
        head=_blind_to_semantics(lowered.head, seen),
        image_width=seen,
        alignment=replace(lowered.alignment, vision=(_padded(weight, seen), bias)),
    )


def seeing_plan(model: SeDA, carry: str | None = None) -> SamplingPlan:
    """Rewrite the loop of stage 2, for what the encoder gives; `carry` is as of `make_plan`."""
    plan = make_plan(model, carry)
    mean, std = plan.standardise
    more = plan.condition_weight.shape[1] - len(mean)  # s is standardised already
    plan = replace(plan, standardise=(np.r_[mean, np.zeros(more)], np.r_[std, np.ones(more)]))
    if not model.config.carries:
        return plan
    start = np.eye(model.latent_width) if plan.carry == "feature" else plan.input_weight
    start = np.pad(start, ((0, plan.fed), (0, 0)))  # there is no estimate to be fed
    return replace(plan, start_weight=start, start_noise=first_deviation(model.config.schedule))


def _padded(weight: Floats, width: int) -> Floats:
    """Map the weight [R, I] of a layer to [R, width]: the layer also gets more, and does not look
    at it.
    """
    return np.pad(weight, ((0, 0), (0, width - weight.shape[1])))


def _blind_to_semantics(head: nn.Module, width: int) -> nn.Module:
    """The head with a projection of [x_v ; s ...], of that width, that does not look at s."""
    assert isinstance(head, Head)
    layer = head.project_vision
    wide = nn.Linear(width, layer.out_features)
    with torch.no_grad():
        wide.weight.copy_(torch.from_numpy(_padded(layer.weight.numpy(), width)))
        wide.bias.copy_(layer.bias)
    more = width - layer.in_features
    head.project_vision = wide
    head.vision_mean = F.pad(head.vision_mean, (0, more))
    head.vision_std = F.pad(head.vision_std, (0, more), value=1.0)
    return head.eval()


class SeeingEncoder(nn.Module):
    """F_v and the semantic learner: pixels [B, 3, H, W] -> [x_v ; s], [B, 2 D_v], or as the
    learner gives them, [x_v ; s ; left], [B, 3 D_v]."""

    def __init__(self, vision: nn.Module, learner: LoweredLearner) -> None:
        super().__init__()
        self.vision, self.learner = vision, learner

    def forward(self, pixels: Tensor) -> Tensor:
        x_v = self.vision(pixels)
        return torch.cat([x_v, self.learner(x_v)], dim=-1)


class LoweredLearner(nn.Module):
    """The semantic learner's chain, rewritten as the loop is: three H x H products a step.

    Its steps are few and their number is fixed, so they are written out. What the chain leaves is a
    sum of its estimates, and so the same sum of its last hidden layers, multiplied once.
    """

    coefficients: list[tuple[float, float, float]]
    kept: list[float]  # of each step's estimate, in what is left; empty if nothing carries it on
    rows: Tensor  # [S, H]
    mean: Tensor
    std: Tensor
    left_bias: Tensor  # [D_v]

    def __init__(self, model: SeDA) -> None:
        super().__init__()
        learner = model.learner
        table = learner.table
        plan = rewrite(
            learner.denoiser, table.train_steps, (model.vision_mean, model.vision_std), "hidden"
        )
        # Without noise, w of `plan` is what b4 makes of itself from step to step.
        w, before = np.zeros_like(plan.output[1]), np.zeros_like(plan.output[1])
        rows, coefficients = [], []
        for t, (a, b, c, _) in zip(table.timesteps, table.coefficients.tolist(), strict=True):
            rows.append(plan.time_bias[t - 1] + plan.input_weight @ w)
            coefficients.append((a, b, c))
            w, before = a * w + (b * plan.output[1] + c * before), plan.output[1]
        self.coefficients = coefficients
        self.kept = _kept(coefficients, learner.end_signal) if model.config.carries else []
        self.register_buffer("rows", torch.from_numpy(np.stack(rows)).float())
        for name, array in zip(("mean", "std"), plan.standardise, strict=True):
            self.register_buffer(name, torch.from_numpy(array).float())
        left_bias = (sum(self.kept) - 1) * plan.output[1]  # beside what `output` adds
        self.register_buffer("left_bias", torch.from_numpy(left_bias).float())
        self.into_condition = _linear(plan.condition_weight)
        self.hidden2, self.hidden3 = _linear(*plan.hidden2), _linear(*plan.hidden3)
        self.carry = _linear(plan.carry_weight, plan.carry_bias)
        self.output, self.progressive = _linear(*plan.output), plan.fed > 0

    def forward(self, x_v: Tensor) -> Tensor:
        """Map x_v [B, D_v] to s [B, D_v], or to [s ; left], [B, 2 D_v]."""
        q = self.into_condition((x_v - self.mean) / self.std)
        into = state = before = left = torch.zeros_like(q)
        h = q
        for i, (a, b, c) in enumerate(self.coefficients):
            h = F.leaky_relu(into + q + self.rows[i], LEAKY_SLOPE)
            h = F.leaky_relu(self.hidden2(h), LEAKY_SLOPE)
            h = F.leaky_relu(self.hidden3(h), LEAKY_SLOPE)
            if self.kept:
                left = left + self.kept[i] * h
            if i + 1 < len(self.coefficients):
                gained, fed = self.carry(h), None
                if self.progressive:
                    gained, fed = gained.chunk(2, dim=-1)
                state, before = a * state + b * gained + c * before, gained
                into = state if fed is None else state + fed
        s = self.output(h)
        if not self.kept:
            return s
        return torch.cat([s, self.output(left) + self.left_bias], dim=-1)


def _kept(coefficients: list[tuple[float, float, float]], end_signal: float) -> list[float]:
    """Tell how much of each step's estimate is in z - end_signal s. The state z is behind a sampler
    of first order that started from zero; s is the last estimate.
    """
    kept: list[float] = []
    for a, b, _ in coefficients:
        kept = [a * share for share in kept] + [b]
    kept[-1] -= end_signal
    return kept


def _linear(weight: np.ndarray, bias: np.ndarray | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return layer

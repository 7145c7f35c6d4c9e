"""SeDA, lowered: its first stage becomes a part of the image encoder.

The semantic learner draws no noise, so what it makes of an image is a function of the image, like
x_v. The encoder gives both, [x_v ; s], and everything behind it is MARNet's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_export.lower.methods import Floats, Lowered, lower_marnet
from marnet_export.lower.plan import make_plan, rewrite
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.seda import SeDA


def lower_seda(model: SeDA) -> Lowered:
    """SeDA as it is deployed."""
    width = model.vision.dim
    zero, one = np.zeros(width), np.ones(width)
    plan = make_plan(model)
    mean, std = plan.standardise
    plan = replace(plan, standardise=(np.r_[mean, zero], np.r_[std, one]))  # s is, already
    lowered = lower_marnet(model, plan)
    assert lowered.alignment is not None
    weight, bias = lowered.alignment.vision
    return replace(
        lowered,
        encoder=SeeingEncoder(lowered.encoder, LoweredLearner(model)).eval(),
        head=_blind_to_semantics(lowered.head, width),
        image_width=model.seen_width(),
        alignment=replace(lowered.alignment, vision=(_padded(weight, width), bias)),
    )


def _padded(weight: Floats, width: int) -> Floats:
    """Map the weight [R, D_v] of a layer to [R, 2 D_v]: the layer also gets s, and does not look at
    it.
    """
    return np.concatenate([weight, np.zeros((len(weight), width), np.float32)], axis=1)


def _blind_to_semantics(head: nn.Module, width: int) -> nn.Module:
    """The head with a projection of [x_v ; s] that does not look at s."""
    layer = head.project_vision
    assert isinstance(layer, nn.Linear)
    wide = nn.Linear(2 * width, layer.out_features)
    with torch.no_grad():
        wide.weight.copy_(torch.from_numpy(_padded(layer.weight.numpy(), width)))
        wide.bias.copy_(layer.bias)
    head.project_vision = wide
    return head.eval()


class SeeingEncoder(nn.Module):
    """F_v and the semantic learner: pixels [B, 3, H, W] -> [x_v ; s], [B, 2 D_v]."""

    def __init__(self, vision: nn.Module, learner: LoweredLearner) -> None:
        super().__init__()
        self.vision, self.learner = vision, learner

    def forward(self, pixels: Tensor) -> Tensor:
        x_v = self.vision(pixels)
        return torch.cat([x_v, self.learner(x_v)], dim=-1)


class LoweredLearner(nn.Module):
    """The semantic learner's chain, rewritten as the loop is: three H x H products a step.

    Its steps are few and their number is fixed, so they are written out.
    """

    coefficients: list[tuple[float, float, float]]
    rows: Tensor  # [S, H]
    mean: Tensor
    std: Tensor

    def __init__(self, model: SeDA) -> None:
        super().__init__()
        learner = model.learner
        plan = rewrite(
            learner.denoiser, learner.train_steps, (model.vision_mean, model.vision_std), "hidden"
        )
        table = learner.table
        # Without noise, w of `plan` is what b4 makes of itself from step to step.
        w, before = np.zeros_like(plan.output[1]), np.zeros_like(plan.output[1])
        rows, coefficients = [], []
        for t, (a, b, c, _) in zip(table.timesteps, table.coefficients.tolist(), strict=True):
            rows.append(plan.time_bias[t - 1] + plan.input_weight @ w)
            coefficients.append((a, b, c))
            w, before = a * w + (b * plan.output[1] + c * before), plan.output[1]
        self.coefficients = coefficients
        self.register_buffer("rows", torch.from_numpy(np.stack(rows)).float())
        for name, array in zip(("mean", "std"), plan.standardise, strict=True):
            self.register_buffer(name, torch.from_numpy(array).float())
        self.into_condition = _linear(plan.condition_weight)
        self.hidden2, self.hidden3 = _linear(*plan.hidden2), _linear(*plan.hidden3)
        self.carry = _linear(plan.carry_weight, plan.carry_bias)
        self.output, self.progressive = _linear(*plan.output), plan.fed > 0

    def forward(self, x_v: Tensor) -> Tensor:
        """Map x_v [B, D_v] to s [B, D_v]."""
        q = self.into_condition((x_v - self.mean) / self.std)
        into = state = before = torch.zeros_like(q)
        h = q
        for i, (a, b, c) in enumerate(self.coefficients):
            h = F.leaky_relu(into + q + self.rows[i], LEAKY_SLOPE)
            h = F.leaky_relu(self.hidden2(h), LEAKY_SLOPE)
            h = F.leaky_relu(self.hidden3(h), LEAKY_SLOPE)
            if i + 1 < len(self.coefficients):
                gained, fed = self.carry(h), None
                if self.progressive:
                    gained, fed = gained.chunk(2, dim=-1)
                state, before = a * state + b * gained + c * before, gained
                into = state if fed is None else state + fed
        return self.output(h)


def _linear(weight: np.ndarray, bias: np.ndarray | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return layer

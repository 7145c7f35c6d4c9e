"""SeDA: alignment in two stages of diffusion, with a semantic space as the bridge.

Li, Meng, Chao, Wu, Yan, Yang, Qi and Meng, "Semantic-Space-Intervened Diffusive Alignment for
Visual Classification", IJCAI 2025 (arXiv 2505.05721). Only its abstract could be read, so this is
our reading of the abstract. Where it leaves a choice open, the choice is MARNet's:

    semantic learner    (stage 1) A diffusion model estimates the centre of an image's class, among
                        the centres of all classes in the space of image features. Its last estimate
                        is the semantic vector s.
    semantic translator (stage 2) A diffusion model estimates the text features. Its condition is
                        the image's own features and s.
    feature interaction At every step of both, a denoiser sees the state, which holds the estimates
                        of the steps before, and the condition. If it is progressive, it also sees
                        its last estimate as it was.

Stage 1 starts from zero and draws no noise: there the chain ends at the likeliest centre, where a
random one draws a class and costs accuracy. So s is a function of the image, and everything behind
it is MARNet's with [x_v ; s] in place of x_v.
Axes: B batch, K classes, D_v width of x_v.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.diffusion import ScheduleConfig, sample, sampler_table
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet, MarnetConfig


@dataclass(frozen=True)
class SedaConfig(MarnetConfig):
    """This is everything that decides the shape of a SeDA and of its two reverse processes.

    `schedule` is the translator's.
    """

    semantic_schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(steps=50))
    semantic_steps: int = 10  # of the learner's deterministic sampler
    method: ClassVar[str] = "seda"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.semantic_schedule.steps
        if type(self.semantic_steps) is not int or not 1 <= self.semantic_steps <= most:
            raise RecipeError(
                f"semantic_steps must be an integer from 1 to {most}, the steps of "
                f"semantic_schedule, got {self.semantic_steps!r}"
            )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        schedule = ScheduleConfig(**content["semantic_schedule"])
        return super().from_dict(content | {"semantic_schedule": schedule})


class SemanticLearner(nn.Module):
    """This is stage 1: it leads from standardised image features to the centre of their class."""

    def __init__(self, config: SedaConfig, width: int) -> None:
        """Build it for image features of that width, D_v."""
        super().__init__()
        self.train_steps = config.semantic_schedule.steps
        self.table = sampler_table(config.semantic_schedule, "ddim", config.semantic_steps)
        self.denoiser = Denoiser(
            width, width, config.hidden, config.time_dim, progressive=config.progressive
        )
        self.classifier = nn.Linear(width, len(config.labels))  # of estimates; training only
        self.register_buffer("centres", torch.zeros(len(config.labels), width))

    centres: Tensor  # [K, D_v]

    @torch.no_grad()
    def set_centres(self, condition: Tensor, labels: Tensor) -> None:
        """Store the mean of every class, scaled so that their root mean square is 1.

        A chain is meant for vectors of unit variance: smaller ones would be drowned in noise for
        most of its steps.

        Args:
            condition: standardised features of the training images, [N, D_v]. labels: [N].
        """
        sums = torch.zeros_like(self.centres).index_add_(0, labels, condition)
        means = sums / labels.bincount(minlength=len(sums)).clamp(min=1)[:, None]
        self.centres.copy_(means / means.square().mean().sqrt().clamp(min=1e-6))

    def forward(self, condition: Tensor) -> Tensor:
        """Run the deterministic chain from zero: standardised x_v [B, D_v] -> s [B, D_v]."""
        zero = torch.zeros_like(condition)
        noise = zero.new_zeros(len(self.table.timesteps), 1, zero.shape[1])
        denoise, progressive = self.denoiser.given(condition), self.denoiser.progressive
        return sample(denoise, self.table, zero, noise, progressive=progressive)


class SeDA(MARNet):
    """This is the whole model, float32: the reference for every export."""

    config_type = SedaConfig

    def __init__(
        self,
        config: SedaConfig,
        vision: nn.Module | None = None,
        text: nn.Module | None = None,
    ) -> None:
        """Build from a configuration; `vision` and `text` replace freshly built backbones."""
        super().__init__(config, vision, text)
        self.learner = SemanticLearner(config, self.vision.dim)

    def seen_width(self) -> int:
        """Tell the width of [x_v ; s]: twice that of x_v."""
        return 2 * self.vision.dim

    def see(self, x_v: Tensor) -> Tensor:
        """Put the semantic vector beside image features. [B, D_v] -> [x_v ; s], [B, 2 D_v]."""
        return torch.cat([x_v, self.learner(super().condition(x_v))], dim=-1)

    def semantic_logits(self, x_v: Tensor) -> Tensor:
        """Compute the logits of the classifier on s alone: [x_v ; s], [B, 2 D_v] -> [B, K]."""
        return self.learner.classifier(x_v[:, self.vision.dim :])

    def align_vision(self, x_v: Tensor) -> Tensor:
        """Project image features: x_v [B, D_v], or what `see` made of it, -> x_v' [B, D]."""
        return super().align_vision(x_v[..., : self.vision.dim])

    def condition(self, x_v: Tensor) -> Tensor:
        """Standardise the features in [x_v ; s]; s has unit variance already. [B, 2 D_v]."""
        features, s = x_v.split(self.vision.dim, dim=-1)
        return torch.cat([super().condition(features), s], dim=-1)

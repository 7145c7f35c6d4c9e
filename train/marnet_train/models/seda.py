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

Two ways lead from stage 1 to stage 2, the handover:

    restart  Stage 2 has a clock and a start of its own: w, the text features, is all that it
             diffuses, x_t = sqrt(abar_t) w + sqrt(1 - abar_t) eps.
    carry    One chain of T_1 + T_2 levels passes through both. Stage 1 has those above T_2, and
             below the mean moves from s to w; with l_t = t / T_2,
                 x_t = sqrt(abar_t) [(1 - l_t) w + l_t s] + sqrt(1 - abar_t) eps .        (R13)
             As s is known, stage 2 works on y_t = x_t - sqrt(abar_t) l_t s. So it is the chain of
             a smaller signal, and its start depends on the image: it is what stage 1 leaves,
             y = z - sqrt(abar) s at t = T_2, with z the state of stage 1.

(R13) leaves three things open. The schedule, and the number of levels that each stage has of it,
are those of the recipe's `schedule` and `semantic_schedule`, which differ in their steps alone. The
first stage ends at t = T_2, and s is the estimate of its last step. It draws no noise, so z has
none; its level's noise is added to y, as a deterministic chain from noise would have kept it.
Axes: B batch, K classes, D_v width of x_v, D_s width of x_s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.diffusion import (
    ScheduleConfig,
    StageConfig,
    alphas_cumprod,
    first_deviation,
    sample,
    sampler_table,
)
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet, MarnetConfig
from marnet_train.recipe import HANDOVERS, check_choice


@dataclass(frozen=True)
class SedaConfig(MarnetConfig):
    """This is everything that decides the shape of a SeDA and of its two reverse processes.

    `schedule` is the translator's. With the handover "carry" both become stages of one chain.
    """

    semantic_schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(steps=50))
    semantic_steps: int = 10  # of the learner's deterministic sampler
    handover: str = "restart"  # one of `HANDOVERS`: whether stage 2 carries the chain of stage 1 on
    method: ClassVar[str] = "seda"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("handover", self.handover, HANDOVERS)
        most = self.semantic_schedule.steps
        if type(self.semantic_steps) is not int or not 1 <= self.semantic_steps <= most:
            raise RecipeError(
                f"semantic_steps must be an integer from 1 to {most}, the steps of "
                f"semantic_schedule, got {self.semantic_steps!r}"
            )
        first, second = self.semantic_schedule.alone(), self.schedule.alone()
        if self.carries:
            first, second = in_one_chain(first, second)
        object.__setattr__(self, "semantic_schedule", first)
        object.__setattr__(self, "schedule", second)

    @property
    def carries(self) -> bool:
        """Tell whether one chain passes through both stages."""
        return self.handover == "carry"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json; the handover says whether schedules are stages."""
        alone = {name: asdict(getattr(self, name).alone()) for name in _SCHEDULES}
        return super().to_dict() | alone

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        schedule = ScheduleConfig(**content["semantic_schedule"])
        return super().from_dict(content | {"semantic_schedule": schedule})


_SCHEDULES = ("schedule", "semantic_schedule")


def in_one_chain(first: ScheduleConfig, second: ScheduleConfig) -> tuple[StageConfig, StageConfig]:
    """Make two stages of one chain, each with its own number of levels.

    Raises:
        RecipeError: the schedules differ in more than their steps.
    """
    if first.alone(second.steps) != second:
        raise RecipeError(
            'handover = "carry" makes one chain of both stages, which has one schedule, but '
            f"schedule is {second} and semantic_schedule is {first}; give both the same settings, "
            "only steps may differ"
        )
    return (
        StageConfig(**asdict(first), below=second.steps),
        StageConfig(**asdict(second), above=first.steps),
    )


class SemanticLearner(nn.Module):
    """This is stage 1: it leads from standardised image features to the centre of their class."""

    def __init__(self, config: SedaConfig, width: int) -> None:
        """Build it for image features of that width, D_v."""
        super().__init__()
        self.table = sampler_table(config.semantic_schedule, "ddim", config.semantic_steps)
        self.end_signal = float(alphas_cumprod(config.semantic_schedule)[0] ** 0.5)
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
        return self.run(condition)[0]

    def run(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Run the deterministic chain from zero: standardised x_v [B, D_v] -> s and what is left.

        Returns:
            s, the last estimate, [B, D_v], and z - sqrt(abar) s, [B, D_v], of the state z in which
            the chain ends and of its level there: zero, unless stage 2 carries the chain on.
        """
        zero = torch.zeros_like(condition)
        noise = zero.new_zeros(len(self.table.timesteps), 1, zero.shape[1])
        denoise, progressive = self.denoiser.given(condition), self.denoiser.progressive
        estimates: list[Tensor] = []
        z = sample(
            *(denoise, self.table, zero, noise),
            watch=lambda _, estimate: estimates.append(estimate),
            progressive=progressive,
        )
        s = estimates[-1]
        return s, z - self.end_signal * s


class SeDA(MARNet):
    """This is the whole model, float32: the reference for every export."""

    config_type = SedaConfig
    config: SedaConfig

    def __init__(
        self,
        config: SedaConfig,
        vision: nn.Module | None = None,
        text: nn.Module | None = None,
    ) -> None:
        """Build from a configuration; `vision` and `text` replace freshly built backbones.

        Raises:
            RecipeError: the handover is "carry", and images and texts have features of different
                widths.
        """
        super().__init__(config, vision, text)
        if config.carries and self.vision.dim != self.text.dim:
            raise RecipeError(
                'handover = "carry" moves from the space of the image features to that of the text '
                f"features, so their widths must be equal, got {self.vision.dim} and "
                f'{self.text.dim}; choose other encoders, or handover = "restart"'
            )
        self.learner = SemanticLearner(config, self.vision.dim)

    def condition_width(self) -> int:
        """Tell the width of [x_v ; s]: twice that of x_v."""
        return 2 * self.vision.dim

    def see(self, x_v: Tensor) -> Tensor:
        """Put the semantic vector beside image features, and what stage 1 leaves if it is carried.

        [B, D_v] -> [x_v ; s], [B, 2 D_v], or [x_v ; s ; left], [B, 3 D_v].
        """
        s, left = self.learner.run(super().condition(x_v))
        return torch.cat([x_v, s, left] if self.config.carries else [x_v, s], dim=-1)

    def semantic_logits(self, x_v: Tensor) -> Tensor:
        """Compute the logits of the classifier on s alone: what `see` made -> [B, K]."""
        return self.learner.classifier(x_v[:, self.vision.dim : 2 * self.vision.dim])

    def align_vision(self, x_v: Tensor) -> Tensor:
        """Project image features: x_v [B, D_v], or what `see` made of it, -> x_v' [B, D]."""
        return super().align_vision(x_v[..., : self.vision.dim])

    def condition(self, x_v: Tensor) -> Tensor:
        """Standardise the features in what `see` made; s has unit variance as it is. [B, 2 D_v]."""
        features, s, *_ = x_v.split(self.vision.dim, dim=-1)
        return torch.cat([super().condition(features), s], dim=-1)

    def start(self, x_v: Tensor, initial: Tensor) -> Tensor:
        """Make x_T of noise [B, D_s]: as MARNet's, or around what stage 1 left. -> [B, D_s]."""
        if not self.config.carries:
            return initial
        left = x_v[..., 2 * self.vision.dim :]
        return left + first_deviation(self.config.schedule) * initial

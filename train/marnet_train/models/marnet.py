"""MARNet: embedding matching alignment, cross-modal diffusion refinement, fusion.

Zheng et al., "Unifying Visual and Semantic Feature Spaces with Diffusion Models for Enhanced
Cross-Modal Alignment", ICANN 2024 (arXiv 2407.18854); equation numbers are that paper's.
Axes: B batch, L tokens, K classes, D_v / D_s widths of x_v / x_s, D width of the common space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.diffusion import SamplerTable, ScheduleConfig, sample
from marnet_train.models.backbones import (
    TextEncoder,
    VisionEncoder,
    backbone_config,
    build_backbone,
)
from marnet_train.models.denoiser import LEAKY_SLOPE, Denoiser
from marnet_train.models.fusion import FUSION_LEVELS, FUSIONS


@dataclass(frozen=True)
class MarnetConfig:
    """This is everything that decides the shape of a MARNet and of its reverse process."""

    vision: dict[str, Any]  # transformers configuration of F_v
    text: dict[str, Any]  # transformers configuration of F_s
    labels: tuple[str, ...]
    dim: int = 768  # D
    hidden: int = 1024  # width of the denoiser's hidden layers
    time_dim: int = 64
    fusion: str = "concat"
    fusion_level: str = "feature"  # what is fused: x_EMA and x_CDR, or ("logit") their logits
    text_pooling: str = "mean"  # of the tokens' vectors to x_s: see `POOLINGS`
    samples: int = 1  # K, noise samples whose probabilities are averaged when it is served
    progressive: bool = False  # a denoiser also sees its own estimate of the step before
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    method: ClassVar[str] = "marnet"

    def __post_init__(self) -> None:
        for name in ("vision", "text"):
            if "pretrained" in getattr(self, name):
                # It would be fetched, and could bring code, whenever a checkpoint is read.
                raise RecipeError(f"{name} must be a whole configuration, not name another model")
        if self.fusion not in FUSIONS:
            raise RecipeError(f"fusion {self.fusion!r} is unknown; choose from {sorted(FUSIONS)}")
        if self.fusion_level not in FUSION_LEVELS:
            raise RecipeError(
                f"fusion_level {self.fusion_level!r} is unknown; choose from {FUSION_LEVELS}"
            )
        if len(self.labels) < 2:
            raise RecipeError(f"labels must be at least two classes, got {len(self.labels)}")
        if type(self.samples) is not int or self.samples < 1:
            raise RecipeError(f"samples must be an integer of at least 1, got {self.samples!r}")
        if self.time_dim < 2 or self.time_dim % 2:
            raise RecipeError(f"time_dim must be even and at least 2, got {self.time_dim}")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, with the label map as Hugging Face writes it."""
        content = asdict(self)
        labels = content.pop("labels")
        return {
            "method": self.method,
            **content,
            "id2label": {str(i): label for i, label in enumerate(labels)},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        rest = {k: v for k, v in content.items() if k not in ("method", "id2label", "schedule")}
        return cls(
            **rest,
            labels=_read_labels(content["id2label"]),
            schedule=ScheduleConfig(**content["schedule"]),
        )


def _read_labels(names: Any) -> tuple[str, ...]:
    """Read id2label in the order of the classes."""
    expected = [str(i) for i in range(len(names))] if isinstance(names, dict) else None
    if expected is None or set(names) != set(expected):
        got = ", ".join(map(repr, list(names)[:8])) if expected else type(names).__name__
        raise RecipeError(
            f'id2label must map "0", "1" and so on, each class once, to its label; got {got}'
        )
    if wrong := [name for name in names.values() if not isinstance(name, str)]:
        raise RecipeError(f"id2label must map to strings, got {wrong[0]!r}")
    return tuple(names[key] for key in expected)


def mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what standardises the rows of x, [N, D]: mean and standard deviation, both [D].

    A dimension that never varies carries nothing: its scale is left alone, 1.
    """
    std = x.std(dim=0, correction=0)
    return x.mean(dim=0), torch.where(std > 1e-6, std, torch.ones_like(std))


class ImageBranch(nn.Module):
    """The image-only baseline and MARNet share this: F_v, its projection E_v and a classifier."""

    vision: VisionEncoder
    project_vision: nn.Linear  # E_v
    alignment_classifier: nn.Linear

    def see(self, x_v: Tensor) -> Tensor:
        """Make what everything behind the encoder gets of an image: its features, and what a method
        adds to them. [B, D_v] -> [B, D_v or more].
        """
        return x_v

    def align_vision(self, x_v: Tensor) -> Tensor:
        """Compute x_v' = g(E_v(x_v)), eq. (7). [B, D_v] -> [B, D]."""
        return F.leaky_relu(self.project_vision(x_v), LEAKY_SLOPE)

    def alignment_logits(self, x_v: Tensor) -> Tensor:
        """Compute the logits of the classifier on x_v' alone. [B, D_v] -> [B, K]."""
        return self.alignment_classifier(self.align_vision(x_v))

    @property
    def device(self) -> torch.device:
        """Tell where the weights are."""
        return self.project_vision.weight.device


class Baseline(ImageBranch):
    """This is the image-only peer of a MARNet: the same parts with the same initial weights."""

    def __init__(self, model: MARNet) -> None:
        """Copy the image branch of `model`."""
        super().__init__()
        self.vision = copy.deepcopy(model.vision)
        self.project_vision = copy.deepcopy(model.project_vision)
        self.alignment_classifier = copy.deepcopy(model.alignment_classifier)


class MARNet(ImageBranch):
    """This is the whole model, float32, as the paper writes it: the reference for every export."""

    config_type = MarnetConfig

    def __init__(
        self,
        config: MarnetConfig,
        vision: nn.Module | None = None,
        text: nn.Module | None = None,
    ) -> None:
        """Build from a configuration; `vision` and `text` replace freshly built backbones."""
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(vision or build_backbone(backbone_config(config.vision)))
        self.text = TextEncoder(
            text or build_backbone(backbone_config(config.text)), config.text_pooling
        )
        d_v, d_s, classes = self.vision.dim, self.text.dim, len(config.labels)
        widths = (classes, classes) if config.fusion_level == "logit" else (config.dim, d_s)
        if config.fusion != "concat" and widths[0] != widths[1]:
            raise RecipeError(
                f"fusion {config.fusion!r} combines element by element, so dim ({config.dim}) must "
                f"equal the width of the text features ({d_s}); change dim, use concat or fuse at "
                'fusion_level = "logit"'
            )
        self.project_vision = nn.Linear(d_v, config.dim)  # E_v
        self.project_text = nn.Linear(d_s, config.dim)  # E_s, training only
        self.alignment_classifier = nn.Linear(config.dim, classes)
        self.denoiser = Denoiser(
            *(d_s, self.condition_width(), config.hidden, config.time_dim),
            progressive=config.progressive,
        )
        self.semantic_classifier = nn.Linear(d_s, classes)
        fused = sum(widths) if config.fusion == "concat" else widths[0]
        self.classifier = nn.Linear(fused, classes)
        for name, width in (("vision", d_v), ("text", d_s)):
            self._statistics(name, width)
        if config.fusion != "concat":  # a linear classifier on both can absorb theirs
            self._statistics("aligned", widths[0])
            self._statistics("refined", widths[1])

    def condition_width(self) -> int:
        """Tell how wide the vectors are that `condition` gives."""
        return self.vision.dim

    def _statistics(self, name: str, width: int) -> None:
        """Make buffers for the mean and standard deviation of a vector in training."""
        self.register_buffer(f"{name}_mean", torch.zeros(width))
        self.register_buffer(f"{name}_std", torch.ones(width))

    @torch.no_grad()
    def set_statistics(self, name: str, x: Tensor) -> None:
        """Store mean and standard deviation of the rows of x, [N, D], as those of `name`."""
        mean, std = mean_and_scale(x)
        getattr(self, f"{name}_mean").copy_(mean)
        getattr(self, f"{name}_std").copy_(std)

    vision_mean: Tensor
    vision_std: Tensor
    text_mean: Tensor
    text_std: Tensor
    aligned_mean: Tensor  # these four for element-wise fusions alone
    aligned_std: Tensor
    refined_mean: Tensor
    refined_std: Tensor

    def align_text(self, x_s: Tensor) -> Tensor:
        """Compute x_s' = g(E_s(x_s)), eq. (8). [B, D_s] -> [B, D]."""
        return F.leaky_relu(self.project_text(x_s), LEAKY_SLOPE)

    def condition(self, x_v: Tensor) -> Tensor:
        """Standardise x_v per dimension with training statistics: what the denoiser sees."""
        return (x_v - self.vision_mean) / self.vision_std

    def standardise_text(self, x_s: Tensor) -> Tensor:
        """Standardise x_s per dimension: the clean vector that the denoiser estimates."""
        return (x_s - self.text_mean) / self.text_std

    def start(self, x_v: Tensor, initial: Tensor) -> Tensor:
        """Make x_T of the noise that a chain begins with, `initial` [B, D_s]: the same."""
        return initial

    def refine(
        self,
        x_v: Tensor,
        table: SamplerTable,
        initial: Tensor,
        noise: Tensor,
        watch: Callable[[int, Tensor], None] = lambda step, x0: None,
    ) -> Tensor:
        """Compute x_CDR: a sample of the reverse process given x_v, eq. (22)-(23). -> [B, D_s]."""
        condition = self.condition(x_v)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t, condition)

        start, progressive = self.start(x_v, initial), self.config.progressive
        return sample(denoise, table, start, noise, watch, progressive=progressive)

    def refine_in_parts(
        self, x_v: Tensor, table: SamplerTable, initial: Tensor, noise: Tensor
    ) -> Tensor:
        """Do as `refine`, with the condition's share of the steps computed once for all of them."""
        denoise = self.denoiser.given(self.condition(x_v))
        start, progressive = self.start(x_v, initial), self.config.progressive
        return sample(denoise, table, start, noise, progressive=progressive)

    @property
    def latent_width(self) -> int:
        """Return D_s, the width of what the reverse process works on and so of a noise vector."""
        return self.denoiser.dim

    def branches(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is fused: x_EMA = x_v' (no text at test) [B, D] and x_CDR [B, D_s].

        At logit level the logits of their classifiers take their place, [B, K] each, as in Niu et
        al. 2021, where SUM and HM combine the scores of answers.
        """
        aligned = self.align_vision(x_v)
        if self.config.fusion_level == "logit":
            return self.alignment_classifier(aligned), self.semantic_classifier(x_cdr)
        return aligned, x_cdr

    def fuse(self, x_v: Tensor, x_cdr: Tensor) -> Tensor:
        """Compute x_f = fuse(x_EMA, x_CDR), eq. (3). -> [B, D_f].

        Element-wise fusions see both branches standardised, as their sums and products mean nothing
        where the scales differ.
        """
        a, b = self.branches(x_v, x_cdr)
        if self.config.fusion != "concat":
            a = (a - self.aligned_mean) / self.aligned_std
            b = (b - self.refined_mean) / self.refined_std
        return FUSIONS[self.config.fusion](a, b)

    def head(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B, K] and x_f [B, D_f] of refined features, eq. (3)-(4)."""
        fused = self.fuse(x_v, x_cdr)
        return self.classifier(fused), fused

    def forward(
        self, pixels: Tensor, table: SamplerTable, initial: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Classify images only: eq. (1)-(4) without text.

        Args:
            pixels: [B, 3, H, W]. initial: [B, D_s]. noise: [S, 1 or B, D_s].
        Returns:
            logits [B, K] and the fused representation x_f [B, D_f].
        """
        x_v = self.see(self.vision(pixels))
        return self.head(x_v, self.refine(x_v, table, initial, noise))

"""RepMLPNet: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR
2022 (arXiv 2112.11081). The defaults are RepMLPNet-B224.

Every map is one partition, as in the networks of the paper, so an image has one size.
Axes: B batch, C channels, h and w of a map, S share sets; channel c belongs to set c mod S, and the
channels of a set share one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithNoAttention

from marnet_sdk.errors import InvalidInput


@strict
class RepMLPNetConfig(PreTrainedConfig):
    """This is everything that decides the shape of a `RepMLPNet`."""

    model_type = "repmlpnet"

    image_size: int = 224
    patch_size: int = 4
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768)  # C of each stage
    depths: list[int] | tuple[int, ...] = (2, 2, 12, 2)
    share_sets: list[int] | tuple[int, ...] = (1, 4, 32, 128)  # S of each stage
    local_kernels: list[int] | tuple[int, ...] = (1, 3)
    reduction: int = 4  # of the global perceptron's hidden width
    mlp_ratio: int = 4

    def validate_sizes(self) -> None:
        """Check that the sizes fit each other."""
        stages = len(self.depths)
        if not len(self.hidden_sizes) == len(self.share_sets) == stages > 0:
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes}, depths {self.depths} and share_sets "
                f"{self.share_sets} must have one number for each stage"
            )
        if self.image_size % (self.patch_size * 2 ** (stages - 1)):
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of "
                f"{self.patch_size * 2 ** (stages - 1)}: patch_size, halved {stages - 1} times"
            )
        if any(c % s for c, s in zip(self.hidden_sizes, self.share_sets, strict=True)):
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} must be multiples of share_sets "
                f"{self.share_sets}"
            )


class RepMLP(nn.Module):
    """The RepMLP block, section 3: global, channel and local perceptron. [B, C, h, w] -> the same.

    The channel perceptron (FC3 of the paper) is a convolution of S groups over flattened maps.
    """

    def __init__(self, channels: int, edge: int, config: RepMLPNetConfig, share_sets: int) -> None:
        """Take C, h = w, and S."""
        super().__init__()
        self.shape = (channels, edge, edge)
        self.sets, pixels = share_sets, edge * edge
        hidden = max(1, channels // config.reduction)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        width = share_sets * pixels
        self.channel = nn.Conv2d(width, width, 1, groups=share_sets, bias=False)
        self.channel_norm: nn.Module = nn.BatchNorm2d(share_sets)
        self.local = nn.ModuleList(
            _conv(share_sets, share_sets, k, padding=k // 2, groups=share_sets)
            for k in config.local_kernels
        )

    def perceive(self, maps: Tensor) -> Tensor:
        """Add what the channel and local perceptrons make of maps [N, S, h, w] -> the same.

        This is affine in evaluation mode.
        """
        _, height, width = self.shape
        flat = maps.reshape(-1, self.sets * height * width, 1, 1)
        total = self.channel_norm(self.channel(flat).reshape(-1, self.sets, height, width))
        for branch in self.local:
            total = total + branch(maps)
        return total

    def forward(self, x: Tensor) -> Tensor:
        maps = x.reshape(-1, self.sets, *self.shape[1:])  # [B C / S, S, h, w]
        return self.perceive(maps).reshape(-1, *self.shape) * self.gate(x)

    @torch.no_grad()
    def inject_locality(self) -> None:
        """Make one matrix of the channel and local perceptrons, section 3.3, in evaluation mode.

        The columns of the matrix are what `perceive` makes of the unit vectors.
        """
        like, (_, height, width) = self.channel.weight, self.shape
        pixels = height * width
        units = torch.eye(pixels).to(like).reshape(pixels, 1, height, width)
        bias = self.perceive(torch.zeros_like(units[:1]).expand(-1, self.sets, -1, -1))
        columns = self.perceive(units.expand(-1, self.sets, -1, -1)) - bias  # [h w, S, h, w]
        merged = nn.Conv2d(self.sets * pixels, self.sets * pixels, 1, groups=self.sets).to(like)
        merged.weight.copy_(columns.flatten(2).permute(1, 2, 0).reshape(like.shape))
        merged.bias.copy_(bias.flatten())  # pyright: ignore[reportOptionalMemberAccess]
        self.channel, self.channel_norm, self.local = merged, nn.Identity(), nn.ModuleList()


class RepMLPNetUnit(nn.Module):
    """A RepMLP block and an MLP of each pixel, both with a residual."""

    def __init__(self, channels: int, edge: int, config: RepMLPNetConfig, share_sets: int) -> None:
        """Take C, h = w, and S."""
        super().__init__()
        inner = channels * config.mlp_ratio
        self.norm_before = nn.BatchNorm2d(channels)
        self.perceptron = RepMLP(channels, edge, config, share_sets)
        self.norm_after = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(_conv(channels, inner, 1), nn.GELU(), _conv(inner, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.perceptron(self.norm_before(x))
        return x + self.mlp(self.norm_after(x))


class RepMLPNet(PreTrainedModel):
    """The whole encoder: pixels [B, 3, H, W] -> the last map [B, C, h, w]."""

    config_class = RepMLPNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: RepMLPNetConfig) -> None:
        """Build with the initial weights of torch's layers."""
        super().__init__(config)
        self.layers = nn.Sequential(*_layers(config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave a module as torch made it."""

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithNoAttention:
        edge = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (edge, edge):
            raise InvalidInput(
                f"got images of {list(pixel_values.shape[-2:])} pixels, expected {[edge, edge]}; "
                "set image_size of the encoder, or the size of images"
            )
        return BaseModelOutputWithNoAttention(last_hidden_state=self.layers(pixel_values))


def _layers(config: RepMLPNetConfig) -> Iterator[nn.Module]:
    """Yield the stem, the units of every stage, what halves a map between them, and the norm."""
    before, stride, edge = 3, config.patch_size, config.image_size
    stages = zip(config.hidden_sizes, config.depths, config.share_sets, strict=True)
    for channels, depth, share_sets in stages:
        edge //= stride
        yield _conv(before, channels, stride, stride=stride)
        yield nn.ReLU()
        yield from (RepMLPNetUnit(channels, edge, config, share_sets) for _ in range(depth))
        before, stride = channels, 2
    yield nn.BatchNorm2d(before)


def _conv(before: int, after: int, kernel: int, **settings: int) -> nn.Sequential:
    """Make a convolution and its norm."""
    convolution = nn.Conv2d(before, after, kernel, bias=False, **settings)  # pyright: ignore
    return nn.Sequential(convolution, nn.BatchNorm2d(after))

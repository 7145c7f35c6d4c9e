"""WISeR: Martinel, Foresti, Micheloni, "Wide-Slice Residual Networks for Food Recognition", WACV
2018 (arXiv 1612.06543).

A residual network, the trunk, and beside it one convolution whose kernels are as wide as the image,
because food lies in layers. Implementations disagree about which side is the long one of a slice;
the idea asks for horizontal slices, so a kernel is 5 pixels high.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

from marnet_sdk.errors import InvalidInput
from marnet_train.models.backbones import VisionEncoder, backbone_config, build_backbone


@strict
class WiserConfig(PreTrainedConfig):
    """This is everything that decides the shape of a `Wiser`."""

    model_type = "wiser"

    trunk: dict[str, Any] | None = None  # another encoder's description; None: WRN-50-2 of timm
    image_size: int = 224
    slices: int = 320  # kernels
    slice_height: int = 5  # pixels, also of the window of the pooling behind it
    hidden_size: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.trunk is None:
            self.trunk = {"model_type": "timm_wrapper", "architecture": "wide_resnet50_2"}

    def validate_trunk(self) -> None:
        """Check that the trunk and the slices can be built."""
        assert self.trunk is not None
        if "pretrained" in self.trunk:  # it would be fetched whenever a checkpoint is read
            raise ValueError("trunk must be a whole configuration, not name another model")
        if self.image_size < 2 * self.slice_height:
            raise ValueError(
                f"image_size {self.image_size} must be at least twice slice_height, "
                f"{self.slice_height}"
            )


class Wiser(PreTrainedModel):
    """The whole encoder: pixels [B, 3, H, W] -> a vector [B, hidden_size], H = W = image_size."""

    config_class = WiserConfig
    main_input_name = "pixel_values"

    def __init__(self, config: WiserConfig) -> None:
        """Build with fresh weights."""
        super().__init__(config)
        assert config.trunk is not None
        self.trunk = VisionEncoder(build_backbone(backbone_config(config.trunk)))
        kernel = (config.slice_height, config.image_size)
        self.slice = nn.Conv2d(3, config.slices, kernel, bias=False)
        self.slice_norm = nn.BatchNorm2d(config.slices)
        self.joined = nn.Linear(self.trunk.dim + config.slices, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave a module as torch made it; the trunk has its own."""

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPoolingAndNoAttention:
        if pixel_values.shape[-1] != self.config.image_size:
            raise InvalidInput(
                f"got images of {list(pixel_values.shape[-2:])} pixels, expected a width of "
                f"{self.config.image_size}, which a slice has; set image_size of the encoder, or "
                "the size of images"
            )
        slices = F.relu(self.slice_norm(self.slice(pixel_values)))  # [B, slices, h, 1]
        pooled = F.max_pool2d(slices, (self.config.slice_height, 1))
        both = torch.cat([self.trunk(pixel_values), pooled.mean(dim=(2, 3))], dim=1)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=slices, pooler_output=F.relu(self.joined(both))
        )

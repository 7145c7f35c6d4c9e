"""Encoders from `transformers`: any vision model, any BERT-family text model.

An encoder is described either by a configuration (a dict with `model_type`, trained from scratch)
or by `{"pretrained": "path or hub id", "revision": ...}`. Weights are read from safetensors only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig

from marnet_sdk.errors import RecipeError, nearest

# These end in a LayerNorm and put the class token first; their pooler is an extra layer that
# self-supervised and ImageNet-21k checkpoints leave untrained, so it is not built at all.
_CLASS_TOKEN_MODELS = frozenset({"vit", "deit", "beit", "dinov2", "data2vec-vision"})


def backbone_config(description: dict[str, Any]) -> PreTrainedConfig:
    """The `transformers` configuration that a recipe or a config.json describes.

    Raises:
        RecipeError: no `model_type` and no `pretrained`, or one that transformers does not know.
    """
    settings = dict(description)
    if "pretrained" in settings:
        # Not **settings: trust_remote_code would run code that comes with the weights.
        if extra := sorted(set(settings) - {"pretrained", "revision"}):
            raise RecipeError(f"beside pretrained, an encoder has only revision, got {extra}")
        name = settings.pop("pretrained")
        with _described(description):
            return AutoConfig.from_pretrained(name, **settings)
    if "model_type" not in settings:
        raise RecipeError(
            f'an encoder needs model_type = "vit", "bert", ... or pretrained = "...", got '
            f"{sorted(description)}"
        )
    with _described(description):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


@contextmanager
def _described(description: dict[str, Any]) -> Iterator[None]:
    """Say which encoder `transformers` could not make; it raises all of these."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        raise RecipeError(f"encoder {description}: {error}") from error


def load_backbone(description: dict[str, Any]) -> nn.Module:
    """Build an encoder from a description: pretrained weights if it names them, else fresh ones.

    Raises:
        RecipeError: also for a setting that this kind of encoder does not have: transformers would
            keep it, unused, and build the default instead.
    """
    config = backbone_config(description)
    if "pretrained" not in description:
        defaults = type(config)()
        known = {*defaults.to_dict(), *defaults.attribute_map, "model_type"}
        for key in sorted(set(description) - known):
            near = nearest(key, sorted(known))
            raise RecipeError(f"{config.model_type} encoder: unknown setting {key!r}.{near}")
    settings = {k: v for k, v in description.items() if k != "pretrained"}
    with _described(description):
        if "pretrained" not in description:
            return build_backbone(config)
        return AutoModel.from_pretrained(
            description["pretrained"],
            use_safetensors=True,
            **settings,
            **_pooling_arguments(config),
        )


def build_backbone(config: PreTrainedConfig) -> nn.Module:
    """A freshly initialised encoder of that configuration."""
    return AutoModel.from_config(config, **_pooling_arguments(config))


def _pooling_arguments(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = AutoModel._model_mapping[type(config)]  # pyright: ignore[reportAttributeAccessIssue]
    accepts = inspect.signature(model_class.__init__).parameters
    is_unused = config.model_type in _CLASS_TOKEN_MODELS or hasattr(config, "vocab_size")
    return {"add_pooling_layer": False} if is_unused and "add_pooling_layer" in accepts else {}


def feature_dim(config: PreTrainedConfig) -> int:
    """Width of the vector that `VisionEncoder` or `TextEncoder` makes of one input."""
    for name in ("hidden_size", "dim"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    if isinstance(widths := getattr(config, "hidden_sizes", None), list | tuple):
        return int(widths[-1])
    raise RecipeError(f"cannot tell the feature width of a {config.model_type!r} encoder")


class VisionEncoder(nn.Module):
    """F_v of MARNet: pixels [B, 3, H, W] -> x_v [B, d_v]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        config: PreTrainedConfig = backbone.config  # pyright: ignore[reportAssignmentType]
        self.dim = feature_dim(config)
        if config.model_type == "vit_mae":
            raise RecipeError("a vit_mae encoder hides random patches, even at test; use a vit")
        self.uses_class_token = config.model_type in _CLASS_TOKEN_MODELS

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.backbone(pixel_values=pixels)
        hidden = out.last_hidden_state  # [B, N, d] or [B, d, h, w]
        if self.uses_class_token:
            return hidden[:, 0]
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # ResNet's is [B, d, 1, 1]
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


class TextEncoder(nn.Module):
    """F_s of MARNet: token ids [B, L] and mask [B, L] -> x_s [B, d_s], the masked mean."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim = feature_dim(backbone.config)  # pyright: ignore[reportArgumentType]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask[..., None].to(out.last_hidden_state.dtype)  # [B, L, 1]
        total = (out.last_hidden_state * mask).sum(dim=1)
        return total / torch.clamp(mask.sum(dim=1), min=1)  # [B, d_s]

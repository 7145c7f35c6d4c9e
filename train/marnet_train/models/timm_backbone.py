"""Image encoders from timm, through transformers' wrapper: the extra `timm`, with torchvision.

A description is `{"model_type": "timm_wrapper", "architecture": "vgg19", "model_args": {...}}`, or
`pretrained` with a folder or hub id of timm's own layout (config.json with `pretrained_cfg`, and
model.safetensors).
"""

from __future__ import annotations

from torch import nn
from transformers import TimmWrapperModel
from transformers.configuration_utils import PreTrainedConfig

from marnet_sdk.errors import EnvironmentMismatch, RecipeError, requires_extra

# Arguments of timm.create_model itself: with them it would download, or open a pickle.
_NOT_OF_A_MODEL = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)


class TimmBackbone(TimmWrapperModel):
    """A timm model with the initial weights that timm gives it.

    `TimmWrapperModel` draws all of them again, from N(0, 0.02), which suits transformers only.
    """

    def _init_weights(self, module: nn.Module) -> None:
        """Leave a module as timm made it, but for buffers that no file holds."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # pyright: ignore[reportCallIssue]


def require_timm() -> None:
    """Check that timm can be imported.

    Raises:
        MissingExtra: it is not installed, or torchvision is not.
        EnvironmentMismatch: torchvision is there and does not fit torch.
    """
    try:
        with requires_extra("timm", "timm", "torchvision"):
            import timm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise EnvironmentMismatch(
            f"timm cannot be imported ({error}): torchvision fits one release of torch, and no "
            "other build of it; install both from the same index: pip install torch torchvision"
        ) from error


def check_timm_config(config: PreTrainedConfig) -> None:
    """Check that a timm model can be built from its configuration alone.

    Raises:
        RecipeError: the configuration names files or another place.
    """
    name, given = config.architecture, config.model_args or {}  # pyright: ignore
    if ":" in name:
        raise RecipeError(
            f"architecture: got {name!r}, which would be fetched whenever a checkpoint is read; "
            'expected the name of a timm model, such as "vgg19", or pretrained = "timm/..."'
        )
    if wrong := sorted(_NOT_OF_A_MODEL & given.keys()):
        raise RecipeError(
            f"model_args: got {', '.join(wrong)}, which name files; expected arguments of the "
            "model's class, such as img_size; name weights with pretrained"
        )

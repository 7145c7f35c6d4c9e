"""Encoders from `transformers`: any vision model, any BERT-family text model; and those of timm.

An encoder is described either by a configuration (a dict with `model_type`, trained from scratch)
or by `{"pretrained": "path or hub id", "revision": ...}`. Weights are read from safetensors only.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from marnet_sdk.console import say
from marnet_sdk.errors import MarnetError, RecipeError, nearest

# These end in a LayerNorm and put the class token first; their pooler is an extra layer that
# self-supervised and ImageNet-21k checkpoints leave untrained, so it is not built at all.
_CLASS_TOKEN_MODELS = frozenset({"vit", "deit", "beit", "dinov2", "data2vec-vision"})


def backbone_config(description: dict[str, Any]) -> PreTrainedConfig:
    """Make the `transformers` configuration that a recipe or a config.json describes.

    Raises:
        RecipeError: no `model_type` and no `pretrained`, or one that transformers does not know.
        MissingExtra, EnvironmentMismatch: as of `require_timm`, for an encoder of timm.
    """
    settings = dict(description)
    if "pretrained" in settings:
        # Not **settings: trust_remote_code would run code that comes with the weights.
        if extra := sorted(set(settings) - {"pretrained", "revision"}):
            raise RecipeError(f"beside pretrained, an encoder has only revision, got {extra}")
        name = settings.pop("pretrained")
        with _described(description):
            return _checked(AutoConfig.from_pretrained(name, **settings))
    if "model_type" not in settings:
        raise RecipeError(
            f'an encoder needs model_type = "vit", "bert", ... or pretrained = "...", got '
            f"{sorted(description)}"
        )
    with _described(description):
        if settings["model_type"] == "timm_wrapper":
            from marnet_train.models.timm_backbone import require_timm  # timm is an extra

            require_timm()
        return _checked(AutoConfig.for_model(settings.pop("model_type"), **settings))


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration, if it needs no more than itself to build an encoder."""
    if config.model_type == "timm_wrapper":
        from marnet_train.models.timm_backbone import check_timm_config

        check_timm_config(config)
    return config


def plain_config(backbone: nn.Module) -> dict[str, Any]:
    """Return the configuration of an encoder as JSON data, without what concerns unused heads."""
    config: PreTrainedConfig = backbone.config  # pyright: ignore[reportAssignmentType]
    content = json.loads(config.to_json_string(use_diff=False))
    unused = {"architectures", "id2label", "label2id", "loss_type"}
    unused |= {"label_names", "num_classes", "pretrained_cfg"}  # of timm
    return {k: v for k, v in content.items() if k not in unused}


@contextmanager
def _described(description: dict[str, Any]) -> Iterator[None]:
    """Say which encoder `transformers` could not make."""
    try:
        yield
    except MarnetError:
        raise
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        name = description.get("pretrained")
        where = "" if name is None or Path(name).is_dir() else f"; there is no folder {name} here"
        if where and str(name).startswith("encoders/"):  # as the recipes of the groceries have it
            where += ": write it with marnet-train encoders --out encoders"
        raise RecipeError(f"encoder {description}: {error}{where}") from error
    except Exception as error:  # sizes that do not fit each other fail wherever they meet
        raise RecipeError(
            f"encoder {description}: transformers could not build it "
            f"({type(error).__name__}: {error}); compare its sizes with the defaults of its "
            "configuration class"
        ) from error


def load_backbone(description: dict[str, Any]) -> nn.Module:
    """Build an encoder from a description: pretrained weights if it names them, else fresh ones.

    Raises:
        RecipeError: also for a setting that this kind of encoder does not have: transformers would
            keep it, unused, and build the default instead.
    """
    trunk = description.get("trunk")  # of WISeR
    if isinstance(trunk, dict) and "pretrained" in trunk:
        inner = load_backbone(trunk)
        whole = load_backbone({**description, "trunk": plain_config(inner)})
        whole.get_submodule("trunk.backbone").load_state_dict(inner.state_dict())
        return whole
    config = backbone_config(description)
    if "pretrained" not in description:
        defaults = type(config)()
        known = {*defaults.to_dict(), *defaults.attribute_map, "model_type"}
        for key in sorted(set(description) - known):
            near = nearest(key, sorted(known))
            raise RecipeError(f"{config.model_type} encoder: unknown setting {key!r}.{near}")
    settings = {k: v for k, v in description.items() if k != "pretrained"}
    with _described(description), _quiet():
        if "pretrained" not in description:
            return build_backbone(config)
        model, info = AutoModel.from_pretrained(
            description["pretrained"],
            use_safetensors=True,
            dtype=torch.float32,  # else that of the file, and training is in float32
            output_loading_info=True,
            **settings,
            **_pooling_arguments(config),
        )
    if missing := sorted(info["missing_keys"]):
        say(
            f"warning: {description['pretrained']} lacks {len(missing)} weights, such as "
            f"{missing[0]}; they start at random"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Let `transformers` show no progress, and not report weights that an encoder does not use."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def build_backbone(config: PreTrainedConfig) -> nn.Module:
    """Build a freshly initialised encoder of that configuration."""
    if config.model_type == "timm_wrapper":
        from marnet_train.models.timm_backbone import TimmBackbone

        return TimmBackbone(config)  # pyright: ignore[reportArgumentType]
    return AutoModel.from_config(config, **_pooling_arguments(config))


def _pooling_arguments(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = AutoModel._model_mapping[type(config)]  # pyright: ignore[reportAttributeAccessIssue]
    accepts = inspect.signature(model_class.__init__).parameters
    is_unused = config.model_type in _CLASS_TOKEN_MODELS or hasattr(config, "vocab_size")
    return {"add_pooling_layer": False} if is_unused and "add_pooling_layer" in accepts else {}


class VisionEncoder(nn.Module):
    """This is F_v of MARNet: pixels [B, 3, H, W] -> x_v [B, d_v]."""

    def __init__(self, backbone: nn.Module) -> None:
        """Wrap a backbone, which runs once on one image to see `dim`, d_v.

        Raises:
            RecipeError: it hides random patches, or makes no vector of an image.
        """
        super().__init__()
        _average_batch_statistics(backbone)
        self.backbone = backbone
        config: PreTrainedConfig = backbone.config  # pyright: ignore[reportAssignmentType]
        if config.model_type == "vit_mae":
            raise RecipeError("a vit_mae encoder hides random patches, even at test; use a vit")
        self.uses_class_token = config.model_type in _CLASS_TOKEN_MODELS
        self.pool = _pool_of_whole_map(backbone)  # maps [B, d, h, w] and dimensions -> [B, d]
        self.still = tuple[nn.Module, ...]()  # parts that stay in evaluation mode
        self.dim = _width(self, torch.zeros(1, 3, *image_size(backbone), device="cpu"))

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.backbone(pixel_values=pixels)
        hidden = out.last_hidden_state  # [B, N, d] or [B, d, h, w]
        if self.uses_class_token:
            return hidden[:, 0]
        if self.pool is not None:
            return self.pool(hidden, dim=(2, 3))
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # ResNet's is [B, d, 1, 1]
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; parts that stand still stay in evaluation mode."""
        super().train(mode)
        for part in self.still:
            part.training = False
        return self

    @contextmanager
    def learning_in_part(
        self, first: str | None, *, keep_statistics: bool = False
    ) -> Iterator[None]:
        """Let parts of the backbone stand still.

        Args:
            first: the name of the first part that learns, such as "layers.9", in the order
                in which the backbone lists them; none: all learn.
            keep_statistics: batch normalisation learns its scales alone, and keeps the statistics
                that it came with.

        Raises:
            RecipeError: there is no part of that name.
        """
        before = parts_before(self.backbone, first) if first is not None else ()
        kept = [p for part in before for p in part.parameters(recurse=False)]
        norms = [part for part in self.modules() if isinstance(part, _BatchNorm)]
        self.still = (*before, *(norms if keep_statistics else ()))
        for parameter in kept:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self.still = ()
            for parameter in kept:
                parameter.requires_grad_(True)


def parts_before(backbone: nn.Module, first: str) -> tuple[nn.Module, ...]:
    """List the modules of a backbone before the one named `first`, without those that hold it.

    Raises:
        RecipeError: there is no such module.
    """
    names = [name for name, _ in backbone.named_modules()][1:]
    if first not in names:
        blocks = [name for name in names if name.rpartition(".")[2].isdigit()]
        raise RecipeError(
            f"learn_from: the image encoder has no part {first!r}.{nearest(first, names)} Choose "
            f"one of its parts, such as {', '.join((blocks or names)[:3])}, or leave learn_from "
            "out, and all of them learn"
        )
    before = names[: names.index(first)]
    holders = tuple(first[:i] for i, letter in enumerate(first) if letter == ".")
    return tuple(backbone.get_submodule(name) for name in before if name not in holders)


def check_takes(encoder: VisionEncoder, side: int) -> None:
    """Check that an encoder takes square images of that size, by running one through a copy.

    Raises:
        RecipeError: it does not.
    """
    try:
        _shape_of_features(encoder, [torch.zeros(1, 3, side, side, device="cpu")])
    except Exception as error:  # whatever an encoder's code raises
        raise RecipeError(
            f"crop: the image encoder does not take images of {side} x {side} pixels "
            f"({type(error).__name__}: {' '.join(str(error).split())}); leave crop out, and it "
            "learns on whole images"
        ) from error


def image_size(backbone: nn.Module) -> tuple[int, int]:
    """Return height and width of images that an encoder certainly takes."""
    config: Any = backbone.config
    size = getattr(config, "image_size", None) or 64
    if config.model_type == "timm_wrapper":
        usual: dict[str, Any] = backbone.timm_model.pretrained_cfg  # pyright: ignore
        if usual.get("fixed_input_size"):
            size = (config.model_args or {}).get("img_size") or usual["input_size"]
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _pool_of_whole_map(backbone: nn.Module) -> Callable[..., Tensor] | None:
    """Return what pools the whole last map, where the backbone's pooler does not say that it does.

    EfficientNet's has a window of d x d, which is cut at the border of the map, so its mean is that
    of the map. OpenVINO takes no window larger than the map.
    """
    pooler = getattr(backbone, "pooler", None)
    for kind, pool in ((nn.AvgPool2d, torch.mean), (nn.MaxPool2d, torch.amax)):
        if isinstance(pooler, kind) and pooler.ceil_mode and pooler.padding == 0:
            return pool
    return None


def _average_batch_statistics(backbone: nn.Module) -> None:
    """Let statistics of batch normalisation be averages over batches.

    EfficientNet, MobileNetV1 and MobileNetV2 of transformers 5 give torch the momentum of
    TensorFlow, 0.99 and more: the share of the average that stays. In torch it is the share that a
    batch replaces, so what is left at the end of a training would be the statistics of its last
    batch. They get torch's default.
    """
    for part in backbone.modules():
        if isinstance(part, _BatchNorm) and part.momentum is not None and part.momentum > 0.5:
            part.momentum = 0.1


POOLINGS = ("mean", "first")  # of all tokens, by the mask; or the vector of the first ([CLS])


class TextEncoder(nn.Module):
    """This is F_s of MARNet: token ids [B, L] and mask [B, L] -> x_s [B, d_s]."""

    def __init__(self, backbone: nn.Module, pooling: str = "mean") -> None:
        """Wrap a backbone, which runs once on one text to see `dim`, d_s.

        Args:
            pooling: one of `POOLINGS`.

        Raises:
            RecipeError: it makes no vectors of tokens, or the pooling is unknown.
        """
        super().__init__()
        if pooling not in POOLINGS:
            near = nearest(pooling, POOLINGS)
            raise RecipeError(f"text_pooling {pooling!r} is unknown.{near} Choose from {POOLINGS}")
        self.backbone = backbone
        self.pooling = pooling
        ids = torch.zeros(1, 2, dtype=torch.long, device="cpu")  # 0: every vocabulary has it
        self.dim = _width(self, ids, torch.ones_like(ids))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "first":
            return out.last_hidden_state[:, 0]
        mask = attention_mask[..., None].to(out.last_hidden_state.dtype)  # [B, L, 1]
        total = (out.last_hidden_state * mask).sum(dim=1)
        return total / torch.clamp(mask.sum(dim=1), min=1)  # [B, d_s]


def _width(encoder: nn.Module, *inputs: Tensor) -> int:
    """Find d of the features [1, d] that an encoder makes of inputs [1, ...], seen by running it.

    Configurations do not tell: some have no width, and that of MobileViT is another layer's. A
    copy runs, so modes, BatchNorm statistics and the random state stay as they are.

    Raises:
        RecipeError: it cannot run on these inputs, or gives something of another shape.
    """
    name: str = encoder.backbone.config.model_type  # pyright: ignore
    if isinstance(encoder, TextEncoder):
        source, takes, part = "one text", "token ids and their mask", "clip_text_model"
    else:
        source, takes, part = "one image", "pixels", "clip_vision_model"
    try:
        shape = _shape_of_features(encoder, inputs)
    except Exception as error:  # whatever an encoder's code raises
        raise RecipeError(
            f"a {name!r} encoder cannot run on {source}, {list(inputs[0].shape)} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); expected one that takes "
            f"{takes} and no more: choose another model_type, or of a model of images and texts "
            f"the right part, such as {part!r}"
        ) from error
    if len(shape) != 2 or shape[0] != 1:
        raise RecipeError(
            f"a {name!r} encoder makes {list(shape)} of {source}, expected one vector, [1, width]; "
            "choose another model_type"
        )
    return shape[1]


@torch.no_grad()
def _shape_of_features(encoder: nn.Module, inputs: Sequence[Tensor]) -> torch.Size:
    """Return the shape of what a copy on the CPU gives, or would give if it has no values.

    It does not always run without values, which is faster: some encoders keep tensors of theirs in
    caches that all encoders of their kind share.
    """
    first = next(encoder.parameters(), torch.empty(0))
    device = torch.device("meta" if first.is_meta else "cpu")
    without_values = FakeTensorMode(allow_non_fake_inputs=True) if first.is_meta else nullcontext()
    with without_values, device, torch.random.fork_rng(devices=[]):
        known: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to(device), requires_grad=False)
            for p in encoder.parameters()
        }
        known |= {id(b): b.detach().to(device, copy=True) for b in encoder.buffers()}
        twin = copy.deepcopy(encoder, known).eval()
        kinds = [first.dtype if x.is_floating_point() else x.dtype for x in inputs]
        found = twin(*(x.to(device, kind) for x, kind in zip(inputs, kinds, strict=True)))
        return found.shape

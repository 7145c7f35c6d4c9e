"""Reads how transformers' image processors and timm prepare images: the settings of `Preprocess`.

A configuration means what it means there: the defaults of each processor stand for keys that it
leaves out, and what a plain resize, centre crop and normalisation cannot reproduce is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from PIL import Image

from marnet_sdk.errors import MarnetError, brief


class PreprocessError(MarnetError):
    """A preprocessing configuration that is incomplete, or does something `Preprocess` does not."""

    exit_code = 2


_Size = tuple[int, int] | int  # height and width, or the shortest edge
_Crop = tuple[int, int] | None
# The configuration, `size` and `crop_size` as written -> the size and crop that are meant.
_Resize = Callable[[Mapping[str, Any], _Size, _Crop], tuple[_Size, _Crop]]


class _Family(NamedTuple):
    """The values that transformers assumes for keys that an old configuration leaves out."""

    resample: int
    size: Mapping[str, int]
    square: bool  # a bare number for `size` is a square, else the shortest edge
    crop_size: Mapping[str, int] | None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: _Resize | None = None  # where `size` and `crop_size` are not what they say
    divides_twice: bool = False  # EfficientNet, for include_top


def _resize_convnext(given: Mapping[str, Any], size: _Size, crop: _Crop) -> tuple[_Size, _Crop]:
    if not isinstance(size, int):
        raise PreprocessError(
            f'size: got {brief(size)}; a ConvNext processor has {{"shortest_edge"}} alone: '
            "describe one that resizes to a height and width as ViTImageProcessor"
        )
    if size >= 384:
        return (size, size), crop
    if crop is not None:
        raise PreprocessError(
            f"do_center_crop is true, but below 384 a ConvNext processor crops to {size} x {size} "
            "anyway; leave do_center_crop out"
        )
    return int(size / _crop_pct(given, 224 / 256)), (size, size)


def _resize_poolformer(given: Mapping[str, Any], size: _Size, crop: _Crop) -> tuple[_Size, _Crop]:
    if isinstance(size, tuple):
        if size[0] != size[1]:
            raise PreprocessError(
                f"size: got {size}; a PoolFormer processor with crop_pct needs a square here, or "
                '{"shortest_edge"}'
            )
        size = size[0]
    return int(size / _crop_pct(given, 0.9)), crop


def _resize_levit(given: Mapping[str, Any], size: _Size, crop: _Crop) -> tuple[_Size, _Crop]:
    return (int((256 / 224) * size) if isinstance(size, int) else size), crop


def _crop_pct(given: Mapping[str, Any], default: float) -> float:
    value = given.get("crop_pct", default)
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise PreprocessError(
            f"crop_pct: got {brief(value)}; expected a positive number, such as 0.875"
        )
    return float(value)


TIMM_PROCESSOR = "TimmWrapperImageProcessor"
_SQUARE = {"height": 224, "width": 224}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std
_CLIP = _Family(
    resample=Image.Resampling.BICUBIC,
    size={"shortest_edge": 224},
    square=False,
    crop_size=_SQUARE,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_SMALL = _Family(Image.Resampling.BICUBIC, {"shortest_edge": 224}, False, _SQUARE, *_IMAGENET)
_MOBILENET = _Family(
    Image.Resampling.BILINEAR, {"shortest_edge": 256}, square=False, crop_size=_SQUARE
)
_FAMILIES = {
    "ViT": _Family(Image.Resampling.BILINEAR, _SQUARE, square=True, crop_size=None),
    "DeiT": _Family(
        Image.Resampling.BICUBIC, {"height": 256, "width": 256}, square=True, crop_size=_SQUARE
    ),
    "Siglip": _Family(Image.Resampling.BICUBIC, _SQUARE, square=False, crop_size=None),
    "CLIP": _CLIP,
    "Bit": _CLIP,  # DINOv2
    "ChineseCLIP": _CLIP,
    "Blip": _CLIP._replace(size={"height": 384, "width": 384}, square=True, crop_size=None),
    "Beit": _Family(Image.Resampling.BICUBIC, _SQUARE, square=True, crop_size=None),
    "Segformer": _Family(
        Image.Resampling.BILINEAR, {"height": 512, "width": 512}, True, None, *_IMAGENET
    ),
    "Pvt": _Family(Image.Resampling.BICUBIC, _SQUARE, True, None, *_IMAGENET),
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "EfficientNet": _Family(
        Image.Resampling.BICUBIC,
        {"height": 346, "width": 346},
        square=True,
        crop_size=None,
        divides_twice=True,
    ),
    "ConvNext": _Family(  # also ResNet and RegNet
        Image.Resampling.BICUBIC,
        {"shortest_edge": 384},
        square=False,
        crop_size=None,
        resize=_resize_convnext,
    ),
    "PoolFormer": _SMALL._replace(resize=_resize_poolformer),
    "Levit": _SMALL._replace(resize=_resize_levit),
}


def processor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a `preprocessor_config.json`: the arguments of `Preprocess`.

    Raises:
        PreprocessError: a processor or an option that `Preprocess` cannot reproduce.
    """
    if config.get("image_processor_type") == TIMM_PROCESSOR:
        return timm_settings(config.get("pretrained_cfg"))
    given = {key: value for key, value in config.items() if value is not None}
    family = _family(given)
    if not given.get("do_resize", True):
        raise PreprocessError("do_resize is false; images of a batch need one size, set it")
    if given.get("do_pad"):
        raise PreprocessError("do_pad is not supported; use a centre crop (do_center_crop)")
    crop = given.get("do_center_crop", family.crop_size is not None)
    size = _edges("size", given.get("size", family.size), square=family.square)
    crop_size = _exact("crop_size", given.get("crop_size", family.crop_size)) if crop else None
    if family.resize is not None:
        size, crop_size = family.resize(given, size, crop_size)
    rescale = given.get("do_rescale", True)
    normalize = given.get("do_normalize", True)
    if family.divides_twice:
        _check_efficientnet(given, family.std, rescale)
    return {
        "size": size if isinstance(size, tuple) else None,
        "shortest_edge": None if isinstance(size, tuple) else size,
        "crop_size": crop_size,
        "resample": given.get("resample", family.resample),
        "rescale_factor": given.get("rescale_factor", 1 / 255) if rescale else 1.0,
        "mean": _channels("image_mean", given.get("image_mean", family.mean) if normalize else 0),
        "std": _channels("image_std", given.get("image_std", family.std) if normalize else 1),
    }


def timm_settings(config: Any) -> dict[str, Any]:
    """Read how timm prepares images for evaluation with a model, from its `pretrained_cfg`.

    That is `timm.data.resolve_data_config`, whose defaults these are, and `create_transform`.

    Raises:
        PreprocessError: what `Preprocess` cannot reproduce.
    """
    if not isinstance(config, Mapping):
        raise PreprocessError(
            f"pretrained_cfg: got {brief(config)}; expected what the config.json of a timm model "
            "has there: input_size, crop_pct, crop_mode, interpolation, mean, std"
        )
    given = {key: value for key, value in config.items() if value}  # empty means absent there
    size = given.get("input_size", [3, 224, 224])
    sizes = size if isinstance(size, (list, tuple)) else ()
    if len(sizes) != 3 or sizes[0] != 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise PreprocessError(
            f"input_size: got {brief(size)}; expected [3, height, width], as images are RGB"
        )
    crop = (sizes[1], sizes[2])
    mode, interpolation = given.get("crop_mode", "center"), given.get("interpolation", "bicubic")
    names = {r.name.lower(): r for r in Image.Resampling}
    if interpolation not in list(names):
        raise PreprocessError(
            f"interpolation: got {brief(interpolation)}; expected one of {', '.join(names)}"
        )
    pct = _crop_pct(given, 0.875)
    if pct > 1:
        raise PreprocessError(
            f"crop_pct: got {pct}, with which timm adds a border; expected at most 1"
        )
    edges = (math.floor(crop[0] / pct), math.floor(crop[1] / pct))
    if mode not in ("center", "squash") or (mode == "center" and edges[0] != edges[1]):
        raise PreprocessError(
            f"crop_mode: got {brief(mode)} of {crop}, which timm resizes to a size that is rounded "
            "in its own way, or adds a border to; expected 'squash', or 'center' of a square: "
            "describe it as one of these in [image] of a recipe"
        )
    return {
        "size": edges if mode == "squash" else None,
        "shortest_edge": None if mode == "squash" else edges[0],
        "crop_size": crop,
        "resample": names[interpolation],
        "rescale_factor": 1 / 255,
        "mean": _channels("mean", given.get("mean", _IMAGENET[0])),
        "std": _channels("std", given.get("std", _IMAGENET[1])),
        "crop_pct": pct,
    }


def _family(config: Mapping[str, Any]) -> _Family:
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:
        if config.get("do_center_crop") and isinstance(config.get("size"), int):
            raise PreprocessError(
                f"size: got {config['size']} without image_processor_type, which may be a square "
                'or a shortest edge; write {"shortest_edge": ...} or {"height": ..., "width": ...}'
            )
        return _FAMILIES["ViT"]
    match = re.fullmatch(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(named))
    family = _FAMILIES.get(match[1]) if match else None
    if family is None:
        raise PreprocessError(
            f"image_processor_type: got {brief(named)}; its rules may differ from a plain resize "
            f"and centre crop, which are those of {', '.join(_FAMILIES)}: describe it as one of "
            "these, in [image] of a recipe or in its preprocessor_config.json"
        )
    return family


def _check_efficientnet(
    given: Mapping[str, Any], default: tuple[float, float, float], rescale: bool
) -> None:
    """Refuse what its processors do beyond normalising, where that changes anything."""
    if rescale and given.get("rescale_offset"):
        raise PreprocessError(
            "rescale_offset is true, which subtracts 1 from the rescaled image; set it to false "
            "and add 1 to each number of image_mean"
        )
    std = _channels("image_std", given.get("image_std", default))
    if given.get("include_top", True) and std != (1, 1, 1):
        raise PreprocessError(
            f"include_top is true (EfficientNet's default), which divides by image_std {list(std)} "
            f"once more; set it to false and image_std to {[s * s for s in std]}"
        )


def _edges(key: str, value: Any, *, square: bool = True) -> _Size:
    """Read height and width, or one number for the shortest edge."""
    if isinstance(value, Mapping):
        given = {name: edge for name, edge in value.items() if edge is not None}
        edge = given.get("shortest_edge")
        if given.keys() == {"shortest_edge"} and key == "size" and isinstance(edge, int):
            return edge
    if isinstance(value, int) and not square:
        return value
    return _exact(key, value)


def _exact(key: str, value: Any) -> tuple[int, int]:
    """Read height and width."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, Mapping):
        given = {name: edge for name, edge in value.items() if edge is not None}
        if given.keys() == {"height", "width"}:
            return given["height"], given["width"]
    allowed = ' or {"shortest_edge"}' if key == "size" else ""
    raise PreprocessError(f'{key}: got {brief(value)}; expected {{"height", "width"}}{allowed}')


def _channels(key: str, value: Any) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise PreprocessError(f"{key}: got {brief(value)}; expected three numbers, one per channel")
    try:
        return float(values[0]), float(values[1]), float(values[2])
    except (TypeError, ValueError):
        raise PreprocessError(f"{key}: got {brief(value)}; expected three numbers") from None

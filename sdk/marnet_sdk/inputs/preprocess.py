"""The one definition of the way from an RGB image to the array that the model takes.

Training, export and serving all resize, crop and normalise here, so that they cannot disagree.
`Preprocess` gives the same numbers, bit for bit, as the PIL image processors of transformers 5
for the same `preprocessor_config.json`, and as the transform of timm for evaluation.

Axes: B batch, H height, W width; channels are R, G, B.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput, MarnetError, brief
from marnet_sdk.inputs.images import DEFAULT_LIMITS, ImageInput, Limits, decode, shown


class PreprocessError(MarnetError):
    """A preprocessing configuration that is incomplete, or does something this file does not."""

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


_TIMM = "TimmWrapperImageProcessor"
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


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise, as transformers' image processors describe it.

    Exactly one of `size` and `shortest_edge` is set. The output has one static size, because
    images of a batch share an array: with `shortest_edge`, `crop_size` is needed.

    Raises:
        PreprocessError: a combination without a static size, or a value out of range.
    """

    size: tuple[int, int] | None = None  # (height, width), aspect ratio not kept
    shortest_edge: int | None = None  # pixels, aspect ratio kept
    crop_size: tuple[int, int] | None = None  # (height, width), padded with black where smaller
    resample: int = Image.Resampling.BILINEAR  # code of PIL.Image.Resampling
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_pct: float | None = None  # timm has it: crop_size over the resized edges
    fast_decode: bool = False  # of this process, and not of any configuration: see `decode`

    def __post_init__(self) -> None:
        if (self.size is None) == (self.shortest_edge is None):
            raise PreprocessError(
                f"got size={self.size} and shortest_edge={self.shortest_edge}; expected one of them"
            )
        if self.size is None and self.crop_size is None:
            raise PreprocessError(
                f"got shortest_edge={self.shortest_edge} without a centre crop, so every aspect "
                "ratio would give another size and images could not share a batch; set crop_size, "
                "or give an exact height and width"
            )
        edges = [*(self.size or ()), *(self.crop_size or ()), self.shortest_edge or 1]
        if not all(isinstance(edge, int) and edge > 0 for edge in edges):
            raise PreprocessError(f"got edges {edges}; expected positive integers, in pixels")
        if self.resample not in list(Image.Resampling):
            choices = ", ".join(f"{r.value} {r.name.lower()}" for r in sorted(Image.Resampling))
            raise PreprocessError(
                f"resample: got {brief(self.resample)}; expected one of {choices}"
            )
        numbers = (self.rescale_factor, *self.mean, *self.std)
        finite = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        if not finite or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise PreprocessError(
                f"got rescale_factor={self.rescale_factor}, mean={self.mean}, std={self.std}; "
                "expected finite numbers, three for mean and three non-zero ones for std"
            )
        if self.crop_pct is not None:
            timm = _timm_settings(self._timm_config())
            if wrong := [name for name, value in timm.items() if getattr(self, name) != value]:
                raise PreprocessError(
                    f"crop_pct is {self.crop_pct}, with which timm has other values of "
                    f"{', '.join(wrong)} than this: {self}; leave crop_pct out"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read a `preprocessor_config.json`, with transformers' defaults for absent keys.

        Without `image_processor_type` those of ViT are meant, as in Google's ViT checkpoints.

        Raises:
            PreprocessError: a processor or an option that this class cannot reproduce.
        """
        if config.get("image_processor_type") == _TIMM:
            return cls(**_timm_settings(config.get("pretrained_cfg")))
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
        return cls(
            size=size if isinstance(size, tuple) else None,
            shortest_edge=None if isinstance(size, tuple) else size,
            crop_size=crop_size,
            resample=given.get("resample", family.resample),
            rescale_factor=given.get("rescale_factor", 1 / 255) if rescale else 1.0,
            mean=_channels("image_mean", given.get("image_mean", family.mean) if normalize else 0),
            std=_channels("image_std", given.get("image_std", family.std) if normalize else 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """A `preprocessor_config.json` that transformers and `from_dict` read back the same."""
        if self.crop_pct is not None:
            return {"image_processor_type": _TIMM, "pretrained_cfg": self._timm_config()}
        edges = ("height", "width")
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor" if self.size else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": (
                dict(zip(edges, self.size, strict=True))
                if self.size
                else {"shortest_edge": self.shortest_edge}
            ),
            "resample": int(self.resample),
            "do_center_crop": self.crop_size is not None,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop_size is not None:
            config["crop_size"] = dict(zip(edges, self.crop_size, strict=True))
        return config

    def _timm_config(self) -> dict[str, Any]:
        """Make the part of timm's `pretrained_cfg` that says how images are prepared."""
        return {
            "input_size": [3, *(self.crop_size or (0, 0))],
            "crop_pct": self.crop_pct,
            "crop_mode": "squash" if self.size else "center",
            "interpolation": Image.Resampling(self.resample).name.lower(),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of every output."""
        height, width = self.crop_size or self.size or (0, 0)
        return 3, height, width

    def decode(
        self, image: ImageInput, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> Image.Image:
        """Decode one image to RGB, as `images.decode` does.

        With `fast_decode`, JPEG files are decoded at a half, a quarter or an eighth of their size:
        the smallest that is at least twice as wide and twice as high as what it is resized to, so
        that resizing still averages. `Image.thumbnail` of Pillow has the same rule. What is not
        twice as large, and all other inputs, are decoded as ever.

        Raises:
            ImageError: as `images.decode`.
        """
        at_least = None
        if self.fast_decode:
            edge = self.shortest_edge or 1
            height, width = self.size or (edge, edge)
            at_least = 2 * width, 2 * height
        return decode(image, name=name, limits=limits, at_least=at_least)

    def __call__(
        self,
        image: Image.Image,
        *,
        out: NDArray[np.float32] | None = None,
        name: str = "image",
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[np.float32]:
        """Turn one decoded image into float32 [3, H, W], into `out` if given.

        Raises:
            ImageTooLarge: as `resized_uint8`.
        """
        return self.normalize(self.resized_uint8(image, name=name, limits=limits), out=out)

    def pixels(
        self,
        images: Sequence[ImageInput],
        *,
        names: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[np.float32]:
        """Decode and preprocess a batch: float32 [B, 3, H, W], written in place once.

        Args:
            names: how errors call the inputs; by default their path, else "image 0", "image 1", ...

        Raises:
            ImageError: the first input that is not a usable image.
        """
        if names is not None and len(names) != len(images):
            raise InvalidInput(f"got {len(names)} names for {len(images)} images; expected as many")
        batch = np.empty((len(images), *self.output_shape), np.float32)  # [B, 3, H, W]
        for i, image in enumerate(images):
            if names is not None:
                name = names[i]
            else:
                is_path = isinstance(image, (str, os.PathLike))
                name = shown(image) if is_path else f"image {i}"
            decoded = self.decode(image, name=name, limits=limits)
            self(decoded, out=batch[i], name=name, limits=limits)
        return batch

    def resized_uint8(
        self, image: Image.Image, *, name: str = "image", limits: Limits = DEFAULT_LIMITS
    ) -> NDArray[np.uint8]:
        """The part before normalising, for training to cache: uint8 [H, W, 3].

        Raises:
            ImageTooLarge: so elongated that scaling the short edge makes it exceed `limits`.
            ImageError: not an RGB image (use `decode`), or it cannot be resized.
        """
        if image.mode != "RGB":
            raise ImageError(name, f"got PIL mode {image.mode}; expected RGB: use decode() first")
        height, width = self._resized_size(image.height, image.width)
        if height * width > limits.max_pixels:
            raise ImageTooLarge(
                name,
                f"got {image.width} x {image.height} pixels, which resized to a shortest edge of "
                f"{self.shortest_edge} would be {width} x {height}, more than the "
                f"{limits.max_pixels} accepted: crop it",
            )
        try:
            array = np.array(image.resize((width, height), resample=self.resample))  # [h, w, 3]
        except Exception as error:  # MemoryError above all
            raise ImageError(
                name,
                f"got {image.width} x {image.height} pixels, which cannot be resized to {width} x "
                f"{height} ({type(error).__name__}: {error}); send a smaller image, or lower "
                "Limits.max_pixels",
            ) from error
        if self.crop_size is None:
            return array
        return _centre_crop(array, self.crop_size, to_even=self.crop_pct is not None)

    def normalize(
        self, resized: NDArray[np.uint8], *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Turn uint8 [..., H, W, 3] into (v * rescale_factor - mean) / std, float32 [..., 3, H, W].

        A byte has 256 values, so all arithmetic is done beforehand and this looks up. That is
        exact, where the same operations on float32 arrays would differ in the last bit.
        """
        *batch, height, width, channels = resized.shape
        shape = (*batch, channels, height, width)
        if out is None:
            out = np.empty(shape, np.float32)
        if channels != 3 or out.shape != shape or out.dtype != np.float32:
            raise InvalidInput(
                f"got {resized.shape} into {out.dtype} {out.shape}; "
                "expected [..., H, W, 3] into float32 [..., 3, H, W]"
            )
        for c in range(3):
            # "clip" only because the default mode would buffer `out`; no byte is out of range
            np.take(self._table[c], resized[..., c], out=out[..., c, :, :], mode="clip")
        return out

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """The normalised value of each byte, float32 [3, 256].

        Rounded where transformers rounds: rescaled in float64, normalised in float32.
        """
        rescaled = (np.arange(256.0) * self.rescale_factor).astype(np.float32)  # [256]
        mean = np.array(self.mean, np.float32)[:, None]  # [3, 1]
        std = np.array(self.std, np.float32)[:, None]
        return (rescaled - mean) / std

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        short, long = min(height, width), max(height, width)
        edge = self.shortest_edge or 1
        scaled = int(edge * long / short)  # transformers truncates, too
        return (edge, scaled) if height <= width else (scaled, edge)


def _centre_crop(
    array: NDArray[np.uint8], crop_size: tuple[int, int], *, to_even: bool = False
) -> NDArray[np.uint8]:
    """Crop [h, w, 3] to [H, W, 3]: cut where larger, pad with zeros where smaller.

    As transformers has it, an odd pixel is cut below or right, and padded above or left.

    Args:
        to_even: as torchvision has it, half of an odd number of pixels is rounded to an even one.
    """
    here, there = [], []  # slices of the array, and of the result
    for length, wanted in zip(array.shape, crop_size, strict=False):
        spare = max(0, length - wanted)
        cut, pad = round(spare / 2) if to_even else spare // 2, max(0, (wanted - length + 1) // 2)
        covered = min(length, wanted)
        here.append(slice(cut, cut + covered))
        there.append(slice(pad, pad + covered))
    result = np.zeros((*crop_size, 3), np.uint8)
    result[tuple(there)] = array[tuple(here)]
    return result


def _timm_settings(config: Any) -> dict[str, Any]:
    """Read how timm prepares images for evaluation with a model, from its `pretrained_cfg`.

    That is `timm.data.resolve_data_config`, whose defaults these are, and `create_transform`.
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

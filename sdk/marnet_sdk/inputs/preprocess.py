"""The one definition of the way from an RGB image to the array that the model takes.

Training, export and serving all resize, crop and normalise here, so that they cannot disagree.
`Preprocess` gives the same numbers, bit for bit, as the PIL image processors of transformers 5
for the same `preprocessor_config.json`, and as the transform of timm for evaluation.

Axes: B batch, H height, W width; channels are R, G, B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput, brief
from marnet_sdk.inputs.images import DEFAULT_LIMITS, ImageInput, Limits, decode, shown
from marnet_sdk.inputs.processors import (
    TIMM_PROCESSOR,
    PreprocessError,
    processor_settings,
    timm_settings,
)


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
            timm = timm_settings(self._timm_config())
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
        return cls(**processor_settings(config))

    def to_dict(self) -> dict[str, Any]:
        """A `preprocessor_config.json` that transformers and `from_dict` read back the same."""
        if self.crop_pct is not None:
            return {"image_processor_type": TIMM_PROCESSOR, "pretrained_cfg": self._timm_config()}
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

"""Training images as arrays: decoded once per run, augmented on the fly.

Axes: N images, H, W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import radians
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from marnet_sdk.console import track
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import ImageError
from marnet_sdk.inputs.images import decode
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data.examples import Example, Problems
from marnet_train.recipe import Augment

_RAM_LIMIT = 2 << 30  # bytes; larger sets are kept in an unlinked temporary file


class PixelStore:
    """This holds the resized images of one split, uint8 [N, H, W, 3].

    They are read as normalised float32 batches.
    """

    def __init__(self, examples: Sequence[Example], preprocess: Preprocess, title: str) -> None:
        """Decode and resize every image, with all cores.

        Raises:
            DataError: some images cannot be decoded; names them and their lines.
        """
        self.preprocess = preprocess
        _, height, width = preprocess.output_shape
        self.array = _allocate((len(examples), height, width, 3))
        problems = Problems()

        def load(i: int) -> str | None:
            try:
                image = decode_example(examples[i])
                self.array[i] = preprocess.resized_uint8(image, name=image_name(examples[i]))
            except ImageError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(cpus().threads) as pool:
            faults = pool.map(load, range(len(examples)))  # in order
            for fault in track(faults, f"read {title}", len(examples)):
                if fault is not None:
                    problems.add(fault)
        problems.raise_if_any(f"the images of {title}")

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, rows: NDArray[np.int64] | slice) -> Tensor:
        """Return images `rows`, normalised: float32 [B, 3, H, W]."""
        return torch.from_numpy(self.preprocess.normalize(self.array[rows]))


def image_name(example: Example) -> str:
    """Say how errors call the image: with the line of the data set that names it."""
    return f"{example.origin}: {example.image}" if example.origin else str(example.image)


def decode_example(example: Example) -> Image.Image:
    """Decode the upright RGB image of an example.

    Raises:
        ImageError: it is not a usable image, or can no longer be read.
    """
    image = example.image
    source = image if isinstance(image, Path) else image.read_bytes()
    return decode(source, name=image_name(example))


def _allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if np.prod(shape, dtype=np.int64) <= _RAM_LIMIT:
        return np.empty(shape, np.uint8)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the map
    return np.memmap(file, np.uint8, "w+", shape=shape)


def augment(pixels: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shift and mirror each image at random; edges are repeated outwards.

    Args:
        pixels: [B, 3, H, W] on any device. generator: a CPU generator.
    Returns:
        [B, 3, H, W].
    """
    if settings == Augment():
        return pixels
    count = pixels.shape[0]

    def uniform(limit: float) -> Tensor:  # [B], from -limit to limit
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle = uniform(radians(settings.rotate))
    zoom = 1 + uniform(settings.scale)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    mirror = mirror if settings.flip else torch.ones(count)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # affine_grid maps output to input coordinates, both from -1 to 1: a side is 2 long.
    row_x = torch.stack([cos * mirror, -sin, uniform(2 * settings.shift)], dim=-1)
    row_y = torch.stack([sin * mirror, cos, uniform(2 * settings.shift)], dim=-1)
    theta = torch.stack([row_x, row_y], dim=1).to(pixels)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

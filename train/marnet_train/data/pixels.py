"""Training images as arrays: decoded by threads, augmented on the fly.

Axes: N images, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import radians
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from marnet_sdk.console import say, track
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import ImageError
from marnet_sdk.inputs.images import decode
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data.examples import Example, Problems
from marnet_train.recipe import Augment

KEPT_LIMIT = 2 << 30  # bytes; the images of a larger split are decoded whenever they are needed
_CHUNK = 1024  # images that are asked of the threads at a time


class PixelStore:
    """This gives the resized images of one split as normalised float32 batches.

    Images are decoded by threads, as decoders of Pillow let other threads run. A split of up to
    `KEPT_LIMIT` bytes is decoded once and kept, uint8 [N, H, W, 3]. Of a larger split no image is
    kept: those of a batch are decoded when it is asked for, or, with `ahead`, while the model works
    on the batch before.
    """

    def __init__(self, examples: Sequence[Example], preprocess: Preprocess, title: str) -> None:
        """Decode every image once, so that one that cannot be decoded is found now.

        Raises:
            DataError: some images cannot be decoded; names them and their lines.
        """
        self.preprocess = preprocess
        self._examples = examples
        _, height, width = preprocess.output_shape
        shape = (len(examples), height, width, 3)
        size = math.prod(shape)
        self._kept = np.empty(shape, np.uint8) if size <= KEPT_LIMIT else None
        self._threads = ThreadPoolExecutor(cpus().threads)
        self._coming: dict[int, Future[NDArray[np.uint8]]] = {}
        if not self.keeps:
            say(f"{title}: {size / 2**30:.1f} GiB of pixels; images are decoded for every batch")
        problems = Problems()
        chunks = (range(i, min(i + _CHUNK, len(self))) for i in range(0, len(self), _CHUNK))
        faults = (fault for chunk in chunks for fault in self._threads.map(self._load, chunk))
        for fault in track(faults, f"read {title}", len(self)):
            if fault is not None:
                problems.add(fault)
        if self.keeps:
            self._threads.shutdown()
        problems.raise_if_any(f"the images of {title}")

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def keeps(self) -> bool:
        """Tell whether the images stay in memory."""
        return self._kept is not None

    def batch(self, rows: Tensor | slice) -> Tensor:
        """Return images `rows`, normalised: float32 [B, 3, H, W]."""
        if self._kept is not None:
            kept = self._kept[rows if isinstance(rows, slice) else rows.numpy()]
            return torch.from_numpy(self.preprocess.normalize(kept))
        self._begin(rows)
        indices = self._indices(rows)
        decoded = np.stack([self._coming[i].result() for i in indices])
        for i in indices:
            self._coming.pop(i, None)
        return torch.from_numpy(self.preprocess.normalize(decoded))

    def ahead(
        self, order: Iterable[Tensor], own: Callable[[int], slice] = slice
    ) -> Iterator[Tensor]:
        """Yield the rows of each batch while the images of the one after it are decoded.

        own: which places of a batch of so many rows will be asked for; all of them by default.
        """
        before: Tensor | None = None
        for rows in order:
            if not self.keeps:
                self._begin(rows[own(len(rows))])
            if before is not None:
                yield before
            before = rows
        if before is not None:
            yield before

    def _begin(self, rows: Tensor | slice) -> None:
        """Let threads decode the images that none has begun with."""
        for i in self._indices(rows):
            if i not in self._coming:
                self._coming[i] = self._threads.submit(self._decode, i)

    def _indices(self, rows: Tensor | slice) -> Sequence[int]:
        return range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()

    def _decode(self, i: int) -> NDArray[np.uint8]:
        """Decode and resize an image, [H, W, 3]."""
        example = self._examples[i]
        image = decode_example(example)
        return self.preprocess.resized_uint8(image, name=image_name(example))

    def _load(self, i: int) -> str | None:
        """Decode an image, keep it if images are kept, and say what is wrong with it."""
        try:
            image = self._decode(i)
        except ImageError as error:
            return str(error)
        if self._kept is not None:
            self._kept[i] = image
        return None


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


def augment(
    pixels: Tensor,
    settings: Augment,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Rotate, scale, shift and mirror each image at random; edges are repeated outwards.

    Args:
        pixels: [B, 3, H, W] on any device. generator: a CPU generator.
        batch, own: the images stand at these places of a batch of so many, and get what they would
            get in it.
    Returns:
        [B, 3, H, W].
    """
    if settings == Augment():
        return pixels
    count = len(pixels) if batch is None else batch

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
    theta = torch.stack([row_x, row_y], dim=1)[own].to(pixels)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def random_crops(
    pixels: Tensor,
    side: int,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Cut a square of `side` pixels out of each image, anywhere in it.

    [B, 3, H, W] -> [B, 3, side, side]; the other arguments are those of `augment`.
    """
    count = len(pixels) if batch is None else batch
    room = [length - side + 1 for length in pixels.shape[2:]]
    corners = [torch.randint(r, (count,), generator=generator)[own].tolist() for r in room]
    cuts = zip(pixels, *corners, strict=True)
    return torch.stack([image[:, y : y + side, x : x + side] for image, y, x in cuts])

"""Pictures that several test files make, encode and read."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def make_picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours without any symmetry, so that every flip and swap of channels shows."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 200 // height, (x + 2 * y) * 90 // (width + 2 * height) + 40]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)

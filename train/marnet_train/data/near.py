"""Pictures that are nearly the same: a photograph and its smaller copy in another file format.

Each is reduced to 8 x 8 pixels, which survives a change of size and lossy compression, and two are
near copies if these differ by little beside the contrast of either. In the data sets that marnet
writes, different pictures differ by 0.28 and more of it (photographs), 0.36 (rendered plates) and
0.16 (digits); copies, resized to between half and 1.3 times or saved as JPEG, WebP or GIF, by up
to 0.09. A perceptual hash of 64 bits keeps less, and cannot tell one digit from another.

Axes: N, M pictures.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
NEAR = 0.12  # of the standard deviation of the flatter picture
_FLAT = 4.0  # grey levels; below this standard deviation there is nothing to compare
_BLOCK = 1024  # pictures that are compared with all others at once


def thumbnail(image: Image.Image) -> bytes:
    """Shrink an RGB image to SIDE x SIDE pixels."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def near_pairs(first: list[bytes], second: list[bytes]) -> Iterator[tuple[int, int]]:
    """Yield indices of pictures of the two lists that are near copies of each other."""
    a, b = _pixels(first), _pixels(second)  # [N, P], [M, P]
    bound_a, bound_b = _bounds(a), _bounds(b)
    squares = (b**2).sum(axis=1)  # [M]
    for start in range(0, len(a), _BLOCK):
        block = a[start : start + _BLOCK]
        distance = (block**2).sum(axis=1)[:, None] + squares - 2 * block @ b.T
        bound = np.minimum(bound_a[start : start + _BLOCK, None], bound_b)
        for i, j in np.argwhere(distance < bound).tolist():
            yield start + i, j


def _pixels(thumbnails: list[bytes]) -> NDArray[np.float32]:
    flat = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(thumbnails), -1)
    return flat.astype(np.float32) - 128  # around 0, where squares keep more digits


def _bounds(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the square of the distance below which another picture is a near copy: [N]."""
    deviation = pixels.std(axis=1)
    bounds = (NEAR * deviation) ** 2 * pixels.shape[1]
    return np.where(deviation < _FLAT, 0, bounds).astype(np.float32)

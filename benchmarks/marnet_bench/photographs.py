"""The image files that are measured: a bundle's golden images, or photographs of any size."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from marnet_sdk.bundle import Bundle
from marnet_sdk.errors import requires_extra

TWELVE_MEGAPIXELS = 4243  # the longer side of scikit-learn's photographs, 3 to 2, at 12 megapixels
_QUALITIES = (75, 85, 95)
_FILES = 64  # golden images that are asked for, some of them more than once


def golden_images(bundle: Bundle, count: int) -> list[bytes]:
    """The files of the bundle's golden images, repeated to `count`."""
    files = [path.read_bytes() for path in bundle.golden_images()]
    return list(islice(cycle(files), count))


def images_of(bundle: Bundle | None, sides: Sequence[int]) -> list[bytes]:
    """The image files of a measurement.

    Args:
        bundle: whose golden images there are; it is not asked where there are `sides`.
        sides: pixels of the longer sides of photographs; none: the golden images.
    """
    if sides or bundle is None:
        return [file for side in sides for file in photographs(side)]
    return golden_images(bundle, _FILES)


def photographs(side: int) -> Iterator[bytes]:
    """The two photographs that scikit-learn ships, scaled and encoded anew as JPEG.

    They have 640 x 427 pixels, so that larger ones show nothing finer: their files are smaller, and
    decoded somewhat faster, than those of a camera.

    Args:
        side: pixels of the longer side.
    """
    with requires_extra("bench", "sklearn"):
        import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    for name in ("china.jpg", "flower.jpg"):
        with Image.open(folder / name) as photograph:
            scale = side / max(photograph.size)
            width, height = (max(1, round(scale * length)) for length in photograph.size)
            scaled = photograph.resize((width, height))
        for quality in _QUALITIES:
            scaled.save(file := io.BytesIO(), "JPEG", quality=quality)
            yield file.getvalue()

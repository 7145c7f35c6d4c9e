"""Five corruptions of an image at three strengths, as a camera or a transmission may cause them.

The idea, and the settings of blur, noise and JPEG, are from Hendrycks and Dietterich, "Benchmarking
neural network robustness to common corruptions and perturbations", ICLR 2019: strengths 1, 2 and 3
are their severities 1, 3 and 5. Theirs are for pictures of 224 x 224 pixels. Here they are relative
to the image: its *side* is sqrt(width * height), and a length of theirs is a share of 224. So the
same picture at 80 and at 2,000 pixels is damaged alike, as a model sees it that resizes it.

Shapes: width w and height h in pixels; 3 channels of 0 to 255.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from PIL.ImageFilter import GaussianBlur

from marnet_sdk.errors import InvalidInput, nearest

STRENGTHS = (1, 2, 3)
_REFERENCE = 224  # pixels of the side that Hendrycks and Dietterich's settings are for
_GREY = (128, 128, 128)


def corrupt(image: Image.Image, kind: str, strength: int, seed: int) -> Image.Image:
    """Return a damaged copy of an image, of the same size; the same arguments give the same one.

    The strengths of a kind share what is random, so a stronger one differs in its strength only.

    Args:
        image: RGB, w x h; it is not changed.
        kind: one of `KINDS`: what it does, and how much at each strength, say the functions below.
        strength: 1, 2 or 3.
        seed: of the noise and of the occlusion's place, not negative; the others draw nothing.

    Raises:
        InvalidInput: another mode, kind or strength, or a negative seed.
    """
    if image.mode != "RGB":
        raise InvalidInput(f"image: got mode {image.mode}; expected RGB, as `decode` makes it")
    if kind not in _CORRUPTIONS:
        raise InvalidInput(f"kind: got {kind!r}; expected one of {KINDS}.{nearest(kind, KINDS)}")
    if strength not in STRENGTHS:
        raise InvalidInput(f"strength: got {strength}; expected 1, 2 or 3")
    if seed < 0:
        raise InvalidInput(f"seed: got {seed}; expected 0 or more")
    return _CORRUPTIONS[kind](image, STRENGTHS.index(strength), np.random.default_rng(seed))


def blur(image: Image.Image, level: int, _: np.random.Generator) -> Image.Image:
    """Gaussian blur, as out of focus; its deviation is 1/224, 3/224 or 6/224 of the side."""
    share = (1, 3, 6)[level] / _REFERENCE
    return image.filter(GaussianBlur(share * _side(image)))


def noise(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise, as in low light; its deviation is 0.08, 0.18 or 0.38 of the range 0 to 255.

    It is drawn for each channel on a grid whose side has 224 cells, and a pixel gets the mean of
    the cells that it covers. Of a larger image several pixels share a cell: noise in single pixels
    would vanish when it is made small. In a smaller image the deviation is less, by side / 224.
    """
    deviation = 255 * (0.08, 0.18, 0.38)[level]
    width, height = _reference_size(image)
    grids = deviation * rng.standard_normal((3, height, width), dtype=np.float32)
    planes = [Image.fromarray(grid).resize(image.size, Resampling.BOX) for grid in grids]
    noisy = np.asarray(image) + np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return Image.fromarray(np.rint(noisy).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, level: int, _: np.random.Generator) -> Image.Image:
    """JPEG with quality 25, 15 or 7, on a copy whose side is 224 pixels, resized back.

    Blocks of 8 pixels are thereby 1/28 of the side in any image. A larger image loses the detail
    that a picture of 224 pixels does not have.
    """
    small = image.resize(_reference_size(image), Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=(25, 15, 7)[level])
    return Image.open(file).resize(image.size, Resampling.BICUBIC)


def darkness(image: Image.Image, level: int, _: np.random.Generator) -> Image.Image:
    """Too little light: a value v of 0 to 1 becomes gain * v ** gamma.

    Gain and gamma are 0.7 and 1.2, 0.5 and 1.5, or 0.3 and 2: grey (0.5) becomes 0.30, 0.18 or
    0.08. The settings are this project's; Hendrycks and Dietterich only brighten.
    """
    gain, gamma = ((0.7, 1.2), (0.5, 1.5), (0.3, 2.0))[level]
    curve = [round(255 * gain * (value / 255) ** gamma) for value in range(256)]
    return image.point(curve * 3)


def occlusion(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """A grey rectangle, of the image's proportions, over 10, 25 or 45 % of its area.

    Its place is uniform among those inside of the image, and a stronger one covers all that a
    weaker one does. Such patches are from DeVries and Taylor, "Improved regularization of
    convolutional neural networks with cutout", 2017; the settings are this project's.
    """
    scale = math.sqrt((0.10, 0.25, 0.45)[level])
    start = rng.random(2) * (1 - scale)  # from the left and from the top, as shares
    left, top, right, bottom = (np.array([*start, *(start + scale)]) * (image.size * 2)).tolist()
    covered = image.copy()
    covered.paste(_GREY, (round(left), round(top), round(right), round(bottom)))
    return covered


_CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "darkness": darkness,
    "occlusion": occlusion,
}
KINDS = tuple(_CORRUPTIONS)


def _side(image: Image.Image) -> float:
    return math.sqrt(image.width * image.height)


def _reference_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image if its side were 224."""
    scale = _REFERENCE / _side(image)
    return max(1, round(scale * image.width)), max(1, round(scale * image.height))

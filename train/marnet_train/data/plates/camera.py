"""This module photographs the table: viewpoint, light, steam, blur, sensor noise, JPEG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from marnet_train.data.plates.brush import EXTENT
from marnet_train.data.plates.scene import soft_noise


def photograph(table: Image.Image, rng: np.random.Generator, size: int, difficulty: float) -> bytes:
    """Photograph a table from above or aslant: a JPEG file of `size` x `size` pixels."""
    hard = 0.6 * difficulty
    picture = _view(table, rng, 2 * size, hard).resize((size, size), Image.Resampling.BOX)
    blur = rng.gamma(1.2, 0.0022 * hard) * size if hard else 0.0
    pixels = _light(np.asarray(picture, np.float32) / np.float32(255), rng, hard)
    # In the order of a camera: light, lens, sensor.
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    if blur > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    if rng.random() < 0.2 * hard:
        picture = _shake(picture, rng, size)
    quality = int(np.clip(rng.normal(88 - 14 * hard, 10), 30, 95))
    strength = abs(rng.normal(0, 5.0 * hard))
    noise = rng.normal(0, 1, (size, size, 3)) * strength
    grainy = np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _view(table: Image.Image, rng: np.random.Generator, size: int, hard: float) -> Image.Image:
    """Return the table through a camera that is tilted, turned, off-centre, near or far."""
    tilt = abs(rng.normal(0, 0.38 * hard))  # radians from straight down
    tilt = min(tilt, 0.95)
    spin = rng.uniform(0, 2 * np.pi)
    reach = 0.8 * np.exp(rng.normal(0, 0.13 * hard))  # half of the width of the frame
    offset = rng.normal(0, 0.1 * hard, 2)
    distance = 3.2
    u, v = np.meshgrid([-1.0, 1.0], [-1.0, 1.0])
    rays = np.stack([u.ravel() * reach, v.ravel() * reach], axis=1)  # corners of the frame
    # A ray through (a, b) of the plane before the camera meets the table where the camera, turned
    # by the tilt about the x axis, looks: a central projection.
    depth = distance / (distance - rays[:, 1] * np.sin(tilt))
    x, y = rays[:, 0] * depth, rays[:, 1] * np.cos(tilt) ** -0.6 * depth
    corners = np.stack([x, y], axis=1)
    cos, sin = np.cos(spin), np.sin(spin)
    corners = corners @ np.array([[cos, sin], [-sin, cos]]) + offset
    corners = np.clip(corners, -EXTENT * 1.6, EXTENT * 1.6)
    source = (corners + EXTENT) * table.width / (2 * EXTENT)
    target = np.array([[0, 0], [size, 0], [0, size], [size, size]], np.float64)
    return _mirrored(table).transform(
        (size, size),
        Image.Transform.PERSPECTIVE,
        _coefficients(target, source + table.width),
        Image.Resampling.BILINEAR,
    )


def _mirrored(table: Image.Image) -> Image.Image:
    """Return the table and its reflections, 3 x 3: where a tilted camera looks past the edge."""
    side = table.width
    whole = Image.new("RGB", (3 * side, 3 * side))
    across = table.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    down = table.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    both = across.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for i, row in enumerate(((both, down, both), (across, table, across), (both, down, both))):
        for j, tile in enumerate(row):
            whole.paste(tile, (j * side, i * side))
    return whole


def _coefficients(target: NDArray[np.float64], source: NDArray[np.float64]) -> tuple[float, ...]:
    """Find the eight numbers of a projective map from target to source, from four points each."""
    rows, right = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return tuple(np.linalg.solve(np.array(rows), np.array(right)).tolist())


def _light(
    pixels: NDArray[np.float32], rng: np.random.Generator, hard: float
) -> NDArray[np.float32]:
    """Add exposure, colour temperature, a gradient, a shadow across, vignette, steam, contrast."""
    size = len(pixels)
    x, y = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 2)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    level = np.exp(rng.normal(-0.02, 0.18 * hard)) * (1 + 0.22 * hard * rng.random() * along)
    if rng.random() < 0.3 * hard:  # a window frame, an arm
        edge = rng.uniform(-0.7, 0.7)
        soft = rng.uniform(6, 25)
        level = level * (1 - 0.4 / (1 + np.exp(-soft * (along - edge))))
    level = level * (1 - 0.18 * hard * rng.random() * (x * x + y * y))
    warmth = rng.normal(0, 0.11 * hard)
    tint = np.array([np.exp(warmth), 1.0, np.exp(-1.3 * warmth)], np.float32)
    out = pixels * level[..., None] * tint
    if rng.random() < 0.2 * hard:
        steam = np.clip(soft_noise(rng, (5, 5), size) * 0.22, 0, 0.5)[..., None]
        out = out * (1 - steam) + 0.92 * steam
    contrast = np.exp(rng.normal(0, 0.14 * hard))
    return (np.clip(out, 0, 1.2) ** contrast).astype(np.float32)


def _shake(picture: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Apply motion blur: the mean of five shifted copies."""
    angle, reach = rng.uniform(0, np.pi), rng.uniform(0.005, 0.02) * size
    total = np.zeros((size, size, 3), np.float32)
    for share in np.linspace(-1, 1, 5):
        dx, dy = share * reach * np.cos(angle), share * reach * np.sin(angle)
        moved = picture.transform(
            (size, size), Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), Image.Resampling.BILINEAR
        )
        total += np.asarray(moved, np.float32)
    return Image.fromarray((total / 5).astype(np.uint8))

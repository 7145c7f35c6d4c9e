"""Drawing in the plane of the table: shapes with a shadow, a shaded edge and a highlight.

One unit of length is about 16 cm, angles are in radians; the plate's centre is the origin, and the
picture shows -EXTENT to EXTENT both ways. Nothing here depends on how many pixels that is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

EXTENT = 1.4
Colour = tuple[int, int, int]
Points = NDArray[np.float64]  # [N, 2]
At = Sequence[float] | NDArray[np.float64]  # x, y
_TURN = np.linspace(0, 2 * np.pi, 21)[:-1]


def shade(colour: Colour, factor: float) -> Colour:
    """Make a colour darker (below 1) or lighter."""
    red, green, blue = (max(0, min(255, round(c * factor))) for c in colour)
    return red, green, blue


def ellipse(at: At, rx: float, ry: float | None = None, angle: float = 0.0) -> Points:
    """Return the outline of an ellipse, [20, 2]."""
    ry = rx if ry is None else ry
    return turn(np.stack([rx * np.cos(_TURN), ry * np.sin(_TURN)], axis=1), angle) + at


def turn(points: Points, angle: float) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


class Brush:
    """This draws on one picture with one light and one source of chance."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        """Begin an empty picture.

        Args:
            size: side of the picture, pixels.
        """
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.rng = rng
        self.scale = size / (2 * EXTENT)
        angle = rng.uniform(0, 2 * np.pi)
        self.away = np.array([np.cos(angle), np.sin(angle)])  # from the light
        self.limit = EXTENT  # how far from the centre a curl may reach

    def vary(self, colour: Colour, amount: float = 0.1) -> Colour:
        """Make a colour a little lighter or darker, and a little off in each channel."""
        factors = self.rng.uniform(1 - amount, 1 + amount) * self.rng.uniform(0.97, 1.03, 3)
        red, green, blue = np.clip(np.array(colour) * factors, 0, 255).astype(int).tolist()
        return red, green, blue

    def fill(self, points: Points, colour: Colour, alpha: float = 1.0) -> None:
        pixels = ((points + EXTENT) * self.scale).ravel().tolist()
        self.draw.polygon(pixels, (*colour, round(255 * alpha)))

    def stroke(self, points: Points, width: float, colour: Colour, alpha: float = 1.0) -> None:
        pixels = ((points + EXTENT) * self.scale).ravel().tolist()
        width = max(1, round(width * self.scale))
        self.draw.line(pixels, (*colour, round(255 * alpha)), width, joint="curve")

    def shadow(self, points: Points, height: float) -> None:
        self.fill(points + self.away * height, (20, 12, 8), 0.22)
        self.fill(points + self.away * height * 0.55, (20, 12, 8), 0.28)

    def solid(
        self, points: Points, colour: Colour, height: float = 0.04, gloss: float = 0.3
    ) -> None:
        """Draw a piece with thickness: shadow, dark edge, face, lit side, highlight."""
        centre = points.mean(axis=0)
        self.shadow(points, height)
        self.fill(points, shade(colour, 0.72))
        self.fill(centre + 0.88 * (points - centre) - self.away * height * 0.2, colour)
        lit = centre + 0.6 * (points - centre) - self.away * height * 0.5
        self.fill(lit, shade(colour, 1.15), 0.45)
        if gloss:
            spot = centre + 0.22 * (points - centre) - self.away * height * 0.9
            self.fill(spot, (255, 255, 255), gloss)

    def lump(
        self,
        at: At,
        radius: float,
        *,
        wobble: float = 0.15,
        stretch: float = 1.0,
        angle: float | None = None,
    ) -> Points:
        """Return a random rounded outline, [20, 2]."""
        phases = self.rng.uniform(0, 2 * np.pi, 3)
        waves = sum(np.sin(k * _TURN + p) / k for k, p in zip((2, 3, 5), phases, strict=True))
        r = radius * (1 + wobble * waves)
        points = np.stack([stretch * r * np.cos(_TURN), r * np.sin(_TURN)], axis=1)
        return turn(points, self.angle() if angle is None else angle) + at

    def angle(self) -> float:
        return float(self.rng.uniform(0, 2 * np.pi))

    def curl(self, at: At, length: float, bend: float) -> Points:
        """Return a smooth random path within `limit`, [16, 2].

        `bend` says how far its direction wanders.
        """
        turns = np.cumsum(self.rng.normal(0, bend, 16)) + self.angle()
        steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * (length / 16)
        path = np.cumsum(steps, axis=0) - steps.sum(axis=0) / 2 + at
        far = np.hypot(path[:, :1], path[:, 1:])
        return path * np.minimum(1, self.limit / np.maximum(far, 1e-9))  # along the rim

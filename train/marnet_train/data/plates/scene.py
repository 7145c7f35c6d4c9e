"""A table with a plate on it, seen from straight above: texture, clutter, crockery, food."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marnet_train.data.plates.brush import EXTENT, Brush, Colour, ellipse, shade, turn
from marnet_train.data.plates.food import FOODS
from marnet_train.data.plates.menu import Serving

_GROUND_COLOURS: dict[str, tuple[Colour, ...]] = {
    "broth": ((176, 128, 70), (205, 170, 110), (150, 88, 48)),
    "sauce": ((178, 78, 34), (120, 62, 34), (204, 150, 60), (150, 160, 90)),
    "dressing": ((228, 222, 190),),
    "dry": ((222, 214, 196), (196, 168, 120)),
}
_PLATES: tuple[Colour, ...] = (
    (242, 240, 236), (242, 240, 236), (222, 226, 230), (64, 68, 76), (196, 176, 150),
    (120, 146, 160),
)  # fmt: skip
PLATE = 0.78  # its radius: 25 cm across
_TABLES: tuple[Colour, ...] = (
    (150, 104, 66), (96, 62, 40), (198, 170, 130), (222, 218, 210), (88, 92, 98), (168, 60, 56),
    (70, 96, 120), (232, 226, 210),
)  # fmt: skip


def compose(
    serving: Serving, rng: np.random.Generator, size: int, difficulty: float
) -> Image.Image:
    """Draw the picture of a table from above, RGB [size, size], -EXTENT to EXTENT."""
    brush = Brush(size, rng)
    brush.image.paste(_table(rng, size))
    for _ in range(rng.poisson(2.4 * difficulty)):
        _CLUTTER[rng.integers(len(_CLUTTER))](brush)
    inside = _plate(brush)
    _ground(brush, serving.ground, inside)
    place_food(brush, serving, inside)
    for _ in range(rng.poisson(0.6 * difficulty)):
        _over(brush)
    return brush.image


def place_food(brush: Brush, serving: Serving, inside: float) -> None:
    """Draw every ingredient in a heap of its own or scattered, lower layers first."""
    brush.limit = 0.93 * inside
    heaps = brush.rng.random() < 0.45  # this cook arranges
    slots = brush.rng.permutation(len(serving.ingredients))
    start = brush.angle()
    order = sorted(range(len(slots)), key=lambda i: FOODS[serving.ingredients[i]].layer)
    for i in order:
        food = FOODS[serving.ingredients[i]]
        angle = start + 2 * np.pi * slots[i] / len(slots)
        out = 0.0 if food.layer == 0 else brush.rng.uniform(0.2, 0.6) * inside
        centre = np.array([np.cos(angle), np.sin(angle)]) * out
        spread = food.spread if heaps or food.layer == 0 else 0.75
        for _ in range(brush.rng.integers(food.count[0], food.count[1] + 1)):
            food.piece(brush, _inside(centre + brush.rng.normal(0, spread * 0.55, 2), inside))


def _inside(at: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Move a place onto the plate if it is outside."""
    far = float(np.hypot(*at))
    return at if far <= 0.86 * radius else at * (0.86 * radius / far) * 0.93


def soft_noise(rng: np.random.Generator, cells: tuple[int, int], size: int) -> NDArray[np.float32]:
    """Make smooth noise around 0, [size, size], with `cells` (x, y) bumps.

    It is the same at any size.
    """
    coarse = rng.normal(0, 1, (cells[1], cells[0])).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def _table(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw wood with boards and grain, woven cloth, or stone."""
    colour = np.array(_TABLES[rng.integers(len(_TABLES))], np.float32)
    kind = rng.integers(3)
    x, y = np.meshgrid(*[np.linspace(0, 1, size, dtype=np.float32)] * 2)
    if kind == 0:
        grain = soft_noise(rng, (4, 70), size) * 0.09 + soft_noise(rng, (3, 16), size) * 0.07
        boards = np.where(np.abs((y * 5 + rng.random()) % 1 - 0.5) > 0.485, -0.45, 0)
        level = 1 + grain + boards
    elif kind == 1:
        threads = rng.integers(30, 70)
        level = 1 + 0.06 * np.sin(2 * np.pi * threads * x) * np.sin(2 * np.pi * threads * y)
        checks = ((x * 6 % 1 < 0.5) ^ (y * 6 % 1 < 0.5)) if rng.random() < 0.4 else 0
        level = level - 0.25 * checks + 0.04 * soft_noise(rng, (6, 6), size)
    else:
        level = 1 + 0.06 * soft_noise(rng, (60, 60), size) + 0.1 * soft_noise(rng, (9, 9), size)
    rgb = np.clip(colour * level[..., None], 0, 255).astype(np.uint8)
    picture = Image.fromarray(rgb)
    return picture.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.5 else picture


def _plate(brush: Brush) -> float:
    """Draw a plate or bowl; return the radius of the part that food may lie on."""
    colour = _PLATES[brush.rng.integers(len(_PLATES))]
    bowl = brush.rng.random() < 0.5
    inside = PLATE * (0.88 if bowl else brush.rng.uniform(0.72, 0.82))
    for height in (0.16, 0.1, 0.05):
        brush.fill(ellipse(brush.away * height, 1.02 * PLATE), (15, 10, 8), 0.22)
    smooth = np.linspace(0, 2 * np.pi, 97)[:-1]
    circle = np.stack([np.cos(smooth), np.sin(smooth)], axis=1)
    brush.fill(circle * PLATE, shade(colour, 0.8))
    brush.fill(circle * PLATE * 0.985 - brush.away * 0.006, colour)
    if brush.rng.random() < 0.3:
        band = shade(colour, brush.rng.uniform(0.45, 0.8))
        brush.stroke(circle * PLATE * brush.rng.uniform(0.9, 0.96), 0.02, band)
    # The inside of the rim: the wall near the light lies in shade, the one far from it is lit.
    for k in range(6):
        share = inside + 0.05 * (1 - k / 5)
        brush.fill(circle * share, shade(colour, 0.72 + 0.045 * k if bowl else 0.86 + 0.025 * k))
    brush.fill(circle * inside * 0.97 + brush.away * 0.03, shade(colour, 1.02))
    return inside


def _ground(brush: Brush, ground: str, inside: float) -> None:
    choices = _GROUND_COLOURS[ground]
    colour = brush.vary(choices[brush.rng.integers(len(choices))], 0.12)
    if ground == "broth":
        brush.fill(ellipse((0, 0), inside * 0.97), shade(colour, 0.8))
        brush.fill(ellipse(-brush.away * 0.02, inside * 0.93), colour)
        for _ in range(26):  # drops of fat
            at = brush.rng.normal(0, 0.4 * inside, 2)
            if np.hypot(*at) < 0.85 * inside:
                drop = ellipse(at, brush.rng.uniform(0.015, 0.05))
                brush.fill(drop, shade(colour, 1.25), 0.45)
    elif ground == "sauce":
        brush.solid(brush.lump((0, 0), inside * 0.8, wobble=0.1), colour, 0.03, 0.12)
    else:
        for _ in range(7):
            at = brush.rng.normal(0, 0.35 * inside, 2)
            brush.fill(brush.lump(at, 0.1), colour, 0.5)


def _cutlery(brush: Brush) -> None:
    """Draw a knife, fork or spoon, or chopsticks, beside the plate."""
    side = brush.rng.choice([-1, 1]) * brush.rng.uniform(0.88, 1.1)
    angle = brush.angle() if brush.rng.random() < 0.2 else brush.rng.normal(0, 0.12)
    steel = brush.vary((196, 198, 204), 0.1)
    if brush.rng.random() < 0.3:
        for shift in (0.0, 0.09):
            ends = turn(np.array([[side + shift, -1.2], [side + shift * 0.4, 1.1]]), angle)
            brush.stroke(ends + brush.away * 0.03, 0.05, (15, 10, 8), 0.3)
            brush.stroke(ends, 0.05, brush.vary((120, 60, 40), 0.3))
        return
    handle = turn(np.array([[side, -0.7], [side, 0.4]]), angle)
    head = ellipse(turn(np.array([[side, 0.55]]), angle)[0], 0.1, 0.22, angle)
    for points, colour, alpha in ((brush.away * 0.04, (15, 10, 8), 0.35), (0.0, steel, 1.0)):
        brush.stroke(handle + points, 0.06, colour, alpha)
        brush.fill(head + points, colour, alpha)
    brush.stroke(handle - brush.away * 0.012, 0.014, (255, 255, 255), 0.7)
    brush.fill(head.mean(axis=0) + 0.5 * (head - head.mean(axis=0)), shade(steel, 0.8))


def _napkin(brush: Brush) -> None:
    at = turn(np.array([[brush.rng.uniform(0.8, 1.2), 0.0]]), brush.angle())[0]
    corners = np.array([[-0.5, -0.4], [0.5, -0.42], [0.52, 0.4], [-0.48, 0.42]])
    angle, tint = brush.angle(), brush.vary((214, 206, 196), 0.2)
    cloth = turn(corners, angle) + at
    brush.shadow(cloth, 0.05)
    brush.fill(cloth, tint)
    for share in (-0.4, -0.1, 0.25):
        fold = turn(np.array([[-0.45, share], [0.45, share + 0.1]]), angle) + at
        brush.stroke(fold, 0.02, shade(tint, 0.86))


def _glass(brush: Brush) -> None:
    at = turn(np.array([[brush.rng.uniform(1.0, 1.3), 0.0]]), brush.angle())[0]
    drink = brush.vary(((180, 120, 40), (200, 220, 225), (120, 20, 40))[brush.rng.integers(3)])
    r = brush.rng.uniform(0.22, 0.34)
    brush.fill(ellipse(at + brush.away * 0.2, r), (15, 10, 8), 0.3)
    brush.fill(ellipse(at, r), (235, 240, 242), 0.75)
    brush.fill(ellipse(at, r * 0.86), drink, 0.85)
    brush.fill(ellipse(at - brush.away * r * 0.45, r * 0.2), (255, 255, 255), 0.6)


def _second_plate(brush: Brush) -> None:
    """Draw another plate at the edge of the frame, with something on it."""
    at = turn(np.array([[brush.rng.uniform(1.25, 1.5), 0.0]]), brush.angle())[0]
    colour = _PLATES[brush.rng.integers(len(_PLATES))]
    r = brush.rng.uniform(0.45, 0.7)
    brush.fill(ellipse(at + brush.away * 0.1, r * 1.02), (15, 10, 8), 0.35)
    brush.fill(ellipse(at, r), shade(colour, 0.85))
    brush.fill(ellipse(at, r * 0.93), colour)
    names = tuple(FOODS)
    food = FOODS[names[brush.rng.integers(len(names))]]
    for _ in range(min(food.count[0], 12)):
        food.piece(brush, at + brush.rng.normal(0, 0.3 * r, 2))


def _crumbs(brush: Brush) -> None:
    for _ in range(20):
        at = brush.rng.uniform(-EXTENT, EXTENT, 2)
        brush.fill(brush.lump(at, brush.rng.uniform(0.01, 0.03)), brush.vary((170, 130, 80), 0.3))


_CLUTTER = (_cutlery, _cutlery, _napkin, _glass, _second_plate, _crumbs)


def _over(brush: Brush) -> None:
    """Draw something above the plate: a spoon or chopsticks reaching in, or drops of dark sauce."""
    if brush.rng.random() < 0.5:
        for _ in range(brush.rng.integers(6, 16)):
            at = brush.rng.normal(0, 0.4, 2)
            brush.fill(brush.lump(at, brush.rng.uniform(0.015, 0.06)), (70, 36, 20), 0.75)
        return
    angle = brush.angle()
    tip, end = brush.rng.uniform(0.1, 0.6), 2.4
    wood = brush.vary(((150, 90, 50), (200, 202, 208), (60, 30, 26))[brush.rng.integers(3)])
    for shift in (0.0, 0.1):
        path = turn(np.array([[tip, shift], [end, shift * 2.4]]), angle)
        brush.stroke(path + brush.away * 0.1, 0.06, (15, 10, 8), 0.3)
        brush.stroke(path, 0.06, wood)
        brush.stroke(path - brush.away * 0.015, 0.015, shade(wood, 1.4), 0.7)

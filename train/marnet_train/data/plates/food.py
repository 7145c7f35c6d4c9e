"""This module defines how each ingredient looks: one function per kind of piece, and a table from
names to kinds.

A function draws one piece at a place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from marnet_train.data.plates.brush import At, Brush, Colour, ellipse, shade, turn


@dataclass(frozen=True)
class Food:
    """This is an ingredient on a plate."""

    piece: Callable[[Brush, At], None]
    count: tuple[int, int]  # fewest and most pieces
    layer: int = 1  # 0: under everything, 2: on top
    spread: float = 0.3  # radius of a heap of it


def strand(colour: Colour, width: float, length: float, bend: float) -> Callable:
    """Return what draws noodles and sprouts: a curl with a dark rim and a light back."""

    def draw(brush: Brush, at: At) -> None:
        path, tint = brush.curl(at, length, bend), brush.vary(colour)
        brush.stroke(path + brush.away * 0.02, width * 1.3, (30, 18, 8), 0.25)
        brush.stroke(path, width * 1.25, shade(tint, 0.72))
        brush.stroke(path, width * 0.8, tint)
        brush.stroke(path - brush.away * width * 0.2, width * 0.3, shade(tint, 1.2), 0.7)

    return draw


def grain(colour: Colour, radius: float, stretch: float, gloss: float = 0.0) -> Callable:
    """Return what draws rice, corn, peas, beans and nuts."""

    def draw(brush: Brush, at: At) -> None:
        tint = brush.vary(colour)
        rx = radius * stretch * brush.rng.uniform(0.85, 1.15)
        points = ellipse(at, rx, radius, brush.angle())
        brush.fill(points + brush.away * radius * 0.6, (25, 15, 8), 0.3)
        brush.fill(points, shade(tint, 0.78))
        brush.fill(np.asarray(at) + 0.75 * (points - at) - brush.away * radius * 0.18, tint)
        if gloss:
            spot = ellipse(np.asarray(at) - brush.away * radius * 0.4, radius * 0.25)
            brush.fill(spot, (255, 255, 255), gloss)

    return draw


def leaf(colour: Colour, length: float, *, lobes: int, ruffle: float = 0.0) -> Callable:
    """Return what draws herbs with one or several lobes, and salad leaves with a ruffled edge."""

    def blade(brush: Brush, at: At, size: float, angle: float, tint: Colour) -> None:
        along = np.linspace(0, 1, 9)
        half = 0.36 * size * np.sin(np.pi * along**0.8)
        edge = half * (1 + ruffle * brush.rng.normal(0, 1, 9))
        upper = np.stack([along * size, edge], axis=1)
        lower = np.stack([along * size, -edge], axis=1)[::-1]
        points = turn(np.concatenate([upper, lower]), angle) + at
        brush.shadow(points, 0.03)
        brush.fill(points, shade(tint, 0.8))
        brush.fill(np.mean(points, axis=0) + 0.8 * (points - points.mean(axis=0)), tint)
        vein = turn(np.stack([along * size * 0.95, 0 * along], axis=1), angle) + at
        brush.stroke(vein, 0.008, shade(tint, 1.35), 0.8)
        if ruffle:
            for side in (-0.5, 0.5):
                rib = np.stack([along * size * 0.9, side * half], axis=1)
                brush.stroke(turn(rib, angle) + at, 0.006, shade(tint, 1.25), 0.6)

    def draw(brush: Brush, at: At) -> None:
        angle, tint = brush.angle(), brush.vary(colour, 0.18)
        size = length * brush.rng.uniform(0.75, 1.2)
        for k in range(lobes):
            blade(brush, at, size, angle + 0.75 * (k - (lobes - 1) / 2), tint)
        if lobes > 1:
            stem = np.array([at, np.asarray(at) - turn(np.array([[size, 0.0]]), angle)[0] * 0.8])
            brush.stroke(stem, 0.012, shade(tint, 1.1))

    return draw


def disc(skin: Colour, flesh: Colour, radius: float, inside: str = "") -> Callable:
    """Return what draws a round slice: a skin around flesh, with seeds, spokes, rings or a hole."""

    def draw(brush: Brush, at: At) -> None:
        r = radius * brush.rng.uniform(0.8, 1.15)
        squeeze, angle = brush.rng.uniform(0.6, 1.0), brush.angle()
        tint = brush.vary(flesh, 0.07)

        def ring(share: float):
            return ellipse(at, r * share, r * share * squeeze, angle)

        brush.shadow(ring(1), 0.035)
        brush.fill(ring(1), brush.vary(skin))
        brush.fill(ring(0.84), tint)
        _INSIDES[inside](brush, at, r, squeeze, angle, tint)
        brush.fill(ring(0.3) - brush.away * r * 0.35, (255, 255, 255), 0.22)

    return draw


def _seeds(brush: Brush, at: At, r: float, squeeze: float, angle: float, tint: Colour) -> None:
    for phase in np.arange(6) * np.pi / 3:
        place = np.array([np.cos(phase), np.sin(phase) * squeeze]) * r * 0.5
        seed = ellipse(turn(place[None], angle)[0] + at, r * 0.17, r * 0.09, phase + angle)
        brush.fill(seed, shade(tint, 1.3), 0.9)


def _spokes(brush: Brush, at: At, r: float, squeeze: float, angle: float, tint: Colour) -> None:
    for phase in np.arange(8) * np.pi / 4:
        tip = np.array([[np.cos(phase), np.sin(phase) * squeeze]]) * r * 0.8
        brush.stroke(np.array([at, turn(tip, angle)[0] + at]), 0.014, shade(tint, 1.25))


def _hole(brush: Brush, at: At, r: float, squeeze: float, angle: float, tint: Colour) -> None:
    brush.fill(ellipse(at, r * 0.42, r * 0.42 * squeeze, angle), shade(tint, 0.45))


def _rings(brush: Brush, at: At, r: float, squeeze: float, angle: float, tint: Colour) -> None:
    for share in (0.7, 0.45, 0.2):
        brush.fill(ellipse(at, r * share, r * share * squeeze, angle), shade(tint, 0.86))
        brush.fill(ellipse(at, r * (share - 0.1), r * (share - 0.1) * squeeze, angle), tint)


def _plain(brush: Brush, at: At, r: float, squeeze: float, angle: float, tint: Colour) -> None:
    brush.fill(ellipse(at, r * 0.4, r * 0.4 * squeeze, angle), shade(tint, 0.93))


_INSIDES = {"seeds": _seeds, "spokes": _spokes, "hole": _hole, "rings": _rings, "": _plain}


def chunk(colour: Colour, radius: float, stretch: float, *, stripes: Colour | None = None,
          wobble: float = 0.16, gloss: float = 0.25) -> Callable:  # fmt: skip
    """Return what draws meat, fish and potatoes.

    Each is an irregular piece, perhaps with stripes of fat or muscle.
    """

    def draw(brush: Brush, at: At) -> None:
        angle, tint = brush.angle(), brush.vary(colour, 0.14)
        size = radius * brush.rng.uniform(0.8, 1.2)
        points = brush.lump(at, size, wobble=wobble, stretch=stretch, angle=angle)
        brush.solid(points, tint, 0.05, gloss)
        if stripes is not None:
            for offset in np.linspace(-0.6, 0.6, 4):
                along = np.linspace(-0.75, 0.75, 6) * size * stretch * (1 - abs(offset) * 0.4)
                across = offset * size + 0.08 * size * np.sin(9 * along + offset)
                line = turn(np.stack([along, across], axis=1), angle) + at
                brush.stroke(line, 0.014, brush.vary(stripes), 0.65)
        for _ in range(4):
            place = np.asarray(at) + brush.rng.normal(0, 0.35 * size, 2)
            brush.fill(ellipse(place, 0.012), shade(tint, brush.rng.choice([0.75, 1.25])), 0.7)

    return draw


def cube(colour: Colour, side: float) -> Callable:
    """Return what draws tofu and cheese: a top face, and two sides turned away from the light."""

    def draw(brush: Brush, at: At) -> None:
        s, tint = side * brush.rng.uniform(0.75, 1.2), brush.vary(colour, 0.06)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * s / 2
        top = turn(corners, brush.angle()) + at
        depth = brush.away * s * 0.3
        brush.shadow(top + depth, 0.05)
        for k in range(4):
            wall = np.array([top[k], top[(k + 1) % 4], top[(k + 1) % 4] + depth, top[k] + depth])
            brush.fill(wall, shade(tint, 0.68 + 0.06 * k))
        brush.fill(top, tint)
        brush.fill(np.asarray(at) + 0.6 * (top - at), shade(tint, 1.06), 0.6)

    return draw


def stick(colour: Colour, length: float, width: float) -> Callable:
    """Return what draws carrot sticks, green beans and strips of pepper."""

    def draw(brush: Brush, at: At) -> None:
        path, tint = brush.curl(at, length * brush.rng.uniform(0.7, 1.2), 0.07), brush.vary(colour)
        brush.stroke(path + brush.away * 0.035, width * 1.1, (20, 12, 8), 0.35)
        brush.stroke(path, width, shade(tint, 0.75))
        brush.stroke(path - brush.away * width * 0.12, width * 0.66, tint)
        brush.stroke(path - brush.away * width * 0.25, width * 0.2, (255, 255, 255), 0.3)

    return draw


def crescent(outer: Colour, inner: Colour, radius: float, stripes: int = 0) -> Callable:
    """Return what draws shrimps and avocado.

    Each is part of a ring that tapers, with stripes across or a pale inside.
    """

    def draw(brush: Brush, at: At) -> None:
        r, angle = radius * brush.rng.uniform(0.85, 1.15), brush.angle()
        arc = np.linspace(0, 4.0 if stripes else 2.6, 14)
        middle = np.stack([np.cos(arc), np.sin(arc)], axis=1)
        half = 0.34 * np.sin(np.linspace(0.5, np.pi - 0.15, 14))[:, None]
        tint, pale = brush.vary(outer), brush.vary(inner, 0.05)

        def band(low: float, high: float):
            edges = [middle * (1 + high * half), (middle * (1 + low * half))[::-1]]
            return turn(np.concatenate(edges) * r, angle) + at

        brush.shadow(band(-1, 1), 0.045)
        brush.fill(band(-1, 1), shade(tint, 0.85))
        brush.fill(band(-0.9, 0.55), pale if not stripes else tint)
        for k in range(2, 2 + stripes):
            ends = np.stack([middle[k] * (1 - half[k]), middle[k] * (1 + half[k])]) * r
            brush.stroke(turn(ends, angle) + at, 0.018, pale, 0.85)
        brush.stroke(turn(middle * r * 1.12, angle) + at, 0.014, (255, 255, 255), 0.25)

    return draw


def egg(brush: Brush, at: At) -> None:
    """Draw half a boiled egg."""
    angle = brush.angle()
    white = ellipse(at, 0.2, 0.155, angle)
    brush.solid(white, brush.vary((246, 242, 232), 0.04), 0.05, 0)
    yolk = np.asarray(at) + turn(np.array([[0.03, 0.0]]), angle)[0]
    tint = brush.vary((240, 165, 40), 0.12)
    brush.fill(ellipse(yolk, 0.098), shade(tint, 0.85))
    brush.fill(ellipse(yolk, 0.085), tint)
    brush.fill(ellipse(yolk - brush.away * 0.04, 0.025), (255, 255, 255), 0.5)


def mushroom(brush: Brush, at: At) -> None:
    """Draw a slice through cap and stem."""
    angle, tint = brush.angle(), brush.vary((205, 182, 150), 0.1)
    arc = np.linspace(0, np.pi, 10)
    cap = np.stack([0.14 * np.cos(arc), 0.11 * np.sin(arc)], axis=1)
    stem = np.array([[-0.04, 0.0], [-0.05, -0.1], [0.05, -0.1], [0.04, 0.0]])
    outline = turn(np.concatenate([cap, stem]), angle) + at
    brush.shadow(outline, 0.035)
    brush.fill(outline, shade(tint, 0.55))
    brush.fill(outline.mean(axis=0) + 0.82 * (outline - outline.mean(axis=0)), tint)
    gills = turn(np.stack([0.09 * np.cos(arc), 0.03 + 0.03 * np.sin(arc)], axis=1), angle) + at
    brush.stroke(gills, 0.02, shade(tint, 0.6))


def lemon(brush: Brush, at: At) -> None:
    """Draw a wedge: rind, pith and segments, yellow or green."""
    green = brush.rng.random() < 0.4
    rind, flesh = ((110, 150, 40), (200, 215, 120)) if green else ((240, 200, 40), (250, 225, 110))
    angle, r = brush.angle(), 0.19 * brush.rng.uniform(0.85, 1.1)
    arc = np.linspace(0, np.pi, 12)
    half = np.stack([np.cos(arc), np.sin(arc)], axis=1) * r
    for share, colour in ((1.0, rind), (0.9, (248, 244, 220)), (0.8, flesh)):
        points = turn(half * share, angle) + at
        if share == 1.0:
            brush.shadow(points, 0.06)
        brush.fill(points, colour)
    for k in (2, 4, 6, 8, 10):
        brush.stroke(np.array([at, turn(half[k : k + 1] * 0.8, angle)[0] + at]), 0.012,
                     (250, 246, 225), 0.8)  # fmt: skip


def seaweed(brush: Brush, at: At) -> None:
    """Draw a sheet of nori."""
    corners = np.array([[-0.16, -0.11], [0.16, -0.12], [0.17, 0.11], [-0.15, 0.12]])
    sheet = turn(corners * brush.rng.uniform(0.8, 1.2), brush.angle()) + at
    tint = brush.vary((32, 48, 34), 0.2)
    brush.shadow(sheet, 0.04)
    brush.fill(sheet, tint)
    for _ in range(8):
        place = sheet.mean(axis=0) + brush.rng.normal(0, 0.06, 2)
        brush.fill(ellipse(place, 0.02, 0.008, brush.angle()), shade(tint, 1.6), 0.5)


FOODS: dict[str, Food] = {
    "avocado": Food(crescent((70, 105, 45), (196, 205, 120), 0.16), (4, 7), spread=0.22),
    "bacon": Food(chunk((150, 62, 48), 0.055, 2.6, stripes=(232, 190, 165)), (6, 11)),
    "basil": Food(leaf((62, 120, 45), 0.22, lobes=1), (4, 8), 2, 0.5),
    "beans": Food(grain((95, 42, 36), 0.042, 1.5, 0.5), (18, 34)),
    "bean sprouts": Food(strand((236, 232, 214), 0.026, 0.4, 0.16), (14, 26), 2, 0.3),
    "beef": Food(chunk((118, 74, 58), 0.13, 1.5, stripes=(150, 105, 88)), (5, 9)),
    "carrot": Food(stick((232, 122, 34), 0.26, 0.05), (9, 18)),
    "cheese": Food(cube((246, 232, 190), 0.13), (7, 13), 2, 0.45),
    "chicken": Food(chunk((224, 186, 130), 0.12, 1.4, stripes=(190, 140, 82)), (5, 9)),
    "chilli": Food(disc((200, 28, 24), (226, 70, 50), 0.052, "hole"), (5, 12), 2, 0.6),
    "coriander": Food(leaf((74, 138, 52), 0.11, lobes=3), (6, 14), 2, 0.6),
    "corn": Food(grain((246, 204, 62), 0.034, 1.25, 0.5), (28, 50)),
    "cucumber": Food(disc((58, 108, 50), (200, 224, 160), 0.14, "seeds"), (5, 9)),
    "egg": Food(egg, (1, 3), 2, 0.45),
    "green beans": Food(stick((92, 142, 58), 0.4, 0.042), (8, 15)),
    "lemon": Food(lemon, (1, 3), 2, 0.7),
    "lettuce": Food(leaf((138, 178, 76), 0.52, lobes=1, ruffle=0.22), (12, 18), 0, 0.8),
    "mint": Food(leaf((52, 128, 78), 0.15, lobes=2), (4, 9), 2, 0.5),
    "mushroom": Food(mushroom, (5, 9)),
    "noodles": Food(strand((235, 214, 160), 0.036, 1.25, 0.32), (46, 64), 0, 0.75),
    "olives": Food(disc((46, 36, 52), (72, 58, 76), 0.07, "hole"), (6, 12), 2, 0.6),
    "onion": Food(disc((160, 90, 138), (232, 214, 224), 0.13, "rings"), (4, 8)),
    "peanuts": Food(grain((206, 164, 104), 0.03, 1.5), (14, 28), 2, 0.5),
    "peas": Food(grain((110, 168, 62), 0.042, 1.0, 0.5), (18, 36)),
    "pepper": Food(stick((206, 48, 36), 0.32, 0.06), (6, 11)),
    "pork": Food(chunk((204, 150, 126), 0.14, 1.35, stripes=(240, 216, 196)), (4, 7)),
    "potato": Food(chunk((232, 202, 118), 0.12, 1.2, wobble=0.1), (5, 9)),
    "radish": Food(disc((205, 50, 92), (248, 240, 242), 0.1, ""), (5, 10)),
    "rice": Food(grain((244, 240, 228), 0.022, 2.4), (170, 230), 0, 0.7),
    "salmon": Food(chunk((240, 132, 88), 0.12, 1.3, stripes=(250, 196, 164)), (4, 8)),
    "seaweed": Food(seaweed, (1, 3), 1, 0.5),
    "shrimp": Food(crescent((236, 128, 88), (252, 212, 188), 0.13, 9), (4, 7), 2, 0.4),
    "spinach": Food(leaf((44, 92, 44), 0.2, lobes=1, ruffle=0.12), (9, 16)),
    "spring onion": Food(disc((96, 158, 66), (206, 228, 160), 0.046, "hole"), (10, 22), 2, 0.7),
    "tofu": Food(cube((238, 224, 192), 0.16), (5, 9)),
    "tomato": Food(disc((196, 40, 30), (226, 84, 60), 0.15, "seeds"), (4, 8)),
}

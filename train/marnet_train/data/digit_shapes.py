"""This module measures what can be measured in one 8x8 picture of a pen stroke, by small pure
functions.

Every picture is [8, 8], rows downwards, ink from 0 (paper) to 16 (full), as scikit-learn has it.
The numbers here know nothing of which digit it is; `digit_words` turns them into English.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float64]  # [8, 8], 0..16

SIZE = 8
FULL = 16.0
MIDDLE = (SIZE - 1) / 2  # 3.5: row or column between the two halves
SIDES = ("top", "bottom", "left", "right")


@dataclass(frozen=True)
class Loop:
    """This is a patch of paper with ink all round."""

    row: float  # of its centre, 0 top .. 7 bottom
    pixels: int


@dataclass(frozen=True)
class Shape:
    """These are all measurements of one picture."""

    mass: float  # ink, in full pixels: 0..64
    slant: float  # columns to the right per row upwards; 0 is upright
    aspect: float  # spread across over spread along: below 1 is taller than wide
    balance: tuple[float, float]  # centre of the ink less centre of the picture: (right, down)
    loops: tuple[Loop, ...]  # top first
    openings: tuple[str, ...]  # "upper left", "lower left", "upper right", "lower right", "top"
    bars: tuple[str, ...]  # bands crossed by a long level stroke: "top", "middle", "base"


def measure(picture: Picture) -> Shape:
    """Measure a picture that has ink. [8, 8] -> Shape."""
    x, y, xx, yy, xy = moments(picture)
    return Shape(
        mass=float(picture.sum() / FULL),
        slant=-xy / yy,  # rows run downwards, a slant is told upwards
        aspect=(xx / yy) ** 0.5,
        balance=(x - MIDDLE, y - MIDDLE),
        loops=find_loops(picture),
        openings=find_openings(picture),
        bars=find_bars(picture),
    )


def moments(picture: Picture) -> tuple[float, float, float, float, float]:
    """Compute centre (x, y) and second moments (xx, yy, xy) about it, weighted with the ink.

    xy / yy is the slope of the regression line of x on y: how far a stroke shifts sideways per row.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE]
    weight = picture / picture.sum()
    x, y = float((weight * columns).sum()), float((weight * rows).sum())
    dx, dy = columns - x, rows - y
    own = 1 / 12  # second moment of one pixel about its centre; keeps yy above zero
    xx, yy = float((weight * dx * dx).sum()) + own, float((weight * dy * dy).sum()) + own
    return x, y, xx, yy, float((weight * dx * dy).sum())


def puddles(picture: Picture) -> Picture:
    """Find how deep water stays if ink is height and water runs off the edge. [8, 8] -> same.

    Deep water is a closed loop. Unlike a threshold, it finds the loop of a faint stroke as well as
    that of a bold one. Water runs up, down, left and right; ink holds it across corners.
    """
    level = np.pad(np.full_like(picture, FULL), 1)  # the rim, outside of the picture, is drained
    while True:
        neighbours = (level[:-2, 1:-1], level[2:, 1:-1], level[1:-1, :-2], level[1:-1, 2:])
        lowest = np.minimum(level[1:-1, 1:-1], np.minimum.reduce(neighbours))
        sunk = np.maximum(picture, lowest)
        if np.array_equal(sunk, level[1:-1, 1:-1]):
            return sunk - picture
        level[1:-1, 1:-1] = sunk


def find_loops(picture: Picture) -> tuple[Loop, ...]:
    """Find closed loops, top first: connected water of at least a quarter of full ink in depth."""
    from scipy import ndimage  # comes with scikit-learn, whose absence is reported in `digits`

    deep = puddles(picture) >= FULL / 4
    labels, count = cast("tuple[NDArray[np.int32], int]", ndimage.label(deep))
    patches = [np.nonzero(labels == number) for number in range(1, count + 1)]
    loops = [Loop(float(rows.mean()), len(rows)) for rows, _ in patches]
    return tuple(sorted(loops, key=lambda loop: loop.row))


def seen_towards(picture: Picture, side: str) -> Picture:
    """Find the darkest ink between each pixel, itself left out, and one side. [8, 8] -> [8, 8]."""
    turns = {"left": 0, "top": 1, "right": 2, "bottom": 3}[side]
    turned = np.rot90(picture, turns)  # that side is now at the left
    darkest = np.maximum.accumulate(turned, axis=1)
    before = np.pad(darkest[:, :-1], ((0, 0), (1, 0)))
    return np.rot90(before, -turns)


def bay(picture: Picture, side: str) -> Picture:
    """Measure how clearly each pixel lies in a bay that opens to one side. [8, 8] -> [8, 8], 0..16.

    From inside a bay one sees ink in the three other directions and none in this one: the fainter
    of those three, less the darkest ink on the way out.
    """
    walls = [seen_towards(picture, other) for other in SIDES if other != side]
    mouth = np.maximum(seen_towards(picture, side), picture)
    return np.maximum(np.minimum.reduce(walls) - mouth, 0.0)


def find_openings(picture: Picture) -> tuple[str, ...]:
    """Find bays that open to the left and right, each in the upper and lower half, and to the top.

    No digit opens downwards. A bay counts from half a full pixel, in pixels that are clear by 6.
    """
    found = []
    for side in ("left", "right", "top"):
        depth = bay(picture, side)
        depth = np.where(depth >= 6, depth, 0.0)
        halves = {f"upper {side}": depth[: SIZE // 2], f"lower {side}": depth[SIZE // 2 :]}
        places = {"top": depth} if side == "top" else halves
        found += [place for place, part in places.items() if part.sum() >= FULL / 2]
    return tuple(found)


def find_bars(picture: Picture) -> tuple[str, ...]:
    """Find bands with a level stroke: at least 5 pixels in a row, each of half ink or more."""
    bands = {"top": picture[:2], "middle": picture[2:6], "base": picture[6:]}
    return tuple(name for name, band in bands.items() if max(map(_longest_run, band)) >= 5)


def _longest_run(row: NDArray[np.float64]) -> int:
    marks = "".join("#" if ink >= FULL / 2 else " " for ink in row)
    return max((len(run) for run in marks.split()), default=0)

"""A short English description of a handwritten digit that never says which digit it is.

The description is what someone would say who sees the picture: an outline, which depends on the
digit and on how this writer drew it (was the loop closed?), and details, which are measured.
No digit's name or numeral occurs in any text, so "a pair of loops" and not "two loops".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from marnet_train.data.digit_shapes import MIDDLE, Picture, Shape, measure


@dataclass(frozen=True)
class Outline:
    """This is one way to draw a digit: its phrases, and the test of whether it was so drawn."""

    fits: Callable[[Shape], bool]
    phrases: tuple[str, ...]


def _loops(count: int) -> Callable[[Shape], bool]:
    return lambda shape: len(shape.loops) >= count


def _low_loop(shape: Shape) -> bool:
    return any(loop.row > MIDDLE for loop in shape.loops)


def _bar(band: str) -> Callable[[Shape], bool]:
    return lambda shape: band in shape.bars


def _open(place: str) -> Callable[[Shape], bool]:
    return lambda shape: place in shape.openings


def _otherwise(_: Shape) -> bool:
    return True


# Per digit, the first outline that fits is used; the last one always fits. Phrases are shared
# between digits where the strokes are the same, since words should describe, not encode.
OUTLINES: dict[int, tuple[Outline, ...]] = {
    0: (
        Outline(_loops(1), ("a closed oval", "a closed ring", "a single round loop")),
        Outline(_otherwise, ("an oval not quite closed", "a ring with little room inside")),
    ),
    1: (
        # A stem alone has no bay: flag above and foot below are what makes one.
        Outline(_open("lower left"), ("a stem with a flag and a foot", "a beak, a stem, a foot")),
        Outline(_bar("base"), ("a plain stem on a foot", "a single downstroke with a flat foot")),
        Outline(_otherwise, ("a plain stem", "a single downstroke", "a straight stem, no curves")),
    ),
    2: (
        Outline(
            _low_loop,
            ("a hook above, a loop in the corner below", "a curve that loops before its foot"),
        ),
        Outline(
            _otherwise,
            ("a hook sweeping down to a foot", "a curve down to a flat foot", "an arch and a foot"),
        ),
    ),
    3: (
        Outline(_loops(1), ("a pair of bowls, curled in", "stacked curves, nearly a loop")),
        Outline(
            _otherwise,
            ("a pair of bowls on the right", "stacked curves", "an arch above a round belly"),
        ),
    ),
    4: (
        Outline(_loops(1), ("a closed corner on a stem", "a raised arm, closed against a stem")),
        Outline(_open("top"), ("an open fork on a stem", "a raised arm and a stem, apart above")),
        Outline(_otherwise, ("a raised arm meeting a stem", "an arm, a crossing stroke, a stem")),
    ),
    5: (
        Outline(_bar("top"), ("a flat cap above a round belly", "a cap, a short drop, a bowl")),
        Outline(
            _otherwise,
            ("a short drop into a round belly", "a short cap above a bowl", "stacked curves"),
        ),
    ),
    6: (
        Outline(
            _loops(1),
            ("a long curve into a low loop", "a tail above a round loop", "a loop hung on a curve"),
        ),
        Outline(_otherwise, ("a long curve, curled up below", "a tail above a curl, not closed")),
    ),
    7: (
        Outline(
            _bar("middle"),
            ("a cap and a long stem, crossed halfway", "a crossed stem under a cap"),
        ),
        Outline(_bar("top"), ("a flat cap and a long stem", "a level cap, then a falling stroke")),
        Outline(
            _otherwise,
            ("a hook and a long stem", "a short cap, then a falling stroke", "a beak and a stem"),
        ),
    ),
    8: (
        Outline(_loops(2), ("a pair of stacked loops", "a loop upon a loop")),
        Outline(_loops(1), ("crossed curves with a loop", "stacked curves, not all closed")),
        Outline(_otherwise, ("crossed curves, the loops filled in", "stacked curves")),
    ),
    9: (
        Outline(
            _loops(1),
            ("a loop above a tail", "a round head on a stem", "a loop hung on a curve"),
        ),
        Outline(_otherwise, ("a curled head on a stem", "a hook and a curve", "a hook and a tail")),
    ),
}

# (largest value it is said for, ways to say it). The limits cut the 1,797 digits into groups of
# about equal size, except that the outer groups of slant and place are left for clear cases.
_SLANT = (
    (-0.15, ("slanted left", "leaning back")),
    (-0.05, ("slightly slanted left", "leaning back a little")),
    (0.05, ("upright", "not slanted")),
    (0.12, ("slightly slanted right", "leaning forward a little")),
    (float("inf"), ("slanted right", "leaning forward")),
)
_WEIGHT = (
    (18.0, ("thin stroke", "light stroke")),
    (21.0, ("even stroke", "medium stroke")),
    (float("inf"), ("bold stroke", "heavy stroke")),
)
_WIDTH = (
    (0.55, ("narrow", "slim")),
    (0.65, ("of medium width",)),
    (float("inf"), ("wide", "broad")),
)
_DOWN = ((-0.5, ("most ink above",)), (0.5, ()), (float("inf"), ("most ink below",)))
_RIGHT = ((-0.35, ("weight on the left",)), (0.35, ()), (float("inf"), ("weight on the right",)))
_BARS = {"top": "flat at the top", "middle": "a bar across the middle", "base": "flat at the base"}


def describe(digit: int, picture: Picture, rng: random.Random) -> str:
    """Describe a picture in one line of text, without the digit's name.

    Args:
        digit: 0..9, chooses the outline.
        picture: [8, 8], ink 0..16, decides every fact in the text.
        rng: chooses only among ways to say the same, and how much of it is said.
    """
    shape = measure(picture)
    outline = next(choice for choice in OUTLINES[digit] if choice.fits(shape))
    manner = [
        _grade(shape.slant, _SLANT, rng),
        _grade(shape.mass, _WEIGHT, rng),
        _grade(shape.aspect, _WIDTH, rng),
    ]
    extras = [
        openings(shape),
        loop_detail(shape),
        *(_BARS[bar] for bar in shape.bars),
        _grade(shape.balance[1], _DOWN, rng),
        _grade(shape.balance[0], _RIGHT, rng),
    ]
    known = [extra for extra in extras if extra]
    said = set(rng.sample(known, min(len(known), rng.randint(1, 3))))
    rng.shuffle(manner)
    kept = [extra for extra in known if extra in said]  # in their usual order
    return _sentence(rng.choice(outline.phrases), manner, kept, rng)


def _grade(
    value: float, grades: tuple[tuple[float, tuple[str, ...]], ...], rng: random.Random
) -> str:
    """Choose words of the first grade that `value` does not exceed; "" for one not worth saying."""
    words = next(words for limit, words in grades if value <= limit)
    return rng.choice(words) if words else ""


def openings(shape: Shape) -> str:
    """Write words like "open on the left and at the upper right"; "" where nothing is open."""
    places = []
    for side in ("left", "right"):
        corners = [place for place in shape.openings if place.endswith(side)]
        if corners:
            places.append(f"on the {side}" if len(corners) == 2 else f"at the {corners[0]}")
    if places == ["on the left", "on the right"]:
        places = ["on both sides"]
    if "top" in shape.openings:
        places.append("at the top")
    return f"open {' and '.join(places)}" if places else ""


def loop_detail(shape: Shape) -> str:
    """Say where a single loop sits and how large it is; "" for none or several."""
    if len(shape.loops) != 1:
        return ""
    loop = shape.loops[0]
    size = "small" if loop.pixels <= 2 else "roomy" if loop.pixels >= 8 else "fair"
    above = MIDDLE - loop.row
    place = "high" if above > 0.75 else "low" if above < -0.75 else "centred"
    return f"{size} {place} loop"


def _sentence(outline: str, manner: list[str], extras: list[str], rng: random.Random) -> str:
    """Put the parts together in one of the orders a person might use."""
    style = rng.randrange(3)
    if style == 0:
        return ", ".join([outline, *manner, *extras])
    if style == 1:
        return f"{manner[0]}, {manner[1]}: " + ", ".join([outline, *extras, manner[2]])
    return f"{', '.join([outline, *extras])}; {', '.join(manner)}"

"""What a classifier answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One class and its probability."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the most probable class, and the `top` few, best first."""

    label: str
    index: int
    score: float
    top: tuple[Score, ...]

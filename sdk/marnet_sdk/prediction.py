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
    """The answer for one image: the most probable class, and the `top` few, best first.

    With several noise samples, probabilities are means over them, and the spread tells how much of
    the answer is owed to the noise.
    """

    label: str
    index: int
    score: float
    top: tuple[Score, ...]
    samples: int = 1  # noise samples that it is the mean of
    vote_share: float = 1.0  # share of the samples whose own best class this is
    standard_error: float | None = None  # of `score`; None for a single sample
    abstain: bool | None = (
        None  # not to be relied on; None where the bundle has no threshold for it
    )

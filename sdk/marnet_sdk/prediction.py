"""The answers of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from marnet_sdk.uncertainty import Answers


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
    operating_point: str | None = None  # of the bundle, at which it was found


def predictions(
    answers: Answers,
    labels: tuple[str, ...],
    top_k: int | Sequence[int],
    threshold: float | None,
    operating_point: str,
) -> list[Prediction]:
    """Name what was found for each image.

    Args:
        top_k: how many classes `Prediction.top` holds, of all answers or of each.
        threshold: the score below which an answer abstains; None: it does not say.
        operating_point: at which they were found.
    """
    order = np.argsort(-answers.probabilities, axis=1, kind="stable")
    counts = np.broadcast_to(top_k, len(order))
    out = []
    for i, (row, best) in enumerate(zip(answers.probabilities, order, strict=True)):
        top = tuple(Score(labels[k], int(k), float(row[k])) for k in best[: counts[i]])
        error = float(answers.standard_error[i])
        out.append(
            Prediction(
                *(top[0].label, top[0].index, top[0].score, top),
                samples=int(answers.samples[i]),
                vote_share=float(answers.vote_share[i]),
                standard_error=None if np.isnan(error) else error,
                abstain=None if threshold is None else top[0].score < threshold,
                operating_point=operating_point,
            )
        )
    return out

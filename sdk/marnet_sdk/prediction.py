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
class Provenance:
    """All that an answer was made from, and with: enough to derive it again.

    Digests are SHA-256, in hexadecimal.
    """

    image: str | None  # of the file's bytes; None where the image came as an array or a PIL image
    pixels: str  # of what the model saw: float32 [3, H, W], little-endian
    bundle: str  # of the bundle's manifest, which holds the digests of all of its files
    preprocessing: str  # of the manifest's preprocessing
    backend: str
    precision: str  # that the export was asked for
    compute: str  # type of the products that are not int8
    device: str
    loop: str  # what ran the reverse loop
    operating_point: str
    samples: int  # noise samples that the image could draw
    stop: str | None  # the rule that may end the draws early
    seed: int  # of the noise
    threads: int | None  # of the processor, that a call computed with; None on a GPU
    batch: int  # images that went through the model together, which sums may be rounded by
    row: int  # the place of this one among them, from 0 on
    processor: str
    packages: dict[str, str]  # name -> version
    fast_decode: bool = False  # JPEG files may have been decoded at a smaller scale


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
    provenance: Provenance | None = None  # what made it, where that was asked for


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

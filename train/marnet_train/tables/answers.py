"""One row of a table: which images a way to classify gets right, and how sure it is.

Axes: N images, C classes, K noise samples, R training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from marnet_train.evaluate import measure
from marnet_train.measures import (
    accuracy_at_coverage,
    expected_calibration_error,
    risk_coverage,
)

Row = dict[str, Any]  # JSON data: see `row_of`


def row_of(answers: Sequence[Tensor], labels: Tensor, votes: NDArray | None = None) -> Row:
    """Make the row of one way to classify, as JSON data.

    Args:
        answers: probabilities [N, C] for every answer that noise gives; one without noise.
        labels: true classes, [N].
        votes: share of the noise samples that vote for the first answer, [N].

    Returns:
        The number of images; top1, top5, ece, risk_coverage, at_80 and log_loss, means over the
        answers; and, for each answer, which images it has right, as hexadecimal digits.
    """
    true, right, figures = labels.cpu().numpy(), [], []
    for probabilities in answers:
        seen = measure(probabilities.cpu(), labels.cpu())
        p = probabilities.double().cpu().numpy()
        p /= p.sum(axis=1, keepdims=True)
        correct, sure = p.argmax(axis=1) == true, p.max(axis=1)
        right.append(correct)
        figures.append(
            {
                "top1": float(correct.mean()),
                "top5": seen.top5,
                "ece": expected_calibration_error(p, true),
                "risk_coverage": risk_coverage(sure, correct),
                "at_80": accuracy_at_coverage(sure, correct),
                "log_loss": float(-np.log(p[np.arange(len(p)), true] + 1e-12).mean()),
            }
        )
    row: Row = {
        "images": len(true),
        "right": [np.packbits(r).tobytes().hex() for r in right],
        **{name: float(np.mean([f[name] for f in figures])) for name in figures[0]},
    }
    if votes is not None:
        row["risk_coverage_by_votes"] = risk_coverage(votes, right[0])
        row["at_80_by_votes"] = accuracy_at_coverage(votes, right[0])
    return row


def right_answers(runs: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """Return the share of a row's answers that are right, of each image, [R, N].

    Args:
        runs: one for each seed, with `rows`.
    """
    images = runs[0]["rows"][name]["images"]
    return np.stack(
        [
            np.mean(
                [
                    np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=images)
                    for bits in run["rows"][name]["right"]
                ],
                axis=0,
            )
            for run in runs
        ]
    )

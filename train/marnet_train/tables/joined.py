"""Rows of several training seeds joined: means, intervals, and paired tests on the same images.

Axes: R training seeds, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marnet_train.measures import paired_difference, student_interval
from marnet_train.tables.answers import right_answers
from marnet_train.tables.written import ALIGNED, INSTEAD

Run = Mapping[str, Any]  # one seed: "seed", and "rows" by name
BRANCHES = ("alignment", "+MLP", "refined", "MARNet")
PAIRS = (  # a minus b on the same images
    ("MARNet", "alignment"),
    ("MARNet", "+MLP"),
    ("MARNet", "fusion with +MLP"),
    ("MARNet", "CE alone, fused"),
    ("refined", "alignment"),
    ("refined", "+MLP"),
    ("+MLP", "CE alone"),
    ("+CDR on the baseline", "+MLP on the baseline"),
    ("semantic learner", "progressive: semantic learner"),
    ("semantic learner", "carry: semantic learner"),
    ("+MLP on the baseline", "CE alone, on the baseline"),
    *((row, f"{kind}: {row}") for kind in (*INSTEAD, *ALIGNED) for row in BRANCHES),
)


def summarise(runs: Sequence[Run], against: str = "baseline") -> dict[str, dict[str, Any]]:
    """Return, for every row, its figures over the seeds that have it, and against the baseline.

    A row of damaged images is compared with the baseline on the same damaged images.
    """
    out = {}
    for name in dict.fromkeys(name for run in runs for name in run["rows"]):
        having = [run for run in runs if name in run["rows"]]
        place = name.rpartition(": ")[0]
        peer = f"{place}: {against}" if f"{place}: {against}" in having[0]["rows"] else against
        rows = [run["rows"][name] for run in having]
        top1 = [row["top1"] for row in rows]
        out[name] = {
            **{
                figure: float(np.mean([row[figure] for row in rows]))
                for figure in rows[0]
                if figure not in ("right", "images")
            },
            "seeds": [run["seed"] for run in having],
            "top1_by_seed": top1,
            "top1_interval": student_interval(top1),
        }
        if all(peer in run["rows"] for run in having):
            seen = _difference(having, name, peer)
            out[name] |= {"minus_baseline": seen.pop("mean"), **seen}
    return out


def compare(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Map "a - b" of `PAIRS` to the paired difference of two rows over the seeds that have both."""
    out = {}
    for a, b in PAIRS:
        having = [run for run in runs if a in run["rows"] and b in run["rows"]]
        if having:
            seeds = [run["seed"] for run in having]
            out[f"{a} - {b}"] = {"seeds": seeds, **_difference(having, a, b)}
    return out


def _difference(runs: Sequence[Run], a: str, b: str) -> dict[str, Any]:
    seen = paired_difference(right_answers(runs, a), right_answers(runs, b))
    bounds = {"interval": seen.interval, "interval_over_seeds": seen.over_runs}
    return {"mean": seen.mean, **bounds, "p": seen.p}


def average(
    found: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> dict[str, dict[str, Any]]:
    """Average figures over seeds: name -> figure -> mean and Student's 95 % interval.

    A figure that is None for a seed, because it has no meaning there, is left out.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for of_seed in found for name in of_seed):
        having = [of_seed[name] for of_seed in found if name in of_seed]
        out[name] = {}
        for figure in having[0]:
            numbers = [value for row in having if (value := row[figure]) is not None]
            if numbers:
                mean = float(np.mean(numbers))
                out[name][figure] = {"mean": mean, "interval": student_interval(numbers)}
    return out

"""This module writes what a training says at its end and in its model card: accuracies, and what
bought them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marnet_train.evaluate import Measured
from marnet_train.measures import paired_difference
from marnet_train.recipe import METHODS
from marnet_train.tables.written import Table

BRANCHES = {
    "baseline": "image-only baseline",
    "alignment": "alignment branch",
    "semantic": "semantic learner",
    "mlp": "+MLP, one pass",
    "refined": "refined branch",
    "marnet": "MARNet",  # or whatever the method is called: see `_titles`
}
PAIRS = (
    ("alignment", "baseline"),
    ("mlp", "alignment"),
    ("refined", "mlp"),
    ("marnet", "alignment"),
    ("marnet", "baseline"),
)


def differences(found: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Compare branches on the same images: paired differences of top-1, with 95 % intervals."""
    rows = {}
    for pair in PAIRS:
        one, other = (found[name].correct.cpu().numpy()[None] for name in pair)
        seen = paired_difference(one, other)
        low, high = seen.interval
        rows[" - ".join(pair)] = {"mean": seen.mean, "low": low, "high": high}
    return rows


def _titles(training: dict[str, Any]) -> dict[str, str]:
    """Say how the branches of a training are called."""
    return BRANCHES | {"marnet": METHODS[training["settings"]["method"]]}


def accuracy_table(
    training: dict[str, Any], split: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make the columns and rows of one split: model, top-1 with one noise sample, with the K that
    serve, and top-5; there is one column of top-1 where K is 1."""
    metrics = training["metrics"]
    samples = metrics["marnet"][split]["samples"]
    rows = []
    for branch, title in _titles(training).items():
        if branch not in metrics:  # of another method
            continue
        seen = metrics[branch][split]
        one = f"{seen['top1_one_sample']:.2%}" if seen["samples"] else ""
        served = (one,) if samples > 1 else ()
        rows.append((title, *served, f"{seen['top1']:.2%}", f"{seen['top5']:.2%}"))
    served = ("top-1, K = 1", f"top-1, K = {samples}") if samples > 1 else ("top-1",)
    return ("model", *served, "top-5"), rows


def difference_rows(training: dict[str, Any], split: str) -> list[tuple[str, str, str]]:
    """Make the rows (pair, difference in points, its interval) of one split."""
    rows = []
    for pair, seen in training["differences"][split].items():
        one, other = (_titles(training)[name] for name in pair.split(" - "))
        rows.append((f"{one} - {other}", _points(seen["mean"]), _interval(seen)))
    return rows


def training_tables(training: dict[str, Any], split: str) -> tuple[Table, Table]:
    """Make the tables of one split: how accurate every branch is, and differences between them."""
    name = {"val": "validation"}.get(split, split)
    title = f"{name}: {training['data']['images'][split]} images"
    columns = ("the same images", "points", "95 % interval")
    return (
        Table(title, *accuracy_table(training, split)),
        Table("differences", columns, difference_rows(training, split)),
    )


def verdicts(training: dict[str, Any], split: str) -> tuple[str, str]:
    """Say in two sentences what the text bought, and what the diffusion bought, on this split."""
    seen = training["differences"][split]
    images = training["data"]["images"][split]
    where = f"on {images} {split} images"
    text = _verdict("the alignment branch", "the image-only baseline", seen["alignment - baseline"])
    diffusion = _verdict(
        _titles(training)["marnet"], "its alignment branch alone", seen["marnet - alignment"]
    )
    against = seen["refined - mlp"]
    kind = training["settings"]["semantics"]
    target = "text" if kind == "text" else f'the control "{kind}" in place of text'
    return (
        f"What {target} bought {where}: {text}.",
        f"What the diffusion bought {where}: {diffusion}; its refined branch against one pass of "
        f"the same network: {_points(against['mean'])} points ({_interval(against)}).",
    )


def test_line(training: dict[str, Any]) -> str:
    """Say how accurate the models are on test images, which chose nothing."""
    metrics, titles = training["metrics"], _titles(training)
    parts = [f"{titles[b]} {metrics[b]['test']['top1']:.2%}" for b in ("baseline", "marnet")]
    seen = training["differences"]["test"]["marnet - baseline"]
    return (
        f"On {training['data']['images']['test']} test images, which chose nothing: "
        f"{', '.join(parts)}; difference {_points(seen['mean'])} points ({_interval(seen)})."
    )


def _verdict(one: str, other: str, seen: dict[str, float]) -> str:
    if seen["low"] > 0:
        shown = "so it is shown to help"
    elif seen["high"] < 0:
        shown = "so it is shown to harm"
    else:
        shown = "so no difference is shown"
    return (
        f"{one} has {_points(seen['mean'])} points against {other} "
        f"(95 % interval {_interval(seen)}), {shown}"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(seen: dict[str, float]) -> str:
    return f"{_points(seen['low'])} to {_points(seen['high'])}"

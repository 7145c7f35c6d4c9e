"""The pictures of the tables: rows with their intervals, vectors as maps, and confidences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from marnet_sdk.outputs import atomic_file
from marnet_train.tables.written import TITLES, by_section, shown

# Okabe and Ito 2008: told apart by colour-blind readers, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHOWN = (
    *("parts", "on the aligned encoder", "cross-entropy alone", "controls"),
    *("other alignment losses", "other fusions", "other settings of phase B", "other rows"),
)


def draw_rows(joined: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw each row's difference to the baseline in points, with its 95 % interval, as a PNG.

    Operating points and damaged images are left to the tables.
    """
    summary, method = joined["summary"], joined.get("method", "marnet")
    rows = [
        (section, name)
        for section, names in by_section(summary).items()
        for name in names
        if section in _SHOWN and name != "baseline" and "interval" in summary[name]
    ]
    figure = Figure(figsize=(8, 1.4 + 0.24 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, (section, name) in enumerate(rows):
        found, colour = summary[name], _COLOURS[_SHOWN.index(section) % len(_COLOURS)]
        low, high = (100 * bound for bound in found["interval"])
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot(100 * found["minus_baseline"], place, "o", color=colour, markersize=4)
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--", zorder=0)
    names = [TITLES.get(name) or shown(name, method) for _, name in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points over the image-only baseline, 95 % interval")
    axes.set_title(title, fontsize=9, loc="left")
    _save(figure, path)


def draw_maps(
    maps: Mapping[str, NDArray[np.floating]], labels: NDArray[np.integer], path: Path
) -> None:
    """Draw points of several spaces side by side, coloured by class, as a PNG.

    Args:
        maps: title -> coordinates, [N, 2]. labels: classes, [N].
    """
    figure = Figure(figsize=(4.2 * len(maps), 4.4), dpi=120, layout="constrained")
    colours = mpl.colormaps["tab10" if labels.max() < 10 else "gist_rainbow"]
    scale = 10 if labels.max() < 10 else labels.max() + 1
    for axes, (title, points) in zip(figure.subplots(1, len(maps), squeeze=False)[0],
                                     maps.items(), strict=True):  # fmt: skip
        axes.scatter(*points.T, c=colours(labels / scale + 0.5 / scale), s=6, linewidths=0)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    _save(figure, path)


def draw_confidences(
    confidences: Mapping[str, NDArray[np.floating]], against: str, path: Path
) -> None:
    """Draw the probability that models give to the true class, as a PNG.

    To the left stand the shares of images below each probability, to the right image by image the
    last model against the one named `against`.

    Args:
        confidences: model -> probabilities of all images and seeds, flat.
    """
    figure = Figure(figsize=(9, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, values) in zip(_COLOURS, confidences.items(), strict=False):
        shares = np.arange(1, len(values) + 1) / len(values)
        left.step(np.sort(values), shares, where="post", color=colour, label=name, linewidth=1.2)
    left.set_xlabel("probability of the true class")
    left.set_ylabel("share of the images with at most this")
    left.legend(frameon=False, fontsize=8)
    last = [*confidences][-1]
    right.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    right.scatter(confidences[against], confidences[last], s=5, color=_COLOURS[0], alpha=0.4,
                  linewidths=0)  # fmt: skip
    right.set_xlabel(f"{against}: probability of the true class")
    right.set_ylabel(f"{last}: the same images")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as fresh:
        figure.savefig(fresh, format="png")

"""The two pictures of an export: accuracy against latency, and risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marnet_export.choose.candidates import plural
from marnet_export.choose.points import EXACT
from marnet_sdk.bundle import NO_LOOP
from marnet_sdk.errors import requires_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from marnet_export.choose.risk import RiskCoverage, RiskThreshold

# Okabe and Ito 2008: told apart by colour-blind readers, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_pareto(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report of `pareto_report` as a PNG: accuracy against latency.

    Colour is the sampler, the marker the number of samples, the small number the steps (of those
    not dominated). Filled ones pass. Candidates far below the exact process are only counted.
    """
    rows, reference = report["candidates"], report["points"][EXACT]["accuracy"]
    bottom, top = _accuracy_range(rows, reference, report["max_drop"])
    figure, axes = _figure()
    axes.axhspan(reference - report["max_drop"], reference, color="0.93", zorder=0)
    axes.axhline(reference, color="0.5", linewidth=1, linestyle="--", zorder=1)
    kept = sorted((r for r in rows if r["non_dominated"]), key=lambda row: row["latency_ms"])
    axes.step(
        [row["latency_ms"] for row in kept],
        [row["accuracy"] for row in kept],
        where="post",
        color="0.35",
        linewidth=1,
        zorder=2,
    )
    colours = dict(zip(_distinct(rows, "sampler"), cycle(_COLOURS), strict=False))
    markers = dict(zip(_distinct(rows, "samples"), cycle(_MARKERS), strict=False))
    for row in rows:
        _draw_candidate(axes, row, colours[row["sampler"]], markers[row["samples"]])
    _draw_names(axes, report["points"], (bottom, top))
    hidden = sum(row["accuracy"] < bottom for row in rows)
    if hidden:
        text = f"{hidden} less accurate {'one is' if hidden == 1 else 'ones are'} not shown"
        axes.text(0.99, 0.015, text, transform=axes.transAxes, fontsize=8, ha="right")
    _latency_axis(axes, [row["latency_ms"] for row in rows])
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= min(top, 1.0)])
    axes.set_ylabel(f"accuracy on {report['images']:,} images")
    _percent(axes.yaxis)
    figure.legend(
        handles=_legend(colours, markers, report["max_drop"]),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, format="png")


def plot_risk_coverage(
    curve: RiskCoverage, path: Path, *, target: float, chosen: RiskThreshold
) -> None:
    """Draw risk against coverage as a PNG.

    Args:
        target: the risk that was asked for, a horizontal line. chosen: the threshold that was
            found, a point with its upper bound.
    """
    figure, axes = _figure()
    axes.plot(curve.coverage, curve.risk, label="all thresholds", color=_COLOURS[0], linewidth=1.5)
    axes.axhline(target, color="0.5", linewidth=1, linestyle="--", label=f"target {target:.2%}")
    axes.errorbar(
        chosen.coverage,
        chosen.risk,
        yerr=[[0.0], [chosen.upper_bound - chosen.risk]],
        color="black",
        marker="o",
        capsize=4,
        linestyle="none",
        label=f"answer at {chosen.threshold:.4g} or more, with upper bound",
    )
    axes.set_xlim(0, 1.01)
    settled = curve.risk[curve.answered >= 30].max(initial=0.0)  # not the first few answers
    axes.set_ylim(0, 1.1 * max(settled, target, chosen.upper_bound, 0.01))
    axes.set_xlabel("coverage: share of the images that are answered")
    axes.set_ylabel("risk: share of the answers that are wrong")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _figure() -> tuple[Figure, Axes]:
    """Make a figure without pyplot, whose state is global."""
    with requires_extra("export", "matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_candidate(axes: Axes, row: Mapping[str, Any], colour: str, marker: str) -> None:
    axes.plot(
        row["latency_ms"],
        row["accuracy"],
        marker=marker,
        markersize=7,
        color=colour,
        markerfacecolor=colour if row["passes"] else "white",
        zorder=3,
    )
    if row["non_dominated"]:
        axes.annotate(
            str(row["steps"]),
            (row["latency_ms"], row["accuracy"]),
            xytext=(-5, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            annotation_clip=True,
        )


def _draw_names(
    axes: Axes, points: Mapping[str, Mapping[str, Any]], limits: tuple[float, float]
) -> None:
    """Names of the operating points in the free strip at the top, one height each."""
    named: dict[tuple[float, float], list[str]] = {}
    for name, point in points.items():
        named.setdefault((point["latency_ms"], point["accuracy"]), []).append(name)
    bottom, top = limits
    for i, (place, names) in enumerate(sorted(named.items())):
        axes.annotate(
            f"{' = '.join(names)}\n{place[0]:.3g} ms, {place[1]:.1%}",
            place,
            xytext=(place[0], top - (top - bottom) * (0.045 + 0.08 * (i % 3))),
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.4", "shrinkB": 5},
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "0.7"},
            zorder=4,
        )


def _accuracy_range(
    rows: Sequence[Mapping[str, Any]], reference: float, max_drop: float
) -> tuple[float, float]:
    """Bottom and top of the picture; the top third is for the names."""
    shown = [r["accuracy"] for r in rows if r["accuracy"] >= reference - 6 * max_drop]
    low = min(*shown, reference - 1.5 * max_drop)
    high = max(*shown, reference)
    margin = 0.08 * (high - low)
    return low - margin, high + 0.45 * (high - low)


def _latency_axis(axes: Axes, latencies: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(latencies) / 1.7, max(latencies) * 1.3)  # a name stands over the first
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("latency in ms, logarithmic")


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _legend(colours: Mapping[str, str], markers: Mapping[int, str], max_drop: float) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(label: str, **style: Any) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=style.pop("marker", "o"), label=label, **style
        )

    return [
        *(dot("no loop" if n == NO_LOOP else n, color=colour) for n, colour in colours.items()),
        *(dot(plural(n, "sample"), color="0.35", marker=m) for n, m in markers.items()),
        dot("does not pass", color="0.35", markerfacecolor="white"),
        Line2D([], [], color="0.35", linewidth=1, label="not dominated"),
        Line2D([], [], color="0.5", linewidth=1, linestyle="--", label="exact process"),
        Patch(color="0.93", label=f"allowed drop, {max_drop:.2%}"),
    ]


def _distinct(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})

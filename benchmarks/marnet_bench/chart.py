"""A picture of a server under load: latency against the rate at which images come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marnet_sdk.errors import requires_extra

# Okabe and Ito 2008: told apart by colour-blind readers, too.
_LINES = (("p50_ms", "median", "#0072B2"), ("p90_ms", "90th percentile", "#009E73"),
          ("p99_ms", "99th percentile", "#D55E00"))  # fmt: skip


def plot_latency(report: dict[str, Any], path: Path) -> None:
    """Draw the runs of the scenario "server" as a PNG, and the limit that they are held to.

    Args:
        report: as from `traffic.run_traffic`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with requires_extra("bench", "matplotlib"):
        from matplotlib.figure import Figure  # without pyplot, whose state is global

    runs = sorted(report["runs"], key=lambda run: run["rate"])
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    rates = [run["rate"] for run in runs]
    for key, label, colour in _LINES:
        axes.plot(rates, [run[key] for run in runs], "o-", label=label, color=colour, linewidth=1.5)
    limit = report["latency_ms"]
    axes.axhline(limit, color="0.5", linewidth=1, linestyle="--", label=f"limit, {limit:g} ms")
    if best := report["best"]:
        text = f"{best['images_per_s']:,.0f} images/s in time"
        axes.axvline(best["rate"], color="0.5", linewidth=1, linestyle=":", label=text)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("images sent each second, at random times")
    axes.set_ylabel("latency in ms, logarithmic")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, format="png")

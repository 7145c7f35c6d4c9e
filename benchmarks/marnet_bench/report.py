"""A report as a table: accuracy, fidelity and speed side by side."""

from __future__ import annotations

from typing import Any

from marnet_sdk.console import print_table, say

COLUMNS = ("model", "top-1", "top-5", "agree", "from", "p50 ms", "p90", "p99", "images/s", "x")


def print_report(report: dict[str, Any]) -> None:
    """Print what `scenarios.run_batches` measured."""
    machine = report["machine"]
    rows = []
    accuracy = report["accuracy"] or {}
    if "baseline" in accuracy:
        rows.append(("image baseline", *_accuracy(accuracy, "baseline"), *[""] * 7))
    for name in ("plain PyTorch", "bundle"):
        rows += [_row(report, line) for line in report["lines"] if line["model"] == name]
    title = (
        f"{report['bundle']}: batch {report['batch']}, {report['steps']} steps, "
        f"{machine['processor']}, {machine['threads']} threads"
    )
    print_table(title, COLUMNS, rows)
    fidelity = report["fidelity"]
    low, high = fidelity["top1_interval"]
    say(
        f"agree: same label as the float32 checkpoint, on {fidelity['images']} images; "
        f"95 % interval {low:.2%} to {high:.2%}. top-1, top-5: accuracy on the test split"
    )
    for ratio in report["speedups"]:
        if ratio["low"] <= 1 <= ratio["high"]:
            verdict = f"no difference from {ratio['over']} can be told"
        else:
            verdict = f"{ratio['ratio']:.2f} times the speed of {ratio['over']}"
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        say(f"from {ratio['input']}: {verdict} (95 % interval of the ratio {interval})")
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    say(f"{packages}; load {machine['load_average'][0]}")


def _row(report: dict[str, Any], line: dict[str, Any]) -> tuple[str, ...]:
    is_bundle = line["model"] == "bundle"
    accuracy = report["accuracy"] or {}
    top = ("", "") if is_bundle or not accuracy else _accuracy(accuracy, "marnet")
    ratio = next((r for r in report["speedups"] if r["input"] == line["input"]), None)
    return (
        f"{report['backend']} {report['precision']['asked']}" if is_bundle else "plain PyTorch",
        *top,
        f"{report['fidelity']['top1_agreement']:.1%}" if is_bundle else "",
        line["input"],
        f"{line['p50_ms']:.2f}",
        f"{line['p90_ms']:.2f}",
        f"{line['p99_ms']:.2f}",
        f"{line['images_per_s']:,.0f}",
        f"{ratio['ratio']:.2f}" if is_bundle and ratio else "",
    )


def _accuracy(metrics: dict[str, Any], branch: str) -> tuple[str, str]:
    splits = metrics[branch]
    found = splits.get("test", splits.get("val"))
    return f"{found['top1']:.1%}", f"{found['top5']:.1%}"

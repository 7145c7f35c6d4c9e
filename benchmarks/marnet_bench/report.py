"""A report as a table: accuracy, fidelity and speed side by side."""

from __future__ import annotations

from typing import Any

from marnet_sdk.console import print_table, say

STEADY = 0.2  # drift of the medians from which a run is called unsteady
COLUMNS = ("model", "top-1", "top-5", "agree", "from", "p50 ms", "p90", "p99", "images/s", "x")


def print_report(report: dict[str, Any]) -> None:
    """Print what `scenarios.run_batches` measured."""
    machine = report["machine"]
    rows = []
    if report["accuracy"]:
        rows.append(("image baseline", *_accuracy(report, "baseline"), *[""] * 7))
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
        f"95 % interval {low:.2%} to {high:.2%}"
    )
    if report["accuracy"]:
        say(_accuracy_sentence(report["accuracy"]))
    for ratio in report["speedups"]:
        if ratio["low"] <= 1 <= ratio["high"]:
            verdict = f"no difference from {ratio['over']} can be told"
        else:
            verdict = f"{ratio['ratio']:.2f} times the speed of {ratio['over']}"
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        say(f"from {ratio['input']}: {verdict} (95 % interval of the ratio {interval})")
    worst = max(line["drift"] for line in report["lines"])
    if worst > STEADY:
        say(f"unsteady: medians drift by up to {worst:.0%} during the run; is something else busy?")
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    say(f"{packages}; load {machine['load_average'][0]}")


def _row(report: dict[str, Any], line: dict[str, Any]) -> tuple[str, ...]:
    is_bundle = line["model"] == "bundle"
    top = ("", "") if is_bundle or not report["accuracy"] else _accuracy(report, "marnet")
    ratio = next((r for r in report["speedups"] if r["input"] == line["input"]), None)
    return (
        "MARNet, bundle" if is_bundle else "MARNet, PyTorch",
        *top,
        f"{report['fidelity']['top1_agreement']:.1%}" if is_bundle else "",
        line["input"],
        f"{line['p50_ms']:.2f}",
        f"{line['p90_ms']:.2f}",
        f"{line['p99_ms']:.2f}",
        f"{line['images_per_s']:,.0f}",
        f"{ratio['ratio']:.2f}" if is_bundle and ratio else "",
    )


def _accuracy(report: dict[str, Any], branch: str) -> list[str]:
    found = report["accuracy"][branch]
    return ["" if x is None else f"{x:.1%}" for x in (found["top1"], found["top5"])]


def _accuracy_sentence(accuracy: dict[str, Any]) -> str:
    sentence = f"top-1, top-5: accuracy on the {accuracy['split']} split, measured by marnet-train"
    if accuracy["marnet"]["top1"] is None:
        sentence += "; MARNet's was not measured with this sampler, number of steps or seed"
    return sentence

"""A report as a table: accuracy, fidelity and speed side by side."""

from __future__ import annotations

from typing import Any

from marnet_sdk.console import print_table, say

STEADY = 0.2  # drift of the medians from which a run is called unsteady
COLUMNS = ("model", "top-1", "top-5", "agree", "from", "p50 ms", "p90", "p99", "images/s", "x")
EXPLAINED = ("M multiply-adds", "MB of weights", "bound ms", "by", "of it")
LOOP_COLUMNS = (
    *("loop", "precision", "agree", "error", "p50 ms", "p90", "p99", "images/s"),
    *("bound ms", "of it", "x"),
)


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
        f"{machine['processor']}, {report['threads'] or machine['threads']} threads"
    )
    print_table(title, COLUMNS, rows)
    say(f"reverse loop: {report['loop']}")
    fidelity = report["fidelity"]
    low, high = fidelity["top1_interval"]
    say(
        f"agree: same label as the float32 checkpoint, on {fidelity['images']} images; "
        f"95 % interval {low:.2%} to {high:.2%}"
    )
    if report["accuracy"]:
        say(_accuracy_sentence(report["accuracy"]))
    for ratio in report["speedups"]:
        say(f"from {ratio['input']}: {_verdict(ratio, ratio['over'])}")
    _say_how_steady(report)


def print_loop_report(report: dict[str, Any]) -> None:
    """Print what `loop.run_loop` measured: a table for each batch size, then what follows."""
    machine, model = report["machine"], report["model"]
    for batch in report["batches"]:
        lines = [line for line in report["lines"] if line["batch"] == batch]
        title = (
            f"reverse loop, {model['name']}: batch {batch}, {report['steps']} {report['sampler']} "
            f"steps, {machine['processor']}, {report['threads']} threads"
        )
        lines.sort(key=lambda line: line["p50_ms"])
        print_table(title, LOOP_COLUMNS, [_loop_row(report, line) for line in lines])
    say(
        f"agree, error: labels and logits beside the float32 model, on {report['checked_images']} "
        "random x_v; bound: what this machine needs at least for the candidate's own multiply-adds "
        "and weights; of it: the share of that in p50; x: over the fastest peer of the same "
        "precision, of fp16: in float32 or bf16"
    )
    for ratio in report["best"]:
        ours = f"{ratio['ours']} {ratio['ours_precision']}"
        over = f"the {ratio['against']}, {ratio['peer']} {ratio['peer_precision']}"
        say(f"batch {ratio['batch']}: {ours}: {_verdict(ratio, over)}")
    _say_limits(report["limits"])
    for missing in report["missing"]:
        say(f"not measured: {missing['model']} {missing['precision']}: {missing['reason']}")
    _say_how_steady(report)


def print_traffic(report: dict[str, Any]) -> None:
    """Print what `traffic.run_traffic` measured."""
    together = f", {report['together']} at a time" if report["together"] > 1 else ""
    title = (
        f"{_who(report)}, {report['scenario']}{together}: {report['image_bytes']:,} bytes an "
        f"image, {_where(report)}"
    )
    rows = [
        (
            "" if run["rate"] is None else f"{run['rate']:,.1f}",
            f"{run['images']:,}",
            *(f"{run[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{run['images_per_s']:,.1f}",
        )
        for run in sorted(report["runs"], key=lambda run: run["rate"] or 0)
    ]
    print_table(title, ("sent/s", "images", "p50 ms", "p90", "p99", "images/s"), rows)
    if limit := report["latency_ms"]:
        best, wanted = report["best"], f"99 of 100 within {limit:g} ms"
        say(f"{wanted}: {best['images_per_s']:,.1f} images/s" if best else f"{wanted}: at no rate")
    for times in (report["batching"] or {"learned": ()})["learned"]:
        say(
            f"a batch of n images takes {times['fixed_ms']:.2f} + {times['per_image_ms']:.2f} n ms;"
            f" larger ones than {times['useful']} are hardly faster per image"
        )
    say(f"all answers to the {report['checked']} images are those of single calls")
    _say_machine(report)


def _who(report: dict[str, Any]) -> str:
    """Name the bundle, or the server of which nothing else is known."""
    if "url" in report:
        return report["url"]
    decoding = ", fast decoding" if report["fast_decode"] else ""
    return f"{report['bundle']} ({report['steps']} steps{decoding})"


def _where(report: dict[str, Any]) -> str:
    threads = f", {report['threads']} threads" if "threads" in report else ""
    return report["machine"]["processor"] + threads


def print_stages(report: dict[str, Any]) -> None:
    """Print what `stages.run_stages` measured."""
    explained = report["limits"] is not None
    title = (
        f"{_who(report)}, from the bytes of image files to labels: batch {report['batch']}, "
        f"{report['image_bytes']:,} bytes an image, {_where(report)}"
    )
    columns = ("stage", "share", "p50 ms", "p90", "p99", *(EXPLAINED if explained else ()))
    print_table(title, columns, [_stage_row(line, explained) for line in report["lines"]])
    whole = report["lines"][-1]["p50_ms"]
    say(
        f"the stages are timed inside of calls; their medians add up to {report['sum_ms']:.2f} ms, "
        f"and calls that nobody watches take {whole:.2f} ms"
    )
    say(_loop_sentence(report))
    if fast := report["fast_decoding"]:
        say(f"fast decoding: {_verdict(fast, 'exact decoding')}; {changed(fast)}")
    if explained:
        say(
            "bound: what this machine needs at least for the multiply-adds of a part, or for "
            "reading its weights, whichever takes longer; an encoder's weights are not counted"
        )
        if any(line.get("share_of_bound", 0) > 1 for line in report["lines"]):
            say("a part beats its bound: something else was busy while this machine was measured")
        _say_limits(report["limits"])
    _say_how_steady(report)


def _stage_row(line: dict[str, Any], explained: bool) -> tuple[str, ...]:
    times = (f"{line[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
    row = (line["stage"], f"{line['share']:.1%}", *times)
    if not explained:
        return row
    if "bound_ms" not in line:
        return (*row, *[""] * len(EXPLAINED))
    size = line["weight_bytes"]
    return (
        *row,
        f"{line['multiply_adds'] / 1e6:,.2f}",
        "" if size is None else f"{size / 1e6:,.2f}",
        f"{line['bound_ms']:.3f}",
        line["bound_by"],
        f"{line['share_of_bound']:.0%}",
    )


def _loop_sentence(report: dict[str, Any]) -> str:
    """Say what a step takes, and that nobody saw one alone."""
    if not report["steps"]:
        return "reverse loop: none, the alignment branch answers"
    about = f"reverse loop: {report['loop']}"
    found = report["loop_by_difference"]
    if found is None:
        return f"{about}; one call with the head, and too few steps to tell them apart"
    about += f". The backend runs its {found['steps']} steps and the head as one call"
    interval = f"95 % interval {found['low_us']:.1f} to {found['high_us']:.1f}"
    if found["low_us"] <= 0:
        return f"{about}; what a step takes cannot be told here ({interval} us)"
    return (
        f"{about}. By the difference to half of the steps, one takes {found['step_us']:.1f} us "
        f"({interval}), all {found['loop_ms']:.2f} ms, and what is around them, the head above "
        f"all, {found['around_ms']:.2f} ms"
    )


def changed(found: dict[str, Any]) -> str:
    """Say how near fast decoding is to exact decoding."""
    return (
        f"same label for {found['same_label']} of {found['images']} images, pixels "
        f"{found['mean_grey_levels']:.2f} grey levels apart on average and "
        f"{found['largest_grey_levels']:.0f} at most"
    )


def print_comparison(found: dict[str, Any]) -> None:
    """Print what `compare.described` gives."""
    rows = [
        (
            line["line"],
            line["measure"],
            f"{line['old']:,.2f}",
            f"{line['new']:,.2f}",
            f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})",
            "REGRESSION" if line["regressed"] else line["verdict"],
        )
        for line in found["lines"]
    ]
    columns = ("line", "of", "old", "new", "times as fast", "")
    print_table("times in ms, rates in images/s, 95 % intervals", columns, rows)
    for note in found["notes"]:
        say(f"note: {note}")


def _loop_row(report: dict[str, Any], line: dict[str, Any]) -> tuple[str, ...]:
    own = (line["model"], line["precision"], line["batch"])
    ratio = next(
        (
            r
            for r in report["ratios"]
            if r["best_peer"] and (r["ours"], r["ours_precision"], r["batch"]) == own
        ),
        None,
    )
    return (
        line["model"],
        line["precision"],
        f"{line['agreement']:.1%}",
        f"{line['relative_error']:.0e}",
        f"{line['p50_ms']:.2f}",
        f"{line['p90_ms']:.2f}",
        f"{line['p99_ms']:.2f}",
        f"{line['images_per_s']:,.0f}",
        f"{line['bound_ms']:.2f}",
        f"{line['share_of_bound']:.0%}",
        f"{ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
    )


def _say_limits(limits: dict[str, Any]) -> None:
    rates = ", ".join(
        f"{precision} {rate['g_per_s']:,.0f} G multiply-adds/s ({rate['through']})"
        for precision, rate in limits["multiply_adds"].items()
    )
    reads = ", ".join(
        f"{read['bytes'] / 1e6:.3g} MB at {read['gb_per_s']:.0f} GB/s" for read in limits["read"]
    )
    say(f"limits of this machine, threads {limits['threads']}: {rates}; reads again {reads}")


def _verdict(ratio: dict[str, Any], over: str) -> str:
    interval = f"(95 % interval of the ratio {ratio['low']:.2f} to {ratio['high']:.2f})"
    if ratio["low"] <= 1 <= ratio["high"]:
        return f"no difference from {over} can be told {interval}"
    return f"{ratio['ratio']:.2f} times the speed of {over} {interval}"


def _say_how_steady(report: dict[str, Any]) -> None:
    """Drift, if it is large, then versions and load."""
    worst = max(line["drift"] for line in report["lines"])
    if worst > STEADY:
        say(f"unsteady: medians drift by up to {worst:.0%} during the run; is something else busy?")
    _say_machine(report)


def _say_machine(report: dict[str, Any]) -> None:
    """Versions, load, and which CPUs there are."""
    machine = report["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    say(f"{packages}; load {machine['load_average'][0]}")
    if machine["limited"]:
        say(f"this process may use {machine['cpus']}")


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

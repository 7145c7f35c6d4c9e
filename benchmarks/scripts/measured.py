"""Write the tables of README.md and docs/measured.md from benchmarks/results/.

    python benchmarks/scripts/measured.py

A part of a page between `<!-- NAME -->` and `<!-- /NAME -->` is what the function of that name
returns. The sentences around the parts are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from marnet_train.tables.joined import compare, summarise
from marnet_train.tables.written import is_missing, tables

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs/measured.md")
RESULTS = ROOT / "benchmarks/results"
_PART = re.compile(r"(<!-- (?P<name>[a-z0-9-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)
_BRANCHES = ("baseline", "alignment", "+MLP", "refined", "MARNet")
_NAMES = {
    "baseline": "image-only baseline",
    "alignment": "alignment branch",
    "+MLP": "+MLP, one pass of the same network",
    "refined": "refined branch",
    "MARNet": "**MARNet**",
}
_PHASE_B = (
    *("CE alone, on the baseline", "+MLP on the baseline", "+CDR on the baseline", "CE alone"),
    *("refined, gamma = 1", "refined, gamma = 1 / D"),
    *("refined, t uniform", "refined, half of the rows at t = T"),
)
_CONTROLS = {
    "labels": "one-hot labels",
    "random": "random vectors",
    "shuffled": "shuffled texts",
    "moving": "a text encoder that moves",
    "joint": "one phase for A and B",
}
_OVER_SEEDS = ("points over the baseline", "95 % interval", "Student, over seeds")

Row = Sequence[str]


def read(name: str) -> dict[str, Any]:
    """The newest report of a name in benchmarks/results/."""
    newest = max(RESULTS.glob(f"????-??-??-{name}.json"))
    return json.loads(newest.read_text("utf-8"))


def table(title: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(line)} |".replace("  ", " ") for line in (title, *rows))
    return "\n".join((first, f"|{'---|' * len(title)}", *others))


def ratio(found: dict[str, Any]) -> str:
    """A ratio of medians with its 95 % interval."""
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def speed() -> str:
    """The README's table: ViT-B/16, one image, the peers and the fastest bundle."""
    report = read("cpu-real-size-vit-b16")
    precisions = ("fp32", "bf16", "int8")
    times = {row["name"]: row["latency"]["1"] for row in report["rows"] if "latency" in row}
    found = {r["bundle"].split()[-1]: r for r in report["ratios"] if r["batch"] == 1}

    def line(title: str, names: Iterable[str], bold: str = "") -> Row:
        cells = (f"{bold}{times[n]['p50_ms']:.1f} ms{bold}" if n in times else "" for n in names)
        return [title, *cells]

    peers = ("torch eager", "torch.compile", "ONNX Runtime", "OpenVINO")
    rows = [line(f"{peer}, plain loop", (f"{peer} {p}" for p in precisions)) for peer in peers]
    rows.append(line("**marnet**", (found[p]["bundle"] for p in precisions), "**"))
    last = [ratio(found[p]) for p in precisions]
    last[2] += f", over its {found['int8']['peer'].split()[-1]}"
    return table(["", *precisions], [*rows, ["marnet over the fastest peer", *last]])


def loop(name: str) -> str:
    """The reverse loop alone: our fastest form over the fastest peer that it is held to."""
    report = read(name)
    times = {(x["model"], x["precision"], x["batch"]): x["p50_ms"] for x in report["lines"]}
    best = {
        (r["ours_precision"], r["batch"]): (
            f"{times[r['ours'], r['ours_precision'], r['batch']]:.1f} ms: {ratio(r)}"
        )
        for r in report["ratios"]
        if r["best_ours"] and r["best_peer"]
    }
    names = {"fp32": "float32", "bf16": "bf16", "fp16": "fp16", "int8": "int8 products"}
    rows = [
        [name, *(best[p, batch] for batch in report["batches"])]
        for p, name in names.items()
        if (p, report["batches"][0]) in best
    ]
    return table(["precision", *(f"batch {batch}" for batch in report["batches"])], rows)


def int8_loop() -> str:
    """Ways to round activations in an int8 loop: what the answers keep, on trained weights."""
    runs = read("cpu-int8-loop")["runs"]
    rows = [
        [
            forms[0]["form"],
            *(
                f"{f['agreement']:.1%} / {f['refined_agreement']:.1%} / {f['refined_error']:.2%}"
                for f in forms
            ),
        ]
        for forms in zip(*(run["forms"] for run in runs), strict=True)
    ]
    names = (f"{run['checkpoint']}, {run['images']} images" for run in runs)
    return table(["activations", *names], rows[1:])


def labels(row: dict[str, Any], images: int = 32) -> str:
    """Say on how many images a bundle gives the checkpoint's label."""
    return f"{row['agreement'] * images:.0f} of {images}"


def real_size(model: str) -> str:
    """A real encoder in every backend and precision, and each framework's own best form."""
    report = read(f"cpu-real-size-{model}")
    rows = []
    for row in report["rows"]:
        if "latency" not in row:  # refused, or for another machine
            continue
        one, many = row["latency"]["1"], row["latency"]["16"]
        times = (
            f"{one['p50_ms']:.1f} ms",
            f"{many['p50_ms']:,.0f} ms",
            f"{many['images_per_s']:.1f}",
        )
        if "backend" in row:
            name = f"`{row['backend']}` {row['name'].split()[-1]}"
            sizes = f"{row['bundle_mb']:.0f} MB", f"{row['export_s']:.0f} s"
            rows.append((name, labels(row), *times, *sizes))
        else:
            rows.append((f"{row['name']}, plain loop", "", *times, "", ""))
    return table(("", "same label", "batch 1", "batch 16", "images/s", "bundle", "export"), rows)


def over_peers(model: str) -> str:
    """A sentence: the fastest bundle of each precision over the fastest peer."""
    found: dict[str, list[str]] = {}
    for r in read(f"cpu-real-size-{model}")["ratios"]:
        precision = r["bundle"].split()[-1].partition("-")[0]
        if precision != "fp16":
            found.setdefault(precision, []).append(f"{ratio(r)} at batch {r['batch']}")
    over = {"fp32": "fp32", "bf16": "bf16", "int8": "int8 over the fastest *bf16* peer"}
    parts = [f"{name} {' and '.join(found[precision])}" for precision, name in over.items()]
    return f"The fastest bundle over the fastest peer: {'; '.join(parts)}."


def native_end_to_end() -> str:
    """The fastest bundles with the native loop and with a graph's, from pixels to logits."""
    rows = []
    for model, title in {"efficientnet-lite0": "EfficientNet-Lite0", "vit-b16": "ViT-B/16"}.items():
        report = read(f"cpu-native-{model}")
        times = {row["name"]: row.get("latency") for row in report["rows"]}
        for r in report["ratios"]:
            if r["peer"].startswith("marnet"):
                batch = str(r["batch"])
                both = (f"{times[r[who]][batch]['p50_ms']:.1f} ms" for who in ("bundle", "peer"))
                precision = r["bundle"].split()[-2]
                rows.append([title, precision, batch, *both, ratio(r)])
    return table(("", "", "batch", "native loop", "graph's loop", "ratio"), rows)


def auto() -> str:
    """List what `marnet-export` without --backend keeps, and what it leaves."""
    rows = []
    for row in read("cpu-real-size-vit-b16-auto")["rows"]:
        raced = [
            f"`{r['backend']}` {r['milliseconds']['1']:.1f} ms"
            for r in row["ranked"]
            if r["outcome"] == "passed"
        ]
        refused = " and ".join(
            f"`{r['backend']}`" for r in row["ranked"] if r["outcome"] == "refused"
        )
        others = [*raced[1:], *([f"{refused} have no {row['precision']}"] if refused else [])]
        kept = f"`--precision {row['precision']}`", raced[0], "; ".join(others)
        rows.append((*kept, f"{row['export_s']:.0f} s"))
    return table(("", "kept", "the others", "export"), rows)


def tensorrt() -> str:
    """The graphs that TensorRT's engines are made of, held to the float32 model."""
    reports = {
        "ViT-B/16 and BERT-base": "vit-b16",
        "Swin-T": "swin-t-tensorrt",
        "ResNet-50": "resnet-50-tensorrt",
    }
    rows, precisions = [], ("fp32", "bf16", "fp16", "int8")
    for title, name in reports.items():
        found = {
            row["precision"]: f"{labels(row)}, {row['bundle_mb']:,.0f} MB, {row['export_s']:.0f} s"
            for row in read(f"cpu-real-size-{name}")["rows"]
            if row.get("backend") == "tensorrt"
        }
        rows.append([title, *(found[p] for p in precisions)])
    return table(["", *precisions], rows)


def digits() -> str:
    """Digits, end to end, beside plain PyTorch in the same process."""
    plain: dict[int, list[float]] = {1: [], 64: []}
    rows = []
    for backend in ("torchscript", "onnxruntime", "openvino"):
        cells = [f"`{backend}` fp16"]
        for batch, taken in plain.items():
            report = read(f"cpu-digits-{backend}-fp16-batch{batch}")
            lines = {x["model"]: x for x in report["lines"] if x["input"] == "pixels"}
            figures = {n: x["p50_ms" if batch == 1 else "images_per_s"] for n, x in lines.items()}
            taken.append(figures["plain PyTorch"])
            (over,) = (r for r in report["speedups"] if r["input"] == "pixels")
            ours = figures["bundle"]
            cells += [f"{ours:.2f} ms" if batch == 1 else f"{ours:,.0f}", ratio(over)]
        rows.append(cells)
    one, many = plain[1], plain[64]
    peer = f"{min(one):.1f} to {max(one):.1f} ms", f"{min(many):,.0f} to {max(many):,.0f}"
    title = ("bundle, from pixels to logits", "batch 1: p50", "against PyTorch")
    return table(
        (*title, "batch 64: images/s", "against PyTorch"),
        [("plain PyTorch", peer[0], "1", peer[1], "1"), *rows],
    )


def pareto() -> str:
    """Accuracy, and share of unchanged labels, of every sampler at some numbers of steps."""
    steps = (1, 5, 10, 20, 50, 100)
    found = {
        (c["sampler"], c["samples"], c["steps"]): c for c in read("cpu-plates-pareto")["candidates"]
    }
    rows = []
    for samples in (1, 8):
        for sampler in ("ddpm", "ddim", "dpmpp"):
            of_steps = (found[sampler, samples, count] for count in steps)
            cells = (f"{100 * c['accuracy']:.1f} / {100 * c['agreement']:.1f} %" for c in of_steps)
            rows.append(
                [f"`{sampler}`, {samples}", *(x.replace("100.0 %", "100 %") for x in cells)]
            )
    return table(["sampler, samples", f"S = {steps[0]}", *map(str, steps[1:])], rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(interval: Sequence[float]) -> str:
    """An interval in points; of a single seed there is none."""
    if is_missing(interval[0]):
        return ""
    return "{:+.1f} to {:+.1f}".format(*(100 * x + 0.0 for x in interval))


def over_baseline(found: dict[str, Any]) -> Row:
    """Accuracy, and points over the baseline with both intervals."""
    gain = f"{100 * found['minus_baseline']:+.1f}"
    intervals = points(found["interval"]), points(found["interval_over_seeds"])
    return percent(found["top1"]), gain, *intervals


def branches(found: dict[str, Any]) -> str:
    """Every branch of the model: accuracy, gain, calibration and selective prediction."""
    rows = []
    for name in _BRANCHES:
        r = found[name]
        more = f"{r['ece']:.3f}", f"{r['risk_coverage']:.3f}", percent(r["at_80"])
        rows.append((_NAMES[name], *over_baseline(r), *more))
    title = ("", "test top-1", *_OVER_SEEDS, "calibration error", "area under risk-coverage")
    return table((*title, "top-1 at 80 % coverage"), rows)


def chains(found: dict[str, Any]) -> str:
    """Compare other reverse processes of the same weights."""
    counts = sorted({int(n.split()[1]) for n in found if re.match(r"MARNet, \d+ steps", n)})
    kinds = [(name, draws) for name in ("refined", "MARNet") for draws in (1, 8)]
    rows = [["0, the alignment branch", percent(found["alignment"]["top1"]), "", "", ""]]
    for count in counts:
        names = (f"{name}, {count} steps, K = {draws}" for name, draws in kinds)
        rows.append([str(count), *(percent(found[n]["top1"]) for n in names)])
    title = ("steps of the chain", *(f"{name}, K = {draws}" for name, draws in kinds))
    return table(title, rows)


def votes(found: dict[str, Any]) -> str:
    """A sentence on vote shares in place of mean probabilities, for the longest chain."""
    r = [r for n, r in found.items() if n.startswith("MARNet,") and n.endswith("K = 8")][-1]
    return (
        "With vote shares in place of mean probabilities: area under risk-coverage "
        f"{r['risk_coverage']:.3f} by the mean probability of 8 samples and "
        f"{r['risk_coverage_by_votes']:.3f} by the share of votes; top-1 at 80 % coverage "
        f"{100 * r['at_80']:.1f} and {percent(r['at_80_by_votes'])}."
    )


def with_seeds(found: dict[str, Any], names: dict[str, str]) -> str:
    """Rows of accuracy over the baseline, each with its number of seeds."""
    rows = [(names[n], *over_baseline(found[n]), str(len(found[n]["seeds"]))) for n in names]
    return table(("", "test top-1", *_OVER_SEEDS, "seeds"), rows)


def controls(found: dict[str, Any]) -> str:
    """The controls that were measured: something else in place of the text."""
    names = {
        f"{kind}: {branch}": f"{title}: {branch}"
        for kind, title in _CONTROLS.items()
        for branch in _BRANCHES
        if f"{kind}: {branch}" in found
    }
    if not names:
        return (
            "Controls with something else in place of the text are not measured with this version."
        )
    title = (
        "Something else in place of the text, with the settings that validation chose for the text"
    )
    return f"{title}:\n\n{with_seeds(found, names)}"


def pairs(found: dict[str, Any]) -> str:
    """Differences of two rows on the same images."""
    rows = [
        (name, f"{100 * p['mean']:+.1f}", points(p["interval"]), points(p["interval_over_seeds"]),
         str(len(p["seeds"])))
        for name, p in found.items()
    ]  # fmt: skip
    return table(("", "points", "95 % interval", "Student, over seeds", "seeds"), rows)


def damages(found: dict[str, Any]) -> str:
    """Accuracy on damaged test pictures, and where MARNet is shown above its baseline."""
    kinds = list(dict.fromkeys(n.split()[0] for n in found if re.match(r"[a-z]+ \d: ", n)))
    rows = []
    for kind in kinds:
        of_kind = (
            " / ".join(f"{100 * found[f'{kind} {s}: {name}']['top1']:.1f}" for s in (1, 2, 3))
            for name in _BRANCHES
        )
        rows.append([kind, *of_kind])
    ours = {n.partition(":")[0]: r["interval"] for n, r in found.items() if n.endswith(": MARNet")}
    ours = {n: interval for n, interval in ours.items() if n.split()[0] in kinds}
    above = [n for n, (low, _) in ours.items() if low > 0]
    below = [n for n, (_, high) in ours.items() if high < 0]
    return (
        f"{table(('damage, strengths 1 / 2 / 3', *_BRANCHES), rows)}\n\n"
        "MARNet minus baseline on the same damaged pictures: shown above zero for "
        f"{len(above)} of {len(ours)} ({', '.join(above) or 'none'}), below for "
        f"{len(below)} ({', '.join(below) or 'none'})."
    )


def choices(runs: Sequence[dict[str, Any]]) -> str:
    """A sentence: what validation chose for each seed, and how long a training took."""
    found = (
        f"seed {run['seed']}: "
        + ", ".join(f"{name.split('.')[-1]} {value:.2g}" for name, value in run["chosen"].items())
        for run in runs
    )
    minutes = [round(run["seconds"]["training"] / 60) for run in runs]
    return (
        f"Chosen by validation: {'; '.join(found)}. One training took {min(minutes)} to "
        f"{max(minutes)} minutes of one core, the search, the baseline and the control included."
    )


def gains_by_seed(joined: dict[str, Any], title: str) -> str:
    """A sentence: the data set, its number of seeds, and the gain of each."""
    found, count = joined["summary"], len(joined["summary"]["MARNet"]["seeds"])
    both = zip(found["MARNet"]["top1_by_seed"], found["baseline"]["top1_by_seed"], strict=True)
    gains = ", ".join(f"{100 * (ours - theirs):+.1f}" for ours, theirs in both)
    title = title.format(images=f"{joined['test_images']:,}")
    return f"{title} {count} training seeds; MARNet minus baseline by seed: {gains} points."


def digits_accuracy() -> str:
    """Return the table of the digits, where the baseline is nearly right."""
    joined = read("cpu-digits-accuracy")
    title = gains_by_seed(joined, "**Digits**, recipe `digits`, {images} test pictures,")
    return "\n\n".join((title, branches(joined["summary"])))


def accuracy(report: str, title: str, damaged: str = "") -> str:
    """All that was measured of a data set over training seeds."""
    joined = read(report)
    found = joined["summary"]
    return "\n\n".join(
        (
            gains_by_seed(joined, title),
            branches(found),
            "Other reverse processes with the same weights, means of the seeds:",
            chains(found),
            votes(found),
            'Phase B once more, with other settings or on the baseline\'s encoder. "CE alone" is '
            "the same network without a semantic target, so a baseline with the capacity of the "
            "whole:",
            with_seeds(found, {name: name for name in _PHASE_B if name in found}),
            controls(found),
            "Paired differences on the same images:",
            pairs(joined["pairs"]),
            f"Damaged test pictures{damaged}, top-1 in percent, "
            f"{len(found['blur 1: MARNet']['seeds'])} training seeds:",
            damages(found),
            choices(joined["runs"]),
        )
    )


plates = partial(
    accuracy,
    "cpu-plates-accuracy",
    "**Plates** at 80 pixels, recipe `plates`, {images} test pictures,",
)
grocery = partial(
    accuracy,
    "cpu-grocery-accuracy",
    "**Grocery Store**, 81 products, recipe `grocery` (ImageNet EfficientNet-Lite0 and MiniLM, "
    "both frozen; baseline and MARNet each had a search on validation), the official {images} test "
    "photographs,",
    ", the first 200 photographs, of four products",
)


def busy() -> str:
    """Every backend on an idle machine, beside busy processes, and under a quota of one CPU."""
    report = read("cpu-busy")
    rows = []
    for line in report["lines"]:
        times = line["bytes"]
        rows.append(
            [
                line["condition"],
                f"`{line['backend']}`, {line['batch']}",
                *(f"{times[f'{name}_ms']:.1f} ms" for name in ("ours", "peer")),
                ratio(times),
                *(f"{times[f'{name}_ms']:.1f} ms" for name in ("alone", "one_thread")),
            ]
        )
    title = ("", "batch", "marnet", "plain PyTorch", "ratio", "alone", "alone, 1 thread")
    return table(title, rows)


def busy_training() -> str:
    """A short training on an idle machine, beside busy processes, and under a quota of one CPU."""
    rows = [
        [x["condition"], f"{x['ours_s']:.0f} s", f"{x['one_thread_s']:.0f} s"]
        for x in read("cpu-busy-training")["training"]
    ]
    return table(["", "marnet-train", "1 thread"], rows)


def busy_loop() -> str:
    """The native loop beside the fastest of our graphs and the fastest peer, of one precision."""
    rows = []
    for loop in read("cpu-busy-loop")["loops"]:
        for precision in ("fp32", "int8"):
            times = {x["model"]: x["p50_ms"] for x in loop["lines"] if x["precision"] == precision}
            ours = {m: ms for m, ms in times.items() if m.startswith("marnet")}
            native = ours.pop("marnet native")
            peers = times.keys() - ours.keys() - {"marnet native"}
            fastest = (min(ours, key=times.__getitem__), min(peers, key=times.__getitem__))
            others = (f"{times[model]:.1f} ms ({model})" for model in fastest)
            rows.append([loop["condition"], precision, f"{native:.1f} ms", *others])
    return table(["", "precision", "native loop", "fastest graph of ours", "fastest peer"], rows)


def serving() -> str:
    """The rates that servers answer in time, beside our last line, and the processor's time."""
    runs = read("cpu-serving")["runs"]
    turns = {name: [turn["rate"] for turn in found] for name, found in runs.items()}
    ours = [name for name in turns if name.startswith("marnet-serve")][-1]
    rows = [
        [
            name,
            ", ".join(f"{rate:.0f}" for rate in rates),
            ", ".join(f"{a / b:.2f}" if b else "" for a, b in zip(turns[ours], rates, strict=True)),
            ", ".join(f"{turn['processor_ms']:.2f}" for turn in runs[name]),
        ]
        for name, rates in turns.items()
    ]
    title = ["server", "images/s in each turn", f"{ours}, over it", "ms of the processor"]
    return table(title, rows)


def soak() -> str:
    """Show memory, threads and descriptors before and after many requests."""
    rows = []
    for name in ("cpu-soak", "cpu-soak-server"):
        found = read(name)
        before, after, memory = found["before"], found["after"], found["kib_per_1000"]
        change = f"{memory['kib']:+.0f} KiB ({memory['low']:+.0f} to {memory['high']:+.0f})"
        target, asked, reloads = (found[key] for key in ("target", "requests", "reloads"))
        counts = (f"{before[kind]} -> {after[kind]}" for kind in ("threads", "fds"))
        resident = f"{before['mib']:.0f} -> {after['mib']:.0f}"
        rows.append([target, f"{asked:,}", str(reloads), resident, change, *counts])
    title = ("", "requests", "reloads", "resident MiB", "for each 1,000 requests", "threads")
    return table((*title, "descriptors"), rows)


def ablation(report: str, title: str, less: Collection[str] = ()) -> str:
    """The tables of `marnet-train ablate`, as it writes them.

    Args:
        less: tables that the raw file alone has.
    """
    return rows_of(read(report), title, less)


def rows_of(joined: dict[str, Any], title: str, less: Collection[str] = ()) -> str:
    """The tables of joined rows, without the operating points, and with damaged images in short."""
    title = title.format(images=joined["test_images"], seeds=len(joined["runs"]))
    left_out = ("operating points", "damaged images", *less)
    shown = [found.markdown(level=4) for found in tables(joined) if found.title not in left_out]
    damaged = joined["runs"][0]["rows"].get("blur 1: MARNet")
    if damaged is not None:
        shown.append(f"#### damaged images\n\nTop-1 in percent, {damaged['images']} images:")
        shown.append(damages(joined["summary"]))
    return "\n\n".join((title, *shown))


def int8_encoders() -> str:
    """Show labels, accuracy and time of int8 by image encoder, held to float32."""
    rows = []
    for run in read("cpu-int8-encoders")["runs"]:
        for backend, found in run["backends"].items():
            exact, faster = found["exports"]["float32"], {}
            for line in found["times"]:
                faster[line["bundle"], line["batch"]] = "{:.2f} ({:.2f} to {:.2f})".format(
                    *line["faster"]
                )
            for name in ("int8", "int8, 99 %"):
                one = found["exports"][name]
                about = [f"`{run['family']}`", f"`{backend}`", name]
                if "failed" in one:
                    same = re.search(r"agreement is (0\.\d+)", one["failed"])
                    kept = f"refused: {float(same[1]):.1%}" if same else "refused"
                    rows.append([*about, kept, "", "", "", ""])
                    continue
                rows.append(
                    [
                        *about,
                        f"{one['agreement']:.1%}",
                        f"{exact['accuracy']:.1%}, {one['accuracy']:.1%}",
                        f"{one['encoder_in_int8']:.0%}",
                        faster[name, 1],
                        faster[name, 16],
                    ]
                )
    title = ("encoder", "backend", "bundle", "same labels", "accuracy: float32, int8")
    return table((*title, "encoder in int8", "one image", "16 images"), rows)


def tuned() -> dict[str, Any]:
    """The branches on tuned encoders, joined over seeds: `fit`'s trainings, and `ablate`'s of other
    seeds."""
    reports = [read("cpu-grocery-tuned-ablation"), read("cpu-grocery-tuned")]
    by_seed = {run["seed"]: run for report in reports for run in report["runs"]}
    names = ("baseline", "alignment", "refined", "MARNet")
    runs = [
        {"seed": seed, "rows": {name: by_seed[seed]["rows"][name] for name in names}}
        for seed in sorted(by_seed)
    ]
    images = reports[0]["test_images"]
    return {"test_images": images, "summary": summarise(runs), "pairs": compare(runs), "runs": runs}


PARTS: dict[str, Callable[[], str]] = {
    "speed": speed,
    "loop": partial(loop, "cpu-loop"),
    "native-loop": partial(loop, "cpu-native-loop"),
    "loop-batches": partial(loop, "cpu-loop-batches"),
    "int8-loop": int8_loop,
    "native-end-to-end": native_end_to_end,
    "busy": busy,
    "busy-training": busy_training,
    "busy-loop": busy_loop,
    "serving": serving,
    "soak": soak,
    **{model: partial(real_size, model) for model in ("vit-b16", "swin-t", "resnet-50")},
    **{f"{m}-over-peers": partial(over_peers, m) for m in ("vit-b16", "swin-t", "resnet-50")},
    "auto": auto,
    "tensorrt": tensorrt,
    "digits": digits,
    "digits-accuracy": digits_accuracy,
    "digits-ablation": partial(
        ablation,
        "cpu-digits-ablation",
        "{images} test pictures, {seeds} training seeds. Points are differences to the baseline on "
        "the same pictures.",
    ),
    "plates": plates,
    "grocery": grocery,
    "grocery-ablation": partial(
        ablation,
        "cpu-grocery-ablation",
        "{images} test photographs, {seeds} training seeds. Points are differences to the baseline "
        "on the same photographs.",
    ),
    "grocery-tuned": lambda: rows_of(
        tuned(),
        "{images} test photographs, {seeds} training seeds. Points are differences to the baseline "
        "on the same photographs.",
    ),
    "grocery-tuned-ablation": partial(
        ablation,
        "cpu-grocery-tuned-ablation",
        "{images} test photographs, {seeds} training seeds.",
    ),
    "plates-ablation": partial(
        ablation,
        "cpu-plates-ablation",
        "{images} test pictures, {seeds} training seeds.",
        ("other fusions",),
    ),
    "grocery-seda": partial(
        ablation,
        "cpu-grocery-seda",
        "{images} test photographs, {seeds} training seeds.",
        ("other fusions", "alignment with the texts"),
    ),
    "int8-encoders": int8_encoders,
    "pareto": pareto,
}


def written(page: str) -> str:
    """The text of a page with its parts as the results have them now."""
    return _PART.sub(lambda m: f"{m[1]}\n{PARTS[m['name']]()}\n\n{m[3]}", page)


def main() -> None:
    for path in PAGES:
        path.write_text(written(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

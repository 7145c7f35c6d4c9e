"""Export MARNets of real sizes through every backend and precision, and measure them beside peers.

    python benchmarks/real_size.py --model vit-b16 --output benchmarks/results/NAME.json
    python benchmarks/real_size.py --checkpoint runs/grocery --output benchmarks/results/NAME.json

The weights of a `--model` are random (but for those of EfficientNet-Lite0's encoder), because none
can be downloaded here: the figures say how fast it is and how far a bundle is from the float32
model, and nothing about accuracy. A `--checkpoint` has been trained; its samples are read from
their files, by the same code for all. With `--loop graph --loop native`, each bundle is built with
both loops, and the fastest with the native one is held to the fastest with the graph's. Every
export runs in a process of its own, so that its peak memory can be told. Then all bundles and all
peers answer the same images in turn, in one process with the same threads. Takes a quarter of an
hour for each model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from marnet_bench.machine import describe_machine
from marnet_bench.photographs import golden_images
from marnet_bench.timing import Seconds, interleave, speedup_interval, summarise
from marnet_export.build.builder import BUILDERS, builder
from marnet_export.build.opened import runs_here
from marnet_export.build.types import PRECISIONS
from marnet_export.settings import LOOPS, Settings
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import print_table, say
from marnet_train.checkpoint import load_checkpoint
from random_models import MODELS, write_checkpoint
from whole_peers import Logits, peers

BATCHES = (1, 16)
TRAINED_AGREEMENT = 0.99  # with float32, that every bundle of a trained model has to have
TARGETS = ("sm80", "sm86", "sm89", "sm120")  # of engines, where there is no GPU to run them on


# Exports


def builds(
    text: bool = True,
    only: Sequence[str] = (),
    min_agreement: float = 0.0,
    loops: Sequence[str] = ("auto",),
) -> Iterator[Settings]:
    """Every backend in every precision, and int8 also with the rest in bf16.

    With random weights many answers are close calls, so agreement is told and not asked for, which
    is what `min_agreement` = 0 means.
    Engines are built ahead of time where they cannot run: then they are not timed.

    Args:
        only: of these, as in "openvino int8"; none: all.
        loops: what runs the loop of each; only backends that have a place for it get "native".
    """
    named = [(b, p, None) for b in BUILDERS for p in PRECISIONS]
    for backend, precision, compute in [*named, ("openvino", "int8", "bf16")]:
        if not only or f"{backend} {precision}" in only:
            targets = TARGETS if backend == "tensorrt" and not runs_here(backend) else ()
            kept = {
                "text": text,
                "source": False,
                "min_agreement": min_agreement,
                "targets": targets,
            }
            # The one backend that has no int8 loop.
            typed = "fp16" if (backend, precision) == ("tensorrt", "int8") else None
            for loop in loops:
                if loop != "native" or builder(backend).head is not None:
                    yield Settings(
                        backend, precision, compute, loop_precision=typed, loop=loop, **kept
                    )


def export_apart(checkpoint: Path, output: Path, settings: Settings) -> dict[str, Any]:
    """One export in a process of its own: what became of it, its seconds, memory and size."""
    job = {"checkpoint": str(checkpoint), "output": str(output), "data": None}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as asked:
        answered = Path(folder) / "answer.json"
        job |= {"answer": str(answered), "answers": str(Path(folder) / "reference")}
        json.dump(job | {"settings": asdict(settings)}, asked)
        asked.seek(0)
        started = time.perf_counter()
        command = [sys.executable, "-m", "marnet_export.choose.race"]
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=asked, stdout=nowhere, stderr=nowhere)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        answer = json.loads(answered.read_text("utf-8")) if answered.exists() else {}
    row: dict[str, Any] = {
        "backend": settings.backend,
        "precision": settings.precision,
        "compute": settings.compute,
        "export_s": round(seconds, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }
    if process.returncode:
        return row | {"refused": f"the process ended with {process.returncode}"}
    if "refused" in answer:
        return row | {"refused": answer["refused"]}
    sizes = {
        folder: sum(f.stat().st_size for f in (output / folder).rglob("*") if f.is_file())
        for folder in (".", "payload", "text")
    }
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    fidelity = json.loads((output / "fidelity.json").read_text("utf-8"))
    return row | {
        "compute": manifest["precision"]["compute"],
        "receipt": manifest["precision"]["receipt"]["all"],
        "agreement": answer["agreement"],
        "logit_error": fidelity["logit_error_max"] / fidelity["largest_logit"],
        "bundle_mb": round(sizes["."] / 1e6, 1),
        "payload_mb": round(sizes["payload"] / 1e6, 1),
        "text_mb": round(sizes["text"] / 1e6, 1),
    }


def choose(checkpoint: Path, output: Path, precision: str) -> dict[str, Any]:
    """Return what `marnet-export` picks if nobody names a backend, and how it ranked the others."""
    started = time.perf_counter()
    options = ["--checkpoint", checkpoint, "--output", output, "--precision", precision]
    options += ["--min-agreement", "0", "--no-text", "--no-source"]
    command = [Path(sys.executable).with_name("marnet-export"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {
        "name": f"marnet auto {precision}",
        "precision": precision,
        "export_s": round(time.perf_counter() - started, 1),
    }
    if done.returncode:
        return row | {"refused": done.stderr.strip().splitlines()[-1]}
    fidelity = json.loads((output / "fidelity.json").read_text("utf-8"))
    return row | {"agreement": fidelity["top1_agreement"], "ranked": fidelity["backends"]}


# Measuring


def measure(
    calls: Mapping[str, Logits], images: Callable[[int], Any], duration: float
) -> Iterator[tuple[int, dict[str, Seconds]]]:
    """Everything in turn, for each number of images in a call; `images` gives as many of them."""
    for batch in BATCHES:
        say(f"batch {batch}: {len(calls)} candidates in turn, {duration:g} s or more")
        bound = {name: partial(call, images(batch)) for name, call in calls.items()}
        yield batch, interleave(bound, warmup=2, duration=duration, min_rounds=5)


# Whose fastest bundle is held to whose fastest peer: int8 has no peer, fp16 is computed in fp32.
COMPARED = (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"), ("int8", "bf16"))


def ratios(taken: Mapping[str, Seconds], precision: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The fastest bundle of each precision over the fastest peer that it is held to, and over the
    fastest bundle whose loop the graph runs, where bundles have both loops.
    """

    def fastest(kind: str, among: Callable[[str], bool]) -> list[str]:
        names = [n for n in taken if precision[n] == kind and among(n)]
        return sorted(names, key=lambda n: float(np.median(taken[n])))[:1]

    pairs = [
        (fastest(ours, _is_ours), fastest(theirs, lambda name: not _is_ours(name)))
        for ours, theirs in COMPARED
    ]
    pairs += [
        (
            fastest(kind, lambda n: n.endswith(" native")),
            fastest(kind, lambda n: n.endswith(" graph")),
        )
        for kind, _ in COMPARED
    ]
    for mine, other in (pair for both in pairs for pair in product(*both)):
        ratio, low, high = speedup_interval(taken[other], taken[mine])
        yield {"bundle": mine, "peer": other, "ratio": ratio, "low": low, "high": high}


def _is_ours(name: str) -> bool:
    return name.startswith("marnet")


def run_auto(name: str, train_steps: int, precisions: Sequence[str]) -> dict[str, Any]:
    """Report what is picked for one model."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / name
        write_checkpoint(checkpoint, name, train_steps)
        rows = []
        for precision in precisions:
            say(f"export marnet auto {precision}")
            rows.append(choose(checkpoint, Path(scratch) / precision, precision))
    about = {"what": __doc__, "model": name, "train_steps": train_steps, "trained": False}
    return about | {"rows": rows, "ratios": [], "machine": describe_machine()}


def run(
    name: str,
    train_steps: int,
    duration: float,
    *,
    text: bool = True,
    only: Sequence[str] = (),
    loops: Sequence[str] = ("auto",),
    trained: Path | None = None,
) -> dict[str, Any]:
    """Export, open and measure everything of one model.

    Args:
        loops: what runs the loop of each bundle; several: it is built with each.
        trained: a checkpoint, whose samples are read from files; None: random weights, from pixels.
    """
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = trained or Path(scratch) / name
        if trained is None:
            write_checkpoint(checkpoint, name, train_steps)
        rows, calls, precision = [], {}, {}
        opened: list[Classifier] = []
        least = 0.0 if trained is None else TRAINED_AGREEMENT
        for settings in builds(text, only, least, loops):
            rest = f"-{settings.compute}" if settings.compute else ""
            rest += f" {settings.loop}" if len(loops) > 1 else ""
            key = f"marnet {settings.backend} {settings.precision}{rest}"
            path = Path(scratch) / key.replace(" ", "-")
            say(f"export {key}")
            rows.append({"name": key, **export_apart(checkpoint, path, settings)})
        for row in rows:  # only now: a process starts with the peak memory of the one that made it
            if "refused" not in row and runs_here(row["backend"]):
                path = Path(scratch) / row["name"].replace(" ", "-")
                opened.append(Classifier(path, threads=threads))
                calls[row["name"]] = opened[-1].logits
                precision[row["name"]] = row["precision"]
        if not opened:
            return _report(name, train_steps, trained is not None, text, threads, rows, [])
        say("opening the peers")
        preprocess, files = opened[0].preprocess, golden_images(opened[0].bundle, max(BATCHES))
        pixels = preprocess.pixels(files)
        for framework, kind, call in peers(checkpoint, opened[0], pixels, threads):
            key = f"{framework} {kind}"
            rows.append({"name": key, "precision": kind})
            calls[key], precision[key] = call, kind
        images: Any = pixels
        if trained is not None:
            calls = {
                n: (lambda some, c=call: c(preprocess.pixels(some))) for n, call in calls.items()
            }
            images = files
        compared = []
        for batch, taken in measure(calls, lambda batch: images[:batch], duration):
            compared += [{"batch": batch, **ratio} for ratio in ratios(taken, precision)]
            for row in rows:
                if row["name"] in taken:
                    summary = asdict(summarise(taken[row["name"]], batch))
                    row.setdefault("latency", {})[str(batch)] = summary
    return _report(name, train_steps, trained is not None, text, threads, rows, compared)


def _report(
    name: str,
    train_steps: int,
    trained: bool,
    text: bool,
    threads: int,
    rows: list[dict[str, Any]],
    compared: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "what": __doc__,
        "model": name,
        "train_steps": train_steps,
        "trained": trained,
        "text": text,
        "threads": threads,
        "rows": rows,
        "ratios": compared,
        "machine": describe_machine(),
    }


def show(report: dict[str, Any]) -> None:
    """The report as two tables."""
    lines = []
    for row in report["rows"]:
        times = [
            f"{row['latency'][str(b)]['p50_ms']:.1f}" if "latency" in row else "" for b in BATCHES
        ]
        rate = f"{row['latency'][str(BATCHES[-1])]['images_per_s']:.1f}" if "latency" in row else ""
        agreement = f"{row['agreement']:.1%}" if "agreement" in row else row.get("refused", "")[:60]
        if ranked := row.get("ranked"):
            order = (
                f"{c['backend']} {c['milliseconds']['1']:.1f} ms"
                for c in ranked
                if c["milliseconds"]
            )
            agreement += f" ({', '.join(order)})"
        more = [str(row.get(k, "")) for k in ("export_s", "peak_mb", "bundle_mb")]
        lines.append((row["name"], agreement, *times, rate, *more))
    columns = ("", "agreement", *(f"ms at {b}" for b in BATCHES), "images/s")
    what = "trained, from files" if report["trained"] else "random weights, from pixels"
    title = f"{report['model']}, T = {report['train_steps']}, {what}"
    print_table(title, (*columns, "export s", "peak MB", "bundle MB"), lines)
    compared = []
    for r in report["ratios"]:
        interval = f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        compared.append((str(r["batch"]), r["bundle"], r["peer"], interval))
    print_table("fastest bundle, fastest peer", ("batch", "bundle", "peer", "ratio"), compared)


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="vit-b16", show_default=True)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A trained one, in place of --model."
)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--train-steps", type=click.IntRange(1), default=100, show_default=True, help="T.")
@click.option(
    "--duration", type=float, default=20.0, show_default=True, help="Seconds for each batch size."
)
@click.option("--text/--no-text", default=True, help="Export the text encoder, BERT-base, too.")
@click.option("--only", multiple=True, help='Export just this, as in "openvino int8".')
@click.option(
    "--loop",
    "loops",
    type=click.Choice(LOOPS),
    multiple=True,
    default=("auto",),
    help="What runs the loop; named twice, each bundle is built with both.",
)
@click.option(
    "--auto", multiple=True, metavar="PRECISION", help="See what --backend auto picks, no more."
)
def main(
    model: str,
    checkpoint: Path | None,
    output: Path,
    train_steps: int,
    duration: float,
    text: bool,
    only: tuple[str, ...],
    loops: tuple[str, ...],
    auto: tuple[str, ...],
) -> None:
    """Export and measure at real sizes, with random weights or those of a checkpoint."""
    if checkpoint is not None and auto:
        raise click.UsageError("--auto goes with --model, not with --checkpoint: leave one out")
    if checkpoint is not None:
        steps = load_checkpoint(checkpoint).model.config.schedule.steps
        chosen: dict[str, Any] = {"text": text, "only": only, "loops": loops}
        report = run(checkpoint.name, steps, duration, **chosen, trained=checkpoint)
    elif auto:
        report = run_auto(model, train_steps, auto)
    else:
        report = run(model, train_steps, duration, text=text, only=only, loops=loops)
    output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    show(report)


if __name__ == "__main__":
    main()

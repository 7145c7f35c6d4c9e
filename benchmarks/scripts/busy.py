"""Training and every CPU backend on an idle machine, beside a busy process on each core, and under
a quota of one CPU: ours and plain PyTorch in turn, and ours alone with as many threads as it takes
and with one, in turn.

    python benchmarks/scripts/busy.py --bundles bundles --data data/digits --out busy.json

The folder of --bundles holds torchscript.marnet, onnxruntime.marnet and so on, each with its
checkpoint inside. Every measurement is a command in a process of its own, with the environment of
this one but for OpenMP's variables. Plain PyTorch runs in the process of the bundle, so it has the
number of threads and the waiting that marnet chooses, which serve it better than its own where
cores are shared. With --loop, every way to run the reverse loop takes turns in one process, among
them the native loop and the graphs of the runtimes. The quota needs a control group that may be
written, v1 or v2; otherwise it is left out, and the record says why.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import click

from marnet_bench.machine import describe_machine
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.cpus import cpus

BACKENDS = ("torchscript", "aotinductor", "onnxruntime", "openvino")
GROUPS = Path("/sys/fs/cgroup")
TURNS = 3
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
Words = Sequence[object]  # of a command


@contextmanager
def idle() -> Iterator[Words]:
    """Nothing else runs."""
    yield ()


@contextmanager
def busy() -> Iterator[Words]:
    """One process for each CPU does nothing but compute."""
    with ExitStack() as stack:
        for _ in range(cpus().allowed):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while 1: pass"]))
            stack.callback(process.kill)
        yield ()


@contextmanager
def quota() -> Iterator[Words]:
    """A control group grants one CPU. What is yielded stands before a command and puts it there.

    Raises:
        OSError: the group cannot be made here.
    """
    first = (GROUPS / "cpu/cpu.cfs_quota_us").exists()
    group = GROUPS / ("cpu" if first else "") / f"marnet-busy-{os.getpid()}"
    group.mkdir()
    try:
        name, text = ("cpu.cfs_quota_us", "100000") if first else ("cpu.max", "100000 100000")
        (group / name).write_text(text)
        yield "sh", "-c", 'echo $$ > "$0" && exec "$@"', group / "cgroup.procs"
    finally:
        group.rmdir()


CONDITIONS = {"idle": idle, "busy": busy, "quota of 1": quota}


@click.command(cls=Command)
@click.option("--bundles", type=_FOLDER, help="Folder with BACKEND.marnet. Else none is measured.")
@click.option("--data", type=_FOLDER, help="The digits. Without it no training is measured.")
@click.option("--epochs", default=2, show_default=True, help="Of each phase of the training.")
@click.option("--loop", "loops", type=int, multiple=True, help="Batch size of the loop scenario.")
@click.option("--steps", default=100, show_default=True, help="Of the loop scenario.")
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, default=BACKENDS)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 64), show_default=True)
@click.option("--condition", "names", type=click.Choice([*CONDITIONS]), multiple=True,
              default=[*CONDITIONS])  # fmt: skip
@click.option("--duration", default=2.0, show_default=True, help="Seconds for each input.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    bundles: Path | None,
    data: Path | None,
    epochs: int,
    loops: Sequence[int],
    steps: int,
    backends: Sequence[str],
    batches: Sequence[int],
    names: Sequence[str],
    duration: float,
    out: Path,
) -> None:
    """Measure training and bundles beside other work, write the record and print its tables."""
    if bundles is None and data is None and not loops:
        raise click.UsageError("nothing to measure; give --bundles, --data or --loop")
    found: dict[str, Any] = {"machine": describe_machine(), "left_out": {}}
    found |= {"lines": [], "training": [], "loops": []}
    for name in names:
        with ExitStack() as stack:
            try:
                before = stack.enter_context(CONDITIONS[name]())
            except OSError as error:
                found["left_out"][name] = str(error)
                continue
            if bundles is not None:
                found["lines"] += [
                    {"condition": name, "backend": backend, "batch": batch}
                    | measured(before, bundles / f"{backend}.marnet", batch, duration)
                    for backend in backends
                    for batch in batches
                ]
            if data is not None:
                found["training"].append({"condition": name} | trained(before, data, epochs))
            for batch in loops:
                report = benched(
                    before, duration, "--scenario", "loop", "--batch", batch, "--steps", steps
                )
                found["loops"].append({"condition": name, "steps": steps, "lines": report["lines"]})
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found, names)


def measured(before: Words, bundle: Path, batch: int, duration: float) -> dict[str, Any]:
    """A bundle beside plain PyTorch, then alone with its own number of threads and with one.

    Returns:
        For "bytes" (image files to logits) and "pixels": ours_ms, peer_ms, ratio with low and high;
        alone_ms and one_thread_ms, the medians of `TURNS` runs each; and the threads and CPUs of
        the first run. All times are medians of calls.
    """
    options = "--model", bundle, "--batch", batch
    both = benched(before, duration, *options)
    alone, single = [], []
    for _ in range(TURNS):
        for reports, more in ((alone, ()), (single, ("--threads", 1))):
            reports.append(benched(before, duration / 2, *options, "--no-peer", *more))
    found = {"threads": both["threads"], "cpus": both["machine"]["cpus"]}
    for ratio in both["speedups"]:
        kind = ratio["input"]
        found[kind] = {
            "ours_ms": median(both, "bundle", kind),
            "peer_ms": median(both, ratio["over"], kind),
            "alone_ms": statistics.median(median(x, "bundle", kind) for x in alone),
            "one_thread_ms": statistics.median(median(x, "bundle", kind) for x in single),
        } | {key: ratio[key] for key in ("ratio", "low", "high")}
    return found


def benched(before: Words, duration: float, *options: object) -> dict[str, Any]:
    """The report of marnet-bench."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        usual = "--warmup", 2, "--format", "json", "--duration", duration, "--output", report
        run(before, "marnet_bench", *usual, *options)
        return json.loads(report.read_text("utf-8"))


def median(report: dict[str, Any], model: str, kind: str) -> float:
    """The median call of a candidate, in milliseconds."""
    (line,) = (x for x in report["lines"] if (x["model"], x["input"]) == (model, kind))
    return line["p50_ms"]


def trained(before: Words, data: Path, epochs: int) -> dict[str, float]:
    """Seconds of `marnet-train fit` with the recipe of the digits, cut short; as it chooses its
    threads, and with one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "short.toml"
        whole = (resources.files("marnet_train") / "recipes/digits.toml").read_text("utf-8")
        recipe.write_text(re.sub(r"(?m)^epochs = \d+", f"epochs = {epochs}", whole), "utf-8")
        options = "--data", data, "--recipe", recipe, "--out", Path(scratch) / "run", "--force"
        for name, variables in (("ours_s", {}), ("one_thread_s", {"OMP_NUM_THREADS": "1"})):
            started = time.perf_counter()
            run(before, "marnet_train", "fit", *options, **variables)
            seconds[name] = round(time.perf_counter() - started, 1)
    return seconds


def run(before: Words, package: str, *options: object, **variables: str) -> None:
    """One of marnet's commands, in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    code = f"from {package}.cli import main; main()"
    command = [*map(str, before), sys.executable, "-c", code, *map(str, options)]
    done = subprocess.run(
        command, env=kept | variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise click.ClickException(f"{package} ended with {done.returncode}: {done.stderr}")


def print_found(found: dict[str, Any], names: Sequence[str]) -> None:
    """A table: a row for each backend and batch, and a column for each condition."""
    rows: dict[str, dict[str, str]] = {}
    for line in found["lines"]:
        row = rows.setdefault(f"{line['backend']}, batch {line['batch']}", {})
        row[line["condition"]] = cell(line["bytes"])
    for seconds in found["training"]:
        text = f"{seconds['ours_s']} s; 1 thread {seconds['one_thread_s']} s"
        rows.setdefault("training", {})[seconds["condition"]] = text
    if rows:
        title = "from image files: ours, plain PyTorch, their ratio with its 95 % interval"
        table = ([name, *(row.get(x, "") for x in names)] for name, row in rows.items())
        print_table(title, ["", *names], table)
    for loop in found["loops"]:
        times = ([x["model"], x["precision"], f"{x['p50_ms']:.1f}"] for x in loop["lines"])
        batch = loop["lines"][0]["batch"]
        title = f"{loop['condition']}: {loop['steps']} steps, batch {batch}, ms"
        print_table(title, ["loop", "precision", "median"], times)
    for name, reason in found["left_out"].items():
        say(f"{name}: left out, {reason}")


def cell(x: dict[str, float]) -> str:
    """One line as a cell."""
    ratio = f"{x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f})"
    ours, peer = (f"{x[k]:.1f}" for k in ("ours_ms", "peer_ms"))
    alone, single = (f"{x[k]:.1f}" for k in ("alone_ms", "one_thread_ms"))
    return f"{ours} ms, {peer} ms, {ratio}; alone {alone} ms, 1 thread {single} ms"


if __name__ == "__main__":
    main()

"""Training and every CPU backend on an idle machine, beside a busy process on each core, and under
a quota of one CPU; ours and plain PyTorch in turn.

    python benchmarks/scripts/busy.py --checkpoint runs/digits --data data/digits --out busy.json

The quota needs root and a writable control group, v1 or v2; without them it is left out, and the
record says why. Every measurement is made in a process of its own, with the environment of this one
but for OpenMP's variables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marnet_bench.machine import describe_machine

BACKENDS = ("torchscript", "aotinductor", "onnxruntime", "openvino")
BATCHES = (1, 64)
_BUSY = "while True: pass"
_PARENT = Path("/sys/fs/cgroup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="data set of the training")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--bundles", type=Path, help="folder with BACKEND.marnet; else exported")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds a measurement")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.bundles = options.bundles or _export(options, Path(scratch))
        found: dict[str, Any] = {"machine": describe_machine(), "conditions": {}}
        for name, condition in {"idle": _idle, "busy": _busy, "quota of 1": _quota}.items():
            try:
                with condition() as join:
                    found["conditions"][name] = _measure(options, Path(scratch), join)
            except OSError as error:
                found["conditions"][name] = {"left out": str(error)}
            options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


Join = Callable[[], object]  # what a measuring process does before it begins


@contextmanager
def _idle() -> Iterator[Join]:
    yield lambda: None


@contextmanager
def _busy() -> Iterator[Join]:
    """One process for each CPU that does nothing but compute."""
    cpus = sorted(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in cpus]
    try:
        yield lambda: None
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def _quota() -> Iterator[Join]:
    """A control group that grants one CPU.

    Raises:
        OSError: it cannot be made here.
    """
    first = (_PARENT / "cpu/cpu.cfs_quota_us").exists()
    group = _PARENT / ("cpu" if first else "") / f"marnet-busy-{os.getpid()}"
    group.mkdir()
    try:
        name, text = ("cpu.cfs_quota_us", "100000") if first else ("cpu.max", "100000 100000")
        (group / name).write_text(text)
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def _export(options: argparse.Namespace, folder: Path) -> Path:
    for backend in options.backends:
        command = ["marnet_export.cli", "--backend", backend, "--output", folder / backend]
        _run([*command, "--checkpoint", options.checkpoint, "--no-text", "--no-source"])
        (folder / backend).rename(folder / f"{backend}.marnet")
    return folder


def _measure(options: argparse.Namespace, scratch: Path, join: Join) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for backend in options.backends:
        for batch in BATCHES:
            report = scratch / "bench.json"
            bundle = options.bundles / f"{backend}.marnet"
            command = ["marnet_bench.cli", "--model", bundle, "--batch", batch, "--output", report]
            command += ["--checkpoint", options.checkpoint, "--duration", options.duration]
            _run([*command, "--warmup", 2, "--format", "json"], join)
            read = json.loads(report.read_text("utf-8"))
            kept = {k: read[k] for k in ("threads", "speedups")}
            lines = [{k: v for k, v in x.items() if k != "seconds"} for x in read["lines"]]
            found[f"{backend}, batch {batch}"] = kept | {
                "lines": lines,
                "cpus": read["machine"]["cpus"],
            }
    if not options.no_training:
        started = time.perf_counter()
        command = ["marnet_train.cli", "fit", "--data", options.data, "--recipe", options.recipe]
        _run([*command, "--out", scratch / "run", "--force"], join)
        found["training"] = {"seconds": round(time.perf_counter() - started, 1)}
    return found


def _run(words: list[Any], join: Join | None = None) -> None:
    """One of marnet's commands, in a process of its own."""
    module, *arguments = map(str, words)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    code = f"from {module} import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, env=kept, preexec_fn=join, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

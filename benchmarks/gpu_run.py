"""A first run on a GPU: its tests and all speeds, most important first, in twelve minutes.

    make gpu                                                  # in .venv
    python benchmarks/gpu_run.py --output FOLDER              # where the packages are there already
    python benchmarks/gpu_run.py --output FOLDER --dry-run    # the whole plan, without a GPU

FOLDER gets run.json (what became of each part, written after each), log.txt (a line for each test
as it ends) and suite.json (see gpu_suite.py, which writes it after each line). A part that takes
longer than it may is ended; one for which no time is left is named and left out. A dry run finds
the tests and rehearses the suite on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gpu_suite import CARD, FOLDERS, ROOT, SECONDS, query, use_checkout

BUDGET = 720.0  # seconds for all parts
LEAST = 10.0  # seconds; with less left, a part is not begun
_GRACE = 20.0  # seconds that the suite may take beyond its own limit


class Part(NamedTuple):
    """Something to run, in a process of its own."""

    name: str
    seconds: float  # after which it is ended
    tests: tuple[str, ...] = ()  # arguments of pytest; none: the suite


# The first ones and the suite fit, whatever they take; the others have what those leave over.
# What the suite measures is not tested once more (tests/bench/test_gpu_suite.py).
PLAN = (
    Part("loop kernel", 100, ("tests/kernels/test_persistent.py", "-k", "not sanitizer")),
    Part("driver and loop", 40, ("tests/sdk/test_driver.py", "tests/sdk/test_persistent_loop.py")),
    Part("torch runtime", 60, ("tests/sdk/test_torch_cuda.py",)),
    Part("TensorRT runtime", 60, ("tests/sdk/test_backend_tensorrt.py", "-k", "not played")),
    Part("suite", SECONDS),
    Part("kernel parts", 60, ("tests/kernels/test_loader.py", "tests/kernels/test_emulator.py")),
    Part("bundles", 240, ("tests/export/test_pipeline.py",)),
    Part("torch-tensorrt", 120, ("tests/export/test_torch_tensorrt.py",)),
    Part("aotinductor", 240, ("tests/sdk/test_backend_aotinductor.py",)),
    Part("loop kernel, all forms", 240, ("tests/kernels/test_persistent.py", "-m", "gpu and slow")),
    Part("sanitizer", 240, ("tests/kernels/test_persistent.py", "-k", "sanitizer")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan: 0 if nothing failed, 1 if something did, 5 if there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new or empty")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="the whole plan, without a GPU")
    asked = parser.parse_args(arguments)
    use_checkout()
    from marnet_sdk.errors import BackendUnavailable
    from marnet_sdk.gpu.tensorrt_library import find_device

    try:
        gpu = "none, a dry run" if asked.dry_run else str(find_device())
    except BackendUnavailable as error:
        print(f"no GPU here: {error}; to walk the plan, add --dry-run", file=sys.stderr)
        return error.exit_code
    folder: Path = asked.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} has files in it; name a new folder, as in make gpu OUT=DIR")
    report = run(PLAN, folder, asked.seconds, gpu=gpu, dry=asked.dry_run)
    bad = sum(part["outcome"] in ("failed", "ended") for part in report["parts"])
    print(f"{folder}: {bad} of {len(PLAN)} parts failed")
    return 1 if bad else 0


def run(
    plan: Sequence[Part], folder: Path, seconds: float, *, gpu: str, dry: bool
) -> dict[str, Any]:
    """Run each part in turn and note in FOLDER/run.json what became of it."""
    end = time.monotonic() + seconds
    parts: list[dict[str, Any]] = []
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"gpu": gpu, "card": query(CARD), "date": date, "seconds": seconds, "parts": parts}
    for part in plan:
        started = time.monotonic()
        most = min(part.seconds, end - started)
        outcome, says = "left out", f"{max(most, 0):.0f} s were left for it"
        if most >= LEAST:
            outcome, says = _run(_command(part, folder, most, dry), folder / "log.txt", most)
        took = round(time.monotonic() - started, 1)
        parts.append({"name": part.name, "outcome": outcome, "seconds": took, "says": says})
        print(f"{part.name}: {outcome} after {took} s: {says}", flush=True)
        (folder / "run.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return report


def _command(part: Part, folder: Path, seconds: float, dry: bool) -> list[str]:
    if not part.tests:
        suite = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py")]
        suite += ["--output", str(folder / "suite.json"), "--seconds", str(seconds - _GRACE)]
        return [*suite, "--dry-run"] if dry else suite
    how = ["--collect-only", "-q"] if dry else ["-v"]
    return [sys.executable, "-m", "pytest", "-m", "gpu and not slow", *how, *part.tests]


def _run(command: list[str], log: Path, seconds: float) -> tuple[str, str]:
    """Run a command and return what became of it, and its last line."""
    folders = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        begins = out.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            outcome = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "ended"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_bytes()[begins:].decode(errors="replace").split("\n")
    return outcome, next((line.strip("= ") for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())

"""Everything that is said of speed on a GPU, measured in one run of less than eight minutes.

    python benchmarks/gpu_suite.py --output FILE.json            # on a machine with a CUDA device
    python benchmarks/gpu_suite.py --dry-run --output FILE.json  # every section, on a CPU, tiny
    python benchmarks/gpu_suite.py --table FILE.json             # as Markdown

Runs from a checkout of the sources, whether or not marnet is installed, and needs torch,
transformers, NumPy, Pillow, safetensors and cuda-bindings with NVRTC, and nothing else. What cannot
be measured is a line that says why. So is a kernel that takes its process with it: every section
runs in a process of its own, and goes on without that line in another one. The file is written
after every line, so what a run that is cut short has measured is kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sdk", "kernels", "train", "export", "benchmarks")

# The sections in their order, and what part of the time each may take.
SHARES = {"ceilings": 0.06, "loop": 0.47, "pipeline": 0.39, "images": 0.08}
SECONDS = 450.0  # for all of them
BACKENDS = ("torchscript", "tensorrt")  # aotinductor compiles for minutes; it is for another run
_GRACE = 15.0  # seconds behind its end after which a section is given up
_PATIENCE = 120.0  # seconds for the first use of the device
_MOST_LOST = 8  # lines of a section that may take its process with them
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
CARD = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
PACKAGES = ("torch", "triton", "transformers", "numpy", "pillow", "safetensors", "timm")
PACKAGES += ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "tensorrt", "torchvision")


def use_checkout() -> None:
    """Make the packages of this checkout importable, in front of any that are installed."""
    sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="what was measured")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), help="sections to measure")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=BACKENDS,
        choices=(*BACKENDS, "aotinductor"),
        help="of ours, in the pipeline",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all sections together")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, without meaning")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print it as Markdown")
    asked = parser.parse_args(arguments)
    if asked.table:
        use_checkout()
        from gpu_sections.tables import markdown

        print(markdown(json.loads(asked.table.read_text("utf-8"))))
        return 0
    if not asked.output:
        parser.error("got no --output, expected the file to write")
    use_checkout()
    sections = [name for name in SHARES if not asked.only or name in asked.only]
    suite = Suite(asked.output, asked.seconds, tiny=asked.dry_run, backends=asked.backends)
    if suite.run(sections):
        return 0
    print("no CUDA device here; to rehearse on the CPU, add --dry-run", file=sys.stderr)
    return 5


class Suite:
    """One run: its report, which is written to the file again and again."""

    def __init__(
        self,
        output: Path,
        seconds: float,
        *,
        tiny: bool,
        backends: Sequence[str] = BACKENDS,
        grace: float = _GRACE,
    ) -> None:
        self.output, self.seconds, self.tiny, self.backends = output, seconds, tiny, backends
        self.grace = grace
        self.started = time.monotonic()
        self.report: dict[str, Any] = {
            "what": (__doc__ or "").partition("\n")[0],
            "format": 1,
            "dry_run": tiny,
            "seconds": seconds,
            "machine": {},
            "sections": {},
        }

    def run(self, names: list[str]) -> bool:
        """Every section in turn; what one does not use of its time, the others have.

        Returns:
            Whether there is a device to measure; else nothing is written.
        """
        from gpu_sections.child import run_apart

        for name in names:  # here, or the process of each section would take seconds for it
            with suppress(Exception):  # its section says why
                importlib.import_module(f"gpu_sections.{name}")
        if why := run_apart(
            partial(_describe, self.tiny), self.report["machine"].update, _PATIENCE
        ):
            raise RuntimeError(f"asking for the machine: {why}")
        if not self.report["machine"]:
            return False
        for i, name in enumerate(names):
            share = SHARES[name] / sum(SHARES[other] for other in names[i:])
            left = self.seconds - (time.monotonic() - self.started)
            self._section(name, share * left)
        self.report["took_s"] = round(time.monotonic() - self.started, 1)
        self.write()
        return True

    def _section(self, name: str, seconds: float) -> None:
        """Measure it in a process of its own, and in another where that comes to its end early."""
        from gpu_sections.child import run_apart

        say(f"{name}: {seconds:.0f} s or less")
        started, lines = time.monotonic(), []
        entry: dict[str, Any] = {"lines": lines, "clocks": [query(CLOCKS)]}
        self.report["sections"][name] = entry
        news: dict[str, Any] = {}
        why: str | None = "no time was left"

        def receive(message: dict[str, Any]) -> None:
            news.update(message)
            found = message.get("found")
            if found and not any(_same(found, old) for old in lines):  # an earlier process had it
                lines.append(found)
                self.write()

        while (left := seconds - (time.monotonic() - started)) > 0:
            news.clear()
            work = partial(self._measure, name, left, list(lines))
            why = run_apart(work, receive, left + self.grace)
            why = why and news.get("lost", why)
            if not why or not news.get("trying") or len(entry.setdefault("lost", [])) == _MOST_LOST:
                break
            say(f"  {news['trying']} took its process with it: {why}")
            lines.append(news["trying"] | {"missing": why})
            entry["lost"].append(why)
        if why := news.get("error", why):
            entry["error"] = why
        entry["clocks"].append(query(CLOCKS))
        entry["seconds"] = round(time.monotonic() - started, 1)
        say(f"{name}: {len(lines)} lines in {entry['seconds']} s")
        self.write()

    def _measure(self, name: str, seconds: float, earlier: list[Any], send: Any) -> None:
        """Run one section; this is what its process does."""
        from gpu_sections.measure import Job, reason

        machine = _machine(self.tiny)
        job = Job(machine, self.tiny, seconds, say, self.backends, earlier=earlier, send=send)
        try:
            importlib.import_module(f"gpu_sections.{name}").run(job)
        except Exception as error:  # the other sections are measured all the same
            traceback.print_exc()
            if machine.is_lost():
                send({"lost": reason(error)})
                os._exit(1)
            send({"error": reason(error)})

    def write(self) -> None:
        """Replace the file: a reader sees all of it or what was there before."""
        fresh = self.output.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.report, indent=1) + "\n", "utf-8")
        fresh.replace(self.output)


def _same(line: dict[str, Any], other: dict[str, Any]) -> bool:
    keys = ("line", "batch", "steps", "precision")
    return all(line.get(key) == other.get(key) for key in keys)


def _machine(tiny: bool) -> Any:
    """The device, with a context that all kernels are loaded into."""
    import torch

    from gpu_sections.measure import Machine

    set_exact()
    machine = Machine(torch.device("cpu" if tiny else "cuda"))
    torch.zeros(1, device=machine.device)
    return machine


def _describe(tiny: bool, send: Any) -> None:
    """Send what the machine is, or nothing where there is no device."""
    import torch

    if tiny or torch.cuda.is_available():
        send(describe(_machine(tiny)))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_exact() -> None:
    """Make float32 mean float32: no TF32 in products and convolutions, which is the default."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def describe(machine: Any) -> dict[str, Any]:
    """The card, its driver, the processor and the versions."""
    import torch

    from marnet_kernels.compile import nvrtc_version
    from marnet_sdk.environment import versions

    found: dict[str, Any] = {
        "card": query(CARD),
        "cuda_of_torch": torch.version.cuda,
        "packages": versions(PACKAGES),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        found["nvrtc"] = list(nvrtc_version())
    except RuntimeError as error:
        found["nvrtc"] = str(error)
    if machine.is_cuda:
        card = torch.cuda.get_device_properties(0)
        names = ("name", "multi_processor_count", "L2_cache_size", "total_memory")
        found |= {name: getattr(card, name, None) for name in names}
        found["capability"] = f"{card.major}.{card.minor}"
    return found


def query(fields: str) -> dict[str, str]:
    """Return what nvidia-smi says of the first card now; nothing where it is not there."""
    if not (program := shutil.which("nvidia-smi")):
        return {}
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields.split(","), values, strict=False))


if __name__ == "__main__":
    sys.exit(main())

"""Everything that is said of speed on a GPU, measured in one run of less than eight minutes.

    python benchmarks/gpu_suite.py --output FILE.json            # on a machine with a CUDA device
    python benchmarks/gpu_suite.py --dry-run --output FILE.json  # every section, on a CPU, tiny
    python benchmarks/gpu_suite.py --table FILE.json             # as Markdown

Runs from a checkout of the sources, whether or not marnet is installed, and needs torch,
transformers, NumPy, Pillow, safetensors and cuda-bindings with NVRTC, and nothing else. What cannot
be measured is a line that says why. The file is written after every section, so what a run that is
cut short has measured is kept.
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
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sdk", "kernels", "train", "export", "benchmarks")

# The sections in their order, and what part of the time each may take.
SHARES = {"ceilings": 0.06, "loop": 0.44, "pipeline": 0.36, "images": 0.08, "head": 0.06}
SECONDS = 450.0  # for all of them
BACKENDS = ("torchscript", "tensorrt")  # aotinductor compiles for minutes; it is for another run
_GRACE = 30.0  # seconds behind the end in which a kernel that hangs is given up
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
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print("no CUDA device here; to rehearse on the CPU, add --dry-run", file=sys.stderr)
        return 5
    sections = [name for name in SHARES if not asked.only or name in asked.only]
    suite = Suite(asked.output, asked.seconds, tiny=asked.dry_run, backends=asked.backends)
    suite.run(sections)
    return 0


class Suite:
    """One run: its report, which is written to the file again and again."""

    def __init__(
        self, output: Path, seconds: float, *, tiny: bool, backends: Sequence[str] = BACKENDS
    ) -> None:
        self.output, self.seconds, self.tiny, self.backends = output, seconds, tiny, backends
        self.started = time.monotonic()
        self.report: dict[str, Any] = {
            "what": (__doc__ or "").partition("\n")[0],
            "format": 1,
            "dry_run": tiny,
            "seconds": seconds,
            "machine": {},
            "sections": {},
        }

    def run(self, names: list[str]) -> None:
        """Every section in turn; what one does not use of its time, the others have."""
        import torch

        from gpu_sections.measure import Machine, reason

        set_exact()
        machine = Machine(torch.device("cpu" if self.tiny else "cuda"))
        torch.zeros(1, device=machine.device)  # makes the context that all kernels are loaded into
        self.report["machine"] = describe(machine)
        watch = threading.Timer(self.seconds + _GRACE, self._give_up)
        watch.daemon = True
        watch.start()
        try:
            for i, name in enumerate(names):
                share = SHARES[name] / sum(SHARES[other] for other in names[i:])
                left = self.seconds - (time.monotonic() - self.started)
                self._section(name, machine, share * left, reason)
            self.report["took_s"] = round(time.monotonic() - self.started, 1)
            self.write()
        finally:
            watch.cancel()

    def _section(self, name: str, machine: Any, seconds: float, reason: Any) -> None:
        from gpu_sections.measure import Job

        say(f"{name}: {seconds:.0f} s or less")
        job = Job(machine, self.tiny, seconds, say, self.backends)
        entry: dict[str, Any] = {"lines": job.lines, "clocks": [query(CLOCKS)]}
        self.report["sections"][name] = entry
        try:
            importlib.import_module(f"gpu_sections.{name}").run(job)
        except Exception as error:  # the other sections are measured all the same
            entry["error"] = reason(error)
            traceback.print_exc()
        entry["clocks"].append(query(CLOCKS))
        entry["seconds"] = round(time.monotonic() - job.started, 1)
        say(f"{name}: {len(job.lines)} lines in {entry['seconds']} s")
        self.write()

    def write(self) -> None:
        """Replace the file: a reader sees all of it or what was there before."""
        fresh = self.output.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.report, indent=1) + "\n", "utf-8")
        fresh.replace(self.output)

    def _give_up(self) -> None:
        """A kernel that waits for ever can be ended only with the process."""
        self.report["given_up"] = f"after {self.seconds + _GRACE:g} s, a section had not ended"
        say(self.report["given_up"])
        self.write()
        os._exit(1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_exact() -> None:
    """float32 means float32: no TF32 in products or convolutions, which would be the default."""
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
    """What nvidia-smi says of the first card now; nothing where it is not there."""
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

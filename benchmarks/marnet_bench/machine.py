"""Describe the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from marnet_sdk.cpus import cpus
from marnet_sdk.environment import versions

_PACKAGES = ("marnet", "torch", "onnxruntime", "openvino", "transformers", "numpy", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load, package versions, date."""
    here = cpus()
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "cpus": str(here),
        "limited": here.limited,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "packages": versions(_PACKAGES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

"""Describe the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import psutil

from marnet_sdk.cpus import cpus
from marnet_sdk.environment import processor, versions

_PACKAGES = ("marnet", "torch", "onnxruntime", "openvino", "transformers", "numpy", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load, package versions, date."""
    here = cpus()
    return {
        "processor": processor(),
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

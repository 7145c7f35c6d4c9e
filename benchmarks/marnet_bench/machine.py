"""Describe what a measurement was made on: the machine, and the bundle."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import psutil

from marnet_sdk.backends import IN_GRAPH
from marnet_sdk.classifier import Classifier
from marnet_sdk.cpus import cpus
from marnet_sdk.environment import processor, versions
from marnet_sdk.native_loop import NATIVE

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


def describe_bundle(classifier: Classifier) -> dict[str, Any]:
    """Name the bundle of a classifier, and how it answers."""
    manifest = classifier.bundle.manifest
    point = manifest.sampling.points[classifier.operating_point]
    return {
        "bundle": classifier.bundle.path.name,
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "backend": manifest.backend,
        "precision": asdict(manifest.precision),
        "operating_point": asdict(point),
        "steps": len(point.timesteps),
        "threads": classifier.runtime.threads,
        "fast_decode": classifier.preprocess.fast_decode,
        "loop": _loop(classifier, bool(point.timesteps)),
    }


def _loop(classifier: Classifier, has_steps: bool) -> str:
    """Say what ran the reverse loop."""
    if not has_steps:
        return "none: the alignment branch answers"
    loop = classifier.runtime.loop
    missing = classifier.bundle.manifest.loop == NATIVE and loop == IN_GRAPH
    return loop + ("; the native loop's library is missing: make native" if missing else "")

"""Metrics of several processes: each writes its own to a file, and whoever is asked adds them up.

The multiprocess mode of prometheus_client keeps what its own classes count, and ignores collectors.
Most of ours comes from one, which reads queue, batches and bundle at the moment in which it is
asked.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

from marnet_sdk.server.processes import end_mark

_COUNTED = ("counter", "histogram")  # what counts on when its process has ended
_LARGEST = ("marnet_queue_oldest_seconds", "marnet_batch_seconds")
_SMALLEST = ("process_start_time_seconds",)


def write_metrics(own: Collector, file: Path) -> None:
    """Write what a process knows now, in one step.

    Raises:
        OSError: the file cannot be written.
    """
    families = [
        (one.name, one.documentation, one.type, [(s.name, s.labels, s.value) for s in one.samples])
        for one in own.collect()
    ]
    (fresh := file.with_suffix(".fresh")).write_text(json.dumps(families), "utf-8")
    fresh.replace(file)


class AllProcesses(Collector):
    """The metrics of all processes whose files are in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """Add up what they wrote last; of those that have ended, what they had counted."""
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for file in sorted(self._folder.glob("*.json")):
            ended = end_mark(file).exists()
            for name, about, kind, samples in json.loads(file.read_bytes()):
                if ended and kind not in _COUNTED:
                    continue
                families.setdefault(name, Metric(name, about, kind))
                known = values.setdefault(name, {})
                for sample, labels, value in samples:
                    key = (sample, tuple(labels.items()))
                    joined = _joining(kind, sample)
                    known[key] = joined(known[key], value) if key in known else value
        for name, family in families.items():
            for (sample, labels), value in values[name].items():
                family.samples.append(Sample(sample, dict(labels), value))
            yield family


def _joining(kind: str, sample: str) -> Callable[[float, float], float]:
    """Tell how the same sample of two processes becomes one."""
    if sample.endswith("_created") or sample in _SMALLEST:
        return min
    return max if kind == "info" or sample in _LARGEST else operator.add

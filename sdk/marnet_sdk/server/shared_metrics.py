"""Metrics of several processes: each writes its own to a file, and whoever is asked adds them up.

The multiprocess mode of prometheus_client keeps what its own classes count, and ignores collectors.
Most of ours comes from one, which reads queue, batches and bundle at the moment in which it is
asked.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

from marnet_sdk.server.processes import end_mark

_COUNTED = ("counter", "histogram")  # what stands when its process has ended
_LARGEST = ("marnet_queue_oldest_seconds", "marnet_batch_seconds")
_SMALLEST = ("process_start_time_seconds",)
# Name, documentation, type, and the name, labels and value of each sample.
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class SharedMetrics(Collector):
    """The metrics of all processes whose files are in one folder."""

    def __init__(self, own: Collector, file: Path) -> None:
        """Go on from what was counted by the process that had this file before, if there was one.

        Args:
            own: the metrics of this process.
        """
        self._own, self._file = own, file
        self._before = _counted(_read(file)) if file.exists() else []

    def write(self) -> None:
        """Write what this process knows now, for the others.

        Raises:
            OSError: the file cannot be written.
        """
        own: list[Family] = []
        for one in self._own.collect():
            samples = [(sample.name, sample.labels, sample.value) for sample in one.samples]
            own.append((one.name, one.documentation, one.type, samples))
        fresh = self._file.with_suffix(".fresh")
        fresh.write_text(json.dumps(_added([own, self._before])), "utf-8")
        fresh.replace(self._file)
        end_mark(self._file).unlink(missing_ok=True)

    def collect(self) -> Iterator[Metric]:
        """Add up what all wrote last; of those that have ended, what they had counted."""
        files = sorted(self._file.parent.glob("*.json"))
        parts = [_counted(_read(one)) if end_mark(one).exists() else _read(one) for one in files]
        for name, about, kind, samples in _added(parts):
            family = Metric(name, about, kind)
            family.samples = [Sample(*sample) for sample in samples]
            yield family


def _read(file: Path) -> list[Family]:
    return json.loads(file.read_bytes())


def _counted(families: Iterable[Family]) -> list[Family]:
    return [family for family in families if family[2] in _COUNTED]


def _added(parts: Iterable[Iterable[Family]]) -> list[Family]:
    found: dict[str, tuple[str, str, dict[Any, float]]] = {}
    for name, about, kind, samples in (family for part in parts for family in part):
        _, _, values = found.setdefault(name, (about, kind, {}))
        for sample, labels, value in samples:
            key = (sample, tuple(labels.items()))
            values[key] = _joining(kind, sample)(values[key], value) if key in values else value
    return [
        (name, about, kind, [(sample, dict(labels), v) for (sample, labels), v in values.items()])
        for name, (about, kind, values) in found.items()
    ]


def _joining(kind: str, sample: str) -> Callable[[float, float], float]:
    """Tell how the same sample of two processes becomes one."""
    if sample.endswith("_created") or sample in _SMALLEST:
        return min
    return max if kind == "info" or sample in _LARGEST else operator.add

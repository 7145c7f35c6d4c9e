"""Metrics of a server, in Prometheus' text format."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from marnet_sdk.classifier import Classifier
from marnet_sdk.serve.many_callers import Kind
from marnet_sdk.serve.queue import BatchingStats
from marnet_sdk.server.service import Service
from marnet_sdk.server.shared_metrics import SharedMetrics

if TYPE_CHECKING:
    from marnet_sdk.server.gate import AccessLog

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARE_SECONDS = 1.0  # until other processes know


class Metrics(Collector):
    """All that a server and its classifier count, in a registry of its own."""

    def __init__(self, service: Service, log: AccessLog | None) -> None:
        self._service, self._log = service, log
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "marnet_requests",
            "Requests that were answered; status 499 for a client that hung up.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "marnet_request_seconds",
            "Seconds from a request's header to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(self)
        self._shared: SharedMetrics | None = None
        if service.shared is not None:
            self._shared = SharedMetrics(self._registry, service.shared)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            route: the pattern that its path met, of which there are few.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def keep_shared(self) -> None:
        """Write them for the other processes, where there are any, until this task is cancelled."""
        if self._shared is None:
            return
        try:
            while True:
                with suppress(OSError):  # whoever asks for metrics gets the error
                    self._shared.write()
                await asyncio.sleep(_SHARE_SECONDS)
        finally:
            with suppress(OSError):  # the parent was killed, and its folder is gone
                self._shared.write()

    def page(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics, of all processes, in the format that a client accepts, and name it."""
        encoder, kind = choose_encoder(accept)
        if self._shared is None:
            return encoder(self._registry), kind
        self._shared.write()
        return encoder(self._shared), kind

    def collect(self) -> Iterator[Metric]:
        """Read what is known at this moment."""
        service = self._service
        yield GaugeMetricFamily("marnet_ready", "1 once requests are taken.", int(service.ready))
        yield GaugeMetricFamily(
            "marnet_requests_in_flight", "Requests without an answer yet.", service.in_flight
        )
        yield GaugeMetricFamily(
            "marnet_connections", "Connections that are open.", service.connections()
        )
        if self._log is not None:
            yield GaugeMetricFamily(
                "marnet_log_lines_lost", "Lines that could not be written.", self._log.lost
            )
        reloads = CounterMetricFamily(
            "marnet_reloads", "Times that the bundle was opened again.", labels=["result"]
        )
        for result, count in service.reloaded.items():
            reloads.add_metric([result], count)
        yield reloads
        if service.opened:
            with service.using() as classifier:
                yield from _of_classifier(service.name, classifier)


def _of_classifier(name: str, classifier: Classifier) -> Iterator[Metric]:
    manifest = classifier.bundle.manifest
    about = {
        "name": name,
        "bundle": classifier.bundle.digest,
        "backend": manifest.backend,
        "precision": manifest.precision.asked,
        "operating_point": classifier.operating_point,
    }
    yield InfoMetricFamily("marnet_model", "The bundle that answers.", about)
    yield from _of_batching(classifier.batching_stats())


def _of_batching(stats: BatchingStats) -> Iterator[Metric]:
    queue = GaugeMetricFamily("marnet_queue_images", "Images in the queue.", labels=["state"])
    for state in ("waiting", "decoding", "ready", "running"):
        queue.add_metric([state], getattr(stats, state))
    yield queue
    yield GaugeMetricFamily(
        "marnet_queue_oldest_seconds", "Seconds that the oldest has waited.", stats.oldest
    )
    images = CounterMetricFamily("marnet_images", "Images by what became of them.", labels=["end"])
    for end in ("answered", "failed", "expired", "cancelled"):
        images.add_metric([end], getattr(stats, end))
    for reason, count in stats.refused.items():
        images.add_metric([f"refused: {reason}"], count)
    yield images
    batches = CounterMetricFamily("marnet_batches", "Batches by their reason.", labels=["reason"])
    for reason, count in stats.batches.items():
        batches.add_metric([reason], count)
    yield batches
    yield _histogram(stats.sizes)
    run = CounterMetricFamily(
        "marnet_batched_images",
        "Images in batches, by how they were answered.",
        labels=["operating_point", "samples"],
    )
    for kind, count in stats.images.items():
        assert isinstance(kind, Kind)
        run.add_metric([kind.operating_point, str(kind.samples)], count)
    yield run
    yield CounterMetricFamily(
        "marnet_stepped_down_images", "Of these, otherwise than asked.", stats.stepped_down
    )
    times = GaugeMetricFamily(
        "marnet_batch_seconds",
        "A batch of n images takes fixed + n per_image seconds, as learned.",
        labels=["operating_point", "samples", "term"],
    )
    for kind, learned in stats.learned.items():
        assert isinstance(kind, Kind)
        ways = [kind.operating_point, str(kind.samples)]
        times.add_metric([*ways, "fixed"], learned.fixed)
        times.add_metric([*ways, "per_image"], learned.per_image)
    yield times


def _histogram(sizes: Mapping[int, int]) -> Metric:
    """Sizes of batches, from how many batches had each."""
    counts = [(f"{most}.0", sum(n for k, n in sizes.items() if k <= most)) for most in _IMAGES]
    counts.append(("+Inf", sum(sizes.values())))
    images = sum(size * count for size, count in sizes.items())
    return HistogramMetricFamily("marnet_batch_images", "Images in a batch.", counts, images)

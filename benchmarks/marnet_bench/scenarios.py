"""The scenarios that can be measured. Here: batches, back to back, through one classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from marnet_bench.machine import describe_machine
from marnet_bench.timing import Seconds, drift, interleave, speedup_interval, summarise
from marnet_sdk.backends import IN_GRAPH
from marnet_sdk.bundle import FIDELITY
from marnet_sdk.classifier import Classifier
from marnet_sdk.native_loop import NATIVE

if TYPE_CHECKING:  # it imports torch, which measuring a bundle alone does not need
    from marnet_bench.peers import PlainTorch

INPUTS = ("bytes", "pixels")


def run_batches(
    classifier: Classifier,
    peer: PlainTorch | None,
    *,
    batch: int,
    warmup: int,
    duration: float,
    min_rounds: int = 10,
    accuracy: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a bundle and its peer on batches of its golden images, from file bytes and pixels.

    Args:
        accuracy: as from `peers.measured_accuracy`, to stand beside the speed.
        duration: seconds for each kind of input. min_rounds: calls of each, at least.
    Returns:
        The report: plain data, as it is written to JSON.
    """
    lines: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for kind in INPUTS:
        taken = interleave(
            _candidates(classifier, peer, batch, kind),
            warmup=warmup,
            duration=duration,
            min_rounds=min_rounds,
        )
        for name, seconds in taken.items():
            lines.append(
                {"model": name, "input": kind, "drift": drift(seconds)}
                | asdict(summarise(seconds, batch))
                | {"seconds": [round(s, 7) for s in seconds.tolist()]}
            )
        if peer is not None:
            ratios.append(_ratio(taken, kind))
    bundle = classifier.bundle
    manifest = bundle.manifest
    return {
        "scenario": "batches",
        "bundle": bundle.path.name,
        "backend": manifest.backend,
        "precision": asdict(manifest.precision),
        "operating_point": asdict(manifest.sampling.point),
        "steps": len(manifest.sampling.point.timesteps),
        "batch": batch,
        "threads": classifier.runtime.threads,
        "loop": _loop(classifier),
        "lines": lines,
        "speedups": ratios,
        "fidelity": json.loads(bundle.file(FIDELITY).read_text("utf-8")),
        "accuracy": accuracy,
        "machine": describe_machine(),
    }


def _loop(classifier: Classifier) -> str:
    """Say what ran the reverse loop."""
    point, manifest = classifier.operating_point, classifier.bundle.manifest
    if not manifest.sampling.points[point].timesteps:
        return "none: the alignment branch answers"
    loop = classifier.runtime.loop
    missing = manifest.loop == NATIVE and loop == IN_GRAPH
    return loop + ("; the native loop's library is missing: make native" if missing else "")


def golden_images(classifier: Classifier, count: int) -> list[bytes]:
    """The files of the bundle's golden images, repeated to `count`."""
    files = [path.read_bytes() for path in classifier.bundle.golden_images()]
    return list(islice(cycle(files), count))


def _candidates(
    classifier: Classifier, peer: PlainTorch | None, batch: int, kind: str
) -> dict[str, Callable[[], object]]:
    files = golden_images(classifier, batch)
    preprocess = classifier.preprocess
    pixels = preprocess.pixels(files)

    def through(logits: Callable[[np.ndarray], np.ndarray]) -> Callable[[], object]:
        if kind == "pixels":
            return lambda: logits(pixels)
        return lambda: logits(preprocess.pixels(files))

    candidates = {"bundle": through(classifier.logits)}
    if peer is not None:
        candidates["plain PyTorch"] = through(peer.logits)
    return candidates


def _ratio(taken: dict[str, Seconds], kind: str) -> dict[str, Any]:
    ratio, low, high = speedup_interval(taken["plain PyTorch"], taken["bundle"])
    return {"input": kind, "over": "plain PyTorch", "ratio": ratio, "low": low, "high": high}

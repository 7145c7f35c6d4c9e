"""The proof of an export: its receipt, its fidelity, and what departs where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from marnet_export.build.builder import builder
from marnet_export.build.native import delivered, loop_products
from marnet_export.build.types import Arithmetic, Unread
from marnet_export.prove.departure import diagnose
from marnet_export.prove.fidelity import Fidelity
from marnet_export.prove.receipt import (
    NOT_READ,
    answering,
    check_delivered,
    count_products,
    receipt,
)
from marnet_export.prove.trial import Built, Trial, instability_floor, settling
from marnet_export.work import DEFAULT, Job, Points
from marnet_sdk.bundle import Share
from marnet_sdk.errors import VerificationFailed
from marnet_sdk.native_loop import LAYERS
from marnet_sdk.noise.tables import Floats


def read_receipt(job: Job, types: Arithmetic, points: Points) -> dict[str, Share]:
    """Read the types of what was built; see `receipt`.

    Raises:
        VerificationFailed: it is not what was asked for.
    """
    _, *sizes = job.images.pixels.shape
    shape, backend = (sizes[0], sizes[1], sizes[2]), builder(job.settings.backend)
    try:
        products = backend.products(job.payload, types.encoder, shape)
    except Unread as error:
        job.say(f"{NOT_READ}: {error}; the receipt says so, and the answers are the proof")
        products = count_products(job.lowered, shape)
    asked = {"encoder": types.encoder, "loop": types.loop}
    if (job.payload / LAYERS).exists():
        products = loop_products(backend, job.payload, types.encoder, products)
        asked["loop"] = delivered(types.loop)
    check_delivered(products, asked, backend.name, kept=job.kept.share)
    point = points.sampling.point
    steps = len(point.timesteps)
    return receipt(answering(products, job.payload, steps), steps, point.samples)


def verify(job: Job, built: Built, types: Arithmetic, points: Points) -> Fidelity:
    """Hold every operating point against the reference; write fidelity.json."""
    trial = job.trial(built, types, points)
    found: dict[str, Fidelity] = {}
    for name, fidelity in trial.measure():
        if problems := fidelity.problems():
            raise _failure(job, problems, trial, types, points, name)
        found[name] = fidelity
    more = _noise_matters(job, built, points) if points.table.timesteps else {}
    report(job, trial, found, **more)
    return found[built.sampling.default]


def report(job: Job, trial: Trial, found: Mapping[str, Fidelity], **more: Any) -> None:
    """Put what was measured, of each operating point, into fidelity.json."""
    built, default = trial.built, trial.built.sampling.default
    job.report(
        **asdict(found[default]),
        operating_points={name: asdict(f) for name, f in found.items()},
        trajectory=trial.trajectory(default),
        latency_ms=_latency(built.run(default), built.pixels[:1]),
        **more,
    )


def _noise_matters(job: Job, built: Built, points: Points) -> dict[str, Any]:
    """Measure how answers at the default point depend on the noise."""
    sampling = built.sampling
    samples = sampling.point.samples
    floor = instability_floor(job.reference, points.table, sampling.seed, samples)
    job.say(
        f"instability floor: {floor['share']:.2%} of {floor['images']} images change their "
        f"label over {len(floor['seeds'])} noise seeds, in float32"
    )
    return {"instability": floor, "settled": settling(built, sampling.default)}


def _failure(
    job: Job, problems: Sequence[str], trial: Trial, types: Arithmetic, points: Points, name: str
) -> VerificationFailed:
    """Say what is wrong, what departs from the reference first, and what to do."""
    backend = job.settings.backend
    job.say(f"{backend}: {'; '.join(problems)}; looking for the first layer that departs")
    what = job.payload, job.lowered, backend, types, job.order(points)
    departure = diagnose(trial, name, *what)
    which = "" if name == DEFAULT else f" at operating point {name}"
    flag = "--loop-precision" if departure.part == "loop" else "--precision"
    return VerificationFailed(
        f"{backend} {types.encoder.storage}{which}: {'; '.join(problems)}; {departure.sentence}. "
        f"No bundle was written; try {flag} fp32, or a lower --min-agreement"
    )


def _latency(run: Callable[[Floats], Floats], pixel: Floats, calls: int = 5) -> float:
    """Median milliseconds from the pixels of one image to its logits."""
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run(pixel)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds[1:])), 4)

"""A payload before and after a backend builds it: what cannot fit, and what is put beside."""

from __future__ import annotations

from pathlib import Path

from marnet_export.build.builder import builder
from marnet_export.build.types import Arithmetic
from marnet_export.choose.kept import keep_float
from marnet_export.lower.zero_steps import write_head
from marnet_export.prove.overflow import check_activations, check_weights
from marnet_export.work import Job, Points
from marnet_sdk.errors import ExportError


def check_fits(job: Job, types: Arithmetic, points: Points) -> None:
    """Refuse, before anything is built, what the backend or the types cannot hold.

    Raises:
        ExportError: a loop is too long, or a number too large.
    """
    _check_steps(job, points)
    for asked in types:
        check_weights(job.lowered, asked.storage)
    calibration = job.calibration(points)
    if headroom := check_activations(job.lowered, calibration, types.encoder.compute):
        job.say(headroom.sentence())


def _check_steps(job: Job, points: Points) -> None:
    """Refuse a chain that is longer than what the backend builds for."""
    backend = job.settings.backend
    most = builder(backend).most_steps
    longest = max(len(point.timesteps) for point in points.sampling.points.values())
    if most is not None and longest > most:
        raise ExportError(
            f"{backend} builds loops of at most {most} steps, got {longest}; choose fewer with "
            "--steps, or another --backend"
        )


def complete(job: Job, payload: Path, types: Arithmetic, points: Points) -> None:
    """Put beside encoder and loop what they do without; keep layers float where int8 hurts."""
    if any(not point.timesteps for point in points.sampling.points.values()):
        write_head(job.lowered, payload)
    if types.encoder.storage == "int8":
        keep_float(job, payload, types, points)

"""A payload before and after a backend builds it: what cannot fit, and what is put beside."""

from __future__ import annotations

from pathlib import Path

from marnet_export.build.builder import builder
from marnet_export.build.opened import open_built
from marnet_export.build.quantise import ranked, to_keep
from marnet_export.build.types import Arithmetic
from marnet_export.lower.zero_steps import write_head
from marnet_export.prove.overflow import check_activations, check_weights
from marnet_export.prove.trial import Built
from marnet_export.work import Job, Kept, Points
from marnet_sdk.errors import ExportError
from marnet_sdk.noise.tables import Floats
from marnet_sdk.uncertainty import mean_logits


def check_fits(job: Job, types: Arithmetic, points: Points) -> None:
    """Refuse, before anything is built, what the backend or the types cannot hold."""
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
        _keep_float(job, payload, types, points)


def _keep_float(job: Job, payload: Path, types: Arithmetic, points: Points) -> None:
    """Build an int8 encoder again with its worst blocks float, until enough labels agree.

    Measured on the images that int8 is fitted to; the verification judges.
    """
    reference, wanted = job.fitted_reference, job.min_agreement(types)
    sampling, pixels = points.sampling, job.fitted.pixels
    logits = reference.logits(points.table, sampling.seed, sampling.point.samples)
    labels = mean_logits(logits).argmax(axis=1)

    def agreement(x_v: Floats | None = None) -> float:
        asked = job.settings
        backend = open_built(asked.backend, payload, types.encoder.compute, asked.device)
        built = Built(backend, points.plan, sampling, pixels)
        if x_v is not None:
            built.x_v = x_v
        return float((built.logits(sampling.default).argmax(axis=1) == labels).mean())

    first = agreement()
    job.say(f"int8: {first:.2%} of {len(pixels)} labels agree where it is fitted")
    if first >= wanted:
        return
    if (loop := agreement(reference.x_v.numpy())) < wanted:
        job.say(
            f"with the float32 encoder {loop:.2%}, so no layer of it is kept float; it is the "
            "loop: try --loop-precision fp16"
        )
        return
    build_encoder = builder(job.settings.backend).build_encoder
    for chosen in to_keep(ranked(job.lowered.encoder, pixels), (1 - wanted) / (1 - first)):
        why = {
            layer: f"{block.name} alone in int8 moves the features by {block.error:.2g}"
            for block in chosen
            for layer in block.layers
        }
        job.kept = Kept(why, sum(block.share for block in chosen))
        build_encoder(job.lowered, job.example, types.encoder, payload, job.order(points))
        found = agreement()
        job.say(
            f"int8: {found:.2%} with {', '.join(block.name for block in chosen)} of the image "
            f"encoder in {types.encoder.compute}, {job.kept.share:.0%} of its products"
        )
        if found >= wanted:
            break

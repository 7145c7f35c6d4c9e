"""Which layers of an int8 encoder stay float."""

from __future__ import annotations

from pathlib import Path

from marnet_export.build.builder import builder
from marnet_export.build.opened import open_built
from marnet_export.build.quantise import ranked, to_keep
from marnet_export.build.types import Arithmetic
from marnet_export.prove.built import Built
from marnet_export.work import Job, Kept, Points
from marnet_sdk.noise.tables import Floats
from marnet_sdk.uncertainty import mean_logits


def keep_float(job: Job, payload: Path, types: Arithmetic, points: Points) -> None:
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

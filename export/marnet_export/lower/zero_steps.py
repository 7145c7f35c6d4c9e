"""The zero-step point: the alignment branch alone, a candidate beside every sampler.

It has the table of a sampler that visits no step, so that everything that takes a sampler takes it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from marnet_export.lower.methods import Lowered
from marnet_sdk.alignment import HEAD, AlignmentHead
from marnet_sdk.bundle import NO_LOOP
from marnet_sdk.errors import ExportError
from marnet_train.diffusion import SamplerTable, ScheduleConfig, sampler_table


def process_table(
    schedule: ScheduleConfig, sampler: str | None, steps: int | None, eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler (None: ddpm) for `steps` (None: T), or for 0 that of no loop."""
    if steps == 0:
        return SamplerTable(NO_LOOP, schedule.steps, (), np.zeros((0, 4)))
    return sampler_table(schedule, sampler or "ddpm", steps, eta)


def alignment_head(lowered: Lowered) -> AlignmentHead | None:
    """Return the matrices that the zero-step point answers with; None: the method has no alignment
    branch.
    """
    alignment = lowered.alignment
    if alignment is None or alignment.classifier is None:
        return None
    return AlignmentHead(*alignment.vision, *alignment.classifier)


def check_branch(lowered: Lowered, method: str) -> None:
    """Refuse zero steps where nothing could answer."""
    if alignment_head(lowered) is None:
        raise ExportError(
            f"--steps 0 leaves the alignment branch to answer, and method {method!r} has none; "
            "choose 1 or more steps"
        )


def write_head(lowered: Lowered, payload: Path) -> None:
    """Put the head into a bundle's payload/, in float32."""
    head = alignment_head(lowered)
    assert head is not None
    arrays = asdict(head)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ExportError(
                f"{name} of the alignment branch holds NaN or infinity; train the checkpoint again"
            )
    save_file(arrays, payload / HEAD)

"""A trial: what was built, and the float32 checkpoint, on the same images and noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from marnet_export.prove.built import Built
from marnet_export.prove.fidelity import Fidelity, measure_fidelity
from marnet_export.prove.reference import Reference
from marnet_sdk.bundle import OperatingPoint
from marnet_sdk.uncertainty import mean_logits
from marnet_train.diffusion import SamplerTable


@dataclass(frozen=True, eq=False)
class Trial:
    """Graphs that were built, and the reference that they are held to: an export's, a bundle's."""

    reference: Reference
    built: Built
    labels: NDArray[np.int64] | None  # true classes of the images [N], if they are known
    tables: Mapping[str, SamplerTable]  # of each operating point
    min_agreement: float
    row_tolerance: float
    buckets: Sequence[int] = ()  # batch sizes that it was built for, tried with their neighbours

    def measure(self) -> Iterator[tuple[str, Fidelity]]:
        """Hold the operating points against the reference, one by one."""
        sampling = self.built.sampling
        known: dict[OperatingPoint, Fidelity] = {}
        for name, point in sampling.points.items():
            process = replace(point, abstain_below=None)
            if process not in known:  # else another name for the same
                logits = self.reference.logits(self.tables[name], sampling.seed, point.samples)
                known[process] = measure_fidelity(
                    self.built.run(name),
                    self.built.pixels,
                    self.built.logits(name),
                    mean_logits(logits),
                    self.labels,
                    min_agreement=self.min_agreement,
                    row_tolerance=self.row_tolerance,
                    buckets=self.buckets,
                )
            yield name, known[process]

    def trajectory(self, name: str, *, images: int = 16, most: int = 12) -> list[dict[str, float]]:
        """Measure how far the built loop is from the reference on its way, at up to `most` of its
        steps.

        Returns:
            For each step: `step` (1-based), `t`, and `error`, the norm of the difference of the
            logits that the head makes of the estimate, over the norm of the reference's. Nothing
            where there is no loop.
        """
        table, built = self.tables[name], self.built
        if not table.timesteps:
            return []
        pixels, x_v = built.pixels[:images], built.x_v[:images]
        expected = self.reference.estimates(table, built.sampling.seed, len(pixels))
        out = []
        for step, got in built.estimates(name, pixels, x_v, most):
            want = expected[step - 1]
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            out.append({"step": step, "t": table.timesteps[step - 1], "error": error})
        return out

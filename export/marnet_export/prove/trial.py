"""A trial: graphs that were built, opened again, and the float32 checkpoint, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_export.prove.fidelity import Fidelity, Logits, measure_fidelity, wilson_interval
from marnet_export.prove.reference import Reference
from marnet_sdk.backends import Backend
from marnet_sdk.bundle import OperatingPoint, Sampling
from marnet_sdk.console import track
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.run import pixel_key
from marnet_sdk.uncertainty import mean_logits, schedule, settled, softmax, summarise
from marnet_train.diffusion import SamplerTable

BATCH = 64  # images that are measured together
# What the instability floor and settling may each cost: seconds for the paper's network.
CHAIN_STEPS = 200_000


class Built:
    """Graphs that were built, opened again, with the tables of some operating points, on the images
    of a verification."""

    def __init__(
        self,
        backend: Backend,
        plan: dict[str, NDArray],
        sampling: Sampling,
        pixels: Floats,
        batch: int = BATCH,
    ) -> None:
        """Take the images as pixels [N, 3, H, W], of which `batch` go through the loop together."""
        self.backend, self.plan, self.sampling, self.pixels = backend, plan, sampling, pixels
        self.batch = batch

    @cached_property
    def x_v(self) -> Floats:
        """The images, encoded once for all that is measured behind the encoder: [N, D_v]."""
        starts = track(range(0, len(self.pixels), BATCH), "encode")
        return np.concatenate([self.backend.encode(self.pixels[i : i + BATCH]) for i in starts])

    def tables(self, name: str, pixels: Floats, samples: int, seed: int | None = None) -> Tables:
        """The tables of a batch [B, 3, H, W] at an operating point."""
        by_image = self.sampling.noise == "image"
        return make_tables(
            self.plan,
            self.sampling,
            name,
            seed=self.sampling.seed if seed is None else seed,
            samples=samples,
            keys=[pixel_key(row) for row in pixels] if by_image else None,
        )

    def samples(self, name: str, count: int, limit: int | None = None) -> Floats:
        """Logits of the images (or the first `limit`) and K noise samples, [N, K, C]."""
        pixels, x_v = self.pixels[:limit], self.x_v[:limit]
        shared = self.tables(name, pixels[:1], count) if self.sampling.noise == "shared" else None
        out = []
        for start in range(0, len(pixels), self.batch):
            rows = slice(start, start + self.batch)
            tables = shared or self.tables(name, pixels[rows], count)
            out.append(self.backend.refine(x_v[rows], tables)[0])
        return np.concatenate(out)

    def logits(self, name: str) -> Floats:
        """One row of logits for each image at an operating point, [N, C]."""
        return mean_logits(self.samples(name, self.sampling.points[name].samples))

    def run(self, name: str) -> Logits:
        """Return a function that computes the logits of an operating point for any pixels."""
        count = self.sampling.points[name].samples
        shared = self.sampling.noise == "shared"
        fixed = self.tables(name, self.pixels[:1], count) if shared else None

        def logits(pixels: Floats) -> Floats:
            if fixed:
                return mean_logits(self.backend.run(pixels, fixed)[0])
            tables = self.tables(name, pixels, count)
            return mean_logits(self.backend.refine(self.backend.encode(pixels), tables)[0])

        return logits


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

    def steps(
        self, name: str, rows: NDArray[np.intp], x_v: Floats, most: int
    ) -> Iterator[tuple[int, Floats, Floats]]:
        """Compare the estimates of up to `most` of the steps of an operating point.

        A chain that is cut short returns the estimate of its last step, so no graph needs a second
        output for this.

        Args:
            rows: the images, B of them. x_v: [B, D_v], their features, for what was built.

        Returns:
            The number of each step, from 1 on, and logits [B, C] of the first noise sample: as
            built, and the reference's.
        """
        built = self.built
        wanted = self.reference.estimates(self.tables[name], built.sampling.seed, rows)
        tables = built.tables(name, np.ascontiguousarray(built.pixels[rows]), 1)
        parts = np.split(np.arange(len(rows)), range(built.batch, len(rows), built.batch))
        count = min(tables.steps, most)
        for step in np.unique(np.linspace(1, tables.steps, count).round().astype(int)).tolist():
            short = tables.first_steps(step)
            got = [built.backend.refine(x_v[i], short.rows(i))[0][:, 0] for i in parts]
            yield step, np.concatenate(got), wanted[step - 1]

    def trajectory(self, name: str, *, images: int = 16, most: int = 12) -> list[dict[str, float]]:
        """Measure how far the built loop is from the reference on its way, at up to `most` of its
        steps.

        Returns:
            For each step: `step` (1-based), `t`, and `error`, the norm of the difference of the
            logits that the head makes of the estimate, over the norm of the reference's. Nothing
            where there is no loop.
        """
        times, x_v = self.tables[name].timesteps, self.built.x_v
        rows, out = np.arange(min(images, len(x_v))), []
        for step, got, want in self.steps(name, rows, x_v[rows], most) if times else ():
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            out.append({"step": step, "t": times[step - 1], "error": error})
        return out


def instability_floor(
    reference: Reference,
    table: SamplerTable,
    seed: int,
    samples: int,
    *,
    seeds: int = 5,
    most: int = CHAIN_STEPS,
) -> dict[str, Any]:
    """Share of images whose label depends on the noise seed, in the float32 reference itself.

    No export can be expected to agree with itself at another seed better than this.

    Args:
        most: chain steps to take in all; of more images, the first ones are used.
    """
    count = max(16, most // (seeds * samples * len(table.timesteps)))
    used = [(seed + i) % 2**64 for i in range(seeds)]
    logits = [reference.logits(table, s, samples, limit=count) for s in used]
    labels = np.stack([mean_logits(found).argmax(axis=1) for found in logits])  # [seeds, N]
    changing = (labels != labels[0]).any(axis=0)
    return {
        "seeds": used,
        "images": len(changing),
        "share": float(changing.mean()),
        "interval": wilson_interval(int(changing.sum()), len(changing)),
    }


def settling(
    built: Built, name: str, *, samples: int = 8, most: int = CHAIN_STEPS // 2
) -> dict[str, Any]:
    """Measure how `stop="settled"` does against all of its samples, on these images.

    Returns:
        samples: what there would be; mean_samples: what was drawn; agreement: share of images
        with the label that all samples give, and its interval.
    """
    samples = max(samples, built.sampling.points[name].samples)
    steps = len(built.sampling.points[name].timesteps)
    limit = max(16, most // (samples * steps))
    probabilities = softmax(built.samples(name, samples, limit))  # [N, K, C]
    count = len(probabilities)
    drawn = np.full(count, samples)
    for look in reversed(schedule(samples)):
        drawn[settled(probabilities[:, :look], samples)] = look
    early = summarise(probabilities, drawn).winner
    same = int((early == summarise(probabilities).winner).sum())
    return {
        "samples": samples,
        "images": count,
        "mean_samples": float(drawn.mean()),
        "agreement": same / count,
        "interval": wilson_interval(same, count),
    }

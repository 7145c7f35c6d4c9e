"""Graphs that were built, opened again, on the images of a verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import Backend
from marnet_sdk.bundle import Sampling
from marnet_sdk.console import track
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.run import pixel_key
from marnet_sdk.uncertainty import mean_logits

Logits = Callable[[Floats], Floats]  # pixels [B, 3, H, W] -> logits [B, C]
BATCH = 64  # images that are measured together


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

    def estimates(
        self, name: str, pixels: Floats, x_v: Floats, most: int
    ) -> Iterator[tuple[int, Floats]]:
        """Answer with the estimate of a step, at up to `most` of the steps of an operating point.

        A chain that is cut short returns the estimate of its last step, so no graph needs a second
        output for this.

        Args:
            pixels: [B, 3, H, W], which key the noise. x_v: [B, D_v], their features.

        Returns:
            The number of each step, from 1 on, and logits [B, C] of the first noise sample.
        """
        tables = self.tables(name, pixels, 1)
        count = min(tables.steps, most)
        rows = np.split(np.arange(len(x_v)), range(self.batch, len(x_v), self.batch))
        for step in np.unique(np.linspace(1, tables.steps, count).round().astype(int)).tolist():
            short = tables.first_steps(step)
            logits = [self.backend.refine(x_v[i], short.rows(i))[0][:, 0] for i in rows]
            yield step, np.concatenate(logits)

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

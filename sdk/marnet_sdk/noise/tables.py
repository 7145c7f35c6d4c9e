"""The tables that the reverse loop reads at each step, made of a bundle's plan and a seed.

Axes: B batch, K noise samples, S steps, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.bundle import Sampling
from marnet_sdk.noise.trajectory import draw_trajectory, fold

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tables:
    """The inputs of the reverse loop.

    They are inputs of the graph, so one graph serves every sampler, number of steps, number of
    samples and seed.
    """

    coefficients: Floats  # [S, 3] A, B, C of each step
    bias: Floats  # [S, N, K, H] time, noise and output bias; N is 1 (shared noise) or B

    @property
    def steps(self) -> int:
        """The number of steps S; 0 where no loop is run."""
        return len(self.coefficients)

    def first_steps(self, count: int) -> Tables:
        """Cut the chain short: its last step returns the network's estimate, as any last step."""
        return Tables(self.coefficients[:count], self.bias[:count])

    def samples(self, start: int, stop: int) -> Tables:
        """The tables of some of the K samples."""
        return replace(self, bias=np.ascontiguousarray(self.bias[:, :, start:stop]))

    def rows(self, index: NDArray[np.intp]) -> Tables:
        """The tables of some images of the batch."""
        if self.bias.shape[1] == 1:
            return self
        return replace(self, bias=np.ascontiguousarray(self.bias[:, index]))

    def at_least_two_steps(self) -> Tables:
        """Add a step that changes nothing before a single one, for graphs that need a loop.

        Its B is 0, by which a progressive loop knows that there is no estimate to feed back.
        """
        if len(self.coefficients) > 1:
            return self
        unchanged = np.array([[1, 0, 0]], np.float32)
        return Tables(
            np.concatenate([unchanged, self.coefficients]), np.repeat(self.bias, 2, axis=0)
        )


def make_tables(
    plan: Mapping[str, NDArray],
    sampling: Sampling,
    name: str,
    *,
    seed: int,
    samples: int,
    first: int = 0,
    keys: Sequence[int] | None = None,
) -> Tables:
    """Fold the noise of a seed into the tables of one operating point.

    Args:
        plan: the arrays of plan.safetensors: `time_bias` [T, H], `input_weight` [H, D],
            `output_bias` [D] and, for each operating point, `coefficients.NAME` [S, 4].
        samples: K, how many chains an image meets. first: the number of the first of them.
        keys: of each image of a batch, where noise is keyed by image; None: one for all.

    Returns:
        Tables without a step, for an operating point without the loop.
    """
    point = sampling.points[name]
    if not point.timesteps:
        width = plan["time_bias"].shape[1]
        return Tables(np.empty((0, 3), np.float32), np.empty((0, 1, samples, width), np.float32))
    coefficients = plan[f"coefficients.{name}"]
    time_bias = plan["time_bias"][np.array(point.timesteps) - 1]  # [S, H]
    keys = [0] if keys is None else keys
    bias = np.empty((len(coefficients), len(keys), samples, time_bias.shape[1]), np.float32)
    for row, key in enumerate(keys):
        trajectories = [
            draw_trajectory(
                seed,
                point.timesteps,
                sampling.train_steps,
                sampling.width,
                trajectory=(key + first + k) % 2**64,
                noisy=coefficients[:, 3] != 0,
            )
            for k in range(samples)
        ]
        arguments = (coefficients, time_bias, plan["input_weight"], plan["output_bias"])
        bias[:, row] = fold(trajectories, *arguments)
    return Tables(np.ascontiguousarray(coefficients[:, :3], np.float32), bias)

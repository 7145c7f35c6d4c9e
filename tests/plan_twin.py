"""The sampling plan in NumPy float64: the twin that every lowered loop is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from marnet_export.lower.plan import Array, SamplingPlan, check_step
from marnet_sdk.noise.trajectory import NoiseTrajectory, fold
from marnet_train.diffusion import SamplerTable
from marnet_train.models.denoiser import LEAKY_SLOPE


def run_plan(
    plan: SamplingPlan, table: SamplerTable, x_v: Array, trajectories: Sequence[NoiseTrajectory]
) -> Array:
    """Run the plan of a reverse loop.

    Args:
        x_v: [N, D_v]. trajectories: K of them, met by every image.
    Returns:
        x_CDR, [N, K, D].
    """
    time_bias = plan.time_bias[np.array(table.timesteps) - 1]
    scaled = [replace(one, initial=plan.start_noise * one.initial) for one in trajectories]
    bias = fold(scaled, table.coefficients, time_bias, plan.input_weight, plan.output[1])
    mean, std = plan.standardise
    x_v, start = np.split(x_v, [len(mean)], axis=1)
    q = ((x_v - mean) / std @ plan.condition_weight.T)[:, None]  # [N, 1, H]
    width = len(plan.carry_weight) - plan.fed
    state = previous = np.zeros((len(x_v), len(trajectories), width))
    if plan.start_weight is not None:
        state = state + (start @ plan.start_weight[:width].T)[:, None]
    h3, fed = q, np.zeros(plan.fed or 1)
    for i, (a, b, c, _) in enumerate(table.coefficients):
        into = state if plan.carry == "hidden" else state @ plan.input_weight.T
        h3 = _layer(_layer(_leaky(into + fed + q + bias[i]), plan.hidden2), plan.hidden3)
        gained = h3 @ plan.carry_weight.T
        if plan.carry_bias is not None:
            gained, fed = np.split(gained + plan.carry_bias, [width], axis=-1)
        state, previous = a * state + b * gained + c * previous, gained
        check_step(gained, table, i)
    return h3 @ plan.output[0].T + plan.output[1]


def _leaky(y: Array) -> Array:
    return np.maximum(y, LEAKY_SLOPE * y)


def _layer(x: Array, weights: tuple[Array, Array]) -> Array:
    return _leaky(x @ weights[0].T + weights[1])

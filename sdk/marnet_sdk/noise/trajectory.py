"""Everything random about one reverse-sampling loop, drawn from the counters of `philox`.

Axes: S steps, K trajectories, D width of one noise vector, H width of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.errors import InvalidInput
from marnet_sdk.noise.philox import check_integer, standard_normal

_LAST_STEP = 2**32 - 1  # a step is one word of the counter


@dataclass(frozen=True, eq=False)  # == on arrays has no single answer
class NoiseTrajectory:
    """Everything random about one reverse-sampling loop: its start and the noise of each step."""

    initial: NDArray[np.float64]  # [D] x_T
    steps: NDArray[np.float64]  # [S, D] the noise added on leaving t_1, ..., t_S


def draw_trajectory(
    seed: int,
    timesteps: Sequence[int],
    train_steps: int,
    width: int,
    *,
    trajectory: int = 0,
    noisy: NDArray[np.bool_] | None = None,
) -> NoiseTrajectory:
    """The noise trajectory of a sampler that visits `timesteps`.

    Noise added in the step that leaves t is counter step t - 1, and x_T is counter step
    `train_steps`, so a sampler with a stride meets a subset of the noise of the full sampler.

    Args:
        seed: 0 .. 2^64 - 1.
        timesteps: 1-based t_1 > ... > t_S >= 1, as the papers count them.
        train_steps: T, the length of the schedule; t_1 <= T.
        width: D.
        trajectory: which of the seed's independent trajectories (`samples=K` takes 0 .. K - 1).
        noisy: [S], the steps that use their noise; that of the others is left at zero, undrawn.

    Raises:
        InvalidInput: timesteps not decreasing or outside 1 .. T; a bad seed or width.
    """
    train_steps = check_integer("train_steps", train_steps, _LAST_STEP)
    visited = [check_integer("timesteps", t, _LAST_STEP) for t in timesteps]
    for earlier, later in pairwise(visited):
        if later >= earlier:
            raise InvalidInput(
                f"timesteps: got {later} after {earlier}; expected a decreasing sequence "
                "(reverse sampling goes from noise to data)"
            )
    if not visited or visited[0] > train_steps or visited[-1] < 1:
        got = f"{visited[0]} .. {visited[-1]}" if visited else "none"
        raise InvalidInput(
            f"timesteps: got {got}; expected 1-based steps within 1 .. {train_steps} (train_steps)"
        )
    drawn = np.flatnonzero(np.ones(len(visited), bool) if noisy is None else noisy)
    counters = [train_steps, *(visited[i] - 1 for i in drawn)]
    noise = standard_normal(seed, counters, width, trajectory=trajectory)
    steps = np.zeros((len(visited), width))
    steps[drawn] = noise[1:]
    return NoiseTrajectory(initial=noise[0], steps=steps)


def fold(
    trajectories: Sequence[NoiseTrajectory],
    coefficients: NDArray[np.float64],
    time_bias: NDArray[np.floating],
    input_weight: NDArray[np.floating],
    output_bias: NDArray[np.floating],
) -> NDArray[np.float64]:
    """Everything that a step adds before its first activation and that no image has a part in.

    The reverse chain is linear in its state, so the state is the sum of a part that the network's
    estimates make and a part w that they do not: the noise, and the output bias of the estimates,
        w_0 = x_T,    w_{i+1} = A_i w_i + S_i z_i + (B_i + C_i) b_4    (C_0 does not count)
    and the first layer sees W_x w_i. With W_t tau(t_i) + b_1 that is one table, one row per step,
    and the loop itself is left with no noise at all.

    Args:
        trajectories: K of them, each of S steps and width D.
        coefficients: [S, 4], the sampler's A, B, C, S.
        time_bias: [S, H], W_t tau(t) + b_1 of each visited step.
        input_weight: W_x [H, D]. output_bias: b_4 [D].

    Returns:
        [S, K, H]. The caller rounds it to float32, once.

    Raises:
        InvalidInput: shapes that do not belong together.
    """
    weight = np.asarray(input_weight, np.float64)
    state = np.stack([t.initial for t in trajectories])  # [K, D]
    noise = np.stack([t.steps for t in trajectories], axis=1)  # [S, K, D]
    steps, width = len(coefficients), state.shape[1]
    found = (weight.shape[1:], output_bias.shape, noise.shape[0], time_bias.shape)
    if found != ((width,), (width,), steps, (steps, len(weight))):
        raise InvalidInput(
            f"got input_weight {weight.shape}, output_bias {output_bias.shape}, time_bias "
            f"{time_bias.shape} and trajectories of {noise.shape[0]} steps of width {width}; "
            f"expected [H, {width}], [{width}], [{steps}, H] and {steps} steps"
        )
    bias = np.asarray(output_bias, np.float64)
    carried = np.empty((steps, *state.shape))  # [S, K, D]
    for i, (a, b, c, s) in enumerate(coefficients):
        carried[i] = state
        state = a * state + s * noise[i] + (b + (c if i else 0.0)) * bias
    seen = carried.reshape(-1, width) @ weight.T  # one product: W_x is read once, not S times
    return np.asarray(time_bias, np.float64)[:, None] + seen.reshape(*carried.shape[:2], -1)

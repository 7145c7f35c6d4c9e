"""Counter-based noise: any element of any draw, without the ones before it.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), which maps a 128-bit counter and a 64-bit key to 128 random bits. (NumPy's
own `Philox` is the 4x64 variant: other bits.) Key and counter are laid out so that a draw depends
on what it is for and on nothing else, neither batch size, nor width, nor backend:

    key     = (low word, high word) of the seed
    counter = (element // 4, step, low word, high word of the trajectory)

The random bits are identical on every platform. The normals made of them are identical up to the
last units in the last place of the platform's logarithm, sine and cosine.

Axes: S steps, K trajectories, D width of one noise vector, H width of the first layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_sdk.errors import InvalidInput

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))  # M0 and M1 of the paper, table 2
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key: golden ratio, sqrt(3) - 1
_HIGH = np.uint64(32)


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10: 128 random bits for each counter.

    Args:
        counter: uint32 [..., 4].
        key: uint32 [2], one key for all counters.

    Returns:
        uint32 [..., 4].

    Raises:
        InvalidInput: wrong shape, or values that are not 32-bit unsigned integers.
    """
    words = _words(counter, "counter")
    keys = _words(key, "key")
    if words.ndim == 0 or words.shape[-1] != 4:
        raise InvalidInput(f"counter: got shape {words.shape}; expected four words, [..., 4]")
    if keys.shape != (2,):
        raise InvalidInput(f"key: got shape {keys.shape}; expected two words, [2]")
    key0, key1 = (int(word) for word in keys)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]  # uint64: the full 64-bit products
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HIGH) ^ c1 ^ np.uint64(key0),
            product1 & np.uint64(_WORD),
            (product0 >> _HIGH) ^ c3 ^ np.uint64(key1),
            product0 & np.uint64(_WORD),
        )
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def standard_normal(
    seed: int, step: int | ArrayLike, width: int, *, trajectory: int = 0
) -> NDArray[np.float64]:
    """Standard normals of one trajectory at the given steps.

    Four words give four elements by the Box-Muller transform (Box and Muller 1958): words (0, 1)
    give elements 0 (cosine) and 1 (sine), words (2, 3) elements 2 and 3. Uniforms are the top
    24 bits of a word, as float32 kernels use them: u1 = ((r >> 8) + 1) / 2^24 lies in (0, 1], so
    its logarithm is finite and |z| <= sqrt(48 ln 2) = 5.77; u2 = (r >> 8) / 2^24 lies in [0, 1).

    Args:
        seed: 0 .. 2^64 - 1.
        step: one counter step, or S of them in any order, each 0 .. 2^32 - 1.
        width: number of elements; a narrower draw is a prefix of a wider one.
        trajectory: 0 .. 2^64 - 1; each is an independent stream of the same seed.

    Returns:
        float64 [S, width], or [width] for a single step.

    Raises:
        InvalidInput: an argument outside its range.
    """
    seed = _integer("seed", seed, 2**64 - 1)
    trajectory = _integer("trajectory", trajectory, 2**64 - 1)
    width = _integer("width", width, 2**34)  # the counter has 32 bits for groups of four
    steps = _words(step, "step")
    if steps.ndim > 1:
        raise InvalidInput(f"step: got shape {steps.shape}; expected one step or a row of them")
    groups = -(-width // 4)
    counter = np.empty((steps.size, groups, 4), np.uint32)  # [S, groups, 4]
    counter[..., 0] = np.arange(groups, dtype=np.uint32)
    counter[..., 1] = steps.reshape(-1, 1)
    counter[..., 2], counter[..., 3] = _halves(trajectory)
    bits = philox4x32(counter, _halves(seed)) >> np.uint32(8)  # [S, groups, 4]
    radius = np.sqrt(-2.0 * np.log((bits[..., 0::2] + 1.0) / 2**24))  # [S, groups, 2]
    angle = bits[..., 1::2] * (2.0 * np.pi / 2**24)
    normals = np.empty(counter.shape, np.float64)
    np.multiply(radius, np.cos(angle), out=normals[..., 0::2])
    np.multiply(radius, np.sin(angle), out=normals[..., 1::2])
    return normals.reshape(steps.size, 4 * groups)[:, :width].reshape(*steps.shape, width)


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
    train_steps = _integer("train_steps", train_steps, _WORD)
    visited = [_integer("timesteps", t, _WORD) for t in timesteps]
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
    return np.asarray(time_bias, np.float64)[:, None] + carried @ weight.T


def _halves(value: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit number."""
    return value & _WORD, value >> 32


def _integer(name: str, value: SupportsIndex, largest: int) -> int:
    try:
        number = operator.index(value)  # accepts NumPy integers, refuses floats
    except TypeError:
        raise InvalidInput(
            f"{name}: got {value!r} ({type(value).__name__}); expected an integer"
        ) from None
    if not 0 <= number <= largest:
        raise InvalidInput(f"{name}: got {number}; expected an integer in 0 .. {largest}")
    return number


def _words(values: ArrayLike, name: str) -> NDArray[np.uint64]:
    """32-bit words, held as uint64 so that a product of two of them is exact."""
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.uint64)
    if array.dtype.kind not in "iu":  # also what NumPy makes of integers beyond 64 bits
        raise InvalidInput(
            f"{name}: got {array.dtype} values; expected integers in 0 .. {_WORD} (32 bits)"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _WORD:
        raise InvalidInput(
            f"{name}: got {low if low < 0 else high}; expected integers in 0 .. {_WORD} (32 bits)"
        )
    return array.astype(np.uint64)

"""Counter-based noise: any element of any draw, without the ones before it.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), which maps a 128-bit counter and a 64-bit key to 128 random bits. (NumPy's
own `Philox` is the 4x64 variant: other bits.) Key and counter are laid out so that a draw depends
on what it is for and on nothing else, neither batch size, nor width, nor backend:

    key     = (low word, high word) of the seed
    counter = (element // 4, step, low word, high word of the trajectory)

The random bits are identical on every platform. The normals made of them are identical up to the
last units in the last place of the platform's logarithm, sine and cosine.
"""

from __future__ import annotations

import operator
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
    """Draw 128 random bits for each counter, by Philox4x32-10.

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
    """Draw standard normals of one trajectory at the given steps.

    Four words give four elements by the Box-Muller transform (Box and Muller 1958): words (0, 1)
    give elements 0 (cosine) and 1 (sine), words (2, 3) elements 2 and 3. Uniforms are the top
    24 bits of a word, which float32 holds exactly: u1 = ((r >> 8) + 1) / 2^24 lies in (0, 1], so
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
    seed = check_integer("seed", seed, 2**64 - 1)
    trajectory = check_integer("trajectory", trajectory, 2**64 - 1)
    width = check_integer("width", width, 2**34)  # the counter has 32 bits for groups of four
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


def check_integer(name: str, value: SupportsIndex, largest: int) -> int:
    """The value as an int in 0 .. largest, or `InvalidInput` with this name."""
    try:
        number = operator.index(value)  # accepts NumPy integers, refuses floats
    except TypeError:
        raise InvalidInput(
            f"{name}: got {value!r} ({type(value).__name__}); expected an integer"
        ) from None
    if not 0 <= number <= largest:
        raise InvalidInput(f"{name}: got {number}; expected an integer in 0 .. {largest}")
    return number


def _halves(value: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit number."""
    return value & _WORD, value >> 32


def _words(values: ArrayLike, name: str) -> NDArray[np.uint64]:
    """The values as 32-bit words, held as uint64 so that a product of two of them is exact."""
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

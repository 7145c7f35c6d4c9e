"""The noise is a contract between kernels, backends and machines: bits first, then normals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64, LIBM, SIGMAS

from marnet_sdk.errors import MarnetError
from marnet_sdk.noise.philox import philox4x32, standard_normal
from marnet_sdk.noise.trajectory import NoiseTrajectory, draw_trajectory, fold

SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.integers(0, 2**32 - 1)


# Random123, file kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    got = philox4x32(words(counter), words(key))
    assert got.dtype == np.uint32
    assert got.tolist() == words(expected)


def test_philox_works_on_each_counter_alone() -> None:
    counters = np.arange(2 * 3 * 4, dtype=np.uint32).reshape(2, 3, 4)
    together = philox4x32(counters, (7, 8))
    assert together.shape == (2, 3, 4)
    for row in range(2):
        for column in range(3):
            alone = philox4x32(counters[row, column], (7, 8))
            np.testing.assert_array_equal(together[row, column], alone)


@pytest.mark.parametrize(
    ("counter", "key", "message"),
    [
        ([0, 0, 0], (0, 0), r"counter: got shape \(3,\); expected four words"),
        (0, (0, 0), r"counter: got shape \(\)"),
        ([0, 0, 0, 2**32], (0, 0), r"counter: got 4294967296; expected integers in 0 \.\. "),
        ([0, 0, 0, -1], (0, 0), "counter: got -1"),
        ([0.0, 0, 0, 0], (0, 0), "counter: got float64 values"),
        ([0, 0, 0, 0], (0, 0, 0), r"key: got shape \(3,\); expected two words"),
        ([0, 0, 0, 0], (0, 2**64), "key: got object values"),
    ],
)
def test_philox_refuses_what_is_not_words(counter: Any, key: Any, message: str) -> None:
    with pytest.raises(MarnetError, match=message):
        philox4x32(counter, key)


# Frozen outputs. If one of these changes, every bundle's noise has changed.
# fmt: off
GOLDEN = [  # seed, step, trajectory, the first five normals
    (0, 0, 0,
     [0.9911374751458971, -0.9246627803544332, -0.6176090549848544,
      -0.4820683472644963, -0.1536381124388446]),
    (0x1234567890ABCDEF, 7, 0,
     [0.29659591099674665, -1.2409735757681932, -0.4679395251893223,
      0.7461248902929293, -0.7195924363311728]),
    (2**64 - 1, 2**32 - 1, 2**64 - 1,
     [-0.23280493821984055, -0.2614604543624918, 0.3046378038780557,
      0.8133662517840404, -0.7138244829559148]),
]
# fmt: on


@pytest.mark.parametrize(("seed", "step", "trajectory", "expected"), GOLDEN)
def test_normals_are_frozen(seed: int, step: int, trajectory: int, expected: list[float]) -> None:
    got = standard_normal(seed, step, 5, trajectory=trajectory)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=LIBM)


def test_an_element_follows_from_its_documented_counter() -> None:
    seed, step, trajectory, width = 0xA1B2C3D4E5F60718, 41, 0x123456789, 11
    got = standard_normal(seed, step, width, trajectory=trajectory)
    for element in range(width):
        counter = [element // 4, step, trajectory & 0xFFFFFFFF, trajectory >> 32]
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).tolist()
        pair = element % 4 // 2
        u1 = ((words[2 * pair] >> 8) + 1) / 2**24
        u2 = (words[2 * pair + 1] >> 8) / 2**24
        turn = math.sin if element % 2 else math.cos
        expected = math.sqrt(-2 * math.log(u1)) * turn(2 * math.pi * u2)
        assert got[element] == pytest.approx(expected, rel=0, abs=LIBM)


@given(seed=SEEDS, steps=st.lists(STEPS, max_size=6), width=st.integers(0, 37), data=st.data())
def test_a_draw_does_not_depend_on_what_is_drawn_with_it(
    seed: int, steps: list[int], width: int, data: st.DataObject
) -> None:
    full = standard_normal(seed, steps, width)
    assert full.shape == (len(steps), width)
    assert np.isfinite(full).all()
    narrower = data.draw(st.integers(0, width))
    np.testing.assert_array_equal(standard_normal(seed, steps, narrower), full[:, :narrower])
    order = data.draw(st.permutations(range(len(steps))))
    np.testing.assert_array_equal(
        standard_normal(seed, [steps[i] for i in order], width), full[order]
    )
    for row, step in enumerate(steps):
        np.testing.assert_array_equal(standard_normal(seed, step, width), full[row])


@given(seed=SEEDS, step=STEPS, bit=st.integers(0, 63))
def test_every_bit_of_seed_and_trajectory_matters(seed: int, step: int, bit: int) -> None:
    first = standard_normal(seed, step, 8)
    assert not np.array_equal(first, standard_normal(seed ^ 1 << bit, step, 8))
    assert not np.array_equal(first, standard_normal(seed, step, 8, trajectory=1 << bit))
    assert not np.array_equal(first, standard_normal(seed, step ^ 1 << bit % 32, 8))


def test_moments_and_distribution_are_those_of_a_normal() -> None:
    z = standard_normal(20240613, range(500), 400)  # [S, D]
    count = z.size
    # Standard errors of the first four moments of a standard normal: Kendall and Stuart, ch. 10.
    assert abs(z.mean()) < SIGMAS / math.sqrt(count)
    assert abs(z.var() - 1) < SIGMAS * math.sqrt(2 / count)
    assert abs((z**3).mean()) < SIGMAS * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < SIGMAS * math.sqrt(96 / count)
    assert abs(z).max() <= math.sqrt(48 * math.log(2))
    # Kolmogorov-Smirnov: sqrt(n) sup |F_n - F| exceeds 1.95 once in a thousand samples.
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.sort(z, axis=None)])
    empirical = (np.arange(count) + 0.5) / count
    assert abs(cdf - empirical).max() * math.sqrt(count) < 1.95


def test_neighbours_are_uncorrelated() -> None:
    z = standard_normal(1, range(500), 400)
    other = standard_normal(1, range(500), 400, trajectory=1)
    bound = SIGMAS / math.sqrt(z.size)
    for lag in range(1, 9):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < bound * 1.05  # fewer products than elements
        assert abs((z[lag:] * z[:-lag]).mean()) < bound * 1.05
    assert abs((z * other).mean()) < bound
    assert abs((z[:, 0::2] ** 2 * z[:, 1::2] ** 2).mean() - 1) < SIGMAS * math.sqrt(16 / z.size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed: got -1; expected an integer in 0 \.\. 18446744073709551615"),
        ({"seed": 2**64}, r"seed: got 18446744073709551616; expected"),
        ({"seed": 1.5}, r"seed: got 1\.5 \(float\); expected an integer"),
        ({"trajectory": -1}, "trajectory: got -1"),
        ({"width": -4}, "width: got -4"),
        ({"step": -1}, "step: got -1; expected integers in 0 "),
        ({"step": 2**32}, "step: got 4294967296"),
        ({"step": 2**70}, "step: got object values"),
        ({"step": [0.5]}, "step: got float64 values"),
        ({"step": [[1]]}, r"step: got shape \(1, 1\); expected one step or a row"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MarnetError, match=message):
        standard_normal(**{"seed": 0, "step": 0, "width": 4, **arguments})


def test_numpy_integers_are_integers() -> None:
    arguments: tuple[Any, ...] = (np.uint64(3), np.array([5]), np.int32(4))
    np.testing.assert_array_equal(standard_normal(*arguments), standard_normal(3, [5], 4))


def test_a_strided_sampler_meets_a_subset_of_the_full_noise() -> None:
    full = draw_trajectory(9, range(100, 0, -1), 100, 12)
    strided = draw_trajectory(9, range(100, 0, -10), 100, 12)
    np.testing.assert_array_equal(strided.initial, full.initial)
    np.testing.assert_array_equal(strided.steps, full.steps[::10])


def test_counters_of_a_trajectory() -> None:
    drawn = draw_trajectory(9, [50, 7, 1], 60, 6, trajectory=2)
    np.testing.assert_array_equal(drawn.initial, standard_normal(9, 60, 6, trajectory=2))
    np.testing.assert_array_equal(drawn.steps, standard_normal(9, [49, 6, 0], 6, trajectory=2))


@given(data=st.data(), train_steps=st.integers(1, 1000))
def test_any_decreasing_timesteps_are_accepted(data: st.DataObject, train_steps: int) -> None:
    visited = data.draw(st.sets(st.integers(1, train_steps), min_size=1, max_size=8))
    timesteps = sorted(visited, reverse=True)
    assert all(a > b for a, b in pairwise(timesteps))
    drawn = draw_trajectory(0, timesteps, train_steps, 4)
    assert drawn.initial.shape == (4,)
    assert drawn.steps.shape == (len(timesteps), 4)
    # x_T shares its counter with no step, so no number is used twice.
    assert not (drawn.steps == drawn.initial).all(axis=1).any()


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], r"got none; expected 1-based steps within 1 \.\. 10 \(train_steps\)"),
        ([11, 3], r"got 11 \.\. 3; expected 1-based"),
        ([3, 0], r"got 3 \.\. 0; expected 1-based"),
        ([1, 2], "got 2 after 1; expected a decreasing sequence"),
        ([5, 5], "got 5 after 5; expected a decreasing sequence"),
        ([2.5], r"timesteps: got 2\.5 \(float\)"),
    ],
)
def test_impossible_timesteps_are_refused(timesteps: list[Any], message: str) -> None:
    with pytest.raises(MarnetError, match=message):
        draw_trajectory(0, timesteps, 10, 4)


RNG = np.random.default_rng(0)
STEPS_, WIDTH, HIDDEN = 6, 5, 7
COEFFICIENTS = RNG.normal(0.2, 0.5, (STEPS_, 4))
TIME_BIAS = RNG.standard_normal((STEPS_, HIDDEN))
INPUT_WEIGHT = RNG.standard_normal((HIDDEN, WIDTH))
OUTPUT_BIAS = RNG.standard_normal(WIDTH)


def draws(count: int) -> list[NoiseTrajectory]:
    return [
        draw_trajectory(4, range(STEPS_, 0, -1), STEPS_, WIDTH, trajectory=k) for k in range(count)
    ]


def test_folding_adds_up_what_no_image_has_a_part_in() -> None:
    """Against the chain itself, with estimates of b_4 alone, in exact sums."""
    got = fold(draws(3), COEFFICIENTS, TIME_BIAS, INPUT_WEIGHT, OUTPUT_BIAS)
    assert got.shape == (STEPS_, 3, HIDDEN)
    assert got.dtype == np.float64
    for k, drawn in enumerate(draws(3)):
        x = [float(v) for v in drawn.initial]
        for i, (a, b, c, s) in enumerate(COEFFICIENTS):
            seen = [
                math.fsum([*(row * x), t])
                for row, t in zip(INPUT_WEIGHT, TIME_BIAS[i], strict=True)
            ]
            np.testing.assert_allclose(got[i, k], seen, rtol=FLOAT64, atol=LIBM)
            previous = OUTPUT_BIAS if i else np.zeros(WIDTH)
            terms = zip(x, OUTPUT_BIAS, previous, drawn.steps[i], strict=True)
            x = [math.fsum([a * v, b * e, c * p, s * z]) for v, e, p, z in terms]


def test_noise_that_a_step_does_not_use_is_not_drawn_and_not_missed() -> None:
    quiet = COEFFICIENTS.copy()
    quiet[[0, 2, 5], 3] = 0
    visited = range(STEPS_, 0, -1)
    some = draw_trajectory(4, visited, STEPS_, WIDTH, noisy=quiet[:, 3] != 0)
    assert (some.steps == 0).all(axis=1).tolist() == [True, False, True, False, False, True]
    shared = (quiet, TIME_BIAS, INPUT_WEIGHT, OUTPUT_BIAS)
    np.testing.assert_array_equal(fold([some], *shared), fold(draws(1), *shared))


def test_a_sample_does_not_depend_on_how_many_are_drawn_with_it() -> None:
    shared = (COEFFICIENTS, TIME_BIAS, INPUT_WEIGHT, OUTPUT_BIAS)
    many = fold(draws(4), *shared)
    for k, one in enumerate(draws(4)):
        # Matrix products of other shapes may add in another order.
        np.testing.assert_allclose(fold([one], *shared)[:, 0], many[:, k], rtol=FLOAT64, atol=LIBM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_weight": np.zeros((HIDDEN, 3))}, r"input_weight \(7, 3\).*expected \[H, 5\]"),
        ({"input_weight": np.zeros(HIDDEN)}, r"input_weight \(7,\)"),
        ({"output_bias": np.zeros(4)}, r"output_bias \(4,\)"),
        ({"time_bias": np.zeros((5, HIDDEN))}, r"time_bias \(5, 7\).*\[6, H\] and 6 steps"),
        ({"coefficients": np.zeros((5, 4))}, "trajectories of 6 steps .* and 5 steps"),
    ],
)
def test_folding_refuses_arrays_that_do_not_belong_together(change, message) -> None:
    arrays = {
        "coefficients": COEFFICIENTS,
        "time_bias": TIME_BIAS,
        "input_weight": INPUT_WEIGHT,
        "output_bias": OUTPUT_BIAS,
    }
    with pytest.raises(MarnetError, match=message):
        fold(draws(1), **arrays | change)

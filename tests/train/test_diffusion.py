"""Schedules, sampler tables and the reference loop: oracle values, closed forms, diffusers.

Axes: T steps of the schedule, S visited timesteps, B batch, D feature.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import CHAIN_MEAN, CHAIN_VARIANCE, FLOAT64, PRINTED, SAMPLE_MOMENT
from torch import Tensor

from marnet_sdk.errors import InvalidInput
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.diffusion import (
    SamplerTable,
    ScheduleConfig,
    alphas_cumprod,
    cosine_betas,
    ddpm_table,
    q_sample,
    sample,
    sampler_table,
    sampling_timesteps,
    trajectory_tensors,
)


def toy_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear in x and t: an error in either shows in every later step."""
    return torch.tanh(0.7 * x - 0.3 * x.roll(1, dims=-1)) * (1 + 0.1 * t[:, None].sqrt())


def test_cosine_schedule_of_four_steps_has_the_oracle_values() -> None:
    betas = [0.152988, 0.416958, 0.707859, 0.999]
    abar = [1.0, 8.470122e-1, 4.938436e-1, 1.442721e-1, 1.442721e-4]
    np.testing.assert_allclose(cosine_betas(4), betas, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(alphas_cumprod(ScheduleConfig(steps=4)), abar, rtol=PRINTED)


def test_ddpm_table_of_four_steps_has_the_oracle_values() -> None:
    table = sampler_table(ScheduleConfig(steps=4), "ddpm")
    x, x0, previous, sigma = table.coefficients.T
    assert table.timesteps == (4, 3, 2, 1)
    np.testing.assert_allclose(x0, [0.379507, 0.581307, 0.758145, 1.0], rtol=0, atol=PRINTED)
    np.testing.assert_allclose(x, [0.027064, 0.319702, 0.230793, 0.0], rtol=0, atol=PRINTED)
    np.testing.assert_allclose(sigma**2, [0.854996, 0.418693, 0.126027, 0], rtol=0, atol=PRINTED)
    np.testing.assert_array_equal(previous, 0)


@given(train=st.integers(1, 300), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_table_of_any_length_follows_equations_21_to_23(train: int, share: float) -> None:
    """Each row takes N(sqrt(abar_t) x0, 1 - abar_t) to N(sqrt(abar_p) x0, 1 - abar_p)."""
    table = sampler_table(ScheduleConfig(steps=train), "ddpm", max(1, round(share * train)))
    abar = alphas_cumprod(ScheduleConfig(steps=train))
    now, after = abar[list(table.timesteps)], abar[[*table.timesteps[1:], 0]]
    x, x0, _, sigma = table.coefficients.T
    np.testing.assert_allclose(x * np.sqrt(now) + x0, np.sqrt(after), rtol=FLOAT64)
    np.testing.assert_allclose(
        x**2 * (1 - now) + sigma**2, 1 - after, rtol=FLOAT64, atol=FLOAT64**2
    )


@given(train=st.integers(1, 2000), data=st.data())
@settings(max_examples=100, deadline=None)
def test_timesteps_fall_in_steps_that_are_as_even_as_integers_allow(
    train: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(1, train))
    found = sampling_timesteps(train, steps)
    assert found[0] == train
    assert len(found) == steps
    assert found[-1] >= 1
    gaps = {earlier - later for earlier, later in zip(found, [*found[1:], 0], strict=True)}
    assert gaps <= {train // steps, -(-train // steps)}
    assert all(
        abs(t - train * k / steps) <= 0.5 for t, k in zip(found, range(steps, 0, -1), strict=True)
    )


def test_timesteps_by_hand() -> None:
    assert sampling_timesteps(100, 4) == [100, 75, 50, 25]
    assert sampling_timesteps(10, 4) == [10, 8, 5, 3]  # 7.5 and 2.5 both go up
    assert sampling_timesteps(5, 5) == [5, 4, 3, 2, 1]
    assert sampling_timesteps(7, 1) == [7]


def test_one_step_from_pure_noise_is_the_networks_estimate() -> None:
    table = sampler_table(ScheduleConfig(steps=50), "ddpm", steps=1)
    x = torch.randn(3, 5, dtype=torch.float64)
    out = sample(toy_denoiser, table, x, torch.randn(1, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(out, toy_denoiser(x, torch.full((3,), 50)), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 4, 25, 100])
def test_the_last_step_returns_the_network_output_itself(steps: int) -> None:
    table = sampler_table(ScheduleConfig(steps=100), "ddpm", steps)
    np.testing.assert_array_equal(table.coefficients[-1], [0, 1, 0, 0])
    outputs = []

    def remember(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(toy_denoiser(x, t))
        return outputs[-1]

    out = sample(remember, table, torch.ones(2, 3), torch.ones(steps, 2, 3))
    assert torch.equal(out, outputs[-1])


def test_the_noise_of_the_last_step_is_not_used() -> None:
    table = sampler_table(ScheduleConfig(steps=6), "ddpm")
    noise = torch.randn(6, 2, 3, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64)
    before = sample(toy_denoiser, table, start, noise)
    noise[-1] += 1e6
    assert torch.equal(sample(toy_denoiser, table, start, noise), before)
    noise[-2] += 1
    assert not torch.equal(sample(toy_denoiser, table, start, noise), before)


def test_the_previous_estimate_reaches_the_next_step() -> None:
    """The column that DDPM leaves at zero: x0_{i-1} is zero at first, then the step before's."""
    rows = np.array([[0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.float64)
    table = SamplerTable("two-step", 2, (2, 1), rows)
    x = torch.full((1, 2), 3.0)
    out = sample(lambda x, t: 10.0 * t[:, None] + x, table, x, torch.zeros(2, 1, 2))
    assert torch.equal(out, torch.full((1, 2), 23.0))  # the estimate at t = 2


def test_noised_features_have_the_moments_of_equation_15() -> None:
    abar = torch.tensor(alphas_cumprod(ScheduleConfig(steps=10)))
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 11).repeat_interleave(20_000)
    x0 = torch.full((len(t), 1), 2.0, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    drawn = q_sample(x0, t, noise, abar).view(10, 20_000)
    torch.testing.assert_close(drawn.mean(dim=1), 2 * abar[1:].sqrt(), rtol=0, atol=SAMPLE_MOMENT)
    torch.testing.assert_close(drawn.var(dim=1), 1 - abar[1:], rtol=0, atol=SAMPLE_MOMENT)


def test_noising_takes_each_row_to_its_own_timestep() -> None:
    abar = torch.tensor([1.0, 0.81, 0.25], dtype=torch.float64)
    x0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    drawn = q_sample(x0, torch.tensor([2, 1]), torch.ones_like(x0), abar)
    by_hand = [[0.5 + 0.75**0.5, 1.0 + 0.75**0.5], [2.7 + 0.19**0.5, 3.6 + 0.19**0.5]]
    torch.testing.assert_close(drawn, torch.tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize(("train", "steps"), [(4, 4), (100, 100), (100, 20), (100, 7), (50, 1)])
def test_the_loop_agrees_with_diffusers_at_every_step(train: int, steps: int) -> None:
    config = ScheduleConfig(steps=train)
    table = sampler_table(config, "ddpm", steps)
    reference = diffusers_scheduler(cosine_betas(train))
    reference.set_timesteps(timesteps=[t - 1 for t in table.timesteps])  # theirs count from 0
    start = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs, ours = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)

    noise = torch.zeros(steps, 3, 5, dtype=torch.float64)
    for i in range(steps - 1):
        noise[i] = torch.randn(3, 5, dtype=torch.float64, generator=ours)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return toy_denoiser(x, t)

    end = sample(denoise, table, start, noise)
    x = start
    for i, t in enumerate(table.timesteps):
        torch.testing.assert_close(seen[i], x, rtol=FLOAT64, atol=FLOAT64)
        estimate = toy_denoiser(x, torch.full((3,), t))
        x = reference.step(estimate, t - 1, x, generator=theirs).prev_sample
    torch.testing.assert_close(end, x, rtol=FLOAT64, atol=FLOAT64)


def diffusers_scheduler(betas: np.ndarray) -> DDPMScheduler:
    scheduler = DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type="sample",
        clip_sample=False,
        variance_type="fixed_small",
    )
    # It rounds its constants to float32; the formulas are what is compared here.
    scheduler.betas = torch.tensor(betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(dim=0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.5, 0.4), (-2.0, 2.0)])
def test_the_exact_predictor_of_a_gaussian_gives_that_gaussian_back(
    mean: float, deviation: float
) -> None:
    """x0 ~ N(m, v) and x_t = sqrt(a) x0 + sqrt(1 - a) z give
    E[x0 | x_t] = m + v sqrt(a) / (v a + 1 - a) (x_t - sqrt(a) m).

    With this predictor the chain is affine in its noise, so the moments of its output follow from
    one run on unit vectors, without drawing anything.
    """
    variance = deviation**2
    config = ScheduleConfig(steps=1000)
    abar = torch.tensor(alphas_cumprod(config))

    def exact(x: Tensor, t: Tensor) -> Tensor:
        a = abar[t][:, None]
        return mean + variance * a.sqrt() / (variance * a + 1 - a) * (x - a.sqrt() * mean)

    unit = torch.eye(1002, dtype=torch.float64)[:, :, None]  # [source, row, D = 1]
    out = sample(exact, sampler_table(config, "ddpm"), unit[0], unit[1:1001])  # [1002, 1]
    found_mean = out[-1]  # the last row met no noise at all
    found_variance = (out[:-1] - found_mean).square().sum()
    assert float(found_mean) == pytest.approx(mean, abs=CHAIN_MEAN)
    assert float(found_variance) == pytest.approx(variance, rel=CHAIN_VARIANCE)


def test_fewer_steps_of_the_exact_predictor_lose_variance_but_not_the_mean() -> None:
    config = ScheduleConfig(steps=100)
    abar = torch.tensor(alphas_cumprod(config))
    generator = torch.Generator().manual_seed(3)

    def exact(x: Tensor, t: Tensor) -> Tensor:  # of N(1, 1)
        a = abar[t][:, None].sqrt()
        return 1 + a * (x - a)

    variances = []
    for steps in (4, 20, 100):
        start, noise = (
            torch.randn(shape, dtype=torch.float64, generator=generator)
            for shape in ((20_000, 1), (steps, 20_000, 1))
        )
        out = sample(exact, sampler_table(config, "ddpm", steps), start, noise)
        assert float(out.mean()) == pytest.approx(1, abs=SAMPLE_MOMENT)
        variances.append(float(out.var()))
    assert variances[0] < variances[1] < variances[2] < 1 + SAMPLE_MOMENT


def test_a_shared_trajectory_gives_every_image_the_same_noise() -> None:
    table = sampler_table(ScheduleConfig(steps=8), "ddpm", 4)
    trajectory = draw_trajectory(5, table.timesteps, table.train_steps, 6)
    initial, noise = trajectory_tensors(trajectory, 3, torch.zeros(1, dtype=torch.float64))
    assert initial.shape == (3, 6)
    assert noise.shape == (4, 1, 6)
    out = sample(toy_denoiser, table, initial, noise)
    alone = sample(toy_denoiser, table, initial[:1], noise)
    assert torch.equal(out, alone.expand(3, -1))


def test_a_table_does_not_depend_on_which_other_timesteps_were_visited_before() -> None:
    abar = alphas_cumprod(ScheduleConfig(steps=20))
    long, short = ddpm_table(abar, [20, 12, 5, 1]), ddpm_table(abar, [12, 5, 1])
    np.testing.assert_array_equal(long[1:], short)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_an_impossible_number_of_sampling_steps_is_refused(steps: int) -> None:
    with pytest.raises(InvalidInput, match=rf"got {steps} sampling steps; .* choose 1 to 100"):
        sampler_table(ScheduleConfig(steps=100), "ddpm", steps)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"sampler 'ddmp' is unknown; choose from"):
        sampler_table(ScheduleConfig(), "ddmp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosin"}, "schedule kind 'cosin' is unknown"),
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"max_beta": 1.0}, "0 < max_beta < 1, got offset 0.008 and max_beta 1.0"),
        ({"offset": -0.5}, "offset >= 0 .* got offset -0.5"),
        ({"offset": float("nan")}, "offset >= 0 .* got offset nan"),
    ],
)
def test_an_impossible_schedule_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ScheduleConfig(**change)

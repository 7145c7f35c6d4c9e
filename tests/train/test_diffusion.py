"""Schedules, sampler tables and the reference loop: oracle values, closed forms, diffusers.

Axes: T steps of the schedule, S visited timesteps, B batch, D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import (
    CHAIN_MEAN,
    CHAIN_VARIANCE,
    FIRST_ORDER,
    FLOAT32_TWICE,
    FLOAT64,
    PRINTED,
    SAMPLE_MOMENT,
    SECOND_ORDER,
)
from torch import Tensor

from marnet_sdk.errors import InvalidInput
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.diffusion import (
    SAMPLERS,
    SCHEDULE_PRESETS,
    SamplerTable,
    ScheduleConfig,
    alphas_cumprod,
    cosine_betas,
    ddim_rows,
    ddpm_rows,
    dpmpp_rows,
    linear_betas,
    q_sample,
    sample,
    sampler_table,
    sampling_timesteps,
    trajectory_tensors,
)

# Every sampler, and ddim at three values of eta.
SETTINGS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0), ("dpmpp", 0.0)]
every_setting = pytest.mark.parametrize(("sampler", "eta"), SETTINGS)


def toy_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear in x and t: an error in either shows in every later step."""
    return torch.tanh(0.7 * x - 0.3 * x.roll(1, dims=-1)) * (1 + 0.1 * t[:, None].sqrt())


def test_cosine_schedule_of_four_steps_has_the_oracle_values() -> None:
    betas = [0.152988, 0.416958, 0.707859, 0.999]
    abar = [1.0, 8.470122e-1, 4.938436e-1, 1.442721e-1, 1.442721e-4]
    np.testing.assert_allclose(cosine_betas(4), betas, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(alphas_cumprod(ScheduleConfig(steps=4)), abar, rtol=PRINTED)


# abar_T of DDPM's betas, as far as it is printed.
LINEAR_ENDS = {20: "0.817", 100: "0.364", 200: "0.132", 500: "0.0064", 1000: "0.00004"}


@pytest.mark.parametrize("steps", LINEAR_ENDS)
def test_the_linear_schedule_ends_at_the_oracle_values(steps: int) -> None:
    printed = LINEAR_ENDS[steps]
    digits = len(printed) - len("0.")
    abar = alphas_cumprod(ScheduleConfig("linear", steps))
    assert f"{abar[-1]:.{digits}f}" == printed
    assert abar.shape == (steps + 1,)
    assert abar[0] == 1
    assert abar[1] == 1 - 1e-4
    assert (np.diff(abar) < 0).all()


def test_linear_betas_are_evenly_spaced_from_the_first_to_the_last() -> None:
    np.testing.assert_allclose(
        linear_betas(5, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5], rtol=0, atol=FLOAT64
    )
    assert linear_betas(7)[[0, -1]].tolist() == [1e-4, 0.02]
    by_hand = [1.0, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]
    config = ScheduleConfig("linear", 3, first_beta=0.1, last_beta=0.3)
    np.testing.assert_allclose(alphas_cumprod(config), by_hand, rtol=FLOAT64)


def test_the_named_schedules_are_what_they_say() -> None:
    assert set(SCHEDULE_PRESETS) == {"cosine100", "group_linear20"}
    cosine, linear = SCHEDULE_PRESETS["cosine100"], SCHEDULE_PRESETS["group_linear20"]
    assert (cosine, linear) == (ScheduleConfig("cosine", 100), ScheduleConfig("linear", 20))
    assert f"{alphas_cumprod(linear)[-1]:.3f}" == LINEAR_ENDS[20]


@pytest.mark.parametrize(("steps", "printed"), [(20, "6e-06"), (100, "2e-07")])
def test_the_cosine_schedule_ends_in_nearly_pure_noise(steps: int, printed: str) -> None:
    assert f"{alphas_cumprod(ScheduleConfig(steps=steps))[-1]:.0e}" == printed


@pytest.mark.parametrize(("kind", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear",) * 2])
@pytest.mark.parametrize("steps", [4, 20, 100, 1000])
def test_the_schedules_are_those_of_diffusers(kind: str, theirs: str, steps: int) -> None:
    reference = DDPMScheduler(steps, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    abar = alphas_cumprod(ScheduleConfig(kind, steps))
    np.testing.assert_allclose(abar[1:], reference.alphas_cumprod.numpy(), rtol=FLOAT32_TWICE)


def test_ddpm_table_of_four_steps_has_the_oracle_values() -> None:
    table = sampler_table(ScheduleConfig(steps=4), "ddpm")
    x, x0, previous, sigma = table.coefficients.T
    assert table.timesteps == (4, 3, 2, 1)
    np.testing.assert_allclose(x0, [0.379507, 0.581307, 0.758145, 1.0], rtol=0, atol=PRINTED)
    np.testing.assert_allclose(x, [0.027064, 0.319702, 0.230793, 0.0], rtol=0, atol=PRINTED)
    np.testing.assert_allclose(sigma**2, [0.854996, 0.418693, 0.126027, 0], rtol=0, atol=PRINTED)
    np.testing.assert_array_equal(previous, 0)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    """Up to 300 steps, of which none but the cosine's last takes more than half of the signal."""
    first, last = sorted(draw(st.lists(st.floats(1e-5, 0.5), min_size=2, max_size=2)))
    kind, steps = draw(st.sampled_from(["cosine", "linear"])), draw(st.integers(1, 300))
    return ScheduleConfig(kind, steps, first_beta=first, last_beta=last)


@given(schedules(), st.sampled_from(SAMPLERS), st.floats(0, 1), st.floats(0, 1))
def test_every_row_keeps_the_marginals_of_the_forward_process(
    config: ScheduleConfig, sampler: str, share: float, eta: float
) -> None:
    """Each row takes N(sqrt(abar_t) x0, 1 - abar_t) to N(sqrt(abar_p) x0, 1 - abar_p)."""
    steps = max(1, round(share * config.steps))
    table = sampler_table(config, sampler, steps, eta if sampler == "ddim" else 0)
    abar = alphas_cumprod(config)
    now, after = abar[list(table.timesteps)], abar[[*table.timesteps[1:], 0]]
    x, x0, previous, sigma = table.coefficients.T
    np.testing.assert_allclose(
        x * np.sqrt(now) + x0 + previous, np.sqrt(after), rtol=FLOAT64, atol=FLOAT64
    )
    np.testing.assert_allclose(
        x**2 * (1 - now) + sigma**2, 1 - after, rtol=FLOAT64, atol=FLOAT64**2
    )
    assert (x >= 0).all()
    assert (sigma >= 0).all()
    np.testing.assert_array_equal(table.coefficients[-1], [0, 1, 0, 0])


@given(train=st.integers(1, 2000), data=st.data())
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


@every_setting
def test_one_step_from_pure_noise_is_the_networks_estimate(sampler: str, eta: float) -> None:
    table = sampler_table(ScheduleConfig(steps=50), sampler, 1, eta)
    x = torch.randn(3, 5, dtype=torch.float64)
    out = sample(toy_denoiser, table, x, torch.randn(1, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(out, toy_denoiser(x, torch.full((3,), 50)), rtol=0, atol=0)


@every_setting
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 25, 100])
def test_the_last_step_returns_the_network_output_itself(
    steps: int, kind: str, sampler: str, eta: float
) -> None:
    table = sampler_table(ScheduleConfig(kind, 100), sampler, steps, eta)
    assert (table.sampler, table.train_steps, table.eta) == (sampler, 100, eta)
    assert table.timesteps == tuple(sampling_timesteps(100, steps))
    assert table.coefficients.shape == (steps, 4)
    np.testing.assert_array_equal(table.coefficients[-1], [0, 1, 0, 0])
    outputs = []

    def remember(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(toy_denoiser(x, t))
        return outputs[-1]

    out = sample(remember, table, torch.ones(2, 3), torch.ones(steps, 2, 3))
    assert torch.equal(out, outputs[-1])


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.3)])
def test_the_noise_of_the_last_step_is_not_used(sampler: str, eta: float) -> None:
    table = sampler_table(ScheduleConfig(steps=6), sampler, eta=eta)
    noise = torch.randn(6, 2, 3, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64)
    before = sample(toy_denoiser, table, start, noise)
    noise[-1] += 1e6
    assert torch.equal(sample(toy_denoiser, table, start, noise), before)
    noise[-2] += 1
    assert not torch.equal(sample(toy_denoiser, table, start, noise), before)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_a_deterministic_sampler_uses_no_noise_but_the_start(sampler: str) -> None:
    table = sampler_table(ScheduleConfig(steps=6), sampler)
    np.testing.assert_array_equal(table.coefficients[:, 3], 0)
    start = torch.randn(2, 3, dtype=torch.float64)
    ends = [sample(toy_denoiser, table, start, z * torch.ones(6, 1, 3)) for z in (0, 1e6)]
    assert torch.equal(*ends)


def test_the_previous_estimate_reaches_the_next_step() -> None:
    """The column that DDPM leaves at zero: x0_{i-1} is zero at first, then the step before's."""
    rows = np.array([[0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.float64)
    table = SamplerTable("two-step", 2, (2, 1), rows)
    x = torch.full((1, 2), 3.0)
    out = sample(lambda x, t: 10.0 * t[:, None] + x, table, x, torch.zeros(2, 1, 2))
    assert torch.equal(out, torch.full((1, 2), 23.0))  # the estimate at t = 2


def test_a_progressive_network_sees_its_estimate_of_the_step_before_beside_the_state() -> None:
    table = sampler_table(ScheduleConfig(steps=4), "ddpm")
    seen, estimates = [], [torch.zeros(2, 3, dtype=torch.float64)]

    def remember(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        estimates.append(toy_denoiser(x[:, :3], t))
        return estimates[-1]

    start, noise = torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 2, 3, dtype=torch.float64)
    out = sample(remember, table, start, noise, progressive=True)
    for x, before in zip(seen, estimates, strict=False):
        assert torch.equal(x[:, 3:], before)
    assert torch.equal(seen[0][:, :3], start)
    assert torch.equal(out, sample(toy_denoiser, table, start, noise))


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


@every_setting
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("train", "steps"), [(4, 4), (100, 100), (100, 20), (100, 7), (20, 16), (1000, 10), (50, 1)]
)
def test_the_loop_agrees_with_diffusers_at_every_step(
    train: int, steps: int, kind: str, sampler: str, eta: float
) -> None:
    config = ScheduleConfig(kind, train)
    table = sampler_table(config, sampler, steps, eta)
    start = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.zeros(steps, 3, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for i in range(steps - 1):
        noise[i] = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return toy_denoiser(x, t)

    end = sample(denoise, table, start, noise)
    step = DIFFUSERS[sampler](config, table)
    x = start
    for i, t in enumerate(table.timesteps):
        torch.testing.assert_close(seen[i], x, rtol=FLOAT64, atol=FLOAT64)
        x = step(i, toy_denoiser(x, torch.full((3,), t)), x, noise[i])
    torch.testing.assert_close(end, x, rtol=FLOAT64, atol=FLOAT64)


# One step of a scheduler of diffusers: (i, estimate of x_0, x, z) -> next x. They round their
# constants to float32; the formulas are what is compared here. Their timesteps count from 0.
Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]
DIRECT = {"prediction_type": "sample"}


def exact_betas(config: ScheduleConfig) -> NDArray[np.float64]:
    return cosine_betas(config.steps) if config.kind == "cosine" else linear_betas(config.steps)


def diffusers_ddpm(config: ScheduleConfig, table: SamplerTable) -> Step:
    betas = exact_betas(config)
    scheduler = DDPMScheduler(
        trained_betas=betas.tolist(),
        num_train_timesteps=config.steps,
        clip_sample=False,
        variance_type="fixed_small",
        **DIRECT,
    )
    scheduler.betas = torch.tensor(betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(dim=0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=[t - 1 for t in table.timesteps])
    generator = torch.Generator().manual_seed(2)  # it draws its noise itself, in the same order

    def step(i: int, estimate: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return scheduler.step(estimate, table.timesteps[i] - 1, x, generator=generator).prev_sample

    return step


def diffusers_ddim(config: ScheduleConfig, table: SamplerTable) -> Step:
    betas = exact_betas(config)
    scheduler = DDIMScheduler(
        trained_betas=betas.tolist(),
        num_train_timesteps=config.steps,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **DIRECT,
    )
    scheduler.alphas_cumprod = torch.tensor(1 - betas).cumprod(dim=0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    steps = len(table.timesteps)
    scheduler.set_timesteps(steps)
    even = config.steps % steps == 0
    if even:
        assert scheduler.timesteps.tolist() == [t - 1 for t in table.timesteps]

    def step(i: int, estimate: Tensor, x: Tensor, z: Tensor) -> Tensor:
        t, p = (*table.timesteps, 0)[i : i + 2]
        if not even:  # it takes T // S for the distance of any two timesteps: make that t - p
            scheduler.num_inference_steps = 1
            scheduler.register_to_config(num_train_timesteps=t - p)
        return scheduler.step(estimate, t - 1, x, eta=table.eta, variance_noise=z).prev_sample

    return step


class WholeDPMSolver(DPMSolverMultistepScheduler):
    """Its `step` rounds the sample to float32; here the formulas get it as it came."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        self.whole = sample
        return super().step(model_output, timestep, sample).prev_sample

    def dpm_solver_first_order_update(self, model_output: Tensor, **_: Tensor) -> Tensor:
        self.orders = [*getattr(self, "orders", []), 1]
        return super().dpm_solver_first_order_update(model_output, sample=self.whole)

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], **_: Tensor
    ) -> Tensor:
        self.orders = [*self.orders, 2]
        return super().multistep_dpm_solver_second_order_update(
            model_output_list, sample=self.whole
        )


def diffusers_dpmpp(config: ScheduleConfig, table: SamplerTable) -> Step:
    betas = exact_betas(config)
    scheduler = WholeDPMSolver(
        trained_betas=betas.tolist(),
        num_train_timesteps=config.steps,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",  # which makes the last step one of first order
        lower_order_final=False,
        **DIRECT,
    )
    visited = [t - 1 for t in table.timesteps]
    abar = np.cumprod(1 - betas)
    scheduler.alphas_cumprod = abar  # of numpy, which warns when a tensor is made an array
    scheduler.set_timesteps(timesteps=visited)
    rounded = scheduler.sigmas
    scheduler.sigmas = torch.tensor([*np.sqrt((1 - abar) / abar)[visited], 0.0])
    torch.testing.assert_close(rounded.double(), scheduler.sigmas, rtol=FLOAT32_TWICE, atol=0)

    def step(i: int, estimate: Tensor, x: Tensor, z: Tensor) -> Tensor:
        after = scheduler.step(estimate, visited[i], x)
        first_order = i in (0, len(visited) - 1)
        assert len(scheduler.orders) == i + 1
        assert scheduler.orders[i] == (1 if first_order else 2)
        return after

    return step


DIFFUSERS = {"ddpm": diffusers_ddpm, "ddim": diffusers_ddim, "dpmpp": diffusers_dpmpp}


@every_setting
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.5, 0.4), (-2.0, 2.0)])
def test_the_exact_predictor_of_a_gaussian_gives_that_gaussian_back(
    mean: float, deviation: float, sampler: str, eta: float
) -> None:
    """x0 ~ N(m, v) and x_t = sqrt(a) x0 + sqrt(1 - a) z give
    E[x0 | x_t] = m + v sqrt(a) / (v a + 1 - a) (x_t - sqrt(a) m).

    With this predictor the chain is affine in its noise, so the moments of its output follow from
    one run on unit vectors, without drawing anything. Without noise in the steps (ddim with eta 0,
    dpmpp) it is an affine map of the start alone.
    """
    variance = deviation**2
    config = ScheduleConfig(steps=1000)
    abar = torch.tensor(alphas_cumprod(config))

    def exact(x: Tensor, t: Tensor) -> Tensor:
        a = abar[t][:, None]
        return mean + variance * a.sqrt() / (variance * a + 1 - a) * (x - a.sqrt() * mean)

    unit = torch.eye(1002, dtype=torch.float64)[:, :, None]  # [source, row, D = 1]
    table = sampler_table(config, sampler, eta=eta)
    out = sample(exact, table, unit[0], unit[1:1001])  # [1002, 1]
    found_mean = out[-1]  # the last row met no noise at all
    gains = (out[:-1] - found_mean).square()
    found_variance = gains.sum()
    assert bool(gains[1:].any()) == table.coefficients[:, 3].any()
    assert float(found_mean) == pytest.approx(mean, abs=CHAIN_MEAN)
    assert float(found_variance) == pytest.approx(variance, rel=CHAIN_VARIANCE)


def interior_end(rows: Callable[..., NDArray[np.float64]], steps: int, grid: str) -> Tensor:
    """x at s = 0.2 of the cosine schedule, from a fixed x at s = 0.8, in `steps` steps.

    The predictor is smooth, and nonlinear in both x and the noise level.
    """

    def cosine(s: float | NDArray[np.float64]) -> NDArray[np.float64]:
        return np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2

    def half_log_snr(abar: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(abar / (1 - abar)) / 2

    if grid == "time":
        nodes = cosine(np.linspace(0.8, 0.2, steps + 1))
    else:  # even in the half log of the signal-to-noise ratio
        ends = half_log_snr(cosine(np.array([0.8, 0.2])))
        nodes = 1 / (1 + np.exp(-2 * np.linspace(*ends, steps + 1)))
    level = torch.tensor(nodes)

    def denoise(x: Tensor, t: Tensor) -> Tensor:  # t counts down from S, as a timestep would
        sigma = (1 - level[steps - t])[:, None].sqrt()
        return torch.tanh(1.3 * x - 0.4 * x.roll(1, dims=-1)) * (1 - 0.5 * sigma**2) + 0.3 * sigma

    table = SamplerTable("interior", steps, tuple(range(steps, 0, -1)), rows(nodes))
    x = torch.tensor([[-1.1, 0.2, 0.9, 1.7]], dtype=torch.float64)
    return sample(denoise, table, x, torch.zeros(steps, 1, 4))


@pytest.mark.parametrize("grid", ["time", "log-snr"])
@pytest.mark.parametrize(
    ("rows", "least", "most"), [(ddim_rows, *FIRST_ORDER), (dpmpp_rows, *SECOND_ORDER)]
)
def test_the_error_falls_with_the_order_of_the_sampler(
    rows: Callable[..., NDArray[np.float64]], least: float, most: float, grid: str
) -> None:
    truth = interior_end(dpmpp_rows, 4000, grid)
    counts = [20, 40, 80, 160, 320]
    errors = [float((interior_end(rows, n, grid) - truth).norm()) for n in counts]
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert least < order < most


def test_both_deterministic_samplers_solve_the_same_equation() -> None:
    """Their limits agree, on whichever grid: the reference above is not of dpmpp's own making."""
    ends = [interior_end(ddim_rows, n, "time") for n in (1000, 2000)]
    extrapolated = 2 * ends[1] - ends[0]  # Richardson: the first order cancels
    for grid in ("time", "log-snr"):
        truth = interior_end(dpmpp_rows, 4000, grid)
        torch.testing.assert_close(extrapolated, truth, rtol=0, atol=PRINTED)


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


@pytest.mark.parametrize(
    ("rows", "memory"),
    [(ddpm_rows, 0), (ddim_rows, 0), (partial(ddim_rows, eta=0.3), 0), (dpmpp_rows, 1)],
)
def test_a_row_does_not_depend_on_timesteps_that_it_does_not_use(
    rows: Callable[..., NDArray[np.float64]], memory: int
) -> None:
    abar = alphas_cumprod(ScheduleConfig(steps=20))
    long, short = rows(abar[[20, 12, 5, 1, 0]]), rows(abar[[12, 5, 1, 0]])
    np.testing.assert_array_equal(long[1 + memory :], short[memory:])
    np.testing.assert_array_equal(long[:-1], rows(abar[[20, 12, 5, 1]]))  # nor on later ones


@given(schedules(), st.floats(0, 1))
def test_ddim_with_an_eta_of_one_is_ddpm(config: ScheduleConfig, share: float) -> None:
    steps = max(1, round(share * config.steps))
    ddim, ddpm = sampler_table(config, "ddim", steps, 1.0), sampler_table(config, "ddpm", steps)
    np.testing.assert_allclose(ddim.coefficients, ddpm.coefficients, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("last", np.linspace(0.7, 0.75, 40).tolist())
def test_an_eta_of_one_is_never_refused_for_a_rounding(last: float) -> None:
    """Where abar_t is less than abar_p by 16 digits and more, all variance of a step is noise."""
    config = ScheduleConfig("linear", 1000, last_beta=last)
    for steps in (2, 3, 5, 7):
        sampler_table(config, "ddim", steps, 1.0)


@given(schedules(), st.floats(0, 1))
def test_dpmpp_is_ddim_with_an_extrapolated_estimate(config: ScheduleConfig, share: float) -> None:
    """x0_i + (x0_i - x0_{i-1}) h_i / (2 h_{i-1}) for x0_i, but in the first step and the last."""
    steps = max(1, round(share * config.steps))
    dpmpp, ddim = sampler_table(config, "dpmpp", steps), sampler_table(config, "ddim", steps)
    x, x0, previous, sigma = dpmpp.coefficients.T
    np.testing.assert_allclose(
        np.stack([x, x0 + previous, 0 * x, sigma], axis=1), ddim.coefficients, rtol=0, atol=FLOAT64
    )
    abar = alphas_cumprod(config)[list(dpmpp.timesteps)]
    h = np.diff(np.log(abar / (1 - abar)) / 2)  # up to the last step but one
    expected = np.zeros(steps)
    expected[1:-1] = -ddim.coefficients[1:-1, 1] * h[1:] / (2 * h[:-1])
    np.testing.assert_allclose(previous, expected, rtol=PRINTED, atol=FLOAT64)
    assert previous[0] == previous[-1] == 0


@pytest.mark.parametrize("rows", [ddpm_rows, ddim_rows, partial(ddim_rows, eta=1.0), dpmpp_rows])
def test_a_step_to_the_clean_vector_is_the_estimate_without_any_help(
    rows: Callable[..., NDArray[np.float64]],
) -> None:
    np.testing.assert_allclose(rows(np.array([0.01, 0.5, 0.9, 1]))[-1], [0, 1, 0, 0], atol=FLOAT64)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 101])
def test_an_impossible_number_of_sampling_steps_is_refused(steps: int, sampler: str) -> None:
    with pytest.raises(InvalidInput, match=rf"got {steps} sampling steps; .* choose 1 to 100"):
        sampler_table(ScheduleConfig(steps=100), sampler, steps)


def test_an_unknown_sampler_is_refused() -> None:
    choices = r"\('ddpm', 'ddim', 'dpmpp'\)"
    with pytest.raises(InvalidInput, match=rf"sampler 'ddmp' is unknown; choose from {choices}"):
        sampler_table(ScheduleConfig(), "ddmp")


@pytest.mark.parametrize(
    ("eta", "message"),
    [
        (1.23, r"eta: got 1\.23; expected 0 to 1\.22 for these timesteps"),
        (-0.1, r"eta: got -0\.1; expected 0 to 1\.22 for"),
        (float("nan"), r"eta: got nan; expected 0 to 1\.22 for"),
        (float("inf"), r"eta: got inf; expected 0 to 1\.22 for"),
    ],
)
def test_an_eta_that_leaves_no_room_for_the_state_is_refused(eta: float, message: str) -> None:
    nodes = np.array([0.25, 0.5, 1.0])  # sigma^2 = eta^2 (0.5 / 0.75) 0.5 <= 0.5: eta^2 <= 1.5
    with pytest.raises(InvalidInput, match=message):
        ddim_rows(nodes, eta)
    ddim_rows(nodes, 1.22)


def test_the_largest_eta_itself_leaves_nothing_of_the_state() -> None:
    for a in np.linspace(0.01, 0.49, 49):
        largest = 1 / np.sqrt((1 - a / 0.5) / (1 - a))
        row = ddim_rows(np.array([a, 0.5, 1.0]), largest)[0]
        # The root of a rounding of 1e-16 is 1e-8.
        np.testing.assert_allclose(row, [0, np.sqrt(0.5), 0, np.sqrt(0.5)], atol=PRINTED)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [1, 100])
def test_an_eta_that_is_no_amount_is_refused_for_any_table(eta: float, steps: int) -> None:
    with pytest.raises(InvalidInput, match=f"eta: got {eta}; expected 0 to "):
        sampler_table(ScheduleConfig(), "ddim", steps, eta)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
@pytest.mark.parametrize("eta", [0.5, 1.0, -1.0, float("nan")])
def test_an_eta_is_refused_where_it_means_nothing(sampler: str, eta: float) -> None:
    with pytest.raises(InvalidInput, match=f"eta: got {eta} for {sampler}; only ddim has it"):
        sampler_table(ScheduleConfig(), sampler, eta=eta)


BETAS = "0 < first_beta <= last_beta < 1, got first_beta "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_beta": 0.03}, f"{BETAS}0.03 and last_beta 0.02"),
        ({"first_beta": 0.0}, f"{BETAS}0.0 and last_beta 0.02"),
        ({"first_beta": -1e-4}, f"{BETAS}-0.0001 and"),
        ({"last_beta": 1.0}, f"{BETAS}0.0001 and last_beta 1.0"),
        ({"kind": "linear", "first_beta": float("nan")}, f"{BETAS}nan and"),
        ({"kind": "linear", "last_beta": float("nan")}, f"{BETAS}0.0001 and last_beta nan"),
        ({"kind": "cosin"}, r"kind 'cosin' is unknown; choose from \('cosine', 'linear'\)"),
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"max_beta": 1.0}, "0 < max_beta < 1, got offset 0.008 and max_beta 1.0"),
        ({"offset": -0.5}, "offset >= 0 .* got offset -0.5"),
        ({"offset": float("nan")}, "offset >= 0 .* got offset nan"),
    ],
)
def test_an_impossible_schedule_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ScheduleConfig(**change)

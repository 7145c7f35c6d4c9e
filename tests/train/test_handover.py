"""SeDA's handover: with "carry", one chain passes through both stages.

Axes: T levels of the second stage, B batch, D feature.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_model, make_seda
from tiny_training import CARRY, SEDA, TINY, make_ready
from tolerances import FLOAT32_TWICE, FLOAT64, PRINTED, SAMPLE_MOMENT, SHIFTED
from torch import Tensor

from marnet_sdk.errors import RecipeError
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import (
    SAMPLERS,
    SamplerTable,
    ScheduleConfig,
    StageConfig,
    alphas_cumprod,
    first_deviation,
    q_sample,
    sample,
    sampler_table,
    signal_share,
)
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.seda import SeDA, SedaConfig
from marnet_train.phases import Features, Training
from marnet_train.progress import Progress
from marnet_train.refinement import Refiner, train_refinement

FIRST, BRIDGE = StageConfig(steps=5, below=5), StageConfig(steps=5, above=5)  # of ten levels
SIGNAL = [1, 0.788758, 0.568801, 0.354832, 0.160932, 0]
NOISE = [0, 0.167055, 0.318267, 0.461616, 0.593735, 0.711447]
ROWS = {  # A, B and S of t = 5..1
    "ddpm": [
        (0.608252, 0.160932, 0.406521),
        (0.548310, 0.266591, 0.327271),
        (0.444811, 0.410967, 0.243172),
        (0.264904, 0.638081, 0.144219),
        (0, 1, 0),
    ],
    "ddim": [
        (0.834547, 0.160932, 0),
        (0.777478, 0.229711, 0),
        (0.689463, 0.324157, 0),
        (0.524888, 0.490202, 0),
        (0, 1, 0),
    ],
}


def test_the_bridge_of_ten_levels_has_the_oracle_values() -> None:
    signal = signal_share(BRIDGE) * np.sqrt(alphas_cumprod(BRIDGE))
    np.testing.assert_allclose(signal, SIGNAL, rtol=0, atol=PRINTED)
    noise = np.sqrt(1 - alphas_cumprod(BRIDGE))
    np.testing.assert_allclose(noise, NOISE, rtol=0, atol=PRINTED)
    assert first_deviation(BRIDGE) == noise[-1]
    assert first_deviation(FIRST) == first_deviation(ScheduleConfig("linear", 20)) == 1


@pytest.mark.parametrize("sampler", ROWS)
def test_the_rows_of_the_bridge_have_the_oracle_values(sampler: str) -> None:
    table = sampler_table(BRIDGE, sampler)
    assert table.timesteps == (5, 4, 3, 2, 1)
    found = table.coefficients[:, [0, 1, 3]]
    np.testing.assert_allclose(found, ROWS[sampler], rtol=0, atol=PRINTED)
    assert not table.coefficients[:, 2].any()


def test_the_first_stage_has_the_upper_rows_of_the_whole_chain() -> None:
    whole = sampler_table(ScheduleConfig(steps=10), "ddim").coefficients
    np.testing.assert_allclose(sampler_table(FIRST, "ddim").coefficients, whole[:5], rtol=FLOAT64)
    assert FIRST.whole == BRIDGE.whole == ScheduleConfig(steps=10)


def test_noised_features_have_the_moments_of_the_bridge() -> None:
    abar, share = (torch.tensor(f(BRIDGE)) for f in (alphas_cumprod, signal_share))
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 6).repeat_interleave(20_000)
    noise = torch.randn(len(t), 1, generator=generator, dtype=torch.float64)
    drawn = q_sample(2 * share[t][:, None], t, noise, abar).view(5, 20_000)
    means, deviations = 2 * torch.tensor(SIGNAL[1:]), torch.tensor(NOISE[1:])
    torch.testing.assert_close(drawn.mean(dim=1), means.double(), rtol=0, atol=SAMPLE_MOMENT)
    torch.testing.assert_close(drawn.std(dim=1), deviations.double(), rtol=0, atol=SAMPLE_MOMENT)


# --- the bridge, with s in its state


def toy_denoiser(y: Tensor, t: Tensor) -> Tensor:
    """Nonlinear in y and t."""
    return torch.tanh(0.7 * y - 0.3 * y.roll(1, dims=-1)) * (1 + 0.1 * t[:, None].sqrt())


def run_bridge(
    denoise: Any, config: StageConfig, table: SamplerTable, s: Tensor, x: Tensor, noise: Tensor
) -> Tensor:
    """Go from s to w by equation (R13) as it is written; the network sees x without its part of s.

    A step keeps as much of x - mean as its row says, and adds as much noise.
    """
    signal = np.sqrt(alphas_cumprod(config))
    left = 1 - np.arange(config.steps + 1) / config.steps

    def mean(t: int, w: Tensor) -> Tensor:
        return signal[t] * (left[t] * w + (1 - left[t]) * s)

    after = [*table.timesteps[1:], 0]
    for i, (t, p) in enumerate(zip(table.timesteps, after, strict=True)):
        kept, added = table.coefficients[i, [0, 3]]
        w = denoise(x - signal[t] * (1 - left[t]) * s, torch.full((len(x),), t))
        x = mean(p, w) + kept * (x - mean(t, w)) + added * noise[i]
    return x


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.6)])
def test_the_chain_without_s_in_its_state_is_the_bridge(
    sampler: str, eta: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    s, x, *noise = torch.randn(2 + steps, 4, 6, generator=generator, dtype=torch.float64)
    table = sampler_table(BRIDGE, sampler, steps, eta)
    want = run_bridge(toy_denoiser, BRIDGE, table, s, x, torch.stack(noise))
    start = x - float(np.sqrt(alphas_cumprod(BRIDGE)[-1])) * s
    found = sample(toy_denoiser, table, start, torch.stack(noise))
    torch.testing.assert_close(found, want, rtol=0, atol=SHIFTED)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_the_exact_estimate_every_state_has_the_mean_and_the_noise_of_its_level(
    sampler: str, steps: int
) -> None:
    """By hand, through the rows of any number of steps: a mean, and a variance."""
    table = sampler_table(BRIDGE, sampler, steps)
    mean, variance = SIGNAL[5], NOISE[5] ** 2
    for i, p in enumerate([*table.timesteps[1:], 0]):
        a, b, c, added = table.coefficients[i]
        mean, variance = a * mean + b + c, a**2 * variance + added**2
        assert abs(mean - SIGNAL[p]) < 2 * PRINTED
        assert abs(variance - NOISE[p] ** 2) < 2 * PRINTED


# --- the model


def make_carrying(**config: Any) -> SeDA:
    """A SeDA whose stages have six and eight levels of one chain."""
    own = {"semantic_schedule": ScheduleConfig(steps=6), "semantic_steps": 3, "handover": "carry"}
    return make_seda(latent=10, **own | config)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("progressive", [False, True])
def test_one_chain_passes_through_both_stages(progressive: bool, sampler: str) -> None:
    """All of it by hand, with s in the state of the second stage and noise in that of the first."""
    model = make_carrying(progressive=progressive).double()
    generator = torch.Generator().manual_seed(0)
    x_v, eps, *noise = torch.randn(10, 5, 10, generator=generator, dtype=torch.float64)
    signal = np.sqrt(alphas_cumprod(ScheduleConfig(steps=14)))
    told = torch.zeros(5, 10, dtype=torch.float64)
    with torch.no_grad():
        condition, z, s = (x_v - model.vision_mean) / model.vision_std, told, told
        for t, p in ((14, 12), (12, 10), (10, 8)):
            seen = torch.cat([z, s], dim=1) if progressive else z
            s = model.learner.denoiser(seen, torch.full((5,), t - 8), condition)
            a = np.sqrt((1 - signal[p] ** 2) / (1 - signal[t] ** 2))
            z = a * z + (signal[p] - a * signal[t]) * s
        seen = model.see(x_v)
        assert seen.shape == (5, 30)
        torch.testing.assert_close(seen[:, 10:20], s, rtol=0, atol=FLOAT64)
        assert torch.equal(model.condition(seen)[:, 10:], seen[:, 10:20])

        def denoise(y: Tensor, t: Tensor) -> Tensor:
            nonlocal told
            state = torch.cat([y, told], dim=1) if progressive else y
            told = model.denoiser(state, t, torch.cat([condition, s], dim=1))
            return told

        schedule = model.config.schedule
        assert isinstance(schedule, StageConfig)
        table, every = sampler_table(schedule, sampler), torch.stack(noise)
        x = z + np.sqrt(1 - signal[8] ** 2) * eps
        want = run_bridge(denoise, schedule, table, s, x, every)
        for refine in (model.refine, model.refine_in_parts):
            torch.testing.assert_close(refine(seen, table, eps, every), want, rtol=0, atol=FLOAT64)


def test_with_the_usual_tables_and_nothing_left_it_is_a_restart() -> None:
    carrying = make_carrying()
    plain = make_seda(latent=10, semantic_schedule=ScheduleConfig(steps=6), semantic_steps=3)
    plain.load_state_dict(carrying.state_dict())
    table = sampler_table(plain.config.schedule, "ddpm")
    initial, *noise = torch.randn(9, 5, 10)
    seen = torch.randn(5, 20)
    with torch.no_grad():
        want = plain.refine(seen, table, initial, torch.stack(noise))
        scaled = initial / first_deviation(carrying.config.schedule)
        nothing = torch.cat([seen, torch.zeros(5, 10)], dim=1)
        found = carrying.refine(nothing, table, scaled, torch.stack(noise))
    torch.testing.assert_close(found, want, rtol=0, atol=FLOAT32_TWICE)
    with torch.no_grad():
        something = torch.cat([seen, torch.ones(5, 10)], dim=1)
        other = carrying.refine(something, table, scaled, torch.stack(noise))
    assert not torch.allclose(other, want)


def test_phase_b_shows_the_denoiser_states_of_the_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of a thousand drown the noise, and their mean tells the signal of each level."""
    model = make_carrying()
    seen: list[tuple[Tensor, Tensor]] = []
    plain = Denoiser.estimate

    def watched(self: Denoiser, x: Tensor, t: Tensor, *others: Any) -> Tensor:
        seen.append((x, t))
        return plain(self, x, t, *others)

    monkeypatch.setattr(Denoiser, "estimate", watched)
    features = Features(torch.randn(64, 20), torch.full((64, 10), 1000.0), torch.arange(64) % 3)
    recipe = replace(TINY, refinement=replace(TINY.refinement, epochs=4))
    train_refinement(
        Refiner.of(model), features.x_v, features, Training(recipe, 0, Progress()), look=lambda: 0.0
    )
    x, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert set(t.tolist()) == set(range(1, 9))
    signal = signal_share(model.config.schedule) * np.sqrt(alphas_cumprod(model.config.schedule))
    assert np.abs(x.numpy() / 1000 - signal[t.numpy()][:, None]).max() < 0.01


# --- what says so


@pytest.mark.parametrize("handover", ["restart", "carry"])
def test_the_configuration_keeps_the_handover(handover: str) -> None:
    config = make_carrying(handover=handover).config
    content = json.loads(json.dumps(config.to_dict()))
    assert content["handover"] == handover
    assert "above" not in content["schedule"]
    assert SedaConfig.from_dict(content) == config
    assert replace(config, samples=3) == replace(SedaConfig.from_dict(content), samples=3)
    assert isinstance(config.schedule, StageConfig) == (handover == "carry")
    assert replace(config, handover="restart") == make_carrying(handover="restart").config


def test_a_training_says_which_handover_it_has(tiny_carry: Path, tiny_seda: Path) -> None:
    for path, handover in ((tiny_carry, "carry"), (tiny_seda, "restart")):
        content = json.loads((path / "config.json").read_text("utf-8"))
        training = json.loads((path / "training.json").read_text("utf-8"))
        assert content["handover"] == training["settings"]["handover"] == handover
        assert f"Its handover is {handover}:" in (path / "README.md").read_text("utf-8")
        model = load_checkpoint(path).model
        assert isinstance(model, SeDA)
        assert model.config.carries == (handover == "carry")


def test_a_checkpoint_without_the_field_restarts(tiny_seda: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_seda, tmp_path / "old")
    config = tmp_path / "old/config.json"
    content = json.loads(config.read_text("utf-8"))
    del content["handover"]
    config.write_text(json.dumps(content), "utf-8")
    old, new = load_checkpoint(tmp_path / "old").model, load_checkpoint(tiny_seda).model
    assert old.config == new.config


# --- what cannot be


def test_what_cannot_be_carried_over_is_refused(digits: Path) -> None:
    with pytest.raises(RecipeError, match=r"handover 'cary' is unknown\. Did you mean 'carry'"):
        replace(SEDA, handover="cary")
    with pytest.raises(RecipeError, match=r"handover 'cary' is unknown"):
        make_seda(handover="cary")
    with pytest.raises(RecipeError, match=r"their widths must be equal, got 10 and 8; choose"):
        make_seda(handover="carry")
    with pytest.raises(RecipeError, match=r"schedule is .*'linear'.* only steps may differ"):
        make_carrying(semantic_schedule=ScheduleConfig("linear", 6))
    with pytest.raises(RecipeError, match=r"the method is marnet; add --method seda, or leave"):
        make_ready(digits, replace(CARRY, method="marnet"))
    assert make_model().start(torch.zeros(1, 10), torch.ones(1, 8)).eq(1).all()

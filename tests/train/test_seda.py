"""SeDA: two stages of diffusion. Stage 1 leads to the centre of a class, stage 2 to its text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_seda
from tiny_training import SEDA, TINY, change
from tolerances import CLASS_SHARE, FLOAT32_LAYER
from torch import Tensor, nn

from marnet_sdk.errors import CheckpointError, RecipeError
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.imagefolder import read_split
from marnet_train.diffusion import (
    ScheduleConfig,
    alphas_cumprod,
    sample,
    sampler_table,
)
from marnet_train.models.seda import SeDA
from marnet_train.phases import Features
from marnet_train.recipe import METHODS, SemanticPhase
from marnet_train.semantic_learner import with_mistakes

CHAINS = 20_000  # of the exact denoiser


class ExactDenoiser:
    """The best estimate of a centre there is: the mean over classes, by what the state tells."""

    def __init__(self, centres: Tensor, prior: Tensor, abar: np.ndarray) -> None:
        self.centres, self.prior, self.abar = centres, prior, torch.from_numpy(abar)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.abar[t][:, None]
        distance = (x[:, None] - abar.sqrt()[..., None] * self.centres).square().sum(dim=2)
        return (self.prior.log() - distance / (2 * (1 - abar))).softmax(dim=1) @ self.centres


@pytest.mark.parametrize("steps", [50, 10])
def test_the_chain_from_zero_ends_at_the_likeliest_centre_and_a_random_one_draws_a_class(
    steps: int,
) -> None:
    """This is why stage 1 starts from zero: the centres -1.5, 0, 1.5 have chances 0.7, 0.2, 0.1."""
    centres = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    schedule = ScheduleConfig(steps=50)
    denoise = ExactDenoiser(centres, prior, alphas_cumprod(schedule))
    table = sampler_table(schedule, "ddim", steps)
    none = torch.zeros(len(table.timesteps), 1, 1, dtype=torch.float64)
    from_zero = sample(denoise, table, torch.zeros(1, 1, dtype=torch.float64), none)
    assert abs(float(from_zero) + 1.5) < 0.01
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 1, generator=noise, dtype=torch.float64)
    ends = sample(denoise, table, start, none)
    nearest = (ends - centres.T).abs().argmin(dim=1).bincount(minlength=3) / len(ends)
    assert torch.allclose(nearest.double(), prior, atol=0.04)


def test_the_semantic_vector_is_the_end_of_the_chain_and_stands_beside_the_features() -> None:
    model = make_seda()
    x_v = torch.randn(5, 10)
    condition = (x_v - model.vision_mean) / model.vision_std
    table = sampler_table(model.config.semantic_schedule, "ddim", 4)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return model.learner.denoiser(x, t, condition)

    with torch.no_grad():
        s = sample(denoise, table, torch.zeros(5, 10), torch.zeros(4, 1, 10))
        seen = model.see(x_v)
        assert torch.equal(seen[:, :10], x_v)
        assert torch.allclose(seen[:, 10:], s, atol=1e-6)
        assert torch.allclose(model.condition(seen), torch.cat([condition, s], dim=1), atol=1e-6)
        # Rows of other lengths may be summed in another order.
        assert torch.allclose(model.align_vision(seen), model.align_vision(x_v), atol=1e-6)


ORACLES = [  # sampler, T, shares of the classes that 200,000 chains with the exact denoiser end in
    ("ddpm", 50, (0.706, 0.202, 0.092)),
    ("ddpm", 20, (0.711, 0.208, 0.081)),
    ("ddpm", 10, (0.718, 0.215, 0.067)),
    ("ddim", 100, (0.699, 0.203, 0.098)),
]


@pytest.mark.parametrize(("sampler", "steps", "shares"), ORACLES)
def test_chains_of_the_exact_denoiser_end_in_a_class_as_often_as_was_computed(
    sampler: str, steps: int, shares: tuple[float, ...]
) -> None:
    """The prior is 0.7, 0.2 and 0.1; few ancestral steps favour the likelier classes."""
    centres = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    schedule = ScheduleConfig(steps=steps)
    denoise = ExactDenoiser(centres, prior, alphas_cumprod(schedule))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(steps + 1, CHAINS, 1, generator=generator, dtype=torch.float64)
    ends = sample(denoise, sampler_table(schedule, sampler), noise[0], noise[1:])
    nearest = (ends - centres.T).abs().argmin(dim=1).bincount(minlength=3) / CHAINS
    assert (nearest - torch.tensor(shares)).abs().max() < CLASS_SHARE


def test_in_many_dimensions_the_chain_from_zero_ends_at_the_likeliest_centre_too() -> None:
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    prior = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    schedule = ScheduleConfig(steps=50)
    denoise = ExactDenoiser(centres, prior, alphas_cumprod(schedule))
    noise = torch.randn(51, 4000, 16, generator=generator, dtype=torch.float64)
    ends = sample(denoise, sampler_table(schedule, "ddpm"), noise[0], noise[1:])
    drawn = torch.cdist(ends, centres).argmin(dim=1).bincount(minlength=5) / len(ends)
    assert (drawn - prior).abs().max() < 2 * CLASS_SHARE  # a fifth of the chains
    table, zero = sampler_table(schedule, "ddim", 10), torch.zeros(1, 16, dtype=torch.float64)
    end = sample(denoise, table, zero, torch.zeros(10, 1, 16, dtype=torch.float64))
    assert int(torch.cdist(end, centres).argmin()) == 0


def test_a_progressive_learner_sees_its_last_estimate() -> None:
    """Both stages, by hand: zero at first, then the estimate of the step before."""
    model, x_v = make_seda(progressive=True), torch.randn(5, 10)
    condition = (x_v - model.vision_mean) / model.vision_std
    with torch.no_grad():
        x = s = torch.zeros(5, 10)
        table = model.learner.table
        for t, (a, b, _, _) in zip(table.timesteps, table.coefficients.tolist(), strict=True):
            seen = torch.cat([x, s], dim=1)
            s = model.learner.denoiser(seen, torch.full((5,), t), condition)
            x = a * x + b * s
        seen = model.see(x_v)
        torch.testing.assert_close(seen[:, 10:], s, rtol=0, atol=FLOAT32_LAYER)
        whole, table = model.condition(seen), sampler_table(model.config.schedule, "ddim")
        start = x = torch.randn(5, 8)
        estimate = torch.zeros(5, 8)
        for t, (a, b, _, _) in zip(table.timesteps, table.coefficients.tolist(), strict=True):
            told = torch.cat([x, estimate], dim=1)
            estimate = model.denoiser(told, torch.full((5,), t), whole)
            x = a * x + b * estimate
        found = model.refine(seen, table, start, torch.zeros(8, 1, 8))
        in_parts = model.refine_in_parts(seen, table, start, torch.zeros(8, 1, 8))
        torch.testing.assert_close(found, estimate, rtol=0, atol=FLOAT32_LAYER)
        torch.testing.assert_close(in_parts, estimate, rtol=0, atol=FLOAT32_LAYER)


def test_a_checkpoint_from_before_progressive_is_what_it_was(
    tiny_seda: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_seda, tmp_path / "old")
    config = tmp_path / "old/config.json"
    content = json.loads(config.read_text("utf-8"))
    assert content.pop("progressive") is False
    config.write_text(json.dumps(content), "utf-8")
    old, new = load_checkpoint(tmp_path / "old").model, load_checkpoint(tiny_seda).model
    assert old.config == new.config
    x_v = torch.randn(3, old.vision.dim)
    with torch.no_grad():
        assert torch.equal(old.see(x_v), new.see(x_v))
    config.write_text(json.dumps(content | {"progressive": True}), "utf-8")
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        load_checkpoint(tmp_path / "old")


def test_a_progressive_training_says_so_in_its_checkpoint(tiny_progressive: Path) -> None:
    model = load_checkpoint(tiny_progressive).model
    assert isinstance(model, SeDA)
    assert model.config.progressive
    assert model.learner.denoiser.progressive
    assert model.denoiser.progressive
    training = json.loads((tiny_progressive / "training.json").read_text("utf-8"))
    assert training["settings"]["progressive"] is True


def test_centres_are_class_means_of_unit_size() -> None:
    model = make_seda()
    condition, labels = torch.randn(30, 10), torch.arange(30) % 3
    model.learner.set_centres(condition, labels)
    centres = model.learner.centres
    assert abs(float(centres.square().mean()) - 1) < 1e-5
    for k in range(3):
        mean = condition[labels == k].mean(dim=0)
        assert torch.cosine_similarity(centres[k], mean, dim=0) > 0.9999


def test_a_class_without_images_has_its_centre_in_the_middle() -> None:
    model = make_seda()
    model.learner.set_centres(torch.randn(8, 10), torch.zeros(8, dtype=torch.long))
    assert torch.equal(model.learner.centres[1:], torch.zeros(2, 10))


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_training_vectors_are_wrong_as_often_as_asked_and_never_by_their_own_class(
    wrong: float,
) -> None:
    model = make_seda()
    x_v, labels = torch.randn(2000, 10), torch.arange(2000) % 3
    model.learner.set_centres(x_v, labels)
    phase = SemanticPhase(wrong=wrong, jitter=0.0)
    recipe = replace(SEDA, semantic=phase)
    features = Features(x_v, torch.zeros(2000, 8), labels)
    found = with_mistakes(model, features, recipe, 0).x_v
    with torch.no_grad():
        assert torch.equal(found[:, :10], x_v)
        changed = (found[:, 10:] - model.see(x_v)[:, 10:]).abs().amax(dim=1) > 1e-6
    assert abs(float(changed.float().mean()) - wrong) < 0.05
    for k in range(3):
        of_class = found[changed & (labels == k), 10:]
        assert not (of_class[:, None] - model.learner.centres[k]).abs().sum(dim=2).eq(0).any()
        assert len(of_class) == 0 or torch.isin(of_class, model.learner.centres).all()
    assert torch.equal(found, with_mistakes(model, features, recipe, 0).x_v)


def test_jitter_has_the_deviation_that_is_asked() -> None:
    model = make_seda()
    features = Features(torch.randn(4000, 10), torch.zeros(4000, 8), torch.arange(4000) % 3)
    recipe = replace(SEDA, semantic=SemanticPhase(wrong=0.0, jitter=0.3))
    with torch.no_grad():
        moved = with_mistakes(model, features, recipe, 0).x_v - model.see(features.x_v)
    assert abs(float(moved[:, 10:].std()) - 0.3) < 0.01


def test_training_reports_the_semantic_learner_and_its_checkpoint_is_read_back(
    tiny_seda: Path,
) -> None:
    metrics = json.loads((tiny_seda / "training.json").read_text("utf-8"))["metrics"]
    assert {"semantic", "refined", "marnet"} < set(metrics)
    assert metrics["semantic"]["val"]["samples"] == 0  # it draws no noise
    card = (tiny_seda / "README.md").read_text("utf-8")
    assert "A SeDA image classifier, by our reading of the paper's abstract" in card
    assert "| semantic learner |" in card
    assert "| SeDA |" in card
    assert "MARNet" not in card
    loaded = load_checkpoint(tiny_seda)
    assert isinstance(loaded.model, SeDA)
    assert not loaded.model.learner.centres.eq(0).all()


TRAINED = ["seda_checkpoint", "progressive_checkpoint", "carry_checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_every_branch_learns(trained: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Path = request.getfixturevalue(trained)
    metrics = json.loads((checkpoint / "training.json").read_text("utf-8"))["metrics"]
    for branch in ("semantic", "refined", "marnet"):
        assert metrics[branch]["val"]["top1"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_stage_1_agrees_with_the_alignment_branch(
    trained: str, digits: Path, request: pytest.FixtureRequest
) -> None:
    """It is that branch's posterior, told in the space of features."""
    loaded = load_checkpoint(request.getfixturevalue(trained))
    model, images = loaded.model, read_split(digits / "val", needs_text=False)[:200]
    assert isinstance(model, SeDA)
    pixels = torch.from_numpy(loaded.preprocess.pixels([e.image for e in images]))
    with torch.no_grad():
        seen = model.see(model.vision(pixels))
        s = seen[:, model.vision.dim : 2 * model.vision.dim]
        nearest = torch.cdist(s, model.learner.centres).argmin(dim=1)
        agree = nearest == model.alignment_logits(seen).argmax(dim=1)
    assert agree.float().mean() > 0.9


@pytest.mark.parametrize("steps", [0, 51, True, 2.5])
def test_the_steps_of_stage_1_are_bounded(steps: object) -> None:
    config = make_seda().config
    with pytest.raises(RecipeError, match=r"semantic_steps must be an integer from 1 to 50"):
        replace(config, semantic_steps=steps)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"method 'sedan' is unknown\. Did you mean .*seda"):
        replace(TINY, method="sedan")


def test_joint_training_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"joint training is MARNet's; set joint = false"):
        change(SEDA, alignment={"joint": True})


def test_every_method_of_a_recipe_has_a_model() -> None:
    from marnet_train.models import METHODS as MODELS

    assert set(MODELS) == set(METHODS)
    assert all(issubclass(model, nn.Module) for model in MODELS.values())

"""The three phases: schedule, augmentation, what each one learns and what it leaves alone.

Axes: N images, V views, B batch, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE, FLOAT64
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_sdk.preprocess import Preprocess
from marnet_train.assemble import build_model
from marnet_train.data.imagefolder import read_split
from marnet_train.data.pixels import PixelStore, augment
from marnet_train.diffusion import SamplerTable, ScheduleConfig
from marnet_train.evaluate import label_tensor
from marnet_train.models.marnet import MARNet
from marnet_train.phases import (
    Features,
    TrainingSet,
    cache_features,
    draw_fused,
    mean_and_scale,
    text_features,
    train_alignment,
    train_baseline,
    train_fusion,
    train_refinement,
    warmup_cosine,
)
from marnet_train.progress import Progress
from marnet_train.recipe import AlignmentPhase, Augment, FusionPhase, Recipe, RefinementPhase
from marnet_train.text import encode, train_tokenizer

LABELS = tuple("0123456789")


@pytest.fixture(scope="module")
def recipe(quick_recipe: Recipe) -> Recipe:
    return replace(
        quick_recipe,
        dim=12,
        hidden=16,
        time_dim=4,
        image=quick_recipe.image | {"size": {"height": 8, "width": 8}},
        vision=quick_recipe.vision | {"embedding_size": 4, "hidden_sizes": [4, 8, 8]},
        text=quick_recipe.text | {"hidden_size": 12, "intermediate_size": 16},
        schedule=ScheduleConfig(steps=8),
        alignment=AlignmentPhase(epochs=8, batch=16, lr_backbone=1e-2, lr_heads=1e-2, lr_text=1e-2),
        refinement=RefinementPhase(epochs=30, batch=49, lr=1e-2, views=2),
        fusion_phase=FusionPhase(epochs=5, batch=49, draws=2),
    )


@pytest.fixture(scope="module")
def training_set(digits: Path, recipe: Recipe) -> TrainingSet:
    examples = read_split(digits / "train", needs_text=True)[:49]
    tokenizer = train_tokenizer([e.text for e in examples])
    store = PixelStore(examples, Preprocess.from_dict(recipe.image), "train")
    ids, mask = encode(tokenizer, [e.text for e in examples], recipe.max_tokens)
    return TrainingSet(store, label_tensor(examples, LABELS), ids, mask)


@pytest.fixture
def model(digits: Path, recipe: Recipe) -> MARNet:
    examples = read_split(digits / "train", needs_text=True)[:49]
    return build_model(recipe, LABELS, train_tokenizer([e.text for e in examples]), seed=0)


@pytest.fixture
def features(model: MARNet, training_set: TrainingSet, recipe: Recipe) -> Features:
    return cache_features(model, training_set, recipe, seed=0)


def losses(run: Progress) -> list[float]:
    return [line["loss"] for line in run.record.log]


def changed(model: MARNet, work: Callable[[], None]) -> set[str]:
    """Top-level parts of the model that differ after `work`."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work()
    after = model.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@given(total=st.integers(2, 500), warmup=st.floats(0, 0.9))
@settings(max_examples=60)
def test_the_learning_rate_rises_linearly_and_falls_to_zero(total: int, warmup: float) -> None:
    factors = [warmup_cosine(step, total, warmup) for step in range(total + 1)]
    rise = max(1, int(warmup * total))
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert factors[rise - 1] == factors[rise] == 1
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=FLOAT64)


def test_the_learning_rate_is_half_in_the_middle_of_its_fall() -> None:
    assert warmup_cosine(60, 100, 0.2) == pytest.approx(0.5)


def pictures(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_augmentation_leaves_images_alone() -> None:
    assert torch.equal(augment(pictures(), Augment(), seeded()), pictures())


@pytest.mark.parametrize(
    "settings", [Augment(rotate=20), Augment(shift=0.2), Augment(scale=0.3), Augment(flip=True)]
)
def test_augmentation_keeps_shape_and_range_and_follows_its_generator(settings: Augment) -> None:
    images = pictures()
    out = augment(images, settings, seeded())
    assert out.shape == images.shape
    assert images.min() <= out.min()
    assert out.max() <= images.max() + FLOAT32_LAYER
    assert torch.equal(out, augment(images, settings, seeded()))
    assert not torch.allclose(out, augment(images, settings, seeded(2)))
    assert not torch.allclose(out, images)


def test_flipping_mirrors_about_half_of_the_images_and_changes_nothing_else() -> None:
    images = pictures(200)
    out = augment(images, Augment(flip=True), seeded())
    mirrored = images.flip(-1)
    is_same = (out - images).abs().amax(dim=(1, 2, 3)) < FLOAT32_LAYER
    is_mirrored = (out - mirrored).abs().amax(dim=(1, 2, 3)) < FLOAT32_LAYER
    assert torch.equal(is_same, ~is_mirrored)
    assert 60 < int(is_mirrored.sum()) < 140


def test_a_shift_moves_at_most_its_fraction_of_the_side() -> None:
    """The picture is its own x coordinate, 0 to 1 over the side: a shift subtracts from it."""
    x = (torch.arange(100) + 0.5) / 100
    images = x.expand(50, 3, 100, 100).contiguous()
    out = augment(images, Augment(shift=0.1), seeded())
    moved = (out - images)[:, 0, 20:80, 20:80]
    assert float(moved.abs().max()) <= 0.1 + FLOAT32_TWICE
    assert float(moved.abs().max()) > 0.08
    torch.testing.assert_close(
        moved.amax(dim=(1, 2)), moved.amin(dim=(1, 2)), rtol=0, atol=FLOAT32_TWICE
    )


def test_each_phase_lowers_its_loss(
    model: MARNet, training_set: TrainingSet, recipe: Recipe
) -> None:
    alignment, refinement, fusion = Progress(), Progress(), Progress()
    train_alignment(model, training_set, recipe, 0, alignment, "alignment")
    features = cache_features(model, training_set, recipe, 0)
    train_refinement(model, features, recipe, 0, refinement)
    train_fusion(model, features, recipe, 0, fusion)
    assert losses(alignment)[-1] < 0.95 * losses(alignment)[0]
    assert losses(refinement)[-1] < 0.95 * losses(refinement)[0]
    assert losses(fusion)[-1] < 0.95 * losses(fusion)[0]
    assert [line["epoch"] for line in refinement.record.log] == list(range(1, 31))
    assert {line["phase"] for line in fusion.record.log} == {"fusion"}


def test_phase_a_with_a_text_learning_rate_trains_both_encoders(
    model: MARNet, training_set: TrainingSet, recipe: Recipe
) -> None:
    parts = changed(
        model, lambda: train_alignment(model, training_set, recipe, 0, Progress(), "alignment")
    )
    heads = {"project_vision", "project_text", "alignment_classifier"}
    assert parts == {"vision", "text", *heads}


def test_phase_a_without_one_keeps_the_text_encoder_frozen(
    model: MARNet, training_set: TrainingSet, recipe: Recipe
) -> None:
    frozen = replace(recipe, alignment=replace(recipe.alignment, lr_text=0.0))
    parts = changed(
        model, lambda: train_alignment(model, training_set, frozen, 0, Progress(), "alignment")
    )
    assert parts == {"vision", "project_vision", "project_text", "alignment_classifier"}


def test_the_baseline_never_sees_a_text(
    model: MARNet, training_set: TrainingSet, recipe: Recipe
) -> None:
    garbled = replace(training_set, input_ids=torch.full_like(training_set.input_ids, 10**6))
    parts = changed(model, lambda: train_baseline(model, garbled, recipe, 0, Progress()))
    assert parts == {"vision", "project_vision", "alignment_classifier"}


def test_phase_b_trains_only_the_denoiser_and_its_classifier(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    parts = changed(model, lambda: train_refinement(model, features, recipe, 0, Progress()))
    assert parts == {"denoiser", "semantic_classifier"}


def test_phase_c_trains_only_the_final_classifier(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    parts = changed(model, lambda: train_fusion(model, features, recipe, 0, Progress()))
    assert parts == {"classifier"}


@torch.no_grad()
def test_folding_the_standardisation_into_the_final_classifier_is_exact(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    """In float64, without any epoch: the folded classifier on x_f, the old one on standard x_f."""
    model.double()
    wide = Features(features.x_v.double(), features.x_s.double(), features.labels)
    fused = draw_fused(model, wide, recipe, seed=0)
    standard = (fused - fused.mean(dim=0)) / fused.std(dim=0, correction=0).clamp(min=1e-6)
    before = model.classifier(standard)
    train_fusion(
        model,
        wide,
        replace(recipe, fusion_phase=replace(recipe.fusion_phase, epochs=0)),
        0,
        Progress(),
    )
    torch.testing.assert_close(model.classifier(fused), before, rtol=FLOAT64, atol=FLOAT64)


def test_the_logged_loss_of_phase_c_is_that_of_the_classifier_it_leaves_behind(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    """With a learning rate of 0 and one batch, the trained and the folded classifier are one."""
    still = replace(recipe.fusion_phase, epochs=1, lr=0.0, batch=10**6)
    run = Progress()
    train_fusion(model, features, replace(recipe, fusion_phase=still), 0, run)
    logits = model.classifier(draw_fused(model, features, recipe, seed=0))
    loss = nn.functional.cross_entropy(logits, features.labels.repeat(2)).item()
    assert losses(run) == [pytest.approx(loss, rel=FLOAT32_TWICE)]


def test_cached_features_are_view_major_and_keep_rows_together(
    model: MARNet, training_set: TrainingSet, features: Features
) -> None:
    x_s = text_features(model, training_set)
    assert features.x_v.shape == (2 * 49, 8)
    for view in (slice(0, 49), slice(49, 98)):
        assert torch.equal(features.x_s[view], x_s)
        assert torch.equal(features.labels[view], training_set.labels)
    assert not torch.allclose(features.x_v[:49], features.x_v[49:])  # augmented differently


def test_caching_stores_the_statistics_that_standardise_the_features(
    model: MARNet, features: Features
) -> None:
    for raw, standard in (
        (features.x_v, model.condition(features.x_v)),
        (features.x_s, model.standardise_text(features.x_s)),
    ):
        mean, spread = standard.mean(dim=0), standard.std(dim=0, correction=0)
        varies = (raw.amax(dim=0) > raw.amin(dim=0)).float()  # a fresh ReLU may be dead
        assert varies.sum() > len(varies) / 2
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=FLOAT32_TWICE)
        torch.testing.assert_close(spread, varies, rtol=0, atol=FLOAT32_TWICE)


def test_a_dimension_that_never_varies_keeps_its_scale(
    model: MARNet, training_set: TrainingSet, recipe: Recipe
) -> None:
    same = replace(
        training_set,
        input_ids=training_set.input_ids[:1].repeat(49, 1),
        attention_mask=training_set.attention_mask[:1].repeat(49, 1),
    )
    cache_features(model, same, recipe, seed=0)
    assert torch.equal(model.text_std, torch.ones(12))


def test_a_dimension_that_never_varies_has_scale_one_and_the_others_their_deviation() -> None:
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1e-8]])
    mean, scale = mean_and_scale(x)
    assert mean.tolist() == [2.0, 5.0, pytest.approx(5e-9)]
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert mean_and_scale(3 * x)[1].tolist() == [3.0, 1.0, 1.0]


def test_a_fused_dimension_that_never_varies_does_not_blow_up_the_final_classifier(
    model: MARNet, features: Features, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided by 1e-6 instead of by 1, its weights would be a million times the others'."""
    fused = torch.randn(len(features.labels), 24, generator=torch.Generator().manual_seed(0))
    fused[:, 7] = 2.5
    monkeypatch.setattr("marnet_train.phases.draw_fused", lambda *_: fused)
    once = replace(recipe, fusion_phase=replace(recipe.fusion_phase, draws=1))
    train_fusion(model, features, once, 0, Progress())
    assert float(model.classifier.weight.detach().abs().max()) < 10


def test_every_row_and_draw_of_phase_c_has_its_own_noise(
    model: MARNet, features: Features, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine, starts, noises = model.refine, [], []

    def remember(x_v: Tensor, table: SamplerTable, initial: Tensor, noise: Tensor) -> Tensor:
        starts.append(initial)
        noises.append(noise.transpose(0, 1).flatten(1))  # [B, S * D]
        return refine(x_v, table, initial, noise)

    monkeypatch.setattr(model, "refine", remember)
    equal = replace(features, x_v=features.x_v[:1].repeat(98, 1))
    fused = draw_fused(model, equal, recipe, seed=0)
    for drawn in (torch.cat(starts), torch.cat(noises), fused):
        assert len(drawn.unique(dim=0)) == 2 * 98


def test_the_same_seed_draws_the_same_features(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    first = draw_fused(model, features, recipe, seed=3)
    assert torch.equal(first, draw_fused(model, features, recipe, seed=3))
    assert not torch.equal(first, draw_fused(model, features, recipe, seed=4))


def test_a_loss_that_is_not_a_number_stops_the_training(
    model: MARNet, features: Features, recipe: Recipe
) -> None:
    features.x_v[0] = math.nan
    with pytest.raises(RecipeError, match="the loss became nan; lower the learning rates"):
        train_refinement(model, features, recipe, 0, Progress())


def test_a_batch_of_one_is_refused(model: MARNet, features: Features, recipe: Recipe) -> None:
    single = replace(recipe, refinement=replace(recipe.refinement, batch=1))
    with pytest.raises(RecipeError, match="a batch of 2, got 98 and 1"):
        train_refinement(model, features, single, 0, Progress())

"""The phases, one by one: what each learns, what it leaves alone, what it leaves behind.

Axes: N images, V views, B batch, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_training import TINY, change, make_ready
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE, FLOAT64
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.assemble import Prepared
from marnet_train.data import pixels
from marnet_train.diffusion import SamplerTable
from marnet_train.features import FrozenFeatures, compute_views
from marnet_train.heads import draw_refined, train_head
from marnet_train.losses import alignment, ita_loss
from marnet_train.models.marnet import Baseline, MARNet, mean_and_scale
from marnet_train.optimise import batches
from marnet_train.phases import (
    LOOKS,
    Features,
    Target,
    Training,
    fold,
    make_features,
    make_target,
    text_features,
    train_alignment,
    train_image_branch,
    train_text,
)
from marnet_train.progress import Progress
from marnet_train.recipe import Augment, Recipe, TextPhase
from marnet_train.refinement import Refiner, train_refinement
from marnet_train.stages import encoded

RECIPE = change(
    TINY, alignment={"epochs": 8}, refinement={"epochs": 30}, fusion_phase={"epochs": 5}
)
FROZEN = change(RECIPE, alignment={"lr_backbone": 0.0})
HEADS = {"project_vision", "project_text", "alignment_classifier"}


@pytest.fixture
def ready(digits: Path) -> Prepared:
    return make_ready(digits, RECIPE)


@pytest.fixture
def model(ready: Prepared) -> MARNet:
    return ready.model


@pytest.fixture
def target(ready: Prepared) -> Target:
    return make_target(ready.model, ready.data, RECIPE, seed=0)


@pytest.fixture
def features(ready: Prepared, target: Target) -> Features:
    source = encoded(ready.model.vision, ready.data, RECIPE)
    return make_features(ready.model, ready.data, source, target, RECIPE)


def losses(run: Progress) -> list[float]:
    return [line["loss"] for line in run.record.log]


def changed(model: nn.Module, work: Callable[[], object]) -> set[str]:
    """Top-level parts of the model that differ after `work`."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work()
    after = model.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def align(ready: Prepared, recipe: Recipe, run: Progress | None = None, seed: int = 0) -> Target:
    """Phase A, with what comes before it."""
    target = make_target(ready.model, ready.data, recipe, seed)
    source = encoded(ready.model.vision, ready.data, recipe)
    train_alignment(
        ready.model, ready.data, source, target, Training(recipe, seed, run or Progress())
    )
    return target


def refine(
    model: MARNet,
    features: Features,
    recipe: Recipe,
    look: Callable[[], float] = lambda: 0.0,
    run: Progress | None = None,
    *,
    one_pass: bool = False,
) -> float:
    """Phase B."""
    condition = model.condition(features.x_v)
    return train_refinement(
        Refiner.of(model),
        condition,
        features,
        Training(recipe, 0, run or Progress()),
        look=look,
        one_pass=one_pass,
    )


# --- what each phase learns and what it leaves alone


def test_each_phase_lowers_its_loss(digits: Path) -> None:
    recipe = replace(RECIPE, text_phase=TextPhase(epochs=4, batch=16, lr=1e-2))
    ready = make_ready(digits, recipe)
    model, runs = ready.model, [Progress() for _ in range(4)]
    train_text(model, ready.data, Training(recipe, 0, runs[0]))
    target = align(ready, recipe, runs[1])
    source = encoded(model.vision, ready.data, recipe)
    features = make_features(model, ready.data, source, target, recipe)
    refine(model, features, recipe, run=runs[2])
    training = Training(recipe, 0, runs[3])
    head, inputs = model.semantic_classifier, draw_refined(model, features, training)[0]
    nn.init.zeros_(head.weight)
    train_head(head, inputs, features.labels, training, "head", lambda _: 0.0)
    for run in runs:
        assert losses(run)[-1] < 0.95 * losses(run)[0], run.record.log[0]["phase"]
    assert [line["epoch"] for line in runs[2].record.log] == list(range(1, 31))
    assert {line["phase"] for line in runs[3].record.log} == {"head"}


def test_the_text_phase_trains_the_text_encoder_alone(ready: Prepared) -> None:
    recipe = replace(RECIPE, text_phase=TextPhase(epochs=1))
    parts = changed(
        ready.model, lambda: train_text(ready.model, ready.data, Training(recipe, 0, Progress()))
    )
    assert parts == {"text"}


def test_the_text_phase_lets_the_class_be_told_from_the_text(ready: Prepared) -> None:
    """Nearest class means of x_s, before and after."""

    def told() -> float:
        x_s, labels = text_features(ready.model, ready.data), ready.data.labels
        x_s = (x_s - x_s.mean(dim=0)) / x_s.std(dim=0)
        means = torch.stack([x_s[labels == k].mean(dim=0) for k in range(10)])
        spread = sum((x_s[labels == k] - means[k]).square().sum() for k in range(10))
        return float(spread / x_s.square().sum())

    before = told()
    recipe = replace(RECIPE, text_phase=TextPhase(epochs=20, batch=16, lr=1e-2))
    train_text(ready.model, ready.data, Training(recipe, 0, Progress()))
    assert told() < 0.5 * before


def test_phase_a_with_a_text_learning_rate_trains_both_encoders(ready: Prepared) -> None:
    recipe = change(RECIPE, alignment={"lr_text": 1e-2})
    assert changed(ready.model, lambda: align(ready, recipe)) == {"vision", "text", *HEADS}


def test_phase_a_without_one_keeps_the_text_encoder_frozen(ready: Prepared) -> None:
    parts = changed(ready.model, lambda: align(ready, RECIPE))
    assert parts == {"vision", *HEADS, "text_mean", "text_std"}


def test_phase_a_with_frozen_encoders_trains_the_heads_alone(ready: Prepared) -> None:
    """To the last bit, statistics of batch norms included."""
    parts = changed(ready.model, lambda: align(ready, FROZEN))
    assert parts == {*HEADS, "text_mean", "text_std"}


@pytest.mark.parametrize("recipe", [RECIPE, FROZEN], ids=["learning", "frozen"])
def test_the_baseline_never_sees_a_text_and_leaves_the_model_alone(
    recipe: Recipe, ready: Prepared
) -> None:
    garbled = replace(ready.data, input_ids=torch.full_like(ready.data.input_ids, 10**6))
    baseline = Baseline(ready.model)
    source = encoded(baseline.vision, garbled, recipe)

    def work() -> None:
        parts = changed(
            baseline,
            lambda: train_image_branch(baseline, garbled, source, Training(recipe, 0, Progress())),
        )
        learned = set() if recipe is FROZEN else {"vision"}
        assert parts == {*learned, "project_vision", "alignment_classifier"}

    assert changed(ready.model, work) == set()


def test_phase_b_trains_only_the_denoiser_and_its_classifier(
    model: MARNet, features: Features
) -> None:
    parts = changed(model, lambda: refine(model, features, RECIPE))
    assert parts == {"denoiser", "semantic_classifier"}


def test_phase_c_trains_only_its_head(model: MARNet, features: Features) -> None:
    def work() -> None:
        inputs = model.fuse(features.x_v, features.x_s).detach()
        train_head(
            model.classifier,
            inputs,
            features.labels,
            Training(RECIPE, 0, Progress()),
            "fusion",
            lambda head: float(head.weight.detach().abs().sum()),
        )

    assert changed(model, work) == {"classifier"}


# --- joint training


@pytest.mark.parametrize("joint", [True, False])
def test_joint_training_moves_the_image_encoder_by_the_loss_of_the_refinement(
    joint: bool, ready: Prepared
) -> None:
    """Classification and alignment weigh nothing here, so nothing else could move it."""
    weightless = {"ce_weight": 0.0, "ita_weight": 0.0, "weight_decay": 0.0, "epochs": 1}
    recipe = change(RECIPE, alignment={"joint": joint, **weightless})
    before = {name: p.detach().clone() for name, p in ready.model.named_parameters()}
    align(ready, recipe)
    moved = {
        name.split(".")[0]
        for name, p in ready.model.named_parameters()
        if not torch.equal(p.detach(), before[name])
    }
    fitted = {"project_text"}  # the standardisation of x_s is folded into it
    assert moved == fitted | ({"vision", "denoiser", "semantic_classifier"} if joint else set())


# --- phase B


def watch_denoiser(
    model: MARNet, features: Features, recipe: Recipe, *, one_pass: bool = False
) -> tuple[Tensor, Tensor]:
    """x_t [M, D] and t [M] of all rows that the denoiser was trained on."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.denoiser.register_forward_hook(lambda _, inputs, __: seen.append(inputs[:2]))
    refine(model, features, recipe, one_pass=one_pass)
    hook.remove()
    x, t = zip(*seen, strict=True)
    return torch.cat(x), torch.cat(t)


def test_one_pass_never_sees_noise_or_a_step(model: MARNet, features: Features) -> None:
    x, t = watch_denoiser(model, features, RECIPE, one_pass=True)
    assert not x.any()
    assert t.unique().tolist() == [8]


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0.08, 0.17), (0.5, 0.5, 0.63)])
def test_steps_are_uniform_but_for_the_share_of_pure_noise(
    share: float, least: float, most: float, model: MARNet, features: Features
) -> None:
    """An eighth of 2,940 rows, or half of them and an eighth of the rest, is at t = T = 8."""
    x, t = watch_denoiser(model, features, change(RECIPE, refinement={"pure_noise": share}))
    assert t.unique().tolist() == list(range(1, 9))
    assert least < float((t == 8).float().mean()) < most
    assert len(x.unique(dim=0)) == len(x)


def test_pure_noise_of_one_means_the_last_step_alone(model: MARNet, features: Features) -> None:
    _, t = watch_denoiser(model, features, change(RECIPE, refinement={"pure_noise": 1.0}))
    assert t.unique().tolist() == [8]


@pytest.mark.parametrize("best", [0, 3, LOOKS - 1])
def test_phase_b_ends_with_the_weights_that_validation_liked_best(
    best: int, model: MARNet, features: Features
) -> None:
    states: list[dict[str, Tensor]] = []

    def look() -> float:
        assert not model.denoiser.training
        states.append({k: v.clone() for k, v in Refiner.of(model).state_dict().items()})
        return 0.9 if len(states) - 1 == best else 0.1

    assert refine(model, features, change(RECIPE, refinement={"epochs": 24}), look) == 0.9
    assert len(states) == LOOKS
    left = Refiner.of(model).state_dict()
    assert all(torch.equal(left[name], value) for name, value in states[best].items())


@pytest.mark.parametrize(("epochs", "looks"), [(5, 5), (12, 12), (23, 23), (30, 15), (200, 13)])
def test_validation_is_looked_at_some_dozen_times_and_at_the_end(
    epochs: int, looks: int, model: MARNet, features: Features
) -> None:
    run, recipe = Progress(), change(RECIPE, refinement={"epochs": epochs, "batch": 98})
    refine(model, features, recipe, lambda: 0.0, run)
    at = [line["epoch"] for line in run.record.log if "score" in line]
    assert at[-1] == epochs
    assert len(at) == looks


def test_a_loss_that_is_not_a_number_stops_the_training(model: MARNet, features: Features) -> None:
    features.x_v[0] = math.nan
    with pytest.raises(
        RecipeError, match=r"step 1 of 60: the loss became nan .*; lower the learning rates"
    ):
        refine(model, features, RECIPE)


def test_a_batch_of_one_is_refused(model: MARNet, features: Features) -> None:
    single = change(RECIPE, refinement={"batch": 1})
    with pytest.raises(RecipeError, match="a batch of 2, got 98 and 1"):
        refine(model, features, single)


# --- folding


def test_folding_a_standardisation_is_exact() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).double(), 4 + 3 * torch.randn(20, 5).double()
    mean, std = mean_and_scale(x)
    expected = layer((x - mean) / std).detach()
    fold(layer, mean, std)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=FLOAT64, atol=FLOAT64)


STILL = {"epochs": 1, "batch": 10**6, "lr_backbone": 0.0, "lr_heads": 0.0}


def test_the_loss_of_phase_a_is_equation_13_of_the_model_that_it_leaves_behind(
    ready: Prepared,
) -> None:
    """With a learning rate of 0, the layers that learn on standardised features and those that
    take them raw, E_v and E_s, are the same functions."""
    recipe = change(
        RECIPE,
        alignment={**STILL, "ce_weight": 2.0, "ita_weight": 0.3, "temperature": 0.5},
        refinement={"views": 1},
    )
    run, model = Progress(), ready.model
    align(ready, recipe, run)
    with torch.no_grad():
        x_v = compute_views(model.vision, ready.data.images.store, Augment(), 1)[0]
        x_s = text_features(model, ready.data)
        ce = F.cross_entropy(model.alignment_logits(x_v), ready.data.labels)
        ita = ita_loss(model.align_vision(x_v), model.align_text(x_s), 0.5)
    assert losses(run) == [pytest.approx(float(2 * ce + 0.3 * ita), rel=FLOAT32_TWICE)]


def test_the_loss_of_the_baseline_is_cross_entropy_alone(ready: Prepared) -> None:
    recipe = change(RECIPE, alignment=STILL, refinement={"views": 1})
    run, baseline = Progress(), Baseline(ready.model)
    source = encoded(baseline.vision, ready.data, recipe)
    train_image_branch(baseline, ready.data, source, Training(recipe, 0, run))
    with torch.no_grad():
        x_v = compute_views(baseline.vision, ready.data.images.store, Augment(), 1)[0]
        ce = F.cross_entropy(baseline.alignment_logits(x_v), ready.data.labels)
    assert losses(run) == [pytest.approx(float(ce), rel=FLOAT32_TWICE)]


# --- what ITA sees


def watch_ita(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[Tensor | None]]:
    """Temperatures and groups that ITA is given."""
    temperatures, groups = list[float](), list[Tensor | None]()

    def spy(visual: Tensor, semantic: Tensor, tau: Tensor, same: Tensor | None) -> Tensor:
        temperatures.append(tau.item())
        groups.append(same)
        return ita_loss(visual, semantic, tau, same)

    monkeypatch.setattr(alignment, "ita_loss", spy)
    return temperatures, groups


def test_the_temperature_stays_as_the_recipe_has_it(
    ready: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = watch_ita(monkeypatch)
    align(ready, change(RECIPE, alignment={"temperature": 0.004, "epochs": 1}))
    assert seen == [pytest.approx(0.004)] * len(seen)


def test_a_temperature_may_be_learned_but_not_below_a_hundredth(
    ready: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = watch_ita(monkeypatch)
    fast = {"learn_temperature": True, "temperature": 0.05, "lr_heads": 0.3, "epochs": 6}
    align(ready, change(RECIPE, alignment=fast))
    assert seen[0] == pytest.approx(0.05)
    assert len(set(seen)) > 3
    assert min(seen) >= 0.01 - FLOAT32_LAYER


@pytest.mark.parametrize("lr_text", [0.0, 1e-3])
def test_negatives_are_told_apart_by_their_text_if_the_recipe_says_so(
    lr_text: float, ready: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ready.data.input_ids
    texts[7], texts[12] = texts[3], texts[3]
    ready.data.attention_mask[7] = ready.data.attention_mask[12] = ready.data.attention_mask[3]
    _, groups = watch_ita(monkeypatch)
    whole = {"epochs": 1, "batch": 49, "lr_text": lr_text}
    align(ready, change(RECIPE, alignment=whole))
    assert groups == [None]
    target = align(ready, change(RECIPE, alignment={**whole, "dedup_negatives": True}))
    same = (texts[:, None] == texts[None]).all(dim=2)
    assert torch.equal(target.groups[:, None] == target.groups, same)
    order = next(batches(49, 49, torch.Generator().manual_seed(0)))  # of the only batch
    assert groups[1] is not None
    assert torch.equal(groups[1], target.groups[order])


@pytest.mark.parametrize("kind", ["labels", "random", "shuffled"])
def test_the_groups_of_a_control_are_those_of_the_vectors_that_it_uses(
    kind: str, ready: Prepared
) -> None:
    target = make_target(ready.model, ready.data, replace(RECIPE, semantics=kind), seed=0)
    assert target.x_s is not None
    same = (target.x_s[:, None] == target.x_s).all(dim=2)
    assert torch.equal(target.groups[:, None] == target.groups, same)
    if kind != "shuffled":
        labels = ready.data.labels
        assert torch.equal(same, labels[:, None] == labels)


def test_equal_texts_are_encoded_once_and_every_image_gets_its_own(
    ready: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, forward, encoded_rows = ready.data, ready.model.text.forward, list[int]()
    alone = text_features(ready.model, data)
    data.input_ids[5:9], data.attention_mask[5:9] = data.input_ids[0], data.attention_mask[0]

    def count(ids: Tensor, mask: Tensor) -> Tensor:
        encoded_rows.append(len(ids))
        return forward(ids, mask)

    monkeypatch.setattr(ready.model.text, "forward", count)
    found = text_features(ready.model, data)
    assert sum(encoded_rows) == len(data.input_ids.unique(dim=0)) <= 45
    expected = torch.cat([alone[:5], alone[:1].repeat(4, 1), alone[9:]])
    torch.testing.assert_close(found, expected, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)


# --- features for phases B and C


def test_features_are_view_major_and_keep_rows_together(
    ready: Prepared, target: Target, features: Features
) -> None:
    assert features.x_v.shape == (2 * 49, 8)
    for view in (slice(0, 49), slice(49, 98)):
        assert torch.equal(features.x_s[view], target.x_s)
        assert torch.equal(features.labels[view], ready.data.labels)
    assert not torch.allclose(features.x_v[:49], features.x_v[49:])  # augmented differently


def test_a_frozen_encoder_s_features_are_the_cached_views(ready: Prepared, target: Target) -> None:
    source = encoded(ready.model.vision, ready.data, FROZEN)
    assert isinstance(source, FrozenFeatures)
    features = make_features(ready.model, ready.data, source, target, FROZEN)
    assert torch.equal(features.x_v, source.views.flatten(0, 1))


@pytest.mark.parametrize("lr_text", [0.0, 1e-3])
def test_the_statistics_that_standardise_the_features_are_stored(
    lr_text: float, ready: Prepared
) -> None:
    recipe = change(RECIPE, alignment={"lr_text": lr_text})
    target = align(ready, recipe)
    source = encoded(ready.model.vision, ready.data, recipe)
    features = make_features(ready.model, ready.data, source, target, recipe)
    x_s = text_features(ready.model, ready.data)
    standard_text = ready.model.standardise_text(x_s)
    torch.testing.assert_close(features.x_s[:49], standard_text, rtol=0, atol=FLOAT32_TWICE)
    pairs = ((features.x_v, ready.model.condition(features.x_v)), (x_s, standard_text))
    for raw, standard in pairs:
        mean, spread = standard.mean(dim=0), standard.std(dim=0, correction=0)
        varies = (raw.amax(dim=0) > raw.amin(dim=0)).float()  # a fresh ReLU may be dead
        assert varies.sum() >= len(varies) / 2
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=FLOAT32_TWICE)
        torch.testing.assert_close(spread, varies, rtol=0, atol=FLOAT32_TWICE)


def test_a_dimension_that_never_varies_keeps_its_scale(ready: Prepared) -> None:
    same = replace(
        ready.data,
        input_ids=ready.data.input_ids[:1].repeat(49, 1),
        attention_mask=ready.data.attention_mask[:1].repeat(49, 1),
    )
    make_target(ready.model, same, RECIPE, seed=0)
    assert torch.equal(ready.model.text_std, torch.ones(12))


def test_a_dimension_that_never_varies_has_scale_one_and_the_others_their_deviation() -> None:
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1e-8]])
    mean, scale = mean_and_scale(x)
    assert mean.tolist() == [2.0, 5.0, pytest.approx(5e-9)]
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert mean_and_scale(3 * x)[1].tolist() == [3.0, 1.0, 1.0]


# --- phase C


def test_every_row_and_draw_of_phase_c_has_its_own_noise(
    model: MARNet, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, starts, noises = model.refine, [], []

    def remember(x_v: Tensor, table: SamplerTable, initial: Tensor, noise: Tensor) -> Tensor:
        starts.append(initial)
        noises.append(noise.transpose(0, 1).flatten(1))  # [B, S * D]
        return chain(x_v, table, initial, noise)

    monkeypatch.setattr(model, "refine_in_parts", remember)
    equal = replace(features, x_v=features.x_v[:1].repeat(98, 1))
    refined = draw_refined(model, equal, Training(RECIPE, 0, Progress()))
    assert refined.shape == (2, 98, 12)
    for drawn in (torch.cat(starts), torch.cat(noises), refined.flatten(0, 1)):
        assert len(drawn.unique(dim=0)) == 2 * 98


def test_the_same_seed_draws_the_same_refined_features(model: MARNet, features: Features) -> None:
    first = draw_refined(model, features, Training(RECIPE, 3, Progress()))
    assert torch.equal(first, draw_refined(model, features, Training(RECIPE, 3, Progress())))
    assert not torch.equal(first, draw_refined(model, features, Training(RECIPE, 4, Progress())))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Inputs far from standard, and labels that depend on them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(98, 6, generator=generator)
    labels = (x @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    return 5 + 3 * x, labels


def train(
    head: nn.Linear, rows: tuple[Tensor, Tensor], look: Callable[[nn.Linear], float], **phase: float
) -> Progress:
    recipe, run = change(RECIPE, fusion_phase=phase), Progress()
    train_head(head, *rows, Training(recipe, 0, run), "head", look)
    return run


def accuracy_on(rows: tuple[Tensor, Tensor]) -> Callable[[nn.Linear], float]:
    return lambda head: float((head(rows[0]).argmax(dim=1) == rows[1]).float().mean())


def test_a_head_starts_from_what_it_has(rows: tuple[Tensor, Tensor]) -> None:
    """With a learning rate of 0 and one batch, the logged loss is that of the head as it was."""
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    expected = F.cross_entropy(head(rows[0]), rows[1]).item()
    logits = head(rows[0]).detach()
    run = train(head, rows, lambda _: 0.0, epochs=1, lr=0.0, batch=10**6)
    assert losses(run) == [pytest.approx(expected, rel=FLOAT32_TWICE)]
    torch.testing.assert_close(
        head(rows[0]).detach(), logits, rtol=FLOAT32_TWICE, atol=FLOAT32_TWICE
    )


def test_a_head_learns_on_raw_inputs(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    score = accuracy_on(rows)
    before = score(head)
    train(head, rows, score, epochs=40, lr=0.1)
    assert score(head) > max(0.9, before)


@pytest.mark.parametrize("seed", range(3))
def test_a_head_never_ends_worse_on_validation_than_it_began(
    seed: int, rows: tuple[Tensor, Tensor]
) -> None:
    """Validation disagrees with the training labels, so that every epoch harms."""
    torch.manual_seed(seed)
    head = nn.Linear(6, 3)
    opposed = (rows[0], (rows[1] + 1) % 3)
    good = nn.Linear(6, 3)
    train(good, opposed, accuracy_on(opposed), epochs=40, lr=0.1)
    head.load_state_dict(good.state_dict())
    score = accuracy_on(opposed)
    before = score(head)
    train(head, rows, score, epochs=10, lr=0.3)
    assert score(head) >= before > 0.8


def test_an_input_that_never_varies_does_not_blow_up_the_head(rows: tuple[Tensor, Tensor]) -> None:
    """Divided by 1e-6 instead of by 1, its weights would be a million times the others'."""
    rows[0][:, 4] = 2.5
    head = nn.Linear(6, 3)
    train(head, rows, accuracy_on(rows), epochs=5)
    assert float(head.weight.detach().abs().max()) < 10


# --- an image encoder that learns in part, or on crops


def test_parts_before_learn_from_stay_as_they_are_statistics_and_all(ready: Prepared) -> None:
    """The backbone is a ResNet: `embedder`, then `encoder.stages.0` and `.1`."""
    backbone = ready.model.vision.backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    align(ready, change(RECIPE, alignment={"learn_from": "encoder.stages.1"}))
    after = backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("encoder.stages.1")}
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    later = ready.model.vision.train()
    assert all(part.training for part in later.modules())  # nothing stays behind


def test_the_baseline_learns_the_same_part_as_the_model(ready: Prepared) -> None:
    recipe = change(RECIPE, alignment={"learn_from": "encoder.stages.1"})
    baseline = Baseline(ready.model)
    source = encoded(baseline.vision, ready.data, recipe)
    before = {name: tensor.clone() for name, tensor in baseline.vision.state_dict().items()}
    train_image_branch(baseline, ready.data, source, Training(recipe, 0, Progress()))
    after = baseline.vision.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "encoder.stages.1" in name}


def test_batch_statistics_can_be_kept_while_scales_learn(ready: Prepared) -> None:
    backbone = ready.model.vision.backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    align(ready, change(RECIPE, alignment={"keep_statistics": True}))
    after = backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    counted = ("running_mean", "running_var", "num_batches_tracked")
    assert same == {name for name in before if name.endswith(counted)}


def test_learning_from_the_first_part_is_learning_whole(digits: Path) -> None:
    whole, first = make_ready(digits, RECIPE), make_ready(digits, RECIPE)
    align(whole, RECIPE)
    align(first, change(RECIPE, alignment={"learn_from": "embedder"}))
    for one, other in zip(whole.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_part_that_is_not_there_is_refused_with_those_that_are(digits: Path) -> None:
    recipe = change(RECIPE, alignment={"learn_from": "encoder.stage.1"})
    message = r"no part 'encoder.stage.1'\. Did you mean .encoder.stages.1.*leave learn_from out"
    with pytest.raises(RecipeError, match=message):
        make_ready(digits, recipe)


def test_an_encoder_learns_on_crops_and_is_judged_on_whole_images(ready: Prepared) -> None:
    seen: set[tuple[int, ...]] = set()
    vision = ready.model.vision
    vision.backbone.register_forward_pre_hook(
        lambda _, args, inputs: seen.add(tuple(inputs["pixel_values"].shape[2:])),
        with_kwargs=True,
    )
    recipe = change(RECIPE, alignment={"crop": 6})
    target = align(ready, recipe)
    assert seen == {(6, 6)}
    seen.clear()
    make_features(ready.model, ready.data, encoded(vision, ready.data, recipe), target, recipe)
    assert seen == {(8, 8)}


def test_a_crop_is_not_larger_than_the_images(digits: Path) -> None:
    with pytest.raises(RecipeError, match=r"crop is 9, but images are 8 x 8 .* at most 8"):
        make_ready(digits, change(RECIPE, alignment={"crop": 9}))


def test_an_encoder_of_one_size_refuses_crops_before_any_training(digits: Path) -> None:
    vit = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 8,
        "patch_size": 2,
    }
    recipe = change(RECIPE, vision=vit, alignment={"crop": 6})
    with pytest.raises(RecipeError, match=r"does not take images of 6 x 6.*leave crop out"):
        make_ready(digits, recipe)


@pytest.mark.parametrize(
    "setting", [{"learn_from": "embedder"}, {"crop": 6}, {"keep_statistics": True}]
)
def test_a_frozen_encoder_has_none_of_them(setting: dict[str, object]) -> None:
    message = f"{next(iter(setting))}: only an image encoder that learns .* lr_backbone above 0"
    with pytest.raises(RecipeError, match=message):
        change(FROZEN, alignment=setting)


# --- best weights and early stops in phase A


def watched(model: nn.Module, scores: list[float]) -> tuple[Callable[..., float], list[dict]]:
    """A look at validation with scores that are given, and the weights that it saw."""
    seen: list[dict] = []

    def look(mean: Tensor, std: Tensor) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return scores[len(seen) - 1]

    return look, seen


@pytest.mark.parametrize("rates", [{}, {"lr_backbone": 0.0}], ids=["learning", "frozen"])
def test_phase_a_keeps_the_best_weights_if_the_recipe_says_so(
    rates: dict[str, float], ready: Prepared
) -> None:
    best = {"epochs": 4, "keep_best": True} | rates
    recipe, run = change(RECIPE, alignment=best), Progress()
    model, source = ready.model, encoded(ready.model.vision, ready.data, recipe)
    look, seen = watched(model, [0.1, 0.8, 0.3, 0.8])
    target = make_target(model, ready.data, recipe, seed=0)
    train_alignment(model, ready.data, source, target, Training(recipe, 0, run), look=look)
    assert [line["score"] for line in run.record.log] == [0.1, 0.8, 0.3, 0.8]
    name = "alignment_classifier.weight"
    kept = [torch.equal(model.state_dict()[name], weights[name]) for weights in seen]
    assert kept == [False, True, False, False]


def test_phase_a_without_it_looks_at_nothing_and_keeps_the_last_weights(ready: Prepared) -> None:
    look, seen = watched(ready.model, [])
    recipe, run = change(RECIPE, alignment={"epochs": 2}), Progress()
    target = make_target(ready.model, ready.data, recipe, seed=0)
    source = encoded(ready.model.vision, ready.data, recipe)
    train_alignment(ready.model, ready.data, source, target, Training(recipe, 0, run), look=look)
    assert seen == []
    assert [sorted(line) for line in run.record.log] == [["epoch", "loss", "phase"]] * 2


def test_phases_end_early_when_validation_finds_nothing_better(
    ready: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = change(
        RECIPE,
        alignment={"epochs": 6, "keep_best": True, "patience": 2},
        refinement={"epochs": 24, "patience": 3},
        fusion_phase={"epochs": 12, "patience": 1},
    )
    model, runs = ready.model, [Progress() for _ in range(3)]
    look, _ = watched(model, [0.5, 0.4, 0.5])
    target = make_target(model, ready.data, recipe, seed=0)
    source = encoded(model.vision, ready.data, recipe)
    train_alignment(model, ready.data, source, target, Training(recipe, 0, runs[0]), look=look)
    features = make_features(model, ready.data, source, target, recipe)
    refine(model, features, recipe, lambda: 0.0, runs[1])
    rows = model.fuse(features.x_v, features.x_s).detach()
    training = Training(recipe, 0, runs[2])
    train_head(model.classifier, rows, features.labels, training, "fusion", lambda _: 0.0)
    assert [run.record.log[-1]["epoch"] for run in runs] == [3, 8, 1]
    told = capsys.readouterr().err
    assert "alignment: ends after epoch 3 of 6; 2 looks at validation found nothing better" in told
    assert "refinement: ends after epoch 8 of 24; 3 looks" in told


def test_training_is_the_same_whether_images_are_kept_or_not(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for limit in (pixels.KEPT_LIMIT, 0):
        monkeypatch.setattr(pixels, "KEPT_LIMIT", limit)
        ready, run = make_ready(digits, RECIPE), Progress()
        assert ready.data.images.store.keeps == (limit > 0)
        align(ready, change(RECIPE, alignment={"epochs": 2}), run)
        runs.append(losses(run))
    assert runs[0] == runs[1]


def test_clipped_gradients_change_what_a_phase_learns(digits: Path) -> None:
    recipe, found = change(RECIPE, alignment={"epochs": 2}), []
    for norm in (None, 1e6, 1e-3):
        run = Progress()
        align(make_ready(digits, RECIPE), replace(recipe, clip_norm=norm), run)
        found.append(losses(run))
    assert found[0] == found[1] != found[2]

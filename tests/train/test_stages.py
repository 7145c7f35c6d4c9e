"""A whole training: its order, what validation chooses, and that an interruption changes nothing.

Axes: N images, C classes, K noise samples.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import kept
from tiny_training import TINY, Stop, change, interrupt_after, make_ready
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE
from torch import Tensor, nn

from marnet_train import heads, progress, stages
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import measure_branches, refined_features
from marnet_train.heads import BLENDS, blend, score, temper
from marnet_train.models.fusion import FUSIONS
from marnet_train.phases import Training, train_text
from marnet_train.progress import Progress, saved_progress
from marnet_train.recipe import Recipe, TextPhase
from marnet_train.refinement import LOOK_SAMPLES, Refiner, refiner_probabilities
from marnet_train.stages import (
    ITA_WEIGHTS,
    Stages,
    Trained,
    measure_all,
    norm_weights,
    train_all,
)

SEARCH = change(
    TINY,
    samples="auto",
    text_phase=TextPhase(epochs=1, batch=16),
    alignment={"ita_weight": "auto"},
    refinement={"norm_weight": "auto"},
)
FROZEN = change(TINY, alignment={"lr_backbone": 0.0})
ORDER = ["baseline", "alignment", "+MLP", "refinement", "refined head", "fusion"]


def train(
    digits: Path, recipe: Recipe, run: Progress | None = None, seed: int = 0, **settings: Any
) -> Trained:
    ready = make_ready(digits, recipe, seed)
    val = ready.splits["val"]
    return train_all(ready.model, ready.data, val, recipe, seed, run or Progress(), **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def searched(digits: Path) -> tuple[Trained, Progress]:
    """A training in which validation chose all that it can, undisturbed."""
    run = Progress()
    return train(digits, SEARCH, run), run


# --- choosing


def choose(scores: list[float]) -> tuple[Any, list[tuple[Any, str]]]:
    tried: list[tuple[Any, str]] = []

    def attempt(value: Any, title: str) -> float:
        tried.append((value, title))
        return scores[len(tried) - 1]

    values = [0.1, 0.5, 1.0][: len(scores)]
    return Stages(Progress(), nn.Linear(1, 1)).choose("beta", values, attempt), tried


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.3, 0.2], 0.5), ([0.3, 0.3, 0.3], 0.1), ([0.1, 0.3, 0.3], 0.5), ([0, 0, 1], 1.0)],
)
def test_the_best_value_is_chosen_and_of_equals_the_first(scores, best, capsys):
    found, tried = choose(scores)
    assert found == best
    assert tried == [(0.1, "beta 0.1"), (0.5, "beta 0.5"), (1.0, "beta 1")]
    assert f"beta: {best:.4g}, by validation (0.1: " in capsys.readouterr().err


def test_where_there_is_nothing_to_choose_nothing_is_tried():
    assert choose([0.3]) == (0.1, [])


def test_validation_prefers_accuracy_and_between_equals_the_likelier():
    labels = torch.tensor([0, 1])
    sure = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    doubtful = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    wrong = torch.tensor([[0.49, 0.51], [0.0, 1.0]])
    assert score(sure, labels) > score(doubtful, labels) > score(wrong, labels)
    impossible = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert score(impossible, labels) > -1  # a probability of zero is not minus infinity


def test_gamma_is_tried_between_the_norm_and_the_mean():
    assert norm_weights(100) == pytest.approx((1.0, 0.1, 0.01))


# --- the order, and what is left behind


def test_stages_come_in_order_and_nothing_is_tried_that_the_recipe_decides(digits: Path) -> None:
    run = Progress()
    trained = train(digits, TINY, run)
    assert list(run.record.results) == ORDER
    assert (trained.recipe, trained.model.config.samples) == (TINY, 1)


def test_what_a_recipe_leaves_open_is_tried_and_the_baseline_gets_as_many_tries(
    searched: tuple[Trained, Progress],
) -> None:
    trained, run = searched
    rates = [f"learning rate of the baseline, times {x}" for x in ("0.5", "1", "2")]
    beta = [f"beta {x}" for x in ("0.1", "0.5", "1")]
    gammas = [f"{x:.4g}" for x in norm_weights(12)]
    mlp, refinement = ([f"gamma of {name} {g}" for g in gammas] for name in ("+MLP", "refinement"))
    assert list(run.record.results) == [
        *("text", *rates, "baseline", *beta, "alignment"),
        *(*mlp, "+MLP", *refinement, "refinement", "refined head", "fusion", "samples"),
    ]
    results = run.record.results
    recipe = trained.recipe
    for names, values, chosen in (
        (beta, ITA_WEIGHTS, recipe.alignment.ita_weight),
        (refinement, norm_weights(12), recipe.refinement.norm_weight),
    ):
        best = max(range(3), key=[results[name] for name in names].__getitem__)
        assert chosen == values[best]
    assert trained.model.config.samples == recipe.samples in (1, 2, 4, 8)


def test_a_chosen_value_gives_the_weights_that_it_gives_when_the_recipe_names_it(
    searched: tuple[Trained, Progress], digits: Path
) -> None:
    """Trials leave no trace. (The baseline's rate and the control's gamma are not in a recipe.)"""
    trained, _ = searched
    assert same(train(digits, trained.recipe).model, trained.model)


@pytest.mark.parametrize(
    "recipe",
    [TINY, FROZEN, pytest.param(SEARCH, marks=pytest.mark.slow)],
    ids=["learning", "frozen", "search"],
)
def test_the_same_seed_gives_the_same_weights_and_another_one_others(
    recipe: Recipe, digits: Path
) -> None:
    first = train(digits, recipe)
    torch.manual_seed(99)
    assert same(train(digits, recipe).modules, first.modules)
    if recipe is TINY:
        assert not same(train(digits, recipe, seed=1).model, first.model)


MOMENTS = ["text", "learning rate of the baseline, times 2", "beta 0.5", "gamma of +MLP 1",
           "gamma of refinement 0.08333", "refinement", "refined head", "fusion"]  # fmt: skip


@pytest.mark.parametrize("moment", kept(MOMENTS, {"beta 0.5"}))
def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(
    moment: str,
    searched: tuple[Trained, Progress],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second epoch of a trial or a phase; what was done is not done again."""
    expected, undisturbed = searched
    monkeypatch.setattr(progress, "SAVING_SHARE", float("inf"))  # save after each epoch
    out = tmp_path / "out"

    def go() -> tuple[Trained, Progress]:
        with saved_progress(out, {}, restart=False) as run:
            return train(digits, SEARCH, run), run

    with monkeypatch.context() as patch:
        interrupt_after(patch, moment, 0 if moment == "text" else 1)
        with pytest.raises(Stop):
            go()
    found, run = go()
    assert same(found.modules, expected.modules)
    assert found.recipe == expected.recipe
    assert run.record.log == undisturbed.record.log
    assert run.record.results == undisturbed.record.results


def test_without_a_baseline_it_stays_as_it_began(digits: Path) -> None:
    run = Progress()
    trained = train(digits, TINY, run, with_baseline=False)
    fresh = make_ready(digits).model
    assert same(trained.baseline.vision, fresh.vision)
    assert "baseline" not in run.record.results
    assert same(trained.model, train(digits, TINY).model)


# --- what stands still


def test_heads_learn_first_and_baseline_and_model_begin_with_the_same(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = change(TINY, alignment={"head_epochs": 3, "crop": 6})
    ready, begun = make_ready(digits, recipe), []
    fresh = copy.deepcopy(ready.model)
    tune = stages.train_image_branch

    def watch(branch: nn.Module, *arguments: Any) -> None:
        begun.append({n: t.clone() for n, t in branch.state_dict().items()})
        tune(branch, *arguments)

    monkeypatch.setattr(stages, "train_image_branch", watch)
    run = Progress()
    train_all(ready.model, ready.data, ready.splits["val"], recipe, 0, run)
    assert list(run.record.results) == ["heads", *ORDER]
    assert [line["phase"] for line in run.record.log][:4] == ["heads"] * 3 + ["baseline"]
    baseline = begun[1]  # `begun[0]` is the model before its heads learned
    moved = {n for n, t in baseline.items() if not torch.equal(t, fresh.state_dict()[n])}
    assert {n.split(".")[0] for n in moved} == {"project_vision", "alignment_classifier"}


def test_frozen_encoders_stay_as_they_were_to_the_last_bit(digits: Path) -> None:
    """Batch norms and their statistics included, in the model and in the baseline."""
    trained, fresh = train(digits, FROZEN), make_ready(digits, FROZEN).model
    assert same(trained.model.vision, fresh.vision)
    assert same(trained.baseline.vision, fresh.vision)
    assert same(trained.model.text, fresh.text)
    assert not same(trained.model.project_vision, fresh.project_vision)


def test_after_its_phase_the_text_encoder_stands_still(digits: Path) -> None:
    recipe = replace(TINY, text_phase=TextPhase(epochs=2, batch=16))
    alone, fresh = make_ready(digits, recipe), make_ready(digits, recipe)
    train_text(alone.model, alone.data, Training(recipe, 0, Progress()))
    assert not same(alone.model.text, fresh.model.text)
    assert same(train(digits, recipe).model.text, alone.model.text)


@pytest.mark.parametrize("kind", kept(["labels", "random", "shuffled"], {"shuffled"}))
def test_a_control_trains_like_the_text_that_it_replaces(kind: str, digits: Path) -> None:
    recipe = change(TINY, semantics=kind, alignment={"lr_text": 1e-3})
    trained = train(digits, recipe, with_baseline=False)
    assert not same(trained.model, train(digits, TINY, with_baseline=False).model)
    assert same(trained.model.text, make_ready(digits).model.text)  # no text learns


# --- heads


def no_epochs(recipe: Recipe, **settings: Any) -> Recipe:
    return change(recipe, fusion_phase={"epochs": 0}, **settings)


def head_scores(
    digits: Path, monkeypatch: pytest.MonkeyPatch, blends: tuple[float, ...]
) -> dict[str, Tensor]:
    """Which validation images each branch has right, with the first fusion head as it starts."""
    monkeypatch.setattr(heads, "BLENDS", blends)
    recipe = no_epochs(TINY)
    ready = make_ready(digits, recipe)
    trained = train_all(ready.model, ready.data, ready.splits["val"], recipe, 0, Progress())
    seen = ready.splits["val"].seen_by(trained.model.vision, frozen=False)
    return {name: found.correct for name, found in measure_branches(trained.model, seen).items()}


@pytest.mark.parametrize(("share", "branch"), [(0.0, "alignment"), (1.0, "refined")])
def test_a_blend_of_one_branch_answers_as_that_branch(
    share: float, branch: str, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = head_scores(digits, monkeypatch, (share,))
    assert torch.equal(right["marnet"], right[branch])


@torch.no_grad()
def test_half_a_blend_is_the_geometric_mean_of_both_branches(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_ready(digits).model.eval()
    monkeypatch.setattr(heads, "BLENDS", (0.5,))
    blend(model, lambda _: 0.0)
    x_v, x_cdr = torch.randn(9, 8), torch.randn(9, 12)
    both = model.alignment_logits(x_v).softmax(1) * model.semantic_classifier(x_cdr).softmax(1)
    mean = both.sqrt() / both.sqrt().sum(dim=1, keepdim=True)
    found = model.head(x_v, x_cdr)[0].softmax(dim=1)
    torch.testing.assert_close(found, mean, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)


@pytest.mark.parametrize("best", range(len(BLENDS)))
@torch.no_grad()
def test_the_blend_that_validation_likes_best_is_taken(best: int, digits: Path) -> None:
    model, seen = make_ready(digits).model, list[nn.Linear]()

    def look(head: nn.Linear) -> float:
        seen.append(copy.deepcopy(head))
        return float(len(seen) - 1 == best)

    blend(model, look)
    assert len(seen) == len(BLENDS)
    assert same(model.classifier, seen[best])


@pytest.mark.parametrize(
    ("fusion", "level"),
    [*((fusion, "feature") for fusion in FUSIONS), ("concat", "logit"), ("hm", "logit")],
)
def test_every_fusion_is_trained_on_ends_of_whole_chains(
    fusion: str, level: str, digits: Path
) -> None:
    recipe = replace(TINY, fusion=fusion, fusion_level=level)
    ready = make_ready(digits, recipe)
    trained = train_all(ready.model, ready.data, ready.splits["val"], recipe, 0, Progress())
    model = trained.model
    measured = measure_all(trained, ready.splits["val"])
    assert set(measured) == {"baseline", "alignment", "mlp", "refined", "marnet"}
    if fusion != "concat":  # standardised by what the head was trained on
        for name in ("aligned", "refined"):
            assert getattr(model, f"{name}_mean").any()
            std = getattr(model, f"{name}_std")
            assert not torch.equal(std, torch.ones(len(std)))


# --- temperature


def overconfident(scale: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head whose logits are `scale` times those that the labels were drawn from."""
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(6, 4)
    x = torch.randn(4000, 6, generator=generator)
    with torch.no_grad():
        labels = torch.multinomial(head(x).softmax(dim=1), 1, generator=generator)[:, 0]
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    return head, x, labels


@pytest.mark.parametrize("scale", [0.25, 1.0, 5.0])
@torch.no_grad()
def test_a_temperature_undoes_too_much_and_too_little_confidence(scale: float) -> None:
    torch.manual_seed(0)
    head, x, labels = overconfident(scale)
    before = copy.deepcopy(head)
    temper(head, [x], labels)
    assert float(before.weight[0, 0] / head.weight[0, 0]) == pytest.approx(scale, rel=0.15)
    assert torch.equal(head(x).argmax(dim=1), before(x).argmax(dim=1))
    sure, right = head(x).softmax(dim=1).max(dim=1)
    assert float(sure.mean()) == pytest.approx(float((right == labels).float().mean()), abs=0.03)


@torch.no_grad()
def test_the_temperature_suits_the_mean_over_noise_samples() -> None:
    """Of samples that disagree the mean is less sure than each, so each may be surer."""
    torch.manual_seed(0)
    head, x, labels = overconfident(1.0)
    alone = copy.deepcopy(head)
    noisy = [x + torch.randn_like(x) for _ in range(4)]
    temper(alone, noisy[:1], labels)
    temper(head, noisy, labels)
    assert head.weight.norm() > alone.weight.norm()


def test_every_classifier_of_a_training_is_as_sure_as_validation_allows(digits: Path) -> None:
    """Tempered once more, none of them would change by more than a step of the search."""
    recipe = change(FROZEN, alignment={"epochs": 12}, refinement={"epochs": 60})
    trained = train(digits, recipe)  # until its answers are better than chance
    seen = make_ready(digits, recipe).splits["val"].seen_by(trained.model.vision, frozen=True)
    table = sampler_table(recipe.schedule, "ddpm")
    with torch.no_grad():
        chains = [
            refined_features(trained.model, seen.x_v, table, 0, k) for k in range(LOOK_SAMPLES)
        ]
        estimate = trained.mlp.eval().one_pass(trained.model.condition(seen.x_v))
        heads = {
            "baseline": (
                trained.baseline.alignment_classifier,
                [trained.baseline.align_vision(seen.x_v)],
            ),
            "alignment": (
                trained.model.alignment_classifier,
                [trained.model.align_vision(seen.x_v)],
            ),
            "+MLP": (trained.mlp.classifier, [estimate]),
            "refined": (trained.model.semantic_classifier, chains),
            "MARNet": (trained.model.classifier, [trained.model.fuse(seen.x_v, x) for x in chains]),
        }
    for name, (head, inputs) in heads.items():
        before = float(head.weight.detach().norm())
        temper(head, inputs, seen.labels)
        assert float(head.weight.detach().norm()) == pytest.approx(before, rel=0.07), name


# --- K


def fixed_probabilities(right: dict[int, int]) -> Any:
    """For K samples of N = 30 images, as many right answers as `right` says of their mean."""
    by_count = torch.zeros(8, 30, 2)
    labels = torch.zeros(30, dtype=torch.int64)
    before = torch.zeros(30)
    for k in range(8):
        count = right[max(x for x in right if x <= k + 1)]
        wanted = torch.where(torch.arange(30) < count, 0.75, 0.25) * (k + 1)
        by_count[k, :, 0] = wanted - before
        before = wanted
    by_count[..., 1] = 1 - by_count[..., 0]
    return by_count, labels


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({1: 20, 2: 20, 4: 20, 8: 20}, 1),
        ({1: 20, 2: 25, 4: 25, 8: 25}, 2),
        ({1: 20, 2: 21, 4: 22, 8: 23}, 8),
        ({1: 25, 2: 21, 4: 22, 8: 23}, 1),
        ({1: 20, 2: 21, 4: 25, 8: 24}, 4),
    ],
)
def test_as_few_samples_are_chosen_as_are_as_good_as_the_best(
    right: dict[int, int], expected: int, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, labels = fixed_probabilities(right)
    asked: list[tuple[int, int]] = []

    def probabilities(*arguments: Any) -> tuple[None, Tensor]:
        asked.append(arguments[3:])
        return None, drawn

    monkeypatch.setattr(stages, "sample_probabilities", probabilities)
    recipe = no_epochs(TINY, samples="auto", alignment={"epochs": 0}, refinement={"epochs": 0})
    ready = make_ready(digits, recipe)
    val = replace(ready.splits["val"], labels=labels)
    trained = train_all(ready.model, ready.data, val, recipe, 0, Progress())
    assert asked == [(seed, 8) for seed in (0, 1, 2)]
    assert trained.recipe.samples == trained.model.config.samples == expected


# --- measuring


def test_a_control_and_every_branch_are_measured_on_the_same_images(digits: Path) -> None:
    ready = make_ready(digits)
    trained = train_all(ready.model, ready.data, ready.splits["val"], TINY, 0, Progress())
    test = ready.splits["test"]
    found = measure_all(trained, test)
    assert {m.images for m in found.values()} == {20}
    assert {name: m.samples for name, m in found.items()} == {
        **dict.fromkeys(("baseline", "mlp", "alignment"), 0),
        **dict.fromkeys(("refined", "marnet"), 1),
    }
    seen = test.seen_by(trained.model.vision, frozen=False)
    condition = trained.model.condition(seen.x_v)
    with torch.no_grad():
        still = trained.mlp.denoiser(torch.zeros(20, 12), torch.full((20,), 8), condition)
        answers = trained.mlp.classifier(still).argmax(dim=1)
    assert torch.equal(found["mlp"].correct, (answers == test.labels).float())


def test_phase_b_is_judged_by_chains_like_those_that_classify(digits: Path) -> None:
    """The look at validation and the refined branch agree on most of what they answer."""
    recipe = change(TINY, refinement={"epochs": 20})
    ready = make_ready(digits, recipe)
    trained = train_all(ready.model, ready.data, ready.splits["val"], recipe, 0, Progress())
    model = trained.model
    seen = ready.splits["val"].seen_by(model.vision, frozen=False)
    refiner = Refiner.of(model)
    looked = refiner_probabilities(refiner, model, seen.x_v, 0, one_pass=False)
    assert looked.shape == (30, 10)
    torch.testing.assert_close(
        looked.sum(dim=1), torch.ones(30), rtol=FLOAT32_TWICE, atol=FLOAT32_TWICE
    )
    table = sampler_table(recipe.schedule, "ddpm")
    with torch.no_grad():
        chains = [refined_features(model, seen.x_v, table, 0, k) for k in range(8)]
        served = torch.stack([model.semantic_classifier(x).softmax(1) for x in chains]).mean(dim=0)
    assert (looked.argmax(dim=1) == served.argmax(dim=1)).float().mean() > 0.5

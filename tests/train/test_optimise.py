"""What training loops share: rates, what decays, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT32_LAYER, FLOAT64
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_train.models.backbones import backbone_config, build_backbone
from marnet_train.models.denoiser import Denoiser
from marnet_train.optimise import Learner, batches, parameter_groups, warmup_cosine

SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16}
VIT = {"model_type": "vit", **SIZES, "image_size": 8, "patch_size": 4}
BEIT = {**VIT, "model_type": "beit", "use_relative_position_bias": True}
SWIN = {"model_type": "swin", "image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1]}
SWIN |= {"num_heads": [2], "window_size": 4, "use_absolute_embeddings": True}
BERT = {"model_type": "bert", **SIZES, "vocab_size": 20}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4], "depths": [1]}


# --- batches and rates


@given(st.integers(2, 40), st.integers(2, 12))
def test_an_epoch_sees_every_row_at_most_once_and_leaves_out_a_batch_of_one(count, size):
    found = list(batches(count, size, torch.Generator().manual_seed(0)))
    rows = torch.cat(found).tolist()
    assert len(set(rows)) == len(rows) == count - (count % size == 1)
    assert all(2 <= len(batch) <= size for batch in found)


@given(total=st.integers(2, 500), warmup=st.floats(0, 0.9))
def test_the_learning_rate_rises_linearly_and_falls_to_zero(total: int, warmup: float) -> None:
    factors = [warmup_cosine(step, total, warmup) for step in range(total + 1)]
    rise = max(1, int(warmup * total))
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert factors[rise - 1] == factors[rise] == 1
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=FLOAT64)


def test_the_learning_rate_is_half_in_the_middle_of_its_fall() -> None:
    assert warmup_cosine(60, 100, 0.2) == pytest.approx(0.5)


# --- what decays


def decaying(module: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, rate=0.1, weight_decay=0.05)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names)  # each once
    assert {group["lr"] for group in groups} == {0.1}
    assert {group["weight_decay"] for group in groups} <= {0.05, 0.0}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def matrices(module: nn.Module) -> set[str]:
    """Weights of linear layers and convolutions."""
    return {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize(
    ("description", "spared"),
    [
        (VIT, {"embeddings.cls_token", "embeddings.position_embeddings"}),
        (BEIT, {"embeddings.cls_token"}),
        (SWIN, {"embeddings.position_embeddings"}),
        (BERT, {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}),
        (RESNET, set()),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_only_matrices_and_kernels_of_an_encoder_decay(
    description: dict[str, Any], spared: set[str]
) -> None:
    """No bias, norm, embedding, class token, nor a table of positions' biases."""
    encoder = build_backbone(backbone_config(description))
    tables = {n for n, p in encoder.named_parameters() if p.ndim >= 2} - matrices(encoder)
    assert spared <= tables
    assert decaying(encoder) == matrices(encoder)


def test_the_time_embedding_of_the_denoiser_does_not_decay() -> None:
    denoiser = Denoiser(dim=6, condition_dim=5, hidden=12, time_dim=4)
    assert decaying(denoiser) == {f"layer{i}.weight" for i in (1, 2, 3, 4)}
    assert decaying(denoiser.time) == set()


def test_decay_shrinks_weights_and_leaves_biases() -> None:
    layer = nn.Linear(3, 2)
    weight, bias = (p.detach().clone() for p in layer.parameters())
    learner = Learner([(layer, 0.1)], weight_decay=0.5, total=10, warmup=0.0)
    learner.step(0 * layer(torch.ones(1, 3)).sum())
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias.detach(), bias)


def test_each_part_learns_with_its_own_rate() -> None:
    slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)
    before = [p.detach().clone() for p in (slow.weight, fast.weight)]
    learner = Learner([(slow, 0.0), (fast, 0.1)], 0.0, total=10, warmup=0.0)
    learner.step((slow(torch.ones(1, 1)) + fast(torch.ones(1, 1))).sum())
    assert torch.equal(slow.weight.detach(), before[0])
    torch.testing.assert_close((fast.weight.detach() - before[1]).abs(), torch.tensor([[0.1]]))


# --- the best weights


def make_learner() -> tuple[nn.Linear, Learner]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, Learner([(model, 0.1)], weight_decay=0.01, total=8)


def go(model: nn.Linear, learner: Learner, scores: list[float]) -> list[Tensor]:
    """One step and one look for each score; the weights after each."""
    weights = []
    for score in scores:
        learner.step((model(torch.ones(4, 3)) - 1).square().sum())
        learner.consider(score)
        weights.append(model.weight.detach().clone())
    return weights


def test_the_best_weights_are_kept_and_of_equals_the_first() -> None:
    model, learner = make_learner()
    weights = go(model, learner, [0.1, 0.7, 0.3, 0.7])
    assert torch.equal(model.weight, weights[3])
    learner.take_best()
    assert torch.equal(model.weight, weights[1])
    assert learner.score == 0.7


def test_weights_that_were_never_judged_stay() -> None:
    model, learner = make_learner()
    learner.step(model(torch.ones(4, 3)).square().sum())
    before = model.weight.detach().clone()
    learner.take_best()
    assert torch.equal(model.weight, before)
    assert learner.score == -math.inf


@pytest.mark.parametrize("scores", [[0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
def test_a_learner_goes_on_as_if_it_had_not_stopped(scores: list[float]) -> None:
    """Weights, moments and rate, and the best weights: from before the stop or after it."""
    straight, learner = make_learner()
    go(straight, learner, scores)
    best = learner
    stopped, learner = make_learner()
    go(stopped, learner, scores[:3])
    state = {name: value.clone() for name, value in learner.state().items()}
    resumed, learner = make_learner()
    learner.load_state(state | {"random.generator": torch.zeros(3)})
    go(resumed, learner, scores[3:])
    assert torch.equal(resumed.weight, straight.weight)
    best.take_best()
    learner.take_best()
    assert torch.equal(resumed.weight, straight.weight)
    assert learner.score == best.score == max(scores)


def test_a_learner_that_judged_nothing_yet_goes_on_without_a_best() -> None:
    _, learner = make_learner()
    state = learner.state()
    model, fresh = make_learner()
    fresh.load_state(state)
    assert (fresh.score, fresh.best) == (-math.inf, {})
    weights = go(model, fresh, [-1e9])
    fresh.take_best()
    assert torch.equal(model.weight, weights[0])


@pytest.mark.parametrize(
    ("patience", "scores", "done"),
    [
        (None, [0.5, 0.1, 0.1, 0.1], [False] * 4),
        (2, [0.5, 0.1, 0.5, 0.6], [False, False, True, False]),
        (1, [0.1, 0.2, 0.2], [False, False, True]),
    ],
)
def test_a_learner_is_done_when_nothing_better_came_for_so_many_scores(
    patience: int | None, scores: list[float], done: list[bool]
) -> None:
    learner = Learner([(nn.Linear(1, 1), 0.1)], 0.0, total=8, patience=patience)
    found = []
    for score in scores:
        learner.consider(score)
        found.append(learner.is_done)
        state = learner.state()
        learner = Learner([(nn.Linear(1, 1), 0.1)], 0.0, total=8, patience=patience)
        learner.load_state(state)
        assert learner.is_done == found[-1]  # a training that goes on remembers
    assert found == done


# --- gradients


@pytest.mark.parametrize(("scale", "clipped"), [(1e-3, False), (1e3, True)])
def test_gradients_above_the_norm_are_scaled_down_to_it_together(
    scale: float, clipped: bool
) -> None:
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    learner = Learner([(slow, 0.0), (fast, 0.1)], 0.0, total=8, clip_norm=1.0)
    loss = scale * (slow(torch.ones(4, 3)) + 2 * fast(torch.ones(4, 3))).sum()
    expected = [g.clone() for g in torch.autograd.grad(loss, list(learner.modules.parameters()))]
    norm = torch.cat([g.flatten() for g in expected]).norm()
    learner.step(scale * (slow(torch.ones(4, 3)) + 2 * fast(torch.ones(4, 3))).sum())
    assert (float(norm) > 1) == clipped
    for gradient, parameter in zip(expected, learner.modules.parameters(), strict=True):
        assert parameter.grad is not None
        scaled = gradient / norm if clipped else gradient
        torch.testing.assert_close(parameter.grad, scaled, rtol=FLOAT32_LAYER, atol=0)


class Pair(nn.Module):
    """Two layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.sound, self.odd = nn.Linear(3, 2), nn.Linear(3, 2)


def diverge(work: Callable[[Pair, Learner], object]) -> tuple[str, bool]:
    """What a learner says when a step fails, and whether the weights are as they were."""
    torch.manual_seed(0)
    model = Pair()
    learner = Learner([(model, 0.1)], 0.01, total=8, title="alignment")
    learner.step(sum(p.square().sum() for p in model.parameters()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError) as raised:
        work(model, learner)
    after = model.state_dict()
    return str(raised.value), all(torch.equal(after[n], v) for n, v in before.items())


def test_a_loss_that_is_not_finite_ends_the_training_with_its_place() -> None:
    told, same = diverge(lambda model, learner: learner.step(model.odd.weight.sum() * math.inf))
    assert same
    assert told.startswith("alignment, step 2 of 8: the loss became ")
    assert "(all weights are finite); lower the learning rates" in told
    assert "clip_norm = 1.0, and train with --restart" in told


def test_a_gradient_that_is_not_finite_ends_the_training_with_its_place() -> None:
    """The square root of 0 has an infinite slope."""

    def work(model: Pair, learner: Learner) -> None:
        learner.step(model.sound.weight.sum() + (0 * model.odd.bias).square().sum().sqrt())

    told, same = diverge(work)
    assert same
    assert "alignment, step 2 of 8: the loss was " in told
    assert "but its gradient is not finite" in told
    assert "NaN or infinite gradients: 1 of 4 tensors, such as odd.bias)" in told


def test_weights_that_are_not_finite_are_named() -> None:
    def work(model: Pair, learner: Learner) -> None:
        with torch.no_grad():
            model.odd.weight[0, 0] = math.nan
        learner.step(model.odd(torch.ones(1, 3)).sum())

    told, _ = diverge(work)
    assert (
        "the loss became nan (NaN or infinite weights: 1 of 4 tensors, such as odd.weight)" in told
    )

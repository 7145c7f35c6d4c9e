"""TEAM: scores and losses by hand or of a slow twin in float64, and trainings with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import TINY, change, make_ready
from tolerances import BF16_LAYER, FLOAT32_TWICE, FLOAT64, SIGMAS
from torch import Tensor, nn

from marnet_sdk.errors import RecipeError
from marnet_sdk.files import sha256_file
from marnet_train import progress
from marnet_train.assemble import Prepared
from marnet_train.checkpoint import load_checkpoint
from marnet_train.losses import alignment, ita_loss
from marnet_train.losses.alignment import Alignment, Pairs
from marnet_train.losses.team import BLOCKS, Team, Tokens, hard_negatives
from marnet_train.models.marnet import MARNet
from marnet_train.phases import Training, make_target, train_alignment
from marnet_train.progress import METRICS, Progress
from marnet_train.recipe import Recipe
from marnet_train.stages import encoded
from marnet_train.trainer import fit

Floats = np.ndarray[Any, np.dtype[np.float64]]
RECIPE = change(TINY, alignment={"loss": "team", "ita_weight": 1.0})


def make_tokens(count: int = 3, text_width: int = 12, image_width: int = 8) -> Tokens:
    """Texts of 4, 3 and 2 tokens, and again, beside images of 5."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(4) < 4 - torch.arange(count)[:, None] % 3
    return Tokens(normal(count, 5, image_width), normal(count, 4, text_width), mask.long())


def make_team(text_width: int = 12, image_width: int = 8) -> Team:
    """Without dropout, and with biases and norms that do something."""
    torch.manual_seed(0)
    team = Team(text_width, image_width).double().eval()
    with torch.no_grad():
        for parameter in team.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return team


# --- by hand


def test_scores_that_say_nothing_cost_the_logarithm_of_three_in_each_block() -> None:
    team, tokens = make_team(), make_tokens()
    for layer in (team.answer, team.question):
        nn.init.zeros_(layer.weight)
    found = team(tokens, torch.zeros(3, 3), torch.arange(3))
    assert found.item() == pytest.approx(BLOCKS * math.log(3), abs=FLOAT64)


@torch.no_grad()
def make_copier() -> Team:
    """Each token finds the mean of its image's tokens, once more in each block, of width 2."""
    team = Team(2, 2).double().eval()
    for parameter in team.parameters():
        parameter.zero_()
    for block in team.blocks:
        parts: Any = block
        parts.ask.in_proj_weight[4:] = torch.eye(2)
        parts.ask.out_proj.weight.copy_(torch.eye(2))
    for layer in (team.answer, team.question):
        layer.weight[:2] = torch.eye(2)
    return team


@pytest.mark.parametrize(("log_scale", "scale"), [(0.0, 1), (math.log(3), 3), (9.0, 100)])
def test_an_image_that_holds_the_words_of_its_text_scores_best(
    log_scale: float, scale: int
) -> None:
    """Two pairs at right angles: a pair has the score 1, both of its negatives have 0."""
    team, axes = make_copier(), torch.eye(2, dtype=torch.float64)[:, None]
    nn.init.constant_(team.log_scale, log_scale)
    tokens = Tokens(axes.repeat(1, 3, 1), axes, torch.ones(2, 1))
    torch.testing.assert_close(team.scores(tokens), torch.ones(BLOCKS, 2).double())
    found = team(tokens, torch.zeros(2, 2), torch.arange(2))
    assert found.item() == pytest.approx(BLOCKS * math.log(1 + 2 * math.exp(-scale)), abs=FLOAT64)


def test_the_score_is_the_mean_over_the_tokens_of_the_text() -> None:
    """The text has a token that the image holds, one at right angles to it, and padding."""
    images, texts = torch.tensor([[[1.0, 0]]]), torch.tensor([[[2.0, 0], [0, 5], [3, 0]]])
    tokens = Tokens(images, texts, torch.tensor([[1, 1, 0]])).to(torch.float64)
    torch.testing.assert_close(make_copier().scores(tokens), torch.full((BLOCKS, 1), 0.5).double())


def test_the_scale_begins_at_a_temperature_of_0_07() -> None:
    assert Team(4, 4).log_scale.exp().item() == pytest.approx(1 / 0.07, rel=FLOAT32_TWICE)


# --- a slow twin, of one text without its padding


def linear(x: Floats, weight: Tensor, bias: Tensor) -> Floats:
    return x @ weight.detach().numpy().T + bias.detach().numpy()


def norm(layer: Any, x: Floats) -> Floats:
    centred = x - x.mean(axis=1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + layer.eps)
    return unit * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def attend(layer: Any, queries: Floats, keys: Floats, values: Floats) -> Floats:
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    inputs, biases = (queries, keys, values), layer.in_proj_bias.chunk(3)
    q, k, v = (linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    wide, heads = q.shape[1] // layer.num_heads, []
    for start in range(0, q.shape[1], wide):
        part = slice(start, start + wide)
        shares = np.exp(q[:, part] @ k[:, part].T / math.sqrt(wide))
        heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(heads, axis=1), layer.out_proj.weight, layer.out_proj.bias)


def slow_scores(team: Team, image: Tensor, text: Tensor, mask: Tensor) -> list[float]:
    """The score of one pair behind each block."""
    s, v = text[mask == 1].numpy(), image.numpy()
    found, scores = np.zeros_like(s), []
    for block in team.blocks:
        parts: Any = block
        values = norm(parts.norms[0], found)
        found = found + attend(parts.compare, s + values, s + values, values)
        found = found + attend(parts.ask, s + norm(parts.norms[1], found), v, v)
        first, last = parts.widen[0], parts.widen[3]
        x = linear(norm(parts.norms[2], found), first.weight, first.bias)
        gelu = x * np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(x)
        found = found + linear(gelu, last.weight, last.bias)
        answers = linear(found, team.answer.weight, team.answer.bias)
        questions = linear(s, team.question.weight, team.question.bias)
        lengths = np.linalg.norm(answers, axis=1) * np.linalg.norm(questions, axis=1)
        scores.append(float(((answers * questions).sum(axis=1) / lengths).mean()))
    return scores


@pytest.mark.parametrize("widths", [(12, 8), (12, 12), (128, 6)])
def test_scores_are_those_of_loops_over_single_pairs(widths: tuple[int, int]) -> None:
    """Of one head and of two, for image tokens of the same and of another width."""
    team, tokens = make_team(*widths), make_tokens(4, *widths)
    found = team.scores(tokens).T.tolist()
    for row, *pair in zip(found, tokens.images, tokens.texts, tokens.mask, strict=True):
        assert row == pytest.approx(slow_scores(team, *pair), abs=FLOAT64)


def slow_loss(team: Team, tokens: Tokens) -> float:
    """The loss of two pairs, each the only negative of the other."""
    losses, scale = [], float(team.log_scale.detach().exp())
    for i, j in ((0, 1), (1, 0)):
        three = [
            slow_scores(team, tokens.images[v], tokens.texts[s], tokens.mask[s])
            for v, s in ((i, i), (j, i), (i, j))
        ]
        for scores in zip(*three, strict=True):
            shares = [math.exp(scale * score) for score in scores]
            losses.append(-math.log(shares[0] / sum(shares)))
    return sum(losses) / 2


def make_pairs(tokens: Tokens, groups: Sequence[int]) -> Pairs:
    generator, count = torch.Generator().manual_seed(1), len(groups)

    def normal(width: int) -> Tensor:
        return torch.randn(count, width, generator=generator, dtype=torch.float64)

    return Pairs(
        normal(4),
        normal(4),
        normal(3),
        normal(3),
        torch.zeros(count, dtype=torch.long),
        torch.tensor(groups),
        torch.tensor(0.5),
        0.0,
        tokens,
    )


def make_loss() -> Alignment:
    loss = Alignment("team", 4, (12, 8)).double().eval()
    loss.team = make_team()
    nn.init.constant_(loss.team.log_scale, math.log(4))
    return loss


def test_the_loss_is_that_of_loops_and_the_mean_of_both_directions_of_ita() -> None:
    loss, pairs = make_loss(), make_pairs(make_tokens(2), (0, 1))
    assert loss.team is not None
    assert pairs.tokens is not None
    whole = ita_loss(pairs.visual, pairs.semantic, 0.5).item() / 2
    expected = whole + slow_loss(loss.team, pairs.tokens)
    assert loss(pairs).item() == pytest.approx(expected, abs=FLOAT64)


def test_a_batch_of_one_text_has_no_negative_and_no_loss() -> None:
    loss, pairs = make_loss(), make_pairs(make_tokens(3), (7, 7, 7))
    found = loss(pairs)
    assert found.item() == 0
    found.backward()
    for parameter in loss.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_tokens_of_images_and_of_texts_get_a_gradient_and_padding_gets_none() -> None:
    tokens = make_tokens(3)
    tokens.images.requires_grad_()
    tokens.texts.requires_grad_()
    make_loss()(make_pairs(tokens, (0, 1, 2))).backward()
    assert tokens.images.grad is not None
    assert tokens.texts.grad is not None
    assert tokens.images.grad.any(dim=2).all()
    assert torch.equal(tokens.texts.grad.any(dim=2), tokens.mask == 1)


def test_tokens_in_16_bits_are_read_in_float32() -> None:
    loss, pairs = make_loss().float(), make_pairs(make_tokens(2), (0, 1))
    assert pairs.tokens is not None
    halves = {n: getattr(pairs, n).bfloat16() for n in ("visual", "semantic")}
    found = loss(replace(pairs, tokens=pairs.tokens.to(torch.bfloat16), **halves))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss.double()(pairs).item(), rel=BF16_LAYER)


# --- negatives


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.integers(0, 1000))
def test_a_negative_has_another_text(groups: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    same = torch.tensor(groups)
    found = hard_negatives(80 * torch.randn(len(groups), len(groups)), same[:, None] != same)
    assert found.min() >= 0
    assert found.max() < len(groups)
    if len(set(groups)) > 1:
        assert (same[found] != same).all()


def test_negatives_are_drawn_in_proportion_to_the_softmax_of_the_similarities() -> None:
    torch.manual_seed(0)
    count = 4000
    similar = torch.tensor([9.0, 0.0, math.log(3)]).repeat(count, 1)
    others = torch.tensor([False, True, True]).repeat(count, 1)
    share = (hard_negatives(similar, others) == 2).double().mean().item()
    assert abs(share - 0.75) < SIGMAS * math.sqrt(0.75 * 0.25 / count)


# --- in a training


def align(
    digits: Path, recipe: Recipe, begin: Callable[[MARNet], None] = lambda model: None
) -> tuple[Prepared, list[float]]:
    """Phase A of a model that `begin` may change, and its loss by epoch."""
    ready, run = make_ready(digits, recipe), Progress()
    begin(ready.model)
    target = make_target(ready.model, ready.data, recipe, seed=0)
    source = encoded(ready.model.vision, ready.data, recipe)
    train_alignment(ready.model, ready.data, source, target, Training(recipe, 0, run))
    return ready, [line["loss"] for line in run.record.log]


@pytest.mark.parametrize("lr_text", [0.0, 1e-2], ids=["frozen text", "learning text"])
def test_a_training_of_moments_lowers_the_loss(lr_text: float, digits: Path) -> None:
    settings = {"epochs": 4, "ce_weight": 0.0, "lr_text": lr_text}
    ready, losses = align(digits, change(RECIPE, alignment=settings))
    assert losses[-1] < 0.9 * losses[0]
    for encoder in (ready.model.vision, ready.model.text):
        assert not encoder.backbone._forward_hooks


def test_the_tokens_alone_move_both_encoders(digits: Path) -> None:
    """Nothing else has a gradient: projections are 0, and nothing weighs but the alignment."""
    alone = {"epochs": 1, "ce_weight": 0.0, "weight_decay": 0.0, "lr_text": 1e-2, "lr_heads": 0.0}
    before: dict[str, Tensor] = {}

    def without_projections(model: MARNet) -> None:
        for layer in (model.project_vision, model.project_text):
            nn.init.zeros_(layer.weight)
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    ready, _ = align(digits, change(RECIPE, alignment=alone), without_projections)
    parameters = dict(ready.model.named_parameters())
    moved = {name.split(".")[0] for name, p in parameters.items() if not p.equal(before[name])}
    assert moved == {"vision", "text"}


@pytest.mark.parametrize("lr_text", [0.0, 1e-9], ids=["frozen text", "learning text"])
def test_tokens_are_those_of_the_images_and_texts_of_the_batch(
    lr_text: float, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled as x_v and x_s are, they give x_v' and x_s'."""
    seen: list[Pairs] = []

    def spy(_: Alignment, pairs: Pairs) -> Tensor:
        seen.append(pairs)
        return pairs.visual.sum() * 0

    monkeypatch.setitem(alignment._LOSSES, "team", spy)
    still = {"epochs": 1, "batch": 10**6, "lr_heads": 0.0, "lr_backbone": 1e-9, "lr_text": lr_text}
    recipe = replace(change(RECIPE, alignment=still), text=TINY.text | {
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0
    })  # fmt: skip
    model = align(digits, recipe)[0].model
    (pairs,) = seen
    assert pairs.tokens is not None
    assert pairs.groups is not None
    with torch.no_grad():
        visual = model.align_vision(pairs.tokens.images.mean(dim=1))
        mask = pairs.tokens.mask[:, :, None]
        x_s = (pairs.tokens.texts * mask).sum(dim=1) / mask.sum(dim=1)
        semantic = model.align_text(x_s)
    for found, expected in ((visual, pairs.visual), (semantic, pairs.semantic)):
        torch.testing.assert_close(found, expected.detach(), rtol=FLOAT32_TWICE, atol=FLOAT32_TWICE)


def test_a_checkpoint_has_nothing_of_team_and_an_interruption_changes_nothing(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the third of three epochs of phase A, before it could be saved."""
    short = {"epochs": 1}
    recipe = change(RECIPE, alignment={"epochs": 3}, refinement=short, fusion_phase=short)
    monkeypatch.setattr(progress, "SAVING_SHARE", math.inf)  # save after each epoch
    fit(few_digits, recipe, tmp_path / "undisturbed", threads=1)
    log, out = Progress.log, tmp_path / "out"

    def log_or_stop(self: Progress, **line: Any) -> None:
        log(self, **line)
        if (line["phase"], line["epoch"]) == ("alignment", 3):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "log", log_or_stop)
        with pytest.raises(KeyboardInterrupt):
            fit(few_digits, recipe, out, threads=1)
    saved = load_file(tmp_path / "out.partial" / progress.EPOCH)
    assert any(".team.blocks." in name for name in saved)
    training = fit(few_digits, recipe, out, threads=1)
    assert training["settings"]["alignment"]["loss"] == "team"
    for name in ("model.safetensors", METRICS):
        assert sha256_file(out / name) == sha256_file(tmp_path / "undisturbed" / name), name
    kept = set(load_file(out / "model.safetensors"))
    assert kept == set(load_checkpoint(out).model.state_dict())
    assert not any("team" in name for name in kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": {"lr_backbone": 0.0}}, r"\(lr_backbone = 0\) .* set lr_backbone above 0"),
        *(
            ({"semantics": kind}, rf'semantics = "{kind}" replaces .*: set semantics = "text"')
            for kind in ("labels", "random", "shuffled")
        ),
    ],
)
def test_a_training_without_tokens_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        change(RECIPE, **settings)

"""The rows of a table: every way to classify that a training gives, or that is trained on from it.

    baseline, alignment, semantic learner, +MLP, refined, MARNet    the training's own branches
    refined or MARNet, S steps, K = k; MARNet, ddim S steps, ...    its other reverse processes
    +MLP on the baseline, +CDR on the baseline                      phase B on its encoder
    CE alone, CE alone on the baseline, CE alone, fused             the same networks without a text
    refined, gamma = ...; refined, t ...                            phase B with other settings
    fusion with +MLP                                                one pass in place of the loop
    fusion: add, feature; ...                                       phase C with other fusions
    blur 1: MARNet; ...                                             damaged test images

Axes: N images, C classes, K noise samples, D_v, D_s, D widths of x_v, x_s, x_EMA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marnet_sdk.console import track
from marnet_sdk.errors import RecipeError
from marnet_train.data.examples import DataSet
from marnet_train.data.pixels import decode_example
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import Labelled, behind, head_probabilities, sample_probabilities
from marnet_train.heads import Ends, draw_ends, score, train_fusion, train_refined_head
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.fusion import FUSION_LEVELS, FUSIONS
from marnet_train.models.marnet import MARNet
from marnet_train.models.seda import SeDA
from marnet_train.refinement import Refiner, refiner_probabilities, train_refinement
from marnet_train.tables.answers import Row, row_of
from marnet_train.tables.corruptions import KINDS, STRENGTHS, corrupt
from marnet_train.tables.subject import (
    DRAWS,
    Side,
    Subject,
    branch_answers,
    one_pass_probabilities,
    spread,
    trained_chains,
    variant,
    with_fusion,
)

STEPS = (1, 2, 5, 10, 100)  # of the trained sampler's chain; those beyond T are left out
OTHER_STEPS = (1, 2, 5, 10, 20)  # of the other samplers'

Rows = dict[str, Row]


# --- the training's own branches, and other reverse processes with the same weights


def branch_rows(s: Subject) -> Rows:
    """Make the rows of the training's own report."""
    return {name: s.row(samples) for name, samples in s.answers.items()}


def point_rows(s: Subject) -> Rows:
    """Make the rows of other reverse processes with the same weights."""
    rows, schedule = Rows(), s.model.config.schedule
    for count in [n for n in STEPS if n < schedule.steps] + [schedule.steps]:
        drawn = s.answers["refined"], s.answers["MARNet"]
        if count < schedule.steps:
            drawn = _drawn(s, "ddpm", count)
        for name, samples in zip(("refined", "MARNet"), drawn, strict=True):
            rows |= _sampled(s, f"{name}, {count} steps", samples)
    for sampler in ("ddim", "dpmpp"):
        for count in (n for n in OTHER_STEPS if n <= schedule.steps):
            rows |= _sampled(s, f"MARNet, {sampler} {count} steps", _drawn(s, sampler, count)[1])
    return rows


def _drawn(s: Subject, sampler: str, count: int) -> tuple[Tensor, Tensor]:
    table = sampler_table(s.model.config.schedule, sampler, count)
    return sample_probabilities(s.model, s.test.x_v, table, 0, DRAWS)


def _sampled(s: Subject, name: str, samples: Tensor) -> Rows:
    """Make the rows of one noise sample and of the mean of `DRAWS`, from [K, N, C]."""
    samples = samples[:DRAWS]
    mean = samples.mean(dim=0)
    votes = (samples.argmax(dim=2) == mean.argmax(dim=1)).double().mean(dim=0)  # for its answer
    many = row_of([mean], s.labels, votes.cpu().numpy())
    return {f"{name}, K = 1": row_of([*samples], s.labels), f"{name}, K = {DRAWS}": many}


# --- phase B once more


@dataclass(frozen=True)
class Again:
    """This is phase B once more, with other weights of its loss or on the baseline's encoder."""

    one_pass: bool = False  # "+MLP" and "CE alone", not the diffusion
    norm_weight: float | None = None  # gamma; None: the recipe's. 0: cross-entropy alone
    pure_noise: float | None = None  # share of the rows at t = T; None: the recipe's

    def settings(self) -> dict[str, float]:
        """Return what it changes in the recipe's phase B."""
        given = {"norm_weight": self.norm_weight, "pure_noise": self.pure_noise}
        return {name: value for name, value in given.items() if value is not None}


def agains(width: int) -> tuple[dict[str, Again], dict[str, Again]]:
    """List phase B once more: on the model's encoder, and on the baseline's.

    Args:
        width: of x_s, D_s.
    """
    alone = Again(one_pass=True, norm_weight=0.0)
    own = {
        "CE alone": alone,
        "refined, gamma = 1": Again(norm_weight=1.0),
        "refined, gamma = 1 / D": Again(norm_weight=1 / width),
        "refined, t uniform": Again(pure_noise=0.0),
        "refined, half of the rows at t = T": Again(pure_noise=0.5),
    }
    on_baseline = {
        "CE alone, on the baseline": alone,
        "+MLP on the baseline": Again(one_pass=True),
        "+CDR on the baseline": Again(),
    }
    return own, on_baseline


def again_rows(s: Subject, name: str, again: Again, *, on_baseline: bool) -> Rows:
    """Train phase B once more and measure its branch alone, as "+MLP" and "refined" are measured.

    "CE alone" is the network without a text: the capacity of the whole. On the baseline its row
    "CE alone, fused" classifies with both branches, as MARNet does.
    """
    side = s.on_baseline if on_baseline else s.own
    condition = side.model.condition(side.features.x_v)
    training = replace(s.training, recipe=s.training.recipe.but(refinement=again.settings()))
    refiner, one_pass = copy.deepcopy(s.fresh), again.one_pass

    def look() -> float:
        found = refiner_probabilities(
            refiner, side.model, side.val.x_v, training.seed, one_pass=one_pass
        )
        return score(found, side.val.labels)

    train_refinement(
        refiner, condition, side.features, training, name, look=look, one_pass=one_pass
    )
    model = variant(side.model, denoiser=refiner.denoiser, semantic_classifier=refiner.classifier)
    if one_pass:
        rows = {name: s.row(one_pass_probabilities(model, refiner, side.test)[None])}
        if on_baseline and again.norm_weight == 0:
            rows["CE alone, fused"] = _fused_one_pass(s, side, refiner, "CE alone, fused")
        return rows
    ends = draw_ends(model, side.features, side.val, training)
    train_refined_head(model, ends, training, f"head of {name}")
    refined, _ = head_probabilities(model, side.test.x_v, trained_chains(model, side.test))
    return {name: s.row(refined)}


def baseline_groups(s: Subject) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield phase B on the baseline's encoder.

    SeDA's condition holds a vector of a stage that was trained on another encoder, so its rows of
    this kind are those of the peer without that stage.
    """
    if isinstance(s.model, SeDA):
        return
    for name, again in agains(s.model.latent_width)[1].items():
        yield name, partial(again_rows, s, name, again, on_baseline=True)


# --- other fusions


def _fused_one_pass(s: Subject, side: Side, refiner: Refiner, title: str) -> Row:
    """Train a concat head on x_EMA and one pass of a network, and measure it."""
    model = variant(side.model, semantic_classifier=refiner.classifier)
    model = with_fusion(model, "concat", "feature", s.training.seed)
    with torch.no_grad():
        estimate, judged, test = (
            refiner.eval().one_pass(model.condition(x.x_v))
            for x in (side.features, side.val, side.test)
        )
    ends = Ends(side.features.x_v, estimate, side.features.labels, side.val, [judged])
    train_fusion(model, ends, s.training, title)
    with torch.no_grad():
        return s.row(model.head(side.test.x_v, test)[0].softmax(dim=1)[None])


def fused_mlp_rows(s: Subject) -> Rows:
    """Make the row of a whole in which "+MLP" takes the place of the loop."""
    name = "fusion with +MLP"
    return {name: _fused_one_pass(s, s.own, copy.deepcopy(s.trained.mlp), name)}


def fusion_rows(s: Subject, name: str, model: MARNet) -> Rows:
    """Train phase C with another fusion, of the same ends of chains."""
    train_fusion(model, s.ends, s.training, name)
    return {name: s.row(head_probabilities(model, s.test.x_v, s.refined)[1])}


def other_fusions(s: Subject) -> tuple[dict[str, MARNet], dict[str, str]]:
    """Return a model for every other fusion, and why some cannot be, by the name of the row."""
    found, left_out = {}, {}
    for level in FUSION_LEVELS:
        for fusion in FUSIONS:
            if (fusion, level) == (s.model.config.fusion, s.model.config.fusion_level):
                continue  # the row "MARNet"
            name = f"fusion: {fusion}, {level}"
            try:
                found[name] = with_fusion(s.model, fusion, level, s.training.seed)
            except RecipeError as error:
                left_out[name] = str(error)
    return found, left_out


# --- damaged images


@torch.no_grad()
def damaged_rows(s: Subject, folder: DataSet, count: int, kind: str, strength: int) -> Rows:
    """Make the rows of `count` test images, damaged in one way."""
    examples, chosen = folder.splits["test"], spread(len(s.labels), count)
    labels = s.labels[chosen.to(s.labels.device)]
    pixels = np.stack(
        [
            s.ready.preprocess(corrupt(decode_example(examples[i]), kind, strength, i))
            for i in track(chosen.tolist(), f"{kind} {strength}")
        ]
    )
    model, baseline = s.model, s.trained.baseline
    seen, base = (Labelled(_features(m.vision, pixels), labels) for m in (model, baseline))
    whole = behind(model, seen)
    x_cdr = trained_chains(model, whole, draws=1)
    found = branch_answers(model, whole, x_cdr, mlp=s.trained.mlp, baseline=(baseline, base))
    return {
        f"{kind} {strength}: {name}": row_of([samples.mean(dim=0)], labels)
        for name, samples in found.items()
    }


def _features(vision: VisionEncoder, pixels: NDArray[np.float32]) -> Tensor:
    vision.eval()
    device = next(vision.parameters()).device
    return torch.cat([vision(x.to(device)) for x in torch.from_numpy(pixels).split(64)])


# --- all of them


def groups(
    s: Subject, folder: DataSet, *, damaged: int, fusions: dict[str, MARNet]
) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield the rows of a training in groups that are done at once: a name, and what makes them."""
    yield "branches", partial(branch_rows, s)
    yield "operating points", partial(point_rows, s)
    for name, again in agains(s.model.latent_width)[0].items():
        yield name, partial(again_rows, s, name, again, on_baseline=False)
    yield from baseline_groups(s)
    yield "fusion with +MLP", partial(fused_mlp_rows, s)
    for name, model in fusions.items():
        yield name, partial(fusion_rows, s, name, model)
    if damaged:
        for kind in KINDS:
            for strength in STRENGTHS:
                work = partial(damaged_rows, s, folder, damaged, kind, strength)
                yield f"{kind} {strength}", work

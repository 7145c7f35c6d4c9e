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
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_sdk.console import track
from marnet_sdk.errors import RecipeError
from marnet_train.assemble import Prepared
from marnet_train.data.examples import DataSet
from marnet_train.data.pixels import decode_example
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import Labelled, behind, sample_probabilities
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.fusion import FUSION_LEVELS, FUSIONS
from marnet_train.models.marnet import ImageBranch, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.phases import Features, Refiner, make_features, make_target, train_refinement
from marnet_train.progress import Progress
from marnet_train.recipe import Recipe
from marnet_train.stages import (
    Ends,
    Trained,
    draw_ends,
    encoded,
    refiner_probabilities,
    score,
    train_fusion,
    train_refined_head,
    with_mistakes,
)
from marnet_train.tables.answers import Row, row_of
from marnet_train.tables.corruptions import KINDS, STRENGTHS, corrupt

STEPS = (1, 2, 5, 10, 100)  # of the trained sampler's chain; those beyond T are left out
OTHER_STEPS = (1, 2, 5, 10, 20)  # of the other samplers'
DRAWS = 8  # noise samples of every chain; K = 1 is the mean accuracy of all of them

Rows = dict[str, Row]


@dataclass(frozen=True, eq=False)
class Side:
    """This is what phase B learns on: the model, or one with the baseline's encoder."""

    model: MARNet
    features: Features
    val: Labelled
    test: Labelled


@dataclass(frozen=True, eq=False)
class Subject:
    """This is a finished training that is measured, and what it began from."""

    ready: Prepared
    trained: Trained
    fresh: Refiner  # as it was before the training
    seed: int
    run: Progress

    @property
    def model(self) -> MARNet:
        """Return what was trained."""
        return self.trained.model

    @property
    def recipe(self) -> Recipe:
        """Return its recipe, with numbers in place of "auto"."""
        return self.trained.recipe

    @property
    def labels(self) -> Tensor:
        """Return the classes of the test images, [N]."""
        return self.ready.splits["test"].labels

    @cached_property
    def own(self) -> Side:
        """Return the model with its features."""
        return self._side(self.model)

    @cached_property
    def on_baseline(self) -> Side:
        """Return a copy that stands on the baseline's encoder, projection and classifier."""
        baseline = self.trained.baseline
        names = ("vision", "project_vision", "alignment_classifier")
        return self._side(variant(self.model, **{name: getattr(baseline, name) for name in names}))

    def _side(self, model: MARNet) -> Side:
        ready, recipe = self.ready, self.recipe
        target = make_target(model, ready.data, recipe, self.seed)
        source = encoded(model.vision, ready.data, recipe)
        features = make_features(model, ready.data, source, target, recipe)
        if isinstance(model, SeDA):
            features = with_mistakes(model, features, recipe, self.seed)
        return Side(model, features, self.seen(model, "val"), self.seen(model, "test"))

    def seen(self, model: ImageBranch, split: str) -> Labelled:
        """Return what everything behind a model's encoder gets of a split."""
        return self.ready.splits[split].seen_whole(
            model, frozen=self.recipe.alignment.lr_backbone == 0
        )

    @cached_property
    def test(self) -> Labelled:
        """Return the test images as the model sees them."""
        return self.seen(self.model, "test")

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return probabilities of the refined branch and of the whole, [K, N, C] each."""
        table = sampler_table(self.recipe.schedule, "ddpm")
        draws = max(DRAWS, self.model.config.samples)
        return sample_probabilities(self.model, self.test.x_v, table, 0, draws)

    @cached_property
    def ends(self) -> Ends:
        """Return the ends of chains that phase C learned from."""
        side = self.own
        return draw_ends(side.model, side.features, side.val, self.recipe, self.seed)

    def row(self, *answers: Tensor) -> Row:
        """Make the row of one or more answers on the test images, [N, C] each."""
        return row_of(answers, self.labels)


def variant(model: MARNet, **parts: nn.Module) -> MARNet:
    """Return a model with some other parts; it shares the rest, and has statistics of its own."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other._buffers = {n: b if b is None else b.clone() for n, b in model._buffers.items()}
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def with_fusion(model: MARNet, fusion: str, level: str, seed: int) -> MARNet:
    """Return a model with another fusion, whose classifier is as at the start of a training.

    Raises:
        RecipeError: the widths of both branches do not fit this fusion.
    """
    config = replace(model.config, fusion=fusion, fusion_level=level)
    torch.manual_seed(seed)
    other = type(model)(config, model.vision.backbone, model.text.backbone).to(model.device)
    made = ("vision.", "text.", "classifier.", "aligned_", "refined_")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(made)}
    other.load_state_dict(state, strict=False)
    return other.eval()


# --- the training's own branches


@torch.no_grad()
def image_probabilities(model: ImageBranch, seen: Labelled) -> Tensor:
    """Compute the probabilities of the classifier on x_v' alone, [N, C]."""
    model.eval()
    return model.alignment_logits(seen.x_v).softmax(dim=1)


@torch.no_grad()
def one_pass_probabilities(model: MARNet, mlp: Refiner, seen: Labelled, recipe: Recipe) -> Tensor:
    """Compute the probabilities of "+MLP", [N, C]."""
    mlp.eval()
    return refiner_probabilities(mlp, model.condition(seen.x_v), recipe, 0, one_pass=True)


@torch.no_grad()
def branch_rows(s: Subject, *, with_baseline: bool) -> Rows:
    """Make the rows of the training's own report."""
    model, rows = s.model, Rows()
    if with_baseline:
        seen = s.seen(s.trained.baseline, "test")
        rows["baseline"] = s.row(image_probabilities(s.trained.baseline, seen))
    rows["alignment"] = s.row(image_probabilities(model, s.test))
    if isinstance(model, SeDA):
        logits = model.learner.classifier(s.test.x_v[:, model.vision.dim :])
        rows["semantic learner"] = s.row(logits.softmax(dim=1))
    rows["+MLP"] = s.row(one_pass_probabilities(model, s.trained.mlp, s.test, s.recipe))
    for name, samples in zip(("refined", "MARNet"), s.drawn, strict=True):
        rows[name] = s.row(*averaged(samples, model.config.samples))
    return rows


@torch.no_grad()
def point_rows(s: Subject) -> Rows:
    """Make the rows of other reverse processes with the same weights."""
    rows, schedule = Rows(), s.recipe.schedule
    for count in [n for n in STEPS if n < schedule.steps] + [schedule.steps]:
        drawn = s.drawn
        if count < schedule.steps:
            table = sampler_table(schedule, "ddpm", count)
            drawn = sample_probabilities(s.model, s.test.x_v, table, 0, DRAWS)
        for name, samples in zip(("refined", "MARNet"), drawn, strict=True):
            rows |= _sampled(s, f"{name}, {count} steps", samples)
    for sampler in ("ddim", "dpmpp"):
        for count in (n for n in OTHER_STEPS if n <= schedule.steps):
            table = sampler_table(schedule, sampler, count)
            drawn = sample_probabilities(s.model, s.test.x_v, table, 0, DRAWS)
            rows |= _sampled(s, f"MARNet, {sampler} {count} steps", drawn[1])
    return rows


def _sampled(s: Subject, name: str, samples: Tensor) -> Rows:
    """Make the rows of one noise sample and of the mean of `DRAWS`, from [K, N, C]."""
    samples = samples[:DRAWS]
    many = row_of([samples.mean(dim=0)], s.labels, _votes(samples))
    return {f"{name}, K = 1": s.row(*samples), f"{name}, K = {DRAWS}": many}


def averaged(samples: Tensor, count: int) -> list[Tensor]:
    """Average disjoint groups of `count` noise samples, from [K, N, C]: each is one answer."""
    return [group.mean(dim=0) for group in samples.split(count) if len(group) == count]


def _votes(samples: Tensor) -> NDArray:
    """Return the share of the samples [K, N, C] that vote for the answer of their mean, [N]."""
    answer = samples.mean(dim=0).argmax(dim=1)
    return (samples.argmax(dim=2) == answer).double().mean(dim=0).cpu().numpy()


# --- what is trained on from it


@dataclass(frozen=True)
class Again:
    """This is phase B once more, with other weights of its loss or on the baseline's encoder."""

    one_pass: bool = False  # "+MLP" and "CE alone", not the diffusion
    norm_weight: float | None = None  # gamma; None: the recipe's. 0: cross-entropy alone
    pure_noise: float | None = None  # share of the rows at t = T; None: the recipe's


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
    condition, judged = (side.model.condition(x) for x in (side.features.x_v, side.val.x_v))
    refiner, recipe = copy.deepcopy(s.fresh), _with(s.recipe, again)

    def look() -> float:
        found = refiner_probabilities(refiner, judged, recipe, s.seed, one_pass=again.one_pass)
        return score(found, side.val.labels)

    train_refinement(
        refiner,
        condition,
        side.features,
        recipe,
        s.seed,
        s.run,
        name,
        look=look,
        one_pass=again.one_pass,
    )
    model = variant(side.model, denoiser=refiner.denoiser, semantic_classifier=refiner.classifier)
    if again.one_pass:
        rows = {name: s.row(one_pass_probabilities(model, refiner, side.test, recipe))}
        if on_baseline and again.norm_weight == 0:
            rows["CE alone, fused"] = _fused_one_pass(s, side, refiner, "CE alone, fused")
        return rows
    ends = draw_ends(model, side.features, side.val, recipe, s.seed)
    train_refined_head(model, ends, recipe, s.seed, s.run, f"head of {name}")
    table = sampler_table(recipe.schedule, "ddpm")
    samples = max(DRAWS, model.config.samples)
    refined, _ = sample_probabilities(model, side.test.x_v, table, 0, samples)
    return {name: s.row(*averaged(refined, model.config.samples))}


def _with(recipe: Recipe, again: Again) -> Recipe:
    given = {"norm_weight": again.norm_weight, "pure_noise": again.pure_noise}
    settings = {name: value for name, value in given.items() if value is not None}
    return replace(recipe, refinement=replace(recipe.refinement, **settings))


@torch.no_grad()
def _one_pass_ends(side: Side, refiner: Refiner) -> Ends:
    """Make what phase C learns from where one pass takes the place of the loop."""
    refiner.eval()
    model, features = side.model, side.features
    estimate, judged = (refiner.one_pass(model.condition(x)) for x in (features.x_v, side.val.x_v))
    return Ends(features.x_v, estimate, features.labels, side.val, [judged])


def _fused_one_pass(s: Subject, side: Side, refiner: Refiner, title: str) -> Row:
    """Train a concat head on x_EMA and one pass of a network, and measure it."""
    model = with_fusion(
        variant(side.model, semantic_classifier=refiner.classifier), "concat", "feature", s.seed
    )
    train_fusion(model, _one_pass_ends(side, refiner), s.recipe, s.seed, s.run, title)
    with torch.no_grad():
        estimate = refiner.one_pass(model.condition(side.test.x_v))
        return s.row(model.head(side.test.x_v, estimate)[0].softmax(dim=1))


def fused_mlp_rows(s: Subject) -> Rows:
    """Make the row of a whole in which "+MLP" takes the place of the loop."""
    name = "fusion with +MLP"
    return {name: _fused_one_pass(s, s.own, copy.deepcopy(s.trained.mlp), name)}


def fusion_rows(s: Subject, name: str, model: MARNet) -> Rows:
    """Train phase C with another fusion, of the same ends of chains."""
    train_fusion(model, s.ends, s.recipe, s.seed, s.run, name)
    table = sampler_table(s.recipe.schedule, "ddpm")
    draws = max(DRAWS, s.model.config.samples)
    _, whole = sample_probabilities(model, s.test.x_v, table, 0, draws)
    return {name: s.row(*averaged(whole, s.model.config.samples))}


def other_fusions(s: Subject) -> tuple[dict[str, MARNet], dict[str, str]]:
    """Return a model for every other fusion, and why some cannot be, by the name of the row."""
    found, left_out = {}, {}
    for level in FUSION_LEVELS:
        for fusion in FUSIONS:
            if (fusion, level) == (s.model.config.fusion, s.model.config.fusion_level):
                continue  # the row "MARNet"
            try:
                found[f"fusion: {fusion}, {level}"] = with_fusion(s.model, fusion, level, s.seed)
            except RecipeError as error:
                left_out[f"fusion: {fusion}, {level}"] = str(error)
    return found, left_out


# --- damaged images


@torch.no_grad()
def damaged_rows(s: Subject, folder: DataSet, count: int, kind: str, strength: int) -> Rows:
    """Make the rows of the first `count` test images, damaged in one way."""
    examples, labels = folder.splits["test"][:count], s.labels[:count]
    pixels = np.stack(
        [
            s.ready.preprocess(corrupt(decode_example(example), kind, strength, i))
            for i, example in enumerate(track(examples, f"{kind} {strength}"))
        ]
    )
    model, baseline = s.model, s.trained.baseline
    seen = behind(model, Labelled(_features(model.vision, pixels), labels))
    base = Labelled(_features(baseline.vision, pixels), labels)
    table = sampler_table(s.recipe.schedule, "ddpm")
    refined, whole = sample_probabilities(model, seen.x_v, table, 0, model.config.samples)
    answers = {
        "baseline": image_probabilities(baseline, base),
        "alignment": image_probabilities(model, seen),
        "+MLP": one_pass_probabilities(model, s.trained.mlp, seen, s.recipe),
        "refined": refined.mean(dim=0),
        "MARNet": whole.mean(dim=0),
    }
    return {f"{kind} {strength}: {name}": row_of([p], labels) for name, p in answers.items()}


def _features(vision: VisionEncoder, pixels: NDArray[np.float32]) -> Tensor:
    vision.eval()
    device = next(vision.parameters()).device
    return torch.cat([vision(x.to(device)) for x in torch.from_numpy(pixels).split(64)])


# --- all of them


def groups(
    s: Subject, folder: DataSet, *, damaged: int, fusions: dict[str, MARNet]
) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield the rows of a training in groups that are done at once: a name, and what makes them."""
    yield "branches", partial(branch_rows, s, with_baseline=True)
    yield "operating points", partial(point_rows, s)
    own, _ = agains(s.model.latent_width)
    for name, again in own.items():
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


def baseline_groups(s: Subject) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield phase B on the baseline's encoder.

    SeDA's condition holds a vector of a stage that was trained on another encoder, so its rows of
    this kind are those of the peer without that stage.
    """
    if isinstance(s.model, SeDA):
        return
    for name, again in agains(s.model.latent_width)[1].items():
        yield name, partial(again_rows, s, name, again, on_baseline=True)

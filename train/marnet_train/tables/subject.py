"""A finished training that is measured: its features, its branches' answers, and variants of it.

Axes: N images, C classes, K noise samples, D_v, D_s, D widths of x_v, x_s, x_EMA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from marnet_train.assemble import Prepared
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import Labelled, behind, head_probabilities, refined_features
from marnet_train.heads import Ends, draw_ends
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.marnet import ImageBranch, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.phases import Features, Training, make_features, make_target
from marnet_train.refinement import Refiner
from marnet_train.semantic_learner import with_mistakes
from marnet_train.stages import Trained, encoded
from marnet_train.tables.answers import Row, row_of

DRAWS = 8  # noise samples of every chain; K = 1 is the mean accuracy of all of them

Answers = dict[str, Tensor]  # row -> probabilities, [K, N, C]; K = 1 where there is no noise


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
    training: Training  # with numbers in place of "auto"
    with_baseline: bool  # a baseline was trained beside it

    @property
    def model(self) -> MARNet:
        """Return what was trained."""
        return self.trained.model

    @property
    def labels(self) -> Tensor:
        """Return the classes of the test images, [N]."""
        return self.ready.splits["test"].labels

    @cached_property
    def own(self) -> Side:
        """Return the model with its features."""
        return self._side(self.model, self.trained.features)

    @cached_property
    def on_baseline(self) -> Side:
        """Return a copy that stands on the baseline's encoder, projection and classifier."""
        baseline = self.trained.baseline
        names = ("vision", "project_vision", "alignment_classifier")
        return self._side(variant(self.model, **{name: getattr(baseline, name) for name in names}))

    def _side(self, model: MARNet, features: Features | None = None) -> Side:
        """Return a model with its features; those of training images are made if none are given."""
        if features is None:
            data, recipe, seed = self.ready.data, self.training.recipe, self.training.seed
            target = make_target(model, data, recipe, seed)
            source = encoded(model.vision, data, recipe)
            features = make_features(model, data, source, target, recipe)
            if isinstance(model, SeDA):
                features = with_mistakes(model, features, recipe, seed)
        return Side(model, features, self.seen(model, "val"), self.seen(model, "test"))

    @cached_property
    def _encoded(self) -> Callable[[VisionEncoder, str], Labelled]:
        """Encode a split by an encoder; each pair of them is encoded once."""
        frozen = self.training.recipe.alignment.frozen
        return cache(lambda vision, split: self.ready.splits[split].seen_by(vision, frozen=frozen))

    def seen(self, model: ImageBranch, split: str) -> Labelled:
        """Return what everything behind a model's encoder gets of a split."""
        return behind(model, self._encoded(model.vision, split))

    @cached_property
    def test(self) -> Labelled:
        """Return the test images as the model sees them."""
        return self.seen(self.model, "test")

    @cached_property
    def refined(self) -> list[Tensor]:
        """Return x_CDR of the test images by the trained chain, [N, D_s] for each noise sample."""
        return trained_chains(self.model, self.test)

    @cached_property
    def answers(self) -> Answers:
        """Return the answers of every branch to the test images."""
        baseline = self.trained.baseline
        own = {"baseline": (baseline, self.seen(baseline, "test"))} if self.with_baseline else {}
        mlp = self.trained.mlp
        return branch_answers(self.model, self.test, self.refined, mlp=mlp, **own)

    @cached_property
    def ends(self) -> Ends:
        """Return the ends of chains that phase C learned from."""
        side = self.own
        return draw_ends(side.model, side.features, side.val, self.training)

    def row(self, samples: Tensor) -> Row:
        """Make a row of answers to the test images with the K that serves, from [K, N, C]."""
        return row_of(averaged(samples, self.model.config.samples), self.labels)


def spread(total: int, count: int) -> Tensor:
    """Choose at most `count` of `total` rows, evenly: where images are listed by class, the first
    ones are of a few classes.

    Returns:
        Row indices in order, int64 [min(count, total)].
    """
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def trained_chains(model: MARNet, seen: Labelled, draws: int = DRAWS) -> list[Tensor]:
    """Run the chains that a model was trained for: as many as `draws`, and as it serves.

    Returns:
        x_CDR, [N, D_s] for each noise sample.
    """
    table, count = sampler_table(model.config.schedule, "ddpm"), max(draws, model.config.samples)
    return [refined_features(model, seen.x_v, table, 0, sample) for sample in range(count)]


@torch.no_grad()
def branch_answers(
    model: MARNet,
    seen: Labelled,
    x_cdr: Sequence[Tensor],
    *,
    mlp: Refiner | None = None,
    baseline: tuple[ImageBranch, Labelled] | None = None,
) -> Answers:
    """Compute the probabilities of every branch by the name of its row.

    Args:
        seen: what everything behind the encoder gets. x_cdr: ends of its chains.
        mlp: "+MLP", where it was kept. baseline: the image-only peer, and what it sees.
    """
    found = {}
    if baseline is not None:
        found["baseline"] = image_probabilities(*baseline)[None]
    found["alignment"] = image_probabilities(model, seen)[None]
    if isinstance(model, SeDA):
        found["semantic learner"] = model.semantic_logits(seen.x_v).softmax(dim=1)[None]
    if mlp is not None:
        found["+MLP"] = one_pass_probabilities(model, mlp, seen)[None]
    refined, whole = head_probabilities(model, seen.x_v, x_cdr)
    return found | {"refined": refined, "MARNet": whole}


@torch.no_grad()
def image_probabilities(model: ImageBranch, seen: Labelled) -> Tensor:
    """Compute the probabilities of the classifier on x_v' alone, [N, C]."""
    return model.eval().alignment_logits(seen.x_v).softmax(dim=1)


@torch.no_grad()
def one_pass_probabilities(model: MARNet, mlp: Refiner, seen: Labelled) -> Tensor:
    """Compute the probabilities of "+MLP", [N, C]."""
    return mlp.eval().classifier(mlp.one_pass(model.condition(seen.x_v))).softmax(dim=1)


def averaged(samples: Tensor, count: int) -> Sequence[Tensor]:
    """Average disjoint groups of `count` noise samples, from [K, N, C]: each is one answer."""
    count = min(count, len(samples))
    return [group.mean(dim=0) for group in samples.split(count) if len(group) == count]


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

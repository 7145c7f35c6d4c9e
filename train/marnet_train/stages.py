"""The order of a training, and what validation chooses in it.

    text phase -> image-only baseline -> A, alignment -> "+MLP" -> B, refinement -> C, heads -> K

With `head_epochs` the heads of the image branch learn alone before the baseline. SeDA's semantic
learner comes between A and "+MLP".

Where a recipe says "auto", a few values are tried on copies and the one that is best on validation
is trained. The baseline is given as many tries, with its learning rate. Every classifier is scaled
by a temperature, so that its probabilities can be trusted. Test images choose nothing.
Axes: N images, D_v, D_s feature widths, C classes, K noise samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from marnet_sdk.console import say
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import (
    NOISE_SEEDS,
    Labelled,
    Measured,
    behind,
    measure,
    measure_branches,
    measure_image_branch,
    sample_probabilities,
)
from marnet_train.features import (
    FrozenFeatures,
    Images,
    LearningEncoder,
    Source,
    cached_views,
    compute_views,
)
from marnet_train.heads import draw_ends, score, temper, train_fusion, train_refined_head
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.marnet import Baseline, ImageBranch, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.parallel import agreed
from marnet_train.phases import (
    HEADS,
    Features,
    Training,
    TrainingSet,
    make_features,
    make_target,
    train_alignment,
    train_image_branch,
    train_text,
)
from marnet_train.progress import Progress
from marnet_train.recipe import TUNING, Augment, Recipe
from marnet_train.refinement import Refiner, refiner_probabilities, train_refinement
from marnet_train.semantic_learner import train_semantic_learner, with_mistakes

ITA_WEIGHTS = (0.1, 0.5, 1.0)  # beta
BASELINE_RATES = (0.5, 1.0, 2.0)  # factors of both learning rates: as many tries as beta has
SAMPLES = (1, 2, 4, 8)  # K
SAMPLES_TOLERANCE = 0.001  # of top-1, for which no more are drawn


def norm_weights(width: int) -> tuple[float, ...]:
    """Return the values of gamma to try: the paper's norm, a mean over dimensions, and between.

    The weight of the cross-entropy stays: AdamW sees nothing but the ratio of both.
    """
    return (1.0, width**-0.5, 1 / width)


@dataclass(frozen=True, eq=False)
class Split:
    """This is a split that is looked at: its images and class indices [N]."""

    images: Images
    labels: Tensor

    def seen_by(self, vision: VisionEncoder, *, frozen: bool) -> Labelled:
        """Return the features of an encoder in evaluation mode."""
        if frozen:
            x_v = cached_views(vision, self.images, Augment(), 1)[0]
        else:
            x_v = compute_views(vision, self.images.store, Augment(), 1)[0]
        return Labelled(x_v, self.labels.to(x_v.device))


@dataclass(frozen=True, eq=False)
class Trained:
    """This is what a training leaves behind."""

    model: MARNet
    baseline: Baseline
    mlp: Refiner  # "+MLP": the denoiser's network as a plain regression, on the model's encoder
    recipe: Recipe  # with numbers in place of "auto"
    features: Features | None = None  # what phase B learned on; None: they were not kept

    @property
    def modules(self) -> nn.Module:
        """Return all that was trained."""
        return nn.ModuleDict({"model": self.model, "baseline": self.baseline, "mlp": self.mlp})


def encoded(vision: VisionEncoder, data: TrainingSet, recipe: Recipe) -> Source:
    """Return where phase A takes x_v from: the encoder, or its cached features if it is frozen."""
    if recipe.alignment.frozen:
        return _as_it_came(vision, data, recipe)
    crop = recipe.alignment.crop
    return LearningEncoder(vision, data.images.store, recipe.augment, crop)


def _as_it_came(vision: VisionEncoder, data: TrainingSet, recipe: Recipe) -> FrozenFeatures:
    views = recipe.refinement.views
    return FrozenFeatures(cached_views(vision, data.images, recipe.augment, views))


def train_all(
    model: MARNet,
    data: TrainingSet,
    val: Split,
    recipe: Recipe,
    seed: int,
    run: Progress,
    *,
    with_baseline: bool = True,
) -> Trained:
    """Run all phases, in order; `model` is trained in place.

    Args:
        with_baseline: train the image-only baseline as well; else it stays as it began.
    """
    course = _Course(model, data, val, Training(recipe, seed, run))
    if recipe.text_phase is not None and recipe.semantics in ("text", "shuffled"):
        course.stages.once("text", lambda: train_text(model, data, course.training))
    if recipe.alignment.head_epochs is not None:
        course.train_heads_first(recipe.alignment.head_epochs)
    if with_baseline:
        course.train_baseline()
    features, seen = course.align()
    if isinstance(model, SeDA):
        training = course.training
        course.stages.once(
            "semantic learner", lambda: train_semantic_learner(model, features, seen, training)
        )
        features = with_mistakes(model, features, recipe, seed)
        seen = behind(model, seen)
    course.refine(features, seen)
    course.train_heads(features, seen)
    course.choose_samples(seen)
    return replace(course.trained(), features=features)


class _Course:
    """This is a training on its way; what validation chose is in the recipe of `training`."""

    def __init__(self, model: MARNet, data: TrainingSet, val: Split, training: Training) -> None:
        self.model, self.data, self.val, self.training = model, data, val, training
        self.baseline = Baseline(model).to(model.device)
        self.mlp = copy.deepcopy(Refiner.of(model))
        self.stages = Stages(training.run, self.trained().modules)

    def trained(self) -> Trained:
        """Return what has been trained so far."""
        return Trained(self.model, self.baseline, self.mlp, self.training.recipe)

    def having(self, **phases: dict[str, Any]) -> Training:
        """Return the training with other settings of some phases."""
        return replace(self.training, recipe=self.training.recipe.but(**phases))

    def judge(
        self,
        branch: ImageBranch,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        *,
        done: bool = False,
    ) -> float:
        """Return the score of an image branch on validation; temper its classifier if it is `done`.

        Args:
            mean, std: of x_v, where E_v expects it standardised.
        """
        seen = self.val.seen_by(branch.vision, frozen=self.training.recipe.alignment.frozen)
        branch.eval()
        with torch.no_grad():
            visual = branch.align_vision((seen.x_v - mean) / std)
            if done:
                temper(branch.alignment_classifier, [visual], seen.labels)
            return score(branch.alignment_classifier(visual).softmax(dim=1), seen.labels)

    def source(self, vision: VisionEncoder) -> Source:
        """Return where phase A takes x_v from."""
        return encoded(vision, self.data, self.training.recipe)

    def train_heads_first(self, epochs: int) -> None:
        """Let the heads of the image branch learn before the encoder does, so that random ones do
        not spoil it; baseline and model begin with the same heads.

        It is Kumar et al., "Fine-tuning can distort pretrained features and underperform
        out-of-distribution", ICLR 2022 (arXiv 2202.10054).
        """
        model, data, recipe = self.model, self.data, self.training.recipe
        frozen = {"epochs": epochs, "lr_backbone": 0.0, **dict.fromkeys(TUNING)}

        def train() -> None:
            source = _as_it_came(model.vision, data, recipe)
            train_image_branch(model, data, source, self.having(alignment=frozen), "heads")
            for name in HEADS:
                getattr(self.baseline, name).load_state_dict(getattr(model, name).state_dict())

        self.stages.once("heads", train)

    def train_baseline(self) -> None:
        """Train the image-only peer.

        Where beta is chosen, so is its learning rate, from as many values.
        """
        phase = self.training.recipe.alignment

        def train(branch: Baseline, factor: float, title: str) -> float:
            rates = {name: getattr(phase, name) * factor for name in ("lr_backbone", "lr_heads")}
            faster, source = self.having(alignment=rates), self.source(branch.vision)
            look = partial(self.judge, branch)
            train_image_branch(branch, self.data, source, faster, title, look)
            return self.judge(branch, done=True)

        factor = self.stages.choose(
            "learning rate of the baseline, times",
            BASELINE_RATES if phase.ita_weight == "auto" else (1.0,),
            lambda factor, title: train(copy.deepcopy(self.baseline), factor, title),
        )
        self.stages.once("baseline", lambda: train(self.baseline, factor, "baseline"))

    def align(self) -> tuple[Features, Labelled]:
        """Run phase A, choose beta if the recipe leaves it open, and return what is seen then.

        Returns:
            The features of training images to learn from, and those of validation.
        """
        recipe, model = self.training.recipe, self.model
        target = make_target(model, self.data, recipe, self.training.seed)

        def train(trial: MARNet, weight: float, title: str) -> float:
            training, source = self.having(alignment={"ita_weight": weight}), self.source
            look = partial(self.judge, trial)
            train_alignment(trial, self.data, source(trial.vision), target, training, title, look)
            return self.judge(trial, done=True)

        given = recipe.alignment.ita_weight
        weight = self.stages.choose(
            "beta",
            ITA_WEIGHTS if given == "auto" else (given,),
            lambda weight, title: train(copy.deepcopy(model), weight, title),
        )
        self.training = self.having(alignment={"ita_weight": weight})
        self.stages.once("alignment", lambda: train(model, weight, "alignment"))
        features = make_features(model, self.data, self.source(model.vision), target, recipe)
        return features, self.val.seen_by(model.vision, frozen=recipe.alignment.frozen)

    def refine(self, features: Features, seen: Labelled) -> None:
        """Run phase B and its control "+MLP"; choose gamma for each, if the recipe leaves it open.

        Args:
            features, seen: what everything behind the encoder gets, of training and validation.
        """
        model = self.model
        condition, judged = (model.condition(x.x_v) for x in (features, seen))
        recipe, seed = self.training.recipe, self.training.seed

        def train(refiner: Refiner, weight: float, title: str, *, one_pass: bool) -> float:
            def look() -> float:
                found = refiner_probabilities(refiner, model, seen.x_v, seed, one_pass=one_pass)
                return score(found, seen.labels)

            training = self.having(refinement={"norm_weight": weight})
            best = train_refinement(
                refiner, condition, features, training, title, look=look, one_pass=one_pass
            )
            if one_pass:  # the other's classifier is the head that phase C trains
                with torch.no_grad():
                    temper(refiner.classifier, [refiner.one_pass(judged)], seen.labels)
            return best

        given, weight = recipe.refinement.norm_weight, 1.0
        weights = norm_weights(features.x_s.shape[1]) if given == "auto" else (given,)
        for name, refiner in (("+MLP", self.mlp), ("refinement", Refiner.of(model))):
            one = partial(train, one_pass=name == "+MLP")
            weight = self.stages.choose(
                f"gamma of {name}",
                weights,
                lambda w, title, one=one, r=refiner: one(copy.deepcopy(r), w, title),
            )
            self.stages.once(name, partial(one, refiner, weight, name))
        self.training = self.having(refinement={"norm_weight": weight})

    def train_heads(self, features: Features, seen: Labelled) -> None:
        """Run phase C: train the classifiers of x_CDR and of the fusion."""
        model, training = self.model, self.training
        # No head changes them, and where both have learned nobody asks.
        ends = cache(partial(draw_ends, model, features, seen, training))
        self.stages.once("refined head", lambda: train_refined_head(model, ends(), training))
        self.stages.once("fusion", lambda: train_fusion(model, ends(), training))

    def choose_samples(self, seen: Labelled) -> None:
        """Set K; where the recipe leaves it open, the fewest within `SAMPLES_TOLERANCE` of the best
        on validation.
        """
        recipe, model = self.training.recipe, self.model
        samples = recipe.samples
        if samples == "auto":
            samples = self._enough_samples(seen)
            self.training = replace(self.training, recipe=replace(recipe, samples=samples))
        model.config = replace(model.config, samples=samples)

    def _enough_samples(self, seen: Labelled) -> int:
        def attempt() -> list[float]:
            table = sampler_table(self.model.config.schedule, "ddpm")
            drawn = [
                sample_probabilities(self.model, seen.x_v, table, noise, max(SAMPLES))[1]
                for noise in NOISE_SEEDS
            ]
            return [
                sum(measure(p[:k].mean(dim=0), seen.labels).top1 for p in drawn) / len(drawn)
                for k in SAMPLES
            ]

        found = dict(zip(SAMPLES, self.stages.once("samples", attempt), strict=True))
        enough = max(found.values()) - SAMPLES_TOLERANCE
        samples = next(k for k, top1 in found.items() if top1 >= enough)
        listed = ", ".join(f"{k}: {top1:.2%}" for k, top1 in found.items())
        say(f"samples: {samples}, by validation ({listed})")
        return samples


class Stages:
    """This does each stage once in a run, however often it is interrupted."""

    def __init__(self, run: Progress, kept: nn.Module) -> None:
        self.run, self.kept = run, kept

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a stage that changes the models, or load what it left."""
        return self.run.once(name, self.kept, work)

    def choose(self, name: str, values: Sequence[Any], attempt: Callable[[Any, str], float]) -> Any:
        """Return the value that scores highest on validation; of equal ones the first."""
        if len(values) == 1:
            return values[0]
        titles = [f"{name} {value:.4g}" for value in values]
        scores = [
            self.once(title, lambda v=value, t=title: agreed(attempt(v, t)))
            for value, title in zip(values, titles, strict=True)
        ]
        best = max(range(len(values)), key=scores.__getitem__)
        listed = ", ".join(f"{v:.4g}: {s:.4f}" for v, s in zip(values, scores, strict=True))
        say(f"{name}: {values[best]:.4g}, by validation ({listed})")
        return values[best]


@torch.no_grad()
def measure_all(trained: Trained, split: Split) -> dict[str, Measured]:
    """Measure how good the baseline, the control and each branch of the model are on a split."""
    frozen = trained.recipe.alignment.frozen
    model, baseline, mlp = trained.model, trained.baseline, trained.mlp.eval()
    seen = behind(model, split.seen_by(model.vision, frozen=frozen))
    one_pass = mlp.classifier(mlp.one_pass(model.condition(seen.x_v)))
    return {
        "baseline": measure_image_branch(baseline, split.seen_by(baseline.vision, frozen=frozen)),
        "mlp": measure(one_pass, seen.labels),
        **measure_branches(model, seen),
    }

"""The order of a training, and what validation chooses in it.

    text phase -> image-only baseline -> A, alignment -> "+MLP" -> B, refinement -> C, heads -> K

SeDA's semantic learner comes between A and "+MLP".

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
from marnet_train.diffusion import SamplerTable, sample, sampler_table
from marnet_train.evaluate import (
    NOISE_SEEDS,
    Labelled,
    Measured,
    behind,
    measure,
    measure_branches,
    measure_image_branch,
    refined_features,
    sample_probabilities,
    see,
)
from marnet_train.features import (
    FrozenFeatures,
    Images,
    LearningEncoder,
    Source,
    cached_views,
    compute_views,
)
from marnet_train.models.backbones import VisionEncoder
from marnet_train.models.marnet import Baseline, ImageBranch, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.parallel import agreed
from marnet_train.phases import (
    Features,
    Refiner,
    Target,
    TrainingSet,
    draw_refined,
    make_features,
    make_target,
    train_alignment,
    train_baseline,
    train_head,
    train_refinement,
    train_text,
)
from marnet_train.progress import Progress
from marnet_train.recipe import Augment, Recipe

ITA_WEIGHTS = (0.1, 0.5, 1.0)  # beta
BASELINE_RATES = (0.5, 1.0, 2.0)  # factors of both learning rates: as many tries as beta has
SAMPLES = (1, 2, 4, 8)  # K
SAMPLES_TOLERANCE = 0.001  # of top-1, for which no more are drawn
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the refined branch in the first fusion head
LOOK_STEPS, LOOK_SAMPLES = 25, 4  # of the chains that phase B is judged by on the way
TEMPERATURES = torch.logspace(-1, 1, 81).tolist()  # of a classifier; each 6 % above the last


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
            x_v = compute_views(vision, self.images.store(), Augment(), 1)[0]
        return Labelled(x_v, self.labels.to(x_v.device))

    def seen_whole(self, model: ImageBranch, *, frozen: bool) -> Labelled:
        """Return what everything behind a model's encoder gets of the images."""
        return behind(model, self.seen_by(model.vision, frozen=frozen))


@dataclass(frozen=True, eq=False)
class Trained:
    """This is what a training leaves behind."""

    model: MARNet
    baseline: Baseline
    mlp: Refiner  # "+MLP": the denoiser's network as a plain regression, on the model's encoder
    recipe: Recipe  # with numbers in place of "auto"

    @property
    def modules(self) -> nn.Module:
        """Return all that was trained."""
        return nn.ModuleDict({"model": self.model, "baseline": self.baseline, "mlp": self.mlp})


def encoded(vision: VisionEncoder, data: TrainingSet, recipe: Recipe) -> Source:
    """Return where phase A takes x_v from: the encoder, or its cached features if it is frozen."""
    if recipe.alignment.lr_backbone == 0:
        views = recipe.refinement.views
        return FrozenFeatures(cached_views(vision, data.images, recipe.augment, views))
    return LearningEncoder(vision, data.images.store(), recipe.augment)


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
    baseline = Baseline(model).to(model.device)
    mlp = copy.deepcopy(Refiner.of(model))
    frozen = recipe.alignment.lr_backbone == 0

    source = partial(encoded, data=data, recipe=recipe)

    def judge(
        branch: ImageBranch, mean: Tensor | float = 0.0, std: Tensor | float = 1.0, *, done: bool
    ) -> float:
        """Return its score on validation, and temper its classifier if it has done learning.

        mean, std: of x_v, where E_v expects it standardised.
        """
        seen = val.seen_by(branch.vision, frozen=frozen)
        branch.eval()
        with torch.no_grad():
            visual = branch.align_vision((seen.x_v - mean) / std)
            if done:
                temper(branch.alignment_classifier, [visual], seen.labels)
            return score(branch.alignment_classifier(visual).softmax(dim=1), seen.labels)

    stage = Stages(run, Trained(model, baseline, mlp, recipe).modules)
    if recipe.text_phase is not None and recipe.semantics in ("text", "shuffled"):
        stage.once("text", lambda: train_text(model, data, recipe, seed, run))
    if with_baseline:
        _train_baseline(baseline, data, source, recipe, seed, stage, judge)
    target = make_target(model, data, recipe, seed)
    recipe = _choose_alignment(model, data, source, target, recipe, seed, stage, judge)

    def align() -> None:
        look = partial(judge, model, done=False)
        train_alignment(model, data, source(model.vision), target, recipe, seed, run, look=look)
        judge(model, done=True)

    stage.once("alignment", align)
    features = make_features(model, data, source(model.vision), target, recipe)
    seen = val.seen_by(model.vision, frozen=frozen)
    if isinstance(model, SeDA):
        features = learn_semantics(model, features, seen, recipe, seed, stage)
        seen = behind(model, seen)
    recipe = _refine(model, mlp, features, seen, recipe, seed, stage)
    _train_heads(model, features, seen, recipe, seed, stage)
    recipe = _choose_samples(model, seen, recipe, seed, stage)
    assert recipe.samples != "auto"
    model.config = replace(model.config, samples=recipe.samples)
    return Trained(model, baseline, mlp, recipe)


@torch.no_grad()
def measure_all(trained: Trained, split: Split) -> dict[str, Measured]:
    """Measure how good the baseline, the control and each branch of the model are on a split."""
    frozen = trained.recipe.alignment.lr_backbone == 0
    model, baseline, mlp = trained.model, trained.baseline, trained.mlp
    seen = split.seen_whole(model, frozen=frozen)
    condition = model.condition(seen.x_v)
    mlp.eval()
    one_pass = mlp.classifier(mlp.one_pass(condition))
    return {
        "baseline": measure_image_branch(baseline, split.seen_by(baseline.vision, frozen=frozen)),
        "mlp": measure(one_pass, seen.labels),
        **measure_branches(model, seen),
    }


def learn_semantics(
    model: SeDA, features: Features, seen: Labelled, recipe: Recipe, seed: int, stage: Stages
) -> Features:
    """Run SeDA's stage 1, whose vectors then stand beside the features that phase B learns from.

    Args:
        features, seen: image features alone, of training and of validation.
    """
    learner, phase = model.learner, recipe.semantic
    condition, judged = MARNet.condition(model, features.x_v), MARNet.condition(model, seen.x_v)
    learner.set_centres(condition, features.labels)
    own = ("epochs", "batch", "lr", "weight_decay", "ce_weight", "norm_weight", "patience")
    of_stage = {name: getattr(phase, name) for name in own} | {"pure_noise": 0.0}
    settings = replace(
        recipe,
        schedule=recipe.semantic_schedule,
        refinement=replace(recipe.refinement, **of_stage),
    )
    refiner = Refiner(learner.denoiser, learner.classifier, learner.train_steps)

    @torch.no_grad()
    def look() -> float:
        return score(learner.classifier(learner(judged)).softmax(dim=1), seen.labels)

    def train() -> None:
        target = replace(features, x_s=learner.centres[features.labels])
        train_refinement(
            refiner, condition, target, settings, seed, stage.run, "semantic learner", look=look
        )
        temper(learner.classifier, [learner(judged)], seen.labels)

    stage.once("semantic learner", train)
    return with_mistakes(model, features, recipe, seed)


@torch.no_grad()
def with_mistakes(model: SeDA, features: Features, recipe: Recipe, seed: int) -> Features:
    """Put [x_v ; s] in the place of training features, with s as unsure as on other images.

    A share of `wrong` gets the centre of another class, drawn from the alignment classifier's
    probabilities at temperature 2; all get noise of deviation `jitter`.
    """
    seen = see(model, features.x_v)
    x_v, s = seen.split(model.vision.dim, dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(s))
    chances = (model.alignment_logits(x_v) / 2).softmax(dim=1).cpu() + 1e-9
    chances[rows, features.labels.cpu()] = 0
    other = torch.multinomial(chances, 1, generator=generator)[:, 0].to(s.device)
    wrong = torch.rand(len(s), 1, generator=generator) < recipe.semantic.wrong
    s = torch.where(wrong.to(s.device), model.learner.centres[other], s)
    noise = torch.randn(s.shape, generator=generator).to(s)
    return replace(features, x_v=torch.cat([x_v, s + recipe.semantic.jitter * noise], dim=1))


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


def likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Return the labels' mean log-probability; one of zero counts as 1e-9, so it is above -21."""
    rows = torch.arange(len(labels))
    return float(probabilities[rows, labels].clamp(min=1e-9).log().mean())


def score(probabilities: Tensor, labels: Tensor) -> float:
    """Return what validation chooses by: top-1 accuracy, and the log-likelihood between equals."""
    tie = likelihood(probabilities, labels) / (21 * len(labels))
    return measure(probabilities, labels).top1 + tie


@torch.no_grad()
def temper(head: nn.Linear, inputs: Sequence[Tensor], labels: Tensor) -> None:
    """Divide a classifier's logits by the temperature at which validation's labels are likeliest.

    No answer changes, but its probability becomes one that can be trusted: Guo, Pleiss, Sun and
    Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        inputs: [N, D_f] for each noise sample, whose probabilities are averaged.
    """
    logits = torch.stack([head(x) for x in inputs])
    temperature = max(
        TEMPERATURES, key=lambda t: likelihood((logits / t).softmax(dim=2).mean(dim=0), labels)
    )
    head.weight.div_(temperature)
    head.bias.div_(temperature)


def _faster(recipe: Recipe, factor: float) -> Recipe:
    phase = recipe.alignment
    rates = {"lr_backbone": phase.lr_backbone * factor, "lr_heads": phase.lr_heads * factor}
    return replace(recipe, alignment=replace(phase, **rates))


def _train_baseline(
    baseline: Baseline,
    data: TrainingSet,
    source: Callable[[VisionEncoder], Source],
    recipe: Recipe,
    seed: int,
    stage: Stages,
    judge: Callable[..., float],
) -> None:
    """Train the image-only peer.

    Where beta is chosen, so is its learning rate, from as many values.
    """

    def train(branch: Baseline, factor: float, title: str) -> float:
        faster = _faster(recipe, factor)
        look = partial(judge, branch, done=False)
        train_baseline(branch, data, source(branch.vision), faster, seed, stage.run, title, look)
        return judge(branch, done=True)

    def attempt(factor: float, title: str) -> float:
        return train(copy.deepcopy(baseline), factor, title)

    tries = BASELINE_RATES if recipe.alignment.ita_weight == "auto" else (1.0,)
    factor = stage.choose("learning rate of the baseline, times", tries, attempt)
    stage.once("baseline", lambda: train(baseline, factor, "baseline"))


def _choose_alignment(
    model: MARNet,
    data: TrainingSet,
    source: Callable[[VisionEncoder], Source],
    target: Target,
    recipe: Recipe,
    seed: int,
    stage: Stages,
    judge: Callable[..., float],
) -> Recipe:
    """Choose beta, if the recipe leaves it open."""

    def chosen(weight: float) -> Recipe:
        return replace(recipe, alignment=replace(recipe.alignment, ita_weight=weight))

    def attempt(weight: float, title: str) -> float:
        trial = copy.deepcopy(model)
        train_alignment(
            trial,
            data,
            source(trial.vision),
            target,
            chosen(weight),
            seed,
            stage.run,
            title,
            partial(judge, trial, done=False),
        )
        return judge(trial, done=True)

    given = recipe.alignment.ita_weight
    return chosen(stage.choose("beta", ITA_WEIGHTS if given == "auto" else (given,), attempt))


def _refine(
    model: MARNet,
    mlp: Refiner,
    features: Features,
    seen: Labelled,
    recipe: Recipe,
    seed: int,
    stage: Stages,
) -> Recipe:
    """Run phase B and its control "+MLP"; choose gamma, for each, if the recipe leaves it open."""
    condition, judged = model.condition(features.x_v), model.condition(seen.x_v)

    def chosen(weight: float) -> Recipe:
        return replace(recipe, refinement=replace(recipe.refinement, norm_weight=weight))

    def train(refiner: Refiner, one_pass: bool, weight: float, title: str) -> float:
        def look() -> float:
            found = refiner_probabilities(refiner, judged, recipe, seed, one_pass=one_pass)
            return score(found, seen.labels)

        best = train_refinement(
            refiner,
            condition,
            features,
            chosen(weight),
            seed,
            stage.run,
            title,
            look=look,
            one_pass=one_pass,
        )
        if one_pass:  # the other's classifier is the head that phase C trains
            with torch.no_grad():
                temper(refiner.classifier, [refiner.one_pass(judged)], seen.labels)
        return best

    given = recipe.refinement.norm_weight
    weights = norm_weights(features.x_s.shape[1]) if given == "auto" else (given,)
    weight = weights[0]
    for name, refiner, one_pass in (("+MLP", mlp, True), ("refinement", Refiner.of(model), False)):
        weight = stage.choose(
            f"gamma of {name}",
            weights,
            lambda w, title, r=refiner, o=one_pass: train(copy.deepcopy(r), o, w, title),
        )
        stage.once(name, partial(train, refiner, one_pass, weight, name))
    return chosen(weight)


@torch.no_grad()
def refiner_probabilities(
    refiner: Refiner, condition: Tensor, recipe: Recipe, seed: int, *, one_pass: bool
) -> Tensor:
    """Compute the probabilities of the refined branch alone, [N, C]: in one pass, or as the mean
    over `LOOK_SAMPLES` chains of at most `LOOK_STEPS` steps, each row with noise of its own."""
    if one_pass:
        return refiner.classifier(refiner.one_pass(condition)).softmax(dim=1)
    table = sampler_table(recipe.schedule, "ddpm", min(LOOK_STEPS, recipe.schedule.steps))
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [_chain_probabilities(refiner, rows, table, generator) for rows in condition.split(1024)]
    )


def _chain_probabilities(
    refiner: Refiner, condition: Tensor, table: SamplerTable, generator: torch.Generator
) -> Tensor:
    """Average the probabilities over `LOOK_SAMPLES` chains of every row, [B, C]."""
    shape = (len(table.timesteps), len(condition), refiner.denoiser.dim)
    total, denoise = torch.zeros((), device=condition.device), refiner.denoiser.given(condition)
    for _ in range(LOOK_SAMPLES):
        initial = torch.randn(shape[1:], generator=generator).to(condition)
        noise = torch.randn(shape, generator=generator).to(condition)
        x = sample(denoise, table, initial, noise)
        total = total + refiner.classifier(x).softmax(dim=1)
    return total / LOOK_SAMPLES


@dataclass(frozen=True, eq=False)
class Ends:
    """These are ends of whole chains: what phase C learns from, and what it is judged by."""

    x_v: Tensor  # of M rows to learn from, [M, D_v]
    x_cdr: Tensor  # [M, D_s]
    labels: Tensor  # [M]
    seen: Labelled  # validation
    judged: Sequence[Tensor]  # x_CDR of validation, [N, D_s] for each noise sample


def draw_ends(model: MARNet, features: Features, seen: Labelled, recipe: Recipe, seed: int) -> Ends:
    """Draw x_CDR for phase C: of the cached rows, several times, and of validation."""
    draws, table = recipe.fusion_phase.draws, sampler_table(recipe.schedule, "ddpm")
    judged = [refined_features(model, seen.x_v, table, seed, k) for k in range(LOOK_SAMPLES)]
    x_cdr = draw_refined(model, features, recipe, seed).flatten(0, 1)
    return Ends(features.x_v.repeat(draws, 1), x_cdr, features.labels.repeat(draws), seen, judged)


def _train_heads(
    model: MARNet, features: Features, seen: Labelled, recipe: Recipe, seed: int, stage: Stages
) -> None:
    """Run phase C: train the classifiers of x_CDR and of the fusion, on ends of whole chains."""

    @cache  # no head changes them, and where both have learned nobody asks
    def ends() -> Ends:
        return draw_ends(model, features, seen, recipe, seed)

    stage.once("refined head", lambda: train_refined_head(model, ends(), recipe, seed, stage.run))
    stage.once("fusion", lambda: train_fusion(model, ends(), recipe, seed, stage.run))


def train_refined_head(
    model: MARNet,
    ends: Ends,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str = "refined head",
) -> None:
    """Train the classifier of x_CDR alone, and temper it."""
    head, look = model.semantic_classifier, partial(_judge_head, ends.judged, ends.seen.labels)
    train_head(head, ends.x_cdr, ends.labels, recipe, seed, run, title, look=look)
    temper(head, ends.judged, ends.seen.labels)


def train_fusion(
    model: MARNet, ends: Ends, recipe: Recipe, seed: int, run: Progress, title: str = "fusion"
) -> None:
    """Train the final classifier on the fusion that the model is made for, and temper it."""
    labels = ends.seen.labels
    with torch.no_grad():
        if model.config.fusion != "concat":
            aligned, refined = model.branches(ends.x_v, ends.x_cdr)
            model.set_statistics("aligned", aligned)
            model.set_statistics("refined", refined)
        fused = model.fuse(ends.x_v, ends.x_cdr)
        judged = [model.fuse(ends.seen.x_v, x) for x in ends.judged]
    if model.config.fusion == "concat":
        blend(model, partial(_judge_head, judged, labels, by=likelihood))
    look = partial(_judge_head, judged, labels)
    train_head(model.classifier, fused, ends.labels, recipe, seed, run, title, look=look)
    temper(model.classifier, judged, labels)


@torch.no_grad()
def _judge_head(
    inputs: Sequence[Tensor],
    labels: Tensor,
    head: nn.Linear,
    by: Callable[[Tensor, Tensor], float] = score,
) -> float:
    """Judge a classifier by its mean probabilities over the noise samples of its inputs."""
    return by(torch.stack([head(x).softmax(dim=1) for x in inputs]).mean(dim=0), labels)


@torch.no_grad()
def blend(model: MARNet, look: Callable[[nn.Linear], float]) -> None:
    """Start the concat head as a weighted sum of both branches' logits, the best by `look`.

    A blend of logits is a geometric mean of both branches' probabilities.
    """
    aligned, semantic = model.alignment_classifier, model.semantic_classifier

    def blended(share: float) -> nn.Linear:
        head = copy.deepcopy(model.classifier)
        if model.config.fusion_level == "logit":
            same = torch.eye(len(head.bias)).to(head.weight)
            head.weight.copy_(torch.cat(((1 - share) * same, share * same), dim=1))
            head.bias.zero_()
            return head
        weights = ((1 - share) * aligned.weight, share * semantic.weight)
        head.weight.copy_(torch.cat(weights, dim=1))
        head.bias.copy_((1 - share) * aligned.bias + share * semantic.bias)
        return head

    best = max((blended(share) for share in BLENDS), key=look)
    model.classifier.load_state_dict(best.state_dict())


def _choose_samples(
    model: MARNet, seen: Labelled, recipe: Recipe, seed: int, stage: Stages
) -> Recipe:
    """Choose K, if the recipe leaves it open: the fewest within `SAMPLES_TOLERANCE` of the best."""
    if recipe.samples != "auto":
        return recipe

    def attempt() -> list[float]:
        table = sampler_table(recipe.schedule, "ddpm")
        drawn = [
            sample_probabilities(model, seen.x_v, table, noise, max(SAMPLES))[1]
            for noise in NOISE_SEEDS
        ]
        return [
            sum(measure(p[:k].mean(dim=0), seen.labels).top1 for p in drawn) / len(drawn)
            for k in SAMPLES
        ]

    found = stage.once("samples", attempt)
    enough = max(found) - SAMPLES_TOLERANCE
    samples = next(k for k, top1 in zip(SAMPLES, found, strict=True) if top1 >= enough)
    listed = ", ".join(f"{k}: {top1:.2%}" for k, top1 in zip(SAMPLES, found, strict=True))
    say(f"samples: {samples}, by validation ({listed})")
    return replace(recipe, samples=samples)

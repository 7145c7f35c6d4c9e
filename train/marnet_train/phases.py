"""The training phases of MARNet, each one visible loop.

A text phase may come first, for a text encoder from scratch. A trains the encoders and the
alignment (eq. 13). B trains the denoiser (eq. 20) and C the final classifier (eq. 24), both on
cached features with the encoders frozen: the denoiser's target is then stationary, and no gradient
has to pass through the sampling chain.
Axes: N images, V cached views of each, B batch, L tokens, D_v, D_s, D_f feature widths, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_sdk.console import say, track
from marnet_train.diffusion import alphas_cumprod, q_sample, sampler_table
from marnet_train.features import FrozenFeatures, Images, Source, compute_views
from marnet_train.losses import classification_loss, refinement_loss
from marnet_train.losses.alignment import Alignment, Pairs
from marnet_train.models.denoiser import LEAKY_SLOPE, Denoiser
from marnet_train.models.marnet import ImageBranch, MARNet, mean_and_scale
from marnet_train.optimise import Learner, balanced_batches, batches
from marnet_train.parallel import agreed
from marnet_train.progress import Progress
from marnet_train.recipe import AlignmentPhase, FusionPhase, Recipe, RefinementPhase, TextPhase
from marnet_train.semantics import semantic_vectors

LOOKS = 12  # at validation, in phases B and C: at least, and fewer than twice as many

# By so much of top-1 a trained head must beat the one that it starts from: features of training
# images are easier than others, and on a few hundred images a head can seem better by luck.
HEAD_GAIN = 0.01
HEADS = ("project_vision", "alignment_classifier")  # behind the encoder, in phase A

Look = Callable[[Tensor, Tensor], float]  # mean and deviation of x_v that E_v expects -> score


@dataclass(frozen=True)
class TrainingSet:
    """This is the train split: its images, class indices [N], token ids and mask [N, L]."""

    images: Images
    labels: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Features:
    """These are cached features of V views of each image; rows are view-major, [V * N, ...]."""

    x_v: Tensor
    x_s: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Target:
    """ITA aligns images with this: x_s of every image, or the text encoder while it learns."""

    x_s: Tensor | None  # [N, D_s], standardised; None: F_s learns, and x_s moves
    groups: Tensor  # [N], equal where two texts, or what plays them, are the same


@torch.no_grad()
def text_features(model: MARNet, data: TrainingSet, batch: int = 256) -> Tensor:
    """Compute x_s of every text, [N, D_s], in evaluation mode; equal texts are encoded once."""
    model.eval()
    device = model.text_mean.device
    rows, inverse = torch.unique(data.input_ids, dim=0, return_inverse=True)
    first = torch.empty(len(rows), dtype=torch.long)
    first[inverse] = torch.arange(len(inverse))  # one row of the set for each text
    masks = data.attention_mask[first]
    chunks = track(list(zip(rows.split(batch), masks.split(batch), strict=True)), "encode texts")
    found = torch.cat([model.text(ids.to(device), mask.to(device)) for ids, mask in chunks])
    return found[inverse.to(device)]


def make_learner(
    parts: Sequence[tuple[nn.Module, float]],
    phase: TextPhase | AlignmentPhase | RefinementPhase | FusionPhase,
    recipe: Recipe,
    title: str,
    count: int,
    *,
    warmup: float = 0.1,
    patience: int | None = None,
) -> Learner:
    """Make what learns in a phase: `parts`, modules and their learning rates, on `count` rows."""
    steps = phase.epochs * len(range(0, count, phase.batch))
    return Learner(
        parts,
        phase.weight_decay,
        steps,
        warmup,
        title=title,
        clip_norm=recipe.clip_norm,
        patience=patience,
    )


def train_text(model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, run: Progress) -> None:
    """In the text phase F_s and a linear head, which is thrown away, learn the class from text."""
    phase = recipe.text_phase
    assert phase is not None
    device = model.text_mean.device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(model.text.dim, len(model.config.labels)).to(device)
    count = len(data.labels)
    parts = [(model.text, phase.lr), (head, phase.lr)]
    learner = make_learner(parts, phase, recipe, "text", count)
    for epoch in run.epochs("text", phase.epochs, learner, generator):
        model.text.train()
        losses = []
        for rows in batches(count, phase.batch, generator):
            loss = classification_loss(
                head(_learning_text(model, data, rows)), data.labels[rows].to(device)
            )
            losses.append(learner.step(loss))
        finish_epoch(run, learner, epoch, phase.epochs, losses)


def _learning_text(model: MARNet, data: TrainingSet, rows: Tensor) -> Tensor:
    """Compute x_s of some rows, [B, D_s], with a gradient; they are cut at the longest of them."""
    device = model.text_mean.device
    mask = data.attention_mask[rows].to(device)
    longest = int(mask.sum(dim=1).max())
    return model.text(data.input_ids[rows, :longest].to(device), mask[:, :longest])


def make_target(model: MARNet, data: TrainingSet, recipe: Recipe, seed: int) -> Target:
    """Make the vectors that play x_s in phases A and B, standardised.

    Their mean and standard deviation go to the model's buffers.
    """
    device = model.text_mean.device
    if recipe.alignment.lr_text > 0 and recipe.semantics == "text":
        _, groups = torch.unique(data.input_ids, dim=0, return_inverse=True)
        return Target(None, groups.to(device))
    texts, labels = text_features(model, data), data.labels.to(device)
    x_s = semantic_vectors(recipe.semantics, texts, labels, len(model.config.labels), seed)
    _, groups = torch.unique(x_s, dim=0, return_inverse=True)
    model.set_statistics("text", x_s)
    return Target(model.standardise_text(x_s), groups)


@torch.no_grad()
def fold(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Make a layer that learned on standardised inputs take them raw. It is exact."""
    layer.weight.div_(std)
    layer.bias.sub_(layer.weight @ mean)


class _Temperature(nn.Module):
    """This is tau of ITA: the recipe's, or learned from there; then 1 / tau stays at most 100."""

    def __init__(self, start: float, *, learned: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(start)), requires_grad=learned)

    def forward(self) -> Tensor:
        if not self.log_scale.requires_grad:
            return torch.exp(-self.log_scale)
        return torch.exp(-self.log_scale.clamp(max=math.log(100)))


@dataclass(frozen=True)
class _Step:
    """This is a batch of phase A, after the image branch."""

    x_v: Tensor  # [B, D_v]
    visual: Tensor  # x_v', [B, D]
    logits: Tensor  # [B, K]
    rows: Tensor  # of the training set, [B]
    labels: Tensor  # [B]
    progress: float  # share of the phase that is over


def train_alignment(
    model: MARNet,
    data: TrainingSet,
    source: Source,
    target: Target,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str = "alignment",
    look: Look | None = None,
) -> None:
    """Run phase A: minimise L_EMA (eq. 13) over E_v, E_s, the alignment classifier and, if they
    have a learning rate, F_v and F_s. With `joint`, L_CDR (eq. 20) of one step is added to it.

    E_s learns on standardised x_s and, with frozen features, E_v on standardised x_v; both are
    then folded, so the model takes them raw.
    """
    phase = recipe.alignment
    device = model.device
    temperature = _Temperature(phase.temperature, learned=phase.learn_temperature).to(device)
    joint = _JointRefinement(model, recipe).to(device) if phase.joint else None
    torch.manual_seed(seed)  # of what a loss learns
    align = Alignment(phase.loss, model.config.dim).to(device)
    heads = nn.ModuleDict(
        {"project_text": model.project_text, "temperature": temperature, "alignment": align}
    )
    if joint is not None:
        heads["joint"] = joint

    def text_loss(step: _Step) -> Tensor:
        rows = step.rows
        if target.x_s is None:
            x_s = _learning_text(model, data, rows)
        else:
            x_s = target.x_s[rows.to(device)]
        semantic = F.leaky_relu(model.project_text(x_s), LEAKY_SLOPE)
        groups = target.groups[rows.to(device)] if phase.dedup_negatives else None
        assert phase.ita_weight != "auto"
        pairs = Pairs(
            step.visual,
            semantic,
            step.logits,
            model.alignment_classifier(semantic),
            step.labels,
            groups,
            temperature(),
            step.progress,
        )
        loss = phase.ita_weight * align(pairs)
        return loss if joint is None else loss + joint(step.x_v, x_s, step.labels)

    parts: list[tuple[nn.Module, float]] = [(heads, phase.lr_heads)]
    if target.x_s is None:
        parts.append((model.text, phase.lr_text))
    _train_image_branch(model, data, source, recipe, seed, run, title, parts, text_loss, look)
    fold(model.project_text, model.text_mean, model.text_std)


def train_baseline(
    model: ImageBranch,
    data: TrainingSet,
    source: Source,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str = "baseline",
    look: Look | None = None,
) -> None:
    """Run phase A of the image-only peer: the same encoder, data, order and epochs, and no text."""
    _train_image_branch(model, data, source, recipe, seed, run, title, [], None, look)


def _train_image_branch(
    model: ImageBranch,
    data: TrainingSet,
    source: Source,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str,
    parts: list[tuple[nn.Module, float]],
    text_loss: Callable[[_Step], Tensor] | None,
    look: Look | None,
) -> None:
    """Minimise cross-entropy on x_v' plus `text_loss` of the same batch.

    With `keep_best`, the weights are kept that score best by `look` on validation.
    """
    phase = recipe.alignment
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    frozen = isinstance(source, FrozenFeatures)
    mean, std = torch.zeros(1, device=device), torch.ones(1, device=device)
    if isinstance(source, FrozenFeatures):
        mean, std = mean_and_scale(source.views.flatten(0, 1))
    heads = nn.ModuleDict({name: getattr(model, name) for name in HEADS})
    parts = [
        *([] if frozen else [(model.vision, phase.lr_backbone)]),
        (heads, phase.lr_heads),
        *parts,
    ]
    learner = make_learner(
        parts, phase, recipe, title, len(source), warmup=phase.warmup, patience=phase.patience
    )
    judged = partial(look, mean, std) if look is not None and phase.keep_best else None
    for epoch in run.epochs(title, phase.epochs, learner, generator):
        model.train()
        losses = []
        for rows in source.ahead(_batches(data, source, phase, generator)):
            labels = data.labels[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16, phase.bf16 and device.type == "cuda"):
                x_v = (source(rows, generator, device) - mean) / std
                x_v = F.dropout(x_v, phase.dropout)
                visual = model.align_vision(x_v)  # [B, D]
                logits = model.alignment_classifier(visual)
                loss = phase.ce_weight * classification_loss(logits, labels)
                if text_loss is not None:
                    done = learner.steps / learner.total
                    loss = loss + text_loss(_Step(x_v, visual, logits, rows, labels, done))
            losses.append(learner.step(loss))
        if finish_epoch(run, learner, epoch, phase.epochs, losses, judged):
            break
    learner.take_best()
    if frozen:
        fold(model.project_vision, mean, std)


def _batches(
    data: TrainingSet, source: Source, phase: AlignmentPhase, generator: torch.Generator
) -> Iterator[Tensor]:
    if phase.per_class > 1:
        return balanced_batches(data.labels, phase.batch, phase.per_class, generator)
    return batches(len(source), phase.batch, generator)


class _JointRefinement(nn.Module):
    """This is L_CDR of one step inside phase A, with a gradient into F_v.

    Half of the rows are at t = T. The condition is standardised by the batch's own statistics.
    """

    def __init__(self, model: MARNet, recipe: Recipe) -> None:
        super().__init__()
        self.denoiser, self.classifier = model.denoiser, model.semantic_classifier
        self.standardise = nn.BatchNorm1d(model.vision.dim, affine=False)
        self.phase, self.steps = recipe.refinement, recipe.schedule.steps
        abar = torch.as_tensor(alphas_cumprod(recipe.schedule), dtype=torch.float32)
        self.register_buffer("abar", abar)

    abar: Tensor

    def forward(self, x_v: Tensor, x0: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss: x_v [B, D_v], x0 [B, D_s] standardised, labels [B] -> scalar."""
        t = torch.randint(1, self.steps + 1, (len(x0),))
        t = torch.where(torch.rand(len(x0)) < 0.5, self.steps, t).to(x0.device)
        x_t = q_sample(x0, t, torch.randn_like(x0), self.abar)
        estimate = self.denoiser(x_t, t, self.standardise(x_v))
        weight = self.phase.norm_weight
        return refinement_loss(
            self.classifier(estimate),
            labels,
            estimate,
            x0,
            ce_weight=self.phase.ce_weight,
            norm_weight=1.0 if weight == "auto" else weight,
        )


@torch.no_grad()
def make_features(
    model: MARNet,
    data: TrainingSet,
    source: Source,
    target: Target,
    recipe: Recipe,
) -> Features:
    """Compute x_v of `views` views of each image and x_s, encoders frozen.

    It stores the mean and standard deviation of both in the model's buffers.
    """
    if isinstance(source, FrozenFeatures):
        views = source.views
    else:
        views = compute_views(model.vision, source.store, recipe.augment, recipe.refinement.views)
    x_v = views.flatten(0, 1)  # [V * N, D_v]
    model.set_statistics("vision", x_v)
    if target.x_s is None:
        x_s = text_features(model, data)  # [N, D_s]
        model.set_statistics("text", x_s)
        x_s = model.standardise_text(x_s)
    else:
        x_s = target.x_s
    return Features(x_v, x_s.repeat(len(views), 1), data.labels.to(x_v.device).repeat(len(views)))


class Refiner(nn.Module):
    """This holds what phase B learns: the denoiser and the classifier of its estimates."""

    def __init__(self, denoiser: Denoiser, classifier: nn.Linear, steps: int) -> None:
        super().__init__()
        self.denoiser, self.classifier, self.steps = denoiser, classifier, steps

    @classmethod
    def of(cls, model: MARNet) -> Refiner:
        """Return the model's own refiner."""
        return cls(model.denoiser, model.semantic_classifier, model.config.schedule.steps)

    def one_pass(self, condition: Tensor) -> Tensor:
        """Make the estimate without any noise: x_t = 0 at t = T. [B, D_v] -> [B, D_s]."""
        x = condition.new_zeros(len(condition), self.denoiser.dim)
        t = torch.full((len(condition),), self.steps, device=condition.device)
        return self.denoiser(x, t, condition)


def train_refinement(
    refiner: Refiner,
    condition: Tensor,
    features: Features,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str = "refinement",
    *,
    look: Callable[[], float],
    one_pass: bool = False,
) -> float:
    """Run phase B: minimise L_CDR (eq. 20), t ~ Uniform{1..T} for each row, but for a share of
    `pure_noise` at t = T. The weights are kept that score best on validation.

    Args:
        condition: standardised x_v, [V * N, D_v].
        look: the score of the refiner as it is, higher is better; asked `LOOKS` times or more.
        one_pass: train the same network as a plain regression, without noise or steps: the
            control "+MLP".
    Returns:
        The best score.
    """
    phase = recipe.refinement
    device = condition.device
    torch.manual_seed(seed)  # dropout
    generator = torch.Generator().manual_seed(seed)
    abar = torch.as_tensor(alphas_cumprod(recipe.schedule), dtype=torch.float32, device=device)
    count = len(condition)
    learner = make_learner(
        [(refiner, phase.lr)], phase, recipe, title, count, patience=phase.patience
    )

    def judged() -> float:
        refiner.eval()
        return look()

    assert phase.norm_weight != "auto"
    for epoch in run.epochs(title, phase.epochs, learner, generator):
        refiner.train()
        losses = []
        for rows in batches(count, phase.batch, generator):
            seen = F.dropout(condition[rows.to(device)], phase.dropout)
            x0 = features.x_s[rows.to(device)]  # [B, D_s]
            if one_pass:
                estimate = refiner.one_pass(seen)
            else:
                t = torch.randint(1, refiner.steps + 1, (len(rows),), generator=generator)
                pure = torch.rand(len(rows), generator=generator) < phase.pure_noise
                t = torch.where(pure, refiner.steps, t).to(device)
                noise = torch.randn(len(rows), x0.shape[1], generator=generator).to(device)
                estimate = refiner.denoiser(q_sample(x0, t, noise, abar), t, seen)
            loss = refinement_loss(
                refiner.classifier(estimate),
                features.labels[rows.to(device)],
                estimate,
                x0,
                ce_weight=phase.ce_weight,
                norm_weight=phase.norm_weight,
            )
            losses.append(learner.step(loss))
        if finish_epoch(run, learner, epoch, phase.epochs, losses, judged):
            break
    learner.take_best()
    refiner.eval()
    return learner.score


def finish_epoch(
    run: Progress,
    learner: Learner,
    epoch: int,
    epochs: int,
    losses: Sequence[float],
    look: Callable[[], float] | None = None,
) -> bool:
    """Log an epoch, with a look at validation if one is due; tell whether the phase is over."""
    line: dict[str, Any] = {"phase": learner.title, "epoch": epoch}
    line["loss"] = sum(losses) / len(losses)
    if look is not None and _is_look(epoch, epochs):
        line["score"] = agreed(look())
        learner.consider(line["score"])
    run.log(**line)
    if learner.is_done and epoch < epochs:
        say(
            f"{learner.title}: ends after epoch {epoch} of {epochs}; {learner.patience} looks at "
            "validation found nothing better"
        )
    return learner.is_done


def _is_look(epoch: int, epochs: int) -> bool:
    """Tell whether validation is looked at after this epoch; after the last one it always is."""
    return (epochs - epoch) % max(1, epochs // LOOKS) == 0


@torch.no_grad()
def draw_refined(model: MARNet, features: Features, recipe: Recipe, seed: int) -> Tensor:
    """Draw x_CDR of every cached row for each noise draw, each row with its own noise.

    These are ends of whole chains, as classification sees them.

    Returns:
        [draws, V * N, D_s].
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    table = sampler_table(recipe.schedule, "ddpm")
    shape = (len(table.timesteps), 1024, model.denoiser.dim)
    chunks = features.x_v.split(shape[1])
    draws = []
    for _ in range(recipe.fusion_phase.draws):
        found = []
        for x_v in track(chunks, "draw x_CDR"):
            initial = torch.randn(len(x_v), shape[2], generator=generator).to(x_v)
            noise = torch.randn(shape, generator=generator).to(x_v)[:, : len(x_v)]
            found.append(model.refine_in_parts(x_v, table, initial, noise))
        draws.append(torch.cat(found))
    return torch.stack(draws)


def train_head(
    head: nn.Linear,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    run: Progress,
    title: str,
    look: Callable[[nn.Linear], float],
) -> None:
    """Run phase C: train one linear classifier on rows [M, D_f] that do not change any more.

    It starts from the weights that it has and keeps the best on validation, those included, which
    are favoured by `HEAD_GAIN`. It learns on standardised inputs, where one learning rate suits
    every dimension; the standardisation is folded into its weights, which is exact.

    Args:
        look: the score of a head on raw inputs, higher is better.
    """
    phase = recipe.fusion_phase
    mean, std = mean_and_scale(inputs)
    scaled = (inputs - mean) / std
    with torch.no_grad():  # what `fold` undoes
        head.bias.add_(head.weight @ mean)
        head.weight.mul_(std)

    def folded() -> nn.Linear:
        done = copy.deepcopy(head)
        fold(done, mean, std)
        return done

    generator = torch.Generator().manual_seed(seed)
    learner = make_learner(
        [(head, phase.lr)], phase, recipe, title, len(scaled), patience=phase.patience
    )
    learner.consider(look(folded()) + HEAD_GAIN)
    for epoch in run.epochs(title, phase.epochs, learner, generator):
        losses = []
        for rows in batches(len(scaled), phase.batch, generator):
            rows = rows.to(scaled.device)
            losses.append(learner.step(classification_loss(head(scaled[rows]), labels[rows])))
        if finish_epoch(run, learner, epoch, phase.epochs, losses, lambda: look(folded())):
            break
    learner.take_best()
    fold(head, mean, std)

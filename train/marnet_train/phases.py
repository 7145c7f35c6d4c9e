"""The training phases of MARNet: text, and A, the alignment (eq. 13). B is in `refinement`, C in
`heads`. All share one loop, `learn`.

A text phase may come first, for a text encoder from scratch. B trains the denoiser (eq. 20) and C
the final classifier (eq. 24), both on cached features with the encoders frozen: the denoiser's
target is then stationary, and no gradient has to pass through the sampling chain.
Axes: N images, V cached views of each, B batch, L tokens, D_v, D_s, D_f feature widths, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_sdk.console import say, track
from marnet_train.diffusion import alphas_cumprod, q_sample
from marnet_train.features import FrozenFeatures, Images, Source, compute_views
from marnet_train.losses import classification_loss, refinement_loss
from marnet_train.losses.alignment import Alignment, Pairs
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import ImageBranch, MARNet, mean_and_scale
from marnet_train.optimise import Learner, balanced_batches, batches
from marnet_train.parallel import agreed
from marnet_train.progress import Progress
from marnet_train.recipe import AlignmentPhase, FusionPhase, Recipe, RefinementPhase, TextPhase
from marnet_train.semantics import semantic_vectors
from marnet_train.tokens import LastTokens, token_widths

LOOKS = 12  # at validation, in a phase: at least, and fewer than twice as many
HEADS = ("project_vision", "alignment_classifier")  # behind the encoder, in phase A

Look = Callable[[Tensor, Tensor], float]  # mean and deviation of x_v that E_v expects -> score


@dataclass(frozen=True)
class Training:
    """This is one training: its settings, its seed, and how far it is."""

    recipe: Recipe
    seed: int
    run: Progress

    def generator(self) -> torch.Generator:
        """Make the random numbers of a phase, and begin those of dropout anew."""
        torch.manual_seed(self.seed)
        return torch.Generator().manual_seed(self.seed)

    def learner(
        self,
        parts: Sequence[tuple[nn.Module, float]],
        phase: TextPhase | AlignmentPhase | RefinementPhase | FusionPhase,
        title: str,
        count: int,
    ) -> Learner:
        """Make what learns in a phase: `parts`, modules and learning rates, on `count` rows."""
        return Learner(
            parts,
            phase.weight_decay,
            phase.epochs * len(range(0, count, phase.batch)),
            getattr(phase, "warmup", 0.1),  # not every phase has these two
            title=title,
            clip_norm=self.recipe.clip_norm,
            patience=getattr(phase, "patience", None),
        )


def learn(
    training: Training,
    learner: Learner,
    epochs: int,
    generator: torch.Generator,
    order: Callable[[], Iterable[Tensor]],
    loss: Callable[[Tensor], Tensor],
    look: Callable[[], float] | None = None,
) -> None:
    """Run the epochs of a phase. It ends with the weights that score best by `look`, if there is
    one, and otherwise with the last.

    Args:
        generator: of `order` and `loss`, kept with the state of an interrupted run.
        order: makes the rows of each batch of an epoch.
        loss: of a batch, from its rows.
        look: the score of the weights as they are, higher is better; asked `LOOKS` times or more.
    """
    for epoch in training.run.epochs(learner.title, epochs, learner, generator):
        learner.modules.train()
        losses = [learner.step(loss(rows)) for rows in order()]
        line: dict[str, Any] = {"phase": learner.title, "epoch": epoch}
        line["loss"] = sum(losses) / len(losses)
        if look is not None and (epochs - epoch) % max(1, epochs // LOOKS) == 0:
            learner.modules.eval()
            line["score"] = agreed(look())
            learner.consider(line["score"])
        training.run.log(**line)
        if learner.is_done:
            if epoch < epochs:
                say(
                    f"{learner.title}: ends after epoch {epoch} of {epochs}; {learner.patience} "
                    "looks at validation found nothing better"
                )
            break
    learner.take_best()
    learner.modules.eval()


# --- what the phases learn from


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


def _encode_texts(model: MARNet, data: TrainingSet, rows: Tensor) -> Tensor:
    """Compute x_s of some rows, [B, D_s]; they are cut at the longest of them."""
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
def make_features(
    model: MARNet, data: TrainingSet, source: Source, target: Target, recipe: Recipe
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
    x_s = target.x_s
    if x_s is None:
        texts = text_features(model, data)  # [N, D_s]
        model.set_statistics("text", texts)
        x_s = model.standardise_text(texts)
    return Features(x_v, x_s.repeat(len(views), 1), data.labels.to(x_v.device).repeat(len(views)))


@torch.no_grad()
def fold(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Make a layer that learned on standardised inputs take them raw. It is exact."""
    layer.weight.div_(std)
    layer.bias.sub_(layer.weight @ mean)


# --- the text phase


def train_text(model: MARNet, data: TrainingSet, training: Training) -> None:
    """In the text phase F_s and a linear head, which is thrown away, learn the class from text."""
    phase = training.recipe.text_phase
    assert phase is not None
    generator, device = training.generator(), model.text_mean.device
    head = nn.Linear(model.text.dim, len(model.config.labels)).to(device)
    count = len(data.labels)
    parts = [(model.text, phase.lr), (head, phase.lr)]

    def loss(rows: Tensor) -> Tensor:
        logits = head(_encode_texts(model, data, rows))
        return classification_loss(logits, data.labels[rows].to(device))

    learner = training.learner(parts, phase, "text", count)
    order = partial(batches, count, phase.batch, generator)
    learn(training, learner, phase.epochs, generator, order, loss)


# --- phase A


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
    training: Training,
    title: str = "alignment",
    look: Look | None = None,
) -> None:
    """Run phase A: minimise L_EMA (eq. 13) over E_v, E_s, the alignment classifier and, if they
    have a learning rate, F_v and F_s. With `joint`, L_CDR (eq. 20) of one step is added to it.

    E_s learns on standardised x_s and, with frozen features, E_v on standardised x_v; both are
    then folded, so the model takes them raw.
    """
    recipe, device = training.recipe, model.device
    phase = recipe.alignment
    temperature = _Temperature(phase.temperature, learned=phase.learn_temperature).to(device)
    joint = _JointRefinement(model, recipe).to(device) if phase.joint else None
    torch.manual_seed(training.seed)  # of what a loss learns
    widths = token_widths(model) if phase.reads_tokens else None
    align, tokens = Alignment(phase.loss, model.config.dim, widths).to(device), LastTokens()
    heads = nn.ModuleDict(
        {"project_text": model.project_text, "temperature": temperature, "alignment": align}
    )
    if joint is not None:
        heads["joint"] = joint

    def text_loss(step: _Step) -> Tensor:
        rows = step.rows
        if target.x_s is None:
            x_s = _encode_texts(model, data, rows)
        else:
            x_s = target.x_s[rows.to(device)]
            if phase.reads_tokens:  # those of a text encoder that stands still
                with torch.no_grad():
                    _encode_texts(model, data, rows)
        semantic = F.leaky_relu(model.project_text(x_s), LEAKY_SLOPE)
        dedup = phase.dedup_negatives or phase.reads_tokens
        groups = target.groups[rows.to(device)] if dedup else None
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
            tokens.of_batch(len(rows)) if phase.reads_tokens else None,
        )
        loss = phase.ita_weight * align(pairs)
        return loss if joint is None else loss + joint(step.x_v, x_s, step.labels)

    parts: list[tuple[nn.Module, float]] = [(heads, phase.lr_heads)]
    if target.x_s is None:
        parts.append((model.text, phase.lr_text))
    with tokens.of(model) if phase.reads_tokens else nullcontext():
        train_image_branch(model, data, source, training, title, look, parts, text_loss)
    fold(model.project_text, model.text_mean, model.text_std)


def train_image_branch(
    model: ImageBranch,
    data: TrainingSet,
    source: Source,
    training: Training,
    title: str = "baseline",
    look: Look | None = None,
    parts: Sequence[tuple[nn.Module, float]] = (),
    text_loss: Callable[[_Step], Tensor] | None = None,
) -> None:
    """Minimise cross-entropy on x_v', plus `text_loss` of the same batch if there is one.

    Without, it trains the image-only peer: the same encoder, data, order and epochs, and no text.
    With `keep_best`, the weights are kept that score best by `look` on validation.

    Args:
        parts: what learns besides the image branch, with learning rates.
    """
    phase, device = training.recipe.alignment, model.device
    generator = training.generator()
    frozen = isinstance(source, FrozenFeatures)
    mean, std = torch.zeros(1, device=device), torch.ones(1, device=device)
    if isinstance(source, FrozenFeatures):
        mean, std = mean_and_scale(source.views.flatten(0, 1))
    heads = nn.ModuleDict({name: getattr(model, name) for name in HEADS})
    own = [*([] if frozen else [(model.vision, phase.lr_backbone)]), (heads, phase.lr_heads)]
    learner = training.learner([*own, *parts], phase, title, len(source))

    def order() -> Iterable[Tensor]:
        if phase.per_class > 1:
            rows = balanced_batches(data.labels, phase.batch, phase.per_class, generator)
        else:
            rows = batches(len(source), phase.batch, generator)
        return source.ahead(rows)

    def loss(rows: Tensor) -> Tensor:
        labels = data.labels[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, phase.bf16 and device.type == "cuda"):
            x_v = (source(rows, generator, device) - mean) / std
            x_v = F.dropout(x_v, phase.dropout)
            visual = model.align_vision(x_v)  # [B, D]
            logits = model.alignment_classifier(visual)
            found = phase.ce_weight * classification_loss(logits, labels)
            if text_loss is not None:
                done = learner.steps / learner.total
                found = found + text_loss(_Step(x_v, visual, logits, rows, labels, done))
        return found

    judged = partial(look, mean, std) if look is not None and phase.keep_best else None
    with model.vision.learning_in_part(phase.learn_from, keep_statistics=phase.keep_statistics):
        learn(training, learner, phase.epochs, generator, order, loss, judged)
    if frozen:
        fold(model.project_vision, mean, std)


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
        estimate = self.denoiser.estimate(x_t, t, self.standardise(x_v))
        weight = self.phase.norm_weight
        return refinement_loss(
            self.classifier(estimate),
            labels,
            estimate,
            x0,
            ce_weight=self.phase.ce_weight,
            norm_weight=1.0 if weight == "auto" else weight,
        )

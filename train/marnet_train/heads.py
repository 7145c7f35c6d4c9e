"""Phase C: the classifiers of x_CDR and of the fusion (eq. 24), on ends of whole chains; and what
validation makes of any classifier: its score, and its temperature.

Axes: N images, M rows to learn from, D_v, D_s, D_f feature widths, C classes, K noise samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from marnet_sdk.console import track
from marnet_train.diffusion import sampler_table
from marnet_train.evaluate import Labelled, measure, refined_features
from marnet_train.losses import classification_loss
from marnet_train.models.marnet import MARNet, mean_and_scale
from marnet_train.optimise import batches
from marnet_train.phases import Features, Training, fold, learn
from marnet_train.refinement import LOOK_SAMPLES

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the refined branch in the first fusion head
TEMPERATURES = torch.logspace(-1, 1, 81).tolist()  # of a classifier; each 6 % above the last

# By so much of top-1 a trained head must beat the one that it starts from: features of training
# images are easier than others, and on a few hundred images a head can seem better by luck.
HEAD_GAIN = 0.01


# --- what validation chooses by


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


# --- ends of chains


@dataclass(frozen=True, eq=False)
class Ends:
    """These are ends of whole chains: what phase C learns from, and what it is judged by."""

    x_v: Tensor  # of M rows to learn from, [M, D_v]
    x_cdr: Tensor  # [M, D_s]
    labels: Tensor  # [M]
    seen: Labelled  # validation
    judged: Sequence[Tensor]  # x_CDR of validation, [N, D_s] for each noise sample


def draw_ends(model: MARNet, features: Features, seen: Labelled, training: Training) -> Ends:
    """Draw x_CDR for phase C: of the cached rows, several times, and of validation."""
    recipe, seed = training.recipe, training.seed
    draws, table = recipe.fusion_phase.draws, sampler_table(model.config.schedule, "ddpm")
    judged = [refined_features(model, seen.x_v, table, seed, k) for k in range(LOOK_SAMPLES)]
    x_cdr = draw_refined(model, features, training).flatten(0, 1)
    return Ends(features.x_v.repeat(draws, 1), x_cdr, features.labels.repeat(draws), seen, judged)


@torch.no_grad()
def draw_refined(model: MARNet, features: Features, training: Training) -> Tensor:
    """Draw x_CDR of every cached row for each noise draw, each row with its own noise.

    These are ends of whole chains, as classification sees them.

    Returns:
        [draws, V * N, D_s].
    """
    model.eval()
    generator = torch.Generator().manual_seed(training.seed)
    table = sampler_table(model.config.schedule, "ddpm")
    shape = (len(table.timesteps), 1024, model.denoiser.dim)
    chunks = features.x_v.split(shape[1])
    draws = []
    for _ in range(training.recipe.fusion_phase.draws):
        found = []
        for x_v in track(chunks, "draw x_CDR"):
            initial = torch.randn(len(x_v), shape[2], generator=generator).to(x_v)
            noise = torch.randn(shape, generator=generator).to(x_v)[:, : len(x_v)]
            found.append(model.refine_in_parts(x_v, table, initial, noise))
        draws.append(torch.cat(found))
    return torch.stack(draws)


# --- phase C


def train_refined_head(
    model: MARNet, ends: Ends, training: Training, title: str = "refined head"
) -> None:
    """Train the classifier of x_CDR alone, and temper it."""
    _train_tempered(model.semantic_classifier, ends.x_cdr, ends, ends.judged, training, title)


def train_fusion(model: MARNet, ends: Ends, training: Training, title: str = "fusion") -> None:
    """Train the final classifier on the fusion that the model is made for, and temper it."""
    with torch.no_grad():
        if model.config.fusion != "concat":
            aligned, refined = model.branches(ends.x_v, ends.x_cdr)
            model.set_statistics("aligned", aligned)
            model.set_statistics("refined", refined)
        fused = model.fuse(ends.x_v, ends.x_cdr)
        judged = [model.fuse(ends.seen.x_v, x) for x in ends.judged]
    if model.config.fusion == "concat":
        blend(model, partial(_judge_head, judged, ends.seen.labels, by=likelihood))
    _train_tempered(model.classifier, fused, ends, judged, training, title)


def _train_tempered(
    head: nn.Linear,
    inputs: Tensor,
    ends: Ends,
    judged: Sequence[Tensor],
    training: Training,
    title: str,
) -> None:
    """Train a classifier on rows [M, D_f], judged on those of validation, and temper it."""
    look = partial(_judge_head, judged, ends.seen.labels)
    train_head(head, inputs, ends.labels, training, title, look)
    temper(head, judged, ends.seen.labels)


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


def train_head(
    head: nn.Linear,
    inputs: Tensor,
    labels: Tensor,
    training: Training,
    title: str,
    look: Callable[[nn.Linear], float],
) -> None:
    """Train one linear classifier on rows [M, D_f] that do not change any more.

    It starts from the weights that it has and keeps the best on validation, those included, which
    are favoured by `HEAD_GAIN`. It learns on standardised inputs, where one learning rate suits
    every dimension; the standardisation is folded into its weights, which is exact.

    Args:
        look: the score of a head on raw inputs, higher is better.
    """
    phase = training.recipe.fusion_phase
    mean, std = mean_and_scale(inputs)
    scaled = (inputs - mean) / std
    with torch.no_grad():  # what `fold` undoes
        head.bias.add_(head.weight @ mean)
        head.weight.mul_(std)

    def judged() -> float:
        folded = copy.deepcopy(head)
        fold(folded, mean, std)
        return look(folded)

    def loss(rows: Tensor) -> Tensor:
        rows = rows.to(scaled.device)
        return classification_loss(head(scaled[rows]), labels[rows])

    generator = training.generator()
    learner = training.learner([(head, phase.lr)], phase, title, len(scaled))
    learner.consider(judged() + HEAD_GAIN)
    order = partial(batches, len(scaled), phase.batch, generator)
    learn(training, learner, phase.epochs, generator, order, loss, judged)
    fold(head, mean, std)

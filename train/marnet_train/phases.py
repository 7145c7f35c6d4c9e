"""The three training phases of MARNet, each one visible loop.

A trains the encoders and the alignment (eq. 13). B trains the denoiser (eq. 20) and C the final
classifier (eq. 24), both on cached features with the encoders frozen: the denoiser's target is
then stationary, and no gradient has to pass through the sampling chain.
Axes: N images, V cached views of each, B batch, D_v, D_s, D_f feature widths, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from marnet_sdk.console import track
from marnet_sdk.errors import RecipeError
from marnet_train.data.pixels import PixelStore, augment
from marnet_train.diffusion import alphas_cumprod, q_sample, sampler_table
from marnet_train.losses import alignment_loss, classification_loss, refinement_loss
from marnet_train.models.marnet import MARNet
from marnet_train.progress import Progress
from marnet_train.recipe import AlignmentPhase, Recipe


@dataclass(frozen=True)
class TrainingSet:
    """One split, ready for training: images, class indices [N], token ids and mask [N, L]."""

    store: PixelStore
    labels: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Features:
    """Cached features of V augmented views of each image; rows are view-major, [V * N, ...]."""

    x_v: Tensor
    x_s: Tensor
    labels: Tensor


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of one epoch in random order; a last batch of one row is left out, because
    neither batch normalisation nor a contrastive loss is defined on it."""
    if min(count, size) < 2:
        raise RecipeError(f"training needs 2 images and a batch of 2, got {count} and {size}")
    for rows in torch.randperm(count, generator=generator).split(size):
        if len(rows) > 1:
            yield rows


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up over `warmup * total` steps, then a half cosine to 0."""
    rise = max(1, int(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class Learner:
    """What a phase trains: modules, their optimizer and its learning-rate schedule."""

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        warmup: float = 0.1,
    ) -> None:
        self.modules = modules
        self.optimizer = optimizer
        self.total, self.warmup = total, warmup  # steps; share of them
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.steps = 0

    def step(self, loss: Tensor) -> float:
        """Follow the gradient of the loss once, and return the loss."""
        factor = warmup_cosine(self.steps, self.total, self.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RecipeError(f"the loss became {value}; lower the learning rates of the recipe")
        return value

    def state(self) -> dict[str, Tensor]:
        """All that a step changes."""
        state = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return state | {"steps": torch.tensor(self.steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to where `state` was taken. Entries with other names are left alone."""
        self.steps = int(state["steps"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        prefix = "modules."
        self.modules.load_state_dict(
            {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        )


@torch.no_grad()
def text_features(model: MARNet, data: TrainingSet, batch: int = 256) -> Tensor:
    """x_s of every text of the set, [N, D_s], in evaluation mode."""
    model.eval()
    device = model.text_mean.device
    chunks = zip(data.input_ids.split(batch), data.attention_mask.split(batch), strict=True)
    return torch.cat([model.text(ids.to(device), mask.to(device)) for ids, mask in chunks])


def train_alignment(
    model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, run: Progress, title: str
) -> None:
    """Phase A: minimise L_EMA over F_v, E_v, E_s, the alignment classifier and, if it has a
    learning rate, F_s. With ita_weight = 0 this trains the image-only baseline."""
    phase = recipe.alignment
    device = model.vision_mean.device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    uses_text = phase.ita_weight > 0
    frozen_text = None if phase.lr_text > 0 or not uses_text else text_features(model, data)
    count = len(data.store)
    learner = _alignment_learner(model, phase, phase.epochs * len(range(0, count, phase.batch)))
    for epoch in run.epochs(title, phase.epochs, learner, generator):
        model.train()
        losses = []
        for rows in _batches(count, phase.batch, generator):
            pixels = augment(data.store.batch(rows.numpy()), recipe.augment, generator)
            with torch.autocast(device.type, torch.bfloat16, phase.bf16 and device.type == "cuda"):
                visual = model.align_vision(model.vision(pixels.to(device)))  # [B, D]
                logits = model.alignment_classifier(visual)
                labels = data.labels[rows].to(device)
                if uses_text:
                    x_s = _text_of(model, data, rows, frozen_text)
                    loss = alignment_loss(
                        logits,
                        labels,
                        visual,
                        model.align_text(x_s),
                        ce_weight=phase.ce_weight,
                        ita_weight=phase.ita_weight,
                        temperature=phase.temperature,
                    )
                else:
                    loss = phase.ce_weight * classification_loss(logits, labels)
            losses.append(learner.step(loss))
        run.log(phase=title, epoch=epoch, loss=sum(losses) / len(losses))


def train_baseline(
    model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, run: Progress
) -> None:
    """The image-only peer: the same encoder, data, order and epochs, without any text."""
    image_only = replace(recipe, alignment=replace(recipe.alignment, ita_weight=0.0))
    train_alignment(model, data, image_only, seed, run, "baseline")


def _alignment_learner(model: MARNet, phase: AlignmentPhase, total: int) -> Learner:
    heads = nn.ModuleList([model.project_vision, model.project_text, model.alignment_classifier])
    learned = nn.ModuleList([model.vision, heads])
    rates = [phase.lr_backbone, phase.lr_heads]
    if phase.lr_text > 0:
        learned.append(model.text)
        rates.append(phase.lr_text)
    groups = [
        {"params": list(module.parameters()), "lr": rate}
        for module, rate in zip(learned, rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=phase.weight_decay)
    return Learner(learned, optimizer, total, phase.warmup)


def _text_of(model: MARNet, data: TrainingSet, rows: Tensor, frozen: Tensor | None) -> Tensor:
    """x_s of some rows: looked up when the text encoder is frozen, computed when it learns."""
    if frozen is not None:
        return frozen[rows.to(frozen.device)]
    device = model.vision_mean.device
    mask = data.attention_mask[rows].to(device)
    longest = int(mask.sum(dim=1).max())
    ids = data.input_ids[rows, :longest].to(device)
    return model.text(ids, mask[:, :longest])


def mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """What standardises the rows of x, [N, D]: mean and standard deviation, both [D].

    A dimension that never varies carries nothing: its scale is left alone, 1.
    """
    std = x.std(dim=0, correction=0)
    return x.mean(dim=0), torch.where(std > 1e-6, std, torch.ones_like(std))


@torch.no_grad()
def cache_features(
    model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, batch: int = 256
) -> Features:
    """x_v of `views` augmented views of each image and x_s of its text, encoders frozen.

    Stores the mean and standard deviation of both in the model's buffers.
    """
    model.eval()
    device = model.vision_mean.device
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in track(range(recipe.refinement.views), "cache features"):
        for start in range(0, len(data.store), batch):
            pixels = data.store.batch(slice(start, start + batch))
            views.append(model.vision(augment(pixels, recipe.augment, generator).to(device)))
    x_v = torch.cat(views)  # [V * N, D_v]
    x_s = text_features(model, data)  # [N, D_s]
    for name, x in (("vision", x_v), ("text", x_s)):
        mean, std = mean_and_scale(x)
        getattr(model, f"{name}_mean").copy_(mean)
        getattr(model, f"{name}_std").copy_(std)
    repeats = recipe.refinement.views
    return Features(x_v, x_s.repeat(repeats, 1), data.labels.to(device).repeat(repeats))


def train_refinement(
    model: MARNet, features: Features, recipe: Recipe, seed: int, run: Progress
) -> None:
    """Phase B: minimise L_CDR over the denoiser and its classifier, t ~ Uniform{1..T} per row."""
    phase = recipe.refinement
    device = features.x_v.device
    generator = torch.Generator().manual_seed(seed)
    abar = torch.as_tensor(alphas_cumprod(recipe.schedule), dtype=torch.float32, device=device)
    condition = model.condition(features.x_v).clone()
    target = model.standardise_text(features.x_s).clone()
    learned = nn.ModuleList([model.denoiser, model.semantic_classifier])
    optimizer = torch.optim.AdamW(
        learned.parameters(), lr=phase.lr, weight_decay=phase.weight_decay
    )
    count = len(condition)
    learner = Learner(learned, optimizer, phase.epochs * len(range(0, count, phase.batch)))
    model.train()
    for epoch in run.epochs("refinement", phase.epochs, learner, generator):
        losses = []
        for rows in _batches(count, phase.batch, generator):
            t = torch.randint(1, recipe.schedule.steps + 1, (len(rows),), generator=generator)
            noise = torch.randn(len(rows), target.shape[1], generator=generator).to(device)
            x0 = target[rows.to(device)]  # [B, D_s]
            x_t = q_sample(x0, t.to(device), noise, abar)
            estimate = model.denoiser(x_t, t.to(device), condition[rows.to(device)])
            loss = refinement_loss(
                model.semantic_classifier(estimate),
                features.labels[rows.to(device)],
                estimate,
                x0,
                ce_weight=phase.ce_weight,
                mse_weight=phase.mse_weight,
            )
            losses.append(learner.step(loss))
        run.log(phase="refinement", epoch=epoch, loss=sum(losses) / len(losses))


@torch.no_grad()
def draw_fused(model: MARNet, features: Features, recipe: Recipe, seed: int) -> Tensor:
    """x_f of every cached row for each noise draw, each row with its own noise.

    Returns:
        [draws * V * N, D_f].
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    table = sampler_table(recipe.schedule, "ddpm")
    shape = (len(table.timesteps), 256, model.denoiser.dim)
    rows = features.x_v.split(shape[1])
    fused = []
    for _ in range(recipe.fusion_phase.draws):
        for x_v in track(rows, "draw x_CDR"):
            initial = torch.randn(len(x_v), shape[2], generator=generator).to(x_v)
            noise = torch.randn(shape, generator=generator).to(x_v)[:, : len(x_v)]
            fused.append(model.fuse(x_v, model.refine(x_v, table, initial, noise)))
    return torch.cat(fused)


def train_fusion(
    model: MARNet, features: Features, recipe: Recipe, seed: int, run: Progress
) -> None:
    """Phase C: train only the final classifier on x_f.

    It learns on standardised x_f, where one learning rate suits every dimension; the
    standardisation is then folded into its weights, which is exact.
    """
    phase = recipe.fusion_phase
    fused = draw_fused(model, features, recipe, seed).clone()
    labels = features.labels.repeat(phase.draws)
    mean, std = mean_and_scale(fused)
    fused = (fused - mean) / std
    generator = torch.Generator().manual_seed(seed)
    head = model.classifier
    optimizer = torch.optim.AdamW(head.parameters(), lr=phase.lr, weight_decay=phase.weight_decay)
    learner = Learner(head, optimizer, phase.epochs * len(range(0, len(fused), phase.batch)))
    for epoch in run.epochs("fusion", phase.epochs, learner, generator):
        losses = []
        for rows in _batches(len(fused), phase.batch, generator):
            rows = rows.to(fused.device)
            losses.append(learner.step(classification_loss(head(fused[rows]), labels[rows])))
        run.log(phase="fusion", epoch=epoch, loss=sum(losses) / len(losses))
    with torch.no_grad():
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)

"""Accuracy of a trained model on images alone.

Axes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marnet_sdk.errors import RecipeError
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.data.imagefolder import Example
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import SamplerTable, sampler_table, trajectory_tensors
from marnet_train.models.marnet import MARNet


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose label is the arg-max / among the five largest logits."""

    top1: float
    top5: float
    images: int


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 and top-5 accuracy; of equal logits the first counts. [N, K], [N] -> fractions of N.

    Raises:
        RecipeError: a logit is NaN or infinite.
    """
    count = logits.shape[0]
    if wrong := int((~torch.isfinite(logits)).any(dim=1).sum()):
        raise RecipeError(
            f"{wrong} of {count} images got NaN or infinite logits, expected finite ones: the "
            "training diverged; lower the learning rates of the recipe and train again"
        )
    # Not topk: its order among equal logits is arbitrary.
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]  # [N, 5]
    hit = best == labels[:, None].to(best.device)
    return Accuracy(
        top1=float(hit[:, 0].float().mean()),
        top5=float(hit.any(dim=1).float().mean()),
        images=count,
    )


def label_tensor(examples: Sequence[Example], labels: Sequence[str]) -> Tensor:
    """Class indices of the examples, int64 [N]."""
    index = {label: i for i, label in enumerate(labels)}
    return torch.tensor([index[example.label] for example in examples])


@torch.no_grad()
def visual_features(model: MARNet, store: PixelStore, batch: int = 256) -> Tensor:
    """x_v of every image of the store, [N, D_v], in evaluation mode."""
    model.eval()
    device = model.vision_mean.device
    rows = range(0, len(store), batch)
    return torch.cat([model.vision(store.batch(slice(i, i + batch)).to(device)) for i in rows])


@torch.no_grad()
def refined_features(model: MARNet, x_v: Tensor, table: SamplerTable, seed: int) -> Tensor:
    """x_CDR of every row, [N, D_s], on the shared noise trajectory of `seed`."""
    width = model.denoiser.dim
    trajectory = draw_trajectory(seed, table.timesteps, table.train_steps, width)
    return model.refine(x_v, table, *trajectory_tensors(trajectory, x_v.shape[0], x_v))


@torch.no_grad()
def evaluate_branches(
    model: MARNet, x_v: Tensor, labels: Tensor, seeds: Sequence[int]
) -> dict[str, list[Accuracy]]:
    """Accuracy of each branch and of the whole, one entry per noise seed.

    alignment: the classifier on x_EMA alone (no noise, so a single entry). refined: the one on
    x_CDR alone. marnet: the final classifier on the fusion of both.
    """
    model.eval()
    table = sampler_table(model.config.schedule, "ddpm")
    out: dict[str, list[Accuracy]] = {
        "alignment": [accuracy(model.alignment_classifier(model.align_vision(x_v)), labels)],
        "refined": [],
        "marnet": [],
    }
    for seed in seeds:
        x_cdr = refined_features(model, x_v, table, seed)
        out["refined"].append(accuracy(model.semantic_classifier(x_cdr), labels))
        out["marnet"].append(accuracy(model.classifier(model.fuse(x_v, x_cdr)), labels))
    return out

"""Accuracy of a trained model on images alone.

Axes: N images, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marnet_sdk.errors import DataError, EnvironmentMismatch, InvalidInput, RecipeError
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.dataset import read_one_split
from marnet_train.data.examples import DataSet, Example
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import SamplerTable, sampler_table, trajectory_tensors
from marnet_train.models.marnet import MARNet

NOISE_SEEDS = (0, 1, 2, 3, 4)  # accuracy is reported over these; 0 is the one that is served


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


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; `auto` is the CUDA device if there is one, else the CPU.

    Raises:
        EnvironmentMismatch: a CUDA device is asked for where there is none.
        InvalidInput: none of these names.
    """
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", name):  # not torch's mps, meta, ...
        raise InvalidInput(f"--device {name!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentMismatch(
            f"--device {name}: no CUDA device that torch {torch.__version__} can use; "
            "choose --device cpu, or install a CUDA build of torch"
        )
    return torch.device(name)


def evaluate_baseline(
    model: MARNet, folder: DataSet, stores: dict[str, PixelStore]
) -> dict[str, Any]:
    """split -> top1, top5, images of the image-only baseline."""
    out = {}
    for split, store in stores.items():
        with torch.no_grad():
            x_v = visual_features(model, store)
            logits = model.alignment_classifier(model.align_vision(x_v))
        labels = label_tensor(folder.splits[split], folder.labels)
        out[split] = asdict(accuracy(logits.cpu(), labels))
    return out


def evaluate_marnet(
    model: MARNet, folder: DataSet, stores: dict[str, PixelStore]
) -> dict[str, Any]:
    """branch -> split -> what `_branches` gives."""
    out: dict[str, Any] = {}
    for split, store in stores.items():
        for branch, found in _branches(model, store, folder.splits[split]).items():
            out.setdefault(branch, {})[split] = found
    return out


def _branches(
    model: MARNet, store: PixelStore, examples: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """branch -> top1, top5 at the served noise seed, and top-1 at each of `NOISE_SEEDS`."""
    labels = label_tensor(examples, model.config.labels).to(model.vision_mean.device)
    found = evaluate_branches(model, visual_features(model, store), labels, NOISE_SEEDS)
    return {
        branch: asdict(per_seed[0]) | {"top1_over_noise_seeds": [m.top1 for m in per_seed]}
        for branch, per_seed in found.items()
    }


def evaluate_checkpoint(
    path: Path, data: Path, split: str, device: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Accuracy of each branch of a checkpoint on one split of a data set.

    Raises:
        NotFound: there is no such checkpoint, data set or split.
        DataError: the split has a class that the checkpoint does not know.
    """
    examples = read_one_split(data, split)
    checkpoint = load_checkpoint(path)
    if unknown := sorted({e.label for e in examples} - set(checkpoint.labels)):
        raise DataError(
            f"{split} of {data} has classes that {path} was not trained on: {unknown[:5]}; "
            f"it knows {list(checkpoint.labels)[:5]} ..."
        )
    store = PixelStore(examples, checkpoint.preprocess, split)
    return _branches(checkpoint.model.to(pick_device(device)), store, examples)

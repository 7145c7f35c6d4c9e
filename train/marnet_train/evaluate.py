"""Accuracy of a trained model on images alone.

Axes: N images, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marnet_sdk.console import track
from marnet_sdk.errors import DataError, EnvironmentMismatch, InvalidInput, RecipeError
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import Checkpoint, load_checkpoint
from marnet_train.data.dataset import read_one_split
from marnet_train.data.examples import Example
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import SamplerTable, sampler_table, trajectory_tensors
from marnet_train.features import compute_views
from marnet_train.models.marnet import ImageBranch, MARNet
from marnet_train.models.seda import SeDA
from marnet_train.recipe import Augment

NOISE_SEEDS = (0, 1, 2)  # accuracy is the mean over these; 0 is the one that is served


def label_tensor(examples: Sequence[Example], labels: Sequence[str]) -> Tensor:
    """Return the class indices of the examples, int64 [N]."""
    index = {label: i for i, label in enumerate(labels)}
    return torch.tensor([index[example.label] for example in examples])


@dataclass(frozen=True, eq=False)
class Labelled:
    """This is a split that is looked at, not learned from: x_v [N, D_v], class indices [N]."""

    x_v: Tensor
    labels: Tensor


@torch.no_grad()
def see(model: ImageBranch, x_v: Tensor, batch: int = 1024) -> Tensor:
    """Make what everything behind the encoder gets of image features, [N, D_v] -> [N, ...]."""
    return torch.cat([model.see(rows) for rows in x_v.split(batch)])


def behind(model: ImageBranch, split: Labelled) -> Labelled:
    """Return a split as everything behind a model's encoder gets it."""
    return replace(split, x_v=see(model, split.x_v))


@dataclass(frozen=True, eq=False)
class Measured:
    """This says how good one branch is on one split."""

    top1: float  # mean over the noise seeds, as all below
    top5: float
    images: int
    samples: int  # K, whose probabilities are averaged; 0: there is no noise in it
    top1_over_noise_seeds: list[float]
    top1_one_sample: float  # with K = 1, mean over all samples of all seeds
    correct: Tensor  # [N], share of the noise seeds at which the image is classified right

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data; not image by image."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "correct"}


@torch.no_grad()
def refined_features(
    model: MARNet, x_v: Tensor, table: SamplerTable, seed: int, sample: int = 0, batch: int = 1024
) -> Tensor:
    """Compute x_CDR of every row, [N, D_s], on one shared noise trajectory of `seed`."""
    width = model.denoiser.dim
    drawn = draw_trajectory(seed, table.timesteps, table.train_steps, width, trajectory=sample)
    return torch.cat(
        [
            model.refine_in_parts(x, table, *trajectory_tensors(drawn, len(x), x))
            for x in x_v.split(batch)
        ]
    )


@torch.no_grad()
def head_probabilities(
    model: MARNet, x_v: Tensor, x_cdr: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the refined branch's and the whole's probabilities by noise sample: two [K, N, C].

    Args:
        x_cdr: ends of chains, [N, D_s] for each noise sample.
    """
    model.eval()
    refined = torch.stack([model.semantic_classifier(x).softmax(dim=1) for x in x_cdr])
    return refined, torch.stack([model.head(x_v, x)[0].softmax(dim=1) for x in x_cdr])


def sample_probabilities(
    model: MARNet, x_v: Tensor, table: SamplerTable, seed: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Run `samples` chains of every row, and return their `head_probabilities`."""
    model.eval()
    x_cdr = [refined_features(model, x_v, table, seed, sample) for sample in range(samples)]
    return head_probabilities(model, x_v, x_cdr)


def measure(probabilities: Tensor, labels: Tensor) -> Measured:
    """Measure a branch without noise, from [N, C] probabilities or logits.

    Of equal ones the first counts.

    Raises:
        RecipeError: some are NaN or infinite.
    """
    count = len(labels)
    if wrong := int((~torch.isfinite(probabilities)).any(dim=1).sum()):
        raise RecipeError(
            f"{wrong} of {count} images got NaN or infinite logits, expected finite ones: the "
            "training diverged; lower the learning rates of the recipe and train again"
        )
    # Not topk, whose order among equal ones is arbitrary.
    best = probabilities.sort(dim=1, descending=True, stable=True).indices[:, :5]
    hit = (best == labels[:, None].to(best.device)).float()
    top1, top5 = float(hit[:, 0].mean()), float(hit.amax(dim=1).mean())
    return Measured(top1, top5, count, 0, [top1], top1, hit[:, 0])


def measure_sampled(by_seed: Sequence[Tensor], labels: Tensor) -> Measured:
    """Measure accuracy of a branch with noise, from [K, N, C] probabilities for each noise seed."""
    served = [measure(probabilities.mean(dim=0), labels) for probabilities in by_seed]
    single = [measure(one, labels).top1 for probabilities in by_seed for one in probabilities]
    return Measured(
        top1=_mean([m.top1 for m in served]),
        top5=_mean([m.top5 for m in served]),
        images=len(labels),
        samples=len(by_seed[0]),
        top1_over_noise_seeds=[m.top1 for m in served],
        top1_one_sample=_mean(single),
        correct=torch.stack([m.correct for m in served]).mean(dim=0),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def measure_image_branch(model: ImageBranch, split: Labelled) -> Measured:
    """Measure the classifier on x_v' alone: the baseline's, or MARNet's alignment branch."""
    model.eval()
    return measure(model.alignment_logits(split.x_v), split.labels)


@torch.no_grad()
def measure_branches(model: MARNet, split: Labelled) -> dict[str, Measured]:
    """Measure accuracy of each branch and of the whole, by the reverse process as it is trained.

    alignment: the classifier on x_EMA alone. semantic: the one on SeDA's semantic vector. refined:
    the one on x_CDR alone. marnet: the final classifier on the fusion of both. K is the model's
    own; the noise seeds are `NOISE_SEEDS`.
    """
    table = sampler_table(model.config.schedule, "ddpm")
    drawn = [
        sample_probabilities(model, split.x_v, table, seed, model.config.samples)
        for seed in track(NOISE_SEEDS, "evaluate")
    ]
    semantic = {}
    if isinstance(model, SeDA):
        semantic = {"semantic": measure(model.semantic_logits(split.x_v), split.labels)}
    return {
        "alignment": measure_image_branch(model, split),
        **semantic,
        "refined": measure_sampled([refined for refined, _ in drawn], split.labels),
        "marnet": measure_sampled([whole for _, whole in drawn], split.labels),
    }


def pick_device(name: str) -> torch.device:
    """Find a device by its name: auto, cpu, cuda or cuda:N.

    `auto` is the CUDA device if there is one, else the CPU.

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


def evaluate_checkpoint(
    path: Path, data: Path, split: str, device: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Measure the accuracy of each branch of a checkpoint on one split of a data set.

    Raises:
        NotFound: there is no such checkpoint, data set or split.
        DataError: the split has a class that the checkpoint does not know.
    """
    examples = read_one_split(data, split)
    checkpoint, store, labels = open_checkpoint(path, examples, f"{split} of {data}", device)
    x_v = compute_views(checkpoint.model.vision, store, Augment(), 1)[0]
    found = measure_branches(checkpoint.model, behind(checkpoint.model, Labelled(x_v, labels)))
    return {branch: measured.to_dict() for branch, measured in found.items()}


def open_checkpoint(
    path: Path, examples: Sequence[Example], where: str, device: str
) -> tuple[Checkpoint, PixelStore, Tensor]:
    """Load a checkpoint onto a device, with images as it takes them and their classes, [N].

    Args:
        where: what errors call the examples.

    Raises:
        NotFound: there is no such checkpoint.
        DataError: the examples have a class that the checkpoint does not know.
    """
    checkpoint = load_checkpoint(path)
    if unknown := sorted({e.label for e in examples} - set(checkpoint.labels)):
        raise DataError(
            f"{where} has classes that {path} was not trained on: {unknown[:5]}; "
            f"it knows {list(checkpoint.labels)[:5]} ..."
        )
    store = PixelStore(examples, checkpoint.preprocess, where)
    model = checkpoint.model.to(pick_device(device))
    return checkpoint, store, label_tensor(examples, checkpoint.labels).to(model.device)

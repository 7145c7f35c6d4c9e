"""A training so small that a test can have one of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marnet_train.assemble import Prepared, prepare
from marnet_train.data.examples import DataSet
from marnet_train.data.imagefolder import read_split, write_split
from marnet_train.diffusion import ScheduleConfig
from marnet_train.progress import Progress
from marnet_train.recipe import AlignmentPhase, Augment, FusionPhase, Recipe, RefinementPhase

LABELS = tuple("0123456789")
CPU = torch.device("cpu")

TINY = Recipe(
    vision={
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    text={
        "model_type": "bert",
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    },
    dim=12,
    hidden=16,
    time_dim=4,
    max_tokens=48,
    image={"size": {"height": 8, "width": 8}, "image_mean": [0.3] * 3, "image_std": [0.35] * 3},
    schedule=ScheduleConfig(steps=8),
    augment=Augment(rotate=12, shift=0.08, scale=0.12),
    alignment=AlignmentPhase(epochs=2, batch=16, lr_backbone=1e-2, lr_heads=1e-2),
    refinement=RefinementPhase(epochs=2, batch=49, lr=1e-2, views=2),
    fusion_phase=FusionPhase(epochs=2, batch=49, draws=2),
)


def change(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other settings; those of a phase are given as a dictionary."""
    return replace(
        recipe,
        **{
            name: replace(getattr(recipe, name), **value)
            if isinstance(value, Mapping) and name not in ("vision", "text", "image")
            else value
            for name, value in settings.items()
        },
    )


SEDA = change(
    replace(TINY, method="seda", semantic_schedule=ScheduleConfig(steps=6), semantic_steps=3),
    semantic={"epochs": 2, "batch": 49, "lr": 1e-2},
)


# Images and texts have features of one width, so that a chain can lead from those to these.
CARRY = change(replace(SEDA, handover="carry"), text={**SEDA.text, "hidden_size": 8})


def small_data(digits: Path, **counts: int) -> DataSet:
    """The first images of each split of the digits: 49, 30 and 20 unless asked otherwise."""
    counts = {"train": 49, "val": 30, "test": 20} | counts
    splits = {
        split: tuple(read_split(digits / split, needs_text=True)[:count])
        for split, count in counts.items()
        if count
    }
    return DataSet(digits, LABELS, splits)


def make_ready(digits: Path, recipe: Recipe = TINY, seed: int = 0, **counts: int) -> Prepared:
    """A training of the small data that can begin."""
    return prepare(small_data(digits, **counts), recipe, seed, CPU)


def write_small(digits: Path, folder: Path, **counts: int) -> Path:
    """A data set of the first images of each split of the digits: 49, 30 and 20 unless asked."""
    for split, examples in small_data(digits, **counts).splits.items():
        rows = ((e.image.name, e.image.read_bytes(), e.label, e.text) for e in examples)
        write_split(folder / split, rows)
    return folder


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file: tables of plain values."""

    def lines(content: dict[str, Any], where: str = "") -> Iterator[str]:
        plain = {k: v for k, v in content.items() if not isinstance(v, dict) and v is not None}
        yield from (f"{key} = {json.dumps(list(v) if isinstance(v, tuple) else v)}"
                    for key, v in plain.items())  # fmt: skip
        for key, value in content.items():
            if isinstance(value, dict):
                yield f"[{where}{key}]"
                yield from lines(value, f"{where}{key}.")

    path.write_text("\n".join(lines(recipe.to_dict())))
    return path


class Stop(KeyboardInterrupt):
    """Plays the interrupt of Ctrl-C, and is told apart from a real one."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, phase: str, epoch: int) -> None:
    """Stop in the epoch after the one named, before it could be saved."""
    log = Progress.log

    def log_or_stop(self: Progress, **line: Any) -> None:
        log(self, **line)
        if (line["phase"], line["epoch"]) == (phase, epoch + 1):
            raise Stop

    monkeypatch.setattr(Progress, "log", log_or_stop)

"""This module makes a checkpoint from a data set and a recipe: the three phases, the baseline, the
evaluation.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marnet_sdk.console import say
from marnet_sdk.environment import versions
from marnet_sdk.errors import InvalidInput
from marnet_sdk.outputs import atomic_directory, check_output
from marnet_train.assemble import prepare
from marnet_train.board import Board
from marnet_train.card import model_card
from marnet_train.checkpoint import (
    SAMPLES,
    TRAINING,
    is_checkpoint,
    write_baseline,
    write_json,
    write_model,
)
from marnet_train.data.dataset import DataSet, Example, data_hash, read_data_set
from marnet_train.data.examples import image_suffix, read_image
from marnet_train.data.imagefolder import write_split
from marnet_train.evaluate import pick_device
from marnet_train.parallel import joined, rank, size
from marnet_train.progress import METRICS, Progress, partial_folder, saved_progress, threads_of
from marnet_train.recipe import Recipe, chosen
from marnet_train.report import BRANCHES, differences
from marnet_train.stages import Split, Trained, measure_all, train_all
from marnet_train.threads import training_threads

MAX_SAMPLES = 512
PACKAGES = ("marnet", "torch", "transformers", "tokenizers", "numpy", "pillow")


def fit(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    name: str = "custom",
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    keep_samples: bool = True,
    tensorboard: Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Train on `data` and write a checkpoint to `out`.

    On the CPU, the same seed, threads, processor and versions give the same weights, also when the
    training was interrupted: what it has done is kept in `OUT.partial`, and another call with the
    same settings goes on from there. Several processes that torchrun starts train together; see
    `marnet_train.parallel`. They keep nothing to go on from.

    Args:
        threads: CPU threads to compute with; None: those that an interrupted training had, else
            one for each core that this process may use and no other program takes at the start.
        tensorboard: folder for TensorBoard's event files, besides metrics.jsonl.
        overwrite: replace the checkpoint at `out`.
        restart: discard what an interrupted training to `out` has done.

    Returns:
        The content of training.json: recipe, seed, metrics, data hash, seconds, machine, versions.

    Raises:
        DataError, RecipeError, InvalidInput, OutputExists: before any training.
        MissingExtra: `tensorboard` is given and the package is not installed.
        OutputBusy: another process is training to `out`.
        OutputError: no space left, or `out` must not be written to.
    """
    check_apart(data, out)
    if tensorboard is not None and tensorboard.resolve().is_relative_to(out.resolve()):
        raise InvalidInput(
            f"--tensorboard {tensorboard} lies in --out {out}, which appears whole at the end; "
            "expected another folder: choose one such as runs/board"
        )
    check_output(out, overwrite=overwrite, replaceable=is_checkpoint)
    with (
        training_threads(threads, None if restart else threads_of([partial_folder(out)])),
        joined(pick_device(device)) as target,
        _board(tensorboard) as board,
    ):
        folder = read_data_set(data)
        for warning in folder.warnings:
            say(f"warning: {warning}")
        decisive = {"seed": seed, **provenance(folder, target), "settings": recipe.to_dict()}
        if size() > 1:  # nothing is kept to go on from
            progress = nullcontext(Progress(board=board))
        else:
            progress = saved_progress(out, decisive, restart=restart, board=board)
        with progress as run:
            ready = prepare(folder, recipe, seed, target)
            trained = train_all(ready.model, ready.data, ready.splits["val"], recipe, seed, run)
            found = {
                split: run.once(
                    f"evaluation on {split}", trained.modules, partial(_evaluate, trained, where)
                )
                for split, where in ready.splits.items()
            }
            training = {
                "recipe": name,
                "seconds": round(run.seconds, 1),
                "metrics": {
                    branch: {split: seen["metrics"][branch] for split, seen in found.items()}
                    for branch in BRANCHES
                    if branch in found["val"]["metrics"]
                },
                "differences": {split: seen["differences"] for split, seen in found.items()},
                "chosen": chosen(recipe, trained.recipe),
                **decisive,
            }
            if rank() > 0:
                return training
            with atomic_directory(out, overwrite=overwrite, replaceable=is_checkpoint) as fresh:
                write_model(fresh, trained.model, ready.preprocess)
                write_baseline(fresh, trained.baseline)
                ready.tokenizer.save_pretrained(fresh)
                write_json(fresh / TRAINING, training)
                (fresh / METRICS).write_text(run.log_lines(), "utf-8")
                if keep_samples:
                    _write_samples(fresh / SAMPLES, folder.splits["val"], seed)
                (fresh / "README.md").write_text(model_card(out, training, folder.labels), "utf-8")
    return training


def provenance(folder: DataSet, device: torch.device) -> dict[str, Any]:
    """Return what beside recipe and seed decides the weights: data, machine and versions."""
    return {
        "data": {
            "sha256": data_hash(folder),
            "images": {split: len(rows) for split, rows in folder.splits.items()},
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "device": str(device),
            "processor": platform.machine(),
            **({"processes": size()} if size() > 1 else {}),
        },
        "versions": versions(PACKAGES),
    }


def check_apart(data: Path, out: Path) -> None:
    """Check that the data are neither in `out`, which may be replaced, nor around it."""
    source, target = data.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise InvalidInput(
            f"--out {out} and --data {data} are, or lie in, the same folder; expected two folders "
            "apart: choose another --out, such as runs/NAME"
        )


@contextmanager
def _board(folder: Path | None) -> Iterator[Board | None]:
    """Open a board in `folder`, if there is one and this process writes."""
    if folder is None or rank() > 0:
        yield None
    else:
        with closing(Board(folder)) as board:
            yield board


def _evaluate(trained: Trained, split: Split) -> dict[str, Any]:
    found = measure_all(trained, split)
    return {
        "metrics": {branch: measured.to_dict() for branch, measured in found.items()},
        "differences": differences(found),
    }


def _write_samples(target: Path, examples: Sequence[Example], seed: int) -> None:
    """Copy up to `MAX_SAMPLES` validation images with their labels and texts."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:MAX_SAMPLES]
    rows = ((i, examples[i]) for i in sorted(chosen))
    read = ((i, e, read_image(e)) for i, e in rows)
    # Numbered: images of different sub-folders may share a name. By content: a copy of the
    # checkpoint has files with the usual endings only.
    named = ((f"{i:06d}{image_suffix(c)}", c, e.label, e.text) for i, e, c in read)
    write_split(target, named)

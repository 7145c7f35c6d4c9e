"""From a data set and a recipe to a checkpoint: the three phases, the baseline, the evaluation."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from marnet_sdk.console import say
from marnet_sdk.environment import versions
from marnet_sdk.errors import InvalidInput
from marnet_sdk.files import atomic_directory, check_output
from marnet_sdk.preprocess import Preprocess
from marnet_train.assemble import (
    build_model,
    make_preprocess,
    make_tokenizer,
    make_training_set,
)
from marnet_train.card import model_card
from marnet_train.checkpoint import (
    SAMPLES,
    TRAINING,
    is_checkpoint,
    write_json,
    write_model,
)
from marnet_train.data.dataset import DataSet, Example, data_hash, read_data_set
from marnet_train.data.imagefolder import write_split
from marnet_train.data.pixels import PixelStore
from marnet_train.evaluate import evaluate_baseline, evaluate_marnet, pick_device
from marnet_train.models.marnet import MARNet
from marnet_train.phases import (
    TrainingSet,
    cache_features,
    train_alignment,
    train_baseline,
    train_fusion,
    train_refinement,
)
from marnet_train.progress import METRICS, Progress, saved_progress
from marnet_train.recipe import Recipe

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
    overwrite: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Train on `data` and write a checkpoint to `out`.

    On the CPU, the same seed, threads, processor and versions give the same weights, also when the
    training was interrupted: what it has done is kept in `OUT.partial`, and another call with the
    same settings goes on from there.

    Args:
        threads: CPU threads to compute with; None leaves torch's own number.
        overwrite: replace the checkpoint at `out`.
        restart: discard what an interrupted training to `out` has done.

    Returns:
        The content of training.json: recipe, seed, metrics, data hash, seconds, machine, versions.

    Raises:
        DataError, RecipeError, InvalidInput, OutputExists: before any training.
        OutputBusy: another process is training to `out`.
        OutputError: no space left, or `out` must not be written to.
    """
    _check_apart(data, out)
    check_output(out, overwrite=overwrite, replaceable=is_checkpoint)
    with _threads(threads):
        target = pick_device(device)
        folder = read_data_set(data)
        decisive = {"seed": seed, **_provenance(folder, target), "settings": recipe.to_dict()}
        with saved_progress(out, decisive, restart=restart) as run:
            tokenizer, preprocess = make_tokenizer(recipe, folder), make_preprocess(recipe)
            model, metrics = _train_both(folder, tokenizer, preprocess, recipe, seed, target, run)
            training = {
                "recipe": name,
                "seconds": round(run.seconds, 1),
                "metrics": metrics,
                **decisive,
            }
            with atomic_directory(out, overwrite=overwrite, replaceable=is_checkpoint) as fresh:
                write_model(fresh, model, preprocess)
                tokenizer.save_pretrained(fresh)
                write_json(fresh / TRAINING, training)
                (fresh / METRICS).write_text(run.log_lines(), "utf-8")
                if keep_samples:
                    _write_samples(fresh / SAMPLES, folder.splits["val"], seed)
                (fresh / "README.md").write_text(model_card(out, training, folder.labels), "utf-8")
    return training


def _provenance(folder: DataSet, device: torch.device) -> dict[str, Any]:
    """What beside recipe and seed decides the weights: data, machine and versions."""
    return {
        "data": {
            "sha256": data_hash(folder),
            "images": {split: len(rows) for split, rows in folder.splits.items()},
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "device": str(device),
            "processor": platform.machine(),
        },
        "versions": versions(PACKAGES),
    }


def _check_apart(data: Path, out: Path) -> None:
    """`out` may be replaced, so the data must be neither in it nor around it."""
    source, target = data.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise InvalidInput(
            f"--out {out} and --data {data} are, or lie in, the same folder; expected two folders "
            "apart: choose another --out, such as runs/NAME"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with that many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_both(
    folder: DataSet,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    run: Progress,
) -> tuple[MARNet, dict[str, Any]]:
    """The image-only baseline, then MARNet from the same initial weights; and both's metrics."""
    # Built first: what is wrong with a recipe should show before every image has been decoded.
    model = build_model(recipe, folder.labels, tokenizer, seed)
    training_set = make_training_set(folder, preprocess, tokenizer, recipe)
    stores = {
        split: PixelStore(examples, preprocess, split)
        for split, examples in folder.splits.items()
        if split != "train"
    }

    def image_only() -> dict[str, Any]:
        baseline = build_model(recipe, folder.labels, tokenizer, seed).to(device)
        train_baseline(baseline, training_set, recipe, seed, run)
        return evaluate_baseline(baseline, folder, stores)

    # Of the baseline only its figures are kept.
    metrics = {"baseline": run.once("baseline", None, image_only)}
    say(_line("baseline", metrics["baseline"]))
    model = model.to(device)
    train_marnet(model, training_set, recipe, seed, run)
    metrics |= evaluate_marnet(model, folder, stores)
    for branch in ("alignment", "refined", "marnet"):
        say(_line(branch, metrics[branch]))
    return model, metrics


def train_marnet(
    model: MARNet, data: TrainingSet, recipe: Recipe, seed: int, run: Progress
) -> None:
    """Phases A, B and C, in order."""
    run.once(
        "alignment", model, lambda: train_alignment(model, data, recipe, seed, run, "alignment")
    )
    features = cache_features(model, data, recipe, seed)
    run.once("refinement", model, lambda: train_refinement(model, features, recipe, seed, run))
    run.once("fusion", model, lambda: train_fusion(model, features, recipe, seed, run))


def _line(branch: str, splits: dict[str, Any]) -> str:
    parts = [f"{s} top-1 {m['top1']:.2%} top-5 {m['top5']:.2%}" for s, m in splits.items()]
    return f"{branch:<10} " + ", ".join(parts)


def _write_samples(target: Path, examples: Sequence[Example], seed: int) -> None:
    """Copy up to `MAX_SAMPLES` validation images with their labels and texts."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:MAX_SAMPLES]
    rows = ((i, examples[i]) for i in sorted(chosen))
    # Numbered: images of different sub-folders may share a name.
    write_split(
        target,
        ((f"{i:06d}{e.image.suffix}", e.image.read_bytes(), e.label, e.text) for i, e in rows),
    )

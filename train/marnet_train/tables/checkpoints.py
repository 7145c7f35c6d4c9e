"""The command `evaluate` over several checkpoints: one recipe trained with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from marnet_sdk.errors import InvalidInput, NotFound, requires_extra
from marnet_sdk.outputs import writable
from marnet_train.checkpoint import TRAINING, load_baseline
from marnet_train.data.dataset import read_one_split
from marnet_train.data.examples import Example
from marnet_train.evaluate import Labelled, behind, open_checkpoint
from marnet_train.features import compute_views
from marnet_train.recipe import Augment
from marnet_train.tables.answers import row_of
from marnet_train.tables.joined import compare, summarise
from marnet_train.tables.subject import averaged, branch_answers, trained_chains
from marnet_train.tables.written import write_tables


def evaluate_seeds(
    paths: Sequence[Path], data: Path, split: str, device: str = "auto"
) -> dict[str, Any]:
    """Measure the branches of several checkpoints on one split, and join them.

    Every checkpoint is compared with the image-only baseline that was trained beside it, on the
    same images. Rows are those of `ablate`, without what a checkpoint does not keep.

    Returns:
        `summary`, `pairs` and `runs`, as in ablation.json.

    Raises:
        NotFound: there is no such checkpoint, data set or split, or a checkpoint has no baseline.
        InvalidInput: two checkpoints are the same folder, or were trained with the same seed.
        DataError: the split has a class that a checkpoint does not know.
    """
    examples = read_one_split(data, split)
    runs = [_run(path, examples, f"{split} of {data}", device) for path in paths]
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise InvalidInput(
            f"the checkpoints were trained with the seeds {seeds}; expected different ones, "
            "because intervals are over seeds"
        )
    return {
        "split": split,
        "method": runs[0]["method"],
        "test_images": len(examples),
        "summary": summarise(runs),
        "pairs": compare(runs),
        "runs": runs,
    }


@torch.no_grad()
def _run(path: Path, examples: Sequence[Example], where: str, device: str) -> dict[str, Any]:
    """Measure one checkpoint: its seed, and its rows."""
    checkpoint, store, labels = open_checkpoint(path, examples, where, device)
    if "seed" not in checkpoint.training:
        raise NotFound(f"{path} has no {TRAINING} that names its seed; train it again")
    model, baseline = checkpoint.model, load_baseline(checkpoint).to(labels.device)
    own, base = (
        Labelled(compute_views(vision, store, Augment(), 1)[0], labels)
        for vision in (model.vision, baseline.vision)
    )
    seen = behind(model, own)
    answers = branch_answers(model, seen, trained_chains(model, seen), baseline=(baseline, base))
    rows = {
        name: row_of(averaged(samples, model.config.samples), labels)
        for name, samples in answers.items()
    }
    training = checkpoint.training
    method = training["settings"]["method"]
    return {"checkpoint": str(path), "seed": training["seed"], "method": method, "rows": rows}


def write_evaluation(out: Path, joined: dict[str, Any]) -> None:
    """Write evaluation.json, .md, .csv and .png into a folder.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the folder cannot be written to.
    """
    with requires_extra("train", "matplotlib"):
        from marnet_train.tables.charts import draw_rows
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
    title = f"{joined['split']}: {joined['test_images']} images, {len(joined['runs'])} checkpoints"
    write_tables(out, "evaluation", title, joined)
    draw_rows(joined, title, out / "evaluation.png")

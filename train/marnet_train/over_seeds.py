"""Accuracy over several training seeds, with intervals; beside an SVM on raw pixels if asked.

python -m marnet_train.over_seeds --data data/digits --seeds 3 --svm --output out.json
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import SVC

from marnet_sdk.console import Command, print_table, say
from marnet_sdk.environment import versions
from marnet_train.data.dataset import (
    DataSet,
    Example,
    data_hash,
    read_data_set,
)
from marnet_train.measures import student_interval
from marnet_train.recipe import load_recipe
from marnet_train.trainer import PACKAGES, fit

BRANCHES = ("baseline", "alignment", "refined", "marnet")


def svm_accuracy(folder: DataSet) -> float:
    """Test accuracy of an RBF support vector machine (C = 10) on raw pixels from 0 to 1.

    Its gamma is the one of 2^-12 .. 2^2 that is best on the validation split.
    """
    train, val, test = (_pixels(folder.splits[split]) for split in ("train", "val", "test"))
    machines = [
        SVC(C=10, gamma=2.0**k).fit(*train)  # pyright: ignore[reportArgumentType]
        for k in range(-12, 3)
    ]
    best = max(machines, key=lambda machine: machine.score(*val))
    return float(best.score(*test))


def _pixels(examples: Sequence[Example]) -> tuple[NDArray[np.float64], list[str]]:
    """Flattened grey pixels [N, height * width] and labels."""
    images = [
        np.asarray(Image.open(BytesIO(e.image.read_bytes())).convert("L")).ravel() / 255
        for e in examples
    ]
    return np.stack(images), [e.label for e in examples]


def measure(data: Path, recipe: str, seeds: int, *, svm: bool) -> dict[str, Any]:
    """Train with seeds 0 .. seeds - 1 and collect the test accuracy of every branch."""
    folder = read_data_set(data)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            say(f"seed {seed}")
            out = Path(scratch) / str(seed)
            training = fit(data, load_recipe(recipe), out, name=recipe, seed=seed)
            top1 = {branch: training["metrics"][branch]["test"]["top1"] for branch in BRANCHES}
            runs.append({"seed": seed, "seconds": training["seconds"], "test_top1": top1})
    per_branch = {branch: [run["test_top1"][branch] for run in runs] for branch in BRANCHES}
    # Paired: both were trained with the same seed, data and order.
    pairs = zip(per_branch["marnet"], per_branch["baseline"], strict=True)
    per_branch["marnet - baseline"] = [marnet - baseline for marnet, baseline in pairs]
    return {
        "what": "test top-1 accuracy over training seeds, mean and 95 % Student interval",
        "summary": {
            name: {
                "mean": float(np.mean(values)),
                "interval": student_interval(values),
                "runs": values,
            }
            for name, values in per_branch.items()
        },
        "data_sha256": data_hash(folder),
        "recipe": recipe,
        "test_images": len(folder.splits["test"]),
        "svm": svm_accuracy(folder) if svm else None,
        "runs": runs,
        "machine": {"processor": platform.machine(), "threads": os.cpu_count()},
        "versions": versions((*PACKAGES, "scikit-learn")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@click.command(cls=Command)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", default="digits", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--svm", is_flag=True, help="An SVM on raw pixels too: for small pictures.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(data: Path, recipe: str, seeds: int, svm: bool, output: Path) -> None:
    """Train with several seeds; report every branch and the gain over the baseline."""
    found = measure(data, recipe, seeds, svm=svm)
    output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    rows = []
    for name, seen in found["summary"].items():
        low, high = seen["interval"]
        values = " ".join(f"{value:.2%}" for value in seen["runs"])
        rows.append((name, f"{seen['mean']:.2%}", f"{low:.2%} to {high:.2%}", values))
    if svm:
        rows.append(("SVM on pixels", f"{found['svm']:.2%}", "", ""))
    title = f"test top-1 on {found['test_images']} images"
    print_table(title, ("model", "mean", "95 % interval", "by training seed"), rows)
    say(f"seconds of training: {[run['seconds'] for run in found['runs']]}")


if __name__ == "__main__":
    main()

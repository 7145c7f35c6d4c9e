"""Train the controls of a method on checkpoints that are there, which tuned their encoder for long.

python benchmarks/scripts/controls_of_checkpoints.py --data DIR --checkpoint RUN ... --output FILE

`marnet-train ablate` trains whatever its table needs. Where tuning an encoder takes most of that
time, this takes the encoders of finished trainings and trains phase B once more: with
cross-entropy alone, in place of the text's vectors, and on the encoder of the baseline. Rows are
those of `ablate`, measured on the test images of the data.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from marnet_sdk.console import Command, say
from marnet_train.assemble import prepare
from marnet_train.checkpoint import TRAINING, load_baseline, load_checkpoint
from marnet_train.data.dataset import DataSet, data_hash, read_data_set
from marnet_train.phases import Training
from marnet_train.progress import Progress
from marnet_train.recipe import Recipe
from marnet_train.refinement import Refiner
from marnet_train.stages import Trained
from marnet_train.tables.joined import compare, summarise
from marnet_train.tables.rows import Rows, again_rows, agains, baseline_groups
from marnet_train.tables.subject import Subject, branch_answers

ALONE = "CE alone"
FACTS = ("seed", "recipe", "settings", "chosen", "seconds", "machine", "versions")


def resolved(settings: dict[str, Any], chosen: dict[str, Any]) -> Recipe:
    """Return the recipe with what validation chose, by dotted name, in place of every "auto"."""
    settings = copy.deepcopy(settings)
    for name, value in chosen.items():
        *tables, last = name.split(".")
        table = settings
        for key in tables:
            table = table[key]
        table[last] = value
    return Recipe.from_dict(settings)


def subject_of(path: Path, folder: DataSet) -> Subject:
    """Prepare a finished training to be measured, as it is with the images of its data."""
    checkpoint = load_checkpoint(path)
    recipe = resolved(checkpoint.training["settings"], checkpoint.training["chosen"])
    seed = checkpoint.training["seed"]
    ready = prepare(folder, recipe, seed, torch.device("cpu"))
    fresh = copy.deepcopy(Refiner.of(ready.model))
    ready.model.load_state_dict(checkpoint.model.state_dict())
    ready.model.config = checkpoint.model.config
    trained = Trained(ready.model, load_baseline(checkpoint), copy.deepcopy(fresh), recipe)
    return Subject(ready, trained, fresh, Training(recipe, seed, Progress()), with_baseline=True)


def rows_of(s: Subject) -> Rows:
    """Make the rows of the checkpoint itself, and those of its controls."""
    baseline = s.trained.baseline
    base = (baseline, s.seen(baseline, "test"))
    rows = {
        name: s.row(samples)
        for name, samples in branch_answers(s.model, s.test, s.refined, baseline=base).items()
    }
    again = agains(s.model.latent_width)[0][ALONE]
    rows |= again_rows(s, ALONE, again, on_baseline=False)
    for _, work in baseline_groups(s):
        rows |= work()
    return rows


def run_of(path: Path, folder: DataSet) -> dict[str, Any]:
    """Measure one checkpoint: where it comes from, and its rows."""
    s = subject_of(path, folder)
    said = json.loads((path / TRAINING).read_text("utf-8"))
    facts = {name: said[name] for name in FACTS}
    return {**facts, "test_images": len(s.labels), "rows": rows_of(s)}


def join(runs: Sequence[dict[str, Any]], data: str) -> dict[str, Any]:
    """Join the runs of several seeds, as `ablate` does."""
    return {
        "what": "Checkpoints and their controls on test images, over training seeds",
        "data_sha256": data,
        "test_images": runs[0]["test_images"],
        "summary": summarise(runs),
        "pairs": compare(runs),
        "runs": list(runs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@click.command(cls=Command)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data set.")
@click.option(
    "--checkpoint",
    "checkpoints",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A finished training; several seeds of one recipe are joined.",
)
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Write JSON here.")
def main(data: Path, checkpoints: tuple[Path, ...], threads: int, output: Path) -> None:
    """Measure checkpoints and their controls on the test images of DATA."""
    torch.set_num_threads(threads)
    folder = read_data_set(data)
    runs = []
    for path in checkpoints:
        say(f"{path}: features, then phase B with other settings")
        runs.append(run_of(path, folder))
        joined = join(runs, data_hash(folder))
        output.write_text(json.dumps(joined, indent=1) + "\n", "utf-8")
        for name, row in joined["summary"].items():
            say(f"{name}: {row['top1']:.2%}")


if __name__ == "__main__":
    main()

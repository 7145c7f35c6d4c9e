"""The command `marnet-train`, which makes data sets, trains, evaluates and pushes to the hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from marnet_sdk.console import Group, answer, next_commands, print_table, say
from marnet_sdk.errors import requires_extra
from marnet_train.data_cli import data
from marnet_train.memory import keep_freed_memory
from marnet_train.options import (
    DATA,
    DEVICE,
    FOLDER,
    NEEDS,
    RECIPE,
    SEED,
    THREADS,
    WRITES,
    export_command,
    options,
    read_recipe,
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="marnet")
def main() -> None:
    """Train MARNet: an image classifier that learns from images with text and needs only images
    afterwards.

    \b
    marnet-train data digits --out data/digits
    marnet-train fit --data data/digits --recipe digits --out runs/digits
    """


main.add_command(data)


@main.command()
@options(*WRITES)
def encoders(out: Path, force: bool) -> None:
    """Write pretrained encoders from installed packages, for machines that reach no model hub.

    OUT/efficientnet-lite0 (images, ImageNet-1k) and OUT/minilm-l6 (texts). A recipe names them as
    pretrained in [vision] and [text].
    """
    with requires_extra("encoders", *NEEDS[1:]):
        from marnet_train.encoders import PACKAGES, TEXT, VISION, write_encoders
    with requires_extra("encoders", *(package.name for package in PACKAGES)):
        write_encoders(out, overwrite=force)
    say(f"wrote {out}")
    for table, name in (("vision", VISION), ("text", TEXT)):
        say(f"in a recipe, [{table}] with: pretrained = {json.dumps(str(out / name))}")
    next_commands("marnet-train fit --data DATA --recipe RECIPE.toml --out runs/NAME")


@main.command()
@options(DATA, *RECIPE)
@click.option("--out", "-o", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Same seed, threads and versions: same weights.",
)
@options(THREADS, DEVICE)
@click.option("--tensorboard", type=FOLDER, help="Also write the metrics there, for TensorBoard.")
@click.option("--no-samples", is_flag=True, help="Leave the validation images out of the result.")
@click.option("--force", is_flag=True, help="Replace the checkpoint if it exists.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run to --out has done.")
def fit(
    data_dir: Path,
    recipe: str,
    method: str | None,
    out: Path,
    no_samples: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Train a checkpoint, and an image-only baseline to compare it with.

    An interrupted run leaves OUT.partial; the same command goes on from its last epoch.
    """
    with requires_extra(*NEEDS):
        from marnet_train.parallel import started
        from marnet_train.trainer import fit as run_fit
    keep_freed_memory()
    training = run_fit(
        data_dir,
        read_recipe(recipe, method),
        out,
        name=Path(recipe).name,
        keep_samples=not no_samples,
        overwrite=force,
        **settings,
    )
    if started()[0] > 0:  # of processes that train together, one speaks
        return
    _print_training(training)
    say(f"wrote {out} after {training['seconds']} s")
    next_commands(export_command(out))


def _print_training(training: dict[str, Any]) -> None:
    from marnet_train.report import test_line, training_tables, verdicts

    for table in training_tables(training, "val"):
        print_table(table.title, table.columns, table.rows)
    for sentence in verdicts(training, "val"):
        answer(sentence)
    if "test" in training["data"]["images"]:
        answer(test_line(training))


@main.command()
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(file_okay=False),
    help="Folder, or ORG/NAME on the hub. Several: one recipe with several seeds. Default: the "
    "newest under ./runs.",
)
@click.option("--revision", help="Branch, tag or commit of ORG/NAME. Default: main.")
@options(DATA)
@click.option("--split", default="test", show_default=True, help="Which split to measure on.")
@click.option("--out", "-o", type=FOLDER, help="Folder for evaluation.json, .md, .csv and .png.")
@options(DEVICE)
def evaluate(
    checkpoints: tuple[str, ...],
    revision: str | None,
    data_dir: Path,
    split: str,
    out: Path | None,
    device: str,
) -> None:
    """Accuracy of a checkpoint on a data set, the mean over three noise seeds.

    Of several checkpoints, or with --out: the mean over training seeds with its 95 % interval, and
    paired differences to the image-only baselines that were trained beside them.
    """
    with requires_extra(*NEEDS):
        from marnet_train.checkpoint import find_checkpoint, newest_checkpoint
    paths = [
        find_checkpoint(name, revision=revision) for name in checkpoints or (newest_checkpoint(),)
    ]
    for path in paths:
        say(f"checkpoint {path}")
    if len(paths) > 1 or out is not None:
        _evaluate_seeds(paths, data_dir, split, out, device)
    else:
        _evaluate_one(paths[0], data_dir, split, device)
    next_commands(export_command(paths[0]))


def _evaluate_one(path: Path, data_dir: Path, split: str, device: str) -> None:
    from marnet_train.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(path, data_dir, split, device)
    rows = [
        (
            branch,
            f"{m['top1']:.2%}",
            f"{m['top5']:.2%}",
            " ".join(f"{x:.2%}" for x in m["top1_over_noise_seeds"]),
        )
        for branch, m in found.items()
    ]
    columns = ("branch", "top-1", "top-5", "top-1 by noise seed")
    print_table(f"{split}: {found['marnet']['images']} images", columns, rows)


def _evaluate_seeds(
    paths: list[Path], data_dir: Path, split: str, out: Path | None, device: str
) -> None:
    with requires_extra(*NEEDS):
        from marnet_train.tables.checkpoints import evaluate_seeds, write_evaluation
    joined = evaluate_seeds(paths, data_dir, split, device)
    _print_tables(joined)
    if out is not None:
        write_evaluation(out, joined)
        say(f"wrote {out}")


class _Numbers(click.ParamType):
    """Whole numbers with commas between them, each once."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = tuple(SEED.convert(part.strip(), param, ctx) for part in value.split(","))
        if len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} has a number twice; expected different ones", param, ctx)
        return numbers


_OVER_SEEDS = (
    DATA,
    *RECIPE,
    click.option(
        "--out", "-o", type=FOLDER, required=True, help="Folder to write, or to go on in."
    ),
    click.option(
        "--seeds", type=_Numbers(), default="0,1,2", show_default=True, help="Training seeds."
    ),
    click.option(
        "--damaged",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="So many test images, spread evenly, are damaged in 15 ways and measured, too.",
    ),
    THREADS,
    DEVICE,
)


@main.command()
@options(*_OVER_SEEDS)
@click.option(
    "--controls",
    default="random,shuffled,labels",
    show_default=True,
    help="What takes the text's place, or trains otherwise: of these, moving, joint, progressive, "
    "carry, and the alignment losses swd, ssan, cdd, sdm, team. Each is a whole training.",
)
def ablate(controls: str, **settings: Any) -> None:
    """Train a method, its parts and its controls with several seeds, and write the tables.

    Every row has its mean, its 95 % interval and a paired test against the image-only baseline on
    the same test images. What is done in --out is not done again: an interrupted run goes on.
    """
    kinds = [kind.strip() for kind in controls.split(",") if kind.strip()]
    _make_tables(controls=kinds, **settings)


@main.command()
@options(*_OVER_SEEDS)
def compare(**settings: Any) -> None:
    """Train a method with each alignment loss in the place of ITA, and write the tables.

    The same as ablate --controls swd,ssan,cdd,sdm,team; the folder may be one that ablate wrote.
    """
    from marnet_train.tables.written import ALIGNED

    _make_tables(controls=[*ALIGNED], **settings)


def _make_tables(
    data_dir: Path, recipe: str, method: str | None, out: Path, **settings: Any
) -> None:
    with requires_extra(*NEEDS, "matplotlib"):
        from marnet_train.tables.ablate import ablate as run_ablation
    keep_freed_memory()
    name = Path(recipe).name
    _print_tables(run_ablation(data_dir, read_recipe(recipe, method), out, name=name, **settings))
    say(f"wrote ablation.md, .csv, .json and .png into {out}")
    next_commands(f"marnet-train figures {shlex.quote(str(out))}")


def _print_tables(joined: Mapping[str, Any]) -> None:
    from marnet_train.tables.written import tables

    for table in tables(joined):
        print_table(table.title, table.columns, table.rows)


@main.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
def figures(folder: Path) -> None:
    """Draw what `ablate` wrote to DIR: maps of the vectors by class, and confidences.

    DIR/figure-3.png and DIR/figure-4.png, and the same as numbers over seeds in DIR/figures.md,
    .csv and .json.
    """
    with requires_extra(*NEEDS, "matplotlib"):
        from marnet_train.tables.figures import figure_tables
        from marnet_train.tables.figures import figures as draw
    for table in figure_tables(draw(folder)):
        print_table(table.title, table.columns, table.rows)
    say(f"wrote figure-3.png, figure-4.png and figures.md, .csv, .json into {folder}")


@main.command()
@click.argument("checkpoint", type=FOLDER)
@click.argument("hub_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option("--revision", help="Branch to write to, made if need be. Default: main.")
def push(checkpoint: Path, hub_id: str, private: bool, revision: str | None) -> None:
    """Upload the folder CHECKPOINT to the Hugging Face Hub, in one commit."""
    with requires_extra(*NEEDS):
        from marnet_train.checkpoint import load_checkpoint
    loaded = load_checkpoint(checkpoint)
    commit = loaded.push_to_hub(hub_id, private=private or None, revision=revision)
    say(f"wrote {commit.commit_url}")
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    next_commands(f"{export_command(Path(hub_id))}{at}")

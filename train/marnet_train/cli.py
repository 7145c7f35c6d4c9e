"""marnet-train: make data sets, train, evaluate."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from marnet_sdk.console import Group, next_commands, print_table, say
from marnet_sdk.errors import requires_extra

_NEEDS = ("train", "torch", "transformers", "tokenizers", "sklearn")
_FOLDER = click.Path(file_okay=False, path_type=Path)
_SEED = click.IntRange(0, 2**32 - 1)  # what scikit-learn and NumPy take


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="marnet")
def main() -> None:
    """Train MARNet: an image classifier that learns from images with text and needs only images
    afterwards.

    \b
    marnet-train data digits --out data/digits
    marnet-train fit --data data/digits --recipe digits --out runs/digits
    """


@main.group(cls=Group)
def data() -> None:
    """Write a data set to train on.

    Your own data: DIR/train, DIR/val and DIR/test, each with images and a metadata.jsonl whose
    lines have file_name, text and label (the Hugging Face image-folder layout).
    """


@data.command()
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the split.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def digits(out: Path, seed: int, force: bool) -> None:
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels), each with a description."""
    with requires_extra(*_NEEDS):
        from marnet_train.data.digits import write_digits
    write_digits(out, seed=seed, overwrite=force)
    say(f"wrote {out}")
    next_commands(
        f"marnet-train fit --data {shlex.quote(str(out))} --recipe digits --out runs/digits"
    )


@main.command()
@click.option("--data", "data_dir", type=_FOLDER, required=True, help="Data set folder.")
@click.option("--recipe", required=True, help="Name of a recipe (digits, vit_b16_bert) or a .toml.")
@click.option("--out", "-o", type=_FOLDER, required=True, help="Checkpoint folder to write.")
@click.option(
    "--seed",
    type=_SEED,
    default=0,
    show_default=True,
    help="Same seed, threads and versions: same weights.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads to compute with. Default: torch's."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--no-samples", is_flag=True, help="Leave the validation images out of the result.")
@click.option("--force", is_flag=True, help="Replace the checkpoint if it exists.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run to --out has done.")
def fit(
    data_dir: Path,
    recipe: str,
    out: Path,
    seed: int,
    threads: int | None,
    device: str,
    no_samples: bool,
    force: bool,
    restart: bool,
) -> None:
    """Train a checkpoint, and an image-only baseline to compare it with.

    An interrupted run leaves OUT.partial; the same command goes on from its last epoch.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.recipe import load_recipe
        from marnet_train.trainer import fit as run_fit
    training = run_fit(
        data_dir,
        load_recipe(recipe),
        out,
        name=recipe,
        seed=seed,
        threads=threads,
        device=device,
        keep_samples=not no_samples,
        overwrite=force,
        restart=restart,
    )
    say(f"wrote {out} after {training['seconds']} s")
    next_commands(_export_command(out))


@main.command()
@click.option("--checkpoint", type=_FOLDER, help="Default: the newest under ./runs.")
@click.option("--data", "data_dir", type=_FOLDER, required=True, help="Data set folder.")
@click.option("--split", default="test", show_default=True, help="Which split to measure on.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def evaluate(checkpoint: Path | None, data_dir: Path, split: str, device: str) -> None:
    """Accuracy of a checkpoint on a data set, over five noise seeds."""
    with requires_extra(*_NEEDS):
        from marnet_train.checkpoint import newest_checkpoint
        from marnet_train.evaluate import evaluate_checkpoint
    path = checkpoint or newest_checkpoint()
    say(f"checkpoint {path}")
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
    next_commands(_export_command(path))


def _export_command(checkpoint: Path) -> str:
    return f"marnet-export --checkpoint {shlex.quote(str(checkpoint))} --precision fp16"

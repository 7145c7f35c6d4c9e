"""The commands `marnet-train data ...`, which write data sets and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from marnet_train.options import FOLDER, NEEDS, SEED, WRITES, fit_command, options

if TYPE_CHECKING:
    from marnet_train.data.check import Report


@click.group(cls=Group)
def data() -> None:
    """Write a data set to train on, or check one.

    Your own data: DIR/train, DIR/val and DIR/test, each with images and a metadata.jsonl whose
    lines have file_name, text and label (the Hugging Face image-folder layout).
    """


@data.command()
@options(*WRITES)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the split.")
def digits(out: Path, seed: int, force: bool) -> None:
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels), each with a description."""
    with requires_extra(*NEEDS):
        from marnet_train.data.digits import write_digits
    write_digits(out, seed=seed, overwrite=force)
    say(f"wrote {out}")
    next_commands(fit_command(out, "digits"))


@data.command()
@options(*WRITES)
@click.option("--images", type=int, default=4500, show_default=True, help="Pictures, all splits.")
@click.option("--size", type=int, default=96, show_default=True, help="Side, 32 to 512 pixels.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed: same bytes.")
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
def plates(out: Path, workers: int | None, force: bool, **settings: Any) -> None:
    """Rendered cookery photographs: 18 dishes, each picture with the ingredients on it as text."""
    with requires_extra(*NEEDS):
        from marnet_train.data.plates.writer import CONTACT_SHEET, Plates, write_plates
    write_plates(out, Plates(**settings), workers=workers, overwrite=force)
    say(f"wrote {out}; look at {out / CONTACT_SHEET}")
    next_commands(fit_command(out, "plates"))


def _published(name: str, about: str, source_help: str, *kinds: Any) -> None:
    """Add the command that reads a copy of a published data set and writes it.

    Args:
        kinds: the option that chooses one of its labels or texts: its name, values and help.
    """

    def command(source: Path, out: Path, force: bool, kind: str | None = None) -> None:
        with requires_extra(*NEEDS):
            from marnet_train.data.published import (
                DATA_SETS,
                NOTICE_FILE,
                unofficial_counts,
                write_published,
            )
        written = write_published(name, source, out, kind=kind, overwrite=force)
        for sentence in unofficial_counts(written, DATA_SETS[name].OFFICIAL):
            say(f"warning: {sentence}")
        say(f"wrote {out}; source and licence are in {out / NOTICE_FILE}")
        next_commands(fit_command(out, name))

    source = click.option("--source", metavar="DIR", type=FOLDER, required=True, help=source_help)
    given = [source, *WRITES]
    if kinds:
        flag, values, text = kinds
        given.append(
            click.option(
                flag, "kind", type=Choice(values), default=values[0], show_default=True, help=text
            )
        )
    data.command(name, help=about)(options(*given)(command))


_published(
    "grocery",
    """5,421 photographs of groceries in shops, each with the description of the product.

    Reads a checkout of the public Grocery Store data set (MIT licence); downloads nothing.
    """,
    "Checkout of https://github.com/marcusklasson/GroceryStoreDataset.",
    "--labels",
    ("fine", "coarse"),
    "The 81 products, or their 43 kinds.",
)
_published(
    "vireofood172",
    """VireoFood-172: 110,241 photographs of Chinese dishes, each with its own ingredients.

    Reads a copy that you got from its authors; downloads nothing.
    """,
    "Folder that holds ready_chinese_food and SplitAndIngreLabel.",
)
_published(
    "ingredients101",
    """Ingredients-101: the 101,000 photographs of Food-101, with the ingredients of each dish.

    Reads copies of Food-101 and of the annotations; downloads nothing.
    """,
    "Folder that holds food-101 and Ingredients101.",
    "--ingredients",
    ("complete", "simplified"),
    "Which lists: of 446 ingredients, or of 228.",
)


@data.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--format", "layout", type=Choice(("table", "json")), default="table", show_default=True
)
def check(folder: Path, layout: str) -> None:
    """Count what is in DIR, and name with file and line what is wrong with it.

    Ends with code 1 if something cannot be read or an image is in more than one split.
    """
    with requires_extra(*NEEDS):
        from marnet_train.data.check import check_data_set
    report = check_data_set(folder)
    if layout == "json":
        print_json(report.to_dict())
    else:
        _print_report(folder, report)
    report.raise_if_wrong(folder)
    next_commands(fit_command(folder, "RECIPE", "runs/NAME"))


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

"""The command `marnet-classify`, which prints labels for image files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from marnet_sdk import Classifier, Prediction
from marnet_sdk.bundle import newest_bundle
from marnet_sdk.console import (
    Choice,
    Command,
    next_commands,
    print_csv,
    print_json,
    print_table,
    say,
)
from marnet_sdk.errors import ImageError

Answer = Prediction | ImageError


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model",
    "-m",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle. Default: the newest under ./bundles.",
)
@click.option(
    "--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes shown."
)
@click.option("--batch", "-b", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--operating-point",
    metavar="NAME",
    help="fast, balanced, exact or zero (no reverse loop), where the bundle has them. Default: the "
    "one its export picked.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Noise samples per image, averaged. Default: the operating point's.",
)
@click.option(
    "--stop",
    type=Choice(["settled"]),
    help="Draw no more of the samples for an image once its label will stay.",
)
@click.option("--seed", type=click.IntRange(0), help="Noise seed. Default: the bundle's own.")
@click.option("--threads", type=click.IntRange(1), help="Cores to use. Default: all.")
@click.option(
    "--format", "form", type=Choice(["table", "json", "csv"]), default="table", show_default=True
)
@click.version_option(package_name="marnet")
def main(
    images: tuple[Path, ...],
    model: Path | None,
    top_k: int,
    batch: int,
    operating_point: str | None,
    samples: int | None,
    stop: str | None,
    seed: int | None,
    threads: int | None,
    form: str,
) -> None:
    """Classify IMAGES (JPEG, PNG, WebP, GIF, BMP or TIFF files) with a bundle.

    \b
    marnet-classify photo.jpg
    marnet-classify *.png --model bundles/digits-torchscript-fp16.marnet --format csv

    A file that is not a usable image is reported in its place, the others are answered, and the
    exit code is 1.
    """
    if model is None:
        model = newest_bundle()
        say(f"model {model} (the newest under ./bundles)")
    classifier = Classifier(
        model, operating_point=operating_point, samples=samples, seed=seed, threads=threads
    )
    answers = classifier.predict(
        images, batch_size=batch, top_k=top_k, stop=stop, on_error="return"
    )
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[form](images, answers)
    if form == "table":
        next_commands(f"marnet-bench --batch 64 --model {shlex.quote(str(model))}")
    failed = sum(isinstance(answer, ImageError) for answer in answers)
    if failed:
        say(f"{failed} of {len(images)} images could not be used")
        sys.exit(1)


def _print_table(images: Sequence[Path], answers: Sequence[Answer]) -> None:
    rows = []
    several = any(isinstance(a, Prediction) and a.samples > 1 for a in answers)
    for image, answer in zip(images, answers, strict=True):
        if isinstance(answer, ImageError):
            rows.append((str(image), "error", *[""] * (3 if several else 1), answer.problem))
            continue
        others = ", ".join(f"{s.label} {s.score:.1%}" for s in answer.top[1:])
        label = f"{answer.label} (abstain)" if answer.abstain else answer.label
        row = [str(image), label, f"{answer.score:.2%}"]
        if several:
            error = "" if answer.standard_error is None else f"{answer.standard_error:.2%}"
            row += [error, f"{answer.vote_share:.0%} of {answer.samples}"]
        rows.append((*row, others))
    spread = ("+-", "votes") if several else ()
    print_table("", ("image", "label", "score", *spread, "then"), rows)
    if any(isinstance(a, Prediction) and a.abstain for a in answers):
        say("(abstain): the score is below the threshold that the export found for its target risk")


def _print_json(images: Sequence[Path], answers: Sequence[Answer]) -> None:
    print_json(
        [
            {"image": str(image)}
            | ({"error": answer.problem} if isinstance(answer, ImageError) else asdict(answer))
            for image, answer in zip(images, answers, strict=True)
        ]
    )


def _print_csv(images: Sequence[Path], answers: Sequence[Answer]) -> None:
    print_csv(_csv_rows(images, answers))


def _csv_rows(images: Sequence[Path], answers: Sequence[Answer]) -> Iterator[list[Any]]:
    """A header, and one row for each of the top classes of each image."""
    spread = ("samples", "vote_share", "standard_error", "abstain")
    yield ["image", "rank", "label", "index", "score", *spread, "error"]
    for image, answer in zip(images, answers, strict=True):
        if isinstance(answer, ImageError):
            yield [image, *[""] * 8, answer.problem]
            continue
        for rank, top in enumerate(answer.top, 1):
            first = rank == 1  # what is said of the answer is said once
            values = [getattr(answer, name) if first else None for name in spread]
            row = [image, rank, top.label, top.index, f"{top.score:.6f}", *values, ""]
            yield ["" if value is None else value for value in row]

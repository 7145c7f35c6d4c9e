"""The command `marnet-classify`, which prints labels for image files."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import click

from marnet_sdk import Classifier
from marnet_sdk.bundle import newest_bundle
from marnet_sdk.commands.rows import LINES, Row, check_parquet, make_row, print_tables, write_rows
from marnet_sdk.commands.unfinished import unfinished
from marnet_sdk.console import (
    FAST_DECODE,
    Choice,
    Command,
    has_progress,
    next_commands,
    print_lines,
    say,
    track,
)
from marnet_sdk.errors import InvalidInput
from marnet_sdk.inputs.listing import LIST, image_paths
from marnet_sdk.provenance import predict_with_provenance

_FORMS = ("table", *LINES, "parquet")
_LISTED = 20  # unusable images that are named at the end


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
@FAST_DECODE
@click.option(
    "--format",
    "form",
    type=Choice(_FORMS),
    help="Default: what the end of FILE says, else a table.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the answers there (.json, .jsonl, .csv, .parquet), when all are there.",
)
@click.option("--resume", is_flag=True, help="Go on with the answers of an interrupted run.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--provenance",
    is_flag=True,
    help="Say with each answer what made it, for marnet-bundle replay.",
)
@click.option("--null", "-0", is_flag=True, help="The list on standard input ends names with \\0.")
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
    fast_decode: bool,
    form: str | None,
    output: Path | None,
    resume: bool,
    force: bool,
    provenance: bool,
    null: bool,
) -> None:
    """Classify IMAGES (JPEG, PNG, WebP, GIF, BMP or TIFF files) with a bundle.

    \b
    marnet-classify photo.jpg
    marnet-classify *.png --model bundles/digits-torchscript-fp16.marnet --format csv
    marnet-classify photos -o answers.csv --resume
    find . -newer last -print0 | marnet-classify - -0 --format jsonl

    A folder stands for the image files in it and below, a quoted pattern for what it matches, and -
    for the names that standard input lists. A file that is not a usable image is reported in its
    place, the others are answered, and the exit code is 1.
    """
    form = _format(form, output, resume=resume, force=force, provenance=provenance)
    if model is None:
        model = newest_bundle()
        say(f"model {model} (the newest under ./bundles)")
    with Classifier(
        model,
        operating_point=operating_point,
        samples=samples,
        seed=seed,
        threads=threads,
        fast_decode=fast_decode,
    ) as classifier:
        run = _Run(classifier, images, null, batch, top_k, stop, provenance)
        if output is None:
            _print(run, form)
        else:
            _write(run, form, output, resume=resume, force=force)
    if form == "table":
        next_commands(f"marnet-bench --batch 64 --model {shlex.quote(str(model))}")
    if run.failed:
        run.tell()
        sys.exit(1)


def _format(
    form: str | None, output: Path | None, *, resume: bool, force: bool, provenance: bool
) -> str:
    """The format that is meant.

    Raises:
        InvalidInput: options that do not go together. MissingExtra: Parquet, without pyarrow.
    """
    files = [name for name in _FORMS if name != "table"]
    if output is None:
        if resume or force:
            raise InvalidInput("--resume and --force are about a file; name it with --output FILE")
        if form == "parquet":
            raise InvalidInput("--format parquet is a file; name it with --output FILE")
        form = form or "table"
    elif form is None and (form := output.suffix.lower().removeprefix(".")) not in files:
        raise InvalidInput(
            f"--output: got {output}, whose end tells no format; choose one with --format: "
            f"{', '.join(files)}"
        )
    if output is not None and form == "table":
        raise InvalidInput(f"--format table is not written to files; use {', '.join(files)}")
    if provenance and form in ("table", "csv"):
        raise InvalidInput(
            f"--provenance: a {form} has no place for it; use --format json, jsonl or parquet"
        )
    if form == "parquet":
        check_parquet()
    return form


@dataclass
class _Run:
    """One run of the command, a batch of images at a time, and what came of it."""

    classifier: Classifier
    images: tuple[Path, ...]
    null: bool
    batch: int
    top_k: int
    stop: str | None
    provenance: bool
    seen: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)  # the first few

    def made_by(self) -> dict[str, Any]:
        """The settings that the rows depend on, beside the images."""
        names = ("operating_point", "samples", "seed")
        settings = {name: getattr(self.classifier, name) for name in names}
        own = {name: getattr(self, name) for name in ("top_k", "stop", "provenance")}
        own["fast_decode"] = self.classifier.preprocess.fast_decode
        return {"bundle": self.classifier.bundle.digest, **settings, **own}

    def rows(self, done: Counter[str]) -> Iterator[Row]:
        """Classify what has no row yet.

        Args:
            done: how often there is a row of each image.
        """
        paths = self._left(done)
        way: dict[str, Any] = {"top_k": self.top_k, "stop": self.stop, "batch_size": self.batch}
        while chunk := list(islice(paths, self.batch)):
            if self.provenance:
                answers = predict_with_provenance(self.classifier, chunk, **way)
            else:
                answers = self.classifier.predict(chunk, on_error="return", **way)
            yield from map(make_row, chunk, answers)

    def _left(self, done: Counter[str]) -> Iterator[Path]:
        for path in self._paths():
            if done[str(path)] > 0:
                done[str(path)] -= 1
            else:
                yield path

    def _paths(self) -> Iterator[Path]:
        listed = sys.stdin.buffer if LIST in self.images else BytesIO()
        return image_paths(self.images, listed, null=self.null)

    def tracked(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Show the progress, and how long it will take where the images can be counted."""
        total = None
        if has_progress() and LIST not in self.images:
            total = sum(1 for _ in self._paths()) - self.seen
        yield from track(rows, "classify", total, unit="images")

    def count(self, row: Row) -> None:
        """Take notice of a row."""
        self.seen += 1
        if "error" in row:
            self.failed += 1
            if self.failed <= _LISTED:
                self.failures.append(f"{row['image']}: {row['error']}")

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Take notice of each row that is passed on."""
        for row in rows:
            self.count(row)
            yield row

    def tell(self) -> None:
        """Say which images could not be used."""
        say(f"{self.failed:,} of {self.seen:,} images could not be used")
        for failure in self.failures:
            say(f"  {failure}")
        if more := self.failed - len(self.failures):
            say(f"  and {more:,} more, whose answer is an error")


def _print(run: _Run, form: str) -> None:
    """Print the answers on standard output as they come."""
    rows = run.rows(Counter())
    if form == "table" or not sys.stdout.isatty():  # where rows are seen they are the progress
        rows = run.tracked(rows)
    rows = run.counted(rows)
    if form == "table":
        print_tables(rows, several=run.classifier.samples > 1)
    else:
        print_lines(LINES[form](rows))


def _write(run: _Run, form: str, output: Path, *, resume: bool, force: bool) -> None:
    """Write the answers to a file, behind those that an interrupted run left."""
    done: Counter[str] = Counter()

    def keep(row: Row) -> None:
        done[row["image"]] += 1
        run.count(row)

    with unfinished(
        output,
        run.made_by(),
        resume=resume,
        force=force,
        seen=keep,
        finish=lambda rows, path: write_rows(rows, form, path),
    ) as begun:
        if begun.count:
            say(f"{begun.count:,} rows of an interrupted run are kept")
        for row in run.tracked(begun.add(run.rows(done))):
            run.count(row)
    say(f"wrote {output}")

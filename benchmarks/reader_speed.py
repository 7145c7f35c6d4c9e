"""Measure how long it takes to read a data set's list of images, in each layout of files.

python benchmarks/reader_speed.py --output benchmarks/results/DATE-cpu-reader-speed.json

The images are empty files: reading checks that they are there and does not decode them.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from marnet_bench.machine import describe_machine
from marnet_sdk.console import Command, print_table
from marnet_train.data.dataset import read_data_set

CLASSES = 100


def rows(lines: int) -> list[tuple[str, str, str]]:
    """Return (class, name, text) of every image."""
    return [
        (f"class {i % CLASSES}", f"{i:06d}.png", f"beef, noodles, number {i}")
        for i in range(lines)
    ]  # fmt: skip


def metadata_jsonl(split: Path, lines: int) -> None:
    with (split / "metadata.jsonl").open("w") as file:
        for label, name, text in rows(lines):
            (split / name).touch()
            print(json.dumps({"file_name": name, "text": text, "label": label}), file=file)


def metadata_csv(split: Path, lines: int) -> None:
    with (split / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "text", "label"))
        for label, name, text in rows(lines):
            (split / name).touch()
            writer.writerow((name, text, label))


def folder_per_class(split: Path, lines: int) -> None:
    for k in range(CLASSES):
        (split / f"class {k}").mkdir()
    with (split / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "text"))
        for label, name, text in rows(lines):
            (split / label / name).touch()
            writer.writerow((f"{label}/{name}", text))


def measure(make: Callable[[Path, int], None], lines: int, repeats: int) -> dict[str, Any]:
    """Seconds to read a set with `lines` images in train, and 1,000 in val."""
    with tempfile.TemporaryDirectory() as scratch:
        for split, count in (("train", lines), ("val", 1000)):
            (Path(scratch) / split).mkdir()
            make(Path(scratch) / split, count)
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            assert len(read_data_set(Path(scratch)).splits["train"]) == lines
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "median": median(seconds[1:]), "first": seconds[0]}


@click.command(cls=Command)
@click.option("--lines", type=click.IntRange(min=1000), default=100_000, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(lines: int, repeats: int, output: Path) -> None:
    """Time the readers."""
    makers = (metadata_jsonl, metadata_csv, folder_per_class)
    found = {make.__name__: measure(make, lines, repeats) for make in makers}
    content = {"lines": lines, "layouts": found, "machine": describe_machine()}
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    table = [
        (name, f"{f['median']:.2f}", f"{min(f['seconds']):.2f} to {max(f['seconds']):.2f}")
        for name, f in found.items()
    ]
    print_table(f"reading {lines:,} lines", ("layout", "seconds", "spread"), table)


if __name__ == "__main__":
    main()

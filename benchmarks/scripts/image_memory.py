"""Measure the memory that a training needs for images that do not fit into it.

python benchmarks/scripts/image_memory.py --output benchmarks/results/DATE-cpu-image-memory.json

Generated pictures are read as a training reads them: each is decoded once to be checked, and then
in batches of random order, for one epoch, in a process of its own. Files are listed many times, so
that the disk is no limit; that changes nothing for the process, which decodes every line anew.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from PIL import Image

from marnet_bench.machine import describe_machine
from marnet_sdk.console import Command, print_table
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data.examples import Example
from marnet_train.data.pixels import PixelStore

MIB = 2**20
BATCH = 64


def write_pictures(folder: Path, files: int, size: int) -> list[Path]:
    """Write JPEG files of smooth random colours, which are as large as those of photographs."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(files)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def read(paths: list[Path], images: int, size: int) -> dict[str, Any]:
    """Read `images` pictures for one epoch; returns seconds and resident memory in MiB."""
    examples = [Example(paths[i % len(paths)], "a", None) for i in range(images)]
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    store = PixelStore(examples, Preprocess(size=(size, size)), "train")
    checked = time.perf_counter()
    for rows in store.ahead(torch.randperm(images).split(BATCH)):
        assert len(store.batch(rows)) == len(rows)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "images": images,
        "pixels_mib": round(images * size * size * 3 / MIB),
        "kept": store.keeps,
        "resident_before_mib": round(before / MIB),
        "resident_peak_mib": round(max(before, peak) / MIB),  # both are estimates of Linux
        "seconds_to_check": round(checked - started, 1),
        "seconds_of_an_epoch": round(time.perf_counter() - checked, 1),
    }


@click.command(cls=Command)
@click.option("--images", type=int, multiple=True, default=(1_000, 10_000, 20_000, 100_000))
@click.option("--files", type=click.IntRange(min=1), default=2_000, show_default=True)
@click.option("--size", type=click.IntRange(min=32), default=256, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(images: tuple[int, ...], files: int, size: int, output: Path) -> None:
    """Measure resident memory for some numbers of images."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), files, size)
        kilobytes = round(sum(path.stat().st_size for path in paths) / len(paths) / 1000)
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            found = [pool.submit(read, paths, count, size).result() for count in images]
    content = {
        "size": size,
        "batch": BATCH,
        "distinct_files": files,
        "kilobytes_a_file": kilobytes,
        "runs": found,
        "machine": describe_machine(),
    }
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    columns = ("images", "pixels", "kept", "resident before", "at most", "seconds an epoch")
    rows = [
        (
            f"{run['images']:,}",
            f"{run['pixels_mib']:,} MiB",
            "yes" if run["kept"] else "no",
            f"{run['resident_before_mib']:,} MiB",
            f"{run['resident_peak_mib']:,} MiB",
            f"{run['seconds_of_an_epoch']:,}",
        )
        for run in found
    ]
    print_table(f"images of {size} x {size} pixels", columns, rows)


if __name__ == "__main__":
    main()

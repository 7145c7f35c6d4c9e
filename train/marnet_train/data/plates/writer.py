"""Synthetic cookery photographs with their ingredients as text, as an image folder.

They mimic the problem that MARNet is for: dishes that look alike, differ within themselves, share
their ingredients, and are photographed badly, while the text says exactly what is on the plate.
`menu` decides what that is, `scene` lays the table with the `food`, `camera` takes the picture.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marnet_sdk.console import track
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import InvalidInput
from marnet_sdk.outputs import atomic_directory
from marnet_train.data.dataset import read_data_set
from marnet_train.data.examples import DataSet
from marnet_train.data.imagefolder import is_data_set, write_split
from marnet_train.data.plates.camera import photograph
from marnet_train.data.plates.menu import NAMES, Serving, serve
from marnet_train.data.plates.scene import compose

CONTACT_SHEET = "contact-sheet.png"
SIZES = (32, 512)  # pixels
LEAST = 7 * len(NAMES)  # images: a split of 15 % then has every dish
_PER_TASK = 16  # images that a worker renders at a time


@dataclass(frozen=True)
class Plates:
    """This is all that decides the pictures; the same gives the same bytes."""

    images: int = 4500
    size: int = 96  # side, pixels
    seed: int = 0
    difficulty: float = 0.5  # 0: clean studio pictures of complete dishes, 1: hard for anybody

    def __post_init__(self) -> None:
        if self.images < LEAST:
            raise InvalidInput(
                f"--images {self.images}: expected at least {LEAST}, so that each of the "
                f"{len(NAMES)} dishes is in every split"
            )
        if not SIZES[0] <= self.size <= SIZES[1]:
            raise InvalidInput(f"--size {self.size}: expected {SIZES[0]} to {SIZES[1]} pixels")
        if not 0 <= self.difficulty <= 1:
            raise InvalidInput(f"--difficulty {self.difficulty}: expected 0 to 1")


def write_plates(
    out: Path, plates: Plates, *, workers: int | None = None, overwrite: bool = False
) -> DataSet:
    """Write the plates to `out` as train, val and test with a contact sheet; read them back.

    Args:
        out: appears whole or not at all.
        workers: processes that render; None: one per core that this process may use. The
            bytes do not depend on it.
        overwrite: replace the data set at `out`.

    Raises:
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        OutputError: no space left, or `out` must not be written to.
    """
    with atomic_directory(out, overwrite=overwrite, replaceable=is_data_set) as fresh:
        rows = _render_all(plates, workers or cpus().threads)
        for split, indices in split_indices(plates).items():
            write_split(fresh / split, (next(rows) for _ in indices))
        rows.close()
        contact_sheet(plates).save(fresh / CONTACT_SHEET)
    return read_data_set(out)


def dish_of(index: int) -> str:
    """Name the dish that picture `index` shows: all of them in turn."""
    return NAMES[index % len(NAMES)]


def split_indices(plates: Plates) -> dict[str, list[int]]:
    """Put 70 % of every dish into train, 15 % each into val and test, by position."""
    rounds = -(-plates.images // len(NAMES))  # pictures of a dish, at most
    first, second = round(rounds * 0.7), round(rounds * 0.85)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index in range(plates.images):
        turn = index // len(NAMES)
        parts["train" if turn < first else "val" if turn < second else "test"].append(index)
    return parts


def render(index: int, plates: Plates) -> tuple[Serving, bytes]:
    """Return what picture `index` shows, and its JPEG file.

    They depend on the arguments alone.
    """
    rng = np.random.default_rng([plates.seed, index])
    serving = serve(dish_of(index), rng, plates.difficulty)
    table = compose(serving, rng, round(2.8 * plates.size), plates.difficulty)
    return serving, photograph(table, rng, plates.size, plates.difficulty)


def _render_task(task: tuple[list[int], Plates]) -> list[tuple[str, bytes, str, str]]:
    indices, plates = task
    rows = []
    for index in indices:
        serving, image = render(index, plates)
        rows.append((f"{index:06d}.jpg", image, serving.dish, serving.text))
    return rows


def _render_all(plates: Plates, workers: int) -> Generator[tuple[str, bytes, str, str], None, None]:
    """Yield rows for `write_split`, in the order of the splits."""
    order = [index for part in split_indices(plates).values() for index in part]
    tasks = [(order[i : i + _PER_TASK], plates) for i in range(0, len(order), _PER_TASK)]
    if workers == 1:
        for task in track(tasks, "render"):
            yield from _render_task(task)
        return
    # spawn: a fork would copy the threads' locks of whatever is loaded here.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for rows in track(pool.map(_render_task, tasks), "render", len(tasks)):
            yield from rows


def contact_sheet(plates: Plates, columns: int = 6) -> Image.Image:
    """Draw one row for each dish: its name, and its first pictures with their texts."""
    side, caption, margin = max(plates.size, 96), 40, 8
    columns = min(columns, plates.images // len(NAMES))
    font, small = ImageFont.load_default(15), ImageFont.load_default(10)
    left = 120
    height = len(NAMES) * (side + caption + margin) + margin
    sheet = Image.new("RGB", (left + columns * (side + margin), height), (250, 249, 246))
    draw = ImageDraw.Draw(sheet)
    for row, dish in enumerate(NAMES):
        top = margin + row * (side + caption + margin)
        draw.multiline_text((margin, top), textwrap.fill(dish, 12), (30, 30, 30), font)
        for column in range(columns):
            serving, image = render(row + column * len(NAMES), plates)
            corner = (left + column * (side + margin), top)
            with Image.open(io.BytesIO(image)) as picture:
                sheet.paste(picture, corner)
            words = textwrap.wrap(serving.text, side // 5)[:4]
            place = (corner[0], top + side + 1)
            draw.multiline_text(place, "\n".join(words), (70, 70, 70), small, spacing=0)
    return sheet

"""The images that an export is verified on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from marnet_export.settings import Say
from marnet_sdk.errors import DataError, NotFound
from marnet_sdk.noise.tables import Floats
from marnet_train.checkpoint import Checkpoint
from marnet_train.data.dataset import Example, read_one_split
from marnet_train.data.imagefolder import is_split, read_split
from marnet_train.data.pixels import PixelStore

MAX_IMAGES = 2000  # of more, a random choice


@dataclass(frozen=True)
class Images:
    """The images an export is verified on."""

    examples: tuple[Example, ...]
    pixels: Floats  # [N, 3, H, W]
    labels: NDArray[np.int64] | None  # [N]


def load_images(data: Path | None, checkpoint: Checkpoint, say: Say) -> Images:
    folder = checkpoint.samples if data is None else data
    if data is None and not folder.is_dir():
        raise DataError(
            f"{folder} does not exist: this checkpoint was trained with --no-samples, so name "
            "images to verify on with --data"
        )
    if not folder.is_dir():
        raise NotFound(f"{data} does not exist; --data takes a data set or one of its splits")
    if is_split(folder):
        examples = read_split(folder, needs_text=False)
    else:
        examples = read_one_split(folder, "val")
    # In random order, because a list may be sorted by class: a part of it must show all of them.
    order = np.random.default_rng(0).permutation(len(examples))[:MAX_IMAGES]
    examples = tuple(examples[i] for i in order)
    index = {label: i for i, label in enumerate(checkpoint.labels)}
    labels = np.array([index.get(e.label, -1) for e in examples])
    if (labels < 0).any():
        say(
            f"{(labels < 0).sum()} of {len(labels)} images have a class that the checkpoint does "
            "not know; agreement is measured on all, accuracy is not reported"
        )
    pixels = PixelStore(examples, checkpoint.preprocess, "val").batch(slice(None)).numpy()
    return Images(examples, pixels, None if (labels < 0).any() else labels)

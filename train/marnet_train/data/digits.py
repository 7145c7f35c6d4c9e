"""Real data that needs no download: scikit-learn's 1,797 handwritten digits, as an image folder.

The pictures are 8x8 counts of ink, from digits that 13 people wrote (the test part of "Optical
Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI 1998). They come without text,
so `digit_words` writes some from what each picture shows.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marnet_sdk.errors import MissingExtra
from marnet_sdk.outputs import atomic_directory
from marnet_train.data.dataset import DataSet, read_data_set
from marnet_train.data.digit_words import describe
from marnet_train.data.imagefolder import is_data_set, write_split

HELD_OUT = 0.30  # share of the digits outside of train; half of it is val, half test


def write_digits(out: Path, *, seed: int = 0, overwrite: bool = False) -> DataSet:
    """Write the digits to `out` as train, val and test, and return them as read back.

    Args:
        out: appears whole or not at all. About 1,800 files, 0.3 MB.
        seed: decides the split (70/15/15, classes in proportion) and the wording of the texts.
            The same seed gives the same bytes.
        overwrite: replace the data set at `out`.

    Raises:
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        MissingExtra: scikit-learn is not installed.
    """
    pictures, digits = load_pictures()
    with atomic_directory(out, overwrite=overwrite, replaceable=is_data_set) as fresh:
        for split, indices in split_indices(digits, seed=seed).items():
            write_split(fresh / split, _rows(pictures, digits, indices, seed))
    return read_data_set(out)


def load_pictures() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Load ink [1797, 8, 8] from 0 to 16, and digit [1797] from 0 to 9."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "sklearn.datasets"):
            raise
        raise MissingExtra(
            'the digits come with scikit-learn, which is not installed: pip install "marnet[train]"'
        ) from error
    data, digits = load_digits(return_X_y=True)
    return np.asarray(data, np.float64).reshape(-1, 8, 8), np.asarray(digits, np.int64)


def split_indices(digits: NDArray[np.int64], *, seed: int) -> dict[str, NDArray[np.int64]]:
    """Draw ascending, disjoint indices into `digits` for train, val and test.

    Each class is split in proportion.

    Args:
        digits: class of every picture, [N].
        seed: the same seed gives the same split.
    """
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(digits))
    train, held_out = train_test_split(
        everything, test_size=HELD_OUT, random_state=seed, stratify=digits
    )
    val, test = train_test_split(
        held_out, test_size=0.5, random_state=seed, stratify=digits[held_out]
    )
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def png_bytes(picture: NDArray[np.float64]) -> bytes:
    """Write ink [8, 8], 0..16, as an 8-bit grey PNG file, 0..255. `ink` undoes it without loss."""
    grey = np.rint(picture * 255 / 16).astype(np.uint8)
    file = io.BytesIO()
    # Stored, not deflated: 64 pixels gain nothing, and the bytes do not depend on the zlib at hand.
    Image.fromarray(grey).save(file, format="PNG", compress_level=0)
    return file.getvalue()


def ink(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Turn grey levels 0..255 of a written digit into the ink 0..16 it came from; any shape."""
    return np.rint(grey.astype(np.float64) * 16 / 255)


def _rows(
    pictures: NDArray[np.float64],
    digits: NDArray[np.int64],
    indices: NDArray[np.int64],
    seed: int,
) -> Iterator[tuple[str, bytes, str, str]]:
    """Yield the rows of one split for `write_split`: name, PNG, label, text."""
    for index in indices.tolist():
        digit = int(digits[index])
        # One generator per picture: its text depends on no other picture and on no split.
        text = describe(digit, pictures[index], random.Random(f"{seed}:{index}"))
        yield f"{index:04d}.png", png_bytes(pictures[index]), str(digit), text

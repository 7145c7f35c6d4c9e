"""Published data sets, each read from a copy and written as an image folder: the table of them.

Nothing is downloaded: a folder that somebody got from the authors is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

from marnet_sdk.errors import InvalidInput
from marnet_sdk.outputs import atomic_directory
from marnet_train.data import grocery, ingredients101, vireofood172
from marnet_train.data.dataset import read_data_set
from marnet_train.data.examples import DataSet, Example, read_image
from marnet_train.data.imagefolder import is_data_set, write_split
from marnet_train.data.lists import Splits, flat

NOTICE_FILE = "SOURCE.md"  # in the written folder: where the data come from


class Published(Protocol):
    """This says what a module must have to read a published data set.

    What its source and licence are is in notices/NAME.md.
    """

    OFFICIAL: dict[str, int]  # pictures of each split
    KINDS: tuple[str, ...]  # of its labels or texts; the first is the usual one

    def read(self, source: Path, kind: str) -> tuple[Path, Splits]:
        """Read the folder of the pictures, and those of each split in the order of the lists.

        Raises:
            NotFound: `source` is no copy. DataError: all that is wrong, each with file and line.
        """
        ...


DATA_SETS: dict[str, Published] = {
    "grocery": grocery,
    "vireofood172": vireofood172,
    "ingredients101": ingredients101,
}


def write_published(
    name: str, source: Path, out: Path, *, kind: str | None = None, overwrite: bool = False
) -> DataSet:
    """Write the official splits to `out` as train, val and test, and return them as read back.

    The image files are copied byte for byte.

    Args:
        name: one of `DATA_SETS`.
        source: a copy of the data set.
        out: appears whole or not at all.
        kind: one of its `KINDS`; None: the first.
        overwrite: replace the data set at `out`.

    Raises:
        InvalidInput: another kind. NotFound: `source` is no copy.
        DataError: all that is wrong with it, each with file and line.
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        OutputError: no space left, or `out` must not be written to.
    """
    published = DATA_SETS[name]
    kind = kind or published.KINDS[0]
    if kind not in published.KINDS:
        raise InvalidInput(f"kind: got {kind!r} for {name}; expected one of {published.KINDS}")
    pictures, splits = published.read(source, kind)
    notice = resources.files("marnet_train.data") / "notices" / f"{name}.md"
    with atomic_directory(out, overwrite=overwrite, replaceable=is_data_set) as fresh:
        for split, examples in splits.items():
            write_split(fresh / split, _rows(pictures, split, examples))
        (fresh / NOTICE_FILE).write_bytes(notice.read_bytes())
    return read_data_set(out)


def _rows(
    pictures: Path, split: str, examples: Sequence[Example]
) -> Iterator[tuple[str, bytes, str, str | None]]:
    """Yield the rows of one split for `write_split`: name, bytes, label, text."""
    for example in examples:
        path = Path(str(example.image)).relative_to(pictures).as_posix()
        name = flat(path.removeprefix(f"{split}/"))
        yield name, read_image(example), example.label, example.text


def unofficial_counts(data: DataSet, official: Mapping[str, int]) -> list[str]:
    """Write one sentence for each split that has more or fewer pictures than the official one."""
    return [
        f"{split} has {len(data.splits[split]):,} images, the official split has {count:,}; "
        "results cannot be compared with published ones"
        for split, count in official.items()
        if len(data.splits[split]) != count
    ]

"""This module defines what every layout of a data set is read into, and collects its problems."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marnet_sdk.errors import DataError
from marnet_train.data.image_names import quoted
from marnet_train.data.looks import Looks

SPLITS = ("train", "val", "test")
VALIDATION = "validation"  # how Hugging Face calls val
MAX_PROBLEMS = 20  # listed in one error; the rest is counted
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of images
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"GI": ".gif", b"BM": ".bmp"}


def image_suffix(content: bytes) -> str:
    """Return the usual ending of an image file with this content: ".png"."""
    return _SUFFIXES.get(content[:2], ".tif")


@dataclass(frozen=True)
class EmbeddedImage:
    """This is an image file inside a table; it is read like a `Path` is."""

    name: str  # of the file it once was, or "image"
    column: Any = field(repr=False, compare=False)  # of bytes, from pyarrow
    row: int

    def read_bytes(self) -> bytes:
        return self.column[self.row].as_py()

    @property
    def suffix(self) -> str:
        """Return the ending by content, because the name may be missing or wrong: ".png"."""
        return image_suffix(self.read_bytes())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Example:
    """This is one image with its class name, and its privileged text where there is one."""

    image: Path | EmbeddedImage
    label: str
    text: str | None
    origin: str = field(default="", compare=False)  # "ROOT/train/metadata.jsonl:12", for messages
    written: str = field(default="", compare=False)  # the label, with blanks around it


@dataclass(frozen=True)
class DataSet:
    """This is a data set as read: `labels` are the classes of train, in natural order."""

    root: Path
    labels: tuple[str, ...]
    splits: dict[str, tuple[Example, ...]]  # "train", "val" and, where there is one, "test"
    warnings: tuple[str, ...] = field(default=(), compare=False)


@dataclass
class Problems:
    """This lists the faults of a data set: the first `MAX_PROBLEMS` in words, all of them counted.

    `warnings` are about what can be read and may not be meant.
    """

    shown: list[str] = field(default_factory=list)
    count: int = 0
    warnings: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_PROBLEMS:
            self.shown.append(problem)

    def lines(self) -> list[str]:
        """List the problems, one per line, and how many more there are."""
        return _listed(self.shown, self.count)

    def warning_lines(self) -> list[str]:
        """List the warnings, as `lines` does the problems."""
        return _listed(self.warnings[:MAX_PROBLEMS], len(self.warnings))

    def raise_if_any(self, where: object) -> None:
        """Raise a DataError with all of `lines`, if there are any problems."""
        if self.count:
            head = f"{self.count} problem{'s' * (self.count > 1)} in {where}:"
            raise DataError(head, self.lines())


def _listed(shown: list[str], count: int) -> list[str]:
    more = count - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which could be read for ever.

    Raises:
        OSError: it is there and is no file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "a pipe or a device")


def natural_key(label: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts "2" before "10" and "dish 2" before "dish 10".

    Digits compare by length, then by value: any number of digits, without making an int of them.
    """
    parts = re.split("([0-9]+)", label)  # text at even places, digits at odd ones
    key = [
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part)
        for place, part in enumerate(parts)
    ]
    return key, label  # the label itself orders "1" and "01"


def check_classes(splits: Mapping[str, Sequence[Example]], problems: Problems) -> None:
    """Train must teach two classes, and every class of val and test; each is reported once.

    Where there are problems already, a class may seem new only because its lines are broken.
    """
    if problems.count:
        return
    train = splits["train"]
    known = {example.label for example in train}
    if len(known) < 2:
        where = train[0].origin.rpartition(":")[0]
        problems.add(
            f"{where}: found {len(known)} class ({quoted(*known)}), expected "
            "at least 2 to tell apart; add images of another class"
        )
    for split in ("val", "test"):
        reported: set[str] = set()
        for example in splits.get(split, ()):
            if example.label not in known and example.label not in reported:
                reported.add(example.label)
                problems.add(
                    f"{example.origin}: class {quoted(example.label)} is not in train, expected "
                    f"one of its {len(known)}{Looks(known).hint(example.label)}; correct "
                    "it or add it to train"
                )


def data_hash(data: DataSet) -> str:
    """Return the SHA-256 over split, relative name, label, text and bytes of every image, in order.

    It does not depend on where the folder lies. Each field carries its length, so that no two
    data sets run into the same bytes.

    Raises:
        DataError: an image can no longer be read.
    """
    digest = hashlib.sha256()
    for split, examples in sorted(data.splits.items()):
        for example in examples:
            name = _name_below(example.image, data.root)
            for value in (split, name, example.label, example.text):
                # A missing text must not hash like an empty one.
                content = b"" if value is None else value.encode()
                digest.update(b"-1:" if value is None else b"%d:" % len(content))
                digest.update(content)
            digest.update(hashlib.sha256(read_image(example)).digest())  # 32 bytes, always
    return digest.hexdigest()


def _name_below(image: Path | EmbeddedImage, root: Path) -> str:
    return image.relative_to(root).as_posix() if isinstance(image, Path) else image.name


def read_image(example: Example) -> bytes:
    """Read the bytes of the image file.

    Raises:
        DataError: it can no longer be read; names the line of the data set.
    """
    try:
        return example.image.read_bytes()
    except OSError as error:
        raise DataError(
            f"{example.origin}: {example.image}: cannot be read ({error.strerror}); "
            "restore the image"
        ) from error

"""This module holds what the readers of published data sets share: lists of pictures in text files,
and the image folder that is written from them.

Nothing is downloaded: a folder that somebody got from its authors is read. Its files may be
incomplete or damaged, so everything is checked and all faults are told at once, with file and line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import whitespace

from marnet_sdk.outputs import atomic_directory
from marnet_train.data.dataset import read_data_set
from marnet_train.data.examples import DataSet, Example, Problems, check_regular, read_image
from marnet_train.data.image_names import name_fault, quoted
from marnet_train.data.imagefolder import is_data_set, write_split

NOTICE_FILE = "SOURCE.md"  # in the written folder: where the data come from
UNKNOWN = "unknown"  # the text of a picture without any ingredient


def write_published(
    out: Path,
    pictures: Path,
    splits: Mapping[str, Sequence[Example]],
    notice: str,
    *,
    overwrite: bool = False,
) -> DataSet:
    """Write the splits as an image folder, with `notice` beside them, and read it back.

    The image files are copied byte for byte.

    Args:
        out: appears whole or not at all.
        pictures: the folder that the images lie in; names of written images are relative to it.

    Raises:
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        OutputError: no space left, or `out` must not be written to.
        DataError: an image can no longer be read.
    """
    with atomic_directory(out, overwrite=overwrite, replaceable=is_data_set) as fresh:
        for split, examples in splits.items():
            write_split(fresh / split, _rows(pictures, split, examples))
        (fresh / NOTICE_FILE).write_bytes(notice.encode())
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


def all_lines(path: Path, problems: Problems, restore: str) -> Iterator[tuple[str, str]]:
    """Yield ("FILE:LINE", text) of every line, blank ones too; what is bad goes to `problems`.

    Args:
        restore: what to do about a file that is missing or damaged, for messages.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                origin = f"{path}:{number}"
                try:
                    yield origin, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    value = error.object[error.start]
                    problems.add(f"{origin}: not UTF-8 (byte 0x{value:02x}); save it as UTF-8")
    except FileNotFoundError:
        problems.add(f"{path}: missing; {restore}")
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror}); {restore}")


def read_lines(path: Path, problems: Problems, restore: str, like: str) -> list[tuple[str, str]]:
    """Read ("FILE:LINE", text) of every line that is not blank.

    Args:
        like: a line as it should be, for the message about a file without any.
    """
    before = problems.count
    lines = [(origin, text) for origin, text in all_lines(path, problems, restore) if text.strip()]
    if not lines and problems.count == before:
        problems.add(f"{path}: no lines, expected some like {like!r}; {restore}")
    return lines


def read_names(
    path: Path, count: int, kind: str, problems: Problems, restore: str, *, blank: bool = False
) -> list[str]:
    """Read a name from each line; blanks and semicolons around it are taken off.

    Args:
        count: how many lines there must be; blank ones after them are ignored.
        kind: what they name, for messages: "dish".
        blank: a line may hold no name.

    Returns:
        The names in order, or none if something is wrong, which `problems` then knows.
    """
    before = problems.count
    lines = [
        (origin, text.strip(f"{whitespace};"))
        for origin, text in all_lines(path, problems, restore)
    ]
    while len(lines) > count and not lines[-1][1]:
        lines.pop()
    if problems.count == before and len(lines) != count:
        problems.add(
            f"{path}: {len(lines)} lines, expected {count}, one for each {kind}; {restore}"
        )
    elif not blank:
        for origin, name in lines:
            if not name:
                problems.add(f"{origin}: blank, expected one {kind} on each line; {restore}")
    return [name for _, name in lines] if problems.count == before else []


def path_fault(root: Path, path: str, restore: str) -> str | None:
    """Say what is wrong with a path that anybody may have written; None if it is a file in `root`.

    Symbolic links are followed.
    """
    base = os.path.realpath(root)
    if name_fault(path) or not (
        target := Path(os.path.realpath(os.path.join(base, path)))
    ).is_relative_to(base):
        return f"{quoted(path)} leads out of {root} or is no plain path; keep it below that folder"
    try:
        present = target.is_file()
    except OSError:  # a name that is too long
        present = False
    return None if present else f"no file {quoted(path)} in {root}; {restore}"


def picture_fault(root: Path, path: str, seen: Mapping[str, str], restore: str) -> str | None:
    """Say what is wrong with a picture of a list: it was listed before, or is no file in `root`.

    Args:
        seen: `flat` path -> line on which it was, over all lists.
    """
    if first := seen.get(flat(path)):
        return f"{quoted(path)} was already on {first}; keep one of them"
    return path_fault(root, path, restore)


def flat(path: str) -> str:
    """Write a path as one file name, which keeps where the picture comes from."""
    return path.replace("/", "__")


def is_number(text: str) -> bool:
    """Tell whether a text is a whole number from 0, and not endless."""
    return re.fullmatch("[0-9]{1,9}", text) is not None

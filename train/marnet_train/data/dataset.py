"""Reading a data set of any layout: recognises which, reads it, and checks it as a whole.

A layout is a module with `marker` (the file that shows it), `split_names`, `scan` and `MISSING`:
imagefolder, classfolder and huggingface describe theirs at their top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from marnet_sdk.errors import DataError, NotFound, nearest
from marnet_train.data import classfolder, huggingface, imagefolder
from marnet_train.data.examples import (
    SPLITS,
    VALIDATION,
    DataSet,
    Example,
    Problems,
    check_classes,
    data_hash,
    natural_key,
)
from marnet_train.data.labels import label_warnings

__all__ = ["DataSet", "Example", "data_hash", "read_data_set", "read_one_split", "scan_data_set"]


class Layout(Protocol):
    """This says what a module must have to be a layout."""

    MISSING: str  # "no {} folder", with the split's name

    def marker(self, root: Path) -> Path | None: ...

    def split_names(self, root: Path) -> list[str]: ...

    def scan(
        self, root: Path, names: Mapping[str, str], problems: Problems
    ) -> dict[str, list[Example]]: ...


LAYOUTS: dict[str, Layout] = {
    "image folder": imagefolder,
    "folder per class": classfolder,
    "Hugging Face datasets": huggingface,
}
EXPECTED = (
    "expected train/ and val/ with a metadata.jsonl each, class folders with a captions.csv, "
    "or what datasets' save_to_disk writes"
)


@dataclass(frozen=True)
class Scan:
    """This holds what could be read of a data set, and what could not."""

    root: Path
    layout: str
    splits: dict[str, list[Example]]
    problems: Problems


def read_data_set(root: Path) -> DataSet:
    """Read train, val and, where there is one, test.

    Raises:
        NotFound: there is no folder `root`.
        DataError: no layout, several, or all the problems found, each with file and line.
        MissingExtra: the layout needs a package that is not installed.
    """
    found = scan_data_set(root)
    found.problems.raise_if_any(root)
    labels = sorted({example.label for example in found.splits["train"]}, key=natural_key)
    splits = {split: tuple(examples) for split, examples in found.splits.items()}
    return DataSet(root, tuple(labels), splits, tuple(found.problems.warning_lines()))


def scan_data_set(root: Path) -> Scan:
    """Read what is sound and collect what is not.

    Raises:
        NotFound: there is no folder `root`. DataError: no layout, or several.
        MissingExtra: the layout needs a package that is not installed.
    """
    title = find_layout(root)
    layout, problems = LAYOUTS[title], Problems()
    try:
        names = layout.split_names(root)
    except DataError as error:
        problems.add(str(error))
        return Scan(root, title, {}, problems)
    chosen: dict[str, str] = {}
    for split in SPLITS:
        spelt = (split, VALIDATION) if split == "val" else (split,)
        present = [name for name in spelt if name in names]
        if len(present) > 1:
            problems.add(f"{root}: holds val and {VALIDATION}, two names for one split; keep one")
        elif present:
            chosen[split] = present[0]
        elif split != "test":
            found = ", ".join(_folders(root) if "folder" in layout.MISSING else names) or "none"
            missing = layout.MISSING.format(split)
            problems.add(f"{root}: {missing} (found: {found}); add or rename it")
    splits = layout.scan(root, chosen, problems)
    check_classes(splits, problems)
    problems.warnings += label_warnings(splits)
    return Scan(root, title, splits, problems)


def read_one_split(root: Path, split: str) -> tuple[Example, ...]:
    """Read one split of a data set, whose texts may be missing.

    Args:
        split: its name; "val" also finds one that is called validation.

    Raises:
        NotFound: there is no such folder or split.
        DataError: no layout, several, or all the problems found, each with file and line.
        MissingExtra: the layout needs a package that is not installed.
    """
    layout = LAYOUTS[find_layout(root)]
    names = layout.split_names(root)
    if split == "val" and {"val", VALIDATION} <= set(names):
        raise DataError(f"{root}: holds val and {VALIDATION}, two names for one split; keep one")
    name = VALIDATION if split == "val" and "val" not in names else split
    if name not in names:
        raise NotFound(
            f"{root} has no split {split!r}; choose --split from: {', '.join(names) or 'none'}."
            f"{nearest(split, names)}"
        )
    problems = Problems()
    key = "val" if split == "train" else split  # as one that needs no texts
    examples = layout.scan(root, {key: name}, problems)[key]
    problems.raise_if_any(root)
    return tuple(examples)


def find_layout(root: Path) -> str:
    """Find the key of `LAYOUTS` for a folder.

    Raises:
        NotFound: there is no folder `root`. DataError: no layout, or several.
    """
    if not root.is_dir():
        raise NotFound(f"{root}: no such folder; expected one that holds train/ and val/")
    markers = {title: layout.marker(root) for title, layout in LAYOUTS.items()}
    found = {title: path for title, path in markers.items() if path is not None}
    if len(found) > 1:
        listed = " and ".join(f"{path} ({title})" for title, path in found.items())
        raise DataError(f"{root}: two layouts at once, {listed}; keep the files of one")
    if found:
        return next(iter(found))
    return _guess_layout(root)


def _guess_layout(root: Path) -> str:
    """Choose, for a folder without any marker, the layout whose missing files are to be named."""
    if (root / huggingface.STATE).is_file():
        raise DataError(
            f"{root}: holds {huggingface.STATE}, so it is a single Dataset; expected a DatasetDict "
            "with train and validation: save that with its save_to_disk"
        )
    folders = _folders(root)
    if not {*SPLITS, VALIDATION} & set(folders):
        found = _some(path.name for path in root.iterdir())
        raise DataError(f"{root}: no train/ folder (found: {found}); {EXPECTED}")
    if any(classfolder.looks_like_classes(root / name) for name in folders):
        return "folder per class"
    return "image folder"


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])]) or "nothing"

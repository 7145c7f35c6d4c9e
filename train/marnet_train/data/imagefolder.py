"""The image-folder layout of Hugging Face datasets: the one place that reads and writes it.

    ROOT/train/metadata.jsonl   one JSON object per line: {"file_name": "a.png", "text": "...",
                                "label": "cat"}
    ROOT/train/a.png            `file_name` is relative to the folder of its metadata.jsonl
    ROOT/val/...                the same; "text" may be left out, as nothing reads it there
    ROOT/test/...               the same as val, and the folder itself may be left out

Other keys of a line are ignored. Blank lines are allowed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from marnet_sdk.errors import DataError, NotFound, OutputExists
from marnet_train.data.image_names import ImageNames, name_fault, quoted
from marnet_train.data.metadata import LINE_EXAMPLE, METADATA, line_faults, parse_line

SPLITS = ("train", "val", "test")
MAX_PROBLEMS = 20  # listed in one error; the rest is counted


@dataclass(frozen=True)
class Example:
    """One image with its class name, and its privileged text where there is one."""

    image: Path
    label: str
    text: str | None


@dataclass(frozen=True)
class ImageFolder:
    """A data set as read: `labels` are the classes of train, in natural order."""

    root: Path
    labels: tuple[str, ...]
    splits: dict[str, tuple[Example, ...]]  # "train", "val" and, where there is one, "test"


@dataclass
class _Problems:
    """What is wrong with a data set: the first `MAX_PROBLEMS` in words, all of them counted."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_PROBLEMS:
            self.shown.append(problem)

    def raise_if_any(self, root: Path) -> None:
        if not self.count:
            return
        lines = [f"{self.count} problem{'s' * (self.count > 1)} in {root}:", *self.shown]
        if self.count > len(self.shown):
            lines.append(f"and {self.count - len(self.shown)} more")
        raise DataError("\n  ".join(lines))


def is_data_set(root: Path) -> bool:
    """Whether a directory looks like a data set in this layout."""
    return (root / "train" / METADATA).is_file()


def natural_key(label: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that puts "2" before "10" and "dish 2" before "dish 10".

    Digits compare by length, then by value: any number of digits, without making an int of them.
    """
    parts = re.split("([0-9]+)", label)  # text at even places, digits at odd ones
    key = [
        (len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part)
        for place, part in enumerate(parts)
    ]
    return key, label  # the label itself orders "1" and "01"


def read_split(directory: Path, *, needs_text: bool) -> tuple[Example, ...]:
    """Read one split folder, in the order of its metadata.

    Args:
        directory: holds `metadata.jsonl` and the images.
        needs_text: a line without text is an error (train), or gives `text=None` (val, test).

    Raises:
        DataError: all the problems found, each with file and line.
    """
    problems = _Problems()
    rows = _scan_split(directory, needs_text=needs_text, problems=problems)
    problems.raise_if_any(directory)
    return tuple(example for _, example in rows)


def read_image_folder(root: Path) -> ImageFolder:
    """Read train, val and, where there is one, test.

    Raises:
        NotFound: there is no folder `root`.
        DataError: all the problems found in all splits, each with file and line.
    """
    if not root.is_dir():
        raise NotFound(f"{root}: no such folder; expected one that holds train/ and val/")
    problems = _Problems()
    rows: dict[str, list[tuple[int, Example]]] = {}
    for split in SPLITS:
        if (root / split).is_dir():
            needs_text = split == "train"
            rows[split] = _scan_split(root / split, needs_text=needs_text, problems=problems)
        elif split != "test":
            found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
            problems.add(f"{root}: no {split}/ folder (found: {found or 'none'}); add or rename it")
    if not problems.count:  # else a class could seem new only because its train lines are broken
        _check_classes(root, rows, problems)
    problems.raise_if_any(root)
    labels = sorted({example.label for _, example in rows["train"]}, key=natural_key)
    splits = {split: tuple(example for _, example in pairs) for split, pairs in rows.items()}
    return ImageFolder(root, tuple(labels), splits)


def write_split(
    directory: Path, rows: Iterable[tuple[str, bytes, str, str | None]]
) -> tuple[Example, ...]:
    """Write images and `metadata.jsonl` so that `read_split` gives the same examples back.

    Args:
        directory: made if need be; must be empty. Use `atomic_directory` around it where a
            half-written split would matter.
        rows: (file name, bytes of the image file, label, text or None), used once, in order.

    Raises:
        OutputExists: `directory` already holds something.
        DataError: no rows, or a row that `read_split` would refuse.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise OutputExists(f"{directory} is not an empty folder; choose another or empty it")
    directory.mkdir(parents=True, exist_ok=True)
    first: dict[str, int] = {}  # file name -> row
    examples: list[Example] = []
    lines: list[str] = []
    for number, (name, image, label, text) in enumerate(rows, start=1):
        record = {"file_name": name, "text": text, "label": label}
        faults = line_faults(record, needs_text=False, first=first, name_check=name_fault)
        if faults:
            raise DataError(f"{directory}: row {number}: {'; '.join(faults)}")
        first[name] = number
        path = directory / name
        _write_image(path, image)
        examples.append(Example(path, label, text))
        present = {key: value for key, value in record.items() if value is not None}
        lines.append(json.dumps(present, ensure_ascii=False) + "\n")
    if not lines:
        raise DataError(f"{directory}: no rows to write; a split needs at least one image")
    # Last, so that a split cut short is not readable; as bytes, so that \n stays \n everywhere.
    (directory / METADATA).write_bytes("".join(lines).encode())
    return tuple(examples)


def _write_image(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    except OSError as error:  # a name that is too long, or a file where a folder is needed
        raise DataError(f"{path}: cannot be written ({error.strerror}); rename it") from error


def data_hash(folder: ImageFolder) -> str:
    """SHA-256 over split, relative name, label, text and bytes of every image, in order.

    It does not depend on where the folder lies. Each field carries its length, so that no two
    data sets run into the same bytes.

    Raises:
        DataError: an image can no longer be read.
    """
    digest = hashlib.sha256()
    for split, examples in sorted(folder.splits.items()):
        for example in examples:
            name = example.image.relative_to(folder.root).as_posix()
            for value in (split, name, example.label, example.text):
                # A missing text must not hash like an empty one.
                data = b"" if value is None else value.encode()
                digest.update(b"-1:" if value is None else b"%d:" % len(data))
                digest.update(data)
            digest.update(_file_digest(example.image))  # 32 bytes, always
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the image") from error


def _scan_split(
    directory: Path, *, needs_text: bool, problems: _Problems
) -> list[tuple[int, Example]]:
    """The good lines of a split as (line number, example); what is bad goes to `problems`."""
    metadata = directory / METADATA
    names = ImageNames(directory)
    first: dict[str, int] = {}  # file name -> line
    rows: list[tuple[int, Example]] = []
    before = problems.count
    for number, line in _lines(metadata, problems):
        record = parse_line(line)
        if isinstance(record, str):
            problems.add(f"{metadata}:{number}: {record}")
            continue
        faults = line_faults(record, needs_text=needs_text, first=first, name_check=names.fault)
        for fault in faults:
            problems.add(f"{metadata}:{number}: {fault}")
        if isinstance(name := record.get("file_name"), str):
            first.setdefault(name, number)
        if not faults:
            example = Example(directory / record["file_name"], record["label"], record.get("text"))
            rows.append((number, example))
    if not rows and problems.count == before:
        problems.add(f"{metadata}: no examples; write one line per image, like {LINE_EXAMPLE}")
    return rows


def _lines(metadata: Path, problems: _Problems) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of every line that is not blank.

    Bytes, because only they are split at \\n alone (text may hold U+2028), and because each line
    can then be told to be UTF-8 or not.
    """
    try:
        with metadata.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        problems.add(f"{metadata}: missing; write one line per image, like {LINE_EXAMPLE}")
    except OSError as error:
        problems.add(f"{metadata}: cannot be read ({error.strerror}); expected a text file")


def _check_classes(
    root: Path, rows: dict[str, list[tuple[int, Example]]], problems: _Problems
) -> None:
    """Train must teach two classes, and every class of val and test; each is reported once."""
    known = {example.label for _, example in rows["train"]}
    if len(known) < 2:
        problems.add(
            f"{root / 'train' / METADATA}: found {len(known)} class ({quoted(*known)}), expected "
            "at least 2 to tell apart; add images of another class"
        )
    for split in ("val", "test"):
        reported: set[str] = set()
        for number, example in rows.get(split, []):
            if example.label not in known and example.label not in reported:
                reported.add(example.label)
                problems.add(
                    f"{root / split / METADATA}:{number}: class {quoted(example.label)} is "
                    f"not in train, expected one of its {len(known)}; correct it or add it to train"
                )

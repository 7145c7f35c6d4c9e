"""The image-folder layout of Hugging Face datasets: the one place that reads and writes it.

    ROOT/train/metadata.jsonl   one JSON object per line: {"file_name": "a.png", "text": "...",
                                "label": "cat"}
    ROOT/train/a.png            `file_name` is relative to the folder of its metadata.jsonl
    ROOT/val/...                the same; "text" may be left out, as nothing reads it there
    ROOT/test/...               the same as val, and the folder itself may be left out

Instead of metadata.jsonl there may be a metadata.csv with the columns file_name, text and label.
Other keys and columns are ignored. Blank lines are allowed. val/ may be called validation/.
"""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from marnet_sdk.errors import DataError, OutputExists
from marnet_train.data.csvfile import read_csv
from marnet_train.data.examples import (
    SPLITS,
    SUFFIXES,
    VALIDATION,
    Example,
    Problems,
    check_regular,
    natural_key,
)
from marnet_train.data.image_names import ImageNames, name_fault, quoted
from marnet_train.data.metadata import (
    LINE_EXAMPLE,
    METADATA,
    METADATA_CSV,
    line_faults,
    parse_line,
)

MISSING: str = "no {}/ folder"


def is_data_set(root: Path) -> bool:
    """Tell whether a directory looks like a data set that was written in this layout."""
    return (root / "train" / METADATA).is_file()


def is_split(directory: Path) -> bool:
    """Tell whether a directory holds the metadata of one split."""
    return any((directory / name).is_file() for name in (METADATA, METADATA_CSV))


def marker(root: Path) -> Path | None:
    """Find the first file that shows that `root` has this layout."""
    candidates = (
        root / split / name for split in (*SPLITS, VALIDATION) for name in (METADATA, METADATA_CSV)
    )
    return next((path for path in candidates if path.is_file()), None)


def split_names(root: Path) -> list[str]:
    """List the names of the folders that are, or should be, a split."""
    usual = (*SPLITS, VALIDATION)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [path.name for path in folders if path.name in usual or is_split(path)]


def scan(root: Path, names: Mapping[str, str], problems: Problems) -> dict[str, list[Example]]:
    """Read the good examples of each split; what is bad goes to `problems`.

    Args:
        names: split -> name of its folder. Only train needs texts.
    """
    return {
        split: scan_split(root / name, needs_text=split == "train", problems=problems)
        for split, name in names.items()
    }


def read_split(directory: Path, *, needs_text: bool) -> tuple[Example, ...]:
    """Read one split folder, in the order of its metadata.

    Args:
        directory: holds the metadata and the images.
        needs_text: a line without text is an error (train), or gives `text=None` (val, test).

    Raises:
        DataError: all the problems found, each with file and line.
    """
    problems = Problems()
    examples = scan_split(directory, needs_text=needs_text, problems=problems)
    problems.raise_if_any(directory)
    return tuple(examples)


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
        examples.append(_example(path, label, text, f"{directory / METADATA}:{number}"))
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


def scan_split(directory: Path, *, needs_text: bool, problems: Problems) -> list[Example]:
    """Read the good lines of one split folder; what is bad goes to `problems`."""
    if (directory / METADATA).exists() and (directory / METADATA_CSV).exists():
        problems.add(f"{directory}: holds {METADATA} and {METADATA_CSV}; keep one of them")
        return []
    is_csv = (directory / METADATA_CSV).exists()
    metadata = directory / (METADATA_CSV if is_csv else METADATA)
    columns = ("file_name", "text", "label") if needs_text else ("file_name", "label")
    names = ImageNames(directory)
    first: dict[str, int] = {}  # file name -> line
    examples: list[Example] = []
    before = problems.count
    lines = read_csv(metadata, columns, problems) if is_csv else _json_lines(metadata, problems)
    for number, record in lines:
        faults = line_faults(record, needs_text=needs_text, first=first, name_check=names.fault)
        for fault in faults:
            problems.add(f"{metadata}:{number}: {fault}")
        if isinstance(name := record.get("file_name"), str):
            first.setdefault(name, number)
            if not faults:
                image, origin = directory / name, f"{metadata}:{number}"
                examples.append(_example(image, str(record["label"]), record.get("text"), origin))
    _warn_of_unlisted(directory, metadata, first, problems)
    if not examples and problems.count == before:
        problems.add(f"{metadata}: no examples; write one line per image, like {LINE_EXAMPLE}")
    return examples


def _example(image: Path, label: str, text: str | None, origin: str) -> Example:
    return Example(image, label.strip(), text, origin, label)


def _warn_of_unlisted(
    directory: Path, metadata: Path, listed: Collection[str], problems: Problems
) -> None:
    """Name the images in a split that no line lists. Hidden files are ignored."""
    unlisted = []
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            is_image = path.suffix.lower() in SUFFIXES and not name.startswith(".")
            if is_image and path.relative_to(directory).as_posix() not in listed:
                unlisted.append(path.relative_to(directory).as_posix())
    if unlisted:
        shown = ", ".join(quoted(name) for name in sorted(unlisted, key=natural_key)[:3])
        more = f" and {len(unlisted) - 3} more" if len(unlisted) > 3 else ""
        problems.warnings.append(
            f"{len(unlisted)} images in {directory} stand in no line of {metadata.name}: "
            f"{shown}{more}"
        )


def _json_lines(metadata: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based number, record) of every line that is a JSON object.

    They are read as bytes, because only they are split at \\n alone (text may hold U+2028), and
    because each line can then be told to be UTF-8 or not.
    """
    try:
        check_regular(metadata)
        with metadata.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:  # Windows' editors begin a file with a byte-order mark
                    line = line.removeprefix(BOM_UTF8)
                if not line.strip():
                    continue
                record = parse_line(line)
                if isinstance(record, str):
                    problems.add(f"{metadata}:{number}: {record}")
                else:
                    yield number, record
    except FileNotFoundError:
        problems.add(f"{metadata}: missing; write one line per image, like {LINE_EXAMPLE}")
    except OSError as error:
        problems.add(f"{metadata}: cannot be read ({error.strerror}); expected a text file")

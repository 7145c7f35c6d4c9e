"""The folder-per-class layout with captions in CSV files.

    ROOT/train/cat/a.jpg        the class is the name of the folder; no folders below it
    ROOT/train/captions.csv     columns file_name,text; file_name like cat/a.jpg
    ROOT/val/, ROOT/test/       the same; captions.csv may be left out, as nothing reads it there

Instead, one ROOT/captions.csv may serve all splits, with file_name like train/cat/a.jpg. val/ may
be called validation/. Hidden files are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from marnet_train.data.csvfile import read_csv
from marnet_train.data.examples import (
    SPLITS,
    SUFFIXES,
    VALIDATION,
    Example,
    Problems,
    natural_key,
)
from marnet_train.data.image_names import ImageNames, is_encodable, name_fault, quoted
from marnet_train.data.looks import Looks
from marnet_train.data.metadata import field_fault

CAPTIONS = "captions.csv"
COLUMNS = ("file_name", "text")
MISSING: str = "no {}/ folder"

Captions = dict[str, tuple[str, str]]  # file name below the split -> (text, "captions.csv:12")


def marker(root: Path) -> Path | None:
    """Find the first file that shows that `root` has this layout."""
    folders = (root, *(root / split for split in (*SPLITS, VALIDATION)))
    return next((f / CAPTIONS for f in folders if (f / CAPTIONS).is_file()), None)


def looks_like_classes(directory: Path) -> bool:
    """Tell whether a folder without metadata has sub-folders with images in them."""
    return any(path.suffix.lower() in SUFFIXES for path in directory.glob("*/*"))


def split_names(root: Path) -> list[str]:
    """List the names of the folders that can be a split."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def scan(root: Path, names: Mapping[str, str], problems: Problems) -> dict[str, list[Example]]:
    """Read the good examples of each split; what is bad goes to `problems`.

    Args:
        names: split -> name of its folder. Only train needs captions.
    """
    shared = _shared_captions(root, problems) if (root / CAPTIONS).exists() else None
    splits = {}
    for split, name in names.items():
        own = root / name / CAPTIONS
        if shared is not None and own.exists():
            problems.add(f"{own}: captions are also in {root / CAPTIONS}; keep one of the two")
        if shared is not None:
            captions, source = shared.get(name, {}), root / CAPTIONS
        elif own.exists() or split == "train":
            captions, source = _captions(own, problems), own
        else:
            captions, source = {}, None
        splits[split] = _scan_split(root / name, captions, source, split == "train", problems)
    return splits


def _shared_captions(root: Path, problems: Problems) -> dict[str, Captions]:
    """Read ROOT/captions.csv: folder of the split -> captions. Lines of no folder are problems."""
    folders: dict[str, Captions] = {name: {} for name in split_names(root)}
    for name, caption in _captions(root / CAPTIONS, problems).items():
        folder, _, below = name.partition("/")
        if folder in folders:
            folders[folder][below] = caption
        else:
            problems.add(
                f"{caption[1]}: no image file {quoted(name)}; expected a name like "
                "train/cat/a.jpg: restore the image or remove the line"
            )
    return folders


def _captions(path: Path, problems: Problems) -> Captions:
    """Read the sound lines of one captions.csv."""
    found: Captions = {}
    first: dict[str, int] = {}  # file name -> line
    for number, row in read_csv(path, COLUMNS, problems):
        name, text = row["file_name"], row["text"]
        fault = field_fault(name, "file_name") or name_fault(str(name))
        if not fault and name in first:
            fault = f"{quoted(str(name))} was already on line {first[name]}; keep one of them"
        first.setdefault(str(name), number)
        fault = fault or field_fault(text, "text")
        if fault:
            problems.add(f"{path}:{number}: {fault}")
        if name and not name_fault(name):  # else its absence would be a second problem
            found.setdefault(name, (text or "", f"{path}:{number}"))
    return found


def _scan_split(
    directory: Path, captions: Captions, source: Path | None, needs_text: bool, problems: Problems
) -> list[Example]:
    before = problems.count
    examples = []
    images = {name: label for label, name in _images(directory, problems)}
    for name, label in images.items():
        text, origin = captions.get(name, (None, f"{directory / name}"))
        if text is None and needs_text:
            problems.add(f"{directory / name}: no caption in {source}; add a line for it")
        else:
            examples.append(Example(directory / name, label.strip(), text, origin, label))
    missing = sorted(captions.keys() - images.keys(), key=natural_key)
    looks = Looks(images if missing else ())
    for name in missing:
        problems.add(
            f"{captions[name][1]}: no image file {quoted(name)} in {directory}"
            f"{looks.hint(name)}; restore it or remove the line"
        )
    if not examples and problems.count == before:
        problems.add(f"{directory}: no images; expected folders like {directory}/cat/ with images")
    return examples


def _images(directory: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield (class, "class/file name") of every image, in natural order of both."""
    names = ImageNames(directory)
    for entry in _visible(directory, problems):
        if entry.is_dir() and not entry.name.strip():
            problems.add(f"{directory}: holds a class folder {entry.name!r}; give it a name")
        elif entry.is_dir():
            found = False
            for path in _visible(entry, problems):
                name = f"{entry.name}/{path.name}"
                fault = _image_fault(path, name, names)
                if fault:
                    problems.add(fault)
                else:
                    yield entry.name, name
                found = True
            if not found:
                problems.add(f"{entry}: no images in this class; add some or remove the folder")
        elif entry.name != CAPTIONS:
            problems.add(
                f"{entry}: lies in no class folder; move it into one, like "
                f"{directory}/cat/, or out of the split"
            )


def _visible(directory: Path, problems: Problems) -> list[Path]:
    """List the entries that are not hidden, in natural order."""
    try:
        found = [path for path in directory.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        problems.add(f"{directory}: cannot be read ({error.strerror}); correct its permissions")
        return []
    return sorted(found, key=lambda path: natural_key(path.name))


def _image_fault(path: Path, name: str, names: ImageNames) -> str | None:
    if not is_encodable(name):
        return f"{quoted(str(path))}: the name is not UTF-8; rename it"
    if path.suffix.lower() not in SUFFIXES:
        return f"{path}: expected an image ({' '.join(SUFFIXES)}); convert it or move it away"
    if fault := names.fault(name):
        return f"{path}: {fault}"
    return None

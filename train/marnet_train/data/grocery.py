"""The public Grocery Store data set, photographs with product descriptions, as an image folder.

5,421 pictures that M. Klasson, C. Zhang and H. Kjellström took with a phone in shops ("A
Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels", WACV 2019). Nothing is
downloaded here: a checkout is read.

    dataset/classes.csv   81 products: name, number, coarse class, path of the description
    dataset/train.txt     one picture per line: path, number of the product, of the coarse class
    dataset/val.txt, dataset/test.txt   the same; the paths of all are relative to dataset/

Every picture gets the description of its product as text, because there is none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marnet_sdk.errors import NotFound
from marnet_train.data.csvfile import read_csv
from marnet_train.data.examples import SPLITS, DataSet, Example, Problems, check_classes
from marnet_train.data.grocery_notice import ADDRESS, NOTICE
from marnet_train.data.image_names import quoted
from marnet_train.data.published import (
    flat,
    is_number,
    path_fault,
    picture_fault,
    read_lines,
    write_published,
)

OFFICIAL = {"train": 2640, "val": 296, "test": 2485}  # pictures
CLASSES = "classes.csv"
NAME, NUMBER = "Class Name (str)", "Class ID (int)"
COARSE_NAME, COARSE_NUMBER = "Coarse Class Name (str)", "Coarse Class ID (int)"
DESCRIPTION = "Product Description Path (str)"
COLUMNS = (NAME, NUMBER, COARSE_NAME, COARSE_NUMBER, DESCRIPTION)
LINE_EXAMPLE = "train/Fruit/Lime/Lime_001.jpg, 9, 5"
_RESTORE = f"restore it from {ADDRESS}"

Labels = Literal["fine", "coarse"]


@dataclass(frozen=True)
class Product:
    """This is one line of classes.csv, with what its description says."""

    name: str
    coarse_name: str
    coarse_number: int
    text: str


@dataclass(frozen=True)
class Picture:
    """This is one line of train.txt, val.txt or test.txt."""

    path: str  # relative to the folder dataset
    number: int  # of the product
    coarse_number: int


def write_grocery(
    source: Path, out: Path, *, labels: Labels = "fine", overwrite: bool = False
) -> DataSet:
    """Write the official splits to `out` as train, val and test, and return them as read back.

    The image files are copied byte for byte.

    Args:
        source: a checkout of the data set, or its folder `dataset`.
        out: appears whole or not at all. About 5,400 files, 120 MB.
        labels: "fine" for the 81 products, "coarse" for their 43 kinds.
        overwrite: replace the data set at `out`.

    Raises:
        NotFound: `source` is no such checkout.
        DataError: all that is wrong with it, each with file and line.
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        OutputError: no space left, or `out` must not be written to.
    """
    root = find_root(source)
    splits = read_grocery(root, labels=labels)
    return write_published(out, root, splits, NOTICE, overwrite=overwrite)


def find_root(source: Path) -> Path:
    """Find the folder that holds the lists of pictures: `source`, or `dataset` in it.

    Raises:
        NotFound: none of the files of the data set is in either.
    """
    names = (CLASSES, *(f"{split}.txt" for split in SPLITS))
    for root in (source, source / "dataset"):
        if any((root / name).is_file() for name in names):
            return root
    raise NotFound(
        f"{source}: no {', '.join(names)} there or in {source / 'dataset'}; expected a checkout of "
        f"the Grocery Store data set. Get it with: git clone {ADDRESS}"
    )


def read_grocery(root: Path, *, labels: Labels = "fine") -> dict[str, list[Example]]:
    """Read the pictures of each split, in the order of the lists.

    Raises:
        DataError: all that is wrong, each with file and line.
    """
    problems = Problems()
    products = _read_products(root, problems)
    seen: dict[str, str] = {}
    splits = {
        split: _read_list(root / f"{split}.txt", products, labels, seen, problems)
        for split in SPLITS
    }
    if not problems.count:  # else a class could seem new only because its train lines are broken
        check_classes(splits, problems)
    problems.raise_if_any(root)
    return splits


def parse_line(line: str) -> Picture | str:
    """Return what a line of a list says, or say what is wrong with it.

    The path may hold spaces and commas, and may begin with a slash, as those of classes.csv do.
    """
    path, *numbers = (part.strip() for part in line.rsplit(",", 2))
    path = path.removeprefix("/")
    if path and len(numbers) == 2 and all(is_number(number) for number in numbers):
        return Picture(path, int(numbers[0]), int(numbers[1]))
    return f"got {quoted(line.strip())}, expected a line like {LINE_EXAMPLE!r}; correct it"


def _read_products(root: Path, problems: Problems) -> dict[int, Product | None]:
    """Read number -> product, or None where something is wrong, which `problems` then knows."""
    path = root / CLASSES
    products: dict[int, Product | None] = {}
    lines: dict[str, int] = {}  # a name or a number -> where it was first
    before = problems.count
    for line, fields in read_csv(path, COLUMNS, problems):
        row = {column: (fields[column] or "").strip() for column in COLUMNS}
        faults = _row_faults(row, lines)
        text = "" if faults else _read_description(root, row[DESCRIPTION], faults)
        for fault in faults:
            problems.add(f"{path}:{line}: {fault}")
        for key in (row[NAME], row[NUMBER]):
            lines.setdefault(key, line)
        if is_number(row[NUMBER]):
            products.setdefault(int(row[NUMBER]), None if faults else _product(row, text))
    if not products and problems.count == before:
        problems.add(f"{path}: no classes, expected one line for each; {_RESTORE}")
    return products


def _row_faults(row: Mapping[str, str], lines: Mapping[str, int]) -> list[str]:
    """Say what is wrong with a row of classes.csv; `lines` knows names and numbers before it."""
    faults = [f"no {column!r}; fill it in" for column in COLUMNS if not row[column]]
    for column in (NUMBER, COARSE_NUMBER):
        if row[column] and not is_number(row[column]):
            got = quoted(row[column])
            faults.append(f"{column!r} is {got}, expected a number like 9; correct it")
    for column in (NAME, NUMBER):
        if row[column] and row[column] in lines:
            where = f"line {lines[row[column]]}"
            got = quoted(row[column])
            faults.append(f"{column!r} {got} was already on {where}; keep one of them")
    return faults


def _product(row: Mapping[str, str], text: str) -> Product:
    """Make a product of a row without faults."""
    return Product(row[NAME], row[COARSE_NAME], int(row[COARSE_NUMBER]), text)


def _read_description(root: Path, path: str, faults: list[str]) -> str:
    """Read the whole description on one line; what is wrong with it goes to `faults`."""
    path = path.removeprefix("/")
    if fault := path_fault(root, path, _RESTORE):
        faults.append(fault)
        return ""
    try:
        text = " ".join((root / path).read_text("utf-8-sig").split())
    except OSError as error:
        faults.append(f"{quoted(path)} cannot be read ({error.strerror}); {_RESTORE}")
        return ""
    except UnicodeDecodeError as error:
        faults.append(f"{quoted(path)} is not UTF-8 (byte {error.start + 1}); {_RESTORE}")
        return ""
    if not text:
        faults.append(f"{quoted(path)} is empty, expected a description; {_RESTORE}")
    return text


def _read_list(
    path: Path,
    products: Mapping[int, Product | None],
    labels: Labels,
    seen: dict[str, str],
    problems: Problems,
) -> list[Example]:
    """Read the good lines of one list; what is bad goes to `problems`.

    Args:
        seen: file name to write -> line on which it was, over all lists; is added to.
    """
    examples: list[Example] = []
    for origin, line in read_lines(path, problems, _RESTORE, LINE_EXAMPLE):
        picture = parse_line(line)
        if isinstance(picture, str):
            problems.add(f"{origin}: {picture}")
            continue
        for fault in _picture_faults(path.parent, picture, products, seen):
            problems.add(f"{origin}: {fault}")
        seen.setdefault(flat(picture.path), origin)
        if product := products.get(picture.number):
            label = product.name if labels == "fine" else product.coarse_name
            examples.append(Example(path.parent / picture.path, label, product.text, origin))
    return examples


def _picture_faults(
    root: Path,
    picture: Picture,
    products: Mapping[int, Product | None],
    seen: Mapping[str, str],
) -> list[str]:
    """Say what is wrong with a line that could be parsed."""
    faults = []
    if fault := picture_fault(root, picture.path, seen, _RESTORE):
        faults.append(fault)
    product = products.get(picture.number)
    if product and product.coarse_number != picture.coarse_number:
        faults.append(
            f"coarse class {picture.coarse_number}, but {CLASSES} has {product.coarse_number} for "
            f"class {picture.number} ({product.name}); correct one of them"
        )
    # Without any product, that classes.csv is unusable has been said.
    if products and picture.number not in products:
        faults.append(
            f"class {picture.number} is not in {CLASSES}, expected one of its {len(products)}; "
            "correct it or add it there"
        )
    return faults

"""The public Grocery Store data set: photographs with product descriptions.

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

from marnet_sdk.errors import NotFound
from marnet_train.data.csvfile import read_csv
from marnet_train.data.examples import SPLITS, Example, Problems
from marnet_train.data.image_names import quoted
from marnet_train.data.lists import Lists, Pictures, Splits, checked, is_number

ADDRESS = "https://github.com/marcusklasson/GroceryStoreDataset"
OFFICIAL = {"train": 2640, "val": 296, "test": 2485}  # pictures
KINDS: tuple[str, ...] = ("fine", "coarse")  # the 81 products, or their 43 kinds, as labels
CLASSES = "classes.csv"
NAME, NUMBER = "Class Name (str)", "Class ID (int)"
COARSE_NAME, COARSE_NUMBER = "Coarse Class Name (str)", "Coarse Class ID (int)"
DESCRIPTION = "Product Description Path (str)"
COLUMNS = (NAME, NUMBER, COARSE_NAME, COARSE_NUMBER, DESCRIPTION)
LINE_EXAMPLE = "train/Fruit/Lime/Lime_001.jpg, 9, 5"
_RESTORE = f"restore it from {ADDRESS}"


@dataclass(frozen=True)
class Product:
    """This is one line of classes.csv, with what its description says."""

    name: str
    coarse_name: str
    coarse_number: int
    text: str


Products = Mapping[int, Product | None]  # None where something is wrong, which has been told


@dataclass(frozen=True)
class Picture:
    """This is one line of train.txt, val.txt or test.txt."""

    path: str  # relative to the folder dataset
    number: int  # of the product
    coarse_number: int


def read(source: Path, kind: str = KINDS[0]) -> tuple[Path, Splits]:
    """Read a checkout, or its folder `dataset`: see `published.Published`."""
    root, problems = find_root(source), Problems()
    lists = Lists(problems, _RESTORE)
    products, pictures = _read_products(root, lists), Pictures(root, lists)
    splits = {split: _read_list(split, products, kind, pictures) for split in SPLITS}
    return root, checked(splits, problems, root)


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


def parse_line(line: str) -> Picture | str:
    """Return what a line of a list says, or say what is wrong with it.

    The path may hold spaces and commas, and may begin with a slash, as those of classes.csv do.
    """
    path, *numbers = (part.strip() for part in line.rsplit(",", 2))
    path = path.removeprefix("/")
    if path and len(numbers) == 2 and all(is_number(number) for number in numbers):
        return Picture(path, int(numbers[0]), int(numbers[1]))
    return f"got {quoted(line.strip())}, expected a line like {LINE_EXAMPLE!r}; correct it"


def _read_products(root: Path, lists: Lists) -> Products:
    """Read number -> product."""
    path, problems = root / CLASSES, lists.problems
    products: dict[int, Product | None] = {}
    first: dict[str, int] = {}  # a name or a number -> its line
    before = problems.count
    for line, fields in read_csv(path, COLUMNS, problems):
        row = {column: (fields[column] or "").strip() for column in COLUMNS}
        faults = _row_faults(row, first)
        text = "" if faults else _read_description(root, row[DESCRIPTION], lists, faults)
        for fault in faults:
            problems.add(f"{path}:{line}: {fault}")
        for key in (row[NAME], row[NUMBER]):
            first.setdefault(key, line)
        if is_number(row[NUMBER]):
            coarse = row[COARSE_NUMBER]
            product = None if faults else Product(row[NAME], row[COARSE_NAME], int(coarse), text)
            products.setdefault(int(row[NUMBER]), product)
    if not products and problems.count == before:
        problems.add(f"{path}: no classes, expected one line for each; {_RESTORE}")
    return products


def _row_faults(row: Mapping[str, str], first: Mapping[str, int]) -> list[str]:
    """Say what is wrong with a row of classes.csv; `first` knows names and numbers before it."""
    faults = [f"no {column!r}; fill it in" for column in COLUMNS if not row[column]]
    for column in (NUMBER, COARSE_NUMBER):
        if row[column] and not is_number(row[column]):
            got = quoted(row[column])
            faults.append(f"{column!r} is {got}, expected a number like 9; correct it")
    for column in (NAME, NUMBER):
        if row[column] and row[column] in first:
            got, where = quoted(row[column]), f"line {first[row[column]]}"
            faults.append(f"{column!r} {got} was already on {where}; keep one of them")
    return faults


def _read_description(root: Path, path: str, lists: Lists, faults: list[str]) -> str:
    """Read the whole description on one line; what is wrong with it goes to `faults`."""
    path = path.removeprefix("/")
    if fault := lists.path_fault(root, path):
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


def _read_list(split: str, products: Products, kind: str, pictures: Pictures) -> list[Example]:
    """Read the good lines of one list."""
    examples: list[Example] = []
    path, problems = pictures.root / f"{split}.txt", pictures.lists.problems
    for origin, line in pictures.lists.lines(path, LINE_EXAMPLE):
        picture = parse_line(line)
        if isinstance(picture, str):
            problems.add(f"{origin}: {picture}")
            continue
        pictures.check(picture.path, origin)
        if fault := _class_fault(picture, products):
            problems.add(f"{origin}: {fault}")
        if product := products.get(picture.number):
            label = product.name if kind == "fine" else product.coarse_name
            examples.append(Example(pictures.root / picture.path, label, product.text, origin))
    return examples


def _class_fault(picture: Picture, products: Products) -> str | None:
    """Say what is wrong with the two numbers of a line."""
    product = products.get(picture.number)
    if product and product.coarse_number != picture.coarse_number:
        return (
            f"coarse class {picture.coarse_number}, but {CLASSES} has {product.coarse_number} for "
            f"class {picture.number} ({product.name}); correct one of them"
        )
    # Without any product, that classes.csv is unusable has been told.
    if products and picture.number not in products:
        return (
            f"class {picture.number} is not in {CLASSES}, expected one of its {len(products)}; "
            "correct it or add it there"
        )
    return None

"""Ingredients-101, the photographs of Food-101 with the ingredients of each dish, as an image
folder.

101,000 pictures of 101 dishes (L. Bossard, M. Guillaumin, L. Van Gool, "Food-101", ECCV 2014), with
lists of ingredients and a validation split (M. Bolaños, A. Ferrà, P. Radeva, "Food Ingredients
Recognition through Multi-label Learning", ICIAP Workshops 2017). Nothing is downloaded here.

    food-101/images/apple_pie/134.jpg     pictures, in a folder for each dish
    food-101/meta/classes.txt             names of the dishes, 0 to 100; or beside the annotations
    food-101/meta/train.txt, test.txt     Food-101's own splits, which the lists are compared with

    Ingredients101/Annotations/           the annotations; other usual places are known, too
        train_images.txt, val_images.txt, test_images.txt   one picture per line: apple_pie/134
        train_labels.txt, val_labels.txt, test_labels.txt   number of the dish of each
        ingredients.txt                   ingredients of each dish, 0 to 100, between commas: 446
        ingredients_simplified.txt        the same in simpler words: 228

The text of a picture is the list of its dish, because there is none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from marnet_sdk.console import say
from marnet_sdk.errors import NotFound
from marnet_train.data.examples import SPLITS, DataSet, Example, Problems, check_classes
from marnet_train.data.image_names import quoted
from marnet_train.data.published import (
    UNKNOWN,
    flat,
    is_number,
    picture_fault,
    read_lines,
    read_names,
    write_published,
)

ADDRESS = "https://github.com/MarcBS/food_ingredients_recognition"
FOOD_101 = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
NOTICE = f"""\
# Ingredients-101

Written by `marnet-train data ingredients101` from copies of Food-101, <{FOOD_101}>, and of the
annotations of Ingredients-101, <{ADDRESS}>.
The image files and the splits are those of the copies, unchanged. The text of every image is the
list of ingredients of its dish.

Lukas Bossard, Matthieu Guillaumin, Luc Van Gool: "Food-101: Mining Discriminative Components with
Random Forests". European Conference on Computer Vision (ECCV), 2014.
Marc Bolaños, Aina Ferrà, Petia Radeva: "Food Ingredients Recognition through Multi-label Learning".
ICIAP Workshops, 2017.

The pictures of Food-101 come from a web site for photographs of food; rights in them are their
owners'. Ask before you pass them on.
"""
OFFICIAL = {"train": 68_175, "val": 7_575, "test": 25_250}  # pictures
DISHES = 101
PLACES = (  # of the annotations, in a source
    "Ingredients101/Annotations",
    "Ingredients101/annotations",
    "Annotations",
    "annotations",
    "food-101/data",
)
PICTURES = "food-101/images"
CLASSES = "classes.txt"
TEXTS = {"complete": "ingredients.txt", "simplified": "ingredients_simplified.txt"}
LINE_EXAMPLE, LABEL_EXAMPLE = "apple_pie/134", "0"
_RESTORE = f"restore it from {ADDRESS}"
_RESTORE_PICTURES = f"restore it from {FOOD_101}"

Ingredients = Literal["complete", "simplified"]


def write_ingredients101(
    source: Path, out: Path, *, ingredients: Ingredients = "complete", overwrite: bool = False
) -> DataSet:
    """Write the official splits to `out` as train, val and test, and return them as read back.

    The image files are copied byte for byte.

    Args:
        source: the folder that holds `food-101` and `Ingredients101`.
        out: appears whole or not at all. 101,000 files, as large as Food-101.
        ingredients: "complete" for lists of 446 ingredients, "simplified" for 228.
        overwrite: replace the data set at `out`.

    Raises:
        NotFound: neither pictures nor annotations are in `source`.
        DataError: all that is wrong with them, each with file and line.
        OutputExists: `out` exists, and `overwrite` is False or it is no data set.
        OutputError: no space left, or `out` must not be written to.
    """
    splits = read_ingredients101(source, ingredients=ingredients)
    for sentence in other_splits(source, splits):
        say(f"warning: {sentence}")
    return write_published(out, source / PICTURES, splits, NOTICE, overwrite=overwrite)


def find_annotations(source: Path) -> Path | None:
    """Find the folder with the lists of pictures and ingredients; None: in no known place."""
    names = (*(f"{split}_images.txt" for split in SPLITS), *TEXTS.values())
    places = (source / place for place in PLACES)
    return next((p for p in places if any((p / name).is_file() for name in names)), None)


def read_ingredients101(
    source: Path, *, ingredients: Ingredients = "complete"
) -> dict[str, list[Example]]:
    """Read the pictures of each split, in the order of the lists.

    Raises:
        NotFound: neither pictures nor annotations are in `source`.
        DataError: all that is wrong, each with file and line.
    """
    pictures, annotations = source / PICTURES, find_annotations(source)
    if annotations is None and not pictures.is_dir():
        raise NotFound(
            f"{source}: no {PICTURES} or {PLACES[0]} there; expected the folder that holds both. "
            f"Get the pictures from {FOOD_101} and the annotations from {ADDRESS}"
        )
    problems = Problems()
    if not pictures.is_dir():
        problems.add(f"{pictures}: no such folder, expected the pictures; {_RESTORE_PICTURES}")
    annotations = annotations or source / PLACES[0]
    dishes = _read_dishes(annotations, pictures.parent / "meta", problems)
    lists = read_names(
        annotations / TEXTS[ingredients], DISHES, "dish", problems, _RESTORE, blank=True
    )
    texts = [ingredient_text(line) for line in lists]
    labelled = {split: _read_labelled(annotations, split, problems) for split in SPLITS}
    seen: dict[str, str] = {}
    splits = {
        split: _examples(lines, pictures, dishes, texts, seen, problems)
        for split, lines in labelled.items()
    }
    if not problems.count:  # else a class could seem new only because its train lines are broken
        check_classes(splits, problems)
    problems.raise_if_any(source)
    return splits


def ingredient_text(line: str) -> str:
    """Return the ingredients of a line, joined by ", "; some of the published ones are empty."""
    return ", ".join(name for part in line.split(",") if (name := part.strip())) or UNKNOWN


def other_splits(source: Path, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Write one sentence for each split of Food-101 that the lists do not follow.

    Food-101's test pictures should be those of test, its training pictures those of train and val.
    """
    meta, found = (source / PICTURES).parent / "meta", []
    for name, parts in (("train.txt", ("train", "val")), ("test.txt", ("test",))):
        if not (meta / name).is_file():
            continue
        listed = set((meta / name).read_text("utf-8", "replace").split())
        ours = {
            Path(str(e.image)).relative_to(source / PICTURES).with_suffix("").as_posix()
            for part in parts
            for e in splits[part]
        }
        if count := len(listed ^ ours):
            found.append(
                f"{count:,} pictures are in {' and '.join(parts)} or in {meta / name}, and not in "
                "both; results cannot be compared with those on Food-101"
            )
    return found


def _read_dishes(annotations: Path, meta: Path, problems: Problems) -> list[str]:
    """Read the names of the dishes, 0 to 100: those of the annotations, or else of Food-101."""
    here = (annotations / CLASSES, meta / CLASSES)
    path = next((path for path in here if path.is_file()), here[1])
    return read_names(path, DISHES, "dish", problems, _RESTORE_PICTURES)


def _read_labelled(
    annotations: Path, split: str, problems: Problems
) -> list[tuple[str, str, tuple[str, str]]]:
    """Read ("FILE:LINE", picture, ("FILE:LINE", label)) of every picture of a split."""
    images, labels = (annotations / f"{split}_{kind}.txt" for kind in ("images", "labels"))
    pictures = read_lines(images, problems, _RESTORE, LINE_EXAMPLE)
    numbers = read_lines(labels, problems, _RESTORE, LABEL_EXAMPLE)
    if pictures and numbers and len(pictures) != len(numbers):
        problems.add(
            f"{labels}: {len(numbers):,} labels, expected {len(pictures):,}, one for each line of "
            f"{images.name}; {_RESTORE}"
        )
        return []
    if not numbers:  # which has been said
        return []
    return [(origin, line, label) for (origin, line), label in zip(pictures, numbers, strict=False)]


def _examples(
    lines: Sequence[tuple[str, str, tuple[str, str]]],
    pictures: Path,
    dishes: Sequence[str],
    texts: Sequence[str],
    seen: dict[str, str],
    problems: Problems,
) -> list[Example]:
    """Make the examples of the good lines of one split; what is bad goes to `problems`.

    Args:
        seen: file name to write -> line on which it was, over all lists; is added to.
    """
    examples: list[Example] = []
    complete = pictures.is_dir()  # that it is missing has been said once
    for origin, line, (label_origin, label) in lines:
        path = f"{line.strip().removeprefix('/')}.jpg"
        if re.fullmatch("[^/]+/[^/]+", path) is None:
            got = quoted(line.strip())
            problems.add(f"{origin}: got {got}, expected a line like {LINE_EXAMPLE!r}; {_RESTORE}")
            continue
        if complete and (fault := picture_fault(pictures, path, seen, _RESTORE_PICTURES)):
            problems.add(f"{origin}: {fault}")
        seen.setdefault(flat(path), origin)
        folder = path.partition("/")[0]
        if fault := _label_fault(label.strip(), folder, dishes):
            problems.add(f"{label_origin}: {fault}; {_RESTORE}")
        elif texts:
            examples.append(Example(pictures / path, folder, texts[int(label)], origin))
    return examples


def _label_fault(label: str, folder: str, dishes: Sequence[str]) -> str | None:
    """Say what is wrong with the number of a dish beside a picture in the folder of another."""
    if not is_number(label) or int(label) >= DISHES:
        return f"got {quoted(label)}, expected the number of a dish, 0 to {DISHES - 1}"
    if dishes and _letters(dishes[int(label)]) != _letters(folder):
        return (
            f"dish {int(label)} is {quoted(dishes[int(label)])}, but the picture is in the folder "
            f"{quoted(folder)}"
        )
    return None


def _letters(name: str) -> str:
    """Return a name without what copies spell differently: "Apple pie" is "apple_pie"."""
    return re.sub(r"[\W_]", "", name.casefold())

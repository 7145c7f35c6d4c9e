"""Ingredients-101: the photographs of Food-101 with the ingredients of each dish.

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

from marnet_sdk.console import say
from marnet_sdk.errors import NotFound
from marnet_train.data.examples import SPLITS, Example, Problems
from marnet_train.data.image_names import quoted
from marnet_train.data.lists import UNKNOWN, Lists, Pictures, Splits, checked, is_number

ADDRESS = "https://github.com/MarcBS/food_ingredients_recognition"
FOOD_101 = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
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
KINDS: tuple[str, ...] = tuple(TEXTS)  # lists of 446 ingredients, or of 228
LINE_EXAMPLE, LABEL_EXAMPLE = "apple_pie/134", "0"
_RESTORE = f"restore it from {ADDRESS}"
_RESTORE_PICTURES = f"restore it from {FOOD_101}"


def read(source: Path, kind: str = KINDS[0]) -> tuple[Path, Splits]:
    """Read the folder that holds pictures and annotations: see `published.Published`.

    Warnings say where the lists do not follow the splits of Food-101.
    """
    pictures, annotations = source / PICTURES, find_annotations(source)
    if annotations is None and not pictures.is_dir():
        raise NotFound(
            f"{source}: no {PICTURES} or {PLACES[0]} there; expected the folder that holds both. "
            f"Get the pictures from {FOOD_101} and the annotations from {ADDRESS}"
        )
    problems, meta = Problems(), pictures.parent / "meta"
    lists, of_pictures = Lists(problems, _RESTORE), Lists(problems, _RESTORE_PICTURES)
    if not pictures.is_dir():
        problems.add(f"{pictures}: no such folder, expected the pictures; {_RESTORE_PICTURES}")
    annotations = annotations or source / PLACES[0]
    here = (annotations / CLASSES, meta / CLASSES)
    dishes = of_pictures.names(next(filter(Path.is_file, here), here[1]), DISHES, "dish")
    texts = [
        ingredient_text(line)
        for line in lists.names(annotations / TEXTS[kind], DISHES, "dish", blank=True)
    ]
    labelled = {split: _read_labelled(annotations, split, lists) for split in SPLITS}
    found = Pictures(pictures, of_pictures)
    splits = {split: _examples(lines, dishes, texts, found) for split, lines in labelled.items()}
    checked(splits, problems, source)
    for sentence in other_splits(pictures, meta, splits):
        say(f"warning: {sentence}")
    return pictures, splits


def find_annotations(source: Path) -> Path | None:
    """Find the folder with the lists of pictures and ingredients; None: in no known place."""
    names = (*(f"{split}_images.txt" for split in SPLITS), *TEXTS.values())
    places = (source / place for place in PLACES)
    return next((p for p in places if any((p / name).is_file() for name in names)), None)


def ingredient_text(line: str) -> str:
    """Return the ingredients of a line, joined by ", "; some of the published ones are empty."""
    return ", ".join(name for part in line.split(",") if (name := part.strip())) or UNKNOWN


def other_splits(pictures: Path, meta: Path, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Write one sentence for each split of Food-101 that the lists do not follow.

    Food-101's test pictures should be those of test, its training pictures those of train and val.
    """
    found = []
    for name, parts in (("train.txt", ("train", "val")), ("test.txt", ("test",))):
        if not (meta / name).is_file():
            continue
        listed = set((meta / name).read_text("utf-8", "replace").split())
        ours = {
            Path(str(e.image)).relative_to(pictures).with_suffix("").as_posix()
            for part in parts
            for e in splits[part]
        }
        if count := len(listed ^ ours):
            found.append(
                f"{count:,} pictures are in {' and '.join(parts)} or in {meta / name}, and not in "
                "both; results cannot be compared with those on Food-101"
            )
    return found


def _read_labelled(
    annotations: Path, split: str, lists: Lists
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Read picture and label of every picture of a split, each as ("FILE:LINE", text)."""
    images, labels = (annotations / f"{split}_{kind}.txt" for kind in ("images", "labels"))
    pictures, numbers = lists.lines(images, LINE_EXAMPLE), lists.lines(labels, LABEL_EXAMPLE)
    if pictures and numbers and len(pictures) != len(numbers):
        lists.problems.add(
            f"{labels}: {len(numbers):,} labels, expected {len(pictures):,}, one for each line of "
            f"{images.name}; {_RESTORE}"
        )
        return []
    return list(zip(pictures, numbers, strict=False))  # that a file has no lines has been told


def _examples(
    lines: Sequence[tuple[tuple[str, str], tuple[str, str]]],
    dishes: Sequence[str],
    texts: Sequence[str],
    pictures: Pictures,
) -> list[Example]:
    """Make the examples of the good lines of one split."""
    examples: list[Example] = []
    problems = pictures.lists.problems
    for (origin, line), (label_origin, label) in lines:
        path = f"{line.strip().removeprefix('/')}.jpg"
        if re.fullmatch("[^/]+/[^/]+", path) is None:
            got = quoted(line.strip())
            problems.add(f"{origin}: got {got}, expected a line like {LINE_EXAMPLE!r}; {_RESTORE}")
            continue
        pictures.check(path, origin)
        folder = path.partition("/")[0]
        if fault := _label_fault(label.strip(), folder, dishes):
            problems.add(f"{label_origin}: {fault}; {_RESTORE}")
        elif texts:
            examples.append(Example(pictures.root / path, folder, texts[int(label)], origin))
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

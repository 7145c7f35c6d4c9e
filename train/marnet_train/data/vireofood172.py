"""VireoFood-172: photographs of Chinese dishes with the ingredients on each.

110,241 pictures of 172 dishes, with 353 ingredients (J. Chen and C.-W. Ngo, "Deep-based Ingredient
Recognition for Cooking Recipe Retrieval", ACM Multimedia 2016). Nothing is downloaded here.

    ready_chinese_food/3/1_2.jpg           pictures, in a folder for each dish, 1 to 172
    SplitAndIngreLabel/TR.txt, VAL.txt, TE.txt   one picture per line: /3/1_2.jpg
    SplitAndIngreLabel/IngreLabel.txt      one picture per line: its path, then 353 numbers, 1 where
                                           the ingredient is in it and -1 where it is not
    SplitAndIngreLabel/IngredientList.txt  names of the ingredients, in the order of those numbers
    SplitAndIngreLabel/FoodList.txt        names of the dishes, 1 to 172

The text of a picture is the names of its own ingredients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from marnet_sdk.errors import NotFound
from marnet_train.data.examples import Example, Problems
from marnet_train.data.image_names import quoted
from marnet_train.data.lists import UNKNOWN, Lists, Pictures, Splits, checked

ADDRESS = "http://vireo.cs.cityu.edu.hk/VireoFood172/"
OFFICIAL = {"train": 66_071, "val": 11_016, "test": 33_154}  # pictures
KINDS: tuple[str, ...] = ("own",)
DISHES, INGREDIENTS = 172, 353
PICTURES, LABELS = "ready_chinese_food", "SplitAndIngreLabel"
LISTS = {"train": "TR.txt", "val": "VAL.txt", "test": "TE.txt"}
PRESENCE, INGREDIENT_LIST, DISH_LIST = "IngreLabel.txt", "IngredientList.txt", "FoodList.txt"
LINE_EXAMPLE = "/3/1_2.jpg"
_RESTORE = f"restore it from {ADDRESS}"
_VALUES = {"1", "-1", "0"}  # 0 is in no copy that we know of, but only 1 says that it is there


def read(source: Path, kind: str = KINDS[0]) -> tuple[Path, Splits]:
    """Read the folder that holds pictures and labels: see `published.Published`."""
    pictures, labels = source / PICTURES, source / LABELS
    if not pictures.is_dir() and not labels.is_dir():
        raise NotFound(
            f"{source}: no {PICTURES} or {LABELS} there; expected the folder that holds both. "
            f"Get VireoFood-172 from its authors: {ADDRESS}"
        )
    problems = Problems()
    lists = Lists(problems, _RESTORE)
    if not pictures.is_dir():
        problems.add(f"{pictures}: no such folder, expected the pictures; {_RESTORE}")
    names = dish_labels(lists.names(labels / DISH_LIST, DISHES, "dish"))
    ingredients = lists.names(labels / INGREDIENT_LIST, INGREDIENTS, "ingredient")
    lines = {split: lists.lines(labels / name, LINE_EXAMPLE) for split, name in LISTS.items()}
    texts = _read_texts(labels / PRESENCE, ingredients, lists)
    found = Pictures(pictures, lists)
    splits = {split: _examples(listed, names, texts, found) for split, listed in lines.items()}
    return pictures, checked(splits, problems, source)


def dish_labels(names: Sequence[str]) -> list[str]:
    """Return a label for each dish: its name, with its number where dishes share one."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({number})"
        for number, name in enumerate(names, start=1)
    ]


def parse_line(line: str) -> tuple[str, int] | str:
    """Return path and dish number of a line of a list, or say what is wrong with it."""
    path = line.strip().lstrip("/")
    match = re.fullmatch("([0-9]{1,9})/[^/]+", path)
    if match is None:
        return f"got {quoted(line.strip())}, expected a line like {LINE_EXAMPLE!r}; {_RESTORE}"
    number = int(match[1])
    if not 1 <= number <= DISHES:
        return f"{quoted(path)} is of dish {number}, expected 1 to {DISHES}; {_RESTORE}"
    return path, number


def parse_presence(line: str) -> list[int] | str:
    """Return the ingredients on a line of IngreLabel.txt, or say what is wrong with it.

    Ingredients are numbered from 0, in their order.
    """
    values = line.split()[1:]
    if len(values) != INGREDIENTS:
        return (
            f"{len(values) + 1} fields, expected {INGREDIENTS + 1}: a path and a number for each "
            f"ingredient; {_RESTORE}"
        )
    if odd := set(values) - _VALUES:
        value = min(odd)
        return f"field {values.index(value) + 2} is {quoted(value)}, expected 1 or -1; {_RESTORE}"
    return [number for number, value in enumerate(values) if value == "1"]


def _read_texts(path: Path, ingredients: Sequence[str], lists: Lists) -> dict[str, str | None]:
    """Read path -> text, or None where something is wrong, which has been told."""
    texts: dict[str, str | None] = {}
    first: dict[str, str] = {}  # path -> line on which it was
    problems, before = lists.problems, lists.problems.count
    for origin, line in lists.every_line(path):
        if not line.strip():
            continue
        found = parse_presence(line)
        picture = line.split()[0].lstrip("/")
        if picture in first:
            problems.add(f"{origin}: {quoted(picture)} was already on {first[picture]}; keep one")
            continue
        first[picture] = origin
        if isinstance(found, str):
            problems.add(f"{origin}: {found}")
            texts[picture] = None
        else:
            there = [ingredients[number] for number in found] if ingredients else []
            texts[picture] = ", ".join(there) or UNKNOWN
    if not first and problems.count == before:
        problems.add(f"{path}: no lines, expected one for each picture; {_RESTORE}")
    return texts


def _examples(
    lines: Sequence[tuple[str, str]],
    labels: Sequence[str],
    texts: Mapping[str, str | None],
    pictures: Pictures,
) -> list[Example]:
    """Make the examples of the good lines of one list."""
    examples: list[Example] = []
    problems = pictures.lists.problems
    for origin, line in lines:
        found = parse_line(line)
        if isinstance(found, str):
            problems.add(f"{origin}: {found}")
            continue
        path, number = found
        pictures.check(path, origin)
        if texts and path not in texts:  # without any line, that it is unusable has been told
            problems.add(f"{origin}: {quoted(path)} is on no line of {PRESENCE}; {_RESTORE}")
        if labels:
            text = texts.get(path)
            examples.append(Example(pictures.root / path, labels[number - 1], text, origin))
    return examples

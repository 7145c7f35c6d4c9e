"""Ingredients-101 as an image folder, from a tiny copy with the same files.

It has the quirks of real copies: pictures listed without ending, numbers of dishes from 0, a last
line without line end, an empty name among the ingredients, annotations in one of several places,
names of dishes in another spelling. All 101 dishes are named; only three have pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture

from marnet_sdk.errors import DataError, NotFound
from marnet_train.cli import main
from marnet_train.data.ingredients101 import (
    DISHES,
    PLACES,
    ingredient_text,
    read,
)
from marnet_train.data.published import NOTICE_FILE, write_published

HERE = "Ingredients101/Annotations"
CLASSES = ["apple_pie", "baby_back_ribs", *(f"dish_{n}" for n in range(2, DISHES - 1)), "waffles"]
COMPLETE = ["butter, flour,apples", "pork ribs,,salt", *["water"] * 98, "milk"]
SIMPLIFIED = ["butter,flour,apple", "pork,salt", *["water"] * 98, ""]
LISTS = {
    "train": (["apple_pie/134", "apple_pie/2", "waffles/9", "baby_back_ribs/8"], [0, 0, 100, 1]),
    "val": (["apple_pie/7"], [0]),
    "test": (["waffles/5", "baby_back_ribs/6"], [100, 1]),
}
IMAGE = "food-101/images/apple_pie/134.jpg"


def make_copy(source: Path, place: str = HERE) -> Path:
    """A copy of seven pictures of dishes 0, 1 and 100; returns its folder."""
    annotations, meta = source / place, source / "food-101/meta"
    annotations.mkdir(parents=True)
    meta.mkdir(parents=True)
    (meta / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (meta / "train.txt").write_text("\n".join(LISTS["train"][0] + LISTS["val"][0]))
    (meta / "test.txt").write_text("\n".join(reversed(LISTS["test"][0])))
    (annotations / "ingredients.txt").write_text("\n".join(COMPLETE))
    (annotations / "ingredients_simplified.txt").write_text("\n".join(SIMPLIFIED) + "\n")
    number = 0
    for split, (images, labels) in LISTS.items():
        (annotations / f"{split}_images.txt").write_text("".join(f"{i}\n" for i in images))
        (annotations / f"{split}_labels.txt").write_text("".join(f"{i}\n" for i in labels))
        for image in images:
            number += 1
            target = source / f"food-101/images/{image}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encode(make_picture(16 + number, 16), "JPEG"))
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_copy(tmp_path / "copy")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def add(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}{line}\n")


def ingredients(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "ingredients101", *map(str, words)])


def test_every_picture_gets_the_ingredients_of_its_dish(source: Path, tmp_path: Path) -> None:
    data = write_published("ingredients101", source, tmp_path / "out")
    assert data.labels == ("apple_pie", "baby_back_ribs", "waffles")
    found = {
        split: [(e.image.name, e.label, e.text) for e in examples]
        for split, examples in data.splits.items()
    }
    pie, ribs = ("apple_pie", "butter, flour, apples"), ("baby_back_ribs", "pork ribs, salt")
    waffles = ("waffles", "milk")
    assert found == {
        "train": [
            ("apple_pie__134.jpg", *pie),
            ("apple_pie__2.jpg", *pie),
            ("waffles__9.jpg", *waffles),
            ("baby_back_ribs__8.jpg", *ribs),
        ],
        "val": [("apple_pie__7.jpg", *pie)],
        "test": [("waffles__5.jpg", *waffles), ("baby_back_ribs__6.jpg", *ribs)],
    }
    for split, (images, _) in LISTS.items():
        for image, written in zip(images, data.splits[split], strict=True):
            original = source / f"food-101/images/{image}.jpg"
            assert written.image.read_bytes() == original.read_bytes()
    assert "ICIAP Workshops, 2017" in (tmp_path / "out" / NOTICE_FILE).read_text("utf-8")


def test_the_simplified_lists_can_be_chosen(source: Path) -> None:
    found = read(source, "simplified")[1]
    texts = [example.text for example in found["train"]]
    assert texts == ["butter, flour, apple"] * 2 + ["unknown", "pork, salt"]


@pytest.mark.parametrize("place", PLACES)
def test_annotations_are_found_in_every_usual_place(place: str, tmp_path: Path) -> None:
    found = read(make_copy(tmp_path / "copy", place))[1]
    assert {split: len(examples) for split, examples in found.items()} == {
        "train": 4,
        "val": 1,
        "test": 2,
    }


def test_names_beside_the_annotations_may_be_spelt_otherwise(source: Path) -> None:
    before = read(source)[1]
    names = [name.replace("_", " ").capitalize() for name in CLASSES]
    (source / HERE / "classes.txt").write_bytes("\r\n".join(names).encode())
    (source / "food-101/meta/classes.txt").unlink()
    assert read(source)[1] == before


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (
        lambda source: (source / IMAGE).unlink(),
        r"train_images\.txt:1: no file 'apple_pie/134\.jpg' in .*images; restore it from https://data",
    ),
    "no images": (
        lambda source: (source / "food-101/images").rename(source / "elsewhere"),
        r"images: no such folder, expected the pictures; restore it from https://data\.vision",
    ),
    "no list": (
        lambda source: (source / HERE / "val_images.txt").unlink(),
        r"val_images\.txt: missing; restore it from https://github\.com/MarcBS",
    ),
    "no labels": (
        lambda source: (source / HERE / "val_labels.txt").unlink(),
        r"val_labels\.txt: missing; restore it from https://github\.com/MarcBS",
    ),
    "a label too few": (
        lambda source: edit(source / HERE / "train_labels.txt", "100\n", ""),
        r"train_labels\.txt: 3 labels, expected 4, one for each line of train_images\.txt; restore",
    ),
    "labels from 1": (
        lambda source: edit(source / HERE / "test_labels.txt", "100\n", "101\n"),
        r"test_labels\.txt:1: got '101', expected the number of a dish, 0 to 100; restore",
    ),
    "a name for a label": (
        lambda source: edit(source / HERE / "val_labels.txt", "0", "apple_pie"),
        r"val_labels\.txt:1: got 'apple_pie', expected the number of a dish",
    ),
    "another label": (
        lambda source: edit(source / HERE / "val_labels.txt", "0", "1"),
        r"val_labels\.txt:1: dish 1 is 'baby_back_ribs', but .* in the folder 'apple_pie'; restore",
    ),
    "another line": (
        lambda source: edit(source / HERE / "val_images.txt", "apple_pie/7", "7"),
        r"val_images\.txt:1: got '7', expected a line like 'apple_pie/134'; restore",
    ),
    "a picture in two lists": (
        lambda source: edit(source / HERE / "val_images.txt", "apple_pie/7", "apple_pie/2"),
        r"val_images\.txt:1: 'apple_pie/2\.jpg' was already on .*train_images\.txt:2; keep one",
    ),
    "no ingredients": (
        lambda source: (source / HERE / "ingredients.txt").unlink(),
        r"ingredients\.txt: missing; restore",
    ),
    "ingredients of a dish too few": (
        lambda source: edit(source / HERE / "ingredients.txt", "water\n", ""),
        r"ingredients\.txt: 100 lines, expected 101, one for each dish; restore",
    ),
    "no names": (
        lambda source: (source / "food-101/meta/classes.txt").unlink(),
        r"meta/classes\.txt: missing; restore it from https://data\.vision",
    ),
    "a dish that train lacks": (
        lambda source: (
            edit(source / HERE / "train_images.txt", "waffles/9\n", ""),
            edit(source / HERE / "train_labels.txt", "100\n", ""),
        ),
        r"test_images\.txt:1: class 'waffles' is not in train, expected one of its 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_line(fault: str, source: Path) -> None:
    damage, told = FAULTS[fault]
    damage(source)
    with pytest.raises(DataError, match=rf"1 problem in .*\n.*{told}"):
        read(source)


def test_everything_is_told_at_once(source: Path) -> None:
    (source / IMAGE).unlink()
    (source / HERE / "ingredients.txt").unlink()
    (source / HERE / "test_images.txt").unlink()
    add(source / HERE / "val_images.txt", "nonsense")
    add(source / HERE / "val_labels.txt", "0")
    with pytest.raises(DataError, match="4 problems in") as raised:
        read(source)[1]
    places = ("ingredients.txt: missing", "test_images.txt: missing", "train_images.txt:1:")
    for place in (*places, "val_images.txt:2: got 'nonsense'"):
        assert place in str(raised.value)


def test_what_is_no_copy_is_told_with_where_to_get_one(tmp_path: Path) -> None:
    told = "no food-101/images or Ingredients101/Annotations there.*pictures from https://data"
    with pytest.raises(NotFound, match=told):
        read(tmp_path)


def test_other_test_pictures_than_those_of_food_101_are_warned_of(
    source: Path, tmp_path: Path
) -> None:
    edit(source / "food-101/meta/test.txt", "waffles/5", "waffles/55")
    result = ingredients("--source", source, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning: 2 pictures are in test or in " in result.stderr
    assert "train and val" not in result.stderr


@given(st.text())
def test_ingredients_are_names_between_commas_or_unknown(line: str) -> None:
    names = ingredient_text(line).split(", ")
    assert all(name.strip() == name and name for name in names)
    assert (names == ["unknown"]) == (line.replace(",", "").strip() in ("", "unknown"))


def test_the_command_writes_warns_and_names_the_next_one(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = ingredients("--source", source, "--out", out, "--ingredients", "simplified")
    assert result.exit_code == 0, result.output
    assert "warning: train has 4 images, the official split has 68,175" in result.stderr
    assert f"--data {out} --recipe ingredients101 --out runs/ingredients101\n" in result.stderr

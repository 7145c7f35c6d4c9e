"""The digits as an image folder: the same numbers, a fair split, and honest texts."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marnet_sdk.errors import MissingExtra, OutputExists
from marnet_train.data import digit_shapes
from marnet_train.data import digits as writer
from marnet_train.data.dataset import DataSet, Example, data_hash, read_data_set
from marnet_train.data.digit_words import OUTLINES, describe, loop_detail, openings
from marnet_train.data.digits import ink, load_pictures, png_bytes, split_indices, write_digits

pytest.importorskip("sklearn")

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def digits(digits: Path) -> DataSet:
    """The data set that all tests share, read. Tests must not change it."""
    return read_data_set(digits)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 200 pictures, which is written in less than a second."""
    pictures, labels = load_pictures()
    monkeypatch.setattr(writer, "load_pictures", lambda: (pictures[:200], labels[:200]))


def all_examples(folder: DataSet) -> list[Example]:
    return [example for examples in folder.splits.values() for example in examples]


def texts_of(folder: DataSet) -> list[str]:
    return [example.text or "" for example in all_examples(folder)]


def test_split_is_70_15_15_and_complete(digits: DataSet) -> None:
    assert {name: len(rows) for name, rows in digits.splits.items()} == {
        "train": 1257,
        "val": 270,
        "test": 270,
    }
    assert digits.labels == tuple("0123456789")
    names = {example.image.name for example in all_examples(digits)}
    assert names == {f"{index:04d}.png" for index in range(1797)}


def test_every_split_has_the_classes_in_proportion(digits: DataSet) -> None:
    whole = Counter(example.label for example in all_examples(digits))
    for rows in digits.splits.values():
        share = len(rows) / 1797
        found = Counter(example.label for example in rows)
        assert all(abs(found[label] - share * whole[label]) < 1.5 for label in whole)


def test_images_are_native_size_and_give_the_ink_back(digits: DataSet) -> None:
    pictures, labels = load_pictures()
    for example in all_examples(digits):
        index = int(example.image.stem)
        with Image.open(example.image) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
            grey = np.asarray(image)
        np.testing.assert_array_equal(ink(grey), pictures[index])
        assert example.label == str(labels[index])


def test_grey_levels_span_the_range() -> None:
    levels = np.arange(17.0)
    grey = np.rint(levels * 255 / 16).astype(np.uint8)
    assert (grey[0], grey[8], grey[16]) == (0, 128, 255)
    np.testing.assert_array_equal(ink(grey), levels)


@pytest.mark.usefixtures("few")
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    first, again = (write_digits(tmp_path / name) for name in ("first", "again"))
    other = write_digits(tmp_path / "other", seed=1)
    assert data_hash(again) == data_hash(first)
    assert data_hash(other) != data_hash(first)
    metadata = (split / "metadata.jsonl" for split in (again.root / "train", first.root / "train"))
    assert len({path.read_bytes() for path in metadata}) == 1


def test_png_bytes_do_not_depend_on_a_compressor() -> None:
    # A stored block: header byte 1 (last, stored), length 72 and its complement, then the rows.
    assert b"\x01\x48\x00\xb7\xff" + b"\x00" * 9 in png_bytes(np.zeros((8, 8)))


def test_split_is_disjoint_for_any_seed() -> None:
    _, labels = load_pictures()
    for seed in range(3):
        parts = split_indices(labels, seed=seed)
        joined = np.concatenate(list(parts.values()))
        np.testing.assert_array_equal(np.sort(joined), np.arange(len(labels)))


def test_existing_output_is_kept_unless_told(digits: DataSet) -> None:
    before = data_hash(digits)
    with pytest.raises(OutputExists, match="digits already exists"):
        write_digits(digits.root, seed=1)
    assert data_hash(digits) == before


@pytest.mark.usefixtures("few")
def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/metadata.jsonl").touch()
    (tmp_path / "out/stale.txt").touch()
    write_digits(tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train", "val"]


def test_overwrite_spares_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "photos/train").mkdir(parents=True)
    (tmp_path / "photos/train/mine.jpg").write_text("keep me")
    with pytest.raises(OutputExists, match=r"photos holds something else: .* choose another"):
        write_digits(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos/train/mine.jpg").read_text() == "keep me"


def test_missing_scikit_learn_is_told_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it now fails
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[train\]"'):
        write_digits(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_text_names_a_digit(digits: DataSet) -> None:
    forbidden = re.compile(rf"\d|\b({'|'.join(NAMES)})s?\b", re.IGNORECASE)
    phrases = [p for group in OUTLINES.values() for outline in group for p in outline.phrases]
    assert [text for text in texts_of(digits) + phrases if forbidden.search(text)] == []


def test_texts_vary_in_all_and_in_each_class(digits: DataSet) -> None:
    assert len(set(texts_of(digits))) > 1500
    for label in digits.labels:
        own = {example.text for example in all_examples(digits) if example.label == label}
        assert len(own) > 100


def test_texts_are_short_plain_lines(digits: DataSet) -> None:
    for text in texts_of(digits):
        assert re.fullmatch(r"[a-z][a-z ,;:]*[a-z]", text), text
        assert not re.search(r"  | [,;:]|[,;:]\S", text), text
        assert 5 <= len(text.split()) <= 45, text


def test_every_outline_is_used(digits: DataSet) -> None:
    for digit, outlines in OUTLINES.items():
        texts = [e.text or "" for e in all_examples(digits) if e.label == str(digit)]
        for outline in outlines:
            assert any(phrase in text for phrase in outline.phrases for text in texts), outline


def test_text_follows_the_picture() -> None:
    pictures, labels = load_pictures()
    for digit, picture in zip(labels[:200].tolist(), pictures[:200], strict=True):
        slant = digit_shapes.measure(picture).slant
        text = describe(digit, picture, random.Random(0))
        assert bool(re.search(r"slanted right|leaning forward", text)) == (slant > 0.05)
        assert bool(re.search(r"slanted left|leaning back", text)) == (slant <= -0.05)


def test_class_changes_the_outline_and_not_the_facts() -> None:
    pictures, _ = load_pictures()
    first, second = (describe(digit, pictures[0], random.Random(3)) for digit in (4, 9))
    assert first != second
    assert re.findall("upright|slanted", first) == re.findall("upright|slanted", second)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ((), ""),
        (("upper left",), "open at the upper left"),
        (("upper left", "lower left"), "open on the left"),
        (("upper left", "lower right"), "open at the upper left and at the lower right"),
        (("upper left", "lower left", "upper right", "lower right"), "open on both sides"),
        (("upper right", "top"), "open at the upper right and at the top"),
    ],
)
def test_openings_in_words(places: tuple[str, ...], words: str) -> None:
    assert openings(shape_with(openings=places)) == words


@pytest.mark.parametrize(
    ("loops", "words"),
    [
        ((), ""),
        ((digit_shapes.Loop(1.0, 2),), "small high loop"),
        ((digit_shapes.Loop(3.5, 5),), "fair centred loop"),
        ((digit_shapes.Loop(6.0, 9),), "roomy low loop"),
        ((digit_shapes.Loop(1.0, 2), digit_shapes.Loop(6.0, 2)), ""),
    ],
)
def test_single_loop_in_words(loops: tuple[digit_shapes.Loop, ...], words: str) -> None:
    assert loop_detail(shape_with(loops=loops)) == words


def shape_with(
    *, openings: tuple[str, ...] = (), loops: tuple[digit_shapes.Loop, ...] = ()
) -> digit_shapes.Shape:
    return digit_shapes.Shape(
        mass=20, slant=0, aspect=0.6, balance=(0, 0), loops=loops, openings=openings, bars=()
    )

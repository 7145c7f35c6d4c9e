"""Rendered plates: same seed, same bytes; the text says what is there; nothing decides alone."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from marnet_sdk.errors import InvalidInput, OutputExists
from marnet_train.cli import main
from marnet_train.data.dataset import read_data_set
from marnet_train.data.examples import DataSet
from marnet_train.data.plates.brush import Brush
from marnet_train.data.plates.food import FOODS
from marnet_train.data.plates.menu import DISHES, INGREDIENTS, NAMES, presence, serve
from marnet_train.data.plates.scene import place_food
from marnet_train.data.plates.writer import (
    CONTACT_SHEET,
    LEAST,
    Plates,
    dish_of,
    render,
    split_indices,
    write_plates,
)

SMALL = Plates(images=LEAST, size=32)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder that the command wrote, and what it said."""
    out = tmp_path_factory.mktemp("plates") / "plates"
    arguments = ["--out", str(out), "--images", str(LEAST), "--size", "32", "--workers", "1"]
    return out, CliRunner().invoke(main, ["data", "plates", *arguments])


@pytest.fixture(scope="module")
def folder(command: tuple[Path, Result]) -> Path:
    return command[0]


@pytest.fixture(scope="module")
def plates(folder: Path) -> DataSet:
    return read_data_set(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)), np.float64)


def test_the_bytes_depend_neither_on_the_workers_nor_on_the_run(folder, tmp_path):
    """Nor on whether the command or a program writes them."""
    write_plates(tmp_path / "again", SMALL, workers=2)
    assert files(tmp_path / "again") == files(folder)


def test_another_seed_gives_other_pictures_and_other_texts():
    serving, image = render(0, SMALL)
    other, picture = render(0, replace(SMALL, seed=1))
    assert image != picture
    assert [render(i, SMALL)[0].text for i in range(9)] != [
        render(i, replace(SMALL, seed=1))[0].text for i in range(9)
    ]
    assert serving.dish == other.dish


def test_a_picture_does_not_depend_on_how_many_there_are():
    assert render(5, SMALL) == render(5, replace(SMALL, images=10 * LEAST))


def test_every_split_has_every_dish_evenly(plates):
    for split, examples in plates.splits.items():
        counts = Counter(example.label for example in examples)
        assert set(counts) == set(NAMES), split
        assert max(counts.values()) - min(counts.values()) <= 1
    assert plates.labels == NAMES
    sizes = {split: len(examples) for split, examples in plates.splits.items()}
    assert sizes["train"] == pytest.approx(0.7 * LEAST, abs=len(NAMES))
    assert sum(sizes.values()) == LEAST


def test_no_picture_is_in_two_splits():
    parts = split_indices(Plates(images=1000))
    assert sorted(index for part in parts.values() for index in part) == list(range(1000))


def test_the_text_is_a_list_of_known_ingredients_and_never_the_dish(plates):
    for examples in plates.splits.values():
        for example in examples:
            words = example.text.split(", ")
            assert set(words) <= set(INGREDIENTS)
            assert len(set(words)) == len(words)
            assert 3 <= len(words) <= 9
            assert example.label not in example.text


def test_every_ingredient_has_a_look_and_is_used():
    assert set(FOODS) == set(INGREDIENTS)


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_ingredient_that_is_named_is_drawn(name):
    """Drawn alone on a plain ground, it changes pixels there; and its count is never zero."""
    brush = Brush(64, np.random.default_rng(0))
    before = np.asarray(brush.image).copy()
    food = FOODS[name]
    food.piece(brush, (0.0, 0.0))
    assert (np.asarray(brush.image) != before).any()
    assert 1 <= food.count[0] <= food.count[1]


def test_only_the_ingredients_of_the_serving_are_drawn(monkeypatch):
    drawn = Counter()
    for name, food in FOODS.items():

        def piece(brush, at, name=name):
            drawn[name] += 1

        monkeypatch.setitem(FOODS, name, replace(food, piece=piece))
    serving = serve("pho", np.random.default_rng(3), 0.5)
    place_food(Brush(32, np.random.default_rng(0)), serving, 0.7)
    assert set(drawn) == set(serving.ingredients)


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_no_ingredient_decides_the_dish(difficulty):
    """P(dish | ingredient), with all dishes as likely, is at most about one half."""
    chances = {dish: presence(dish, difficulty) for dish in NAMES}
    for name in INGREDIENTS:
        column = np.array([chances[dish][name] for dish in NAMES])
        assert column.max() / column.sum() <= 0.51, name


def test_dishes_are_many_and_share_their_ingredients():
    assert len(DISHES) >= 12
    uses = Counter(name for contents in DISHES.values() for name in contents)
    assert min(uses.values()) >= 3


@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_serving_is_three_to_nine_different_ingredients(dish, seed, difficulty):
    serving = serve(dish, np.random.default_rng(seed), difficulty)
    assert serving.dish == dish
    assert 3 <= len(set(serving.ingredients)) == len(serving.ingredients) <= 9
    if difficulty == 0:
        assert set(serving.ingredients) <= set(DISHES[dish])


def test_ingredients_come_as_often_as_the_menu_says():
    chances = presence("pho", 0.5)
    counts = Counter(
        name
        for seed in range(2000)
        for name in serve("pho", np.random.default_rng(seed), 0.5).ingredients
    )
    for name in ("noodles", "beef", "coriander"):
        # Fewer than three or more than nine are corrected, which moves this a little.
        assert counts[name] / 2000 == pytest.approx(chances[name], abs=0.05)


@pytest.mark.parametrize("size", [48, 75, 200])
def test_the_size_is_honoured_and_shows_the_same_scene(size):
    """The scene, not the sensor's noise, which has its own grain at every size."""
    clean = Plates(size=size, difficulty=0.0)
    serving, image = render(7, clean)
    picture = Image.open(io.BytesIO(image))
    assert (picture.format, picture.size, picture.mode) == ("JPEG", (size, size), "RGB")
    reference, large = render(7, replace(clean, size=256))
    assert serving == reference
    small = [
        Image.open(io.BytesIO(x)).resize((16, 16), Image.Resampling.BOX) for x in (image, large)
    ]
    assert np.abs(np.subtract(*[np.asarray(x, np.float64) for x in small])).mean() < 8


def test_difficulty_makes_pictures_less_sharp():
    def sharpness(difficulty: float) -> float:
        sets = (pixels(render(i, replace(SMALL, size=64, difficulty=difficulty))[1])
                for i in range(30))  # fmt: skip
        return float(np.median([np.abs(np.diff(x, axis=0)).mean() for x in sets]))

    assert sharpness(1.0) < 0.9 * sharpness(0.0)


def test_a_contact_sheet_shows_some_pictures_of_every_dish(folder, plates):
    with Image.open(folder / CONTACT_SHEET) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > len(NAMES) * 96
        assert sheet.width > 6 * 96
        first = sheet.crop((120, 8, 152, 40))
    expected = Image.open(io.BytesIO(render(0, SMALL)[1]))
    assert np.array_equal(np.asarray(first), np.asarray(expected))
    assert dish_of(0) == NAMES[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": LEAST - 1}, rf"--images {LEAST - 1}: expected at least {LEAST}"),
        ({"size": 31}, "--size 31: expected 32 to 512"),
        ({"size": 513}, "--size 513: expected 32 to 512"),
        ({"difficulty": 1.5}, r"--difficulty 1\.5: expected 0 to 1"),
        ({"difficulty": float("nan")}, "--difficulty nan: expected 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Plates(**settings)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="holds something else"):
        write_plates(tmp_path / "out", SMALL, workers=1, overwrite=True)


def test_the_command_writes_them_and_names_the_next_one(command):
    out, result = command
    assert result.exit_code == 0, result.output
    assert f"marnet-train fit --data {out} --recipe plates" in result.output
    assert CONTACT_SHEET in result.output


def test_the_command_refuses_in_one_line(tmp_path):
    arguments = ["data", "plates", "--out", str(tmp_path / "x"), "--images", "5"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Error: --images 5: expected at least" in result.output

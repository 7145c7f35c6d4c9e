"""VireoFood-172 as an image folder, from a tiny copy with the same files.

It has the quirks of real copies: paths that begin with a slash, semicolons behind names, CRLF, two
blanks behind a path, dishes that share a name, a picture in which no ingredient is marked. Names
and numbers of ingredients are complete; only three dishes have pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from pictures import encode, make_picture

from marnet_sdk.errors import DataError, NotFound
from marnet_train.cli import main
from marnet_train.data.published import NOTICE_FILE, write_published
from marnet_train.data.vireofood172 import (
    DISHES,
    INGREDIENTS,
    LABELS,
    PICTURES,
    parse_line,
    parse_presence,
    read,
)

LISTS = {
    "train": ("TR.txt", ["/3/1_2.jpg", "/3/2_0.jpg", "/12/1_1.jpg", "/172/5_5.jpg"]),
    "val": ("VAL.txt", ["/3/9_9.jpg"]),
    "test": ("TE.txt", ["/12/7_7.jpg", "/172/8_8.jpg"]),
}
PATHS = [path for _, paths in LISTS.values() for path in paths]
PRESENT = {"/3/1_2.jpg": [0, 352], "/3/2_0.jpg": [7], "/12/1_1.jpg": []}  # the others: [1]
IMAGE = f"{PICTURES}/3/1_2.jpg"


def row(path: str, present: list[int], blanks: str = " ") -> str:
    values = ("1" if number in present else "-1" for number in range(INGREDIENTS))
    return f"{path}{blanks}{' '.join(values)}"


def make_copy(source: Path) -> Path:
    """A copy of seven pictures of dishes 3, 12 and 172; returns its folder."""
    labels = source / LABELS
    labels.mkdir(parents=True)
    dishes = [f"Dish {number}" for number in range(1, DISHES + 1)]
    dishes[2] = dishes[171] = "Fried rice"
    (labels / "FoodList.txt").write_text("".join(f"{name};\n" for name in dishes))
    ingredients = [f"ingredient {number}" for number in range(INGREDIENTS)]
    (labels / "IngredientList.txt").write_bytes("\r\n".join([*ingredients, ""]).encode())
    for name, paths in LISTS.values():
        (labels / name).write_text("".join(f"{path}\n" for path in paths))
    rows = [row(path, PRESENT.get(path, [1])) for path in PATHS]
    rows[1] = row(PATHS[1], [7], blanks="  ")
    (labels / "IngreLabel.txt").write_text("\n".join(rows) + "\n")
    for number, path in enumerate(PATHS):
        target = source / f"{PICTURES}{path}"
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


def vireofood(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "vireofood172", *map(str, words)])


def test_every_picture_gets_its_dish_and_its_own_ingredients(source: Path, tmp_path: Path) -> None:
    data = write_published("vireofood172", source, tmp_path / "out")
    assert data.labels == ("Dish 12", "Fried rice (3)", "Fried rice (172)")
    found = {
        split: [(e.image.name, e.label, e.text) for e in examples]
        for split, examples in data.splits.items()
    }
    rice, other, one = "Fried rice (3)", "Fried rice (172)", "ingredient 1"
    assert found == {
        "train": [
            ("3__1_2.jpg", rice, "ingredient 0, ingredient 352"),
            ("3__2_0.jpg", rice, "ingredient 7"),
            ("12__1_1.jpg", "Dish 12", "unknown"),
            ("172__5_5.jpg", other, one),
        ],
        "val": [("3__9_9.jpg", rice, one)],
        "test": [("12__7_7.jpg", "Dish 12", one), ("172__8_8.jpg", other, one)],
    }
    for split, (_, paths) in LISTS.items():
        for path, written in zip(paths, data.splits[split], strict=True):
            assert written.image.read_bytes() == (source / f"{PICTURES}{path}").read_bytes()


def test_lists_may_lack_slashes_and_have_other_line_ends(source: Path) -> None:
    before = read(source)[1]
    for name, paths in LISTS.values():
        text = "\r\n\r\n".join(f" {path.lstrip('/')} " for path in paths)
        (source / LABELS / name).write_bytes(f"\ufeff{text}".encode())
    assert read(source)[1] == before


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (
        lambda source: (source / IMAGE).unlink(),
        r"1 problem in .*\n.*TR\.txt:1: no file '3/1_2\.jpg' in .*ready_chinese_food; restore",
    ),
    "no images": (
        lambda source: (source / PICTURES).rename(source / "elsewhere"),
        r"1 problem in .*\n.*ready_chinese_food: no such folder, expected the pictures; restore",
    ),
    "no labels": (
        lambda source: (source / LABELS).rename(source / "elsewhere"),
        r"6 problems in .*\n.*FoodList\.txt: missing; restore it from http(.*\n)+.*IngreLabel",
    ),
    "no list": (
        lambda source: (source / LABELS / "TE.txt").unlink(),
        r"1 problem in .*\n.*TE\.txt: missing; restore it from http://vireo",
    ),
    "an empty list": (
        lambda source: (source / LABELS / "VAL.txt").write_text("\n"),
        r"1 problem in .*\n.*VAL\.txt: no lines, expected some like '/3/1_2\.jpg'; restore",
    ),
    "another line": (
        lambda source: add(source / LABELS / "VAL.txt", "rice/3/1_2.jpg"),
        r"1 problem in .*\n.*VAL\.txt:2: got 'rice/3/1_2\.jpg', expected a line like '/3/1_2",
    ),
    "dish 173": (
        lambda source: add(source / LABELS / "VAL.txt", "/173/1_2.jpg"),
        r"1 problem in .*\n.*VAL\.txt:2: '173/1_2\.jpg' is of dish 173, expected 1 to 172",
    ),
    "a picture in two lists": (
        lambda source: add(source / LABELS / "VAL.txt", "/12/1_1.jpg"),
        r"1 problem in .*\n.*VAL\.txt:2: '12/1_1\.jpg' was already on .*TR\.txt:3; keep one",
    ),
    "a path upwards": (
        lambda source: add(source / LABELS / "VAL.txt", "/3/.."),
        r"2 problems in .*\n.*VAL\.txt:2: '3/\.\.' leads out of .* or is no plain path",
    ),
    "a picture without ingredients": (
        lambda source: edit(source / LABELS / "IngreLabel.txt", "/12/7_7.jpg", "/12/7_8.jpg"),
        r"1 problem in .*\n.*TE\.txt:1: '12/7_7\.jpg' is on no line of IngreLabel\.txt; restore",
    ),
    "no ingredients of pictures": (
        lambda source: (source / LABELS / "IngreLabel.txt").write_text("\n"),
        r"1 problem in .*\n.*IngreLabel\.txt: no lines, expected one for each picture; restore",
    ),
    "a number too few": (
        lambda source: edit(source / LABELS / "IngreLabel.txt", "/12/7_7.jpg -1", "/12/7_7.jpg"),
        r"1 problem in .*\n.*IngreLabel\.txt:6: 353 fields, expected 354: a path and a number",
    ),
    "another number": (
        lambda source: edit(source / LABELS / "IngreLabel.txt", "7.jpg -1 1", "7.jpg -1 2"),
        r"1 problem in .*\n.*IngreLabel\.txt:6: field 3 is '2', expected 1 or -1; restore",
    ),
    "ingredients twice": (
        lambda source: add(source / LABELS / "IngreLabel.txt", row("/12/7_7.jpg", [2])),
        r"1 problem in .*\n.*Label\.txt:8: '12/7_7\.jpg' was already on .*Label\.txt:6; keep one",
    ),
    "an ingredient too few": (
        lambda source: edit(source / LABELS / "IngredientList.txt", "ingredient 4\n", ""),
        r"1 problem in .*\n.*IngredientList\.txt: 352 lines, expected 353, one for each ingredient",
    ),
    "a blank ingredient": (
        lambda source: edit(source / LABELS / "IngredientList.txt", "ingredient 4\n", "\n"),
        r"1 problem in .*\n.*IngredientList\.txt:5: blank, expected one ingredient on each line",
    ),
    "a dish too many": (
        lambda source: add(source / LABELS / "FoodList.txt", "Dish 173"),
        r"1 problem in .*\n.*FoodList\.txt: 173 lines, expected 172, one for each dish; restore",
    ),
    "a dish that train lacks": (
        lambda source: edit(source / LABELS / "TR.txt", "/12/1_1.jpg\n", ""),
        r"1 problem in .*\n.*TE\.txt:1: class 'Dish 12' is not in train, expected one of its 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_line(fault: str, source: Path) -> None:
    damage, told = FAULTS[fault]
    damage(source)
    with pytest.raises(DataError, match=told):
        read(source)


def test_everything_is_told_at_once_and_missing_files_first(source: Path) -> None:
    for path in PATHS:
        (source / f"{PICTURES}{path}").unlink()
    add(source / LABELS / "TR.txt", "nonsense\n" * 30)
    (source / LABELS / "TE.txt").unlink()
    with pytest.raises(DataError) as raised:
        read(source)[1]
    head, *lines = str(raised.value).splitlines()
    assert head == f"36 problems in {source}:"  # 30 lines, 5 pictures, a list
    assert lines[0].strip().startswith(f"{source / LABELS / 'TE.txt'}: missing")
    assert "TR.txt:1: no file" in lines[1]
    assert lines[-1].strip() == "and 16 more"


def test_what_is_no_copy_is_told_with_where_to_get_one(tmp_path: Path) -> None:
    told = r"no ready_chinese_food or SplitAndIngreLabel there.*from its authors: http://vireo"
    with pytest.raises(NotFound, match=told):
        read(tmp_path)


@given(st.integers(1, DISHES), st.text("abc_1 ü.", min_size=1, max_size=9), st.sampled_from("/ "))
def test_a_line_gives_back_what_was_written(number: int, name: str, start: str) -> None:
    path = f"{number}/{name}".strip()
    if not path.endswith("/"):
        assert parse_line(f"{start}{path}\r") == (path, number)


@given(st.text())
@example("0/a.jpg")
@example("1/a/b.jpg")
@example("²/a.jpg")
def test_any_other_line_is_told_in_one_line(line: str) -> None:
    found = parse_line(line)
    if isinstance(found, str):
        assert "\n" not in found
        assert "expected" in found
    else:
        assert 1 <= found[1] <= DISHES


def rows() -> Iterator[st.SearchStrategy[str]]:
    yield st.text(max_size=40)
    values = st.lists(st.sampled_from(["1", "-1", "0", "x"]), min_size=350, max_size=355)
    yield values.map(lambda found: " ".join(["/3/1.jpg", *found]))


@given(st.one_of(*rows()))
def test_any_row_of_ingredients_is_read_or_told(line: str) -> None:
    found = parse_presence(line)
    if isinstance(found, str):
        assert "expected" in found
    else:
        assert [line.split()[1 + n] for n in found] == ["1"] * line.split().count("1")


def test_the_command_writes_warns_and_names_the_next_one(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = vireofood("--source", source, "--out", out)
    assert result.exit_code == 0, result.output
    assert "warning: train has 4 images, the official split has 66,071" in result.stderr
    assert f"--data {out} --recipe vireofood172 --out runs/vireofood172\n" in result.stderr
    assert "http://vireo.cs.cityu.edu.hk/VireoFood172/" in (out / NOTICE_FILE).read_text("utf-8")

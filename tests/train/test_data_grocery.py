"""The Grocery Store data set as an image folder, from a tiny checkout with the same layout.

It has the quirks of the real one: spaces after commas, CRLF and leading slashes in classes.csv, a
description with a second, blank line and with letters beyond ASCII, a class that val does not have.
Folders with spaces and a comma in a name are added.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from pictures import encode, make_picture

from marnet_sdk.errors import DataError, NotFound, OutputExists
from marnet_train.cli import main
from marnet_train.data.check import check_data_set
from marnet_train.data.dataset import read_data_set
from marnet_train.data.grocery import (
    COLUMNS,
    OFFICIAL,
    Picture,
    parse_line,
    read,
)
from marnet_train.data.published import NOTICE_FILE, write_published

TEXTS = "iconic-images-and-descriptions"
CSV = [
    ",".join([*COLUMNS[:4], "Iconic Image Path (str)", COLUMNS[4]]),
    f"Lime,0,Lime,0,/{TEXTS}/Fruit/Lime/L.jpg,/{TEXTS}/Fruit/Lime/L.txt",
    f"Red-Beet,1,Beet,1,/{TEXTS}/Root crops/Beet/B.jpg,/{TEXTS}/Root crops/Beet/B.txt",
    f"Gold-Beet,2,Beet,1,/{TEXTS}/Root crops/Gold/G.jpg,/{TEXTS}/Root crops/Gold/G.txt",
]
DESCRIPTIONS = {
    "Fruit/Lime/L.txt": "Sour, with  a thin\tpeel.\n",
    "Root crops/Beet/B.txt": "Good for pölsa or steak Lindström.\n \n",
    "Root crops/Gold/G.txt": "\ufeffYellow. \r\nSweet.",
}
LISTS = {
    "train": [
        "train/Fruit/Lime/Lime_001.jpg, 0, 0",
        "train/Fruit/Lime/Lime_002.jpg, 0, 0",
        "train/Root crops/Red, round/Beet_001.jpg, 1, 1",
        "train/Root crops/Gold/Beet_001.jpg, 2, 1",
    ],
    "val": ["val/Fruit/Lime/Lime_001.jpg, 0, 0"],
    "test": [
        "test/Fruit/Lime/Lime_001.jpg, 0, 0",
        "test/Root crops/Red, round/Beet_001.jpg, 1, 1",
    ],
}


def make_checkout(checkout: Path) -> Path:
    """A checkout of three products and seven pictures; returns its folder `dataset`."""
    root = checkout / "dataset"
    for name, text in DESCRIPTIONS.items():
        path = root / TEXTS / name
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode())
    (root / "classes.csv").write_bytes("\r\n".join(CSV).encode())
    number = 0
    for split, lines in LISTS.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            number += 1
            path = root / line.rsplit(",", 2)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(make_picture(16 + number, 12), "JPEG"))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())


def add_line(root: Path, split: str, line: str | bytes) -> None:
    with (root / f"{split}.txt").open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())


def grocery(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "grocery", *map(str, words)])


def test_the_splits_are_written_as_they_are(root: Path, tmp_path: Path) -> None:
    data = write_published("grocery", root, tmp_path / "out")
    assert data.labels == ("Gold-Beet", "Lime", "Red-Beet")
    found = {
        split: [(e.image.name, e.label, e.text) for e in examples]
        for split, examples in data.splits.items()
    }
    lime = ("Fruit__Lime__Lime_001.jpg", "Lime", "Sour, with a thin peel.")
    text = "Good for pölsa or steak Lindström."
    beet = ("Root crops__Red, round__Beet_001.jpg", "Red-Beet", text)
    gold = ("Root crops__Gold__Beet_001.jpg", "Gold-Beet", "Yellow. Sweet.")
    assert found == {
        "train": [lime, ("Fruit__Lime__Lime_002.jpg", *lime[1:]), beet, gold],
        "val": [lime],
        "test": [lime, beet],
    }
    for split, lines in LISTS.items():
        for line, written in zip(lines, data.splits[split], strict=True):
            assert written.image.read_bytes() == (root / line.rsplit(",", 2)[0]).read_bytes()


def test_what_is_written_is_sound_and_says_where_it_comes_from(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_published("grocery", root, out)
    report = check_data_set(out)
    assert (report.problems.count, report.leak_count, report.repeat_count) == (0, 0, 0)
    assert sorted(path.name for path in out.iterdir()) == [NOTICE_FILE, "test", "train", "val"]
    notice = (out / NOTICE_FILE).read_text("utf-8")
    assert "https://github.com/marcusklasson/GroceryStoreDataset" in notice
    assert "MIT License\n\nCopyright (c) 2019 Marcus Klasson\n\nPermission is hereby" in notice
    assert "Klasson, Cheng Zhang, Hedvig Kjellström" in notice


def test_images_lie_where_the_demo_lists_them(root: Path, tmp_path: Path) -> None:
    write_published("grocery", root, tmp_path / "out")
    assert len(list((tmp_path / "out/test").glob("*.*g"))) == 2  # as `ls test/*.*g` does


def test_a_checkout_and_its_folder_are_the_same_source(root: Path, tmp_path: Path) -> None:
    one = write_published("grocery", root, tmp_path / "one")
    other = write_published("grocery", root.parent, tmp_path / "other")
    lines = [(data.root / "train/metadata.jsonl").read_bytes() for data in (one, other)]
    assert lines[0] == lines[1]


def test_coarse_labels_keep_the_text_of_the_product(root: Path, tmp_path: Path) -> None:
    data = write_published("grocery", root, tmp_path / "out", kind="coarse")
    assert data.labels == ("Beet", "Lime")
    assert {e.text for e in data.splits["train"] if e.label == "Beet"} == {
        "Good for pölsa or steak Lindström.",
        "Yellow. Sweet.",
    }


def test_lists_may_have_other_line_ends_and_a_byte_order_mark(root: Path) -> None:
    before = read(root)[1]
    for split, lines in LISTS.items():
        fields = (line.rsplit(", ", 2) for line in lines)
        text = "\ufeff" + "\r\n\r\n".join(f" /{','.join(parts)} " for parts in fields)
        (root / f"{split}.txt").write_bytes(text.encode())
    assert read(root)[1] == before


def test_an_existing_folder_is_kept_unless_told(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_published("grocery", root, out)
    with pytest.raises(OutputExists, match="out already exists"):
        write_published("grocery", root, out, kind="coarse")
    assert "Gold-Beet" in read_data_set(out).labels
    write_published("grocery", root, out, kind="coarse", overwrite=True)
    assert "Gold-Beet" not in read_data_set(out).labels


def test_a_folder_with_something_else_is_left_alone(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="holds something else"):
        write_published("grocery", root, root, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.jpg").write_text("keep me")
    with pytest.raises(OutputExists, match="holds something else"):
        write_published("grocery", root, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos/mine.jpg").read_text() == "keep me"


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_what_is_no_checkout_is_told_with_where_to_get_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    told = rf"{name}: no classes\.csv, train\.txt.*Get it with: git clone https://github\.com/"
    with pytest.raises(NotFound, match=told):
        write_published("grocery", tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BEET = f"{TEXTS}/Root crops/Beet/B.txt"
IMAGE = "train/Fruit/Lime/Lime_001.jpg"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (
        lambda root: (root / IMAGE).unlink(),
        r"train\.txt:1: no file 'train/Fruit/Lime/Lime_001\.jpg' in .*; restore it from https",
    ),
    "a folder for an image": (
        lambda root: add_line(root, "val", "val/Fruit, 0, 0"),
        r"val\.txt:2: no file 'val/Fruit' in",
    ),
    "a name that is too long": (
        lambda root: add_line(root, "val", f"{'x' * 300}.jpg, 0, 0"),
        r"val\.txt:2: no file 'x+'\.\.\. in",
    ),
    "no list": (
        lambda root: (root / "test.txt").unlink(),
        r"test\.txt: missing; restore it from https://github\.com/marcusklasson",
    ),
    "a folder for a list": (
        lambda root: ((root / "test.txt").unlink(), (root / "test.txt").mkdir()),
        r"test\.txt: cannot be read \(Is a directory\); restore it",
    ),
    "an empty list": (
        lambda root: (root / "val.txt").write_text(" \n\n"),
        r"val\.txt: no lines, expected some like 'train/Fruit.*; restore it",
    ),
    "two fields": (
        lambda root: add_line(root, "val", "val/Fruit/Lime/Lime_001.jpg, 0"),
        r"val\.txt:2: got 'val/Fruit/Lime/Lime_001\.jpg, 0', expected a line like",
    ),
    "a name for a number": (
        lambda root: add_line(root, "val", "val/Fruit/Lime/Lime_001.jpg, Lime, 0"),
        r"val\.txt:2: got '.*Lime, 0', expected a line like",
    ),
    "a list that is not UTF-8": (
        lambda root: add_line(root, "val", b"val/p\xf6lsa.jpg, 0, 0"),
        r"val\.txt:2: not UTF-8 \(byte 0xf6\); save it as UTF-8",
    ),
    "an unknown class": (
        lambda root: edit(root / "val.txt", ", 0, 0", ", 81, 0"),
        r"val\.txt:1: class 81 is not in classes\.csv, expected one of its 3; correct it",
    ),
    "another coarse class": (
        lambda root: edit(root / "val.txt", ", 0, 0", ", 0, 1"),
        r"val\.txt:1: coarse class 1, but classes\.csv has 0 for class 0 \(Lime\); correct",
    ),
    "a path twice": (
        lambda root: add_line(root, "val", LISTS["val"][0]),
        r"val\.txt:2: 'val/Fruit/.*' was already on .*val\.txt:1; keep one of them",
    ),
    "a path in two lists": (
        lambda root: add_line(root, "test", f"/{LISTS['train'][2]}"),
        r"test\.txt:3: 'train/Root crops/.*' was already on .*train\.txt:3; keep one",
    ),
    "a path upwards": (
        lambda root: add_line(root, "val", "val/../../secret.jpg, 0, 0"),
        r"val\.txt:2: 'val/\.\./\.\./secret\.jpg' leads out of .*; keep it below",
    ),
    "an absolute path": (
        lambda root: add_line(root, "val", "//etc/passwd, 0, 0"),
        r"val\.txt:2: '/etc/passwd' leads out of .* or is no plain path",
    ),
    "a path with a NUL": (
        lambda root: add_line(root, "val", "a\0b.jpg, 0, 0"),
        r"val\.txt:2: 'a\\x00b\.jpg' leads out of .* or is no plain path",
    ),
    "a link that leaves": (
        lambda root: (
            (root / IMAGE).unlink(),
            (root / IMAGE).symlink_to(root.parent / "elsewhere.jpg"),
            (root.parent / "elsewhere.jpg").write_bytes(b"image"),
        ),
        r"train\.txt:1: 'train/Fruit/Lime/Lime_001\.jpg' leads out of",
    ),
    "no classes.csv": (
        lambda root: (root / "classes.csv").unlink(),
        r"1 problem in .*\n.*classes\.csv: missing; write a CSV file with the header Class Name",
    ),
    "no classes": (
        lambda root: (root / "classes.csv").write_text(CSV[0]),
        r"1 problem in .*\n.*classes\.csv: no classes, expected one line for each; restore it",
    ),
    "another header": (
        lambda root: edit(root / "classes.csv", COLUMNS[1], "Class"),
        r"1 problem in .*\n.*classes\.csv:1: no column 'Class ID \(int\)'",
    ),
    "a class without a name": (
        lambda root: edit(root / "classes.csv", "Lime,0,Lime", " ,0,Lime"),
        r"1 problem in .*\n.*classes\.csv:2: no 'Class Name \(str\)'; fill it in",
    ),
    "a class number that is none": (
        lambda root: edit(root / "classes.csv", "Gold-Beet,2", "Gold-Beet,two"),
        r"classes\.csv:4: 'Class ID \(int\)' is 'two', expected a number like 9; correct it",
    ),
    "a class number twice": (
        lambda root: edit(root / "classes.csv", "Gold-Beet,2", "Gold-Beet,1"),
        r"classes\.csv:4: 'Class ID \(int\)' '1' was already on line 3; keep one of them",
    ),
    "a class name twice": (
        lambda root: edit(root / "classes.csv", "Gold-Beet,2", "Red-Beet,2"),
        r"1 problem in .*\n.*classes\.csv:4: 'Class Name \(str\)' 'Red-Beet' was already on line 3",
    ),
    "no description": (
        lambda root: (root / BEET).unlink(),
        r"1 problem in .*\n.*classes\.csv:3: no file 'iconic-.*B\.txt' in .*; restore it from http",
    ),
    "an empty description": (
        lambda root: (root / BEET).write_text(" \n\t\n"),
        r"1 problem in .*\n.*classes\.csv:3: '.*B\.txt' is empty, expected a description; restore",
    ),
    "a description that is not UTF-8": (
        lambda root: (root / BEET).write_bytes("pölsa".encode("latin-1")),
        r"classes\.csv:3: '.*B\.txt' is not UTF-8 \(byte 2\); restore it",
    ),
    "a description elsewhere": (
        lambda root: edit(root / "classes.csv", f"/{BEET}", "/../../B.txt"),
        r"classes\.csv:3: '\.\./\.\./B\.txt' leads out of",
    ),
    "a class that train lacks": (
        lambda root: edit(root / "train.txt", f"{LISTS['train'][2]}\n", ""),
        r"1 problem in .*\n.*test\.txt:2: class 'Red-Beet' is not in train, expected one of its 2",
    ),
    "one class": (
        lambda root: [
            (root / f"{split}.txt").write_text(lines[0]) for split, lines in LISTS.items()
        ],
        r"train\.txt: found 1 class \('Lime'\), expected at least 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_its_line(fault: str, root: Path, tmp_path: Path) -> None:
    damage, told = FAULTS[fault]
    damage(root)
    with pytest.raises(DataError, match=told):
        write_published("grocery", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "line"), [("B.txt", r"classes\.csv:3"), ("Lime_002.jpg", r"train\.txt:2")]
)
def test_a_file_that_may_not_be_read_is_named(
    name: str, line: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def refuse(path: Path, *words: Any, **options: Any) -> Any:  # as root may read everything
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, *words, **options)

    monkeypatch.setattr(Path, "open", refuse)
    told = rf"{line}: .*{name}'?:? cannot be read \(Permission denied\); restore"
    with pytest.raises(DataError, match=told):
        write_published("grocery", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_everything_is_told_at_once(root: Path) -> None:
    (root / BEET).unlink()
    (root / "test.txt").unlink()
    (root / IMAGE).unlink()
    add_line(root, "val", "nonsense\n" * 30)
    with pytest.raises(DataError) as raised:
        read(root)[1]
    told = str(raised.value)
    assert told.startswith(f"33 problems in {root}:")
    for line in ("classes.csv:3:", "train.txt:1:", "val.txt:2:", "and 13 more"):
        assert line in told


def test_paths_that_would_share_a_file_name_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / IMAGE, root / "train/Fruit__Lime__Lime_001.jpg")
    add_line(root, "train", "train/Fruit__Lime__Lime_001.jpg, 0, 0")
    with pytest.raises(DataError, match=r"train\.txt:5: .* was already on .*train\.txt:1; keep"):
        write_published("grocery", root, tmp_path / "out")


@st.composite
def paths(draw: st.DrawFn) -> str:
    letters = st.characters(codec="utf-8", exclude_characters="\n\0")
    path = draw(st.text(letters, min_size=1, max_size=30)).strip()
    return path.removeprefix("/").strip() or "x"


@given(
    paths(),
    st.integers(0, 999_999_999),
    st.integers(0, 999_999_999),
    st.sampled_from(["", " ", "\t", "  "]),
    st.sampled_from(["", "/"]),
    st.sampled_from(["", "\r", " "]),
)
@example("a, 1, 2.jpg", 3, 4, " ", "/", "\r")
def test_a_line_gives_back_what_was_written(
    path: str, fine: int, coarse: int, space: str, slash: str, end: str
) -> None:
    line = f"{space}{slash}{path}{space},{space}{fine}{space},{space}{coarse}{end}"
    expected = path if slash else path.removeprefix("/")
    assert parse_line(line) == Picture(expected, fine, coarse)


@given(st.text())
@example("a, 1, 9999999999")
@example("/, 1, 2")
@example(", 1, 2")
@example("a, ², 3")
@example("a, -1, 3")
def test_any_other_line_is_told_in_one_line(line: str) -> None:
    found = parse_line(line)
    if isinstance(found, str):
        assert found.startswith("got ")
        assert "expected a line like 'train/" in found
        assert "\n" not in found
    else:
        assert found.path
        assert min(found.number, found.coarse_number) >= 0


@given(st.binary(max_size=60))
def test_a_list_of_any_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    root = _shared_checkout(tmp_path_factory)
    (root / "val.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"val\.txt"):
        read(root)[1]


def _shared_checkout(factory: pytest.TempPathFactory) -> Path:
    """One checkout for all the examples of a property."""
    root = factory.getbasetemp() / "any-bytes/dataset"
    return root if root.is_dir() else make_checkout(root.parent)


def test_the_command_writes_warns_and_names_the_next_one(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "my groceries"
    result = grocery("--source", root.parent, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"wrote {out}; source and licence are in {out / NOTICE_FILE}" in result.stderr
    assert f"marnet-train fit --data '{out}' --recipe grocery --out runs/grocery\n" in result.stderr
    for split, count in OFFICIAL.items():
        told = f"warning: {split} has {len(LISTS[split])} images, the official split has {count:,}"
        assert told in result.stderr
    again = grocery("--source", root, "--out", out)
    assert again.exit_code == 2
    assert "already exists; choose another output or pass --force" in again.stderr
    forced = grocery("--source", root, "--out", out, "--labels", "coarse", "--force")
    assert forced.exit_code == 0, forced.output
    assert read_data_set(out).labels == ("Beet", "Lime")


def test_official_counts_bring_no_warning(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, lines in LISTS.items():
        monkeypatch.setitem(OFFICIAL, split, len(lines))
    result = grocery("--source", root, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr


def test_the_command_refuses_without_a_traceback(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, code, told in (
        (("--out", out), 2, "Missing option '--source'"),
        (("--source", tmp_path / "no", "--out", out), 2, "Get it with: git clone"),
        (("--source", root, "--out", out, "--labels", "corse"), 2, "Did you mean 'coarse'?"),
    ):
        result = grocery(*words)
        assert (result.exit_code, told in result.stderr) == (code, True), result.output
    (root / IMAGE).unlink()
    result = grocery("--source", root, "--out", out)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: 1 problem in {root}:")
    assert not out.exists()


def make(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--no-print-directory", *words]
    folder = Path(__file__).parents[2]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("grocery", "git clone https://github.com/marcusklasson/GroceryStoreDataset"),
        ("vireofood172", "ready_chinese_food and SplitAndIngreLabel of VireoFood-172; see docs/"),
        ("ingredients101", "food-101 and Ingredients101; see docs/data.md"),
    ],
)
def test_the_demo_says_that_it_needs_a_source(data: str, told: str, tmp_path: Path) -> None:
    for words in ((), ("SOURCE=",), ("SOURCE=nowhere",)):
        result = make("source", f"DATA={data}", *words)
        assert result.returncode == 2
        assert f"DATA={data} needs SOURCE=DIR, " in result.stdout
        assert told in result.stdout
    assert make("source", f"DATA={data}", f"SOURCE={tmp_path}").returncode == 0
    dry = make("--dry-run", "demo", f"DATA={data}", "SOURCE=my copy").stdout
    assert f'marnet-train data {data} --source "my copy" --out data/{data} --force' in dry
    assert f"marnet-train fit --data data/{data} --recipe {data} --out runs/{data}" in dry


def test_the_demo_passes_the_source_and_fetches_encoders_only_for_groceries(root: Path) -> None:
    assert make("source", "DATA=grocery", f"SOURCE={root.parent}").returncode == 0
    assert make("source", "DATA=digits").returncode == 0
    dry = make("--dry-run", "demo", "DATA=grocery", "SOURCE=my checkout").stdout
    data, encoders, fit = (
        dry.index(command)
        for command in (
            'marnet-train data grocery --source "my checkout" --out data/grocery --force',
            "marnet-train encoders --out encoders --force",
            "marnet-train fit --data data/grocery --recipe grocery --out runs/grocery",
        )
    )
    assert data < encoders < fit
    usual = make("--dry-run", "demo", "SOURCE=my checkout").stdout
    assert "marnet-train data digits" in usual
    assert "checkout" not in usual.replace("checkout of the", "").replace('-d "my checkout"', "")
    assert "encoders" not in usual

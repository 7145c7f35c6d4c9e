"""`marnet-train data check`: counts, texts, sizes, copies, and what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pictures import encode, make_picture
from PIL import Image

from marnet_train.cli import main
from marnet_train.data.check import MAX_CLASSES, Report, check_data_set, class_rows
from marnet_train.data.imagefolder import write_split


def picture(shift: int, kind: str = "PNG") -> bytes:
    return encode(make_picture(40 + shift, 32), kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes in three splits, every picture of another width."""
    root = tmp_path / "set"
    widths = iter(range(100))
    for split in ("train", "val", "test"):
        rows = [
            (f"{label}{i}.png", picture(next(widths)), label, f"a {label} number {i}")
            for label in ("cat", "dog")
            for i in range(2)
        ]
        write_split(root / split, rows)
    return root


def check(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", "check", *map(str, arguments)])


def test_a_sound_set_is_counted_and_the_next_command_named(folder):
    result = check(folder)
    assert result.exit_code == 0, result.output
    assert "image folder" in result.output
    words = result.output.split()
    assert words[words.index("cat") + 1 :][:3] == ["2", "2", "2"]
    assert words[words.index("all") + 1 :][:3] == ["4", "4", "4"]
    assert "4 to 4, median 4; 4 different texts, 0 of them in several classes" in result.output
    assert "40 to 51 pixels, median 45.5" in result.output
    assert "PNG 12" in result.output
    assert f"marnet-train fit --data {folder}" in result.output


def test_the_digits_are_sound(digits):
    report = check_data_set(digits)
    assert report.images == {"train": 1257, "val": 270, "test": 270}
    assert list(report.classes) == [str(digit) for digit in range(10)]
    assert (report.problems.count, report.leak_count) == (0, 0)


def test_an_image_in_two_splits_is_a_leak_also_in_another_file_format(folder):
    source = (folder / "train/cat0.png").read_bytes()
    write_more(folder / "test", "copy.png", source, "cat")
    write_more(folder / "val", "copy.bmp", picture(0, "BMP"), "dog")
    result = check(folder)
    assert result.exit_code == 1
    assert "images in more than one split: 1" in result.output
    where = [f"{folder}/{split}/metadata.jsonl:{n}" for split, n in
             (("train", 1), ("val", 5), ("test", 5))]  # fmt: skip
    assert f"{', '.join(where)} (classes cat, dog)" in result.output
    assert "Error:" in result.output
    assert "1 image(s) in more than one split, listed above; correct them" in result.output


def write_more(split: Path, name: str, image: bytes, label: str) -> None:
    (split / name).write_bytes(image)
    with (split / "metadata.jsonl").open("a") as file:
        print(json.dumps({"file_name": name, "text": "one more", "label": label}), file=file)


def test_a_copy_within_a_split_is_a_warning(folder):
    write_more(folder / "train", "again.png", picture(0), "cat")
    result = check(folder)
    assert result.exit_code == 0, result.output
    assert "warning: images that are several times in a split: 1" in result.output
    assert f"{folder}/train/metadata.jsonl:1, {folder}/train/metadata.jsonl:5" in result.output


def test_all_problems_are_listed_and_the_rest_is_still_counted(folder):
    (folder / "train/cat0.png").write_bytes(b"no image")
    write_more(folder / "train", "new.png", picture(70), "cat")
    with (folder / "train/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x", "label": "cat"}\nnot JSON\n')
    result = check(folder)
    assert result.exit_code == 1
    for line in (
        f"{folder}/train/metadata.jsonl:6: no image file 'gone.png'",
        f"{folder}/train/metadata.jsonl:7: not JSON",
        f"{folder}/train/metadata.jsonl:1: {folder}/train/cat0.png: got a file that starts",
    ):
        assert line in result.output
    assert "3 problems, listed above" in result.output
    assert "PNG 12" in result.output


def test_an_image_that_is_listed_under_two_labels_is_a_problem(folder):
    write_more(folder / "train", "cat0.png", picture(0), "dog")
    result = check(folder)
    assert result.exit_code == 1
    assert f"{folder}/train/metadata.jsonl:5: " in result.output
    assert "'cat0.png' was already on line 1, and an image has one label;" in result.output


def test_json_holds_the_same_figures(folder):
    result = CliRunner().invoke(main, ["data", "check", str(folder), "--format", "json"])
    report = json.loads(result.stdout)
    assert report["classes"]["dog"] == {"train": 2, "val": 2, "test": 2}
    assert report["width"] == {"least": 40, "median": 45.5, "most": 51}
    assert report["leaks"] == []


def test_texts_that_stand_under_several_classes_are_counted(folder):
    shutil.rmtree(folder / "train")
    rows = [(f"{i}.png", picture(60 + i), label, "the same") for i, label in enumerate("ab")]
    write_split(folder / "train", rows)
    report = check_data_set(folder)
    assert report.texts["train"] == {"distinct": 1, "several_classes": 1}


def test_of_many_classes_the_largest_and_the_smallest_are_shown():
    classes = {f"class {i}": {"train": 1000 - i} for i in range(100)}
    rows = list(class_rows(Report("image folder", classes, {"train": 1})))
    assert len(rows) == MAX_CLASSES + 2
    assert rows[0] == ("class 0", "1,000")
    assert rows[MAX_CLASSES // 2][0] == "... 60 classes between"
    assert rows[-2] == ("class 99", "901")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    result = check(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def rewrite(split: Path, **fields: str) -> None:
    """Another label or name on the last line of a split."""
    *lines, last = (split / "metadata.jsonl").read_text("utf-8").splitlines()
    changed = json.dumps(json.loads(last) | fields, ensure_ascii=False)
    (split / "metadata.jsonl").write_text("\n".join([*lines, changed]), "utf-8")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("dog ", "label 'dog ' (LINE) is read as 'dog', without blanks"),
        ("dog\u00a0", "label 'dog\\xa0' (LINE) is read as 'dog', without blanks"),
        ("dog\u200b", "'dog\\u200b' (LINE) look alike; if they are one class"),
        ("Dog", "labels 'Dog' (LINE) and 'dog' (FIRST) look alike"),
        ("nan", "label 'nan' (LINE) looks like a value that is missing"),
        ("\u200b", "label '\\u200b' (LINE) looks like a value that is missing"),
    ],
)
def test_labels_that_look_alike_are_named_with_their_lines(folder, label, said):
    rewrite(folder / "train", label=label)
    result = check(folder)
    assert result.exit_code == 0, result.output
    metadata = folder / "train/metadata.jsonl"
    others = ", ".join(f"{folder}/{split}/metadata.jsonl:{n}" for split, n in
                       (("train", 3), ("val", 3), ("val", 4)))  # fmt: skip
    said = said.replace("LINE", f"{metadata}:4").replace("FIRST", f"{others} and 2 more")
    assert "warnings: 1" in result.output
    assert said in result.output


def test_a_class_that_train_spells_otherwise_is_named(folder):
    rewrite(folder / "val", label="Dog")
    assert (
        "class 'Dog' is not in train, expected one of its 2; there is 'dog', which differs in case"
        in check(folder).output
    )


def test_images_that_no_line_lists_are_named(folder):
    (folder / "train/more").mkdir()
    for i in range(5):
        (folder / f"train/more/{i}.JPG").write_bytes(b"")
    (folder / "train/.hidden.png").write_bytes(b"")
    (folder / "train/notes.txt").write_text("no image")
    assert check_data_set(folder).problems.warnings == [
        f"5 images in {folder}/train stand in no line of metadata.jsonl: "
        "'more/0.JPG', 'more/1.JPG', 'more/2.JPG' and 2 more"
    ]


@pytest.mark.parametrize(
    ("listed", "present"), [("Sub/A.png", "sub/a.png"), ("cafe\u0301.png", "caf\u00e9.png")]
)
def test_a_listed_file_that_is_spelt_otherwise_is_named(folder, listed, present):
    (folder / "train" / present).parent.mkdir(exist_ok=True)
    (folder / "train" / present).write_bytes(picture(30))
    rewrite(folder / "train", file_name=listed)
    assert f"train/metadata.jsonl:4: no image file {listed!r}; there is {present!a}, which" in (
        check(folder).output
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_pipe_in_place_of_metadata_is_never_waited_for(folder):
    (folder / "val/metadata.jsonl").unlink()
    os.mkfifo(folder / "val/metadata.jsonl")  # nobody ever writes to it
    assert "val/metadata.jsonl: cannot be read (a pipe or a device)" in check(folder).output


def test_what_was_refused_is_not_counted(folder):
    (folder / "train/metadata.jsonl").write_text('{"file_name": "cat0.png"}')
    result = CliRunner().invoke(main, ["data", "check", str(folder), "--format", "json"])
    report = json.loads(result.stdout)
    assert report["images"] == {"val": 4, "test": 4}
    assert report["classes"]["cat"] == {"val": 2, "test": 2}


def test_a_folder_per_class_is_judged_alike(tmp_path):
    for split in ("train", "val"):
        for seed, label in enumerate(("cat", "dog", "dog ")):
            (tmp_path / split / label).mkdir(parents=True)
            image = noise(seed + 9 * (split == "val"), "PNG")
            (tmp_path / split / label / "a.png").write_bytes(image)
    captions = tmp_path / "train/captions.csv"
    captions.write_text("file_name,text\ncat/a.png,x\ndog/a.png,y\ndog /a.png,z\n")
    report = check_data_set(tmp_path)
    assert report.classes == {"cat": {"train": 1, "val": 1}, "dog": {"train": 2, "val": 2}}
    (warning,) = report.problems.warnings
    assert warning.startswith(f"label 'dog ' ({captions}:4, ")
    captions.write_text(captions.read_text().replace("cat/a", "Cat/A"))
    assert (
        f"no image file 'Cat/A.png' in {tmp_path}/train; there is 'cat/a.png', which differs"
        in (check(tmp_path).output)
    )


def noise(seed: int, kind: str, size: int = 64, **options: int) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    smooth = Image.fromarray(rough).resize((64, 64), Image.Resampling.BICUBIC)
    return encode(smooth.resize((size, size)), kind, **options)


def test_near_copies_in_two_splits_are_warned_of(tmp_path):
    for split, first, kind, options in (
        ("train", 0, "PNG", {}),
        ("val", 5, "JPEG", {"quality": 60}),  # 5 is in train, too, as PNG
        ("test", 9, "WEBP", {"size": 50}),  # 9 is in val
    ):
        rows = [
            (f"{seed}.img", noise(seed, kind, **options), "ab"[seed % 2], "a text")
            for seed in range(first, first + 6)
        ]
        write_split(tmp_path / split, rows)
    report = check_data_set(tmp_path)
    assert report.near == [
        f"{tmp_path}/train/metadata.jsonl:6 (b), {tmp_path}/val/metadata.jsonl:1 (b)",
        f"{tmp_path}/val/metadata.jsonl:5 (b), {tmp_path}/test/metadata.jsonl:1 (b)",
        f"{tmp_path}/val/metadata.jsonl:6 (a), {tmp_path}/test/metadata.jsonl:2 (a)",
    ]
    result = check(tmp_path)
    assert result.exit_code == 0
    assert "warning: images that are nearly the same in two splits: 3" in result.output


def test_digits_that_differ_are_no_near_copies(digits):
    assert check_data_set(digits).near_count == 0


def test_a_leak_names_a_place_in_every_split(folder):
    for i in range(5):
        write_more(folder / "train", f"copy{i}.png", picture(0), "cat")
    write_more(folder / "test", "copy.png", picture(0), "cat")
    (leak,) = check_data_set(folder).leaks
    assert f"{folder}/test/metadata.jsonl:5" in leak
    assert leak.endswith("and 3 more")

"""Reading and writing the image-folder layout: what is accepted, what is refused and how."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from marnet_sdk.errors import DataError, NotFound, OutputExists
from marnet_train.data.dataset import Example, data_hash, read_data_set
from marnet_train.data.examples import natural_key
from marnet_train.data.imagefolder import read_split, write_split

Line = bytes | str | Mapping[str, object]

GOOD = {"file_name": "a.png", "text": "round", "label": "cat"}


def make_split(directory: Path, *lines: Line) -> Path:
    """A split folder with these metadata lines, and with images a.png, b.png and sub/c.png."""
    (directory / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        (directory / name).write_bytes(b"image " + name.encode())
    parts = [json.dumps(line) if isinstance(line, Mapping) else line for line in lines]
    data = b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)
    (directory / "metadata.jsonl").write_bytes(data)
    return directory


def make_root(root: Path) -> Path:
    """A sound data set: two classes in train, one of them in val, no test."""
    dog = {"file_name": "b.png", "text": "long", "label": "dog"}
    make_split(root / "train", GOOD, dog)
    make_split(root / "val", {"file_name": "a.png", "label": "dog"})
    return root


@contextmanager
def scratch() -> Iterator[Path]:
    """A fresh folder per hypothesis example (`tmp_path` is one per test)."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_reads_examples_in_file_order(tmp_path: Path) -> None:
    nested = {"file_name": "sub/c.png", "text": "flat", "label": "dog", "extra": [1]}
    split = make_split(tmp_path / "train", nested, GOOD)
    assert read_split(split, needs_text=True) == (
        Example(split / "sub/c.png", "dog", "flat"),
        Example(split / "a.png", "cat", "round"),
    )


def test_reads_all_splits_and_the_classes_of_train(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    make_split(root / "test", {"file_name": "a.png", "label": "cat"})
    folder = read_data_set(root)
    assert folder.labels == ("cat", "dog")
    assert list(folder.splits) == ["train", "val", "test"]
    assert [len(examples) for examples in folder.splits.values()] == [2, 1, 1]


def test_test_split_is_optional(tmp_path: Path) -> None:
    assert list(read_data_set(make_root(tmp_path)).splits) == ["train", "val"]


@pytest.mark.parametrize("text", [{}, {"text": None}])
def test_text_may_be_absent_where_it_is_not_needed(tmp_path: Path, text: dict[str, object]) -> None:
    split = make_split(tmp_path / "val", {"file_name": "a.png", "label": "cat", **text})
    assert read_split(split, needs_text=False)[0].text is None


def test_blank_lines_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    first, second = json.dumps(GOOD), json.dumps(GOOD | {"file_name": "b.png"})
    split = make_split(tmp_path / "train", f"\n{first}\r\n  \n{second}\n\n")
    assert len(read_split(split, needs_text=True)) == 2


def test_a_byte_order_mark_as_editors_on_windows_write_it_does_not_matter(tmp_path: Path) -> None:
    first, second = json.dumps(GOOD), json.dumps(GOOD | {"file_name": "b.png"})
    split = make_split(tmp_path / "train", f"\ufeff{first}\r\n{second}\r\n")
    assert len(read_split(split, needs_text=True)) == 2


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"  # line ends for str.splitlines
    line = json.dumps(GOOD | {"text": text}, ensure_ascii=False)
    split = make_split(tmp_path / "train", line)
    assert read_split(split, needs_text=True)[0].text == text


BAD_LINES: list[tuple[Line, str]] = [
    (b'{"label": "caf\xe9"}', r"train/metadata.jsonl:2: not UTF-8 \(byte 15 of .* is 0xe9\)"),
    ('{"file_name": ', r"metadata.jsonl:2: not JSON .* expected one object per line, like {"),
    ("[" * 100_000, r"metadata.jsonl:2: not JSON"),
    ("1" * 5_000, r"metadata.jsonl:2: not JSON"),
    ("[1, 2]", r"metadata.jsonl:2: got \[1, 2\], expected an object"),
    ({"text": "t", "label": "cat"}, r':2: no "file_name", expected a string; add it'),
    ({"file_name": "b.png", "text": "t"}, r':2: no "label", expected a string; add it'),
    ({"file_name": "b.png", "label": "cat"}, r':2: no "text", expected a string; add it'),
    ({"file_name": "b.png", "text": " ", "label": "cat"}, r':2: "text" is empty.*fill it in$'),
    ({"file_name": "b.png", "text": "t", "label": ""}, r':2: "label" is empty'),
    ({"file_name": "b.png", "text": "t", "label": 7}, r':2: "label" is 7, .*put it in quotes'),
    (
        {"file_name": "b.png", "text": "t", "label": ["cat", "dog"]},
        r":2: .label. is \['cat', 'dog'\], expected one string, .*several labels is not supp",
    ),
    ({"file_name": "b.png", "text": "\ud800", "label": "cat"}, r'"text" holds half a surrogate'),
    ({"file_name": "no.png", "text": "t", "label": "cat"}, r":2: no image file 'no.png'; restore"),
    ({"file_name": "sub", "text": "t", "label": "cat"}, r"no image file 'sub'"),
    ({"file_name": "x" * 999, "text": "t", "label": "cat"}, r"no image file 'x{200}'\.\.\."),
    (
        {"file_name": "a.png", "text": "t", "label": "dog"},
        r":2: .*'a.png' was already on line 1, and an image has one label; keep one of them",
    ),
    ({"file_name": "metadata.jsonl", "text": "t", "label": "cat"}, r"is metadata.jsonl itself"),
    ({"file_name": "/b.png", "text": "t", "label": "cat"}, r"'/b.png' is absolute; make it rel"),
    ({"file_name": "C:/b.png", "text": "t", "label": "cat"}, r"'C:/b.png' is absolute"),
    ({"file_name": "../train/b.png", "text": "t", "label": "cat"}, r"leads upwards \(\.\.\)"),
    ({"file_name": "sub/../b.png", "text": "t", "label": "cat"}, r"leads upwards \(\.\.\)"),
    ({"file_name": "./b.png", "text": "t", "label": "cat"}, r'has an empty or "." part'),
    ({"file_name": "sub\\c.png", "text": "t", "label": "cat"}, r"holds a backslash; write /"),
    ({"file_name": "b\0.png", "text": "t", "label": "cat"}, r"'b\\x00.png' holds a NUL"),
    ({"file_name": "a\0/b.png", "text": "t", "label": "cat"}, r"holds a NUL"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: Line, message: str) -> None:
    split = make_split(tmp_path / "train", GOOD, line)
    with pytest.raises(DataError, match=message):
        read_split(split, needs_text=True)


def test_empty_text_is_refused_even_where_none_is_needed(tmp_path: Path) -> None:
    split = make_split(tmp_path / "val", GOOD | {"text": ""})
    with pytest.raises(DataError, match=r'"text" is empty.*or leave the key out'):
        read_split(split, needs_text=False)


def test_every_fault_of_a_line_is_reported(tmp_path: Path) -> None:
    split = make_split(tmp_path / "train", "{}")
    with pytest.raises(DataError, match=r'3 problems(?s:.*)file_name(?s:.*)"text"(?s:.*)"label"'):
        read_split(split, needs_text=True)


def test_the_first_twenty_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    lines = [GOOD | {"file_name": f"{number}.png"} for number in range(25)]
    split = make_split(tmp_path / "train", *lines)
    with pytest.raises(DataError, match=r"^25 problems in (?s:.*)\n  and 5 more$") as caught:
        read_split(split, needs_text=True)
    assert str(caught.value).count("no image file") == 20


def test_twenty_problems_leave_nothing_to_count(tmp_path: Path) -> None:
    lines = [GOOD | {"file_name": f"{number}.png"} for number in range(20)]
    split = make_split(tmp_path / "train", *lines)
    with pytest.raises(DataError, match=r"'19\.png'; restore it or remove the line$"):
        read_split(split, needs_text=True)


def test_problems_of_all_splits_come_in_one_error(tmp_path: Path) -> None:
    make_split(tmp_path / "train", "oops")
    make_split(tmp_path / "test", GOOD | {"label": 1})
    with pytest.raises(DataError, match=r"^3 problems") as caught:
        read_data_set(tmp_path)
    message = str(caught.value)
    assert "train/metadata.jsonl:1: not JSON" in message
    assert "no val/ folder (found: test, train); add or rename it" in message
    assert 'test/metadata.jsonl:1: "label" is 1' in message


def test_missing_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere: no such folder; expected one that holds train/"):
        read_data_set(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_and_val_are_required(tmp_path: Path, split: str) -> None:
    root = make_root(tmp_path)
    shutil.rmtree(root / split)
    with pytest.raises(DataError, match=f"no {split}/ folder"):
        read_data_set(root)


def test_missing_metadata_shows_a_line_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'metadata.jsonl: missing; .* like {"file_name"'):
        read_split(tmp_path, needs_text=True)


def test_metadata_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metadata.jsonl: cannot be read \(Is a directory\)"):
        read_split(tmp_path, needs_text=True)


def test_a_split_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^1 problem in .*\n.*no examples; write one line"):
        read_split(make_split(tmp_path / "train", "\n\n"), needs_text=True)


def test_a_class_that_train_lacks_is_reported_once(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    owl = {"file_name": "a.png", "label": "owl"}
    make_split(root / "test", owl, owl | {"file_name": "b.png"})
    with pytest.raises(DataError, match=r"^1 problem .*\n.*test/metadata.jsonl:1: class 'owl' is"):
        read_data_set(root)


def test_a_data_set_with_a_single_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = [(f"{i}.png", b"image", "soup", "a soup") for i in range(3)]
        write_split(tmp_path / split, rows)
    with pytest.raises(
        DataError, match=r"train/metadata\.jsonl: found 1 class \('soup'\), expected at least 2"
    ):
        read_data_set(tmp_path)


def test_a_link_inside_the_split_is_followed(tmp_path: Path) -> None:
    split = make_split(tmp_path / "train", GOOD | {"file_name": "link.png"})
    (split / "link.png").symlink_to("a.png")
    assert read_split(split, needs_text=True)[0].image == split / "link.png"


def test_a_split_in_the_hub_s_cache_is_read_where_it_is(tmp_path: Path) -> None:
    """There every file is a link to the blobs of the repository, and nothing is ours to change."""
    split = make_split(tmp_path / "repository/snapshots/0a1b2c/samples", GOOD)
    blobs = tmp_path / "repository/blobs"
    blobs.mkdir()
    (split / "a.png").rename(blobs / "4d5e")
    (split / "a.png").symlink_to("../../../blobs/4d5e")
    (example,) = read_split(split, needs_text=True)
    assert example.image == split / "a.png"
    assert example.image.is_symlink()
    (split / "a.png").unlink()
    (tmp_path / "secret").write_bytes(b"x")
    (split / "a.png").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="is a link out of the split"):
        read_split(split, needs_text=True)


@pytest.mark.parametrize("name", ["link.png", "folder/secret.png"])
def test_a_link_out_of_the_split_is_refused(tmp_path: Path, name: str) -> None:
    split = make_split(tmp_path / "train", GOOD | {"file_name": name})
    outside = tmp_path / "train-private"  # shares its first letters with the split
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    (split / "link.png").symlink_to(outside / "secret.png")
    (split / "folder").symlink_to(outside, target_is_directory=True)
    with pytest.raises(DataError, match="is a link out of the split; copy the image into it"):
        read_split(split, needs_text=True)


def test_a_link_to_itself_is_a_missing_image(tmp_path: Path) -> None:
    split = make_split(tmp_path / "train", GOOD | {"file_name": "loop.png"})
    (split / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"no image file 'loop.png'"):
        read_split(split, needs_text=True)


def test_a_split_may_itself_be_a_link(tmp_path: Path) -> None:
    make_split(tmp_path / "elsewhere", GOOD)
    (tmp_path / "train").symlink_to("elsewhere", target_is_directory=True)
    image = read_split(tmp_path / "train", needs_text=True)[0].image
    assert image == tmp_path / "train/a.png"


def test_a_flat_split_is_listed_once_for_its_lines_and_once_for_what_they_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"{number}.png", b"", "cat", "t") for number in range(50)]
    write_split(tmp_path / "train", rows)
    listed: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert len(read_split(tmp_path / "train", needs_text=True)) == 50
    assert len(listed) == 2


def test_labels_sort_as_people_count() -> None:
    labels = ["10", "dish 10", "9", "dish 9", "01", "1", "0", "9" * 5000, "Dish", ""]
    expected = ["", "0", "01", "1", "9", "10", "9" * 5000, "Dish", "dish 9", "dish 10"]
    assert sorted(labels, key=natural_key) == expected


@given(st.lists(st.text(alphabet="019a²٣ ")))
def test_natural_order_ties_no_two_labels(labels: list[str]) -> None:
    sorted(labels, key=natural_key)  # any two keys can be compared
    assert all(natural_key(a) != natural_key(b) for a in labels for b in labels if a != b)


# Arbitrary input: a result or a DataError, and nothing outside of the folder.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
path_parts = st.sampled_from(["a.png", "sub", "c.png", "out", "..", ".", "", "C:", "\\", "\0"])
file_names = st.lists(path_parts, min_size=1, max_size=5).map("/".join)
records = st.fixed_dictionaries(
    {},
    optional={
        "file_name": json_values | file_names,
        "text": json_values,
        "label": json_values | st.just("cat"),
    },
)


def read_or_refuse(directory: Path, metadata: bytes) -> tuple[Example, ...] | None:
    """What the parser makes of these bytes; None for a DataError. Anything else fails the test."""
    make_split(directory, metadata)
    try:
        return read_split(directory, needs_text=False)
    except DataError as error:
        str(error).encode()  # no half surrogate pairs: it can be shown and logged
        return None


@given(st.binary())
@example(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
@example(json.dumps(GOOD).encode("utf-16"))
@example(b'{"file_name": NaN}\n')
def test_any_bytes_are_read_or_refused(metadata: bytes) -> None:
    with scratch() as root:
        read_or_refuse(root / "split", metadata)


@given(st.lists(records | json_values, max_size=4))
def test_any_json_is_read_or_refused(lines: list[object]) -> None:
    with scratch() as root:
        read_or_refuse(root / "split", "\n".join(map(json.dumps, lines)).encode())


@given(file_names | st.text())
def test_no_name_leads_out_of_the_split(name: str) -> None:
    with scratch() as root:
        split = root.resolve() / "split"
        (root / "a.png").write_bytes(b"outside")
        make_split(split)
        (split / "out").symlink_to(root, target_is_directory=True)
        (split / "metadata.jsonl").write_text(json.dumps(GOOD | {"file_name": name}))
        try:
            examples = read_split(split, needs_text=True)
        except DataError:
            return
        image = examples[0].image.resolve()
        assert image.is_file()
        assert image.is_relative_to(split)


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
contents = st.lists(st.tuples(st.binary(), words, st.none() | words), min_size=1, max_size=5)


@given(contents)
def test_what_is_written_is_what_is_read(content: list[tuple[bytes, str, str | None]]) -> None:
    rows = [(f"{number}.png", *rest) for number, rest in enumerate(content)]
    with scratch() as root:
        written = write_split(root / "split", rows)
        assert read_split(root / "split", needs_text=False) == written
        found = [(e.image.name, e.image.read_bytes(), e.label, e.text) for e in written]
    assert found == [(name, image, label.strip(), text) for name, image, label, text in rows]


@given(st.text() | file_names, st.text(), st.none() | st.text())
def test_what_cannot_be_read_is_not_written(name: str, label: str, text: str | None) -> None:
    with scratch() as root:
        try:
            written = write_split(root / "split", [(name, b"image", label, text)])
        except DataError:
            assert not (root / "split/metadata.jsonl").exists()
        else:
            assert read_split(root / "split", needs_text=False) == written


def test_write_makes_folders_and_takes_a_generator(tmp_path: Path) -> None:
    rows = ((name, b"image", "cat", None) for name in ("x/1.png", "x/2.png"))
    write_split(tmp_path / "deep" / "split", rows)
    assert len(read_split(tmp_path / "deep" / "split", needs_text=False)) == 2


def test_written_metadata_is_plain_utf8(tmp_path: Path) -> None:
    write_split(tmp_path / "s", [("a.png", b"", "café", "naïve"), ("b.png", b"", "tea", None)])
    assert (tmp_path / "s/metadata.jsonl").read_bytes().decode() == (
        '{"file_name": "a.png", "text": "naïve", "label": "café"}\n'
        '{"file_name": "b.png", "label": "tea"}\n'
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to write; a split needs at least one image"),
        ([("a.png", b"", "", None)], r'row 1: "label" is empty'),
        ([("a.png", b"", "x", ""), ("b.png", b"", "x", None)], r'row 1: "text" is empty'),
        ([("a.png", b"", "x", None), ("a.png", b"", "x", None)], r"row 2: .*already on line 1"),
        ([("metadata.jsonl", b"", "x", None)], "row 1: .*metadata.jsonl itself"),
        ([("../a.png", b"", "x", None)], r"row 1: .*leads upwards"),
        ([("a", b"", "x", None), ("a/b", b"", "x", None)], "a/b: cannot be written .*rename it"),
        ([("x" * 999, b"", "x", None)], "cannot be written .*rename it"),
    ],
)
def test_write_refuses_what_read_would_refuse(
    tmp_path: Path, rows: list[tuple[str, bytes, str, str | None]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_split(tmp_path / "split", rows)


def test_write_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "old.png").touch()
    with pytest.raises(OutputExists, match="is not an empty folder; choose another or empty it"):
        write_split(tmp_path, [("a.png", b"", "x", None)])


def test_hash_follows_content_and_not_place(tmp_path: Path) -> None:
    here, there = make_root(tmp_path / "here"), tmp_path / "there"
    shutil.copytree(here, there)
    before = data_hash(read_data_set(here))
    assert data_hash(read_data_set(there)) == before
    (there / "val/b.png").write_bytes(b"not listed")
    assert data_hash(read_data_set(there)) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("round", "square"), ('"cat"', '"fox"'), ("a.png", "sub/c.png")],
)
def test_hash_sees_text_label_and_name(tmp_path: Path, old: str, new: str) -> None:
    root = make_root(tmp_path)
    before = data_hash(read_data_set(root))
    metadata = root / "train/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(old, new))
    assert data_hash(read_data_set(root)) != before


def test_hash_sees_image_bytes_and_order(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    hashes = {data_hash(read_data_set(root))}
    metadata = root / "train/metadata.jsonl"
    metadata.write_text("\n".join(reversed(metadata.read_text().splitlines())))
    hashes.add(data_hash(read_data_set(root)))
    (root / "train/a.png").write_bytes(b"other")
    hashes.add(data_hash(read_data_set(root)))
    assert len(hashes) == 3


def test_hash_names_an_image_that_went_away(tmp_path: Path) -> None:
    folder = read_data_set(make_root(tmp_path))
    (tmp_path / "train/a.png").unlink()
    with pytest.raises(DataError, match=r"a.png: cannot be read .*restore the image"):
        data_hash(folder)

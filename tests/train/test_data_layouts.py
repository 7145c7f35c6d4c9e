"""The layouts beside metadata.jsonl: metadata.csv, folders per class, Hugging Face datasets.

Good ones are read alike; damaged ones are refused with file and line, all faults at once.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture

from marnet_sdk.errors import DataError, MissingExtra, NotFound
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data.dataset import read_data_set, read_one_split, scan_data_set
from marnet_train.data.examples import data_hash
from marnet_train.data.imagefolder import write_split
from marnet_train.data.pixels import PixelStore

PNG = encode(make_picture(16, 12), "PNG")
WORDS = {"cat": "fur, whiskers", "dog": "fur, nose"}
ROWS = [(f"{label}/{i}.png", text, label) for label, text in WORDS.items() for i in range(2)]


def csv_text(header: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    return out.getvalue()


def put_images(split: Path) -> None:
    for name, _, _ in ROWS:
        (split / name).parent.mkdir(parents=True, exist_ok=True)
        (split / name).write_bytes(PNG)


def metadata_csv(root: Path) -> Path:
    for split in ("train", "val"):
        put_images(root / split)
        text = csv_text(("file_name", "text", "label"), *ROWS)
        (root / split / "metadata.csv").write_text(text, "utf-8")
    return root


def class_folders(root: Path, *, shared: bool = False, validation: str = "val") -> Path:
    for split in ("train", validation):
        put_images(root / split)
    if shared:
        rows = [(f"train/{name}", text) for name, text, _ in ROWS]
        (root / "captions.csv").write_text(csv_text(("file_name", "text"), *rows))
    else:
        rows = [(name, text) for name, text, _ in ROWS]
        (root / "train/captions.csv").write_text(csv_text(("file_name", "text"), *rows))
    return root


def tables():
    import datasets

    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(WORDS)),
        text=datasets.Value("string"),
    )
    rows = {
        "image": [{"bytes": PNG, "path": name} for name, _, _ in ROWS],
        "label": [label for _, _, label in ROWS],
        "text": [text for _, text, _ in ROWS],
    }
    return datasets.DatasetDict(
        {s: datasets.Dataset.from_dict(rows, features) for s in ("train", "validation")}
    )


def saved(root: Path) -> Path:
    tables().save_to_disk(root)
    return root


def parquet(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for split, table in tables().items():
        table.to_parquet(root / f"data/{split}-00000-of-00001.parquet")
    return root


LAYOUTS = {
    "metadata.csv": metadata_csv,
    "captions.csv in train": class_folders,
    "captions.csv for all": lambda root: class_folders(root, shared=True),
    "validation": lambda root: class_folders(root, validation="validation"),
    "save_to_disk": saved,
    "parquet": parquet,
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_examples(make, tmp_path):
    data = read_data_set(make(tmp_path / "set"))
    assert data.labels == ("cat", "dog")
    assert set(data.splits) == {"train", "val"}
    train = data.splits["train"]
    assert sorted((e.label, e.text) for e in train) == sorted((lb, tx) for _, tx, lb in ROWS)
    assert all(example.image.read_bytes() == PNG for example in train)
    assert all(example.image.suffix == ".png" for example in train)
    assert len(data_hash(data)) == 64
    assert len(read_one_split(tmp_path / "set", "val")) == 4


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_images_of_every_layout_become_pixels(make, tmp_path):
    data = read_data_set(make(tmp_path / "set"))
    preprocess = Preprocess.from_dict({"size": {"height": 8, "width": 8}, "do_resize": True})
    store = PixelStore(data.splits["train"], preprocess, "train")
    pixels = store.batch(slice(None))
    assert pixels.shape == (4, 3, 8, 8)
    assert (pixels == pixels[0]).all()
    assert pixels.std() > 0.1


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_reading_leaves_the_folder_as_it_was(make, tmp_path):
    root = make(tmp_path / "set")
    before = {p: p.stat().st_mtime_ns for p in sorted(root.rglob("*"))}
    read_data_set(root)
    assert {p: p.stat().st_mtime_ns for p in sorted(root.rglob("*"))} == before


def refused(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_data_set(root)
    return str(caught.value)


def test_all_the_faults_of_captions_are_named_at_once(tmp_path):
    root = class_folders(tmp_path / "set")
    captions = root / "train/captions.csv"
    rows = [
        ("cat/0.png", "fur"),
        ("cat/1.png", ""),
        ("dog/0.png", "fur"),
        ("dog/0.png", "again"),
        ("dog/9.png", "no such image"),
        ("../cat/0.png", "outside"),
        ("/etc/passwd", "absolute"),
        ("too", "many", "cells"),
    ]
    captions.write_text(csv_text(("file_name", "text"), *rows))
    message = refused(root)
    for line in range(3, 10):
        if line != 4:
            assert f"{captions}:{line}: " in message, line
    assert "'dog/0.png' was already on line 4" in message
    assert "dog/1.png" in message  # has no caption


@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "empty|no header|header"),
        (b"file,words\nx,y\n", "column|header"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"file_name,text,label\ncat/0.png,\xff,cat\n", "UTF-8"),
        (b'file_name,text,label\n"cat/0.png,x,cat\n', "quot|cells|fields|expected"),
    ],
)
def test_a_damaged_csv_is_refused_by_name(name, content, fault, tmp_path):
    root = (metadata_csv if name == "metadata.csv" else class_folders)(tmp_path / "set")
    (root / "train" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"train/{name}(:\d+)?: .*({fault})"):
        read_data_set(root)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "any-csv"
    if not root.exists():
        metadata_csv(root)
    (root / "train/metadata.csv").write_bytes(content)
    with suppress(DataError):
        assert read_data_set(root).splits["train"]


_CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1)


@given(st.lists(_CELL.filter(str.strip), min_size=4, max_size=4))
def test_any_text_comes_back_from_csv(tmp_path_factory, texts):
    root = tmp_path_factory.getbasetemp() / "any-text"
    if not root.exists():
        metadata_csv(root)
    rows = [(name, text, label) for (name, _, label), text in zip(ROWS, texts, strict=True)]
    out = csv_text(("file_name", "text", "label"), *rows)
    (root / "train/metadata.csv").write_bytes(out.encode())
    assert [e.text for e in read_data_set(root).splits["train"]] == texts


def test_two_metadata_files_in_one_split_are_refused(tmp_path):
    root = metadata_csv(tmp_path / "set")
    (root / "train/metadata.jsonl").write_text("{}\n")
    assert "metadata.csv" in refused(root)
    assert "metadata.jsonl" in refused(root)


def test_two_layouts_at_once_are_refused(tmp_path):
    root = metadata_csv(tmp_path / "set")
    (root / "captions.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match=r"two layouts at once.*keep the files of one"):
        read_data_set(root)


def test_val_and_validation_at_once_are_refused(tmp_path):
    root = class_folders(tmp_path / "set")
    put_images(root / "validation")
    assert "two names for one split; keep one" in refused(root)


def test_a_folder_that_is_no_data_set_says_what_was_found(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(PNG)
    with pytest.raises(DataError, match=r"no train/ folder \(found: holiday\.jpg\); expected"):
        read_data_set(tmp_path)


def test_an_unknown_split_suggests_one(tmp_path):
    with pytest.raises(NotFound, match=r"no split 'tran'.*Did you mean 'train'"):
        read_one_split(class_folders(tmp_path / "set"), "tran")


def test_a_class_that_train_does_not_have_is_named_with_its_line(tmp_path):
    root = class_folders(tmp_path / "set")
    (root / "val/wolf").mkdir()
    (root / "val/wolf/0.png").write_bytes(PNG)
    assert "wolf/0.png: class 'wolf' is not in train, expected one of its 2" in refused(root)


def test_a_file_that_is_no_image_is_named_by_its_line(tmp_path):
    root = class_folders(tmp_path / "set")
    (root / "train/dog/1.png").write_bytes(b"not an image")
    preprocess = Preprocess.from_dict({"size": {"height": 8, "width": 8}})
    examples = read_data_set(root).splits["train"]
    with pytest.raises(DataError, match=r"1 problem in the images of train:\s.*dog/1\.png"):
        PixelStore(examples, preprocess, "train")


def test_damaged_tables_are_ordinary_problems(tmp_path):
    root = saved(tmp_path / "set")
    (arrow,) = (root / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert arrow.name in refused(root)
    assert scan_data_set(root).problems.count == 1


def test_a_table_that_leads_out_of_its_folder_is_refused(tmp_path):
    root = saved(tmp_path / "set")
    state = root / "train/state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": "../../secret.arrow"}]
    state.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not a plain name"):
        read_data_set(root)


def test_a_missing_shard_is_refused(tmp_path):
    root = parquet(tmp_path / "set")
    shard = root / "data/train-00000-of-00001.parquet"
    shard.rename(root / "data/train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"got 1 shards.*download all of one version"):
        read_data_set(root)


def test_a_table_without_text_names_the_column(tmp_path):
    root = tmp_path / "set"
    tables().remove_columns("text").save_to_disk(root)
    with pytest.raises(DataError, match=r"train: column 'text': got only .*expected a string"):
        read_data_set(root)


def test_a_table_with_several_labels_of_an_image_is_refused(tmp_path):
    root, both = tmp_path / "set", tables()
    for split, table in both.items():
        lists = [["cat", "dog"]] * len(ROWS)
        both[split] = table.remove_columns("label").add_column("label", lists)
    both.save_to_disk(root)
    with pytest.raises(DataError, match=r"column 'label': got .*or a string, one for each image"):
        read_data_set(root)


def test_a_row_without_text_is_named(tmp_path):
    root = tmp_path / "set"
    both = tables()
    both["train"] = both["train"].map(lambda row, i: {"text": "" if i == 2 else row["text"]},
                                      with_indices=True)  # fmt: skip
    both.save_to_disk(root)
    with pytest.raises(DataError, match='train row 2: "text" is empty'):
        read_data_set(root)


def test_without_the_library_the_pip_line_is_named(tmp_path, monkeypatch):
    root = saved(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[datasets\]"'):
        read_data_set(root)


def test_a_written_split_is_an_ordinary_image_folder(tmp_path):
    for split in ("train", "validation"):
        rows = [(f"{i}.png", PNG, label, text) for i, (_, text, label) in enumerate(ROWS)]
        write_split(tmp_path / split, rows)
    assert len(read_data_set(tmp_path).splits["val"]) == 4


def test_a_caption_without_a_name_is_one_problem(tmp_path):
    root = class_folders(tmp_path / "set")
    with (root / "train/captions.csv").open("a") as file:
        file.write(",no name\n")
    message = refused(root)
    assert message.startswith("1 problem in")
    assert f"{root}/train/captions.csv:6: " in message


def test_a_damaged_list_of_splits_is_an_ordinary_problem(tmp_path):
    root = saved(tmp_path / "set")
    (root / "dataset_dict.json").write_text("{")
    assert scan_data_set(root).problems.count == 1
    assert "dataset_dict.json: cannot be read" in refused(root)

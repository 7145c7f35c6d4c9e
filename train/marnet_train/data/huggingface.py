"""Folders of the Hugging Face `datasets` library: the one file that imports it, and pyarrow.

    ROOT/dataset_dict.json, ROOT/train/*.arrow       what DatasetDict.save_to_disk writes
    ROOT/data/train-00000-of-00001.parquet           shards of a hub download; data/ may be left out

Columns: image (an Image feature with the bytes in it), label (ClassLabel or string), text or, where
there is none, caption. Others are ignored. Rows count from 0, as in dataset["train"][0].

The library's own loaders are not called: they would follow paths and URLs out of the folder, and
copy parquet into a cache. Arrow files are mapped into memory and parquet files are read into it;
the schema is JSON, so nothing is unpickled, executed, downloaded or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marnet_sdk.errors import DataError, requires_extra
from marnet_train.data.examples import EmbeddedImage, Example, Problems, check_regular
from marnet_train.data.image_names import is_encodable, quoted
from marnet_train.data.metadata import field_fault

DICT = "dataset_dict.json"
STATE = "state.json"
MISSING: str = "no split {}"
_SHARD = re.compile(r"(train|val|validation|test)(?:-(\d{5})-of-(\d{5}))?\.parquet")


def marker(root: Path) -> Path | None:
    """Find the first file that shows that `root` has this layout."""
    if (root / DICT).is_file():
        return root / DICT
    return next((shard for shards in _parquet(root).values() for shard in shards), None)


def split_names(root: Path) -> list[str]:
    """List the names of the splits, as they are spelt there.

    Raises:
        DataError: dataset_dict.json is damaged.
    """
    if not (root / DICT).is_file():
        return list(_parquet(root))
    names = _read_json(root / DICT).get("splits")
    if not isinstance(names, list) or not all(isinstance(n, str) and _plain(n) for n in names):
        raise DataError(f'{root / DICT}: expected {{"splits": ["train", ...]}}; save it again')
    return names


def scan(root: Path, names: Mapping[str, str], problems: Problems) -> dict[str, list[Example]]:
    """Read the good rows of each split; what is bad goes to `problems`.

    Args:
        names: split -> its name there. Only train needs texts.

    Raises:
        MissingExtra: `datasets` is not installed.
    """
    with requires_extra("datasets", "datasets", "pyarrow"):
        import datasets  # noqa: F401 - its absence is reported before anything else
    splits = {}
    for split, name in names.items():
        where = f"{root}: {name}"
        try:
            splits[split] = list(_rows(_open(root, name), where, split == "train", problems))
        except DataError as error:
            problems.add(str(error))
            splits[split] = []
    return splits


def _parquet(root: Path) -> dict[str, list[Path]]:
    """Map each split as spelt there to its shards in order; those of data/ if there are any."""
    for folder in (root / "data", root):
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*.parquet")):
            if match := _SHARD.fullmatch(path.name):
                found.setdefault(match[1], []).append(path)
        if found:
            return found
    return {}


def _open(root: Path, name: str) -> Any:
    """Read the rows of one split as a pyarrow table, checked to be sound.

    Raises:
        DataError: a file is missing or damaged, or the shards do not fit together.
    """
    import pyarrow

    is_saved = (root / DICT).is_file()
    files = _arrow_files(root / name) if is_saved else _complete(_parquet(root)[name])
    tables = [_read_table(path) for path in files]
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise DataError(f"{root}: {name}: shards differ in their columns ({error})") from error


def _arrow_files(directory: Path) -> list[Path]:
    """List the files that state.json lists; a name that leads out of the folder is refused."""
    try:
        names = [entry["filename"] for entry in _read_json(directory / STATE)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f'{directory / STATE}: no list "_data_files"; save it again') from error
    for name in names:
        if not isinstance(name, str) or not _plain(name):
            raise DataError(
                f"{directory / STATE}: file {quoted(str(name))} is not a plain name; expected "
                "files inside this folder: save the data set again"
            )
    if not names:
        raise DataError(f"{directory / STATE}: lists no files, so the split is empty; add rows")
    return [_inside(directory, directory / name) for name in names]


def _complete(shards: list[Path]) -> list[Path]:
    """Return the shards, if all of "00003 of 00007" are there."""
    totals = {match[3] for path in shards if (match := _SHARD.fullmatch(path.name))}
    if len(totals) > 1 or ((total := totals.pop()) is not None and int(total) != len(shards)):
        raise DataError(
            f"{shards[0].parent}: got {len(shards)} shards, {', '.join(p.name for p in shards[:3])}"
            " ...; expected as many as their names say: download all of one version"
        )
    return [_inside(path.parent, path) for path in shards]


def _inside(directory: Path, path: Path) -> Path:
    # Hub snapshots are folders of links to blobs beside them, so only single files are followed.
    if not path.is_file():
        raise DataError(f"{path}: missing; restore it in {directory} or save the data set again")
    return path


def _read_table(path: Path) -> Any:
    """Read a pyarrow table and check its offsets and strings: files come from strangers."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(path).read()
        else:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore or save it again") from error
    return table


def _rows(table: Any, where: str, needs_text: bool, problems: Problems) -> Iterator[Example]:
    """Yield the good rows of a table."""
    features = _features(table, where)
    text_column = next((name for name in ("text", "caption") if name in features), None)
    before = problems.count
    _check_columns(features, text_column, where, needs_text, problems)
    if problems.count > before:
        return
    if not len(table):
        problems.add(f"{where}: no rows; a split needs at least one image")
    images, names = _image_columns(table)
    missing = images.is_null().to_pylist()
    labels = _label_values(table["label"].to_pylist(), features["label"])
    texts = table[text_column].to_pylist() if text_column else [None] * len(table)
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        faults = [
            _image_fault(names[row]) if missing[row] else None,
            field_fault(text, "text", needed=needs_text),
            field_fault(label, "label"),
        ]
        for fault in filter(None, faults):
            problems.add(f"{where} row {row}: {fault}")
        if not any(faults):
            image = EmbeddedImage(names[row] or "image", images, row)
            yield Example(image, str(label).strip(), text, f"{where} row {row}", str(label))


def _features(table: Any, where: str) -> dict[str, Any]:
    """Return column -> feature of `datasets`."""
    from datasets import Features

    try:
        return dict(Features.from_arrow_schema(table.schema))
    except Exception as error:  # KeyError, TypeError, ValueError, ...: metadata from strangers
        message = f"{where}: its features cannot be read ({error!r}); save it again"
        raise DataError(message) from error


def _check_columns(
    features: dict[str, Any],
    text_column: str | None,
    where: str,
    needs_text: bool,
    problems: Problems,
) -> None:
    from datasets import ClassLabel, Image, Value

    def report(column: str, kind: str) -> None:
        got = repr(features[column]) if column in features else f"only {list(features)}"
        problems.add(
            f"{where}: column {column!r}: got {got[:200]}, expected {kind}; cast or rename"
        )

    def is_string(feature: Any) -> bool:
        return isinstance(feature, Value) and feature.dtype in ("string", "large_string")

    if not isinstance(features.get("image"), Image):
        report("image", "an Image feature")
    label = features.get("label")
    if not isinstance(label, ClassLabel) and not is_string(label):
        report("label", "a ClassLabel or a string, one for each image")
    if text_column is None and needs_text:
        report("text", "a string")
    elif text_column is not None and not is_string(features[text_column]):
        report(text_column, "a string")


def _image_columns(table: Any) -> tuple[Any, list[str | None]]:
    """Return the bytes of every image as a pyarrow column, and the names of the files they were."""
    columns = table.select(["image"]).flatten()
    paths = columns["image.path"].to_pylist()
    names = [re.split(r"[/\\]", path)[-1] or None if path else None for path in paths]
    return columns["image.bytes"], names


def _image_fault(name: str | None) -> str:
    if name is None:
        return "no image; add it or remove the row"
    return f"the image is only a path ({quoted(name)}), expected its bytes: embed it"


def _label_values(values: list[Any], feature: Any) -> list[str | None]:
    """Return class names; None for a missing label, which `datasets` also writes as -1."""
    names = getattr(feature, "names", None)
    if names is None:
        return values
    known = dict(enumerate(names))
    return [known.get(value) for value in values]


def _plain(name: str) -> bool:
    """Tell whether a name is one of a file in the folder itself."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name) and is_encodable(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {quoted(str(content))}, expected an object; save it again")
    return content

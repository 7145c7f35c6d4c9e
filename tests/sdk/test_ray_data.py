"""Data sets of Ray become rows: one for each image, whatever dies, and errors in their places."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from local_ray import run_with_ray

from marnet_sdk import Classifier
from marnet_sdk.commands.rows import arrow_table, make_row
from marnet_sdk.errors import InferenceError, InvalidInput, MissingExtra
from marnet_sdk.serve import ray_data
from marnet_sdk.serve.ray_data import Predictor, find_images, write_answers


@pytest.fixture(scope="module")
def predictor(bundle_of) -> Predictor:
    return Predictor(bundle_of("onnxruntime", "fp32"), threads=1, batch_size=3, top_k=2)


@pytest.fixture(scope="module")
def paths(digits) -> list[Any]:
    return sorted((digits / "test").glob("*.png"))


@pytest.fixture(scope="module")
def expected(bundle_of, paths) -> list[str]:
    with Classifier(bundle_of("onnxruntime", "fp32")) as classifier:
        return [answer.label for answer in classifier.predict(paths)]


def column(values: list[Any]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


# --- a worker, without Ray ------------------------------------------------------------------------


def test_every_row_of_a_batch_has_one_answer_or_one_error(predictor, paths, expected):
    contents = [path.read_bytes() for path in paths[:5]]
    odd = [b"no image", b"", None, 7, float("nan"), [1, 2], "/no/such/file.png"]
    images = column([*contents[:2], *odd, *contents[2:]])
    table = predictor({"bytes": images, "path": np.arange(len(images))})
    rows = table.to_pylist()
    assert [row["image"] for row in rows] == [str(i) for i in range(12)]
    failed = [row for row in rows if row["error"] is not None]
    assert [row["image"] for row in failed] == [str(i) for i in range(2, 9)]
    assert all(row["label"] is None for row in failed)
    answered = [row for row in rows if row["error"] is None]
    assert [row["label"] for row in answered] == expected[:5]
    assert {len(row["top"]) for row in answered} == {2}


def test_an_empty_batch_has_the_columns_of_all_others(predictor):
    empty = predictor({"bytes": column([]), "path": column([])})
    assert (empty.num_rows, empty.schema) == (0, arrow_table([]).schema)


def test_an_image_without_a_number_is_an_error_and_loses_no_other(predictor, monkeypatch, paths):
    bad, predict = paths[1].read_bytes(), predictor._classifier.predict

    def some(images: list[bytes], **more: Any) -> Any:
        if bad in images:
            raise InferenceError("the model gives NaN")
        return predict(images, **more)

    monkeypatch.setattr(predictor._classifier, "predict", some)
    monkeypatch.setattr(predictor._classifier, "predict_stream", some)
    images = column([path.read_bytes() for path in paths[:3]])
    rows = predictor({"bytes": images, "path": column(["a", "b", "c"])}).to_pylist()
    assert [row["error"] for row in rows] == [None, "the model gives NaN", None]


def test_a_column_that_is_not_there_is_named_with_those_that_are(predictor):
    with pytest.raises(InvalidInput, match="image: there is no column 'bytes' in the data set, wh"):
        predictor({"path": column(["a"]), "content": column([b""])})
    with pytest.raises(InvalidInput, match=r"name: there is no column 'path'.* has image, label"):
        predictor(arrow_table([make_row("a", InferenceError("NaN"))]))


@pytest.mark.parametrize("call", [find_images, write_answers])
def test_without_the_extra_the_pip_line_is_told(monkeypatch, tmp_path, call):
    monkeypatch.setitem(sys.modules, "ray", None)
    more = {} if call is find_images else {"output": tmp_path, "model": tmp_path}
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[ray\]"'):
        call(tmp_path, **more)


def test_settings_that_rows_depend_on_are_all_but_three(bundle_of, tmp_path):
    bundle = bundle_of("onnxruntime", "fp32")
    made_by = ray_data._made_by(ray_data._checked({"model": bundle, "threads": 2, "top_k": 3}))
    assert made_by.pop("bundle") == Classifier(bundle).bundle.digest
    assert made_by == {
        "image": "bytes", "name": "path", "top_k": 3, "operating_point": None, "samples": None,
        "seed": None,
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=r"operating_point: got .none.; .* has default"):
        ray_data._made_by(ray_data._checked({"model": bundle, "operating_point": "none"}))


# --- on Ray ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(bundle_of, digits, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    return run_with_ray("data", bundle_of("onnxruntime", "fp32"), digits / "test", cwd=folder)


@pytest.mark.slow
def test_each_image_has_one_row_though_a_worker_is_killed(found, expected):
    killed = found["killed"]
    assert killed["died"]
    count = len(expected) + 3
    assert killed["written"] == {"kept": 0, "added": count, "failed": 3}
    rows = sorted(killed["rows"], key=lambda row: int(row["image"]))
    assert [row["image"] for row in rows] == [str(i) for i in range(count)]
    assert [row["label"] for row in rows] == [*expected, None, None, None]
    assert [row["error"] is None for row in rows] == [True] * len(expected) + [False] * 3


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_what_has_no_row(found, expected, paths):
    interrupted = found["interrupted"]
    first, second = interrupted["runs"]
    count = len(expected) + 1
    assert 48 <= interrupted["kept"] < count
    assert first["kept"] == interrupted["kept"]
    assert first["kept"] + first["added"] == count
    assert second == {"kept": count, "added": 0, "failed": 0}
    rows = {row["image"]: row for row in interrupted["rows"]}
    assert len(rows) == len(interrupted["rows"]) == count
    assert [rows[str(path)]["label"] for path in paths] == expected
    (broken,) = (row for row in rows.values() if row["error"])
    assert broken["image"].endswith("/odd/broken.png")


@pytest.mark.slow
def test_a_block_that_kills_its_workers_ends_the_job_and_keeps_the_others(found, expected, paths):
    deadly = found["deadly"]
    assert (deadly["deaths"], deadly["reason"][:5]) == (4, "Actor")
    rows = {row["image"]: row["label"] for row in deadly["rows"]}
    assert str(paths[0]) not in rows
    assert len(rows) == len(deadly["rows"]) > 0
    assert rows.items() <= dict(zip(map(str, paths), expected, strict=True)).items()


@pytest.mark.slow
def test_the_class_works_in_a_pipeline_of_ones_own(found, expected, paths):
    rows = {row["image"]: row["label"] for row in found["mapped"]}
    assert [rows[str(path)] for path in paths] == expected


@pytest.mark.slow
def test_jobs_that_cannot_be_say_why(found):
    refused = found["refused"]
    assert "unexpected keyword argument 'top'; the settings are the arg" in refused["setting"]
    assert "holds answers of an earlier run; resume=True" in refused["folder"]
    assert "image: there is no column 'pixels' in the data set, which has path" in refused["column"]

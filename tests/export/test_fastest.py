"""`auto` keeps the fastest backend that passes, and no backend can spoil it for the others."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from marnet_export.choose import race
from marnet_export.choose.race import Candidate, export_fastest
from marnet_export.settings import Settings
from marnet_sdk.bundle import read_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import BackendUnavailable, ExportError

SETTINGS = Settings("auto", "fp16", steps=10, min_agreement=0.98, loop="graph")
# Every process that Python starts with this on its path imports it first.
CRASH = """
import importlib.abc, os, sys

class Crash(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "marnet_export.build.torchscript":
            os.abort()

sys.meta_path.insert(0, Crash())
"""


@pytest.fixture
def two_backends(monkeypatch) -> None:
    chosen = {name: race.BUILDERS[name] for name in ("onnxruntime", "torchscript")}
    monkeypatch.setattr(race, "BUILDERS", chosen)


def in_this_process(_: list[str], *, input: str, **how: object) -> SimpleNamespace:
    """Do the job here: a process of its own takes seconds to import all that it needs."""
    job = json.loads(input)
    Path(job["answer"]).write_text(json.dumps(race.work(job)))
    return SimpleNamespace(returncode=0)


def test_the_fastest_that_passes_is_written_whole_and_the_others_are_listed(
    small, tmp_path, monkeypatch
):
    chosen = {name: race.BUILDERS[name] for name in ("openvino", "torchscript")}
    monkeypatch.setattr(race, "BUILDERS", chosen)
    monkeypatch.setattr(race, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(race, "_SETTLE", 0)
    said: list[str] = []
    kept: list[Path] = []
    timed = race._race

    def watched(found, folder):
        kept.extend((folder / "reference").iterdir())
        return timed(found, folder)

    monkeypatch.setattr(race, "_race", watched)
    path = tmp_path / "bundles" / "auto.marnet"
    ranked = export_fastest(small, path, replace(SETTINGS, text=False), say=said.append)
    bundle = read_bundle(path)  # every byte
    # Computed once for both: x_v, the logits, and those of four more seeds.
    assert len(kept) == 6
    listed = json.loads(bundle.file("fidelity.json").read_text())["backends"]
    assert [row["backend"] for row in listed] == [c.backend for c in ranked]
    assert {row["backend"] for row in listed} == chosen.keys()
    assert bundle.manifest.backend == listed[0]["backend"]
    times = [row["milliseconds"]["1"] for row in listed]
    assert times == sorted(times)
    assert times[0] > 0
    assert {row["outcome"] for row in listed} == {"passed"}
    assert bundle.has("source")
    assert bundle.manifest.settings["backend"] == "auto"  # so that a rebuild chooses again
    assert said[-1] == f"{listed[0]['backend']} is the fastest here"
    assert Classifier(path).predict(sorted((small / "samples").glob("*.png"))[:2])
    assert [entry.name for entry in path.parent.iterdir()] == ["auto.marnet"]


def test_a_text_encoder_that_the_fastest_cannot_build_costs_only_the_fastest(tmp_path, monkeypatch):
    finished, said = [], []

    def finish(folder: Path, checkpoint: Path, settings: Settings) -> None:
        finished.append((folder.name, settings.backend))
        if settings.backend == "openvino":
            raise ExportError("openvino cannot build the text encoder")

    monkeypatch.setattr(race, "finish", finish)
    passed = [
        Candidate(name, "passed", agreement=1.0, milliseconds={"1": 1.0})
        for name in ("openvino", "onnxruntime", "torchscript")
    ]
    crashed = Candidate("aotinductor", "crashed", "signal SIGABRT", exit_code=1)
    checkpoint = tmp_path / "run"
    ranked = race._finish_first([*passed, crashed], tmp_path, checkpoint, SETTINGS, said.append)
    assert [c.backend for c in ranked] == ["onnxruntime", "torchscript", "aotinductor", "openvino"]
    assert finished == [("openvino", "openvino"), ("onnxruntime", "onnxruntime")]
    assert said == ["openvino: refused: openvino cannot build the text encoder"]
    message = r"no backend could be built.*aotinductor: crashed.*openvino: refused: openvino cannot"
    with pytest.raises(ExportError, match=message):
        race._finish_first([passed[0], crashed], tmp_path, checkpoint, SETTINGS, said.append)


@pytest.mark.slow
@pytest.mark.usefixtures("two_backends")
def test_a_builder_that_crashes_is_a_line_of_the_report(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    path = tmp_path / "auto.marnet"
    ranked = export_fastest(checkpoint, path, SETTINGS)
    assert [(c.backend, c.outcome) for c in ranked] == [
        ("onnxruntime", "passed"),
        ("torchscript", "crashed"),
    ]
    assert ranked[1].reason.startswith("signal SIGABRT")
    listed = json.loads((path / "fidelity.json").read_text())["backends"]
    assert listed[1]["outcome"] == "crashed"


def test_where_none_passes_every_reason_is_given_and_nothing_is_written(
    small, tmp_path, monkeypatch
):
    """A process that tries a backend may print, which is not taken for its answer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit; print('hello'); atexit.register(print, 'goodbye')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    chosen = {"torchscript": race.BUILDERS["torchscript"]}
    monkeypatch.setattr(race, "BUILDERS", chosen)
    path: Path = tmp_path / "bundles" / "auto.marnet"
    with pytest.raises(
        ExportError, match=r"no backend could be built.*torchscript: refused: .*int8.*--precision"
    ):
        export_fastest(small, path, Settings("auto", "int8", steps=10, loop="graph", text=False))
    assert list(path.parent.iterdir()) == []


def test_a_checkpoint_without_its_tokenizer_is_refused_before_anything_is_built(
    checkpoint, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    said: list[str] = []
    with pytest.raises(ExportError, match=r"tokenizer.*--no-text"):
        export_fastest(copy, tmp_path / "auto.marnet", SETTINGS, say=said.append)
    assert not said
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_for_a_gpu_those_that_build_for_one_are_tried(monkeypatch):
    monkeypatch.setattr(race, "_why_not", lambda backend, device: None)
    assert race._backends("cuda") == ["aotinductor", "tensorrt", "torchscript"]
    assert race._backends("cpu") == ["aotinductor", "onnxruntime", "openvino", "torchscript"]
    assert race._backends(None) == list(race.BUILDERS)


def test_where_no_backend_runs_on_a_gpu_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(
        race, "why_unavailable", lambda name: "no driver" if name == "tensorrt" else None
    )
    message = (
        r"^nothing runs on cuda here: aotinductor: aotinductor cannot run on cuda: .*; "
        r"tensorrt: no driver; torchscript: torchscript cannot run on cuda: .*$"
    )
    with pytest.raises(BackendUnavailable, match=message):
        export_fastest(tmp_path / "none", tmp_path / "b", Settings("auto", device="cuda"))
    assert list(tmp_path.iterdir()) == []

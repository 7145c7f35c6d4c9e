"""Encoders of other kinds go the whole way: trained, exported, verified, opened, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_scripts import load_script
from click.testing import CliRunner

from marnet_sdk.errors import EnvironmentMismatch

backbones = load_script("scripts/backbones.py")
FAMILIES = (*backbones.VISION, *backbones.TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_encoders_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--family", family, "--backend", "onnxruntime", "--precision", "fp32"]
    page = tmp_path / "page.md"
    result = CliRunner().invoke(
        backbones.main, [*options, "--output", str(found), "--page", str(page)]
    )
    assert result.exit_code == 0, result.stderr
    cells = json.loads(found.read_text("utf-8"))["cells"]
    assert [cell["backend"] for cell in cells] == ["training", "onnxruntime"]
    assert [cell["detail"] for cell in cells if not cell["works"]] == []
    assert f"| `{family}` | yes |  |  | fp32 |  |  |" in page.read_text("utf-8")


def test_what_does_not_work_is_said_in_one_line(tmp_path: Path) -> None:
    cells = [
        backbones.Cell("vit", "training", "", True, "", 1.0),
        backbones.Cell("vit", "openvino", "fp32", False, "it has no operator X", 1.0),
        backbones.Cell("vit", "openvino", "bf16", True, "100% of 90", 1.0),
    ]
    page = backbones.page_of(cells, ("openvino",), ("fp32", "bf16"))
    assert "| `vit` | yes | bf16 |" in page
    assert "- `vit` openvino fp32: it has no operator X" in page


def test_a_process_that_dies_costs_no_more_than_its_cells(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbones, "__file__", str(tmp_path / "missing.py"))
    (cell,) = backbones.in_own_process("vit", tmp_path, [("onnxruntime", "fp32")])
    assert not cell.works
    assert "the process ended with 2" in cell.detail


def test_only_what_is_missing_is_tried_again() -> None:
    done = [
        backbones.Cell("vit", "training", "", True, "", 1.0),
        backbones.Cell("vit", "openvino", "bf16", False, "it has no operator X", 1.0),
        backbones.Cell("bit", "training", "", False, "it diverged", 1.0),
    ]
    cells = {cell.place: cell for cell in done}

    def missing(family: str) -> list[tuple[str, str]]:
        return backbones.missing_ways(cells, family, ("openvino",), ("fp32", "bf16"))

    assert missing("vit") == [("openvino", "fp32")]
    assert missing("bit") == []
    assert missing("swin") == [("openvino", "fp32"), ("openvino", "bf16")]


def test_what_this_machine_cannot_try_is_not_held_against_a_family(monkeypatch, tmp_path) -> None:
    def refuse(*_: object) -> str:
        raise EnvironmentMismatch("this CPU has no bf16 arithmetic")

    monkeypatch.setattr(backbones, "fit", lambda *_, **__: None)
    monkeypatch.setattr(backbones, "try_cell", refuse)
    (cell,) = backbones.try_family("vit", tmp_path, tmp_path, [("openvino", "bf16")])
    assert cell.place == ("vit", "training", "")

"""The script that measures int8 of trained encoders."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load_script
from click.testing import CliRunner
from tiny_training import TINY, change

from marnet_train.data.digits import write_digits
from marnet_train.models.backbones import VisionEncoder, load_backbone

SIDE = 16


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/int8_encoders.py")


def test_every_family_is_an_encoder_of_a_size_that_trains_in_minutes(script: ModuleType) -> None:
    for family in script.FAMILIES:
        encoder = VisionEncoder(load_backbone(script.recipe_of(family).vision)).eval()
        features = encoder(torch.rand(2, 3, script.SIDE, script.SIDE))
        assert features.shape == (2, encoder.dim)
        assert 2e5 < sum(p.numel() for p in encoder.parameters()) < 4e6


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data", tmp_path / "found.json"
    write_digits(data)
    for split in ("train", "val", "test"):
        listed = data / split / "metadata.jsonl"
        listed.write_text("".join(listed.read_text("utf-8").splitlines(keepends=True)[::8]))
    image = {"size": {"height": SIDE, "width": SIDE}}
    tiny = change(TINY, image={**(TINY.image or {}), **image})
    monkeypatch.setattr(script, "recipe_of", lambda _: tiny)
    monkeypatch.setattr(script, "BACKENDS", ("onnxruntime",))
    monkeypatch.setattr(script, "SIDE", SIDE)
    options = ["--data", str(data), "--output", str(output), "--seconds", "0.1"]
    for _ in range(2):
        result = CliRunner().invoke(script.main, [*options, "--family", "resnet"])
        assert result.exit_code == 0, result.output
        monkeypatch.setattr(script, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    (run,) = json.loads(output.read_text("utf-8"))["runs"]
    assert run["family"] == "resnet"
    found = run["backends"]["onnxruntime"]
    assert found["exports"]["float32"]["agreement"] == 1
    assert found["exports"]["float32"]["encoder_in_int8"] == 0
    assert found["exports"]["int8"]["encoder_in_int8"] > 0.9
    timed = {(line["bundle"], line["batch"]) for line in found["times"]}
    assert timed >= {(name, batch) for name in ("float32", "int8") for batch in (1, 16)}

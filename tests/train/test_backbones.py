"""Encoders: tiny ones of each family, pretrained folders, and descriptions that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import make_model, write_checkpoint
from tolerances import FLOAT32_LAYER
from torch import Tensor, nn
from transformers import AutoModel

from marnet_sdk.errors import EnvironmentMismatch, MissingExtra, RecipeError
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.backbones import (
    TextEncoder,
    VisionEncoder,
    backbone_config,
    load_backbone,
)

_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **_VIT},
    "deit": {"model_type": "deit", **_VIT},
    "dinov2": {"model_type": "dinov2"}
    | {key: value for key, value in _VIT.items() if key != "intermediate_size"},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "swin": {
        "model_type": "swin",
        "image_size": 32,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "convnext": {
        "model_type": "convnext",
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "convnextv2": {
        "model_type": "convnextv2",
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "regnet": {
        "model_type": "regnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "groups_width": 8,
    },
    # The configurations of these say no width, or another one.
    "efficientnet": {
        "model_type": "efficientnet",
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 128,
        "image_size": 64,
        "initializer_range": 0.5,
    },
    "mobilenet_v1": {"model_type": "mobilenet_v1", "depth_multiplier": 0.25, "image_size": 32},
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.35, "image_size": 32},
    "mobilevit": {
        "model_type": "mobilevit",
        "image_size": 32,
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 24],
        "initializer_range": 0.5,
    },
    "segformer": {  # a map [B, d, h, w] and no pooler
        "model_type": "segformer",
        "num_encoder_blocks": 2,
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
}
WIDTH = dict.fromkeys(("vit", "deit", "dinov2", "swin"), 16)
WIDTH |= dict.fromkeys(("resnet", "convnext", "convnextv2", "regnet", "segformer"), 24)
WIDTH |= {"efficientnet": 128, "mobilenet_v1": 256, "mobilenet_v2": 1280, "mobilevit": 24}
TEXT: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 30,
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 32,
    },
}


def build(description: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return load_backbone(description).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_a_vision_encoder_makes_one_vector_of_its_width_of_each_image(
    name: str, pixels: Tensor
) -> None:
    encoder = VisionEncoder(build(VISION[name]))
    whole = encoder(pixels)
    assert encoder.dim == WIDTH[name]
    assert whole.shape == (2, WIDTH[name])
    torch.testing.assert_close(whole[1:], encoder(pixels[1:]), rtol=0, atol=FLOAT32_LAYER)
    # Of their size, which is tiny where nothing has been trained.
    assert (whole[0] - whole[1]).abs().max() > 1e-3 * whole.abs().max() > 0


@torch.no_grad()
def test_vit_gives_its_class_token_after_the_final_layer_norm(pixels: Tensor) -> None:
    backbone = build(VISION["vit"])
    found = VisionEncoder(backbone)(pixels)
    assert torch.equal(found, backbone(pixels).last_hidden_state[:, 0])
    assert (
        float(found.mean(dim=1).abs().max()) < FLOAT32_LAYER
    )  # a layer norm that has not been trained


@torch.no_grad()
def test_resnet_gives_the_mean_over_its_last_map(pixels: Tensor) -> None:
    backbone = build(VISION["resnet"])
    by_hand = backbone(pixels).last_hidden_state.mean(dim=(2, 3))
    found = VisionEncoder(backbone)(pixels)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=FLOAT32_LAYER)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_no_untrained_pooler_is_built(name: str) -> None:
    names = [key for key, _ in build(VISION[name]).named_parameters()]
    assert not [key for key in names if "pooler" in key]


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_a_text_encoder_gives_the_masked_mean_of_its_tokens(name: str) -> None:
    backbone = build(TEXT[name])
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = TextEncoder(backbone)(ids, mask)
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    by_hand = torch.stack([hidden[0].mean(dim=0), hidden[1, :3].mean(dim=0)])
    assert found.shape == (2, 16)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=FLOAT32_LAYER)


@torch.no_grad()
def test_a_text_encoder_can_give_the_vector_of_the_first_token() -> None:
    backbone = build(TEXT["bert"])
    ids, mask = torch.tensor([[2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 0]])
    expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    assert torch.equal(TextEncoder(backbone, "first")(ids, mask), expected)


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_padding_does_not_change_a_text(name: str) -> None:
    encoder = TextEncoder(build(TEXT[name]))
    short = encoder(torch.tensor([[2, 7, 3]]), torch.ones(1, 3, dtype=torch.long))
    padded = encoder(torch.tensor([[2, 7, 3, 0, 9]]), torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(short, padded, rtol=0, atol=FLOAT32_LAYER)


@torch.no_grad()
def test_a_text_without_any_token_is_zeros_not_nan() -> None:
    encoder = TextEncoder(build(TEXT["bert"]))
    found = encoder(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert torch.equal(found, torch.zeros(1, 16))


@pytest.mark.parametrize("name", ["vit", "resnet"])
@torch.no_grad()
def test_a_pretrained_folder_is_loaded_with_its_weights(
    name: str, pixels: Tensor, tmp_path: Path
) -> None:
    original = build(VISION[name])
    original.save_pretrained(tmp_path)
    again = load_backbone({"pretrained": str(tmp_path)}).eval()
    assert torch.equal(VisionEncoder(again)(pixels), VisionEncoder(original)(pixels))


@torch.no_grad()
def test_a_pretrained_text_folder_is_loaded_with_its_weights(tmp_path: Path) -> None:
    original = build(TEXT["bert"])
    original.save_pretrained(tmp_path)
    again = load_backbone({"pretrained": str(tmp_path)}).eval()
    ids, mask = torch.tensor([[2, 5, 3]]), torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(TextEncoder(again)(ids, mask), TextEncoder(original)(ids, mask))


def test_weights_that_are_not_used_go_unsaid_and_those_that_lack_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A text model has no pooler here, whose weights checkpoints of BERT have."""
    build(TEXT["bert"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "pooler.dense.bias": torch.zeros(16)}, tmp_path / "model.safetensors")
    capfd.readouterr()
    load_backbone({"pretrained": str(tmp_path)})
    assert capfd.readouterr().err == ""
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    load_backbone({"pretrained": str(tmp_path)})
    said = capfd.readouterr().err
    assert said.startswith(
        f"warning: {tmp_path} lacks 1 weights, such as embeddings.word_embeddings"
    )
    assert said.endswith("; they start at random\n")


def test_a_pretrained_folder_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    model = build(VISION["vit"])
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    AutoModel.from_pretrained(tmp_path)  # transformers alone would read it
    with pytest.raises(RecipeError, match=r"no file named model\.safetensors"):
        load_backbone({"pretrained": str(tmp_path)})


def test_pickled_weights_beside_safetensors_are_not_read(tmp_path: Path) -> None:
    build(VISION["vit"]).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    load_backbone({"pretrained": str(tmp_path)})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"model_type": "vitt"}, "encoder .*vitt.*Unrecognized model identifier: vitt"),
        ({"hidden_size": 16}, r"an encoder needs model_type = .* got \[\'hidden_size\'\]"),
        ({}, r'or pretrained = "\.\.\.", got \[\]'),
        ({"model_type": "bert", "hidden_size": "wide"}, "hidden_size.*expected int, got str"),
        ({**TEXT["bert"], "hidden_size": 15}, "15.* not a multiple of the number of attention"),
        ({"model_type": "resnet", "layer_type": "odd"}, "layer_type=odd is not one of"),
        (
            {"model_type": "cvt", "depth": [1, 1, 1]},
            r"cvt.*transformers could not build it \(IndexError: .*\); compare its sizes with the",
        ),
    ],
)
def test_a_description_that_makes_no_encoder_is_refused(
    description: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        load_backbone(description)


def test_a_pretrained_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"encoder .*{tmp_path}"):
        backbone_config({"pretrained": str(tmp_path / "nowhere")})


def test_missing_encoders_of_the_groceries_name_the_command_that_writes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="write it with marnet-train encoders --out encoders"):
        backbone_config({"pretrained": "encoders/minilm-l6"})


def test_code_that_comes_with_weights_is_never_run(tmp_path: Path) -> None:
    build(VISION["vit"]).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"has only revision, got \['trust_remote_code'\]"):
        load_backbone({"pretrained": str(tmp_path), "trust_remote_code": True})


def test_an_encoder_that_hides_random_patches_is_refused() -> None:
    backbone = build({"model_type": "vit_mae", **_VIT})
    with pytest.raises(RecipeError, match="hides random patches"):
        VisionEncoder(backbone)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            {"model_type": "hgnet_v2"},
            "'hgnet_v2' .* one image, .*'last_hidden_state'.*takes pixels",
        ),
        (
            {**VISION["resnet"], "num_channels": 1},
            r"\[1, 3, 64, 64\] .*configuration.*pixels and",
        ),
        (TEXT["bert"], "'bert' encoder cannot run on one image"),
        (
            {
                "model_type": "clip",
                "text_config": {"num_hidden_layers": 1, "hidden_size": 24},
                "vision_config": {"num_hidden_layers": 1, "hidden_size": 24},
            },
            "'clip' .* one image.*pixels and no more: .* part, such as 'clip_vision_model'",
        ),
    ],
    ids=["no features", "one channel", "text", "both"],
)
def test_an_encoder_that_makes_no_vector_of_an_image_is_refused(
    description: dict[str, Any], message: str
) -> None:
    backbone = AutoModel.from_config(backbone_config(description))
    with pytest.raises(RecipeError, match=message):
        VisionEncoder(backbone)


def test_an_image_encoder_for_texts_is_refused() -> None:
    message = "'resnet' encoder cannot run on one text.*token ids and their mask.*clip_text_model"
    with pytest.raises(RecipeError, match=message):
        TextEncoder(build(VISION["resnet"]))


class Rows(nn.Module):
    """A backbone that gives two rows for one image."""

    def __init__(self) -> None:
        super().__init__()
        self.config = backbone_config(VISION["resnet"])

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=torch.zeros(2, 7, 5))


def test_an_encoder_of_another_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"makes \[2, 5\] of one image, expected one vector"):
        VisionEncoder(Rows())


class Peeks(nn.Module):
    """A backbone whose code looks at values, draws numbers, and counts and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.config = backbone_config(VISION["resnet"])
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen.append(pixel_values)
        self.norm.running_var += pixel_values.sum().item() + 1
        hidden = self.norm(pixel_values) + torch.rand(1)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("training", [True, False])
def test_looking_for_the_width_changes_nothing(training: bool) -> None:
    for backbone in (Peeks(), build(VISION["efficientnet"])):
        backbone.train(training)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        modes = [module.training for module in backbone.modules()]
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        assert VisionEncoder(backbone).dim == (3 if isinstance(backbone, Peeks) else 128)
        assert torch.equal(torch.rand(1), expected)
        assert [module.training for module in backbone.modules()] == modes
        after = backbone.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert getattr(backbone, "seen", []) == []
        assert {p.device.type for p in backbone.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_the_width_is_seen_of_a_model_without_values(name: str) -> None:
    with torch.device("meta"):
        backbone = load_backbone((VISION | TEXT)[name])
        encoder = (VisionEncoder if name in VISION else TextEncoder)(backbone)
    assert encoder.dim == WIDTH.get(name, 16)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@torch.no_grad()
def test_efficientnet_pools_its_whole_map_as_its_own_pooler_does(
    pooling: str, pixels: Tensor
) -> None:
    backbone = build({**VISION["efficientnet"], "pooling_type": pooling})
    encoder = VisionEncoder(backbone)
    out = backbone(pixels)
    found = encoder(pixels)
    torch.testing.assert_close(found, out.pooler_output, rtol=0, atol=FLOAT32_LAYER)
    # Whole numbers, whose sums no order of additions rounds: the same formula, to the last bit.
    whole = torch.arange(2 * 128 * 7 * 5).reshape(2, 128, 7, 5).remainder(251).float()
    backbone.forward = lambda **_: SimpleNamespace(last_hidden_state=whole)
    own = backbone.get_submodule("pooler")(whole).reshape(2, 128)
    assert torch.equal(encoder(pixels), own)


@pytest.mark.parametrize("name", ["efficientnet", "mobilenet_v1", "mobilenet_v2", "resnet"])
@torch.no_grad()
def test_batch_statistics_are_averages_and_not_those_of_the_last_batch(
    name: str, pixels: Tensor
) -> None:
    encoder = VisionEncoder(build(VISION[name])).train()
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    first = norms[0]
    for _ in range(50):
        encoder(pixels)
    usual = first.running_mean.clone()
    encoder(3 * pixels)  # a convolution without bias gives three times the mean
    moved = (first.running_mean - usual).norm() / (3 * usual - usual).norm()
    assert 0 < float(moved) < 0.2


@torch.no_grad()
def test_a_folder_in_half_precision_is_loaded_in_float32(pixels: Tensor, tmp_path: Path) -> None:
    build(VISION["vit"]).half().save_pretrained(tmp_path)
    again = load_backbone({"pretrained": str(tmp_path)}).eval()
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert VisionEncoder(again)(pixels).dtype == torch.float32


def test_a_misspelt_setting_of_an_encoder_is_refused_with_the_nearest_name():
    # transformers keeps keys that it does not know and builds its default, 768 wide.
    with pytest.raises(RecipeError, match=r"vit encoder: .*'hiden_size'.*hidden_size"):
        load_backbone({"model_type": "vit", "hiden_size": 64})


TIMM = {"model_type": "timm_wrapper", "architecture": "vgg11"}


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (None, MissingExtra, r'run: pip install "marnet\[timm\]"'),
        ("raise ImportError('broken')", RecipeError, "broken"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            EnvironmentMismatch,
            "timm cannot be imported .*nms does not exist.*: pip install torch torchvision",
        ),
    ],
    ids=["not installed", "broken", "torchvision of another torch"],
)
def test_an_encoder_of_timm_says_what_is_missing(
    source: str | None,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if source is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm/__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(kind, match=message):
        load_backbone(TIMM)


def test_a_checkpoint_with_an_encoder_of_timm_is_not_called_damaged_where_timm_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    folder = write_checkpoint(make_model(), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision": TIMM}))
    with pytest.raises(MissingExtra, match='package "timm" is not installed'):
        load_checkpoint(folder)

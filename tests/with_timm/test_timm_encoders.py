"""Encoders of timm: built, loaded, merged, and the whole way through every backend of a CPU.

These tests need an environment of their own, because torchvision does not import beside the CPU
build of torch that all others have: `make test-timm`.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_LAYER, TIMM_MERGED
from torch import Tensor, nn
from transformers import TimmWrapperModel
from whole_way import CPU_BACKENDS, export_and_ask, train_two_steps

from marnet_export.lower.branches import with_merged_branches
from marnet_sdk.errors import RecipeError
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.backbones import (
    VisionEncoder,
    backbone_config,
    build_backbone,
    load_backbone,
    plain_config,
)

timm = pytest.importorskip("timm", reason="needs timm and torchvision: make test-timm")
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}  # a small WRN-50-2
VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
# architecture -> model_args and d_v. The first three are of the paper's Table 1.
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "vgg19": ({"mlp_ratio": 0.01}, 4096),
    "wide_resnet50_2": (RESNET, 256),
    "repvgg_a0": ({}, 1280),
    "vit_tiny_patch16_224": (VIT, 24),
    "mobilenetv3_small_050": ({}, 1024),
}
# Models with blocks of several branches, each kind with a method of its own that merges them.
BRANCHED: dict[str, dict[str, Any]] = {
    "repvgg_a0": {},
    "mobileone_s0": {},
    "repvit_m0_9": {},
    "levit_128s": {"img_size": 224},
    "fastvit_t8": {},
    "repghostnet_050": {},
}


def description(architecture: str, **model_args: Any) -> dict[str, Any]:
    return {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "model_args": model_args,
    }


def encoder(description: dict[str, Any]) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(build_backbone(backbone_config(description))).eval()


def pixels(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_an_encoder_goes_the_whole_way(
    name: str, backend: str, few_digits: Path, shared: Any, tmp_path: Path
) -> None:
    vision, image = description(name, **TINY[name][0]), {"size": {"height": 32, "width": 32}}
    trained = shared(f"timm-{name}", lambda out: train_two_steps(vision, few_digits, out, image))
    export_and_ask(trained, backend, tmp_path / "bundle")


def test_wiser_with_its_wide_residual_network_goes_the_whole_way(
    few_digits: Path, tmp_path: Path
) -> None:
    trunk = description("wide_resnet50_2", **RESNET)
    vision = {"model_type": "wiser", "image_size": 32, "slices": 8, "hidden_size": 16}
    image = {"size": {"height": 32, "width": 32}}
    train_two_steps({**vision, "trunk": trunk}, few_digits, tmp_path / "run", image)
    export_and_ask(tmp_path / "run", "onnxruntime", tmp_path / "bundle")


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_vector_of_an_image_is_what_timm_gives_without_its_classifier(name: str) -> None:
    model_args, width = TINY[name]
    vision = encoder(description(name, **model_args))
    theirs = timm.create_model(name, num_classes=0, **model_args).eval()
    theirs.load_state_dict(vision.backbone.timm_model.state_dict())  # pyright: ignore
    assert vision.dim == width
    torch.testing.assert_close(
        vision(pixels()), theirs(pixels()), rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER
    )


@pytest.mark.parametrize(
    ("named", "params", "width"),
    [
        ({"architecture": "vgg19"}, 143.67 - 4.10, 4096),
        ({"architecture": "wide_resnet50_2"}, 68.88 - 2.05, 2048),
        ({"architecture": "repvgg_b1"}, 57.42 - 2.05, 2048),
        ({"model_type": "wiser"}, 73, 2048),
    ],
    ids=["VGG-19", "WRN-50-2", "RepVGG-B1", "WISeR"],
)
def test_the_encoders_of_table_1_have_the_size_of_the_published_ones(
    named: dict[str, str], params: float, width: int
) -> None:
    """Millions of parameters, without the classifier of 1,000 classes."""
    with torch.device("meta"):
        vision = VisionEncoder(load_backbone({"model_type": "timm_wrapper", **named}))
    count = sum(p.numel() for p in vision.parameters()) / 1e6
    assert count == pytest.approx(params, rel=0.02)
    assert vision.dim == width


@pytest.mark.parametrize("name", ["vgg19", "repvgg_a0"])
def test_initial_weights_are_those_of_timm(name: str) -> None:
    model_args = TINY[name][0]
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, **model_args)
    ours = encoder(description(name, **model_args)).backbone.timm_model  # pyright: ignore
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key  # pyright: ignore


def trained_for_long(vision: VisionEncoder) -> VisionEncoder:
    """Give every batch norm statistics and weights that are far from doing nothing."""
    generator = torch.Generator().manual_seed(2)
    for module in vision.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for values, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                values.data.uniform_(low, 1.5, generator=generator)  # pyright: ignore
            for values in (module.bias, module.running_mean):
                values.data.normal_(0, 0.2, generator=generator)  # pyright: ignore
    return vision


@pytest.mark.parametrize("name", BRANCHED)
@torch.no_grad()
def test_branches_are_merged_without_changing_the_vector(name: str) -> None:
    side = BRANCHED[name].get("img_size", 64)
    vision = trained_for_long(encoder(description(name, **BRANCHED[name])))
    wanted, before = vision(pixels(side)), sum(1 for _ in vision.parameters())
    merged = with_merged_branches(vision)
    assert merged is not vision
    assert sum(1 for _ in merged.parameters()) < before
    got, scale = merged(pixels(side)), float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=TIMM_MERGED * scale)
    assert torch.equal(vision(pixels(side)), wanted)  # which stays as it was


@torch.no_grad()
def test_repvgg_is_merged_exactly_in_float64() -> None:
    vision = trained_for_long(encoder(description("repvgg_a0"))).double()
    merged = with_merged_branches(vision)
    got, wanted = merged(pixels(64).double()), vision(pixels(64).double())
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    kinds = [type(m).__name__ for m in merged.modules()]
    assert "BatchNorm2d" not in kinds  # a plain stack of convolutions


@pytest.mark.parametrize("name", ["wide_resnet50_2", "vit_tiny_patch16_224"])
def test_a_model_without_branches_is_left_as_it_is(name: str) -> None:
    vision = encoder(description(name, **TINY[name][0]))
    assert with_merged_branches(vision) is vision


def test_a_checkpoint_holds_no_pickle_and_is_read_without_a_network(
    few_digits: Path, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, image = "repvgg_a0", {"size": {"height": 32, "width": 32}}
    vision = description(name)
    trained = shared(f"timm-{name}", lambda out: train_two_steps(vision, few_digits, out, image))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was opened, or a connection")

    for place, what in ((torch, "load"), (socket.socket, "connect")):
        monkeypatch.setattr(place, what, forbidden)
    loaded = load_checkpoint(trained)
    assert loaded.model.vision.dim == 1280
    suffixes = {path.suffix for path in trained.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".md", ".png", ".txt"}
    described = json.loads((trained / "config.json").read_text())["vision"]
    assert (described["model_type"], described["architecture"]) == ("timm_wrapper", name)
    assert not {"label_names", "num_classes", "pretrained_cfg"} & described.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"},
         "architecture: got 'hf-hub:timm/resnet18.a1_in1k', which would be fetched .*expected"),
        ({"architecture": "vgg91"}, "'vgg91' is not supported in your version of timm"),
        ({"model_args": {"checkpoint_path": "weights.pth"}},
         "model_args: got checkpoint_path, which name files; expected .*weights with pretrained"),
        ({"model_args": {"width": 3}}, "unexpected keyword argument 'width'"),
        ({"architektur": "vgg19"}, "unknown setting 'architektur'. Did you mean 'architecture'"),
        ({"model_args": {"features_only": True}}, "encoder cannot run on one image|expected one"),
    ],
)  # fmt: skip
def test_a_description_that_makes_no_encoder_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        VisionEncoder(load_backbone({**description("vgg11"), **changed}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as timm pushes it to the hub: config.json and model.safetensors, with a head."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return tmp_path


@torch.no_grad()
def test_a_folder_of_timm_is_loaded_with_its_weights(folder: Path) -> None:
    backbone = load_backbone({"pretrained": str(folder)})
    assert isinstance(backbone, TimmWrapperModel)
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18", num_classes=7).eval()
    wanted = theirs.forward_head(theirs.forward_features(pixels()), pre_logits=True)
    found = VisionEncoder(backbone.eval())(pixels())
    torch.testing.assert_close(found, wanted, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)
    again = build_backbone(backbone_config(plain_config(backbone)))
    again.load_state_dict(backbone.state_dict())


def test_a_folder_with_a_pickle_alone_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"model\.safetensors"):
        load_backbone({"pretrained": str(folder)})


def test_a_folder_that_names_a_pickle_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_args": {"checkpoint_path": "weights.pth"}})
    )
    with pytest.raises(RecipeError, match="model_args: got checkpoint_path"):
        load_backbone({"pretrained": str(folder)})

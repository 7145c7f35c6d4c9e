"""Checkpoints of MARNets of real sizes with random weights, for measurements of speed."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from PIL import Image

from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.checkpoint import SAMPLES, write_model
from marnet_train.data.imagefolder import write_split
from marnet_train.diffusion import ScheduleConfig
from marnet_train.encoders import VISION, write_encoders
from marnet_train.models.backbones import backbone_config, load_backbone
from marnet_train.models.marnet import MARNet, MarnetConfig
from marnet_train.text import train_tokenizer

# transformers' defaults are ViT-B/16, Swin-T, ResNet-50 and BERT-base.
BERT: dict[str, Any] = {"model_type": "bert"}
TINY: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # vision, text, side
    "vit-b16": ({"model_type": "vit"}, BERT, 224),
    "swin-t": ({"model_type": "swin"}, BERT, 224),
    "resnet-50": ({"model_type": "resnet"}, BERT, 224),
    "efficientnet-lite0": ({"pretrained": VISION}, BERT, 224),
    "tiny": (
        {"model_type": "vit", "image_size": 32, "patch_size": 8, **TINY},
        {**BERT, **TINY, "vocab_size": 64},
        32,
    ),
}


def write_checkpoint(path: Path, name: str, train_steps: int, classes: int = 101) -> None:
    """A checkpoint with random weights, and crops of two photographs as its samples."""
    torch.manual_seed(0)
    *descriptions, side = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        if descriptions[0] == {"pretrained": VISION}:
            write_encoders(Path(folder) / "encoders")
            descriptions[0] = {"pretrained": str(Path(folder) / "encoders" / VISION)}
        backbone = load_backbone(descriptions[0])
        vision, text = (
            json.loads(backbone_config(d).to_json_string(use_diff=False)) for d in descriptions
        )
    labels, schedule = tuple(f"dish {i}" for i in range(classes)), ScheduleConfig(steps=train_steps)
    config = MarnetConfig(vision, text, labels, schedule=schedule)
    model = MARNet(config, vision=backbone).eval()
    path.mkdir()
    write_split(path / SAMPLES, ((name, data, labels[0], None) for name, data in _crops()))
    preprocess = Preprocess(size=(side, side))
    pixels = torch.from_numpy(preprocess.pixels(sorted((path / SAMPLES).glob("*.jpg"))[::4]))
    with torch.no_grad():  # standardised features and logits as far apart as a trained model's
        x_v = model.vision(pixels)
        model.vision_mean.copy_(x_v.mean(dim=0))
        model.vision_std.copy_(x_v.std(dim=0) + 1e-3)
        model.classifier.weight.mul_(20)
    write_model(path, model, preprocess)
    train_tokenizer(labels).save_pretrained(path)


def _crops() -> Iterator[tuple[str, bytes]]:
    folder = Path(sklearn.datasets.__file__).parent / "images"
    for name in ("china", "flower"):
        photograph = Image.open(folder / f"{name}.jpg")
        for i in range(16):
            file = io.BytesIO()
            crop = photograph.crop((15 * i, 8 * i, 15 * i + 380, 8 * i + 300))
            crop.save(file, "JPEG", quality=92)
            yield f"{name}-{i}.jpg", file.getvalue()

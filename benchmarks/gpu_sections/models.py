"""MARNets with fresh weights, through the real classes, and pictures to classify with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marnet_bench.plain_loop import PlainLoop
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.diffusion import ScheduleConfig
from marnet_train.models.marnet import MARNet, MarnetConfig

VIT: dict[str, Any] = {"model_type": "vit"}  # transformers' defaults are ViT-B/16
TINY_VIT = VIT | {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32}
TINY_VIT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
RESNET: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic"}
RESNET |= {"depths": [1]}  # stands where nothing is encoded
CLASSES = 101


def make_model(vision: dict[str, Any] | None, train_steps: int, *, tiny: bool) -> MARNet:
    """A MARNet of the paper's widths (or tiny ones), whose loop contracts.

    Args:
        vision: its encoder; None: features alone are refined, as wide as the paper's.
    """
    dim, hidden = (32, 48) if tiny else (MarnetConfig.dim, MarnetConfig.hidden)
    text = {"model_type": "bert", "num_hidden_layers": 1, "intermediate_size": 8}
    text |= {"vocab_size": 8, "hidden_size": dim, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MarnetConfig(
        vision or RESNET | {"hidden_sizes": [dim]},
        text,
        tuple(f"class {i}" for i in range(CLASSES)),
        dim=dim,
        hidden=hidden,
        schedule=ScheduleConfig(steps=train_steps),
    )
    return MARNet(config).eval().requires_grad_(False)


class PlainSteps:
    """This is `PlainLoop.forward` up to x_CDR, with a step that may be compiled: x_v [B, D_v] ->
    [B, D].
    """

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        # Taken apart once: it costs the host as much as a step.
        self.rows = list(zip(plain.tau, plain.coefficients, plain.noise, strict=True))

    def __call__(self, x_v: Tensor, step: Any = None) -> Tensor:
        plain, step = self.plain, step or self.plain.step
        condition = ((x_v - plain.mean) / plain.std).to(plain.tau.dtype)
        x = plain.initial.repeat(len(x_v), 1)  # as dense as what a step returns: one compilation
        previous = torch.zeros_like(x)
        for tau, row, z in self.rows:
            x, previous = step(x, previous, condition, tau, row, z)
        return x


def spread_out(model: MARNet, pixels: Tensor) -> None:
    """Standardise features as training does, and give logits distances like a trained model's."""
    x_v = model.vision(pixels)
    model.vision_mean.copy_(x_v.mean(dim=0))
    model.vision_std.copy_(x_v.std(dim=0) + 1e-3)
    model.classifier.weight.mul_(20)


def photographs(count: int, width: int, height: int) -> list[Image.Image]:
    """RGB pictures with detail at every scale, as photographs have it, each another one."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        total = np.zeros((height, width, 3), np.float32)
        for cells in (3, 12, 48, 192):
            noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            octave = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            total += np.asarray(octave, np.float32) / cells**0.5
        low, high = total.min(), total.max()
        found.append(Image.fromarray((255 * (total - low) / (high - low)).astype(np.uint8)))
    return found


def preprocessing(*, tiny: bool) -> Preprocess:
    side = 32 if tiny else 224
    return Preprocess(size=(side, side))


def crops(count: int, side: int) -> list[Image.Image]:
    """Cut `count` different square pictures."""
    sources = photographs(-(-count // 8), 2 * side, 2 * side)
    offsets = [(i % 4 * side // 4, i // 4 * side // 2) for i in range(8)]
    boxes = [(x, y, x + side, y + side) for x, y in offsets]
    return [source.crop(box) for source in sources for box in boxes][:count]

"""A model small enough for any test: fresh weights whose loop contracts, and what it deploys to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.bundle import OperatingPoint, Sampling
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import write_model
from marnet_train.diffusion import SamplerTable, ScheduleConfig
from marnet_train.models.marnet import MARNet, MarnetConfig
from marnet_train.models.seda import SeDA, SedaConfig

LABELS = ("a", "b", "c")
RESNET = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", "depths": [1]}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}


def make_model(
    *, steps: int = 100, dim: int = 8, hidden: int = 12, condition: int = 10, **config: Any
) -> MARNet:
    """float32, with a standardisation that is far from doing nothing."""
    torch.manual_seed(0)
    settings = {
        "vision": {**RESNET, "hidden_sizes": [condition]},
        "text": {**BERT, "hidden_size": dim, "num_attention_heads": 2},
        "labels": LABELS,
        "hidden": hidden,
        "time_dim": 6,
        "schedule": ScheduleConfig(steps=steps),
    }
    model = MARNet(MarnetConfig(**settings | config)).eval()
    width = len(model.vision_mean)
    model.vision_mean.copy_(3 * torch.randn(width))
    model.vision_std.copy_(0.2 + 3 * torch.rand(width))
    return model


def make_seda(
    width: int = 10, classes: int = 3, *, latent: int = 8, steps: int = 8, **config: Any
) -> SeDA:
    """float32, with image features of that width and text features of width `latent`."""
    torch.manual_seed(0)
    settings = {
        "vision": {**RESNET, "hidden_sizes": [width]},
        "text": {**BERT, "hidden_size": latent, "num_attention_heads": 2},
        "labels": tuple("abcdefgh"[:classes]),
        "dim": 6,
        "hidden": 12,
        "time_dim": 6,
        "schedule": ScheduleConfig(steps=steps),
        "semantic_steps": 4,
    }
    model = SeDA(SedaConfig(**settings | config)).eval()
    model.vision_mean.copy_(torch.randn(width))
    model.vision_std.copy_(0.3 + torch.rand(width))
    return model


def write_checkpoint(model: MARNet, folder: Path, images: int = 8) -> Path:
    """Write the model as a checkpoint with images of noise; returns the folder."""
    (folder / "samples").mkdir(parents=True)
    write_model(folder, model, Preprocess(size=(32, 32)))
    rng, lines = np.random.default_rng(0), []
    for i in range(images):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"samples/{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "label": LABELS[i % 3]}))
    (folder / "samples/metadata.jsonl").write_text("\n".join(lines))
    return folder


def sampling_of(
    model: MARNet, table: SamplerTable, *, samples: int = 1, noise: str = "shared"
) -> Sampling:
    """With one operating point, "default"."""
    point = OperatingPoint(table.sampler, table.eta, table.timesteps, samples, None)
    steps = model.config.schedule.steps
    return Sampling({"default": point}, "default", steps, noise, 0, model.denoiser.dim)


def tables_of(
    model: MARNet,
    plan: SamplingPlan,
    table: SamplerTable,
    *,
    seed: int = 0,
    samples: int = 1,
    keys: Sequence[int] | None = None,
) -> Tables:
    """As the SDK makes them of a bundle's plan."""
    arrays = plan.tensors({"default": table})
    sampling = sampling_of(model, table)
    return make_tables(arrays, sampling, "default", seed=seed, samples=samples, keys=keys)


@torch.inference_mode()
def plain_refine(
    model: MARNet,
    table: SamplerTable,
    x_v: Floats,
    *,
    seed: int = 0,
    samples: int = 1,
    keys: Sequence[int] | None = None,
) -> tuple[Floats, Floats]:
    """Logits [B, K, C] and fused features [B, K, D_f], with the loop as the paper writes it."""
    features = torch.from_numpy(x_v)
    found = []
    for k in range(samples):
        drawn = [
            draw_trajectory(
                seed, table.timesteps, table.train_steps, model.denoiser.dim, trajectory=key + k
            )
            for key in keys or [0] * len(x_v)
        ]
        initial = torch.as_tensor(np.stack([d.initial for d in drawn])).to(features)
        noise = torch.as_tensor(np.stack([d.steps for d in drawn], axis=1)).to(features)
        fused = model.fuse(features, model.refine(features, table, initial, noise))
        found.append((model.classifier(fused).numpy(), fused.numpy()))
    logits, fused = zip(*found, strict=True)
    return np.stack(logits, axis=1), np.stack(fused, axis=1)

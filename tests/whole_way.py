"""An encoder goes the whole way: two steps of each phase, a checkpoint, an export, an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import TINY, change

from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_sdk.classifier import Classifier
from marnet_train.checkpoint import SAMPLES
from marnet_train.trainer import fit

CPU_BACKENDS = ("torchscript", "onnxruntime", "openvino", "aotinductor")


def train_two_steps(vision: dict[str, Any], data: Path, out: Path, image: dict[str, Any]) -> None:
    """Train an encoder on 60 images, 30 a step, and write the checkpoint."""
    phase = {"epochs": 1, "batch": 30, "lr_backbone": 1e-4}
    fit(data, change(TINY, vision=vision, image=image, alignment=phase), out, threads=1)


def export_and_ask(checkpoint: Path, backend: str, out: Path) -> None:
    """Export in float32, held to the checkpoint on its images, and classify one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marnet_export.seal._check_in_second_process", lambda *_: None)
        settings = Settings(backend, "fp32", min_agreement=0.9, text=False, loop="graph")
        export_bundle(checkpoint, out, settings)
    image = min((checkpoint / SAMPLES).rglob("*.png"))
    assert Classifier(out).predict(image).label in set("0123456789")

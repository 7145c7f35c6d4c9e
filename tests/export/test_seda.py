"""SeDA through the backends: its first stage is a part of the encoder, the second is the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bf16 import bf16_only
from quick import kept
from tolerances import BUILT

from marnet_export.job import export_bundle
from marnet_export.lower.methods import lower
from marnet_export.settings import Settings
from marnet_sdk.classifier import Classifier
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import load_checkpoint
from marnet_train.data.imagefolder import read_split
from marnet_train.diffusion import sampler_table, trajectory_tensors
from marnet_train.models.seda import SeDA


@pytest.mark.parametrize("checkpoint", ["tiny_seda", "tiny_progressive", "tiny_carry"])
def test_the_lowered_encoder_gives_what_the_model_sees(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    loaded = load_checkpoint(request.getfixturevalue(checkpoint))
    lowered = lower(loaded.model)
    pixels = torch.randn(6, *loaded.preprocess.output_shape)
    with torch.no_grad():
        expected = loaded.model.see(loaded.model.vision(pixels))
        found = lowered.encoder(pixels)
    assert found.shape == (6, lowered.image_width)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


KINDS = ("seda", "progressive", "carry")
BACKENDS = ("torchscript", "onnxruntime", "openvino")
QUICK = [(kind, backend, "fp32") for kind, backend in zip(KINDS, BACKENDS, strict=True)]
CASES = [
    (kind, backend, precision)
    for kind in KINDS
    for backend, precision in (
        ("torchscript", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("openvino", "int8"),
        ("torchscript", "fp16"),
        ("aotinductor", "fp32"),
    )
]


@pytest.mark.parametrize(
    ("kind", "backend", "precision"),
    [
        *kept(CASES, QUICK, many=True),
        *(
            pytest.param(kind, "openvino", "bf16", marks=(bf16_only, pytest.mark.slow))
            for kind in KINDS
        ),
    ],
)
def test_a_bundle_answers_as_the_checkpoint_does(
    kind: str,
    backend: str,
    precision: str,
    digits: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """export_bundle holds it to the checkpoint; here the loop is run as it is written.

    In other types a checkpoint must have learnt something, or all answers are close calls.
    """
    few, many = f"tiny_{kind}", f"{kind}_checkpoint"
    checkpoint: Path = request.getfixturevalue(few if precision == "fp32" else many)
    path = tmp_path / "seda.marnet"
    text = kind == "seda"  # it takes seconds
    export_bundle(checkpoint, path, Settings(backend, precision, min_agreement=0.97, text=text))
    images = [e.image for e in read_split(digits / "test", needs_text=False)[:40]]
    model = load_checkpoint(checkpoint).model
    assert isinstance(model, SeDA)
    with Classifier(path) as classifier:
        pixels = classifier.preprocess.pixels(images)
        found = classifier.logits(pixels)
        table = sampler_table(model.config.schedule, "ddpm")
        drawn = draw_trajectory(
            classifier.seed, table.timesteps, table.train_steps, model.latent_width
        )
        with torch.no_grad():
            x_v = model.see(model.vision(torch.from_numpy(pixels)))
            x_map = model.refine(x_v, table, *trajectory_tensors(drawn, len(x_v), x_v))
            expected = model.head(x_v, x_map)[0].numpy()
        labels = np.array([answer.index for answer in classifier.predict(images)])
        assert (labels == expected.argmax(axis=1)).mean() >= 0.95
        assert (found.argmax(axis=1) == labels).all()
        if precision == "fp32":
            assert np.abs(found - expected).max() <= BUILT[precision] * np.abs(expected).max()
        if text:
            words = ["zero with a hole", "a seven with a bar"]
            assert classifier.match(images[0], words).shape == (2,)

"""Measure what int8 keeps of trained image encoders of several families, and what time it saves.

    python benchmarks/scripts/int8_encoders.py --data data/plates --output FILE.json

Each family is trained from scratch by the recipe `plates` with its own image encoder and `SIDE`
pixels. Each backend then builds three bundles: float32; int8 with all products in it; and int8
with as many blocks kept in float as `--min-agreement 0.99` asks for. Ranges and blocks are fitted
to validation images, and answers are held to those of the float32 checkpoint on test images. Then
the bundles take turns on one image and on 16. A family that --output has is not tried again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from marnet_bench.machine import describe_machine
from marnet_bench.timing import interleave, speedup_interval
from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_sdk.bundle import read_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import Command, say, track
from marnet_sdk.errors import VerificationFailed
from marnet_train.recipe import Recipe, load_recipe
from marnet_train.trainer import fit

SIDE = 64
BACKENDS = ("onnxruntime", "openvino")
ASKED = 0.99
FAMILIES: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"depth_multiplier": 0.5, "image_size": SIDE},
    "convnext": {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1]},
    "resnet": {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128, 256],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "vit": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "image_size": SIDE,
        "patch_size": 8,
    },
    "swin": {
        "image_size": SIDE,
        "embed_dim": 32,
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 4],
        "window_size": 4,
    },
}
# These families are usually trained at lower rates than a small ResNet.
_LR = {"convnext": 1e-3, "vit": 5e-4, "swin": 5e-4}


def recipe_of(family: str) -> Recipe:
    """The recipe `plates` with another image encoder, and without its search for samples."""
    plates = load_recipe("plates")
    assert plates.image is not None
    return replace(
        plates.but(alignment={"lr_backbone": _LR.get(family, plates.alignment.lr_backbone)}),
        vision={"model_type": family, **FAMILIES[family]},
        image={**plates.image, "size": {"height": SIDE, "width": SIDE}},
        schedule=replace(plates.schedule, steps=20),
        samples=1,
    )


def export(
    checkpoint: Path, data: Path, out: Path, backend: str, precision: str, least: float
) -> dict[str, Any]:
    """Build one bundle, and tell its agreement, its accuracy and what stayed in float."""
    settings = Settings(
        backend, precision, min_agreement=least, text=False, source=False, loop="graph"
    )
    try:
        fidelity = export_bundle(checkpoint, out, settings, data=data / "test")
    except VerificationFailed as error:
        return {"failed": " ".join(str(error).split())}
    kept = read_bundle(out).manifest.precision
    return {
        "images": fidelity.images,
        "agreement": fidelity.top1_agreement,
        "interval": fidelity.top1_interval,
        "accuracy": fidelity.bundle_accuracy,
        "reference_accuracy": fidelity.reference_accuracy,
        "kept": sorted(kept.kept),
        "encoder_in_int8": kept.receipt["encoder"].compute.get("int8", 0.0),
    }


def times(bundles: dict[str, Path], duration: float) -> Iterator[dict[str, Any]]:
    """Let bundles take turns, and compare each with the first."""
    opened = {name: Classifier(path) for name, path in bundles.items()}
    images = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), np.uint8)
    for batch in (1, 16):
        calls = {n: partial(clf.predict, list(images[:batch])) for n, clf in opened.items()}
        taken = interleave(calls, warmup=3, duration=duration)
        first = next(iter(taken))
        for name, seconds in taken.items():
            yield {
                "bundle": name,
                "batch": batch,
                "p50_ms": float(np.median(seconds) * 1e3),
                "faster": speedup_interval(taken[first], seconds),
            }
    for classifier in opened.values():
        classifier.close()


def measure(family: str, data: Path, folder: Path, duration: float) -> dict[str, Any]:
    """Train a family and try it in every backend."""
    trained = fit(data, recipe_of(family), folder / "checkpoint", threads=1, device="cpu")
    found: dict[str, Any] = {"family": family, "seconds": trained["seconds"], "backends": {}}
    ways = {"float32": ("fp32", 0.0), "int8": ("int8", 0.0), "int8, 99 %": ("int8", ASKED)}
    for backend in BACKENDS:
        bundles = {name: folder / f"{backend} {name}" for name in ways}
        exports = {
            name: export(folder / "checkpoint", data, bundles[name], backend, *how)
            for name, how in ways.items()
        }
        built = {name: path for name, path in bundles.items() if path.exists()}
        found["backends"][backend] = {"exports": exports, "times": [*times(built, duration)]}
        say(f"{family} {backend}: " + json.dumps(exports))
    return found


@click.command(cls=Command)
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--family", "families", multiple=True, type=click.Choice([*FAMILIES]))
@click.option("--seconds", default=10.0, help="For each batch of a backend's bundles.")
def main(data: Path, output: Path, families: tuple[str, ...], seconds: float) -> None:
    """Measure every family, or those that are named, and write what is found."""
    known = json.loads(output.read_text("utf-8"))["runs"] if output.exists() else []
    runs = {run["family"]: run for run in known}
    for family in track([f for f in families or FAMILIES if f not in runs], "families"):
        with tempfile.TemporaryDirectory() as folder:
            runs[family] = measure(family, data, Path(folder), seconds)
        content = {"what": __doc__, "machine": describe_machine(), "runs": [*runs.values()]}
        output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Export and measure a MARNet of the paper's size: ViT-B/16, the default denoiser, T = 100.

    python benchmarks/real_size.py --output benchmarks/results/NAME.json

The weights are random, because none can be downloaded here: the figures say how fast it is and how
far the bundle is from the float32 model, and nothing about accuracy. Takes about ten minutes.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import sklearn.datasets
import torch
from PIL import Image

from marnet_bench.machine import describe_machine
from marnet_bench.peers import load_peer
from marnet_bench.scenarios import golden_images, run_batches
from marnet_bench.timing import interleave, speedup_interval
from marnet_export.pipeline import Settings, export_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import print_table, say
from marnet_sdk.preprocess import Preprocess
from marnet_train.checkpoint import SAMPLES, write_model
from marnet_train.data.imagefolder import write_split
from marnet_train.diffusion import ScheduleConfig
from marnet_train.models.backbones import backbone_config
from marnet_train.models.marnet import MARNet, MarnetConfig

BUILDS = (
    ("torchscript", "fp32"),
    ("torchscript", "bf16"),
    ("onnxruntime", "fp16"),
    ("openvino", "fp16"),
    ("openvino", "bf16"),
)


def write_checkpoint(path: Path, train_steps: int, classes: int = 101) -> None:
    """A checkpoint with random weights, and crops of two photographs as its samples."""
    torch.manual_seed(0)
    settings = {"model_type": "vit"}, {"model_type": "bert", "num_hidden_layers": 1}
    vision, text = (json.loads(backbone_config(s).to_json_string(use_diff=False)) for s in settings)
    labels, schedule = tuple(str(i) for i in range(classes)), ScheduleConfig(steps=train_steps)
    model = MARNet(MarnetConfig(vision, text, labels, schedule=schedule))
    with torch.no_grad():
        model.vision_std.fill_(0.5)
        model.classifier.weight.mul_(20)  # logits as far apart as a trained model's
    path.mkdir()
    write_model(path, model, Preprocess(size=(224, 224)))
    write_split(path / SAMPLES, ((name, data, "0", None) for name, data in _crops()))


def _crops() -> Iterator[tuple[str, bytes]]:
    folder = Path(sklearn.datasets.__file__).parent / "images"
    for name in ("china", "flower"):
        photograph = Image.open(folder / f"{name}.jpg")
        for i in range(16):
            file = io.BytesIO()
            crop = photograph.crop((15 * i, 8 * i, 15 * i + 380, 8 * i + 300))
            crop.save(file, "JPEG", quality=92)
            yield f"{name}-{i}.jpg", file.getvalue()


def measure(checkpoint: Path, folder: Path, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Build each bundle and measure it beside the plain model."""
    for backend, precision in BUILDS:
        path = folder / f"{backend}-{precision}.marnet"
        started = time.perf_counter()
        export_bundle(checkpoint, path, Settings(backend, precision), say=say)
        seconds = round(time.perf_counter() - started, 1)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        classifier = Classifier(path)
        _, peer = load_peer(checkpoint, classifier.bundle.manifest)
        about: dict[str, Any] = {"export_s": seconds, "bundle_mb": round(size / 1e6, 1)}
        about["eight_samples"] = cost_of_samples(path, 8)
        for batch in batches:
            report = run_batches(classifier, peer, batch=batch, warmup=1, duration=4, min_rounds=5)
            yield report | about


def cost_of_samples(path: Path, samples: int) -> dict[str, float]:
    """How much longer one image takes with several noise samples than with one, from its pixels."""
    one, several = Classifier(path), Classifier(path, samples=samples)
    pixels = one.preprocess.pixels(golden_images(one, 1))
    calls = {"one": lambda: one.logits(pixels), "several": lambda: several.logits(pixels)}
    taken = interleave(calls, warmup=1, duration=4, min_rounds=5)
    ratio, low, high = speedup_interval(taken["several"], taken["one"])
    return {"samples": samples, "ratio": ratio, "low": low, "high": high}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--train-steps", type=click.IntRange(1), default=100, show_default=True, help="T.")
def main(output: Path, train_steps: int) -> None:
    """Export and measure at the paper's size, with random weights."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "vit-b16"
        write_checkpoint(checkpoint, train_steps)
        reports = list(measure(checkpoint, Path(scratch), (1, 16)))
    content = {"what": __doc__, "machine": describe_machine(), "reports": reports}
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    rows = []
    for report in reports:
        line = next(x for x in report["lines"] if (x["model"], x["input"]) == ("bundle", "pixels"))
        ratio = next(x for x in report["speedups"] if x["input"] == "pixels")
        rows.append(
            (
                f"{report['backend']} {report['precision']['asked']}",
                str(report["batch"]),
                f"{line['p50_ms']:.0f}",
                f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{report['fidelity']['top1_agreement']:.1%}",
                f"{report['eight_samples']['ratio']:.2f}",
                f"{report['export_s']}",
                f"{report['bundle_mb']}",
            )
        )
    columns = ("bundle", "batch", "p50 ms", "against PyTorch", "agree", "K = 8", "export s", "MB")
    print_table(f"ViT-B/16, T = {train_steps}, random weights, from pixels", columns, rows)


if __name__ == "__main__":
    main()

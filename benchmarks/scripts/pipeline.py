"""Measure from JPEG bytes to a label, beside `transformers.pipeline` with equal weights.

    python benchmarks/scripts/pipeline.py --out pipeline.json

The peer is `pipeline("image-classification")` around the model class of transformers for the same
encoder. Equal are the encoder's weights (random ones, at 224 pixels), the two layers behind it (the
operating point "zero": MARNet's alignment branch is the pipeline's classifier), the image
processor's settings, the number of threads and the JPEG files, which lie in memory. So both have to
give the same labels, which is checked.

Different are what this is about: the pipeline decodes with Pillow as it is and runs eager torch in
float32. The bundle also looks whether the file is whole, runs in --backend at --precision, and its
last layer for the class token alone. "with the loop" is the same encoder with all steps of the
reverse process behind it, which the pipeline has nothing like. "fast_decode" decodes JPEG files at
a smaller scale, so that its pixels are others.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from marnet_bench.machine import describe_machine
from marnet_bench.photographs import TWELVE_MEGAPIXELS, photographs
from marnet_bench.stages import agreement
from marnet_bench.timing import interleave, speedup_interval, summarise
from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_sdk import Classifier
from marnet_sdk.bundle import is_bundle
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.cpus import check_threads, cpus
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.marnet import LEAKY_SLOPE
from random_models import MODELS, write_checkpoint

PEER = "transformers pipeline"
ZERO, FAST, LOOP = "marnet", "marnet, fast_decode", "marnet, with the loop"
Label = Callable[[bytes], str]


def peer(checkpoint: Path) -> Label:
    """The pipeline around the same encoder and the same head."""
    model = load_checkpoint(checkpoint).model
    backbone: Any = model.vision.backbone
    config = backbone.config
    config.id2label = dict(enumerate(model.config.labels))
    config.label2id = {label: i for i, label in config.id2label.items()}
    whole = AutoModelForImageClassification.from_config(config).eval()
    whole.base_model.load_state_dict(backbone.state_dict())
    head = model.project_vision, nn.LeakyReLU(LEAKY_SLOPE), model.alignment_classifier
    whole.classifier = nn.Sequential(nn.Flatten(), *head)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    classify: Any = pipeline(
        "image-classification", model=whole, image_processor=processor, device="cpu"
    )
    say(f"{PEER}: {type(whole).__name__}, {type(processor).__name__}")
    return lambda file: classify(Image.open(io.BytesIO(file)))[0]["label"]


def built(folder: Path, name: str, backend: str, precision: str, steps: int) -> tuple[Path, Path]:
    """A checkpoint with random weights, and its bundle, unless they are there."""
    checkpoint, bundle = folder / name, folder / f"{name}-{backend}-{precision}.marnet"
    if not checkpoint.exists():
        say(f"writing {name} with random weights")
        write_checkpoint(checkpoint, name, steps)
    if not is_bundle(bundle):
        say(f"exporting {bundle.name}")
        # Random weights make close calls; the answers of both are compared here.
        settings = Settings(
            backend, precision, steps=0, min_agreement=0.0, text=False, source=False
        )
        export_bundle(checkpoint, bundle, settings, say=say)
    return checkpoint, bundle


@click.command(cls=Command)
@click.option("--model", "name", type=click.Choice(list(MODELS)), default="vit-b16",
              show_default=True)  # fmt: skip
@click.option("--backend", default="openvino", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--steps", default=100, show_default=True, help="Of the reverse process.")
@click.option("--threads", type=int, help="For all. Default: as many as this process may use.")
@click.option("--side", "sides", type=int, multiple=True, default=(500, TWELVE_MEGAPIXELS),
              show_default=True, help="Pixels of the photographs' longer side.")  # fmt: skip
@click.option("--duration", default=20.0, show_default=True, help="Seconds for each size.")
@click.option("--warmup", default=2, show_default=True, help="Rounds.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path),
              help="Folder for checkpoint and bundle, which another run finds there.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    name: str,
    backend: str,
    precision: str,
    steps: int,
    threads: int | None,
    sides: Sequence[int],
    duration: float,
    warmup: int,
    keep: Path | None,
    out: Path,
) -> None:
    """Measure both in turn, write the record and print its tables."""
    threads = check_threads(threads) or cpus().threads
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, bundle = built(folder, name, backend, precision, steps)

        def opened(point: str, **how: Any) -> Classifier:
            chosen: Any = {"operating_point": point, "threads": threads, **how}
            return stack.enter_context(Classifier(bundle, **chosen))

        ours = {ZERO: opened("zero"), FAST: opened("zero", fast_decode=True), LOOP: opened("exact")}
        torch.set_num_threads(threads)
        theirs = peer(checkpoint)
        rows = [row for side in sides for row in measured(ours, theirs, side, duration, warmup)]
    found = {"model": name, "backend": backend, "precision": precision, "steps": steps}
    found |= {"threads": threads, "rows": rows, "machine": describe_machine()}
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)


def measured(
    ours: dict[str, Classifier], theirs: Label, side: int, duration: float, warmup: int
) -> list[dict[str, Any]]:
    """One size of photographs: everything in turn, one file after another."""
    files = list(photographs(side))
    labels = {name: (lambda file, c=c: c.predict(file).label) for name, c in ours.items()}
    calls = {PEER: theirs, **labels}
    wanted = [theirs(file) for file in files]
    taken = interleave(
        {name: _next(call, files) for name, call in calls.items()},
        warmup=warmup,
        duration=duration,
        min_rounds=len(files),
    )
    exact = ours[ZERO].preprocess
    rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {"side": side, "name": name, **asdict(summarise(taken[name], 1))}
        row["pixels"] = "x".join(map(str, Image.open(io.BytesIO(files[0])).size))
        row["image_bytes"] = sum(map(len, files)) // len(files)
        if name != PEER:
            interval = speedup_interval(taken[PEER], taken[name])
            row |= dict(zip(("ratio", "low", "high"), interval, strict=True))
        if name in (ZERO, FAST):  # the loop makes it another classifier
            same = [label == call(file) for label, file in zip(wanted, files, strict=True)]
            row |= {"same_label_as_peer": sum(same), "images": len(same)}
        if name == FAST:
            row["beside_exact"] = agreement(ours[name], exact, files)
        rows.append(row | {"seconds": [round(s, 6) for s in taken[name].tolist()]})
    return rows


def _next(call: Label, files: Sequence[bytes]) -> Callable[[], str]:
    """Return a call on the next file."""
    left = cycle(files)
    return lambda: call(next(left))


def print_found(found: dict[str, Any]) -> None:
    """A row for each size and candidate."""
    rows = []
    for row in found["rows"]:
        ratio = (
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if "ratio" in row else ""
        )
        same = f"{row['same_label_as_peer']} of {row['images']}" if "images" in row else ""
        near = f"{row['beside_exact']['mean_grey_levels']:.2f}" if "beside_exact" in row else ""
        size = f"{row['pixels']}, {row['image_bytes']:,} bytes"
        rows.append((row["name"], size, f"{row['p50_ms']:.1f}", ratio, same, near))
    title = (
        f"{found['model']} in {found['backend']} {found['precision']}, from JPEG bytes to a label, "
        f"{found['threads']} threads"
    )
    columns = ("", "file", "p50 ms", "times as fast", "same label", "grey levels from exact")
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()

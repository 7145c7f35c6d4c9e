"""Try which encoders can be trained, exported and served, by backend and precision.

    python benchmarks/scripts/backbones.py --output FILE.json --page docs/backbones.md

Each family is built tiny from its own configuration class, trained for a few steps on rendered
digits, exported, verified against its float32 checkpoint, opened again and asked for a label. A
family runs in a process of its own, so one that crashes costs nothing but its cells. Cells that
FILE.json holds are not tried again: delete it to try them all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from marnet_bench.machine import describe_machine
from marnet_export.job import export_bundle
from marnet_export.settings import Settings
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import say, track
from marnet_sdk.errors import EnvironmentMismatch, MarnetError
from marnet_train.checkpoint import SAMPLES
from marnet_train.data.digits import write_digits
from marnet_train.diffusion import ScheduleConfig
from marnet_train.recipe import AlignmentPhase, FusionPhase, Recipe, RefinementPhase
from marnet_train.trainer import fit

BACKENDS = ("torchscript", "aotinductor", "onnxruntime", "openvino", "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ENOUGH = 0.8  # agreement with float32: of networks this small many answers are close calls
BY_HAND = "\n<!-- written by hand -->\n"  # what follows it in the page

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
_DINO = {key: value for key, value in _VIT.items() if key != "intermediate_size"}
_SWIN = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_TWO = {"hidden_sizes": [8, 24], "depths": [1, 1]}
_PVT = {"num_encoder_blocks": 2, **_TWO, "strides": [4, 2], "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2]}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _VIT,
    "data2vec-vision": _VIT,
    "vit_msn": _VIT,
    "ijepa": _VIT,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "dinov3_vit": _VIT,
    "siglip_vision_model": _VIT,
    "clip_vision_model": {**_VIT, "projection_dim": 16},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "hiera": {"image_size": [64, 64], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 4, 8]},
    "focalnet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1],
                 "focal_windows": [3, 3], "hidden_sizes": [8, 16]},
    "pvt": {"image_size": 32, **_PVT, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    "pvt_v2": {"image_size": 32, **_PVT, "sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    "segformer": {**_PVT, "sr_ratios": [2, 1], "patch_sizes": [3, 3]},
    "levit": {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3,
              "depths": [1] * 3, "key_dim": [8] * 3},
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "poolformer": {"hidden_sizes": [8, 16, 16, 24], "depths": [1] * 4},
    "swiftformer": {"image_size": 64, "embed_dims": [8, 8, 16, 24], "depths": [1] * 4},
    "convnext": {**_TWO, "num_stages": 2},
    "convnextv2": {**_TWO, "num_stages": 2},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 24], "depths": [1] * 4},
    "resnet": {"embedding_size": 8, **_TWO, "layer_type": "basic"},
    "regnet": {"embedding_size": 8, **_TWO, "groups_width": 8},
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128,
                     "image_size": 64, "initializer_range": 0.5,
                     "batch_norm_momentum": 0.5},  # its averages have a dozen steps to settle
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 32},
    "mobilevit": {"image_size": 32, "hidden_sizes": [16] * 3, "initializer_range": 0.5,
                  "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 24]},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "repmlpnet": {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1],
                  "share_sets": [2, 4]},
    "wiser": {"image_size": 32, "slices": 16, "hidden_size": 24,
              "trunk": {"model_type": "resnet", "embedding_size": 8, **_TWO,
                        "layer_type": "basic"}},
}  # fmt: skip


def _timm(architecture: str, **model_args: Any) -> dict[str, Any]:
    return {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "model_args": model_args,
    }


# Tried where timm is installed: `make test-timm` makes such an environment.
TIMM: dict[str, dict[str, Any]] = {
    "timm vgg19": _timm("vgg19", mlp_ratio=0.01),
    "timm wide_resnet50_2": _timm("wide_resnet50_2", layers=[1, 1, 1, 1], channels=[8, 16, 32, 64]),
    "timm repvgg_a0": _timm("repvgg_a0"),
}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mpnet": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "albert": {**_BERT, "embedding_size": 16},
    "deberta": _BERT,
    "deberta-v2": _BERT,
}
_SIDE = {"efficientnet": 64, "hiera": 64, "levit": 64, "mobilevitv2": 64, "swiftformer": 64,
         "convnext": 64, "convnextv2": 64, "dinov3_convnext": 64, "cvt": 64}  # fmt: skip
# After two epochs bf16 or int8 kept 39 to 74 % of the labels of these, after eight 84 to 100 %.
_EPOCHS = {"mobilevit": 8, "swiftformer": 8}

Way = tuple[str, str]  # a backend and a precision


@dataclass(frozen=True)
class Cell:
    """One family through one backend and precision."""

    family: str
    backend: str  # "training": the training itself
    precision: str
    works: bool
    detail: str  # the agreement with float32, or the reason in one line
    seconds: float

    @property
    def place(self) -> tuple[str, str, str]:
        """The family, backend and precision, which identify the cell in the table."""
        return self.family, self.backend, self.precision


def keep_every_third(digits: Path) -> None:
    """List a third of the images only: enough to train a tiny encoder and to compare answers."""
    for split in ("train", "val"):
        listed = digits / split / "metadata.jsonl"
        lines = listed.read_text("utf-8").splitlines(keepends=True)
        listed.write_text("".join(lines[::3]), "utf-8")


def recipe_of(family: str) -> Recipe:
    """A tiny training: the family's encoder beside a usual one of the other kind."""
    side = _SIDE.get(family, 32)
    found = (VISION | TIMM).get(family)
    vision = {"model_type": family, **found} if found else None
    text = {"model_type": family, **TEXT[family]} if family in TEXT else None
    return Recipe(
        vision=vision or {"model_type": "resnet", **VISION["resnet"]},
        text=text or {"model_type": "bert", **TEXT["bert"]},
        dim=16,
        hidden=32,
        time_dim=8,
        max_tokens=48,
        image={"size": {"height": side, "width": side}, "image_mean": [0.3] * 3,
               "image_std": [0.35] * 3},
        schedule=ScheduleConfig(steps=10),
        alignment=AlignmentPhase(epochs=_EPOCHS.get(family, 2), batch=64, lr_backbone=1e-3,
                                 lr_heads=1e-2),
        refinement=RefinementPhase(epochs=5, batch=64, lr=5e-3, views=1),
        fusion_phase=FusionPhase(epochs=5, draws=1),
    )  # fmt: skip


def one_line(error: BaseException) -> str:
    """Tell what went wrong in one line. An error that is no `MarnetError` is a fault of ours."""
    kind = "" if isinstance(error, MarnetError) else f"{type(error).__name__}, untyped: "
    return kind + " ".join(str(error).split())[:300]


def try_family(family: str, data: Path, folder: Path, todo: Sequence[Way]) -> Iterator[Cell]:
    """Train it, then export it and open it in every way that this machine has."""
    start = time.perf_counter()
    checkpoint = folder / "checkpoint"
    try:
        fit(data, recipe_of(family), checkpoint, threads=1, device="cpu")
    except Exception as error:  # whatever an encoder's code raises is what this is to find
        yield Cell(family, "training", "", False, one_line(error), time.perf_counter() - start)
        return
    yield Cell(family, "training", "", True, "", time.perf_counter() - start)
    for backend, precision in todo:
        start, out = time.perf_counter(), folder / f"{backend}-{precision}"
        try:
            works, detail = True, try_cell(family, checkpoint, out, backend, precision)
        except EnvironmentMismatch:  # says nothing of the family: another machine may try it
            continue
        except Exception as error:
            works, detail = False, one_line(error)
        yield Cell(family, backend, precision, works, detail, time.perf_counter() - start)


def try_cell(family: str, checkpoint: Path, out: Path, backend: str, precision: str) -> str:
    """Export, verify, open and ask; how well it agrees with float32."""
    ahead = backend == "tensorrt"  # engines are built here for cards that are elsewhere
    settings = Settings(
        backend=backend,
        precision=precision,
        loop_precision="fp16" if ahead and precision == "int8" else None,
        min_agreement=ENOUGH,
        text=family in TEXT,
        source=False,
        targets=("sm89",) if ahead else (),
    )
    fidelity = export_bundle(checkpoint, out, settings)
    if not ahead:
        sample = min((checkpoint / SAMPLES).rglob("*.png"))
        Classifier(out).predict(sample)
    return f"{fidelity.top1_agreement:.0%} of {fidelity.images}"


@click.command()
@click.option("--family", "families", multiple=True, help="Default: all.")
@click.option("--backend", "backends", multiple=True, default=BACKENDS)
@click.option("--precision", "precisions", multiple=True, default=PRECISIONS)
@click.option("--output", type=click.Path(path_type=Path), help="Write the cells, as JSON.")
@click.option("--page", type=click.Path(path_type=Path), help="Write the table, as Markdown.")
@click.option("--data", type=click.Path(path_type=Path), hidden=True)
@click.option("--todo", help="Backends and precisions, as JSON.", hidden=True)
def main(
    families: Sequence[str],
    backends: Sequence[str],
    precisions: Sequence[str],
    output: Path | None,
    page: Path | None,
    data: Path | None,
    todo: str | None,
) -> None:
    """Try every family of encoders through every backend and precision."""
    if data is not None and todo is not None:  # the process of one family
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            for cell in try_family(families[0], data, Path(folder), json.loads(todo)):
                print(json.dumps(asdict(cell)), flush=True)
        return
    known = json.loads(output.read_text("utf-8"))["cells"] if output and output.exists() else []
    cells: dict[tuple[str, str, str], Cell] = {
        cell.place: cell for cell in (Cell(**c) for c in known)
    }
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        write_digits(digits)
        keep_every_third(digits)
        here = TIMM if importlib.util.find_spec("timm") else ()
        for family in track(families or [*VISION, *TEXT, *here], "families"):
            missing = missing_ways(cells, family, backends, precisions)
            found = in_own_process(family, digits, missing) if missing else []
            if found:  # how its process ended before is no longer true
                cells.pop((family, "process", ""), None)
            cells |= {cell.place: cell for cell in found}
            say(summary(found))
            if output is not None:
                content = {
                    "machine": describe_machine(),
                    "cells": [asdict(c) for c in cells.values()],
                }
                output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    say(summary(list(cells.values())))
    if page is not None:
        by_hand = written_by_hand(page)
        page.write_text(page_of(list(cells.values()), BACKENDS, PRECISIONS) + by_hand, "utf-8")


def missing_ways(
    cells: Mapping[tuple[str, str, str], Cell],
    family: str,
    backends: Sequence[str],
    precisions: Sequence[str],
) -> list[Way]:
    """List the ways in which a family was not tried; none if it cannot be trained."""
    trained = cells.get((family, "training", ""))
    if trained is not None and not trained.works:
        return []
    ways = [(backend, precision) for backend in backends for precision in precisions]
    return [way for way in ways if (family, *way) not in cells]


def in_own_process(family: str, data: Path, todo: Sequence[Way]) -> list[Cell]:
    """Return the cells of a family; those that its process did not live to tell failed."""
    given = ["--family", family, "--data", str(data), "--todo", json.dumps(todo)]
    done = subprocess.run(
        [sys.executable, __file__, *given],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = [Cell(**json.loads(line)) for line in lines]
    if done.returncode:
        ended = f"the process ended with {done.returncode} in the cell after these"
        found.append(Cell(family, "process", "", False, ended, 0.0))
    return found


def summary(cells: Sequence[Cell]) -> str:
    """Say how many cells work, and why the others do not."""
    failed = [cell for cell in cells if not cell.works]
    lines = [f"{len(cells) - len(failed)} of {len(cells)} cells work"]
    lines += [f"  {c.family} {c.backend} {c.precision}: {c.detail}" for c in failed]
    return "\n".join(lines)


def written_by_hand(page: Path) -> str:
    """Return what stands behind the tables of a page; it stays as it is."""
    _, mark, rest = page.read_text("utf-8").partition(BY_HAND) if page.exists() else ("", "", "")
    return mark + rest


def page_of(cells: Sequence[Cell], backends: Sequence[str], precisions: Sequence[str]) -> str:
    """The table as a page."""
    by_place: Mapping[tuple[str, str, str], Cell] = {
        (c.family, c.backend, c.precision): c for c in cells
    }
    seen = {cell.family for cell in cells}
    families = [family for family in (*VISION, *TEXT, *TIMM) if family in seen]
    named = " and ".join(f"`{family}`" for family in _EPOCHS)
    lines = [
        "# Encoders",
        "",
        "MARNet takes image and text encoders of `transformers`, image encoders of timm, and two",
        "that are written here (`repmlpnet`, `wiser`). The first column is the `model_type` of a",
        "recipe, or the architecture of a timm model. Each was built tiny of its configuration,",
        "trained, exported, compared with its float32 checkpoint on 90 images, opened again and",
        "asked for a label. A cell lists the precisions that work, which means that at least",
        f"{ENOUGH:.0%} of the labels are those of float32: of networks this small many answers are",
        "close calls. The section below says what does not work; what is in neither was not run.",
        f"A training has two epochs, that of {named} eight: after two,",
        "bf16 or int8 kept 39 to 74 % of their labels.",
        "",
        "```text",
        "python benchmarks/scripts/backbones.py --output FILE.json --page docs/backbones.md",
        "```",
        "",
        f"| encoder | training | {' | '.join(backends)} |",
        "|---|---|" + "---|" * len(backends),
    ]
    for family in families:
        trained = by_place[family, "training", ""].works
        row = [
            ", ".join(p for p in precisions if (c := by_place.get((family, b, p))) and c.works)
            for b in backends
        ]
        lines.append(f"| `{family}` | {'yes' if trained else 'no'} | {' | '.join(row)} |")
    failed = [c for c in cells if not c.works]
    lines += ["", "## What does not work", ""]
    lines += [] if failed else ["Everything that was run works."]
    for c in failed:
        cell = f"{c.backend} {c.precision}: "
        lines.append(f"- `{c.family}` {cell}{c.detail.removeprefix(cell).split(';')[0]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

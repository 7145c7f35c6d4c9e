"""The command `marnet-export`, which makes a verified bundle of a checkpoint."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marnet_sdk.backends import BACKENDS
from marnet_sdk.bundle import FIDELITY, read_bundle
from marnet_sdk.console import Choice, Command, next_commands, print_table, say
from marnet_sdk.errors import MarnetError, requires_extra

if TYPE_CHECKING:
    from marnet_export.settings import Settings

NEEDS = ("torch", "huggingface_hub", "transformers", "tokenizers", "onnx", "onnxscript")
FOLDER = click.Path(file_okay=False, path_type=Path)
DATA = click.option(
    "--data",
    type=FOLDER,
    help="Verify on this data set's val split, not the checkpoint's samples.",
)


class Steps(click.IntRange):
    """A number of steps, or "auto"."""

    name = "integer or auto"

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


def _names(_context: click.Context, _option: click.Parameter, given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False),
    help="Folder, or ORG/NAME on the hub. Default: the newest under ./runs.",
)
@click.option("--revision", help="Branch, tag or commit of ORG/NAME. Default: main.")
@click.option(
    "--output",
    "-o",
    type=FOLDER,
    help="Bundle to write. Default: ./bundles/<run>-<precision>.marnet, with backend and device "
    "before the precision where they are asked for, and with a number behind it where that is a "
    "bundle of other settings.",
)
@click.option(
    "--backend",
    type=Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="What runs the bundle. auto: build all that this machine can run, keep the fastest that "
    "passes. Bundles of onnxruntime, openvino and tensorrt need no torch to run.",
)
@click.option(
    "--precision",
    type=Choice(["fp32", "bf16", "fp16", "int8", "auto"]),
    default="fp32",
    show_default=True,
    help="In which type the weights are stored. int8 is multiplied in int8 too, with ranges "
    "measured on the images. auto: with --steps auto, whichever does best.",
)
@click.option(
    "--compute",
    type=Choice(["fp32", "bf16", "fp16"]),
    help="In which type other matrices than those in int8 are multiplied. Default: the precision "
    "where the backend can, else fp32.",
)
@click.option(
    "--device",
    type=Choice(["cpu", "cuda"]),
    help="What the bundle runs on: the processor, or cuda, an NVIDIA GPU, which must be here. "
    "cuda is for torchscript, aotinductor and tensorrt. Default: cpu; for tensorrt, cuda; with "
    "--backend auto, whatever each backend is for.",
)
@click.option(
    "--loop-precision",
    type=Choice(["fp32", "bf16", "fp16", "int8"]),
    help="The same for the reverse loop alone. Default: as --precision.",
)
@click.option(
    "--loop",
    type=Choice(["auto", "native", "graph"]),
    default="auto",
    show_default=True,
    help="What runs the reverse loop on a CPU: native, a compiled kernel, in bundles of "
    "onnxruntime and openvino; graph, the backend itself. auto: whichever is faster here.",
)
@click.option(
    "--sampler",
    type=Choice(["ddpm", "ddim", "dpmpp"]),
    help="Reverse process. Default: ddpm, as trained; with --steps auto, all of them.",
)
@click.option("--eta", type=click.FloatRange(0), default=0.0, show_default=True, help="Of ddim.")
@click.option(
    "--steps",
    type=Steps(),
    metavar="INTEGER|auto",
    help="Sampling steps. Default: as trained. auto: the fewest that keep the accuracy. 0: no "
    "reverse loop, the alignment branch answers; also what auto serves where the loop is not shown "
    "to help.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    callback=lambda _context, _option, points: points / 100,
    help="With --steps auto: percentage points of accuracy that may be lost.",
)
@click.option(
    "--latency-budget-ms",
    type=click.FloatRange(0, min_open=True),
    help="With --steps auto: pick the most accurate within it, for one image on this machine.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Noise samples per image, averaged. Default: the checkpoint's; with --steps auto, 1 to 8.",
)
@click.option(
    "--noise",
    type=Choice(["shared", "image"]),
    default="shared",
    show_default=True,
    help="One noise for all images, or keyed by the image's pixels.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Noise seed.")
@click.option(
    "--target-risk",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Find the score under which to abstain, so that of the other answers at most this share "
    "is wrong.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Least share of images whose label equals the checkpoint's. "
    "Default: 0.999 for fp32 and fp16, 0.995 for bf16 and int8.",
)
@DATA
@click.option(
    "--target",
    "targets",
    callback=_names,
    metavar="SM[,SM...]",
    default="",
    help="GPUs to build tensorrt engines for without having them: sm80,sm86,sm89,sm120. "
    "Default: the one of this machine.",
)
@click.option(
    "--tensorrt-route",
    "route",
    type=Choice(["onnx", "torch-tensorrt"]),
    default="onnx",
    show_default=True,
    help="What builds tensorrt's encoder for the GPU that is here; torch-tensorrt is an extra.",
)
@click.option(
    "--text/--no-text",
    default=True,
    show_default=True,
    help="Put the text encoder into the bundle, for Classifier.match.",
)
@click.option(
    "--source/--no-source",
    default=True,
    show_default=True,
    help="Put the checkpoint into the bundle, for marnet-bundle verify and rebuild.",
)
@click.option("--explain", is_flag=True, help="Say what the rewritten loop saves; build nothing.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
@click.version_option(package_name="marnet")
def main(
    checkpoint: str | None,
    revision: str | None,
    output: Path | None,
    data: Path | None,
    explain: bool,
    force: bool,
    **asked: Any,
) -> None:
    """Build a bundle from a checkpoint, verify it against the checkpoint, and write it.

    \b
    marnet-export --precision fp16
    marnet-export --steps auto --max-drop 0.5 --data data/digits

    The bundle must give the checkpoint's labels on real images, with the same noise, or nothing is
    written and the exit code is 3.
    """
    with requires_extra("export", *NEEDS):
        from marnet_export.choose.race import export_fastest
        from marnet_export.choose.steps import explain as explain_plan
        from marnet_export.inspection import sentence
        from marnet_export.job import export_bundle
        from marnet_export.settings import Settings
        from marnet_train.checkpoint import find_checkpoint, newest_checkpoint
    if checkpoint is None:
        checkpoint = str(newest_checkpoint())
        say(f"checkpoint {checkpoint} (the newest under ./runs)")
    path = find_checkpoint(checkpoint, revision=revision)
    settings = Settings(**asked)  # options have the names of the settings
    if explain:
        rows, sentences = explain_plan(path, settings)
        print_table("reverse loop", ("", "as written", "as run"), rows)
        for line in sentences.split("\n"):
            say(line)
        next_commands(f"marnet-export --checkpoint {shlex.quote(str(checkpoint))}")
        return
    if output is None:  # a place of our own choosing: the last build there may be replaced
        types = settings.device or "auto", settings.precision
        parts = [Path(checkpoint).resolve().name, settings.backend, *types]
        output = _free(Path("bundles"), "-".join(p for p in parts if p != "auto"), settings)
        force = True
    existed = output.exists()
    export = export_fastest if settings.backend == "auto" else export_bundle
    export(path, output, settings, data=data, overwrite=force, say=say)
    say(sentence(json.loads((output / FIDELITY).read_text("utf-8"))))
    say(f"{'replaced' if existed else 'wrote'} {output}")
    model = shlex.quote(str(output))
    next_commands(
        f"marnet-classify IMAGE --model {model}", f"marnet-bench --batch 64 --model {model}"
    )


def _free(folder: Path, name: str, settings: Settings) -> Path:
    """Find the first place of NAME.marnet, NAME-2.marnet, ... that is free, or whose bundle was
    exported with the same settings and may be replaced."""
    wanted = json.loads(json.dumps(asdict(settings)))
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    places = (folder / f"{each}.marnet" for each in names)
    return next(p for p in places if not p.exists() or _settings_of(p) in (None, wanted))


def _settings_of(place: Path) -> Any:
    """Read the settings of a bundle. None: there is no bundle, or it cannot be read."""
    try:
        return read_bundle(place, lazily=True).manifest.settings
    except MarnetError:
        return None

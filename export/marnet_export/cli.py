"""marnet-export: a checkpoint to a verified bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from marnet_sdk.console import Choice, Command, next_commands, say
from marnet_sdk.errors import requires_extra

_NEEDS = ("torch", "huggingface_hub", "transformers", "tokenizers", "onnx", "onnxscript")
_FOLDER = click.Path(file_okay=False, path_type=Path)


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
    type=_FOLDER,
    help="Bundle to write. Default: ./bundles/<run>-<backend>-<precision>.marnet",
)
@click.option(
    "--backend",
    type=Choice(["torchscript", "onnxruntime"]),
    default="torchscript",
    show_default=True,
    help="onnxruntime bundles need no torch to run.",
)
@click.option(
    "--precision",
    type=Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="In which type the weights are stored.",
)
@click.option(
    "--compute",
    type=Choice(["fp32", "bf16"]),
    help="In which type matrices are multiplied. Default: the precision where the backend can, "
    "else fp32.",
)
@click.option(
    "--sampler", type=Choice(["ddpm"]), default="ddpm", show_default=True, help="Reverse process."
)
@click.option("--steps", type=click.IntRange(1), help="Sampling steps. Default: as trained.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Noise seed.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Least share of images whose label equals the checkpoint's. "
    "Default: 0.999 for fp32 and fp16, 0.995 for bf16.",
)
@click.option(
    "--data",
    type=_FOLDER,
    help="Verify on this data set's val split, not the checkpoint's samples.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
@click.version_option(package_name="marnet")
def main(
    checkpoint: str | None,
    revision: str | None,
    output: Path | None,
    backend: str,
    precision: str,
    compute: str | None,
    sampler: str,
    steps: int | None,
    seed: int,
    min_agreement: float | None,
    data: Path | None,
    force: bool,
) -> None:
    """Build a bundle from a checkpoint, verify it against the checkpoint, and write it.

    \b
    marnet-export --precision fp16

    The bundle must give the checkpoint's labels on real images, with the same noise, or nothing is
    written and the exit code is 3.
    """
    with requires_extra("export", *_NEEDS):
        from marnet_export.pipeline import Settings, export_bundle
        from marnet_train.checkpoint import find_checkpoint, newest_checkpoint
    if checkpoint is None:
        checkpoint = str(newest_checkpoint())
        say(f"checkpoint {checkpoint} (the newest under ./runs)")
    source = find_checkpoint(checkpoint, revision=revision)
    if output is None:  # a place of our own choosing: the last build there may be replaced
        output = Path("bundles") / f"{Path(checkpoint).resolve().name}-{backend}-{precision}.marnet"
        force = True
    existed = output.exists()
    settings = Settings(backend, precision, compute, sampler, steps, seed, min_agreement)
    fidelity = export_bundle(source, output, settings, data=data, overwrite=force, say=say)
    low, high = fidelity.top1_interval
    say(
        f"verified on {fidelity.images} images: top-1 agreement {fidelity.top1_agreement:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}), largest logit error "
        f"{fidelity.logit_error_max:.2g} of {fidelity.largest_logit:.3g}"
    )
    say(f"{'replaced' if existed else 'wrote'} {output}")
    model = shlex.quote(str(output))
    next_commands(
        f"marnet-classify IMAGE --model {model}", f"marnet-bench --batch 64 --model {model}"
    )

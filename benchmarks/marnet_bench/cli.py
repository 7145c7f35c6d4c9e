"""marnet-bench: latency and throughput of a bundle, beside its plain PyTorch peer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from marnet_sdk.bundle import newest_bundle
from marnet_sdk.console import Choice, Command, next_commands, print_json, say
from marnet_sdk.errors import UnstableMeasurement, requires_extra

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--batch", "-b", type=click.IntRange(1), default=1, show_default=True)
@click.option("--model", "-m", type=_FOLDER, help="Bundle. Default: the newest under ./bundles.")
@click.option(
    "--checkpoint",
    type=_FOLDER,
    help="Its checkpoint, for the peer. Default: looked for by content under ./runs.",
)
@click.option("--no-peer", is_flag=True, help="Measure the bundle alone.")
@click.option("--threads", type=click.IntRange(1), help="Cores for both. Default: all.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Calls.")
@click.option(
    "--duration",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Seconds per input.",
)
@click.option(
    "--max-drift",
    type=click.FloatRange(0),
    help="Exit with 4 if the median of a third of the run is off by more than this share.",
)
@click.option(
    "--format", "form", type=Choice(["table", "json"]), default="table", show_default=True
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the JSON here.",
)
@click.version_option(package_name="marnet")
def main(
    batch: int,
    model: Path | None,
    checkpoint: Path | None,
    no_peer: bool,
    threads: int | None,
    warmup: int,
    duration: float,
    max_drift: float | None,
    form: str,
    output: Path | None,
) -> None:
    """Measure a bundle and the plain PyTorch model of the same checkpoint, call by call in turn.

    \b
    marnet-bench --batch 64

    Two inputs: "bytes" from encoded image files to logits, "pixels" from preprocessed arrays to
    logits. The images are the bundle's own golden ones, repeated. Speed-ups are ratios of medians
    with a 95 % bootstrap interval.
    """
    with requires_extra("bench", "psutil"):
        from marnet_bench.report import print_report
        from marnet_bench.scenarios import run_batches
        from marnet_sdk.classifier import Classifier
    if model is None:
        model = newest_bundle()
        say(f"model {model} (the newest under ./bundles)")
    classifier = Classifier(model, threads=threads)
    manifest = classifier.bundle.manifest
    peer, accuracy = None, None
    if not no_peer:
        with requires_extra("bench", "torch", "transformers", "tokenizers"):
            from marnet_bench.peers import find_checkpoint, load_peer, measured_accuracy
        path = checkpoint or find_checkpoint(manifest.checkpoint_sha256)
        loaded, peer = load_peer(path, manifest, threads)
        accuracy = measured_accuracy(loaded.training, manifest.sampling)
    report = run_batches(
        classifier, peer, batch=batch, warmup=warmup, duration=duration, accuracy=accuracy
    )
    if form == "json":
        print_json(report)
    else:
        print_report(report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        say(f"wrote {output}")
    worst = max(line["drift"] for line in report["lines"])
    if max_drift is not None and worst > max_drift:
        raise UnstableMeasurement(
            f"medians drift by {worst:.0%} during the run, {max_drift:.0%} was allowed; "
            "close other programs or use a longer --duration"
        )
    if form == "table":
        next_commands(
            f"marnet-bench --batch 1 --model {shlex.quote(str(model))}",
            "marnet-export --backend onnxruntime --precision fp16",
        )

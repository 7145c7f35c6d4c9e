"""The command `marnet-bench`, which measures latency and throughput of a bundle, or of its loop
alone, beside their peers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from marnet_sdk.bundle import newest_bundle
from marnet_sdk.console import Choice, Command, next_commands, print_json, say
from marnet_sdk.errors import UnstableMeasurement, requires_extra
from marnet_sdk.outputs import writable

TRAFFIC = ("single-stream", "multi-stream", "server", "offline")
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--scenario",
    type=Choice(["batches", "loop", *TRAFFIC]),
    default="batches",
    show_default=True,
    help="batches: a bundle beside the plain PyTorch model. loop: the reverse loop alone, beside "
    "the same loop as the paper writes it. The others: a bundle under the traffic of MLPerf.",
)
@click.option(
    "--batch",
    "-b",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    help="Images per call; with loop it may be repeated. Default: 1, with loop 1, 16 and 64, "
    "with multi-stream 8.",
)
@click.option("--model", "-m", type=_FOLDER, help="Bundle. Default: the newest under ./bundles.")
@click.option(
    "--checkpoint",
    type=_FOLDER,
    help="Its checkpoint, for the peer. Default: looked for by content under ./runs, then in the "
    "bundle. With loop: "
    "whose loop to run; default: the paper's sizes with random weights.",
)
@click.option("--no-peer", is_flag=True, help="Measure the bundle alone.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="With loop: sampling steps. Default: all that the model was trained with, 100 for random "
    "weights.",
)
@click.option("--threads", type=click.IntRange(1), help="Cores for all. Default: all there are.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Calls.")
@click.option(
    "--duration",
    type=click.FloatRange(0),
    help="Seconds per input, with loop per batch size, with traffic per rate. Default: 5, with "
    "loop 45, with traffic 10.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="With server: images that come in each second. Default: the highest that is answered in "
    "time is searched for.",
)
@click.option(
    "--latency",
    type=click.FloatRange(0, min_open=True),
    help="With server: milliseconds within which 99 of 100 must be answered. Default: 100.",
)
@click.option(
    "--photographs",
    type=click.IntRange(16, 16384),
    metavar="SIDE",
    help="With traffic: JPEG photographs whose longer side has so many pixels, in the place of the "
    "bundle's golden images.",
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
    scenario: str,
    batches: tuple[int, ...],
    model: Path | None,
    checkpoint: Path | None,
    no_peer: bool,
    steps: int | None,
    threads: int | None,
    warmup: int,
    duration: float | None,
    rate: float | None,
    latency: float | None,
    photographs: int | None,
    max_drift: float | None,
    form: str,
    output: Path | None,
) -> None:
    """Measure how fast images are classified, each candidate call by call in turn.

    \b
    marnet-bench --batch 64
    marnet-bench --scenario loop --batch 1 --batch 64

    The scenario "batches" runs a bundle beside the plain PyTorch model of the same checkpoint, on
    two inputs: "bytes" from encoded image files to logits, "pixels" from preprocessed arrays to
    logits. The images are the bundle's own golden ones, repeated.

    The scenario "loop" needs no bundle. It runs only what follows the encoder, the reverse loop
    and the head, through every backend, beside the loop as the paper writes it in PyTorch. From a
    checkout of the repository, ONNX Runtime and OpenVINO run that loop too. It says how near each
    is to what this machine can do at all. About five minutes.

    The scenarios "single-stream", "multi-stream", "server" and "offline" are those of MLPerf's
    LoadGen, from the bytes of image files to answers: one image after another, several at a time,
    images that come at random times, and all at once. Every answer is compared with that of a
    single call.

    Speed-ups are ratios of medians with a 95 % bootstrap interval.
    """
    traffic = {"rate": rate, "latency": latency, "photographs": photographs}
    _refuse_other_scenario(scenario, batches, traffic, model=model, no_peer=no_peer, steps=steps)
    if scenario == "loop":
        report, following = _loop(batches, checkpoint, steps, threads, warmup, duration, form)
    elif scenario in TRAFFIC:
        report, following = _traffic(scenario, batches, model, threads, duration, form, **traffic)
    else:
        report, following = _batches(
            batches, model, checkpoint, no_peer, threads, warmup, duration, form
        )
    if output is not None:
        with writable(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        say(f"wrote {output}")
    worst = max((line["drift"] for line in report["lines"]), default=0.0)
    if max_drift is not None and worst > max_drift:
        raise UnstableMeasurement(
            f"medians drift by {worst:.0%} during the run, {max_drift:.0%} was allowed; "
            "close other programs or use a longer --duration"
        )
    if form == "table":
        next_commands(*following)


def _refuse_other_scenario(
    scenario: str,
    batches: tuple[int, ...],
    traffic: Mapping[str, float | None],
    *,
    model: Path | None,
    no_peer: bool,
    steps: int | None,
) -> None:
    """Options that the chosen scenario would ignore are refused."""
    for name, value in traffic.items():
        allowed = TRAFFIC if name == "photographs" else ("server",)
        if value is not None and scenario not in allowed:
            raise click.UsageError(f"--{name} is for --scenario {', '.join(allowed)}")
    if scenario in TRAFFIC:
        if steps is not None or (batches and scenario != "multi-stream") or len(batches) > 1:
            raise click.UsageError(
                f"--scenario {scenario} has no --steps, and one --batch only with multi-stream"
            )
    elif scenario == "batches":
        if steps is not None:
            raise click.UsageError(
                "--steps is for --scenario loop; a bundle's steps were chosen at its export"
            )
        if len(batches) > 1:
            raise click.UsageError(
                f"--scenario batches measures one --batch, got {len(batches)}; run it once for each"
            )
    elif model is not None:
        raise click.UsageError(
            "--model is for --scenario batches; loop builds what it runs, from --checkpoint"
        )
    elif no_peer:
        raise click.UsageError("--no-peer is for --scenario batches; loop is about the peers")


Measured = tuple[dict[str, Any], tuple[str, ...]]  # the report, and what to run next


def _loop(
    batches: tuple[int, ...],
    checkpoint: Path | None,
    steps: int | None,
    threads: int | None,
    warmup: int,
    duration: float | None,
    form: str,
) -> Measured:
    with requires_extra(
        "bench", "psutil", "torch", "transformers", "tokenizers", "onnx", "onnxscript"
    ):
        from marnet_bench.loop import run_loop
        from marnet_bench.report import print_loop_report
    report = run_loop(
        checkpoint,
        batches=tuple(dict.fromkeys(batches)) or (1, 16, 64),
        steps=steps,
        warmup=warmup,
        duration=45.0 if duration is None else duration,
        threads=threads,
    )
    if form == "json":
        print_json(report)
    else:
        print_loop_report(report)
    return report, (
        "marnet-bench --scenario loop --checkpoint runs/NAME --output loop.json",
        "marnet-export --backend openvino --precision bf16",
    )


def _traffic(
    scenario: Any,
    batches: tuple[int, ...],
    model: Path | None,
    threads: int | None,
    duration: float | None,
    form: str,
    *,
    rate: float | None,
    latency: float | None,
    photographs: int | None,
) -> Measured:
    with requires_extra("bench", "psutil", "mlperf_loadgen", "sklearn"):
        from marnet_bench.report import print_traffic
        from marnet_bench.traffic import BATCHING, golden_or_photographs, run_traffic
        from marnet_sdk.classifier import Classifier
    model = _model_or_newest(model)
    with Classifier(model, threads=threads, batching=BATCHING) as classifier:
        report = run_traffic(
            classifier,
            golden_or_photographs(classifier, photographs),
            scenario,
            duration=10.0 if duration is None else duration,
            together=batches[0] if batches else 8,
            rate=rate,
            latency_ms=100.0 if latency is None else latency,
        )
    if form == "json":
        print_json(report)
    else:
        print_traffic(report)
    return report, (
        f"marnet-bench --scenario offline --model {shlex.quote(str(model))}",
        f"marnet-serve --model {shlex.quote(str(model))}",
    )


def _model_or_newest(model: Path | None) -> Path:
    if model is None:
        model = newest_bundle()
        say(f"model {model} (the newest under ./bundles)")
    return model


def _batches(
    batches: tuple[int, ...],
    model: Path | None,
    checkpoint: Path | None,
    no_peer: bool,
    threads: int | None,
    warmup: int,
    duration: float | None,
    form: str,
) -> Measured:
    with requires_extra("bench", "psutil"):
        from marnet_bench.report import print_report
        from marnet_bench.scenarios import run_batches
        from marnet_sdk.classifier import Classifier
    model = _model_or_newest(model)
    classifier = Classifier(model, threads=threads)
    manifest = classifier.bundle.manifest
    peer, accuracy = None, None
    if not no_peer:
        with requires_extra("bench", "torch", "transformers", "tokenizers"):
            from marnet_bench.peers import find_checkpoint, load_peer, measured_accuracy
        path = checkpoint or find_checkpoint(classifier.bundle)
        loaded, peer = load_peer(path, manifest, threads)
        accuracy = measured_accuracy(loaded.training, manifest.sampling)
    report = run_batches(
        classifier,
        peer,
        batch=batches[0] if batches else 1,
        warmup=warmup,
        duration=5.0 if duration is None else duration,
        accuracy=accuracy,
    )
    if form == "json":
        print_json(report)
    else:
        print_report(report)
    return report, (
        f"marnet-bench --batch 1 --model {shlex.quote(str(model))}",
        "marnet-export --backend onnxruntime --precision fp16",
    )

"""The command `marnet-bench`, which measures latency and throughput of a bundle, of its stages or
of its loop alone, beside their peers, and compares two such measurements.
"""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from marnet_sdk.bundle import newest_bundle, read_bundle
from marnet_sdk.console import (
    FAST_DECODE,
    Choice,
    Group,
    next_commands,
    print_json,
    say,
)
from marnet_sdk.errors import UnstableMeasurement, requires_extra
from marnet_sdk.outputs import writable

TRAFFIC = ("single-stream", "multi-stream", "server", "offline")
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_FORMAT = click.option(
    "--format", "form", type=Choice(["table", "json"]), default="table", show_default=True
)
_OUTPUT = click.option("--output", "-o", type=_FILE, help="Also write the JSON here.")
# The scenarios that take an option; the others would ignore it.
_TAKEN_BY = {
    "model": ("batches", "stages", *TRAFFIC),
    "checkpoint": ("batches", "loop"),
    "no_peer": ("batches",),
    "steps": ("loop",),
    "rate": ("server",),
    "latency": ("server",),
    "plot": ("server",),
    "photographs": (*TRAFFIC, "stages"),
    "url": TRAFFIC,
    "fast_decode": ("batches", "stages", *TRAFFIC),
    "explain": ("stages",),
}


@dataclass(frozen=True)
class Asked:
    """The options of the command, named as they are."""

    scenario: str
    batches: tuple[int, ...]
    model: Path | None
    checkpoint: Path | None
    no_peer: bool
    steps: int | None
    threads: int | None
    warmup: int
    duration: float | None
    rate: float | None
    latency: float | None
    plot: Path | None
    photographs: tuple[int, ...]
    url: str | None
    fast_decode: bool
    explain: bool
    max_drift: float | None
    form: str
    output: Path | None

    def seconds(self, usual: float) -> float:
        """Return the duration, or the usual one of a scenario."""
        return usual if self.duration is None else self.duration

    def one_batch(self, usual: int) -> int:
        """Return the images of a call, or the usual number."""
        return self.batches[0] if self.batches else usual

    def refuse_ignored(self) -> None:
        """Refuse options that the chosen scenario would ignore.

        Raises:
            click.UsageError: names the first one.
        """
        for name, scenarios in _TAKEN_BY.items():
            if getattr(self, name) not in (None, False, ()) and self.scenario not in scenarios:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is for --scenario {', '.join(scenarios)}")
        if self.scenario in TRAFFIC and self.batches and self.scenario != "multi-stream":
            raise click.UsageError(
                f"--scenario {self.scenario} takes --batch only with multi-stream; leave it out"
            )
        if self.scenario != "loop" and len(self.batches) > 1:
            raise click.UsageError(
                f"--scenario {self.scenario} measures one --batch, got {len(self.batches)}; run it "
                "once for each"
            )
        if self.plot is not None and self.rate is not None:
            raise click.UsageError("--plot shows several rates; leave --rate out")
        if self.url is not None and (self.fast_decode or self.threads is not None):
            raise click.UsageError(
                "--fast-decode and --threads are for the server; start marnet-serve with them"
            )


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--scenario",
    type=Choice(["batches", "stages", "loop", *TRAFFIC]),
    default="batches",
    show_default=True,
    help="batches: a bundle beside the plain PyTorch model. stages: decoding, resizing, encoder, "
    "loop and head of a bundle. loop: the reverse loop alone, beside the same loop as the paper "
    "writes it. The others: a bundle or a server under the traffic of MLPerf.",
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
    "--plot", type=_FILE, metavar="FILE.png", help="With server: draw latency against rate."
)
@click.option(
    "--photographs",
    type=click.IntRange(16, 16384),
    multiple=True,
    metavar="SIDE",
    help="With traffic and stages: JPEG photographs whose longer side has so many pixels (4243: 12 "
    "megapixels), in the place of the bundle's golden images. May be repeated, for a mixture.",
)
@click.option(
    "--url",
    metavar="URL",
    help="With traffic: ask a running marnet-serve, at http://HOST:PORT, or by the Open Inference "
    "Protocol at http://HOST:PORT/v2/models/NAME.",
)
@FAST_DECODE
@click.option(
    "--explain",
    is_flag=True,
    help="With stages: say what the encoder, and loop and head, need at least on this machine.",
)
@click.option(
    "--max-drift",
    type=click.FloatRange(0),
    help="Exit with 4 if the median of a third of the run is off by more than this share.",
)
@_FORMAT
@_OUTPUT
@click.version_option(package_name="marnet")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Measure how fast images are classified, each candidate call by call in turn.

    \b
    marnet-bench --batch 64
    marnet-bench --scenario stages --photographs 1024
    marnet-bench --scenario loop --batch 1 --batch 64
    marnet-bench compare OLD.json NEW.json

    The scenario "batches" runs a bundle beside the plain PyTorch model of the same checkpoint, on
    two inputs: "bytes" from encoded image files to logits, "pixels" from preprocessed arrays to
    logits. The images are the bundle's own golden ones, repeated.

    The scenario "stages" says where the time of a call goes, from the bytes of an image file to
    its label.

    The scenario "loop" needs no bundle. It runs only what follows the encoder, the reverse loop
    and the head, through every backend, beside the loop as the paper writes it in PyTorch. From a
    checkout of the repository, ONNX Runtime and OpenVINO run that loop too. It says how near each
    is to what this machine can do at all. About five minutes.

    The scenarios "single-stream", "multi-stream", "server" and "offline" are those of MLPerf's
    LoadGen, from the bytes of image files to answers: one image after another, several at a time,
    images that come at random times, and all at once. Every answer is compared with that of a
    single call. With --url a server is asked over HTTP.

    Speed-ups are ratios of medians with a 95 % bootstrap interval.
    """
    if context.invoked_subcommand is not None:
        _refuse_before(context)
        return
    asked = Asked(**{f.name: options[f.name] for f in fields(Asked)})
    asked.refuse_ignored()
    scenarios = {"loop": _loop, "batches": _batches, "stages": _stages}
    report, following = scenarios.get(asked.scenario, _traffic)(asked)
    _write(report, asked.output)
    worst = max((line["drift"] for line in report["lines"]), default=0.0)
    if asked.max_drift is not None and worst > asked.max_drift:
        raise UnstableMeasurement(
            f"medians drift by {worst:.0%} during the run, {asked.max_drift:.0%} was allowed; "
            "close other programs or use a longer --duration"
        )
    if asked.form == "table":
        next_commands(*following)


def _refuse_before(context: click.Context) -> None:
    """Refuse options that stand before a subcommand, which would not see them."""
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option.opts[0]} is of a measurement, not of {context.invoked_subcommand}; leave "
                "it out, or write it behind the name of the command"
            )


def _write(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        with writable(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        say(f"wrote {output}")


Measured = tuple[dict[str, Any], tuple[str, ...]]  # the report, and what to run next


def _loop(asked: Asked) -> Measured:
    with requires_extra(
        "bench", "psutil", "torch", "transformers", "tokenizers", "onnx", "onnxscript"
    ):
        from marnet_bench.loop import run_loop
        from marnet_bench.report import print_loop_report
    report = run_loop(
        asked.checkpoint,
        batches=tuple(dict.fromkeys(asked.batches)) or (1, 16, 64),
        steps=asked.steps,
        warmup=asked.warmup,
        duration=asked.seconds(45.0),
        threads=asked.threads,
    )
    if asked.form == "json":
        print_json(report)
    else:
        print_loop_report(report)
    return report, (
        "marnet-bench --scenario loop --checkpoint runs/NAME --output loop.json",
        "marnet-export --backend openvino --precision bf16",
    )


def _stages(asked: Asked) -> Measured:
    with requires_extra("bench", "psutil"):
        from marnet_bench.photographs import images_of
        from marnet_bench.report import print_stages
        from marnet_bench.stages import run_stages
        from marnet_sdk.classifier import Classifier
    model = _model_or_newest(asked.model)
    with Classifier(model, threads=asked.threads, fast_decode=asked.fast_decode) as classifier:
        report = run_stages(
            classifier,
            images_of(classifier.bundle, asked.photographs),
            batch=asked.one_batch(1),
            warmup=asked.warmup,
            duration=asked.seconds(5.0),
            explains=asked.explain,
        )
    report["photographs"] = list(asked.photographs)
    if asked.form == "json":
        print_json(report)
    else:
        print_stages(report)
    return report, (
        f"marnet-bench --scenario stages --explain --model {shlex.quote(str(model))}",
        f"marnet-bench --batch 1 --model {shlex.quote(str(model))}",
    )


def _traffic(asked: Asked) -> Measured:
    with requires_extra("bench", "psutil", "mlperf_loadgen"):
        from marnet_bench.chart import plot_latency
        from marnet_bench.http_client import Server
        from marnet_bench.photographs import images_of
        from marnet_bench.report import print_traffic
        from marnet_bench.traffic import BATCHING, run_traffic
        from marnet_sdk.classifier import Classifier
        from marnet_sdk.server.cli import read_token
    scenario: Any = asked.scenario
    following: tuple[str, ...] = ("marnet-bench compare OLD.json NEW.json",)
    with ExitStack() as stack:
        if asked.url is not None:
            target = stack.enter_context(Server(asked.url, token=read_token(None)))
            golden = (
                None
                if asked.photographs
                else read_bundle(_model_or_newest(asked.model), lazily=True)
            )
        else:
            model = _model_or_newest(asked.model)
            following = (
                f"marnet-bench --scenario offline --model {shlex.quote(str(model))}",
                f"marnet-serve --model {shlex.quote(str(model))}",
            )
            target = stack.enter_context(
                Classifier(
                    model, threads=asked.threads, fast_decode=asked.fast_decode, batching=BATCHING
                )
            )
            golden = target.bundle
        report = run_traffic(
            target,
            images_of(golden, asked.photographs),
            scenario,
            duration=asked.seconds(10.0),
            together=asked.one_batch(8),
            rate=asked.rate,
            latency_ms=100.0 if asked.latency is None else asked.latency,
        )
    report["photographs"] = list(asked.photographs)
    if asked.form == "json":
        print_json(report)
    else:
        print_traffic(report)
    if asked.plot is not None:
        with writable(asked.plot):
            asked.plot.parent.mkdir(parents=True, exist_ok=True)
            plot_latency(report, asked.plot)
        say(f"wrote {asked.plot}")
    return report, following


def _model_or_newest(model: Path | None) -> Path:
    if model is None:
        model = newest_bundle()
        say(f"model {model} (the newest under ./bundles)")
    return model


def _batches(asked: Asked) -> Measured:
    with requires_extra("bench", "psutil"):
        from marnet_bench.report import print_report
        from marnet_bench.scenarios import run_batches
        from marnet_sdk.classifier import Classifier
    model = _model_or_newest(asked.model)
    classifier = Classifier(model, threads=asked.threads, fast_decode=asked.fast_decode)
    manifest = classifier.bundle.manifest
    peer, accuracy = None, None
    if not asked.no_peer:
        with requires_extra("bench", "torch", "transformers", "tokenizers"):
            from marnet_bench.peers import find_checkpoint, load_peer, measured_accuracy
        path = asked.checkpoint or find_checkpoint(classifier.bundle)
        loaded, peer = load_peer(path, manifest, asked.threads)
        accuracy = measured_accuracy(loaded.training, manifest.sampling)
    report = run_batches(
        classifier,
        peer,
        batch=asked.one_batch(1),
        warmup=asked.warmup,
        duration=asked.seconds(5.0),
        accuracy=accuracy,
    )
    if asked.form == "json":
        print_json(report)
    else:
        print_report(report)
    return report, (
        f"marnet-bench --batch 1 --model {shlex.quote(str(model))}",
        "marnet-export --backend onnxruntime --precision fp16",
    )


@main.command("compare")
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of the speed that may be lost: what two runs of one program differ by.",
)
@click.option("--anyway", is_flag=True, help="Compare other models, machines or threads, too.")
@_FORMAT
@_OUTPUT
def compare_reports(
    old: Path, new: Path, margin: float, anyway: bool, form: str, output: Path | None
) -> None:
    """Compare two reports of --output, line by line: how many times as fast NEW is as OLD.

    Each ratio has a 95 % bootstrap interval; where it holds 1, no difference can be told. The exit
    code is 6 if a whole interval lies below 1 - margin. Reports of other scenarios or settings
    are refused, and those of other models, machines or threads unless asked with --anyway.
    """
    from marnet_bench.compare import check_regression, compare, described, read_report
    from marnet_bench.report import print_comparison

    changes, notes = compare(read_report(old), read_report(new), anyway=anyway)
    found = described(changes, notes, margin)
    if form == "json":
        print_json(found)
    else:
        print_comparison(found)
    _write(found, output)
    check_regression(changes, margin)

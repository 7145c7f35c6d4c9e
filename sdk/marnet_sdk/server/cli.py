"""The command `marnet-serve`, which answers over HTTP with a bundle."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marnet_sdk.bundle import newest_bundle, read_bundle
from marnet_sdk.console import FAST_DECODE, Command, say
from marnet_sdk.cpus import check_threads, cpus
from marnet_sdk.errors import InvalidInput, NotFound, requires_extra
from marnet_sdk.server.listener import listen

if TYPE_CHECKING:
    from marnet_sdk.server.processes import Place
    from marnet_sdk.server.service import Service

TOKEN = "MARNET_SERVE_TOKEN"
PACKAGES = ("fastapi", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")
_MIB = 2**20


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    "-m",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle. Default: the newest under ./bundles.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."
)
@click.option(
    "--watch",
    is_flag=True,
    help="Open the bundle again when its files change, or when it is a link that points elsewhere.",
)
@click.option("--name", help="The model's name under /v2/models. Default: the bundle's.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"File with the bearer token that clients must send. Default: ${TOKEN}, or none.",
)
@click.option(
    "--operating-point",
    metavar="NAME",
    help="fast, balanced, exact or zero, where the bundle has them. Default: the one its export "
    "picked.",
)
@click.option("--samples", type=click.IntRange(1), help="Noise samples per image.")
@click.option("--seed", type=click.IntRange(0), help="Noise seed. Default: the bundle's own.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that answer at this address, each with the bundle in its memory.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Cores that each process uses. Default: all, divided among the processes.",
)
@FAST_DECODE
@click.option(
    "--max-batch", type=click.IntRange(1), default=64, show_default=True, help="Images of a batch."
)
@click.option(
    "--max-delay",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Milliseconds that an image waits for others while the model is idle.",
)
@click.option(
    "--max-queue", type=click.IntRange(1), default=1024, show_default=True, help="Images waiting."
)
@click.option(
    "--brown-out",
    metavar="NAME",
    multiple=True,
    help="Operating point that may answer instead while the queue is too long; may be repeated, "
    "the best first.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=200.0,
    show_default=True,
    help="Milliseconds from an image to its answer from where on the queue is too long.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="MiB of one request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=89_478_485,
    show_default=True,
    help="Of one image, width x height; larger ones are refused before they are decoded.",
)
@click.option(
    "--max-images", type=click.IntRange(1), default=64, show_default=True, help="In one request."
)
@click.option("--max-connections", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--header-timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds until a request's header is there.",
)
@click.option(
    "--body-timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds until its body is there.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that accepted requests have after SIGTERM.",
)
@click.version_option(package_name="marnet")
def main(host: str, port: int, processes: int, token_file: Path | None, **options: Any) -> None:
    """Answer over HTTP with a bundle: POST an image to /predict, or open / in a browser.

    \b
    marnet-serve --model bundles/digits-fp16.marnet
    curl -T photo.jpg -X POST http://127.0.0.1:8000/predict

    Speaks the Open Inference Protocol under /v2, and Prometheus under /metrics. One JSON line for
    each request goes to standard output. SIGHUP opens the bundle again and goes on with it. SIGTERM
    answers what was accepted, and ends. With --processes both reach all processes, one that dies is
    replaced, and /metrics adds all of them up.
    """
    if processes == 1:
        with requires_extra("serve", *PACKAGES):
            import marnet_sdk.server.network  # noqa: F401, before anything is done

    model = options["model"] = options["model"] or newest_bundle()
    options["token"] = read_token(token_file)
    if processes > 1:
        _check(model, options)
        options["threads"] = options["threads"] or max(1, cpus().threads // processes)
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    say(f"model {model}; listening on http://{shown}:{listener.getsockname()[1]}/")
    if options["token"] is None and host not in ("127.0.0.1", "::1", "localhost"):
        say(f"no token: whoever reaches this address may ask; set {TOKEN} or --token-file")
    if processes == 1:
        _answer(make_service(**options), listener)
        return
    from marnet_sdk.server.processes import run_processes

    sys.exit(run_processes(processes, partial(_answer_beside_others, options, listener), listener))


def _check(model: Path, options: Mapping[str, Any]) -> None:
    """Refuse in the parent of several processes what none of them could open."""
    check_threads(options["threads"])
    bundle = read_bundle(model, lazily=True)
    for point in (options["operating_point"], *options["brown_out"]):
        if point is not None:
            bundle.check_point(point)


def _answer_beside_others(options: dict[str, Any], listener: socket.socket, place: Place) -> None:
    """Answer in one of several processes, and say so once the bundle is open."""
    with requires_extra("serve", *PACKAGES):
        from marnet_sdk.server.service import READY

    def tell(line: str) -> None:
        if line == READY:
            place.report.send(None)
        else:
            say(f"process {os.getpid()}: {line}")

    service = make_service(**options, tell=tell)
    service.shared = place.metrics
    signal.signal(signal.SIGHUP, lambda *_: service.reloads.ask())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    if not place.first:  # the others answer meanwhile
        service.open_now()
    _answer(service, listener)


def _answer(service: Service, listener: socket.socket) -> None:
    with requires_extra("serve", *PACKAGES):
        from marnet_sdk.server.gate import AccessLog
        from marnet_sdk.server.network import serve

    out = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115
    log = AccessLog(out)
    try:
        serve(service, [listener], log)
    finally:
        if log.lost:
            say(f"{log.lost} lines of the access log could not be written")


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read options of the command that stand in a configuration, as the command line reads them.

    Args:
        given: values by the names of options, with - or _ between words; a list repeats its option,
            and None leaves it out. An option without a value takes true or false.

    Returns:
        All options, by the names of their parameters.

    Raises:
        InvalidInput: no such option, or a value that is none of it.
    """
    flags = {option.name for option in main.params if isinstance(option, click.Option)
             and option.is_flag}  # fmt: skip
    words = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name.replace("-", "_") in flags and str(value).lower() in ("true", "false"):
            words += [option] if str(value).lower() == "true" else []
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"{option}={one}" for one in values if one is not None]
    try:
        return main.make_context("marnet-serve", words).params
    except click.UsageError as error:
        raise InvalidInput(error.format_message()) from error


def make_service(
    *,
    model: Path,
    watch: bool,
    name: str | None,
    token: str | None,
    operating_point: str | None,
    samples: int | None,
    seed: int | None,
    threads: int | None,
    fast_decode: bool,
    max_batch: int,
    max_delay: float,
    max_queue: int,
    brown_out: tuple[str, ...],
    patience: float,
    max_body: int,
    max_pixels: int,
    max_images: int,
    max_connections: int,
    header_timeout: float,
    body_timeout: float,
    drain_timeout: float,
    tell: Callable[[str], None] = say,
) -> Service:
    """Make what the requests of a server share, from the options of the command."""
    from marnet_sdk.classifier import Classifier
    from marnet_sdk.inputs.images import Limits
    from marnet_sdk.serve.policy import Batching
    from marnet_sdk.server.service import ServerLimits, Service

    limits = ServerLimits(
        body_bytes=max_body * _MIB,
        images=max_images,
        connections=max_connections,
        header_seconds=header_timeout,
        body_seconds=body_timeout,
        drain_seconds=drain_timeout,
    )

    def open_classifier() -> Classifier:
        return Classifier(
            model,
            operating_point=operating_point,
            samples=samples,
            seed=seed,
            threads=threads,
            limits=Limits(limits.body_bytes, max_pixels),
            fast_decode=fast_decode,
            batching=Batching(
                *(max_batch, max_delay / 1e3, max_queue),
                brown_out=brown_out,
                patience=patience / 1e3,
            ),
        )

    name = name or model.absolute().name.removesuffix(".marnet")
    watched = model if watch else None
    return Service(open_classifier, limits, name=name, token=token, watched=watched, tell=tell)


def read_token(file: Path | None) -> str | None:
    """Read the bearer token, from a file or from the environment; None where there is neither.

    Raises:
        NotFound: the file cannot be read.
        InvalidInput: the token is empty, or has characters that no header can carry.
    """
    if file is None:
        if (token := os.environ.get(TOKEN)) is None:
            return None
    else:
        try:
            token = file.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise NotFound(f"--token-file {file} cannot be read: {error}") from error
    token = token.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise InvalidInput(
            "the bearer token is empty or has characters other than those of ASCII without "
            "spaces; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token

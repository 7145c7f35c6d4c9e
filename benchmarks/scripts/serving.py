"""Measure `marnet-serve` beside LitServe around the same bundle, under the same traffic.

    pip install litserve
    python benchmarks/scripts/serving.py --model bundles/digits-fp16.marnet --out serving.json

LoadGen sends image files, as base64 in JSON, over HTTP to one server after another. They come at
random times that do not depend on the answers. A search closes in on the highest rate at which 99
of 100 requests are answered within --latency. LitServe batches by a fixed delay, and has a line for
each --delay. With --processes N both servers have another line with N processes: ours behind one
socket; of LitServe N workers with a classifier each, and N that speak HTTP. Clients and servers
share the machine. What a server takes of the processor for an image is told as well: it depends
less on the clients, and on whatever else runs.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil

from marnet_bench.http_client import CONNECTIONS, Server
from marnet_bench.machine import describe_machine
from marnet_bench.photographs import images_of
from marnet_bench.traffic import BATCHING, Traffic, best_rate
from marnet_sdk import Classifier
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.cpus import cpus

OURS = "marnet-serve"
_PATIENCE = 120  # seconds until a server is ready
MARNET = "from marnet_sdk.server.cli import main; main()"
_LITSERVE = """
import base64
import sys

import litserve
from marnet_sdk import Classifier


class Labels(litserve.LitAPI):
    def setup(self, device):
        self.classifier = Classifier(sys.argv[1], threads=int(sys.argv[5]) or None)

    def decode_request(self, request):
        return base64.b64decode(request["images"][0], validate=True)

    def predict(self, images):
        return [answer.index for answer in self.classifier.predict(list(images))]

    def encode_response(self, index):
        return {"index": index}


if __name__ == "__main__":
    count = int(sys.argv[4])
    api = Labels(max_batch_size=64, batch_timeout=float(sys.argv[3]))
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=count)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error",
               generate_client_file=False, num_api_servers=count)
"""


@cache  # the clients of all servers have the same little to do
def in_json(image: bytes) -> tuple[bytes, dict[str, str]]:
    """Make the request that every server here takes."""
    body = json.dumps({"images": [b64encode(image).decode()]}).encode()
    return body, {"Content-Type": "application/json"}


class Candidate(NamedTuple):
    """A server and its settings."""

    delay: float | None = None  # None: ours; otherwise LitServe's `batch_timeout`, in milliseconds
    processes: int = 1

    @property
    def name(self) -> str:
        """The name of its line."""
        if self.delay is None:
            return OURS if self.processes == 1 else f"{OURS}, {self.processes} processes"
        workers = "" if self.processes == 1 else f", {self.processes} workers"
        return f"LitServe, {self.delay:g} ms{workers}"


@contextmanager
def serving(model: Path, server: Candidate) -> Iterator[Server]:
    """Run a server for the block."""
    port, count = free_port(), server.processes
    words: list[Any] = ["-c", MARNET, "--model", model, "--port", port, "--processes", count]
    path, shown = "/metrics", f"marnet_ready {count}.0"
    with ExitStack() as stack:
        if server.delay is not None:  # its workers import the program again, from a file
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "labels.py").write_text(_LITSERVE, "utf-8")
            threads = 0 if count == 1 else max(1, cpus().threads // count)
            words = [folder / "labels.py", model, port, server.delay / 1e3, count, threads]
            path, shown = "/health", ""
        yield stack.enter_context(started(words, port, path, shown))


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def started(words: Sequence[Any], port: int, path: str, shown: str = "") -> Iterator[Server]:
    """Run a server in Python for the block, from when it is ready.

    Args:
        words: what the interpreter is told.
        path: what the server answers with 200 when it is ready.
        shown: what stands in that answer then.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(stop, process)
        client = Server(f"http://127.0.0.1:{port}", in_json)
        stack.callback(client.close)
        wait_until_ready(process, port, path, shown)
        yield client


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str, shown: str) -> None:
    """Ask until the server says that it is ready."""
    end = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status == http.client.OK and shown.encode() in response.read():
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise click.ClickException(
        "a server did not start; the peers need: pip install litserve, pip install marnet[ray]"
    )


_OPTIONS = (
    click.option("--model", type=click.Path(exists=True, path_type=Path), required=True),
    click.option("--latency", default=100.0, show_default=True, help="Milliseconds."),
    click.option("--turns", default=3, show_default=True, help="Of every server."),
    click.option("--duration", default=5.0, show_default=True, help="Seconds of each run."),
    click.option(
        "--photographs",
        "side",
        type=int,
        metavar="SIDE",
        help="JPEGs with a longer side of so many pixels; default: the golden images.",
    ),
    click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True),
)


def comparison(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that comparisons of servers have in common."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked_for(model: Path, side: int | None) -> tuple[list[bytes], list[int]]:
    """Read the images that servers are asked for, and what the bundle alone says of each."""
    with Classifier(model, batching=BATCHING) as classifier:
        images = images_of(classifier.bundle, [side] if side else [])
        return images, [answer.index for answer in classifier.predict(images)]


@click.command(cls=Command)
@comparison
@click.option("--delay", "delays", type=float, multiple=True, default=(0.0, 2.0, 10.0),
              show_default=True, help="LitServe's, in milliseconds.")  # fmt: skip
@click.option("--processes", "counts", type=click.IntRange(2), multiple=True,
              help="Add lines of both servers with so many processes.")  # fmt: skip
@click.option("--no-peer", is_flag=True, help="Measure marnet-serve alone.")
def main(
    model: Path,
    latency: float,
    delays: Sequence[float],
    turns: int,
    duration: float,
    side: int | None,
    counts: Sequence[int],
    no_peer: bool,
    out: Path,
) -> None:
    """Measure both servers in turn, write the record and print its table."""
    images, expected = asked_for(model, side)
    kinds = [None] if no_peer else [None, *delays]
    servers = [Candidate(delay, count) for count in (1, *counts) for delay in kinds]
    runs: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for turn in range(turns):
        for server in servers:
            say(f"turn {turn + 1} of {turns}: {server.name}")
            with serving(model, server) as client:
                runs[server.name].append(turned(client, images, expected, duration, latency))
    found = {"bundle": model.name, "latency_ms": latency, "clients": CONNECTIONS, "runs": runs}
    found["machine"] = describe_machine()
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)


def turned(
    client: Server, images: Sequence[bytes], expected: Sequence[int], duration: float, limit: float
) -> dict[str, Any]:
    """One turn of a server: its highest rate in time, all runs, and what an image takes of the
    processor while as many are asked for as there are connections."""
    client.predict(images)  # warm
    before, started, count = processor_seconds(), time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < duration:
        for future in [client.submit(image) for image in images]:
            future.result()
        count += len(images)
    fastest = count / (time.perf_counter() - started)
    taken = (processor_seconds() - before) / count
    traffic = Traffic(client.submit, images, duration=duration, fastest=fastest)
    runs = traffic.search(limit)
    traffic.check(expected)
    found = {"rate": best_rate(runs, limit), "processor_ms": 1e3 * taken}
    return found | {"runs": [run.described() for run in runs]}


def processor_seconds() -> float:
    """Sum the seconds of the processor that the servers of this process took until now."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(taken.user + taken.system for taken in times)


def print_found(found: dict[str, Any]) -> None:
    """A row for each server: the highest rate in time of each turn, and the ratio to ours."""
    medians = {
        name: statistics.median(turn["rate"] for turn in turns)
        for name, turns in found["runs"].items()
    }
    rows = [
        (
            name,
            ", ".join(f"{turn['rate']:.0f}" for turn in found["runs"][name]),
            f"{median:.0f}",
            f"{medians[OURS] / median:.2f}" if median else "",
            f"{statistics.median(turn['processor_ms'] for turn in found['runs'][name]):.2f} ms",
        )
        for name, median in medians.items()
    ]
    title = f"requests/s with 99 of 100 answered within {found['latency_ms']:g} ms"
    print_table(title, ("server", "turns", "median", "ours over it", "processor"), rows)


if __name__ == "__main__":
    main()

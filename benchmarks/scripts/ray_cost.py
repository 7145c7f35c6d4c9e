"""Measure what Ray Serve costs: one replica beside `marnet-serve`, and beside `@serve.batch`.

    python benchmarks/scripts/ray_cost.py --model bundles/digits-fp16.marnet --out ray.json

The same clients and the same traffic as in `serving.py` meet three servers in turn, each with one
process that computes with as many threads: `marnet-serve`, a replica of `marnet_sdk.serve.ray_app`,
and a deployment of Ray Serve's own batching around the same bundle. For each, one caller measures
the time of a lone request, and a search the highest rate at which 99 of 100 requests are answered
within --latency. Clients, proxies and servers share the machine.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from serving import MARNET, OURS, asked_for, comparison, free_port, started

from marnet_bench.http_client import CONNECTIONS, Server
from marnet_bench.machine import describe_machine
from marnet_bench.traffic import Traffic, best_rate
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.cpus import cpus

REPLICA, BATCH = "Ray Serve, ours", "Ray Serve, @serve.batch"
# A Ray of its own, which ends with the program.
_RAY = """
import os, signal, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray import serve

def run(app):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ray.init(num_cpus=int(threads), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
        serve.run(app)
        signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()

model, port, threads = sys.argv[1:4]
"""
_REPLICA = f"""{_RAY}
from marnet_sdk.serve.ray_app import build
run(build({{"model": model, "threads": threads, "replicas": 1}}))
"""
_BATCH = f"""{_RAY}
import asyncio, base64
from marnet_sdk import Classifier

@serve.deployment(max_ongoing_requests=1024, ray_actor_options={{"num_cpus": int(threads)}})
class Labels:
    def __init__(self):
        self.classifier = Classifier(model, threads=int(threads))

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=float(sys.argv[4]))
    async def predict(self, images):
        answers = await asyncio.to_thread(self.classifier.predict, images)
        return [answer.index for answer in answers]

    async def __call__(self, request):
        if request.method == "GET":
            return "ready"
        content = await request.json()
        image = base64.b64decode(content["images"][0], validate=True)
        return {{"index": await self.predict(image)}}

run(Labels.bind())
"""


def words_of(name: str, model: Path, port: int, threads: int, delay: float) -> list[Any]:
    """Name what Python is told to run a server."""
    if name == OURS:
        return ["-c", MARNET, "--model", model, "--port", port, "--threads", threads]
    code = _REPLICA if name == REPLICA else _BATCH
    return ["-c", code, model.absolute(), port, threads, delay / 1e3]


@click.command(cls=Command)
@comparison
@click.option("--delay", default=10.0, show_default=True, help="Of @serve.batch, in milliseconds.")
@click.option("--threads", default=cpus().threads, show_default=True, help="Of each server.")
def main(
    model: Path,
    latency: float,
    delay: float,
    threads: int,
    turns: int,
    duration: float,
    side: int | None,
    out: Path,
) -> None:
    """Measure the three servers in turn, write the record and print its table."""
    images, expected = asked_for(model, side)
    servers: dict[str, list[dict[str, Any]]] = {OURS: [], REPLICA: [], BATCH: []}
    for turn in range(turns):
        for name, turned in servers.items():
            say(f"turn {turn + 1} of {turns}: {name}")
            port = free_port()
            words = words_of(name, model, port, threads, delay)
            with started(words, port, "/readyz") as client:
                turned.append(measured(client, images, expected, duration, latency))
    found = {"bundle": model.name, "latency_ms": latency, "delay_ms": delay, "threads": threads}
    found |= {"clients": CONNECTIONS, "runs": servers, "machine": describe_machine()}
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)


def measured(
    client: Server, images: Sequence[bytes], expected: Sequence[int], duration: float, limit: float
) -> dict[str, Any]:
    """One turn of a server: a lone caller, and the search for its highest rate in time."""
    client.predict(images)  # warm
    traffic = Traffic(client.submit, images, duration=duration, fastest=len(images))
    lone = traffic.run("single-stream")
    runs = traffic.search(limit)
    traffic.check(expected)
    return {
        "lone": lone.described(),
        "rate": best_rate(runs, limit),
        "runs": [run.described() for run in runs],
    }


def print_found(found: dict[str, Any]) -> None:
    """A row for each server: medians over its turns."""

    def median(turns: Sequence[dict[str, Any]], key: str) -> float:
        return statistics.median(turn["lone"][key] for turn in turns)

    rates = {n: statistics.median(t["rate"] for t in turns) for n, turns in found["runs"].items()}
    rows = [
        (
            name,
            f"{median(turns, 'p50_ms'):.1f}",
            f"{median(turns, 'p99_ms'):.1f}",
            ", ".join(f"{turn['rate']:.0f}" for turn in turns),
            f"{rates[name]:.0f}",
            f"{rates[name] / rates[OURS]:.2f}" if rates[OURS] else "",
        )
        for name, turns in found["runs"].items()
    ]
    title = f"one caller, and requests/s with 99 of 100 within {found['latency_ms']:g} ms"
    columns = ("server", "p50 ms", "p99 ms", "requests/s", "median", "of marnet-serve's")
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()

"""Time that the batcher adds to a model that does nothing, and to one that sleeps.

    python benchmarks/scripts/batcher.py --out batcher.json

Alone: one caller sends a request, waits for its answer, and sends the next. Its image is not
decoded and the model returns at once, so all of the time is the batcher's: its queue, its policy,
and three threads that wake each other.

In batches: callers keep three batches waiting while the model sleeps, which leaves it the
processor. What a batch takes beyond the sleep, divided by its images, is the time that is lost
between two batches. The time of the processor is given as well, because it is taken from whatever
else runs: callers and decoding included.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import click
import numpy as np

from marnet_bench.machine import describe_machine
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.serve.batcher import Batcher
from marnet_sdk.serve.policy import Batching

ONE_KIND = ("null",)
LONE_GOAL, BATCH_GOAL = 150.0, 10.0  # microseconds


class Null:
    """A model that sleeps for a while, if at all, and gives back what it was given."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.busy, self.sizes = seconds, 0.0, list[int]()

    def __call__(self, kind: object, rows: Sequence[Any], asks: Sequence[Any]) -> Sequence[Any]:
        started = time.perf_counter()
        if self.seconds:
            time.sleep(self.seconds)
        self.sizes.append(len(rows))
        self.busy += time.perf_counter() - started
        return rows


def alone(requests: int, warmup: int = 200) -> dict[str, float]:
    """Percentiles of a lone request, in microseconds."""
    batcher, taken = Batcher(lambda image: image, Null(0.0), Batching()), []
    for _ in range(warmup + requests):
        started = time.perf_counter()
        batcher.submit(1, None, ONE_KIND).result()
        taken.append(time.perf_counter() - started)
    batcher.close()
    p50, p90, p99 = np.percentile(taken[warmup:], (50, 90, 99)) * 1e6
    return {"p50_us": float(p50), "p90_us": float(p90), "p99_us": float(p99)}


def in_batches(batches: int, size: int, seconds: float) -> dict[str, float]:
    """Microseconds for each image that a batch takes beyond the model, and of the processor."""
    model = Null(seconds)
    batcher = Batcher(lambda image: image, model, Batching(max_batch=size))
    waiting: deque[Future[Any]] = deque()
    for _ in range(12):  # batches from which the policy learns how large they may be
        waiting.extend(batcher.submit(1, None, ONE_KIND) for _ in range(size))
    while waiting:
        waiting.popleft().result()
    model.busy, model.sizes = 0.0, []
    started, processor = time.perf_counter(), time.process_time()
    for _ in range(batches):
        waiting.extend(batcher.submit(1, None, ONE_KIND) for _ in range(size))
        while len(waiting) > 3 * size:
            waiting.popleft().result()
    while waiting:
        waiting.popleft().result()
    elapsed, processor = time.perf_counter() - started, time.process_time() - processor
    batcher.close()
    images = batches * size
    return {
        "batch": float(np.mean(model.sizes)),
        "added_us": (elapsed - model.busy) / images * 1e6,
        "processor_us": processor / images * 1e6,
    }


@click.command(cls=Command)
@click.option("--requests", default=5000, show_default=True, help="Lone requests.")
@click.option("--batches", default=300, show_default=True)
@click.option("--batch", "size", default=64, show_default=True, help="Images in a batch.")
@click.option("--model-ms", default=10.0, show_default=True, help="Sleep of the model in a batch.")
@click.option("--repeat", default=5, show_default=True, help="Runs, whose median counts.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(requests: int, batches: int, size: int, model_ms: float, repeat: int, out: Path) -> None:
    """Measure the batcher without a model, write the record and print its table."""
    runs = [
        {"alone": alone(requests), "in_batches": in_batches(batches, size, model_ms / 1e3)}
        for _ in range(repeat)
    ]
    found = {"machine": describe_machine(), "batch": size, "model_ms": model_ms, "runs": runs}
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    rows = []
    for title, part, name, goal in [
        ("a lone request", "alone", "p50_us", LONE_GOAL),
        ("each image of a batch", "in_batches", "added_us", BATCH_GOAL),
        ("the same, of the processor", "in_batches", "processor_us", None),
    ]:
        values = sorted(run[part][name] for run in runs)
        spread = f"{values[0]:.1f} to {values[-1]:.1f}"
        wanted = "" if goal is None else f"at most {goal:g}"
        rows.append((title, f"{np.median(values):.1f}", spread, wanted))
    print_table("microseconds that the batcher adds", ("", "median", "runs", "goal"), rows)
    say(f"{found['machine']['processor']}, load {found['machine']['load_average'][0]}")


if __name__ == "__main__":
    main()

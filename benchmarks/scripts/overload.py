"""Answer more than a bundle's exact operating point can, at another one while the queue is long.

    marnet-export --steps auto --output bundles/swept.marnet
    python benchmarks/scripts/overload.py --model bundles/swept.marnet --data data/digits --out FILE

The test images come at random times, as many in a second as --load times what the exact point
answers in time at most when they come so, which a search finds first. They are asked for with
brown-out and without, in turn.
The accuracy is that of the answers that were given; beside it stand the accuracies of both points,
and what the export found.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from marnet_bench.machine import describe_machine
from marnet_bench.traffic import BATCHING, Traffic, best_rate
from marnet_sdk import Classifier, Prediction
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.errors import QueueFull
from marnet_sdk.serve.policy import Batching
from marnet_train.data.imagefolder import read_split

EXACT = "exact"
_PATIENCE = 0.5  # share of the latency from which on the queue counts as too long


@dataclass(frozen=True)
class NoAnswer:
    """Stands where a request was refused."""

    index: int = -1


class Asked:
    """Asks a classifier, and keeps count of what it answers."""

    def __init__(self, classifier: Classifier, truth: dict[bytes, str]) -> None:
        self._classifier, self._truth = classifier, truth
        self.points: Counter[str | None] = Counter()
        self.right = self.refused = 0

    def submit(self, image: bytes) -> Future[Any]:
        """Ask for an image; where it is refused, the future has a `NoAnswer`."""
        try:
            future = self._classifier.submit(image)
        except QueueFull:
            self.refused += 1
            future = Future()
            future.set_result(NoAnswer())
        else:
            future.add_done_callback(lambda done: self._count(image, done))
        return future

    def _count(self, image: bytes, done: Future[Prediction]) -> None:  # in the model's thread
        if done.exception() is None:
            answer = done.result()
            self.points[answer.operating_point] += 1
            self.right += answer.label == self._truth[image]

    def found(self) -> dict[str, Any]:
        """Refusals, answers by operating point, and their accuracy."""
        answers = self.points.total()
        accuracy = self.right / answers if answers else None
        return {"refused": self.refused, "points": dict(self.points), "accuracy": accuracy}


def overloaded(
    model: Path, truth: dict[bytes, str], batching: Batching, rate: float, duration: float
) -> dict[str, Any]:
    """Let images come at a rate, and see what becomes of them."""
    with Classifier(model, operating_point=EXACT, batching=batching) as classifier:
        asked = Asked(classifier, truth)
        for image in list(truth)[:32]:  # warm
            classifier.submit(image).result()
        traffic = Traffic(asked.submit, list(truth), duration=duration, fastest=rate)
        run = traffic.run("server", rate)
        return run.described() | asked.found()


def capacity(model: Path, images: Sequence[bytes], duration: float, latency: float) -> float:
    """The images in a second that the exact operating point answers in time, at random times."""
    with Classifier(model, operating_point=EXACT, batching=BATCHING) as classifier:
        futures = [classifier.submit(image) for image in images]  # warm
        for future in futures:
            future.result()
        traffic = Traffic(classifier.submit, images, duration=duration, fastest=1000.0)
        return best_rate(traffic.search(latency), latency)


def accuracy(model: Path, point: str, truth: dict[bytes, str]) -> float:
    """The share of the test images that an operating point labels rightly."""
    with Classifier(model, operating_point=point) as classifier:
        answers = classifier.predict(list(truth))
    return statistics.mean(
        a.label == label for a, label in zip(answers, truth.values(), strict=True)
    )


@click.command(cls=Command)
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True,
              help="Data set, whose images of `test` are asked for.")  # fmt: skip
@click.option("--point", default="fast", show_default=True, help="That may answer instead.")
@click.option("--load", default=1.5, show_default=True, help="Times what `exact` can do.")
@click.option("--latency", default=200.0, show_default=True, help="Milliseconds for 99 of 100.")
@click.option("--duration", default=10.0, show_default=True, help="Seconds of each run.")
@click.option("--turns", default=3, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    model: Path,
    data: Path,
    point: str,
    load: float,
    latency: float,
    duration: float,
    turns: int,
    out: Path,
) -> None:
    """Overload a classifier with brown-out and without, write the record and print its table."""
    truth = {e.image.read_bytes(): e.label for e in read_split(data / "test", needs_text=False)}
    knobs = {
        "with brown-out": Batching(brown_out=(point,), patience=_PATIENCE * latency / 1e3),
        "without": Batching(),
    }
    rates, runs = [], {name: [] for name in knobs}
    for turn in range(turns):
        rates.append(capacity(model, list(truth), duration, latency))
        say(f"turn {turn + 1} of {turns}: {EXACT} answers {rates[-1]:.0f} images/s in time")
        for name, batching in knobs.items():
            found = overloaded(model, truth, batching, load * rates[-1], duration)
            runs[name].append(found)
    pareto = json.loads((model / "pareto.json").read_text("utf-8"))["points"]
    found = {
        "bundle": model.name,
        "images": len(truth),
        "load": load,
        "latency_ms": latency,
        "capacity": rates,
        "accuracy": {name: accuracy(model, name, truth) for name in (EXACT, point)},
        "pareto": {name: pareto[name] for name in (EXACT, point)},
        "runs": runs,
        "machine": describe_machine(),
    }
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print_found(found)


def print_found(found: dict[str, Any]) -> None:
    """A row for each run."""
    rows = [
        (
            name,
            f"{run['rate']:.0f}",
            f"{run['p99_ms']:.0f} ms",
            str(run["refused"]),
            ", ".join(f"{count} {point}" for point, count in sorted(run["points"].items())),
            f"{run['accuracy']:.1%}",
        )
        for name, runs in found["runs"].items()
        for run in runs
    ]
    title = f"{found['load']:g} times what exact answers; the limit is {found['latency_ms']:g} ms"
    print_table(title, ("", "images/s", "p99", "refused", "answered at", "accuracy"), rows)
    alone = ", ".join(f"{name} {share:.1%}" for name, share in found["accuracy"].items())
    table = ", ".join(f"{name} {one['accuracy']:.1%}" for name, one in found["pareto"].items())
    say(f"accuracy of each point alone: {alone}; of the export's Pareto table: {table}")


if __name__ == "__main__":
    main()

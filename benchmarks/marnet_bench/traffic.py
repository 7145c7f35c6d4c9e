"""Traffic on a classifier as MLPerf's LoadGen makes it: one caller, groups, Poisson arrivals, all.

LoadGen decides when each image is asked for and takes the times. A request of the scenario "server"
is due when the schedule says so, however late the ones before it are answered, so its latency is
free of coordinated omission. Source: https://github.com/mlcommons/inference/tree/master/loadgen
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import mlperf_loadgen as loadgen
import numpy as np

from marnet_bench.http_client import Server
from marnet_bench.machine import describe_bundle, describe_machine
from marnet_bench.timing import drift
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import say
from marnet_sdk.errors import InferenceError, MarnetError
from marnet_sdk.serve.many_callers import Kind
from marnet_sdk.serve.policy import Batching

Scenario = Literal["single-stream", "multi-stream", "server", "offline"]
# The queue takes whatever LoadGen sends: what it means to be too late is LoadGen's to say.
BATCHING = Batching(max_queue=2**31)
_SCENARIOS = {
    "single-stream": loadgen.TestScenario.SingleStream,
    "multi-stream": loadgen.TestScenario.MultiStream,
    "server": loadgen.TestScenario.Server,
    "offline": loadgen.TestScenario.Offline,
}
_PERCENTILES = ("50.00", "90.00", "99.00")
_PARTS = 50  # of the answers of "offline"
_MOST_RUNS, _CLOSE = 12, 0.06  # of a search; the share of a rate that is close enough to it
_HUNDRED = 100  # queries at least, where it is said of 99 of 100 that they are answered in time
_NS = 1e6  # nanoseconds of a millisecond


@dataclass(frozen=True)
class Run:
    """One run of LoadGen. Latencies are of queries, whose images are answered together."""

    rate: float | None  # queries that were scheduled for each second; None: as fast as answers come
    images: int
    images_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    # Of each query, in their order, from the moment that LoadGen sends it; offline, of an image.
    seconds: tuple[float, ...] = ()

    def described(self) -> dict[str, Any]:
        """The run as plain data, without the many `seconds`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"}


def run_traffic(
    asked: Classifier | Server,
    images: Sequence[bytes],
    scenario: Scenario,
    *,
    duration: float,
    together: int = 8,
    rate: float | None = None,
    latency_ms: float = 100.0,
) -> dict[str, Any]:
    """Measure a classifier, here or behind HTTP, under one kind of traffic, from files to answers.

    Args:
        asked: a classifier that was opened with `BATCHING`, or a server.
        images: files, which LoadGen asks for at random.
        scenario: "single-stream": the next image comes when the one before is answered.
            "multi-stream": so many images do. "server": images come at random times. "offline": all
            are there at once.
        duration: seconds of each run, at least; a run of "server" has at least 100 images, too.
        together: images of a query of "multi-stream".
        rate: images for each second that "server" sends; None: the highest is searched for at
            which 99 of 100 are answered within `latency_ms`.

    Returns:
        The report: plain data, as it is written to JSON.

    Raises:
        InferenceError, ImageError: an answer failed, or one differs from that of a single call.
    """
    started = time.perf_counter()
    expected = [answer.index for answer in asked.predict(images)]
    fastest = len(images) / (time.perf_counter() - started)
    traffic = Traffic(asked.submit, images, duration=duration, together=together, fastest=fastest)
    if scenario == "server" and rate is None:
        runs = traffic.search(latency_ms)
    else:
        runs = [traffic.run(scenario, rate)]
    in_time = [run for run in runs if scenario != "server" or run.p99_ms <= latency_ms]
    best = max(in_time, key=lambda run: run.images_per_s, default=None)
    return {
        "scenario": scenario,
        **about(asked),
        "images": len(images),
        "image_bytes": sum(map(len, images)) // len(images),
        "together": together if scenario == "multi-stream" else 1,
        "latency_ms": latency_ms if scenario == "server" else None,
        "runs": [run.described() for run in runs],
        "best": None if best is None else best.described(),
        "checked": traffic.check(expected),
        "batching": _batching(asked) if isinstance(asked, Classifier) else None,
        "searched": scenario == "server" and rate is None,
        "lines": [] if best is None else [_line(scenario, best)],
        "machine": describe_machine(),
    }


def about(asked: Classifier | Server) -> dict[str, Any]:
    """Say who answered. Of a server, nothing is known but where it is."""
    if isinstance(asked, Server):
        return {"url": asked.url}
    return describe_bundle(asked)


def _line(scenario: str, run: Run) -> dict[str, Any]:
    """The times of a run, for comparing it with another report."""
    seconds = np.array(run.seconds)
    rate = None if run.rate is None else round(run.rate, 3)
    return {"traffic": scenario, "rate": rate, "p50_ms": run.p50_ms, "drift": drift(seconds)} | {
        "seconds": [round(s, 7) for s in run.seconds]
    }


def best_rate(runs: Sequence[Run], limit: float) -> float:
    """The highest rate that was answered in time; 0: none was."""
    return max((run.images_per_s for run in runs if run.p99_ms <= limit), default=0.0)


class Answer(Protocol):
    """Is what a request is answered with."""

    @property
    def index(self) -> int:
        """The likeliest class."""
        ...


class Traffic:
    """LoadGen on one side, and whatever answers images on the other."""

    def __init__(
        self,
        submit: Callable[[bytes], Future[Any]],
        images: Sequence[bytes],
        *,
        duration: float,
        fastest: float,
        together: int = 1,
    ) -> None:
        """Get ready.

        Args:
            submit: sends the bytes of an image and returns a future of an `Answer`.
            duration: seconds of each run, at least.
            fastest: images for each second that "offline" may do, to know how many to send.
            together: images of a query of "multi-stream".
        """
        self._submit, self._images = submit, images
        self._duration, self._fastest, self._together = duration, fastest, together
        self._answers: dict[int, set[int]] = defaultdict(set)  # by image
        self._error: BaseException | None = None
        self._times: list[tuple[float, float]] = []  # sent and answered, of each image of a run

    def run(self, scenario: Scenario, rate: float | None = None) -> Run:
        """Run LoadGen once.

        Raises:
            Exception: of a request that failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            logs = loadgen.LogSettings()
            output = loadgen.LogOutputSettings()
            output.outdir, output.copy_summary_to_stdout = folder, False
            logs.log_output, logs.enable_trace = output, False
            system = loadgen.ConstructSUT(self._issue, lambda: None)
            count = len(self._images)
            library = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
            try:
                # The last argument names a file of audits; there is none.
                settings = self._settings(scenario, rate)
                self._times = []
                loadgen.StartTestWithLogSettings(system, library, settings, logs, f"{folder}/none")
            finally:
                loadgen.DestroyQSL(library)
                loadgen.DestroySUT(system)
            if self._error is not None:
                raise self._error
            found = read_log(Path(folder) / "mlperf_log_detail.txt")
            return replace(
                summary(found, scenario, rate), seconds=seconds_of(self._times, scenario)
            )

    def search(self, latency_ms: float) -> list[Run]:
        """Runs of "server" at rates that close in on the highest one that is answered in time."""
        low, high = 0.0, math.inf
        rate = self.run("offline").images_per_s / 2
        runs: list[Run] = []
        while len(runs) < _MOST_RUNS and high - low > _CLOSE * low:
            runs.append(run := self.run("server", rate))
            in_time = run.p99_ms <= latency_ms
            low, high = (rate, high) if in_time else (low, rate)
            word = "in time" if in_time else "too late"
            say(f"{rate:.1f} images/s: p99 {run.p99_ms:.1f} ms, {word}")
            rate = 1.5 * low if high == math.inf else (low + high) / 2
        return runs

    def check(self, expected: Sequence[int]) -> int:
        """Compare all answers of the timed runs with others to the same images.

        Returns:
            How many images were asked for.

        Raises:
            InferenceError: an answer is another one.
        """
        for image, found in sorted(self._answers.items()):
            if found != {expected[image]}:
                raise InferenceError(
                    f"image {image}: got the classes {sorted(found)} under traffic, and predict "
                    f"says {expected[image]}; its two likeliest classes may be a close call: "
                    "measure with other images, or export with --precision fp32"
                )
        return len(self._answers)

    def _settings(self, scenario: Scenario, rate: float | None) -> Any:
        settings = loadgen.TestSettings()
        settings.scenario = _SCENARIOS[scenario]
        settings.mode = loadgen.TestMode.PerformanceOnly
        settings.min_duration_ms = round(self._duration * 1e3)
        settings.min_query_count = _HUNDRED if scenario == "server" else 10
        settings.multi_stream_samples_per_query = self._together
        settings.offline_expected_qps = self._fastest  # makes a query of so many for each second
        if rate is not None:
            settings.server_target_qps = rate
        return settings

    def _issue(self, queries: Sequence[Any]) -> None:
        """Ask for the images of a query."""
        sent = time.perf_counter()
        for query in queries:
            done = partial(self._complete, query.id, query.index, sent)
            try:
                future = self._submit(self._images[query.index])
            except MarnetError as error:
                done(error)
            else:
                future.add_done_callback(partial(_answered, done))

    def _complete(self, number: int, image: int, sent: float, answer: int | BaseException) -> None:
        self._times.append((sent, time.perf_counter()))
        if isinstance(answer, int):
            self._answers[image].add(answer)
        else:
            self._error = answer
        data = array("q", [answer if isinstance(answer, int) else -1])
        address, count = data.buffer_info()
        response = loadgen.QuerySampleResponse(number, address, count * data.itemsize)
        loadgen.QuerySamplesComplete([response])


def _answered(done: Callable[[int | BaseException], None], future: Future[Answer]) -> None:
    done(future.exception() or future.result().index)


def seconds_of(times: Sequence[tuple[float, float]], scenario: Scenario) -> tuple[float, ...]:
    """The seconds of each query in the order in which they were sent; offline, of an image.

    Offline all images are sent at once: the answers are then counted in `_PARTS` parts, one after
    another, of which each gives its seconds for an image.

    Args:
        times: when each image was sent and answered, by one clock.
    """
    if scenario == "offline":
        ends = sorted(answered for _, answered in times)
        last = [part[-1] for part in np.array_split(ends, min(_PARTS, len(ends)))]
        counts = [len(part) for part in np.array_split(ends, min(_PARTS, len(ends)))]
        spans = np.diff([times[0][0], *last])
        return tuple((spans / counts).tolist())
    whole: dict[float, float] = {}  # a query is answered with the last of its images
    for sent, answered in times:
        whole[sent] = max(whole.get(sent, answered), answered)
    return tuple(answered - sent for sent, answered in sorted(whole.items()))


def read_log(path: Path) -> dict[str, Any]:
    """Read the values of LoadGen's detailed log, a JSON object in each line behind a mark."""
    lines = path.read_text("utf-8").splitlines()
    entries = (json.loads(line.removeprefix(":::MLLOG ")) for line in lines)
    return {entry["key"]: entry["value"] for entry in entries}


def summary(found: dict[str, Any], scenario: Scenario, rate: float | None) -> Run:
    """A run in the words of this package.

    Args:
        found: as `read_log` gives it.
    """
    images = found["generated_samples_per_query"]  # of a query
    p50, p90, p99 = (found[f"result_{p}_percentile_latency_ns"] / _NS for p in _PERCENTILES)
    if scenario == "offline":
        per_second = found["result_samples_per_second"]
    elif scenario == "server":
        per_second = found["result_completed_samples_per_sec"]
    else:  # one query after another
        per_second = images * 1e3 / (found["result_mean_latency_ns"] / _NS)
    return Run(rate, found["result_query_count"] * images, per_second, p50, p90, p99)


def _batching(classifier: Classifier) -> dict[str, Any]:
    """Describe what the batcher did in all runs: batches by the reason, and the learned times."""
    stats = classifier.batching_stats()
    learned = [
        {"operating_point": kind.operating_point, "samples": kind.samples}
        | {"fixed_ms": 1e3 * times.fixed, "per_image_ms": 1e3 * times.per_image}
        | {"useful": times.useful}
        for kind, times in stats.learned.items()
        if isinstance(kind, Kind)
    ]
    return {"batches": dict(stats.batches), "learned": learned}

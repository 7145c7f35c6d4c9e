"""The way of images through one classifier, from the bytes of a file to a label, stage by stage.

The stages are timed inside `Classifier.predict`: its preprocessing and its backend are watched, and
do what they always do. What a backend runs as one call, the reverse loop and the head behind it, is
timed as one. A step is then the difference between the whole chain and half of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from marnet_bench.explain import ENCODER, REFINE, explain
from marnet_bench.machine import describe_bundle, describe_machine
from marnet_bench.timing import Seconds, drift, interleave, speedup_interval, summarise
from marnet_sdk.backends import Backend, DeviceRows, RuntimeReport
from marnet_sdk.classifier import Classifier
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import InvalidInput
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.noise.tables import Floats, Tables

T = TypeVar("T")
DECODE, RESIZE, NORMALISE, REST = "decode", "resize", "normalise", "rest"
STAGES = (DECODE, RESIZE, NORMALISE, ENCODER, REFINE, REST)
WHOLE = "whole call"
_FEWEST_STEPS = 4  # of a loop whose half is told apart; graphs run two at least


class Watch:
    """Seconds of the stages of a call, while it is on."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self.on = clock, False
        self.taken: dict[str, float] = {}

    def call(self, stage: str, function: Callable[..., T], *args: Any, **more: Any) -> T:
        """Call a function, and add its time to a stage."""
        if not self.on:
            return function(*args, **more)
        started = self._clock()
        try:
            return function(*args, **more)
        finally:
            self.taken[stage] = self.taken.get(stage, 0.0) + self._clock() - started

    def all_stages(self, function: Callable[[], object]) -> dict[str, float]:
        """Call a function that passes the stages; their times, and the rest of it."""
        self.taken, self.on = {}, True
        started = self._clock()
        try:
            function()
        finally:
            whole, self.on = self._clock() - started, False
        return self.taken | {REST: whole - sum(self.taken.values())}


@dataclass(frozen=True)
class WatchedPreprocess(Preprocess):
    """A classifier's preprocessing, with a watch on its parts."""

    watch: Watch = field(default_factory=Watch)

    def decode(self, *args: Any, **more: Any) -> Image.Image:
        """Decode; see `Preprocess`."""
        return self.watch.call(DECODE, super().decode, *args, **more)

    def resized_uint8(self, *args: Any, **more: Any) -> np.ndarray:
        """Resize and crop; see `Preprocess`."""
        return self.watch.call(RESIZE, super().resized_uint8, *args, **more)

    def normalize(self, *args: Any, **more: Any) -> Floats:
        """Normalise; see `Preprocess`."""
        return self.watch.call(NORMALISE, super().normalize, *args, **more)


class WatchedBackend:
    """A classifier's backend, with a watch on its two graphs."""

    def __init__(self, backend: Backend, watch: Watch) -> None:
        """Watch a backend whose `run` is its two graphs, one after the other."""
        self._backend, self._watch = backend, watch
        self.asked: tuple[Floats, Tables] | None = None  # what `refine` got last

    def encode(self, pixels: Floats) -> Floats:
        return self._watch.call(ENCODER, self._backend.encode, pixels)

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        self.asked = x_v, tables
        return self._watch.call(REFINE, self._backend.refine, x_v, tables)

    def run(self, pixels: Any, tables: Tables) -> tuple[Floats, Floats]:
        return self.refine(self.encode(pixels), tables)

    def device_rows(self, array: Any) -> DeviceRows:
        return self._backend.device_rows(array)

    def report(self) -> RuntimeReport:
        return self._backend.report()


def run_stages(
    classifier: Classifier,
    images: Sequence[bytes],
    *,
    batch: int,
    warmup: int,
    duration: float,
    explains: bool = False,
    min_rounds: int = 10,
) -> dict[str, Any]:
    """Measure the stages of `predict`, in turn with the same call unwatched.

    Args:
        classifier: is left watched, so close it afterwards.
        images: files; each call takes the next ones.
        batch: images of a call.
        duration: seconds. min_rounds: calls of each, at least.
        explains: add the least time that the encoder, and loop and head, need on this machine.

    Returns:
        The report: plain data, as it is written to JSON.

    Raises:
        InvalidInput: the bundle runs on a GPU, where all stages behind the pixels are one program.
    """
    if classifier.runtime.device != "cpu":
        raise InvalidInput(
            f"the bundle runs on {classifier.runtime.device}, where all that follows the pixels is "
            "one captured program; measure the stages of a bundle for the processor"
        )
    described = describe_bundle(classifier)
    calls = _Calls(classifier, images, batch)
    taken = interleave(calls.all(), warmup=warmup, duration=duration, min_rounds=min_rounds)
    whole = taken[WHOLE]
    staged = calls.staged[-len(whole) :]  # those of the warm-up came first
    by_stage = {
        name: np.array([call[name] for call in staged]) for name in STAGES if name in staged[0]
    }
    lines = [_line(name, seconds, batch, staged) for name, seconds in by_stage.items()]
    lines.append(_line(WHOLE, whole, batch))
    report: dict[str, Any] = {
        "scenario": "stages",
        **described,
        "batch": batch,
        "images": len(images),
        "image_bytes": sum(map(len, images)) // len(images),
        "lines": lines,
        "sum_ms": sum(line["p50_ms"] for line in lines[:-1]),
        "loop_by_difference": _loop(taken, calls.steps),
        "fast_decoding": calls.fast_decoding(taken),
        "limits": None,
        "machine": describe_machine(),
    }
    if explains:
        manifest = classifier.bundle.manifest
        found, limits = explain(manifest, batch, classifier.runtime.threads or cpus().threads)
        for line in lines:
            if need := found.get(line["stage"]):
                bound = {"bound_ms": need.bound_ms, "bound_by": need.bound_by}
                line |= asdict(need) | bound | {"share_of_bound": need.bound_ms / line["p50_ms"]}
        report["limits"] = limits.described()
    return report


class _Calls:
    """The calls that take turns."""

    def __init__(self, classifier: Classifier, images: Sequence[bytes], batch: int) -> None:
        self._classifier, self._images, self._batch = classifier, list(images), batch
        self._watch = Watch()
        self._backend = WatchedBackend(classifier._guard.check(), self._watch)
        classifier._guard.replace(self._backend)
        settings = {f.name: getattr(classifier.preprocess, f.name) for f in fields(Preprocess)}
        classifier.preprocess = WatchedPreprocess(**settings, watch=self._watch)
        self._exact = replace(classifier.preprocess, fast_decode=False)
        self.staged: list[dict[str, float]] = []
        self._predict()()
        assert self._backend.asked is not None
        self._x_v, self._tables = self._backend.asked

    @property
    def steps(self) -> int:
        """The steps of the reverse loop."""
        return self._tables.steps

    def all(self) -> dict[str, Callable[[], object]]:
        """Whole calls, watched calls, and where it has enough steps the loop and half of it."""
        predict = self._predict()
        calls: dict[str, Callable[[], object]] = {
            WHOLE: self._predict(),
            "staged": lambda: self.staged.append(self._watch.all_stages(predict)),
        }
        if self.steps >= _FEWEST_STEPS:
            half = self._tables.first_steps(self.steps // 2)
            calls["all steps"] = partial(self._backend.refine, self._x_v, self._tables)
            calls["half of the steps"] = partial(self._backend.refine, self._x_v, half)
        if self._classifier.preprocess.fast_decode:
            calls["decoded exactly"] = partial(self._exactly, self._predict())
        return calls

    def _predict(self) -> Callable[[], object]:
        """Return a call that classifies the next images, from the first on."""
        files = cycle(self._images)

        def call() -> object:
            chunk = list(islice(files, self._batch))
            if self._batch == 1:
                return self._classifier.predict(chunk[0])
            return self._classifier.predict(chunk, batch_size=self._batch)

        return call

    def _exactly(self, call: Callable[[], T]) -> T:
        """Call with every file decoded at its own size."""
        fast, self._classifier.preprocess = self._classifier.preprocess, self._exact
        try:
            return call()
        finally:
            self._classifier.preprocess = fast

    def fast_decoding(self, taken: dict[str, Seconds]) -> dict[str, Any] | None:
        """Tell what fast decoding gains, beside what it changes; None where it is off."""
        if "decoded exactly" not in taken:
            return None
        classifier = self._classifier
        ratio, low, high = speedup_interval(taken["decoded exactly"], taken[WHOLE])
        found = {"ratio": ratio, "low": low, "high": high}
        return found | agreement(classifier, self._exact, self._images)


def agreement(classifier: Classifier, exact: Preprocess, images: Sequence[bytes]) -> dict[str, Any]:
    """Compare labels and pixels with those that another preprocessing gives.

    Returns:
        same_label of so many images; mean and largest difference of the pixels in grey levels.
    """
    pixels, others = classifier.preprocess.pixels(images), exact.pixels(images)
    labels, wanted = (classifier.logits(p).argmax(axis=1) for p in (pixels, others))
    level = exact.rescale_factor / np.array(exact.std)[:, None, None]  # one of 255, normalised
    difference = np.abs(pixels - others) / level
    return {
        "same_label": int((labels == wanted).sum()),
        "images": len(images),
        "mean_grey_levels": float(difference.mean()),
        "largest_grey_levels": float(difference.max()),
    }


def _line(
    stage: str, seconds: Seconds, batch: int, staged: Sequence[dict[str, float]] = ()
) -> dict[str, Any]:
    whole = sum(sum(call.values()) for call in staged)
    return {
        "stage": stage,
        "share": float(seconds.sum()) / whole if staged else 1.0,  # of the time of all calls
        "drift": drift(seconds),
        **asdict(summarise(seconds, batch)),
        "seconds": [round(s, 7) for s in seconds.tolist()],
    }


def _loop(taken: dict[str, Seconds], steps: int) -> dict[str, Any] | None:
    """Tell what one step takes, and so the loop and what is around it; None: too few steps."""
    if "half of the steps" not in taken:
        return None
    whole, half = taken["all steps"], taken["half of the steps"]
    count = steps - steps // 2
    rows = np.random.default_rng(0).integers(0, len(whole), (2000, len(whole)))
    steps_taken = np.median(whole[rows] - half[rows], axis=1) / count
    low, high = np.percentile(steps_taken, (2.5, 97.5))
    step = float(np.median(whole - half)) / count
    return {
        "steps": steps,
        "step_us": 1e6 * step,
        "low_us": 1e6 * float(low),
        "high_us": 1e6 * float(high),
        "loop_ms": 1e3 * steps * step,
        "around_ms": 1e3 * (float(np.median(whole)) - steps * step),
    }

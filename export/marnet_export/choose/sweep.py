"""Measure every way to run a built loop, so that `points` can choose among them.

What is swept is steps x sampler x noise samples x precision, and no loop at all. One built graph
serves all but the precision, and the encoder runs once for all of them.
Axes: N images, K noise samples, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from marnet_export.choose.candidates import Candidate, evaluate_candidate, evaluate_exact
from marnet_export.prove.trial import Built
from marnet_sdk.bundle import OperatingPoint
from marnet_sdk.console import track
from marnet_sdk.noise.tables import Floats
from marnet_sdk.uncertainty import mean_logits
from marnet_train.diffusion import SAMPLERS, SamplerTable, ScheduleConfig, sampler_table

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
SAMPLES = (1, 2, 4, 8)
_ROUNDS = 11  # of timing
Key = TypeVar("Key", bound=Hashable)
Work = tuple[int, bool, bool]  # steps, whether C is used, whether noise is drawn in the call


def swept_processes(
    schedule: ScheduleConfig, sampler: str | None, eta: float
) -> dict[str, SamplerTable]:
    """Every sampler (or the one that is asked for) at every number of steps, by name.

    The process as trained, all T steps of ddpm, is always among them, and is the first.
    """
    steps = [s for s in STEPS if s < schedule.steps] + [schedule.steps]
    out = {"ddpm-exact": sampler_table(schedule, "ddpm")}
    for kind in SAMPLERS if sampler is None else [sampler]:
        for count in steps:
            table = sampler_table(schedule, kind, count, eta if kind == "ddim" else 0.0)
            out.setdefault(f"{kind}-{count}", table)
    return out


def as_points(
    tables: Mapping[str, SamplerTable], samples: Mapping[str, int] | int = 1
) -> dict[str, OperatingPoint]:
    """The operating points of these samplers, as a manifest lists them."""
    return {
        name: OperatingPoint(
            sampler=table.sampler,
            eta=table.eta,
            timesteps=table.timesteps,
            samples=samples if isinstance(samples, int) else samples[name],
            abstain_below=None,
        )
        for name, table in tables.items()
    }


def sweep(
    built: Built,
    truth: NDArray[np.int64],
    reference: NDArray[np.int64],
    *,
    samples: Sequence[int],
    trained_samples: int = 1,
    precision: str,
    max_drop: float,
) -> list[Candidate]:
    """Measure what each operating point of `built` gives, at each number of noise samples.

    Args:
        truth: the true classes [N]. reference: the labels of the float32 checkpoint and its
            process as trained, [N].
        samples: numbers of noise samples. trained_samples: that of the process as trained.

    Returns:
        The process as trained first.
    """
    names, points = list(built.sampling.points), built.sampling.points
    latency = _latencies(built, {*samples, trained_samples})  # encodes the images, too
    zero = next((name for name in names if not points[name].timesteps), None)
    without_loop = None if zero is None else built.logits(zero).argmax(axis=1)
    found = []
    for name in track(names, f"sweep {precision}"):
        point = points[name]
        # More samples of the process as trained come with "ddpm-T"; without the loop all are alike.
        counts = (trained_samples,) if name == names[0] else (1,) if name == zero else samples
        logits = built.samples(name, max(counts))  # [N, K, C]
        for count in counts:
            labels = mean_logits(logits[:, :count]).argmax(axis=1)
            settings: dict[str, Any] = {
                "sampler": point.sampler,
                "eta": point.eta if point.sampler == "ddim" else None,
                "steps": len(point.timesteps),
                "samples": count,
                "precision": precision,
                "latency_ms": latency[name, count],
                "max_drop": max_drop,
                "without_loop": without_loop,
            }
            # In float32 it is the reference itself, and not one more that has to be shown as good.
            same = name == names[0] and precision == "fp32" and (labels == reference).all()
            found.append(
                evaluate_exact(labels, truth, **settings)
                if same
                else evaluate_candidate(labels, reference, truth, **settings)
            )
    return found


def _latencies(built: Built, samples: Iterable[int]) -> dict[tuple[str, int], float]:
    """Milliseconds from an image's pixels to its logits, of every point and number of samples.

    Points that do the same work share the time of the first of them. Medians of calls taken in
    turn; and since less work takes no longer, a point never counts as slower than one that does
    more of the same kind.
    """
    pixel, shared = built.pixels[:1], built.sampling.noise == "shared"
    works: dict[str, Work] = {}
    for name, point in built.sampling.points.items():
        table = built.plan[f"coefficients.{name}"]
        drawn = not shared and bool(table[:, 3].any())
        works[name] = (len(point.timesteps), bool(table[:, 2].any()), drawn)
    first = {work: name for name, work in reversed(works.items())}
    counts = sorted({1, *samples})
    calls = {
        (work, count): _call(built, first[work], pixel, count)
        for work in sorted(first)
        for count in counts
    }
    median = in_turn(calls)
    return {
        (name, count): min(
            median[other, more]
            for other in first
            for more in counts
            if other[1:] == work[1:] and other[0] >= work[0] and more >= count
        )
        for name, work in works.items()
        for count in counts
    }


def _call(built: Built, name: str, pixel: Floats, count: int) -> Callable[[], object]:
    """One image, from its pixels to the logits of each sample."""
    tables = built.tables(name, pixel, count)

    def call() -> object:
        x_v = built.backend.encode(pixel)
        shared = built.sampling.noise == "shared"
        return built.backend.refine(x_v, tables if shared else built.tables(name, pixel, count))

    return call


def in_turn(calls: Mapping[Key, Callable[[], object]], *, settle: float = 0.0) -> dict[Key, float]:
    """Median milliseconds of each, called in an order that is reversed every round.

    Args:
        settle: seconds for which each is called before it is measured. The threads of one runtime
            spin for a while after a call, and would take the cores of another.
    """
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls.items())
    for _ in track(range(_ROUNDS + 1), "time"):
        for key, call in order:
            start = begun = time.perf_counter()
            while start - begun < settle:
                call()
                start = time.perf_counter()
            call()
            taken[key].append(time.perf_counter() - start)
        order.reverse()
    return {key: 1e3 * float(np.median(seconds[1:])) for key, seconds in taken.items()}

"""Measure every way to run a built loop, so that `selection` can choose among them.

What is swept is steps x sampler x noise samples x precision. One built graph serves all but the
last, and the encoder runs once for all of them.
Axes: N images, K noise samples, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from marnet_export.selection import Candidate, evaluate_candidate, evaluate_exact
from marnet_export.verify import Built
from marnet_sdk.bundle import OperatingPoint
from marnet_sdk.console import track
from marnet_sdk.uncertainty import mean_logits
from marnet_train.diffusion import SAMPLERS, SamplerTable, ScheduleConfig, sampler_table

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
SAMPLES = (1, 2, 4, 8)
_ROUNDS = 7  # of timing


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
    precision: str,
    max_drop: float,
) -> list[Candidate]:
    """What each operating point of `built` gives, at each number of noise samples.

    Args:
        truth: the true classes [N]. reference: the labels of the float32 checkpoint and its
            process as trained, [N].

    Returns:
        The process as trained first.
    """
    names = list(built.sampling.points)
    latency = _latencies(built, samples)
    found = []
    for name in track(names, f"sweep {precision}"):
        point = built.sampling.points[name]
        logits = built.samples(name, max(samples))  # [N, K, C]
        for count in samples:
            if name == names[0] and count > 1:
                continue  # as trained means one sample; more of them come with "ddpm-T"
            labels = mean_logits(logits[:, :count]).argmax(axis=1)
            evaluate = evaluate_exact if name == names[0] else _against(reference)
            candidate = evaluate(
                labels,
                truth,
                sampler=point.sampler,
                eta=point.eta if point.sampler == "ddim" else None,
                steps=len(point.timesteps),
                samples=count,
                precision=precision,
                latency_ms=latency[name, count],
                max_drop=max_drop,
            )
            agreement = float((labels == reference).mean())
            found.append(replace(candidate, agreement=agreement))
    return found


def _against(reference: NDArray[np.int64]):
    return lambda labels, truth, **settings: evaluate_candidate(
        labels, reference, truth, **settings
    )


def _latencies(built: Built, samples: Sequence[int]) -> dict[tuple[str, int], float]:
    """Median milliseconds from the pixels of one image to its logits, taken in turn.

    Points with as many steps run the same graph on tables of the same size, so they share the
    time of the first of them.
    """
    pixel, shared = built.pixels[:1], built.sampling.noise == "shared"
    first: dict[tuple[int, bool], str] = {}
    stands_for = {}
    for name, point in built.sampling.points.items():
        # Noise keyed by image is drawn in the call, so there it matters how much of it there is.
        noisy = not shared and bool(built.plan[f"coefficients.{name}"][:, 3].any())
        stands_for[name] = first.setdefault((len(point.timesteps), noisy), name)
    tables = {
        (name, count): built.tables(name, pixel, count)
        for name in set(first.values())
        for count in samples
    }
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in tables}
    for _ in track(range(_ROUNDS), "time"):
        for (name, count), seconds in taken.items():
            start = time.perf_counter()
            x_v = built.backend.encode(pixel)
            made = tables[name, count] if shared else built.tables(name, pixel, count)
            built.backend.refine(x_v, made)
            seconds.append(time.perf_counter() - start)
    median = {key: 1e3 * float(np.median(seconds[1:])) for key, seconds in taken.items()}
    return {
        (name, count): median[stands_for[name], count]
        for name in built.sampling.points
        for count in samples
    }

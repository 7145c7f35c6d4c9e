"""The choice of the loop that a bundle runs on a CPU: a graph, or the native kernel beside it.

The native loop is a candidate beside a graph that is verified: built, held to the checkpoint,
timed, and kept where it is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from marnet_export.build.builder import builder
from marnet_export.build.native import (
    answers_alone,
    remove_native,
    set_most_rows,
    why_not,
    write_native,
)
from marnet_export.build.types import Arithmetic
from marnet_export.choose.sweep import in_turn
from marnet_export.prove.fidelity import Fidelity
from marnet_export.prove.trial import Built
from marnet_export.prove.verify import report
from marnet_export.work import Job, Points
from marnet_sdk.errors import ExportError, VerificationFailed
from marnet_sdk.native_loop import ANY_ROWS, GRAPH, NATIVE
from marnet_sdk.noise.tables import Floats

MOST_ROWS = 16  # beyond which nobody looks: products of many rows are what runtimes are good at
_ROWS = (1, 4, 16)  # images in a call that are timed


def check_loop(job: Job) -> None:
    """Refuse `--loop native` where it cannot be had, before anything is built."""
    asked, backend = job.settings.loop, builder(job.settings.backend)
    if asked == NATIVE and (reason := why_not(backend, job.lowered)):
        raise ExportError(
            f"--loop native: {reason}; leave --loop out for whichever loop can be had"
        )


def choose_loop(
    job: Job, graph: Built, types: Arithmetic, points: Points
) -> tuple[Built, Fidelity] | None:
    """Put the native loop beside a graph that is verified, where it passes too and is faster.

    Returns:
        What was built then, and its fidelity; None where the graph alone runs the loop.

    Raises:
        VerificationFailed: it is asked for, and does not agree with the checkpoint.
    """
    asked, backend = job.settings.loop, builder(job.settings.backend)
    insists = asked == NATIVE
    if asked == GRAPH or not (points.table.timesteps or insists):
        return None
    if reason := why_not(backend, job.lowered):
        if backend.head is not None:
            job.say(f"the graph runs the loop: {reason}")
        return None
    write_native(backend, job.lowered, types.loop, job.payload)
    native = job.opened(job.payload, types, points)
    trial = job.trial(native, types, points)
    found = dict(trial.measure())
    problems = [p for name in found for p in _problems(name, native, graph, found[name])]
    taken = {} if problems else time_loops(job, native, graph)
    images = faster_up_to(taken)
    if problems and insists:
        raise VerificationFailed(
            f"the native loop: {'; '.join(problems)}. No bundle was written; try --loop graph"
        )
    if not images and not insists:
        why = "; ".join(problems) or f"the native loop is no faster here ({shown(taken)})"
        job.say(f"the graph runs the loop: {why}")
        remove_native(job.payload)
        return None
    samples = points.sampling.points[points.sampling.with_loop].samples
    most_rows = max(images * samples, MOST_ROWS if insists else 0)
    if answers_alone(types.loop):
        most_rows = ANY_ROWS
    set_most_rows(job.payload, most_rows)
    which = "every batch" if most_rows == ANY_ROWS else f"up to {most_rows} rows at once"
    job.say(f"the native loop runs {which}: {shown(taken)}")
    served = job.opened(job.payload, types, points)
    report(job, job.trial(served, types, points), found, loop=_about(taken, most_rows))
    return served, found[points.sampling.default]


def _problems(name: str, native: Built, graph: Built, fidelity: Fidelity) -> list[str]:
    """Say why the native loop must not answer at an operating point; empty if it may."""
    bound = fidelity.row_tolerance * fidelity.largest_logit
    alike = _check_alike(native.logits(name), graph.logits(name), bound)
    return [f"{name}: {problem}" for problem in (*fidelity.problems(), *alike)]


def time_loops(job: Job, native: Built, graph: Built) -> dict[int, dict[str, float]]:
    """Milliseconds of both loops, from features to logits, by images in a call."""
    name = graph.sampling.with_loop
    samples = graph.sampling.points[name].samples
    taken = {}
    for count in _ROWS:
        if count > 1 and count * samples > MOST_ROWS:
            break
        pixels = job.images.pixels
        tables = graph.tables(name, np.resize(pixels, (count, *pixels.shape[1:])), samples)
        rows = np.resize(graph.x_v, (count, graph.x_v.shape[1]))
        calls = {
            loop: partial(built.backend.refine, rows, tables)
            for loop, built in ((NATIVE, native), (GRAPH, graph))
        }
        taken[count] = {loop: round(ms, 4) for loop, ms in in_turn(calls).items()}
    return taken


def faster_up_to(taken: Mapping[int, Mapping[str, float]]) -> int:
    """Images in a call up to which the native loop is the faster one; 0: it never is."""
    most = 0
    for count, milliseconds in sorted(taken.items()):
        if milliseconds[NATIVE] >= milliseconds[GRAPH]:
            break
        most = count
    return most


def _check_alike(native: Floats, graph: Floats, bound: float) -> list[str]:
    """Tell whether an image may be answered by either, by the logits [N, C] of both.

    Problems are returned, or none.
    """
    difference = float(np.abs(native - graph).max())
    if difference <= bound:  # not so for NaN
        return []
    return [
        f"the native loop and the graph beside it differ by up to {difference:.3g} in a logit "
        f"(bound {bound:.3g})"
    ]


def _about(taken: Mapping[int, Mapping[str, float]], most_rows: int) -> dict[str, Any]:
    """Return what fidelity.json says of both loops; no most rows where there is no bound."""
    milliseconds = {str(count): dict(ms) for count, ms in taken.items()}
    bound = None if most_rows == ANY_ROWS else most_rows
    return {"runs": NATIVE, "most_rows": bound, "milliseconds": milliseconds}


def shown(taken: Mapping[int, Mapping[str, float]]) -> str:
    """Say what both loops took, in part of a line."""
    return "; ".join(
        f"{ms[NATIVE]:.3g} ms for {count}, the graph {ms[GRAPH]:.3g}" for count, ms in taken.items()
    )

"""Choose which of the candidates to serve.

A candidate of no steps is also what is served, unless a candidate with the loop is shown, with 95 %
confidence, to be more accurate than it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from marnet_export.choose.candidates import (
    Candidate,
    fastest_first,
    images_needed,
    non_dominated,
    plural,
)
from marnet_sdk.bundle import ZERO
from marnet_sdk.errors import VerificationFailed

EXACT, FAST, BALANCED, BUDGET = "exact", "fast", "balanced", "budget"


@dataclass(frozen=True)
class Choice:
    """The operating points, and the one to serve."""

    points: dict[str, Candidate]  # exact, fast, balanced, zero, and budget if it is none of them
    picked: str  # a name in `points`
    reason: str
    enough_images: bool  # whether any candidate could pass on this many images
    max_drop: float
    latency_budget_ms: float | None = None


def choose(
    candidates: Sequence[Candidate],
    exact: Candidate,
    max_drop: float,
    latency_budget_ms: float | None = None,
) -> Choice:
    """Name the operating points and pick one.

    exact: the process as trained.
    fast: the fastest candidate that passes; where some are shown to be more accurate than the
        zero-step one, the fastest of those.
    balanced: the most accurate one among those that pass, are not dominated by another that
        passes, and take at most the geometric mean of the latencies of fast and exact.
    zero: the candidate of no steps, if there is one, whether it passes or not.

    Picked is zero, unless a candidate with the loop is shown to be more accurate than it, and then
    fast; with a latency budget, the most accurate candidate within it that passes.

    Args:
        candidates: may include the exact process; whether one passes is judged here, from its
            interval and `max_drop`.

    Raises:
        VerificationFailed: nothing that passes is within the budget.
    """
    needed = images_needed(max_drop)
    exact = replace(exact, passes=True)  # what is served where nothing else passes
    others = [c for c in _judged(candidates, max_drop) if c.process != exact.process]
    passing = [exact, *(c for c in others if c.passes)]
    helps = [c for c in (exact, *others) if c.over_zero is not None and c.over_zero[1] > 0]
    # Where the loop is shown to help, a process that is not would give that away again.
    worth = [c for c in passing if c in helps] or ([exact] if helps else passing)
    fast = min(worth, key=fastest_first)
    limit = math.sqrt(fast.latency_ms * exact.latency_ms)
    within = [c for c in non_dominated(passing) if c.latency_ms <= limit]
    balanced = max(within, key=lambda c: c.accuracy, default=fast)
    points = {EXACT: exact, FAST: fast, BALANCED: balanced}
    zero = _zero_step(others, exact.precision)
    if zero is not None:
        points[ZERO] = zero
    enough = exact.images >= needed
    if latency_budget_ms is None:
        picked, reason = FAST, _why_fast(fast, exact, others, max_drop, needed)
        if zero is not None:
            picked, reason = _with_or_without([exact, *others], zero, reason, max_drop, needed)
        return Choice(points, picked, reason, enough, max_drop)
    best = _within_budget(passing, latency_budget_ms)
    picked = next((name for name, c in points.items() if c == best), BUDGET)
    points.setdefault(picked, best)
    reason = (
        f"{best} is the most accurate candidate that passes and takes at most "
        f"{latency_budget_ms:g} ms: {best.latency_ms:.3g} ms, accuracy {best.accuracy:.2%}"
    )
    return Choice(points, picked, reason, enough, max_drop, latency_budget_ms)


def pareto_report(
    candidates: Sequence[Candidate], choice: Choice, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of pareto.json: everything that was measured, and what was made of it.

    Args:
        about: machine, data, versions: copied as it is.
    """
    exact = choice.points[EXACT]
    judged = [exact]
    judged += [c for c in _judged(candidates, choice.max_drop) if c.process != exact.process]
    kept = non_dominated(judged)
    rows = [asdict(c) | {"non_dominated": c in kept} for c in sorted(judged, key=fastest_first)]
    return {
        "about": dict(about or {}),
        "images": exact.images,
        "images_needed": images_needed(choice.max_drop),
        "enough_images": choice.enough_images,
        "max_drop": choice.max_drop,
        "latency_budget_ms": choice.latency_budget_ms,
        "picked": choice.picked,
        "reason": choice.reason,
        "points": {name: asdict(c) for name, c in choice.points.items()},
        "candidates": rows,
    }


def _judged(candidates: Iterable[Candidate], max_drop: float) -> list[Candidate]:
    return [replace(c, passes=c.low >= -max_drop) for c in candidates]


def _within_budget(passing: Sequence[Candidate], budget: float) -> Candidate:
    """The most accurate one; of equals the fastest."""
    within = [c for c in passing if c.latency_ms <= budget]
    if not within:
        fastest = min(passing, key=fastest_first)
        raise VerificationFailed(
            f"no candidate that passes takes at most {budget:g} ms: the fastest of the "
            f"{len(passing)} that pass ({fastest}) takes {fastest.latency_ms:.4g} ms. Allow that "
            "much, measure candidates with fewer steps or samples, or accept a larger drop"
        )
    return min(within, key=lambda c: (-c.accuracy, fastest_first(c)))


def _zero_step(candidates: Sequence[Candidate], precision: str) -> Candidate | None:
    """The one without the loop: the fastest that passes, or else that of the exact process's
    precision."""

    def rank(c: Candidate) -> tuple[Any, ...]:
        return not c.passes, not c.passes and c.precision != precision, fastest_first(c)

    return min((c for c in candidates if not c.steps), key=rank, default=None)


def _with_or_without(
    candidates: Sequence[Candidate], zero: Candidate, why_fast: str, max_drop: float, needed: int
) -> tuple[str, str]:
    """Pick one of fast and zero; returns it and the sentence that says why."""
    with_loop = [c for c in candidates if c.over_zero is not None]
    if not with_loop:
        return ZERO, "the zero-step point is served: nothing with the loop was compared with it"
    best = min(with_loop, key=lambda c: (-_lead(c)[1], fastest_first(c)))
    difference, low, high = _lead(best)
    figures = (
        f"the accuracy of the best of {plural(len(with_loop), 'candidate')} with it, {best}, is "
        f"{difference:+.2%} from that of the zero-step point (95 % interval {low:+.2%} to "
        f"{high:+.2%}) on {plural(zero.images, 'image')}"
    )
    if low > 0:
        return FAST, f"the loop is shown to help here: {figures}; {why_fast}"
    served = f"{zero.latency_ms:.3g} ms, accuracy {zero.accuracy:.2%}"
    if not zero.passes:
        served += f". It may be {max(-zero.low, 0.0):.2%} below the process as trained"
        if zero.images < needed:
            served += f": to show at most {max_drop:.2%}, {needed} images or more are needed"
    return ZERO, (
        f"the loop is not shown to help here: {figures}, so the zero-step point is served: {served}"
    )


def _lead(candidate: Candidate) -> tuple[float, float, float]:
    """Over the zero-step candidate, with its interval."""
    assert candidate.over_zero is not None
    return candidate.over_zero


def _why_fast(
    fast: Candidate, exact: Candidate, others: Sequence[Candidate], max_drop: float, needed: int
) -> str:
    passing = sum(c.passes for c in others)
    if fast != exact:
        return (
            f"{fast} is the fastest of {plural(passing, 'candidate')} that "
            f"{'passes' if passing == 1 else 'pass'}: {fast.latency_ms:.3g} ms instead of "
            f"{exact.latency_ms:.3g} ms, accuracy {fast.accuracy:.2%} instead of "
            f"{fast.accuracy + fast.drop:.2%} (difference {fast.low:+.2%} to {fast.high:+.2%} with "
            "95 % confidence)"
        )
    if not others:
        return "the exact process is served: nothing else was measured"
    if passing:
        return "the exact process is served: of the candidates that pass none is faster"
    if exact.images < needed:
        return (
            f"the exact process is served: {plural(exact.images, 'image')} cannot show that a "
            f"candidate loses at most {max_drop:.2%} of accuracy, {needed} or more are needed"
        )
    best = min(others, key=lambda c: (-c.low, fastest_first(c)))
    return (
        f"the exact process is served: no other candidate is shown to lose at most {max_drop:.2%} "
        f"of accuracy. The nearest, {best}, may lose {max(-best.low, 0.0):.2%} on these "
        f"{exact.images} images"
    )

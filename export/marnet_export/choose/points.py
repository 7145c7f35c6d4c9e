"""Choose which sampler, how many steps and how many samples to serve, and when to leave an image
open.

Decisions only: what is measured comes in as arrays and numbers. Accuracies, agreements, coverages
and risks are shares between 0 and 1.

A *candidate* is a way to run the loop, with what was measured of it. The *exact* one is the process
as it was trained; every other is compared with it on the same images. A candidate passes if its
accuracy is shown, with 95 % confidence, to be at most `max_drop` below the exact one's.

A candidate of no steps runs no loop. It is also what is served, unless a candidate with the loop is
shown, with the same confidence, to be more accurate than it.

Axes: N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_sdk.bundle import ZERO
from marnet_sdk.errors import InvalidInput, VerificationFailed, requires_extra
from marnet_train.measures import paired_interval

EXACT, FAST, BALANCED, BUDGET = "exact", "fast", "balanced", "budget"
_BETWEEN_STARTS = 3  # 2 to 4 do equally well; one start alone fails where 1 % of labels are wrong


def images_needed(max_drop: float, z: float = 1.96) -> int:
    """The fewest images on which a candidate passes that never differs from the exact process.

    Raises:
        InvalidInput: `max_drop` outside 0 .. 1.
    """
    _check_max_drop(max_drop)
    count = max(1, math.floor(z / max_drop) - 2)  # the interval's low end is -z / (N + 2)
    while paired_interval(0, 0, count, z)[1] < -max_drop:
        count += 1
    return count


@dataclass(frozen=True)
class Candidate:
    """One way to run the loop, and what was measured of it on N images."""

    sampler: str
    eta: float | None  # share of the noise that the sampler keeps, where it has such a setting
    steps: int
    samples: int
    precision: str
    latency_ms: float
    images: int  # N
    accuracy: float
    agreement: float  # share of labels that are the exact process's
    drop: float  # accuracy of the exact process - accuracy
    low: float  # interval of accuracy - accuracy of the exact process
    high: float
    passes: bool
    # accuracy - the zero-step candidate's, as measured, and its interval; None where there is none
    over_zero: tuple[float, float, float] | None = None

    @property
    def process(self) -> tuple[str, float | None, int, int, str]:
        """Return what is run, without what was measured."""
        return self.sampler, self.eta, self.steps, self.samples, self.precision

    def __str__(self) -> str:
        if not self.steps:
            return f"no loop, {self.precision}"
        eta = "" if self.eta is None else f" eta {self.eta:g}"
        counts = f"{plural(self.steps, 'step')}, {plural(self.samples, 'sample')}"
        return f"{self.sampler}{eta}, {counts}, {self.precision}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_candidate(
    labels: ArrayLike,
    reference: ArrayLike,
    truth: ArrayLike,
    *,
    sampler: str,
    steps: int,
    samples: int,
    latency_ms: float,
    max_drop: float,
    eta: float | None = None,
    precision: str = "fp32",
    without_loop: ArrayLike | None = None,
    z: float = 1.96,
) -> Candidate:
    """Compare a candidate's labels with the exact process's, on the same images.

    Args:
        labels: class of each image by the candidate, integers [N].
        reference: by the exact process, [N].
        truth: the true ones, [N].
        max_drop: how much accuracy may be lost, as a share.
        without_loop: by the zero-step candidate, [N].

    Raises:
        InvalidInput: arrays that do not fit, or a number outside its range.
    """
    _check_max_drop(max_drop)
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise InvalidInput(f"latency_ms: got {latency_ms}; expected a positive number")
    got, exact, true = _labels(labels, reference, truth)
    right = got == true
    difference, low, high = _difference(right, exact == true, z)
    over_zero = None
    if without_loop is not None and steps:
        over_zero = _difference(right, _labels(without_loop, true)[0] == true, z)
    return Candidate(
        sampler=sampler,
        eta=eta,
        steps=steps,
        samples=samples,
        precision=precision,
        latency_ms=float(latency_ms),
        images=len(true),
        accuracy=float(right.mean()),
        agreement=float((got == exact).mean()),
        drop=0.0 - difference,  # not -difference, which makes -0.0 of 0
        low=low,
        high=high,
        passes=low >= -max_drop,
        over_zero=over_zero,
    )


def _difference(
    right: NDArray[np.bool_], reference: NDArray[np.bool_], z: float
) -> tuple[float, float, float]:
    """`paired_interval` of what two processes have right, bool [N] each."""
    better, worse = int((right & ~reference).sum()), int((~right & reference).sum())
    return paired_interval(better, worse, len(right), z)


def evaluate_exact(labels: ArrayLike, truth: ArrayLike, **settings: Any) -> Candidate:
    """The exact process itself: it differs from itself by nothing, and passes by definition.

    Args:
        settings: those of `evaluate_candidate`.
    """
    measured = evaluate_candidate(labels, labels, truth, **settings)
    return replace(measured, low=0.0, high=0.0, passes=True)


def non_dominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those to which no other is preferable, fastest first.

    Another one is preferable if it is at least as fast and as accurate and better in one of the
    two; of equals, the one with fewer steps, then fewer samples, then the first by name.
    """
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=_fastest_first):
        if not kept or candidate.accuracy > kept[-1].accuracy:
            kept.append(candidate)
    return kept


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
        InvalidInput: `max_drop` outside 0 .. 1, or a budget that is no positive number.
        VerificationFailed: nothing that passes is within the budget.
    """
    needed = images_needed(max_drop)
    exact = _as_exact(exact)
    others = [c for c in _judged(candidates, max_drop) if c.process != exact.process]
    passing = [exact, *(c for c in others if c.passes)]
    helps = [c for c in (exact, *others) if c.over_zero is not None and c.over_zero[1] > 0]
    # Where the loop is shown to help, a process that is not would give that away again.
    worth = [c for c in passing if c in helps] or ([exact] if helps else passing)
    fast = min(worth, key=_fastest_first)
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


@dataclass(frozen=True, eq=False)  # == on arrays has no single answer
class RiskCoverage:
    """This is what answering only at a score of at least a threshold gives, highest threshold
    first.
    """

    threshold: NDArray[np.float64]  # the distinct scores, descending
    coverage: NDArray[np.float64]  # share of the images that are answered
    risk: NDArray[np.float64]  # share of the answers that are wrong
    answered: NDArray[np.int64]
    errors: NDArray[np.int64]


def risk_coverage(scores: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """Risk and coverage at every threshold; images of equal score are answered together.

    Args:
        scores: how sure each answer is, finite [N].
        correct: whether it is right, bool [N].

    Raises:
        InvalidInput: arrays that do not fit, or scores that are no numbers.
    """
    values, right = np.asarray(scores, np.float64), np.asarray(correct)
    if values.ndim != 1 or values.shape != right.shape or not values.size or right.dtype != bool:
        raise InvalidInput(
            f"got scores {values.shape} and correct {right.shape} ({right.dtype}); expected one "
            "score and one bool for each of at least one image"
        )
    if not np.isfinite(values).all():
        raise InvalidInput("scores: some are NaN or infinite; expected finite numbers")
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equals
    answered = last + 1
    errors = np.cumsum(~right[order])[last]
    return RiskCoverage(ordered[last], answered / len(values), errors / answered, answered, errors)


class RiskThreshold(NamedTuple):
    """Answer when the score is at least `threshold`, and the risk stays below the target."""

    threshold: float
    coverage: float
    risk: float  # as measured
    upper_bound: float  # of the risk, one-sided (Clopper and Pearson 1934), at most the target


def threshold_for_risk(
    scores: ArrayLike, correct: ArrayLike, target: float, confidence: float = 0.95
) -> RiskThreshold:
    """The lowest threshold whose risk is shown to be below `target`.

    Thresholds are tested one after another from the most confident down, each with the exact
    binomial tail, until one fails; since their order is fixed, each may use the whole error
    probability (fixed-sequence testing: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then
    test", 2021; for a classifier that may decline: Geifman and El-Yaniv, "Selective classification
    for deep neural networks", 2017). The first one tested has just enough answers that no error
    among them would show the risk. There, one error ends the sequence; so where there are more
    images, further sequences start at three, nine, ... times as many answers, and all share the
    error probability equally (multiple starts, ibid.).

    It holds for images like these: drawn from the same source, and used for nothing before.

    Args:
        scores, correct: as `risk_coverage` takes them.
        target: the risk that is asked for, between 0 and 1.
        confidence: with which the risk is below it.

    Raises:
        InvalidInput: `target` or `confidence` not between 0 and 1; bad arrays.
        VerificationFailed: too few images, or too many errors among the surest answers.
    """
    for name, value in (("target", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InvalidInput(f"{name}: got {value}; expected more than 0 and less than 1")
    with requires_extra("export", "scipy"):
        from scipy.stats import beta, binom
    curve = risk_coverage(scores, correct)
    images = int(curve.answered[-1])
    sizes, level = _starts(images, target, 1 - confidence)
    starts = np.searchsorted(curve.answered, [size for size in sizes if size <= images])
    shown = binom.cdf(curve.errors, curve.answered, target) <= level
    bounds = beta.ppf(1 - level, curve.errors + 1, curve.answered - curve.errors)
    bounds[curve.errors == curve.answered] = 1.0  # where the formula has no value
    ends = [start + _leading(shown[start:]) - 1 for start in starts if shown[start]]
    if not ends:
        asked = f"a risk below {target:.2%} with {confidence:.0%} confidence"
        raise VerificationFailed(_why_no_threshold(curve, starts, bounds, sizes[0], asked))
    chosen = max(ends)
    return RiskThreshold(
        float(curve.threshold[chosen]),
        float(curve.coverage[chosen]),
        float(curve.risk[chosen]),
        float(bounds[chosen]),
    )


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
    rows = [c.to_dict() | {"non_dominated": c in kept} for c in sorted(judged, key=_fastest_first)]
    return {
        "about": dict(about or {}),
        "images": exact.images,
        "images_needed": images_needed(choice.max_drop),
        "enough_images": choice.enough_images,
        "max_drop": choice.max_drop,
        "latency_budget_ms": choice.latency_budget_ms,
        "picked": choice.picked,
        "reason": choice.reason,
        "points": {name: c.to_dict() for name, c in choice.points.items()},
        "candidates": rows,
    }


def _fastest_first(candidate: Candidate) -> tuple[Any, ...]:
    """A total order: latency, accuracy, then what is simplest."""
    c = candidate
    eta = -1.0 if c.eta is None else c.eta
    return c.latency_ms, -c.accuracy, c.steps, c.samples, c.sampler, c.precision, eta


def _judged(candidates: Iterable[Candidate], max_drop: float) -> list[Candidate]:
    return [replace(c, passes=c.low >= -max_drop) for c in candidates]


def _as_exact(candidate: Candidate) -> Candidate:
    """It is what is served where nothing else passes, so it passes; its figures stay its own."""
    return replace(candidate, passes=True)


def _within_budget(passing: Sequence[Candidate], budget: float) -> Candidate:
    """The most accurate one; of equals the fastest."""
    if not (math.isfinite(budget) and budget > 0):
        raise InvalidInput(f"latency_budget_ms: got {budget}; expected a positive number")
    within = [c for c in passing if c.latency_ms <= budget]
    if not within:
        fastest = min(passing, key=_fastest_first)
        raise VerificationFailed(
            f"no candidate that passes takes at most {budget:g} ms: the fastest of the "
            f"{len(passing)} that pass ({fastest}) takes {fastest.latency_ms:.4g} ms. Allow that "
            "much, measure candidates with fewer steps or samples, or accept a larger drop"
        )
    return min(within, key=lambda c: (-c.accuracy, _fastest_first(c)))


def _zero_step(candidates: Sequence[Candidate], precision: str) -> Candidate | None:
    """The one without the loop: the fastest that passes, or else that of the exact process's
    precision."""

    def rank(c: Candidate) -> tuple[Any, ...]:
        return not c.passes, not c.passes and c.precision != precision, _fastest_first(c)

    return min((c for c in candidates if not c.steps), key=rank, default=None)


def _with_or_without(
    candidates: Sequence[Candidate], zero: Candidate, why_fast: str, max_drop: float, needed: int
) -> tuple[str, str]:
    """Pick one of fast and zero; returns it and the sentence that says why."""
    with_loop = [c for c in candidates if c.over_zero is not None]
    if not with_loop:
        return (
            ZERO,
            "the zero-step point is served: nothing with the loop was compared with it",
        )
    best = min(with_loop, key=lambda c: (-_lead(c)[1], _fastest_first(c)))
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
    best = min(others, key=lambda c: (-c.low, _fastest_first(c)))
    return (
        f"the exact process is served: no other candidate is shown to lose at most {max_drop:.2%} "
        f"of accuracy. The nearest, {best}, may lose {max(-best.low, 0.0):.2%} on these "
        f"{exact.images} images"
    )


def _starts(images: int, target: float, error: float) -> tuple[list[int], float]:
    """Numbers of answers at which a sequence of tests starts, and the error probability of each.

    The first is the smallest at which no error shows the risk. Known before any answer is seen.
    """
    ratio = max(1.0, images / _answers_needed(target, error))
    count = 1 + math.floor(math.log(ratio, _BETWEEN_STARTS))
    first = _answers_needed(target, error / count)
    return [first * _BETWEEN_STARTS**i for i in range(count)], error / count


def _answers_needed(target: float, error: float) -> int:
    """The smallest n for which n answers without an error show a risk below `target`."""
    from scipy.stats import binom

    count = max(1, math.floor(math.log(error) / math.log1p(-target)))  # (1 - target)^n = error
    while binom.cdf(0, count, target) > error:
        count += 1
    return count


def _leading(shown: NDArray[np.bool_]) -> int:
    """Count how many hold before the first that does not."""
    return len(shown) if shown.all() else int(shown.argmin())


def _why_no_threshold(
    curve: RiskCoverage,
    starts: NDArray[np.intp],
    bounds: NDArray[np.float64],
    needed: int,
    asked: str,
) -> str:
    images = int(curve.answered[-1])
    if not starts.size:
        return (
            f"{plural(images, 'image')} cannot show {asked}: {needed} or more are needed, even "
            "without an error among them. Give more images or allow a larger risk"
        )
    best = starts[bounds[starts].argmin()]
    return (
        f"the score does not show {asked}: of the {curve.answered[best]} surest answers "
        f"{curve.errors[best]} are wrong, which only shows one below {bounds[best]:.2%}. Allow a "
        "larger risk, give more images, or look at these answers: their labels may be wrong"
    )


def _labels(*arrays: ArrayLike) -> tuple[NDArray[np.int64], ...]:
    labels = [np.asarray(array) for array in arrays]
    shapes = [array.shape for array in labels]
    if len(set(shapes)) > 1 or labels[0].ndim != 1 or not labels[0].size:
        raise InvalidInput(f"labels: got shapes {shapes}; expected the same [N] for all, N > 0")
    if any(array.dtype.kind not in "iu" for array in labels):
        raise InvalidInput(f"labels: got {[str(a.dtype) for a in labels]}; expected integers")
    return tuple(array.astype(np.int64) for array in labels)


def _check_max_drop(max_drop: float) -> None:
    if not 0 < max_drop < 1:
        raise InvalidInput(
            f"max_drop: got {max_drop}; expected a share of accuracy, more than 0 and less than 1 "
            "(0.01 is one point)"
        )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

"""What is chosen passes, what cannot be shown is not claimed, and the risk asked for is kept."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64

from marnet_export.choose.candidates import (
    Candidate,
    evaluate_candidate,
    evaluate_exact,
    images_needed,
    non_dominated,
)
from marnet_export.choose.points import choose, pareto_report
from marnet_export.choose.risk import risk_coverage, threshold_for_risk
from marnet_sdk.errors import VerificationFailed
from marnet_train.measures import paired_interval

# Of ten images the exact process has seven right.
TRUTH = np.zeros(10, np.int64)
EXACT_LABELS = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2])
SETTING: dict[str, Any] = {
    "sampler": "ddim", "eta": 0.0, "steps": 10, "samples": 2, "latency_ms": 4.0, "max_drop": 0.3,
}  # fmt: skip


def candidate(latency: float, accuracy: float, **fields: Any) -> Candidate:
    """One that passes, measured on 1,000 images."""
    values: dict[str, Any] = {
        "sampler": "ddim", "eta": 0.0, "steps": 10, "samples": 1, "precision": "fp32",
        "latency_ms": latency, "images": 1000, "accuracy": accuracy, "agreement": 0.99,
        "drop": 0.9 - accuracy, "low": -0.004, "high": 0.004, "passes": True,
    }  # fmt: skip
    return Candidate(**(values | fields))


EXACT = candidate(100.0, 0.9, sampler="ddpm", eta=None, steps=1000)


def candidates(most: int = 8) -> st.SearchStrategy[list[Candidate]]:
    """Different processes, with coarse values so that there are ties."""
    one = st.builds(
        lambda latency, accuracy, steps, low: candidate(
            float(latency), accuracy / 20, steps=steps, low=-low / 200, passes=False
        ),
        st.integers(1, 12),
        st.integers(10, 20),
        st.integers(1, 40),
        st.integers(0, 6),
    )
    return st.lists(one, max_size=most, unique_by=lambda c: c.process)


# --- how many images


@pytest.mark.parametrize(("drop", "images"), [(0.01, 194), (0.02, 96), (0.005, 390), (0.9, 1)])
def test_images_needed_by_hand(drop, images):
    assert images_needed(drop) == images


@given(st.floats(1e-4, 0.999))
def test_images_needed_is_the_smallest_number_that_can_pass(drop):
    images = images_needed(drop)
    assert paired_interval(0, 0, images)[1] >= -drop
    assert images == 1 or paired_interval(0, 0, images - 1)[1] < -drop


# --- candidates


def test_a_candidate_is_measured_against_the_exact_process():
    labels = EXACT_LABELS.copy()
    labels[0] = 3  # worse
    labels[7] = 0  # better
    labels[8] = 0  # better
    labels[9] = 5  # wrong in another way
    got = evaluate_candidate(labels, EXACT_LABELS, TRUTH, **SETTING, precision="bf16")
    _, low, high = paired_interval(2, 1, 10)
    assert (got.low, got.high) == (low, high)
    assert got.accuracy == pytest.approx(0.8)
    assert got.agreement == pytest.approx(0.6)
    assert got.drop == pytest.approx(-0.1)
    assert got.passes == (low >= -0.3)
    assert got.images == 10
    assert got.process == ("ddim", 0.0, 10, 2, "bf16")
    assert str(got) == "ddim eta 0, 10 steps, 2 samples, bf16"
    assert json.loads(json.dumps(asdict(got)))["agreement"] == pytest.approx(0.6)


def test_the_exact_process_passes_on_any_set():
    strict = SETTING | {"max_drop": 0.001}
    got = evaluate_exact(EXACT_LABELS, TRUTH, **strict)
    assert got.passes
    assert (got.agreement, got.drop, got.low, got.high) == (1.0, 0.0, 0.0, 0.0)
    same = evaluate_candidate(EXACT_LABELS, EXACT_LABELS, TRUTH, **strict)
    assert not same.passes  # ten images show nothing
    assert math.copysign(1, same.drop) == 1  # no "-0.0" in a report


# --- what dominates what


def is_preferable(one: Candidate, other: Candidate) -> bool:
    better = one.latency_ms < other.latency_ms or one.accuracy > other.accuracy
    return better and one.latency_ms <= other.latency_ms and one.accuracy >= other.accuracy


@given(candidates(12))
def test_nothing_is_preferable_to_the_kept_and_something_to_every_other(measured):
    kept = non_dominated(measured)
    for one in kept:
        assert not any(is_preferable(other, one) for other in measured)
    for one in measured:
        if one not in kept:
            twins = [
                k for k in kept if (k.latency_ms, k.accuracy) == (one.latency_ms, one.accuracy)
            ]
            assert any(is_preferable(k, one) for k in kept) or twins
            assert all((t.steps, t.samples) <= (one.steps, one.samples) for t in twins)
    assert kept == non_dominated(reversed(measured))  # the order given does not matter
    assert [k.latency_ms for k in kept] == sorted({k.latency_ms for k in kept})


def test_of_equals_the_simplest_stays():
    equals = [candidate(5, 0.9, steps=s, samples=k) for s, k in ((9, 1), (7, 4), (7, 2))]
    assert [(c.steps, c.samples) for c in non_dominated(equals)] == [(7, 2)]


# --- the choice


def test_points_by_hand():
    fails = candidate(2, 0.80, steps=1, low=-0.12)
    quick = candidate(4, 0.885, steps=5)
    good = candidate(18, 0.895, steps=20)
    dominated = candidate(19, 0.89, steps=25)
    late = candidate(21, 0.90, steps=30)  # the geometric mean of 4 and 100 is 20
    got = choose([late, fails, good, dominated, quick], EXACT, 0.01)
    points = {name: c.steps for name, c in got.points.items()}
    assert points == {"exact": 1000, "fast": 5, "balanced": 20}
    assert got.picked == "fast"
    assert got.enough_images
    assert got.reason == (
        "ddim eta 0, 5 steps, 1 sample, fp32 is the fastest of 4 candidates that pass: 4 ms "
        "instead of 100 ms, accuracy 88.50% instead of 90.00% (difference -0.40% to +0.40% with "
        "95 % confidence)"
    )


@pytest.mark.parametrize(
    ("budget", "picked", "steps"),
    [(5, "fast", 5), (18, "balanced", 20), (40, "budget", 30), (1000, "exact", 1000)],
)
def test_a_budget_picks_the_most_accurate_within_it(budget, picked, steps):
    measured = [candidate(4, 0.885, steps=5), candidate(18, 0.895, steps=20)]
    measured += [candidate(30, 0.897, steps=30)]
    got = choose(measured, replace(EXACT, accuracy=0.9), 0.01, budget)
    assert got.picked == picked
    assert got.points[picked].steps == steps
    assert f"passes and takes at most {budget} ms" in got.reason
    assert ("budget" in got.points) == (picked == "budget")


def test_a_budget_that_nothing_keeps_is_refused_with_the_fastest_that_passes():
    measured = [candidate(2, 0.80, low=-0.12), candidate(4.25, 0.9, steps=5)]
    message = (
        r"takes at most 3 ms: the fastest of the 2 that pass \(ddim eta 0, 5 steps, .* 4.25 ms"
    )
    with pytest.raises(VerificationFailed, match=message):
        choose(measured, EXACT, 0.01, 3)


ZERO = candidate(1, 0.89, sampler="none", eta=None, steps=0, low=-0.02)


@pytest.mark.parametrize("low", [-0.005, 0.0])
def test_no_loop_is_served_where_none_is_shown_to_help(low):
    exact = replace(EXACT, over_zero=(0.002, -0.02, 0.03))
    quick = candidate(4, 0.9, steps=5, over_zero=(0.01, low, 0.02))
    got = choose([quick, ZERO], exact, 0.01)
    assert got.points["zero"] == replace(ZERO, passes=False)
    assert (got.picked, got.points["fast"]) == ("zero", quick)
    assert got.reason == (
        "the loop is not shown to help here: the accuracy of the best of 2 candidates with it, "
        "ddim eta 0, 5 steps, 1 sample, fp32, is +1.00% from that of the zero-step point (95 % "
        f"interval {low:+.2%} to +2.00%) on 1000 images, so the zero-step point is served: 1 ms, "
        "accuracy 89.00%. It may be 2.00% below the process as trained"
    )


def test_a_loop_that_is_shown_to_help_is_served_with_the_figures():
    quick = candidate(4, 0.91, steps=5, over_zero=(0.02, 0.001, 0.04))
    late = candidate(40, 0.95, steps=50, over_zero=(0.06, -0.001, 0.12))
    exact = replace(EXACT, over_zero=(0.01, -0.01, 0.03))
    got = choose([quick, late, ZERO], exact, 0.01)
    assert got.picked == "fast"
    assert got.points["fast"] == quick
    assert got.points["zero"].process == ZERO.process
    assert got.reason.startswith(
        "the loop is shown to help here: the accuracy of the best of 3 candidates with it, ddim "
        "eta 0, 5 steps, 1 sample, fp32, is +2.00% from that of the zero-step point (95 % interval "
        "+0.10% to +4.00%) on 1000 images; ddim eta 0, 5 steps, 1 sample, fp32 is the fastest of 2 "
        "candidates that pass"
    )


def test_where_the_loop_helps_fast_is_not_what_gives_that_away_again():
    passing = replace(ZERO, low=-0.005)
    one_step = candidate(2, 0.9, steps=1, over_zero=(0.01, -0.002, 0.02))
    quick = candidate(4, 0.91, steps=5, over_zero=(0.02, 0.001, 0.04))
    got = choose([passing, one_step, quick], EXACT, 0.01)
    assert (got.picked, got.points["fast"]) == ("fast", quick)
    assert choose([passing, one_step, quick], EXACT, 0.01, 3).points["budget"] == one_step


def test_no_loop_is_a_candidate_like_the_others():
    passing = replace(ZERO, low=-0.005)
    quick = candidate(4, 0.895, steps=5, over_zero=(0.005, -0.01, 0.02))
    got = choose([quick, passing], EXACT, 0.01)
    assert got.points["fast"] == got.points["zero"] == passing
    assert got.picked == "zero"
    assert "It may be" not in got.reason
    assert str(passing) == "no loop, fp32"
    for budget, picked in ((2, "fast"), (5, "balanced"), (200, "exact")):
        assert choose([quick, passing], EXACT, 0.01, budget).picked == picked
    with pytest.raises(VerificationFailed, match="no candidate that passes takes at most 2 ms"):
        choose([quick, ZERO], EXACT, 0.01, 2)  # it does not pass


def test_few_images_serve_no_loop_and_say_how_many_would_show_its_loss():
    few = replace(ZERO, images=90, low=-0.03)
    got = choose([few], replace(EXACT, images=90, over_zero=(0.01, -0.02, 0.04)), 0.01)
    assert got.picked == "zero"
    assert "It may be 3.00% below the process as trained: to show at most 1.00%, 194" in got.reason
    assert not got.enough_images


def test_of_several_precisions_no_loop_is_taken_where_it_passes_or_else_as_exact():
    half = replace(ZERO, precision="bf16", latency_ms=0.5)
    assert choose([half, ZERO], EXACT, 0.01).points["zero"].precision == "fp32"
    passing = replace(half, low=-0.001)
    assert choose([passing, ZERO], EXACT, 0.01).points["zero"] == passing


def test_what_has_right_more_often_than_no_loop_is_counted_image_by_image():
    zero = EXACT_LABELS.copy()
    zero[:3] = 4  # wrong where the candidate is right
    zero[9] = 0  # the reverse
    got = evaluate_candidate(EXACT_LABELS, EXACT_LABELS, TRUTH, **SETTING, without_loop=zero)
    assert got.over_zero == paired_interval(3, 1, 10)
    exact = evaluate_exact(EXACT_LABELS, TRUTH, **SETTING, without_loop=zero)
    assert exact.over_zero == paired_interval(3, 1, 10)
    none = evaluate_candidate(
        zero, EXACT_LABELS, TRUTH, **SETTING | {"steps": 0}, without_loop=zero
    )
    assert none.over_zero is None


@given(candidates(), st.sampled_from([0.004, 0.01, 0.03]), st.none() | st.integers(1, 120))
def test_what_is_chosen_passes(measured, drop, budget):
    try:
        got = choose(measured, EXACT, drop, budget)
    except VerificationFailed:
        assert budget < 100
        assert not any(c.low >= -drop and c.latency_ms <= budget for c in measured)
        return
    for name, point in got.points.items():
        assert point.passes
        assert name == "exact" or point.process == EXACT.process or point.low >= -drop
    exact, fast, balanced = (got.points[name] for name in ("exact", "fast", "balanced"))
    assert exact.process == EXACT.process
    assert fast.latency_ms <= balanced.latency_ms <= exact.latency_ms
    assert fast.accuracy <= balanced.accuracy
    if budget is not None:
        assert got.points[got.picked].latency_ms <= budget
    assert got == choose([*reversed(measured), EXACT], EXACT, drop, budget)


@given(candidates())
def test_a_larger_drop_is_never_slower(measured):
    chosen = [choose(measured, EXACT, drop).points["fast"] for drop in (0.004, 0.01, 0.02, 0.05)]
    latencies = [c.latency_ms for c in chosen]
    assert latencies == sorted(latencies, reverse=True)


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ([], "nothing else was measured"),
        ([candidate(200, 0.95)], "of the candidates that pass none is faster"),
        (
            [candidate(2, 0.85, steps=1, low=-0.2), candidate(3, 0.89, steps=3, low=-0.03)],
            r"no other candidate is shown to lose at most 1.00% of accuracy. The nearest, "
            r"ddim eta 0, 3 steps, 1 sample, fp32, may lose 3.00% on these 1000 images",
        ),
    ],
)
def test_the_exact_process_is_served_with_a_reason(measured, reason):
    got = choose(measured, EXACT, 0.01)
    assert got.points["fast"] == got.points["balanced"] == got.points["exact"]
    assert re.search(reason, got.reason)


def test_a_set_that_is_too_small_shows_nothing_and_says_how_many_are_needed():
    limits = SETTING | {"max_drop": 0.01}
    exact = evaluate_exact(EXACT_LABELS, TRUTH, **limits | {"steps": 1000, "latency_ms": 90.0})
    same = evaluate_candidate(EXACT_LABELS, EXACT_LABELS, TRUTH, **limits)
    got = choose([same], exact, 0.01)
    assert not got.enough_images
    assert got.points["fast"] == got.points["balanced"] == got.points["exact"] == exact
    assert "10 images cannot show that a candidate loses at most 1.00%" in got.reason
    assert "194 or more are needed" in got.reason
    enough = evaluate_candidate(*[np.zeros(194, int)] * 3, **limits)
    assert enough.passes


# --- when to answer


def curve_slowly(scores: list[float], correct: list[bool]) -> list[tuple[float, float, float]]:
    rows = []
    for threshold in sorted(set(scores), reverse=True):
        answers = [ok for score, ok in zip(scores, correct, strict=True) if score >= threshold]
        rows.append((threshold, len(answers) / len(scores), 1 - sum(answers) / len(answers)))
    return rows


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_risk_and_coverage_are_those_of_a_loop_over_thresholds(pairs):
    scores, correct = [pair[0] / 6 for pair in pairs], [pair[1] for pair in pairs]
    got = risk_coverage(np.array(scores), np.array(correct))
    rows = np.stack([got.threshold, got.coverage, got.risk], axis=1)
    np.testing.assert_allclose(rows, curve_slowly(scores, correct), atol=FLOAT64)
    assert got.coverage[-1] == 1


def test_a_threshold_by_hand():
    """At 10 % and 95 %, (1 - 0.1)^29 = 0.047: 29 answers without an error show it, 28 do not."""
    scores = np.arange(50, 0, -1) / 50
    correct = np.arange(50) < 29  # all after the 29th are wrong
    got = threshold_for_risk(scores, correct, 0.1)
    assert got.threshold == scores[28]
    assert got.coverage == pytest.approx(29 / 50)
    assert got.risk == 0
    assert got.upper_bound == pytest.approx(1 - 0.05 ** (1 / 29))  # Clopper and Pearson
    with pytest.raises(VerificationFailed, match="of the 29 surest answers 1 are wrong"):
        threshold_for_risk(scores, np.arange(50) < 28, 0.1)


def test_one_early_error_does_not_end_the_search():
    """The sequence that starts first fails at its start; a later one goes down to the last."""
    correct = np.ones(400, bool)
    correct[3] = False
    got = threshold_for_risk(np.linspace(1, 0, 400), correct, 0.05)
    assert got.coverage == 1
    assert got.upper_bound <= 0.05


@given(
    st.integers(20, 400),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.integers(0, 2**32),
)
def test_a_threshold_is_on_the_curve_and_its_bound_below_the_target(count, target, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 40, count) / 40  # with ties
    correct = rng.random(count) < 0.8 + 0.2 * scores
    try:
        got = threshold_for_risk(scores, correct, target)
    except VerificationFailed:
        return
    answered = scores >= got.threshold
    assert got.coverage == pytest.approx(answered.mean())
    assert got.risk == pytest.approx(1 - correct[answered].mean())
    assert got.risk <= got.upper_bound <= target + FLOAT64


@pytest.mark.parametrize("levels", [None, 16])  # continuous scores, or the shares of 16 votes
def test_the_risk_is_kept_in_95_of_100_sets(levels):
    """The error probability falls linearly with the score u, so the risk above t is known."""
    rng = np.random.default_rng(0)
    repetitions, target, kept, found = 300, 0.08, 0, 0
    for _ in range(repetitions):
        score = rng.random(800)
        if levels:
            score = np.ceil(score * levels) / levels
        correct = rng.random(800) >= 0.2 * (1 - score)
        try:
            threshold = threshold_for_risk(score, correct, target).threshold
        except VerificationFailed:
            kept += 1
            continue
        found += 1
        grid = np.arange(1, levels + 1) / levels if levels else np.linspace(threshold, 1, 3)
        kept += np.mean(0.2 * (1 - grid[grid >= threshold])) <= target
    assert kept >= 0.95 * repetitions
    assert found >= 0.8 * repetitions


def test_too_few_images_show_no_risk():
    message = "58 images cannot show a risk below 5.00% with 95% confidence: 59 or more are needed"
    with pytest.raises(VerificationFailed, match=message):
        threshold_for_risk(np.linspace(0, 1, 58), np.ones(58, bool), 0.05)
    assert threshold_for_risk(np.linspace(0, 1, 59), np.ones(59, bool), 0.05).coverage == 1


def test_a_score_that_is_wrong_where_it_is_sure_is_refused():
    message = r"does not show a risk below 5.00% .* surest answers .* labels may be wrong"
    with pytest.raises(VerificationFailed, match=message):
        threshold_for_risk(np.linspace(0, 1, 500), np.zeros(500, bool), 0.05)


# --- reports and pictures


def measured_on(count: int) -> tuple[list[Candidate], Candidate]:
    """Simulated: fewer steps and fewer samples change more labels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, count)
    reference = np.where(rng.random(count) < 0.95, truth, (truth + 1) % 10)
    limits: dict[str, Any] = {"max_drop": 0.01}
    process: dict[str, Any]
    found = []
    for sampler in ("ddim", "ddpm", "dpmpp"):
        for steps, samples in ((1, 1), (2, 1), (5, 1), (20, 1), (5, 4), (20, 4)):
            changed = rng.random(count) < 0.25 / steps**1.2 / samples**0.5
            labels = np.where(changed, rng.integers(0, 10, count), reference)
            latency = 1.5 + 0.12 * steps * samples**0.7 + 0.01 * len(sampler)
            process = {"sampler": sampler, "steps": steps, "samples": samples}
            found.append(
                evaluate_candidate(
                    labels, reference, truth, latency_ms=latency, **process, **limits
                )
            )
    process = {"sampler": "ddpm", "steps": 100, "samples": 1, "latency_ms": 14.0}
    return found, evaluate_exact(reference, truth, **process, **limits)


def test_a_report_is_plain_and_complete():
    found, exact = measured_on(2000)
    choice = choose(found, exact, 0.01, latency_budget_ms=10)
    report = pareto_report(found, choice, {"machine": "a laptop"})
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert len(report["candidates"]) == len(found) + 1
    assert report["points"][report["picked"]]["latency_ms"] <= 10
    kept = [row for row in report["candidates"] if row["non_dominated"]]
    assert len(kept) == len(non_dominated([*found, exact]))
    assert report["about"] == {"machine": "a laptop"}
    assert (report["images"], report["images_needed"]) == (2000, 194)

"""The loop scenario: our reverse loop beside the plain one in every framework, x_v to logits.

All candidates of a batch size run in one process, call by call in turn, on the same x_v, noise and
sampler. Each is held to the float32 model first; each ratio has a bootstrap interval.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marnet_bench.limits import BYTES, PRECISIONS, Limits, higher, measure_limits
from marnet_bench.loop_candidates import (
    CHECKED,
    Candidate,
    Missing,
    open_candidates,
    random_features,
    why_missing,
)
from marnet_bench.machine import describe_machine
from marnet_bench.plain_loop import Logits, make_problem, reference
from marnet_bench.timing import Seconds, drift, interleave, speedup_interval, summarise
from marnet_export.lower.plan import SamplingPlan, make_plan
from marnet_sdk.console import say, track
from marnet_sdk.cpus import check_threads, cpus
from marnet_sdk.errors import BackendUnavailable, InvalidInput
from marnet_sdk.noise.tables import Floats
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.marnet import MARNet, MarnetConfig

SAME_LABELS = 0.995  # agreement with float32 from which a precision counts as the same classifier
_CHUNK = 64  # x_v that are checked at a time
_LARGEST_ERROR = 1e-2  # of float32 logits, relative to the largest one: more is another loop
_PAUSE = 0.01  # seconds between two calls, for threads that still spin after one


@dataclass(frozen=True)
class Check:
    """A candidate's logits beside those of the float32 model."""

    agreement: float  # share of the same labels
    relative_error: float  # largest difference over the largest logit
    batch_effect: float = 0.0  # largest change of a logit when its x_v is alone, likewise relative
    checking_s: float = 0.0  # compilers work at the first call with so many rows


def paper_model(labels: int = 100) -> MARNet:
    """A MARNet of the paper's widths with fresh weights, whose loop contracts; its encoders, which
    nothing here runs, are as small as the widths allow."""
    dim = MarnetConfig.dim
    vision = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic"}
    vision |= {"depths": [1], "hidden_sizes": [dim]}
    text = {"model_type": "bert", "num_hidden_layers": 1, "intermediate_size": 8}
    text |= {"vocab_size": 8, "hidden_size": dim, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MarnetConfig(vision, text, tuple(f"class {i}" for i in range(labels)))
        return MARNet(config).eval()


def run_loop(
    source: MARNet | Path | None,
    *,
    batches: Sequence[int],
    steps: int | None = None,
    warmup: int,
    duration: float,
    threads: int | None = None,
    sampler: str = "ddpm",
    min_rounds: int = 10,
) -> dict[str, Any]:
    """Measure our loop and its peers.

    Args:
        source: a model, or a checkpoint; None: the paper's sizes with random weights.
        steps: of the sampler; None: as many as the model was trained with.
        duration: seconds for each batch size. min_rounds: calls of each candidate, at least.
        threads: cores for every candidate; None: all that this process may use.

    Returns:
        The report: plain data, as it is written to JSON.

    Raises:
        InvalidInput: the denoiser is progressive, or the chain carries another one on.
    """
    threads = check_threads(threads) or cpus().threads
    model, described = _load(source)
    steps = model.config.schedule.steps if steps is None else steps
    problem = make_problem(model, sampler, steps)
    plan = make_plan(model)
    with _torch_threads(threads), ExitStack() as stack:
        say("measuring how fast this machine reads and multiplies")
        limits = measure_limits(_sizes(plan), threads)
        payloads = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("opening every candidate")
        opened = list(open_candidates(problem, plan, payloads, threads))
        x_v = random_features(model, max(CHECKED, *batches))
        candidates, checks, missing = _check(opened, reference(problem), x_v, batches)
        say(_about_opening(checks))
        groups = {}
        for batch in batches:
            say(f"batch {batch}: {len(candidates)} candidates in turn, {duration:g} s or more")
            groups[batch] = _time(candidates, x_v[:batch], warmup, duration, min_rounds)
        limits = higher(limits, measure_limits(_sizes(plan), threads))
    lines = [
        _line(candidate, checks[candidate], batch, seconds, plan, limits, steps)
        for batch, taken in groups.items()
        for candidate, seconds in taken.items()
    ]
    return {
        "scenario": "loop",
        "model": described,
        "sampler": sampler,
        "steps": steps,
        "batches": list(batches),
        "threads": threads,
        "checked_images": CHECKED,
        "plan": _describe_plan(plan),
        "limits": limits.described(),
        "lines": lines,
        "ratios": [r for b, taken in groups.items() for r in _equal_precision(b, taken)],
        "best": [r for b, taken in groups.items() for r in _best(b, taken, checks)],
        "missing": [asdict(m) for m in missing],
        "environment": {n: os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "machine": describe_machine(),
    }


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(source: MARNet | Path | None) -> tuple[MARNet, dict[str, Any]]:
    """The model, and what the report says of it."""
    name, sha256 = "random weights", None
    if isinstance(source, Path):
        checkpoint = load_checkpoint(source)
        name, sha256, source = source.name, checkpoint.sha256, checkpoint.model
    model = (source or paper_model()).eval()
    denoiser = model.denoiser
    if denoiser.progressive:
        raise InvalidInput(
            f"--scenario loop: {name} has a progressive denoiser, and the peers have no loop for "
            "one; name another --checkpoint, or measure its bundle with marnet-bench"
        )
    if getattr(model.config, "handover", "restart") == "carry":
        raise InvalidInput(
            f"--scenario loop: the chain of {name} starts from what stage 1 left, and the peers "
            "start from noise; name another --checkpoint, or measure its bundle with marnet-bench"
        )
    return model, {
        "name": name,
        "checkpoint_sha256": sha256,
        "condition": model.vision.dim,
        "dim": denoiser.dim,
        "hidden": denoiser.layer2.out_features,
        "time_dim": denoiser.time.dim,
        "classes": len(model.config.labels),
        "fusion": model.config.fusion,
    }


# Checking


def _check(
    opened: Sequence[Candidate | Missing], expected: Logits, x_v: Floats, batches: Sequence[int]
) -> tuple[list[Candidate], dict[Candidate, Check], list[Missing]]:
    """Hold every candidate to the float32 model; what fails or differs is not timed."""
    chunks = [slice(i, min(i + _CHUNK, CHECKED)) for i in range(0, CHECKED, _CHUNK)]
    wanted = np.concatenate([expected(x_v[chunk]) for chunk in chunks])
    by_batch = {batch: expected(x_v[:batch]) for batch in batches}
    missing = [c for c in opened if isinstance(c, Missing)]
    checks: dict[Candidate, Check] = {}
    for candidate in track([c for c in opened if isinstance(c, Candidate)], "check"):
        started = time.perf_counter()
        try:
            got = np.concatenate([candidate.logits(x_v[chunk]) for chunk in chunks])
            check = compare(got, wanted)
            for batch, logits in by_batch.items():  # each may be another kernel
                found = compare(candidate.logits(x_v[:batch]), logits)
                largest = max(check.relative_error, found.relative_error)
                check = replace(check, relative_error=largest)
            alone = np.concatenate([candidate.logits(x_v[i : i + 1]) for i in range(8)])
            check = replace(check, batch_effect=compare(alone, got[:8]).relative_error)
            _refuse_other_loops(candidate, check)
            checks[candidate] = replace(check, checking_s=time.perf_counter() - started)
        except Exception as error:  # compilers fail at the first call
            missing.append(Missing(candidate.model, candidate.precision, why_missing(error)))
    return list(checks), checks, missing


def _about_opening(checks: Mapping[Candidate, Check], named: int = 3) -> str:
    """Say how long it took until all were ready, and which took longest."""
    taken = {c: c.opening_s + check.checking_s for c, check in checks.items()}
    slowest = sorted(taken, key=lambda c: -taken[c])[:named]
    each = ", ".join(f"{c.model} {c.precision} {taken[c]:.0f} s" for c in slowest)
    return f"opened and checked {len(taken)} candidates in {sum(taken.values()):.0f} s: {each}"


def compare(got: Floats, wanted: Floats) -> Check:
    """Logits [B, C] of a candidate beside the float32 model's."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        raise BackendUnavailable("its logits are not finite, or not one row for each x_v")
    agreement = float((got.argmax(axis=1) == wanted.argmax(axis=1)).mean())
    return Check(agreement, float(np.abs(got - wanted).max() / np.abs(wanted).max()))


def _refuse_other_loops(candidate: Candidate, check: Check) -> None:
    if candidate.precision == "fp32" and check.relative_error > _LARGEST_ERROR:
        raise BackendUnavailable(
            f"its float32 logits are off by {check.relative_error:.1e}: not timed"
        )


# Timing

Taken = dict[Candidate, Seconds]


def _time(
    candidates: Sequence[Candidate], x_v: Floats, warmup: int, duration: float, min_rounds: int
) -> Taken:
    """Seconds of every call; between two of them nothing runs for a moment."""
    calls: dict[str, Callable[[], object]] = {}
    for i, candidate in enumerate(candidates):
        calls[f"pause {i}"] = lambda: time.sleep(_PAUSE)
        calls[f"{i}"] = lambda logits=candidate.logits: logits(x_v)
    taken = interleave(calls, warmup=warmup, duration=duration, min_rounds=min_rounds)
    return {candidate: taken[f"{i}"] for i, candidate in enumerate(candidates)}


def _line(
    candidate: Candidate,
    check: Check,
    batch: int,
    seconds: Seconds,
    plan: SamplingPlan,
    limits: Limits,
    steps: int,
) -> dict[str, Any]:
    """One candidate at one batch size."""
    weights, work = _weights(plan, candidate.ours), _steps_of_work(plan, candidate.ours, steps)
    bound = limits.bound_ms(
        weights, weights, candidate.precision, batch, work, compute=candidate.compute
    )
    summary = asdict(summarise(seconds, batch))
    return {
        "model": candidate.model,
        "ours": candidate.ours,
        "precision": candidate.precision,
        "batch": batch,
        **asdict(check),
        "opening_s": candidate.opening_s,
        **summary,
        "drift": drift(seconds),
        "bound_ms": bound,
        "share_of_bound": bound / summary["p50_ms"],
        "seconds": [round(s, 7) for s in seconds.tolist()],
    }


# Ratios


def _equal_precision(batch: int, taken: Taken) -> list[dict[str, Any]]:
    """Each of ours over each peer of the same precision; says which pair is the best of each.

    No peer has fp16 on a CPU, so that is held to those in float32 and bf16.
    """
    found = []
    for precision in PRECISIONS:
        alike = ("fp32", "bf16") if precision == "fp16" else (precision,)
        ours = [c for c in taken if c.ours and c.precision == precision]
        peers = [c for c in taken if not c.ours and c.precision in alike]
        fastest = _fastest(taken, ours), _fastest(taken, peers)
        for own in ours:
            for peer in peers:
                best = {"best_ours": own == fastest[0], "best_peer": peer == fastest[1]}
                found.append(_ratio(batch, taken, own, peer) | best)
    return found


def _best(batch: int, taken: Taken, checks: dict[Candidate, Check]) -> list[dict[str, Any]]:
    """Our fastest that answers as float32 does, over the fastest peers of which that is true."""
    same = [c for c in taken if checks[c].agreement >= SAME_LABELS]
    ours = _fastest(taken, [c for c in same if c.ours])
    peers = {
        "best float32 peer": [c for c in same if not c.ours and c.precision == "fp32"],
        "best peer": [c for c in same if not c.ours],
        "fastest peer, whatever it answers": [c for c in taken if not c.ours],
    }
    found = []
    for kind, candidates in peers.items():
        peer = _fastest(taken, candidates)
        if ours is not None and peer is not None:
            found.append(_ratio(batch, taken, ours, peer) | {"against": kind})
    return found


def _fastest(taken: Taken, candidates: Sequence[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda c: float(np.median(taken[c])), default=None)


def _ratio(batch: int, taken: Taken, own: Candidate, peer: Candidate) -> dict[str, Any]:
    ratio, low, high = speedup_interval(taken[peer], taken[own])
    return {
        "batch": batch,
        "ours": own.model,
        "ours_precision": own.precision,
        "peer": peer.model,
        "peer_precision": peer.precision,
        "ratio": ratio,
        "low": low,
        "high": high,
    }


# What the report says of the machine and the loop


def _weights(plan: SamplingPlan, ours: bool) -> int:
    """Weights that a step reads: each takes part in one multiply-add per image."""
    return plan.multiply_adds if ours else plan.plain_multiply_adds


def _steps_of_work(plan: SamplingPlan, ours: bool, steps: int) -> float:
    """The work of a whole loop, in steps inside of it."""
    return steps + _beside_the_steps(plan) / plan.multiply_adds if ours else steps


def _beside_the_steps(plan: SamplingPlan) -> int:
    """Count the multiply-adds of the condition, and of the estimate in place of the last carry."""
    return plan.condition_weight.size + plan.output[0].size - plan.carry_weight.size


def _sizes(plan: SamplingPlan) -> list[int]:
    return sorted(_weights(plan, ours) * size for ours in (True, False) for size in BYTES.values())


def _describe_plan(plan: SamplingPlan) -> dict[str, Any]:
    return {
        "carry": plan.carry,
        "multiply_adds": plan.multiply_adds,
        "plain_multiply_adds": plan.plain_multiply_adds,
        "beside_the_steps": _beside_the_steps(plan),
    }

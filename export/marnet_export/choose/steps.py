"""The operating points of a bundle: those that are asked for, or, with `--steps auto`, the choice
among all ways to run the loop, which are built and measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from marnet_export.build.builder import builder
from marnet_export.build.types import Arithmetic
from marnet_export.choose.candidates import Candidate
from marnet_export.choose.charts import plot_pareto
from marnet_export.choose.points import EXACT, Choice, choose, pareto_report
from marnet_export.choose.sweep import SAMPLES, sweep, swept_processes
from marnet_export.lower.class_token import ClassTokenLayer
from marnet_export.lower.methods import Plan, lower
from marnet_export.lower.zero_steps import alignment_head, check_branch, process_table
from marnet_export.payload import check_fits, complete
from marnet_export.prove.trial import Built
from marnet_export.seal import built_for
from marnet_export.settings import AUTO, FLOATS, Settings, check_types
from marnet_export.work import DEFAULT, Job, Points, trained_samples
from marnet_sdk.bundle import ZERO
from marnet_sdk.errors import BackendUnavailable, DataError, ExportError
from marnet_sdk.uncertainty import mean_logits
from marnet_train.checkpoint import load_checkpoint, write_json
from marnet_train.diffusion import SamplerTable

PARETO, PARETO_PLOT = "pareto.json", "pareto.png"


def asked_points(job: Job) -> Points:
    """The points where none are swept."""
    asked = job.settings
    assert asked.steps != AUTO
    samples = job.trained_samples if asked.samples is None else asked.samples
    if asked.steps != 0:
        return job.points({DEFAULT: job.table(asked.steps)}, {DEFAULT: samples}, DEFAULT)
    check_branch(job.lowered, job.checkpoint.model.config.method)
    tables = {EXACT: job.table(), ZERO: job.table(0)}
    return job.points(tables, {EXACT: samples, ZERO: 1}, ZERO)


def explain(checkpoint_path: Path, settings: Settings) -> tuple[list[tuple[str, str, str]], str]:
    """Tell what the rewrites save, without building anything: rows for a table, and a sentence."""
    checkpoint = load_checkpoint(checkpoint_path)
    steps = None if settings.steps == AUTO else settings.steps
    precision = "fp32" if settings.precision == AUTO else settings.precision
    compute = settings.compute or ("bf16" if precision == "bf16" else "fp32")
    lowered = lower(checkpoint.model)
    eta = settings.eta if settings.sampler == "ddim" else 0.0
    config = checkpoint.model.config
    table = process_table(config.schedule, settings.sampler, steps, eta)
    samples = trained_samples(config) if settings.samples is None else settings.samples
    sentences = _about(lowered.plan, table, samples, settings.noise)
    if any(isinstance(module, ClassTokenLayer) for module in lowered.encoder.modules()):
        sentences.append("the image encoder's last layer is run for the class token alone")
    return lowered.plan.explain(compute), "\n".join(sentences)


def about_loop(job: Job, points: Points) -> list[str]:
    """Say in a line or two what the point that answers costs behind the encoder."""
    samples = points.sampling.point.samples
    return _about(job.lowered.plan, points.table, samples, job.settings.noise)


def _about(plan: Plan, table: SamplerTable, samples: int, noise: str) -> list[str]:
    if not table.timesteps:
        return ["no reverse loop: the alignment branch answers"]
    costs = [plan.noise_cost(table)] if noise == "image" else []
    return [plan.sentence(table, samples), *costs]


def swept_points(job: Job) -> tuple[Arithmetic, Points]:
    """Build, sweep, choose; write pareto.json, and leave the payload of the chosen precision.

    Raises:
        DataError: images without labels. ExportError: no precision can be built.
        VerificationFailed: nothing is within the latency budget.
    """
    asked = job.settings
    candidates = _candidates(job)
    everything = [c for found in candidates.values() for c in found]
    limits = (asked.max_drop, asked.latency_budget_ms)
    overall = choose(everything, next(iter(candidates.values()))[0], *limits)
    precision = overall.points[overall.picked].precision
    # A bundle has one precision, so its points are chosen among those of the one that is picked.
    choice = choose(candidates[precision], candidates[precision][0], *limits)
    _write_pareto(job, everything, choice)
    for other in candidates:
        if other != precision:
            shutil.rmtree(job.fresh / f"sweep-{other}")
    (job.fresh / f"sweep-{precision}").rename(job.payload)
    schedule = job.checkpoint.model.config.schedule
    tables = {
        name: process_table(schedule, c.sampler, c.steps, c.eta or 0.0)
        for name, c in choice.points.items()
    }
    samples = {name: c.samples for name, c in choice.points.items()}
    types = check_types(replace(asked, precision=precision))
    return types, job.points(tables, samples, choice.picked)


def _candidates(job: Job) -> dict[str, list[Candidate]]:
    """Measure the candidates, and return them by precision."""
    asked, truth = job.settings, job.images.labels
    if truth is None:
        raise DataError(
            "--steps auto compares accuracies, but some images have a class that the "
            "checkpoint does not know; name others with --data"
        )
    tables = swept_processes(job.checkpoint.model.config.schedule, asked.sampler, asked.eta)
    first, trained = next(iter(tables.items()))
    exact = mean_logits(job.reference.logits(trained, asked.seed, job.trained_samples))
    if alignment_head(job.lowered) is not None:
        tables[ZERO] = job.table(0)
    points = job.points(tables, dict.fromkeys(tables, 1), first)
    found: dict[str, list[Candidate]] = {}
    left_out: list[str] = []
    for precision in FLOATS if asked.precision == AUTO else (asked.precision,):
        try:
            built = _built(job, precision, points)
        except (ExportError, BackendUnavailable) as error:
            if asked.precision != AUTO:
                raise
            shutil.rmtree(job.fresh / f"sweep-{precision}", ignore_errors=True)
            left_out.append(f"{precision} is left out: {error}")
            job.say(left_out[-1])
            continue
        found[precision] = sweep(
            built,
            truth,
            exact.argmax(axis=1),
            samples=SAMPLES if asked.samples is None else (asked.samples,),
            trained_samples=job.trained_samples,
            precision=precision,
            max_drop=asked.max_drop,
        )
    if not found:
        raise ExportError(f"no precision can be built: {'; '.join(left_out)}")
    return found


def _built(job: Job, precision: str, points: Points) -> Built:
    """Build one precision, and open it."""
    types = check_types(replace(job.settings, precision=precision))
    check_fits(job, types, points)
    payload, order, backend = (
        job.fresh / f"sweep-{precision}",
        job.order(points),
        builder(job.settings.backend),
    )
    payload.mkdir()
    backend.build_encoder(job.lowered, job.example, types.encoder, payload, order)
    backend.build_refine(job.lowered, types.loop, payload, order)
    complete(job, payload, types, points)
    return job.opened(payload, types, points)


def _write_pareto(job: Job, everything: Sequence[Candidate], choice: Choice) -> None:
    about = {
        "backend": job.settings.backend,
        "noise": job.settings.noise,
        "seed": job.settings.seed,
        "checkpoint_sha256": job.checkpoint.sha256,
        "built_for": asdict(built_for(job.settings)),
    }
    report = pareto_report(everything, choice, about)
    write_json(job.fresh / PARETO, report)
    plot_pareto(report, job.fresh / PARETO_PLOT)
    for name, point in choice.points.items():
        picked = " (picked)" if name == choice.picked else ""
        job.say(
            f"{name}{picked}: {point}: {point.latency_ms:.3g} ms, accuracy "
            f"{point.accuracy:.2%} (95 % interval of the difference {point.low:+.2%} to "
            f"{point.high:+.2%})"
        )
    job.say(choice.reason)

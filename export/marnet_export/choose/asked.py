"""The operating points that are asked for, where none are swept, and what their loops cost."""

from __future__ import annotations

from pathlib import Path

from marnet_export.choose.points import EXACT
from marnet_export.lower.class_token import ClassTokenLayer
from marnet_export.lower.methods import Plan, lower
from marnet_export.lower.zero_steps import check_branch, process_table
from marnet_export.settings import AUTO, Settings
from marnet_export.work import Job, Points, trained_samples
from marnet_sdk.bundle import ZERO
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SamplerTable

DEFAULT = "default"  # the operating point of a bundle that has one


def asked_points(job: Job) -> Points:
    """The points where none are swept.

    Raises:
        ExportError: no loop is asked for, and the method has nothing else that answers.
    """
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

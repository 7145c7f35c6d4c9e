"""Compare ways to round the activations of an int8 loop, on trained weights.

    python benchmarks/scripts/int8_loop.py --checkpoint runs/plates --data data/plates --out F.json

Every form has the weights of the native loop: int8, with a scale for each output. Only the steps
are rounded, as in a bundle: condition, last estimate and head are float32, and so is the encoder.
The ranges are fitted to the checkpoint's own samples, as `marnet-export` fits them. Each answer is
held to that of the float32 checkpoint with the loop as the paper writes it, on the images of
--data. A checkpoint's answer may hardly need the loop, so two more things are told: the labels that
the refined features have by themselves, in phase B's classifier, and the error of these features.
Sums are float32 here, so a label at a tie may differ from the kernel's.

Axes: N images, K noise samples, S steps, H hidden, C classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from marnet_bench.machine import describe_machine
from marnet_export.build.quantise import Range, loop_ranges, quantised_rows
from marnet_export.choose.steps import asked_points
from marnet_export.lower.plan import SamplingPlan
from marnet_export.prove.fidelity import wilson_interval
from marnet_export.settings import Settings
from marnet_export.work import Job
from marnet_sdk.console import Command, print_table, say
from marnet_sdk.errors import InvalidInput
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.uncertainty import mean_logits
from marnet_train.models.denoiser import LEAKY_SLOPE

Rounding = Callable[[str, int, Floats], Floats]  # layer, steps that follow, its input -> rounded
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class Found:
    """This is how the answers of one form compare with those of the checkpoint."""

    form: str
    agreement: float
    interval: tuple[float, float]  # Wilson, 95 %
    largest_error: float  # of a logit, over the largest logit
    accuracy: float | None
    refined_agreement: float  # of the refined features alone, in their own classifier
    refined_error: float  # of these features, in the mean: norm of the difference over the norm


def on_levels(x: Floats, least: Any, largest: Any, bits: int = 8) -> Floats:
    """Put x on 2^bits equal levels from `least` to `largest`, of which one is 0."""
    step = np.maximum((largest - least) / (2**bits - 1), np.finfo(np.float32).tiny)
    zero = np.rint(-least / step)
    levels = np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero
    return (levels * step).astype(np.float32)


def fixed(ranges: Mapping[str, Range], bits: int = 8) -> Rounding:
    """Every layer has one range for all images and steps."""
    return lambda name, _, x: on_levels(x, ranges[name].least, ranges[name].largest, bits)


def by_row(bits: int = 8) -> Rounding:
    """Every row has its own range in every step."""

    def rounded(name: str, left: int, x: Floats) -> Floats:
        least, largest = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        return on_levels(x, np.minimum(least, 0), np.maximum(largest, 0), bits)

    return rounded


def in_groups(size: int = 64, bits: int = 8) -> Rounding:
    """Every so many values of a row have their own range in every step."""
    row = by_row(bits)

    def rounded(name: str, left: int, x: Floats) -> Floats:
        width = x.shape[-1]
        padded = np.zeros((*x.shape[:-1], -(-width // size) * size), np.float32)
        padded[..., :width] = x
        parts = padded.reshape(*x.shape[:-1], -1, size)
        return row(name, left, parts).reshape(padded.shape)[..., :width]

    return rounded


def switched(early: Rounding, late: Rounding, last: int) -> Rounding:
    """Another form for the last so many steps."""
    return lambda name, left, x: (late if left < last else early)(name, left, x)


def exact(name: str, left: int, x: Floats) -> Floats:
    """Nothing is rounded but the weights."""
    return x


@dataclass(frozen=True)
class Form:
    """This is one way to round what the steps multiply."""

    name: str
    rounded: Rounding
    float_steps: int = 0  # the last so many, whose weights stay float


FLOAT = Form("float32", exact, float_steps=sys.maxsize)


def forms(ranges: Mapping[str, Range]) -> Iterator[Form]:
    """Every form that is compared."""
    eight, sixteen = fixed(ranges), fixed(ranges, 16)
    yield Form("fixed ranges, 8 bits", eight)
    yield Form("a range for each row, 8 bits", by_row())
    yield Form("a range for 64 values of a row, 8 bits", in_groups())
    for last in (1, 5, 10, 20, 50):
        yield Form(f"the last {last} steps 16 bits", switched(eight, sixteen, last))
    yield Form("row, the last 10 steps 16 bits", switched(by_row(), sixteen, 10))
    yield Form("16 bits", sixteen)
    for last in (1, 5, 10, 20):
        yield Form(f"the last {last} steps float", switched(eight, exact, last), last)
    yield Form("16 bits, the last 10 steps float", switched(sixteen, exact, 10), 10)
    yield Form("activations not rounded", exact)


def estimates(plan: SamplingPlan, x_v: Floats, tables: Tables, form: Form) -> Floats:
    """The estimates of a loop whose steps are rounded in some form, [N, K, D]."""
    layers = {"hidden2": plan.hidden2, "hidden3": plan.hidden3, "carry": (plan.carry_weight, None)}
    if plan.carry != "hidden":
        layers["input"] = (plan.input_weight, None)
    floats = {name: weight.astype(np.float32) for name, (weight, _) in layers.items()}
    stored = {name: in_int8(weight) for name, weight in floats.items()}
    biases = {name: 0 if b is None else b.astype(np.float32) for name, (_, b) in layers.items()}

    def product(name: str, left: int, x: Floats) -> Floats:
        weight = (floats if left < form.float_steps else stored)[name]
        return form.rounded(name, left, x) @ weight.T + biases[name]

    mean, std = plan.standardise
    q = (((x_v - mean) / std) @ plan.condition_weight.T).astype(np.float32)[:, None]
    shape = (len(x_v), tables.bias.shape[2], len(plan.carry_weight))
    state, before = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    h3 = q
    for i, (a, b, c) in enumerate(tables.coefficients):
        left = tables.steps - 1 - i
        into = state if plan.carry == "hidden" else product("input", left, state)
        h1 = _leaky(into + q + tables.bias[i])
        h3 = _leaky(product("hidden3", left, _leaky(product("hidden2", left, h1))))
        if left:
            gained = product("carry", left, h3)
            state, before = a * state + b * gained + c * before, gained
    return (h3 @ plan.output[0].T + plan.output[1]).astype(np.float32)


def _leaky(x: Floats) -> Floats:
    return np.maximum(x, np.float32(LEAKY_SLOPE) * x)


def in_int8(weight: Floats) -> Floats:
    """Round weights as the native loop stores them."""
    stored, scale = quantised_rows(weight)
    return stored * scale


def load(checkpoint: Path, data: Path | None) -> Job:
    """A checkpoint whose loop can be tried, and its images.

    Raises:
        InvalidInput: the loop is fed its estimates, or starts from more than noise.
    """
    job = Job.load(Path(), checkpoint, Settings("onnxruntime", "int8"), data, say)
    plan = job.lowered.plan
    assert isinstance(plan, SamplingPlan)
    if plan.fed or plan.start_weight is not None:
        raise InvalidInput(
            f"--checkpoint {checkpoint}: its denoiser is progressive or its handover is carry, and "
            "the native loop, which is tried here, runs neither; name a checkpoint without"
        )
    return job


def measure(job: Job, data: Path | None) -> dict[str, Any]:
    """All forms on the images of a data set, or on the checkpoint's samples."""
    points, plan = asked_points(job), job.lowered.plan
    assert isinstance(plan, SamplingPlan)
    name, seed = points.sampling.default, points.sampling.seed
    samples = points.sampling.point.samples
    tables = make_tables(points.plan, points.sampling, name, seed=seed, samples=samples)
    wanted = mean_logits(job.reference.logits(points.table, seed, samples))
    x_v = job.reference.x_v.numpy()

    model = job.checkpoint.model

    @torch.inference_mode()
    def answers(x_cdr: Floats) -> tuple[Floats, Floats]:
        """The logits of the whole, and of the refined features alone, [N, C] each."""
        refined = torch.from_numpy(x_cdr)
        logits, _ = job.lowered.head(torch.from_numpy(x_v), refined)
        return mean_logits(logits.numpy()), mean_logits(model.semantic_classifier(refined).numpy())

    best = estimates(plan, x_v, tables, FLOAT)
    alone = answers(best)[1]

    def held(form: str, x_cdr: Floats) -> Found:
        got, refined = answers(x_cdr)
        same = got.argmax(1) == wanted.argmax(1)
        labels, norm = job.images.labels, np.linalg.norm
        return Found(
            form,
            float(same.mean()),
            wilson_interval(int(same.sum()), len(same)),
            float(np.abs(got - wanted).max() / np.abs(wanted).max()),
            None if labels is None else float((got.argmax(1) == labels).mean()),
            float((refined.argmax(1) == alone.argmax(1)).mean()),
            float((norm(x_cdr - best, axis=-1) / norm(best, axis=-1)).mean()),
        )

    found = [held(FLOAT.name, best)]
    for form in forms(loop_ranges(job.lowered, job.calibration(points))):
        found.append(held(form.name, estimates(plan, x_v, tables, form)))
        say(f"{form.name}: {found[-1].agreement:.2%}, {found[-1].refined_agreement:.2%}")
    return {
        "checkpoint": job.checkpoint.path.name,
        "data": None if data is None else data.name,
        "images": len(wanted),
        "samples": samples,
        "steps": tables.steps,
        "hidden": len(plan.input_weight),
        "forms": [asdict(one) for one in found],
    }


@click.command(cls=Command)
@click.option("--checkpoint", "checkpoints", type=_FOLDER, multiple=True, required=True)
@click.option(
    "--data",
    "folders",
    type=_FOLDER,
    multiple=True,
    help="Images for each checkpoint, in the same order. Default: its samples.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(checkpoints: tuple[Path, ...], folders: tuple[Path, ...], out: Path) -> None:
    """Compare every form with the float32 checkpoint, write the record and print its tables."""
    if folders and len(folders) != len(checkpoints):
        raise click.UsageError("--data: name one folder for each --checkpoint, or none")
    data = folders or (None,) * len(checkpoints)
    jobs = [load(*pair) for pair in zip(checkpoints, data, strict=True)]
    runs = [measure(*pair) for pair in zip(jobs, data, strict=True)]
    found = {"what": __doc__, "machine": describe_machine(), "runs": runs}
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for run in runs:
        rows = [
            (
                form["form"],
                f"{form['agreement']:.2%}",
                f"{form['largest_error']:.2g}",
                f"{form['refined_agreement']:.2%}",
                f"{form['refined_error']:.2g}",
            )
            for form in run["forms"]
        ]
        columns = ("loop", "same label", "largest error", "refined alone", "their error")
        print_table(f"{run['checkpoint']}, {run['images']} images", columns, rows)


if __name__ == "__main__":
    main()

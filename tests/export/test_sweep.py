"""What is swept is every way to run a loop, each measured on the same graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from marnet_export.choose.sweep import as_points, sweep, swept_processes
from marnet_export.lower.methods import lower
from marnet_export.lower.zero_steps import alignment_head, process_table
from marnet_export.prove.reference import Reference
from marnet_export.prove.trial import Built
from marnet_sdk.alignment import WithAlignment
from marnet_sdk.backends import open_backend
from marnet_sdk.bundle import Bundle, read_bundle
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import ScheduleConfig, sampler_table
from marnet_train.measures import paired_interval


def test_every_sampler_meets_every_number_of_steps_and_the_trained_process_is_first():
    found = swept_processes(ScheduleConfig(steps=20), None, 0.0)
    names, tables = list(found), list(found.values())
    assert names[0] == "ddpm-exact"
    assert len(tables[0].timesteps) == 20
    pairs = {(t.sampler, len(t.timesteps)) for t in tables[1:]}
    assert pairs == {(s, n) for s in ("ddpm", "ddim", "dpmpp") for n in (1, 2, 5, 10, 20)}


def test_one_sampler_can_be_asked_for_and_eta_is_ddim_s_alone():
    found = swept_processes(ScheduleConfig(steps=5), "ddim", 0.5)
    assert [(t.sampler, t.eta) for t in found.values()] == [("ddpm", 0.0)] + 3 * [("ddim", 0.5)]
    everything = swept_processes(ScheduleConfig(steps=5), None, 0.5).values()
    assert {t.sampler for t in everything if t.eta} == {"ddim"}


def test_points_list_what_the_tables_visit():
    tables = {n: sampler_table(ScheduleConfig(steps=9), "ddim", 3, 0.5) for n in ("a", "b")}
    points = as_points(tables, {"a": 1, "b": 4})
    assert (points["a"].samples, points["b"].samples) == (1, 4)
    assert points["a"] == replace(points["b"], samples=1)
    assert (points["a"].sampler, points["a"].eta) == ("ddim", 0.5)
    assert points["a"].timesteps == tables["a"].timesteps == (9, 6, 3)


def built_of(bundle: Bundle, tables, pixels: np.ndarray) -> Built:
    """The graphs of a bundle with the tables of other processes."""
    plan = load_file(bundle.path / "payload/plan.safetensors")
    plan |= {f"coefficients.{name}": table.coefficients for name, table in tables.items()}
    backend = open_backend(bundle.manifest.backend, bundle.path / "payload", "fp32", 1)
    sampling = replace(
        bundle.manifest.sampling, points=as_points(tables), default=next(iter(tables))
    )
    return Built(backend, plan, sampling, pixels)


def by_work(calls):
    """Each call once, and instead of its time its steps, counted for every sample; none is half."""
    for call in calls.values():
        call()
    return {(work, count): max(0.5, work[0] * count) for work, count in calls}


@pytest.fixture(scope="module")
def pixels(checkpoint: Path) -> np.ndarray:
    loaded = load_checkpoint(checkpoint)
    return loaded.preprocess.pixels(sorted(loaded.samples.glob("*.png"))[:60])


def test_the_process_as_trained_is_measured_whatever_numbers_of_samples_are_asked(
    bundle_of, checkpoint, pixels
):
    bundle = read_bundle(bundle_of("onnxruntime", "fp32"))
    schedule = load_checkpoint(checkpoint).model.config.schedule
    tables = {f"ddim-{n}": sampler_table(schedule, "ddim", n) for n in (1, 2)}
    tables = {"exact": sampler_table(schedule, "ddpm"), **tables}
    built = built_of(bundle, tables, pixels)
    reference = built.samples("exact", 1)[:, 0].argmax(axis=1)
    found = sweep(built, reference, reference, samples=(4,), precision="fp32", max_drop=0.5)
    assert [(c.sampler, c.steps, c.samples) for c in found] == [
        ("ddpm", 100, 1), ("ddim", 1, 4), ("ddim", 2, 4)
    ]  # fmt: skip
    assert (found[0].agreement, found[0].low, found[0].high) == (1.0, 0.0, 0.0)
    assert found[1].latency_ms <= found[2].latency_ms  # less of the same work, however it is timed
    # In another precision, even the same labels are only as good as so many images show.
    half = sweep(built, reference, reference, samples=(1,), precision="bf16", max_drop=0.5)
    assert half[0].low < 0 < half[0].high


@pytest.mark.parametrize("backend", ["torchscript", "onnxruntime"])
def test_a_sweep_counts_what_the_float32_checkpoint_would_answer(
    backend, bundle_of, checkpoint, pixels, monkeypatch
):
    bundle = read_bundle(bundle_of(backend, "fp32"))
    model = load_checkpoint(checkpoint).model
    schedule = model.config.schedule
    tables = {
        "exact": sampler_table(schedule, "ddpm"),
        "ddim-5": sampler_table(schedule, "ddim", 5),
        "dpmpp-2": sampler_table(schedule, "dpmpp", 2),
        "zero": process_table(schedule, None, 0),
    }
    reference = Reference(model, pixels)
    labels = {n: reference.logits(t, 0)[:, 0].argmax(axis=1) for n, t in tables.items()}
    truth = np.roll(labels["exact"], 0)
    truth[:6] = (truth[:6] + 1) % 10
    built = built_of(bundle, tables, pixels)
    monkeypatch.setattr("marnet_export.choose.sweep.in_turn", by_work)
    head = alignment_head(lower(model))
    assert head is not None
    built.backend = WithAlignment(built.backend, head)
    found = sweep(built, truth, labels["exact"], samples=(1, 2), precision="fp32", max_drop=0.5)
    zero = found.pop()
    assert (zero.sampler, zero.steps, zero.samples, zero.over_zero) == ("none", 0, 1, None)
    right = labels["zero"] == truth
    assert zero.accuracy == pytest.approx(float(right.mean()))
    for candidate in (found[0], found[1], found[3]):
        name = {100: "exact", 5: "ddim-5", 2: "dpmpp-2"}[candidate.steps]
        better = int(((labels[name] == truth) & ~right).sum())
        worse = int(((labels[name] != truth) & right).sum())
        assert candidate.over_zero == paired_interval(better, worse, 60)
    assert zero.latency_ms <= min(candidate.latency_ms for candidate in found)
    processes = [(c.sampler, c.steps, c.samples) for c in found]
    assert processes == [
        ("ddpm", 100, 1), ("ddim", 5, 1), ("ddim", 5, 2), ("dpmpp", 2, 1), ("dpmpp", 2, 2)
    ]  # fmt: skip
    assert found[0].drop == 0
    assert found[0].accuracy == pytest.approx(0.9)
    for candidate, name in ((found[1], "ddim-5"), (found[3], "dpmpp-2")):
        assert candidate.accuracy == pytest.approx(float((labels[name] == truth).mean()))
        agreement = float((labels[name] == labels["exact"]).mean())
        assert candidate.agreement == pytest.approx(agreement)
    assert all(c.images == 60 for c in found)
    assert [c.latency_ms for c in found] == [c.steps * c.samples for c in found]

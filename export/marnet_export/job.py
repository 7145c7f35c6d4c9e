"""Turn a checkpoint into a verified bundle.

Everything is built in a temporary folder beside the target, which is renamed into place last: an
export that fails or is killed leaves nothing half-written.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from marnet_export.build.builder import Order, builder
from marnet_export.build.native import (
    MOST_ROWS,
    check_alike,
    delivered,
    faster_up_to,
    loop_products,
    refused,
    remove_native,
    set_most_rows,
    shown,
    time_loops,
    why_not,
    write_native,
)
from marnet_export.build.native import about as loop_about
from marnet_export.build.opened import open_built, runs_here
from marnet_export.build.policy import device_of
from marnet_export.build.quantise import ranked, to_keep
from marnet_export.build.types import Calibration, Types, Unread
from marnet_export.choose.charts import plot_pareto, plot_risk_coverage
from marnet_export.choose.points import (
    EXACT,
    Candidate,
    Choice,
    choose,
    pareto_report,
    risk_coverage,
    threshold_for_risk,
)
from marnet_export.choose.sweep import SAMPLES, as_points, sweep, swept_processes
from marnet_export.inspection import PASSED, check_second_process
from marnet_export.lower.class_token import ClassTokenLayer
from marnet_export.lower.methods import Lowered, Plan, lower
from marnet_export.lower.zero_steps import (
    alignment_head,
    answering,
    check_branch,
    process_table,
    write_head,
)
from marnet_export.prove.departure import diagnose
from marnet_export.prove.fidelity import (
    MIN_AGREEMENT,
    ROW_TOLERANCE,
    Built,
    Fidelity,
    Reference,
    instability_floor,
    margin,
    measure_fidelity,
    settling,
    trajectory_error,
)
from marnet_export.prove.images import Images, load_images
from marnet_export.prove.overflow import check_activations, check_weights
from marnet_export.prove.receipt import NOT_READ, check_delivered, count_products, receipt
from marnet_export.settings import AUTO, FLOATS, Say, Settings, check_types, order_for
from marnet_export.text import check_text, export_text
from marnet_sdk.backends import why_unavailable
from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.backends.torch_cuda import gpu_name
from marnet_sdk.bundle import (
    FIDELITY,
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    PAYLOAD,
    PLAN,
    SOURCE,
    TEXT,
    ZERO,
    BuiltFor,
    Precision,
    Sampling,
    Share,
    is_bundle,
    seal_bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.errors import (
    BackendUnavailable,
    DataError,
    ExportError,
    InvalidInput,
    VerificationFailed,
)
from marnet_sdk.files import atomic_directory, check_output, exclusive
from marnet_sdk.native_loop import GRAPH, LAYERS, NATIVE
from marnet_sdk.preprocess import Preprocess
from marnet_sdk.tables import Floats, Tables, make_tables
from marnet_sdk.uncertainty import mean_logits, softmax
from marnet_train.checkpoint import BASELINE, Checkpoint, copy_files, load_checkpoint, write_json
from marnet_train.diffusion import SamplerTable

GOLDEN = 8  # images that travel with the bundle
DEFAULT = "default"  # the operating point of a bundle that has one
PARETO, PARETO_PLOT = "pareto.json", "pareto.png"
RISK, RISK_PLOT = "risk_coverage.json", "risk_coverage.png"
TABLES = f"{PAYLOAD}/tables.safetensors"
CALIBRATION = 256  # images that the ranges of int8 are measured on


def export_bundle(
    checkpoint_path: Path,
    output: Path,
    settings: Settings,
    *,
    data: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Fidelity:
    """Build, verify and write one bundle.

    Args:
        data: a data set whose `val` split (or a folder that is one split) is verified on; default:
            the checkpoint's samples. Of more than `MAX_IMAGES`, a random choice is taken.
        say: is told what happens, a line at a time.

    Raises:
        ExportError: it cannot be built as asked. VerificationFailed: what was built does not agree
            with the checkpoint. In both cases nothing is left at `output`.
    """
    if settings.backend == AUTO:
        raise InvalidInput("export_bundle builds one backend; for auto, call export_fastest")
    check_types(settings)
    with at_work(output, overwrite=overwrite) as fresh:
        checkpoint = load_checkpoint(checkpoint_path)
        images = load_images(data, checkpoint, say)
        fitted = images
        if data is not None and checkpoint.samples.is_dir():
            fitted = load_images(None, checkpoint, say)
        return _Job(fresh, checkpoint, settings, images, say, fitted).run()


@contextmanager
def at_work(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write a bundle into, which becomes `output`; one export at a time.

    Raises:
        OutputExists: something is there. OutputBusy: another export is at work there; names it.
        OutputError: no space, or the folder must not be written to.
    """
    check_output(output, overwrite=overwrite, replaceable=is_bundle)
    use_threads(None)
    lock = output.absolute().parent / f".{output.name}.lock"
    with exclusive(lock):
        try:
            with atomic_directory(output, overwrite=overwrite, replaceable=is_bundle) as fresh:
                yield fresh
        finally:
            lock.unlink(missing_ok=True)


def explain(checkpoint_path: Path, settings: Settings) -> tuple[list[tuple[str, str, str]], str]:
    """Tell what the rewrites save, without building anything: rows for a table, and a sentence."""
    checkpoint = load_checkpoint(checkpoint_path)
    steps = None if settings.steps == "auto" else settings.steps
    precision = "fp32" if settings.precision == "auto" else settings.precision
    compute = settings.compute or ("bf16" if precision == "bf16" else "fp32")
    lowered = lower(checkpoint.model)
    plan = lowered.plan
    eta = settings.eta if settings.sampler == "ddim" else 0.0
    config = checkpoint.model.config
    table = process_table(config.schedule, settings.sampler, steps, eta)
    samples = trained_samples(config) if settings.samples is None else settings.samples
    sentences = about_loop(plan, table, samples, settings.noise)
    if any(isinstance(module, ClassTokenLayer) for module in lowered.encoder.modules()):
        sentences.append("the image encoder's last layer is run for the class token alone")
    return plan.explain(compute), "\n".join(sentences)


def about_loop(plan: Plan, table: SamplerTable, samples: int, noise: str) -> list[str]:
    """Say in a line or two what answering with this sampler costs behind the encoder."""
    if not table.timesteps:
        return ["no reverse loop: the alignment branch answers"]
    costs = [plan.noise_cost(table)] if noise == "image" else []
    return [plan.sentence(table, samples), *costs]


def trained_samples(config: Any) -> int:
    """Count the noise samples that an image meets in the process as trained."""
    return getattr(config, "samples", 1)


class _Job:
    """One export: what all of its steps need."""

    def __init__(
        self,
        fresh: Path,
        checkpoint: Checkpoint,
        settings: Settings,
        images: Images,
        say: Say,
        fitted: Images,
    ) -> None:
        """fitted: what int8 is fitted to: not the images of --data, if there are others."""
        self.fresh, self.checkpoint, self.settings = fresh, checkpoint, settings
        self.images, self.say, self.fitted = images, say, fitted
        self.kept: dict[str, str] = {}  # layers of an int8 encoder that stay float, and why
        self.kept_share = 0.0  # of the encoder's multiply-adds
        self.model = checkpoint.model
        self.lowered = lower(self.model)
        self.plan = self.lowered.plan
        self.reference = Reference(self.model, images.pixels, by_image=settings.noise == "image")

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes that are built for; empty: any."""
        return builder(self.settings.backend).buckets

    @cached_property
    def fitted_reference(self) -> Reference:
        """The reference on the images that int8 is fitted to."""
        if self.fitted is self.images:
            return self.reference
        by_image = self.settings.noise == "image"
        return Reference(self.model, self.fitted.pixels, by_image=by_image)

    @property
    def trained_samples(self) -> int:
        return trained_samples(self.model.config)

    def table(self, steps: int | None = None) -> SamplerTable:
        """The sampler that is asked for, with so many steps."""
        asked = self.settings
        return process_table(self.model.config.schedule, asked.sampler, steps, asked.eta)

    def asked_points(self) -> tuple[dict[str, SamplerTable], dict[str, int], str]:
        """Samplers and samples of the points where none are swept, and the one that answers.

        Raises:
            ExportError: no loop is asked for, and the method has nothing else that answers.
        """
        asked = self.settings
        assert asked.steps != AUTO
        samples = self.trained_samples if asked.samples is None else asked.samples
        if asked.steps != 0:
            return {DEFAULT: self.table(asked.steps)}, {DEFAULT: samples}, DEFAULT
        check_branch(self.lowered, self.model.config.method)
        return {EXACT: self.table(), ZERO: self.table(0)}, {EXACT: samples, ZERO: 1}, ZERO

    def sampling(
        self, tables: Mapping[str, SamplerTable], samples: Mapping[str, int] | int, default: str
    ) -> Sampling:
        return Sampling(
            points=as_points(tables, samples),
            default=default,
            train_steps=self.model.config.schedule.steps,
            noise=self.settings.noise,
            seed=self.settings.seed,
            width=self.model.latent_width,
        )

    def run(self) -> Fidelity:
        """Build, verify, seal; what was written loads, here and in a second process."""
        asked = self.settings
        if asked.text:  # before anything is built, though it is built last
            check_text(self.checkpoint, self.lowered)
        if asked.steps == AUTO:
            types, tables, samples, picked = self.pick_points()
        else:
            types = check_types(asked)
            tables, samples, picked = self.asked_points()
        sampling = self.sampling(tables, samples, picked)
        for line in about_loop(self.plan, tables[picked], sampling.point.samples, asked.noise):
            self.say(line)
        self.say(types[0].sentence)
        built = self.build(types, tables, sampling)
        shares = self.read_receipt(types, sampling)
        fidelity = self.verify(built, types, tables)
        if native := self.native_loop(built, types, tables):
            built, fidelity = native
            shares = self.read_receipt(types, sampling)
        sampling = self.with_thresholds(built)
        self.write_beside(built, fidelity)
        fields = self.manifest_fields(types, shares, sampling, fidelity)
        seal_bundle(self.fresh, fields)
        if runs_here(asked.backend):
            self.check_in_second_process(Classifier(self.fresh))
        else:
            self.say(_add_not_run(self.fresh, asked.backend))
        seal_bundle(self.fresh, fields)
        return fidelity

    def build(
        self,
        types: tuple[Types, Types],
        tables: dict[str, SamplerTable],
        sampling: Sampling,
        folder: str = PAYLOAD,
    ) -> Built:
        """Write the payload (unless a sweep has) and open it again."""
        payload, (encoder, loop) = self.fresh / folder, types
        arrays = self.plan.tensors(tables)
        if not payload.exists():
            self.check_steps(sampling)
            calibration = self.calibration(arrays, sampling)
            for asked in types:
                check_weights(self.lowered, asked.storage)
            if headroom := check_activations(self.lowered, calibration, encoder.compute):
                self.say(headroom.sentence())
            payload.mkdir(parents=True)
            module = builder(self.settings.backend)
            self.build_encoder(encoder, arrays, sampling, payload)
            module.build_refine(self.lowered, loop, payload, self.order(arrays, sampling))
            if any(not point.timesteps for point in sampling.points.values()):
                write_head(self.lowered, payload)
            if encoder.storage == "int8":
                self.keep_float(types, arrays, sampling, payload, tables[sampling.default])
        if folder == PAYLOAD:
            save_file(arrays, self.fresh / PLAN)
        return self.opened(arrays, sampling, types, payload)

    def opened(
        self,
        arrays: dict[str, NDArray],
        sampling: Sampling,
        types: tuple[Types, Types],
        payload: Path,
    ) -> Built:
        """A payload as the SDK opens it."""
        asked = self.settings
        backend = open_built(asked.backend, payload, types[0].compute, asked.device)
        return Built(backend, arrays, sampling, self.images.pixels)

    def build_encoder(
        self, types: Types, arrays: dict[str, NDArray], sampling: Sampling, payload: Path
    ) -> None:
        pixels = self.images.pixels
        example = torch.from_numpy(np.resize(pixels, (2, *pixels.shape[1:])))
        order = self.order(arrays, sampling)
        module = builder(self.settings.backend)
        module.build_encoder(self.lowered, example, types, payload, order)

    def keep_float(
        self,
        types: tuple[Types, Types],
        arrays: dict[str, NDArray],
        sampling: Sampling,
        payload: Path,
        table: SamplerTable,
    ) -> None:
        """Build an int8 encoder again with its worst blocks float, until enough labels agree.

        Measured on the images that int8 is fitted to; `verify` judges.
        """
        reference, wanted = self.fitted_reference, self.min_agreement(types)
        pixels = self.fitted.pixels
        logits = reference.logits(table, sampling.seed, sampling.point.samples)
        labels = mean_logits(logits).argmax(axis=1)

        def agreement(x_v: Floats | None = None) -> float:
            asked = self.settings
            backend = open_built(asked.backend, payload, types[0].compute, asked.device)
            built = Built(backend, arrays, sampling, pixels)
            if x_v is not None:
                built.x_v = x_v
            return float((built.logits(sampling.default).argmax(axis=1) == labels).mean())

        first = agreement()
        self.say(f"int8: {first:.2%} of {len(pixels)} labels agree where it is fitted")
        if first >= wanted:
            return
        if (loop := agreement(reference.x_v.numpy())) < wanted:
            self.say(
                f"with the float32 encoder {loop:.2%}, so no layer of it is kept float; it is the "
                "loop: try --loop-precision fp16"
            )
            return
        ratio = (1 - wanted) / (1 - first)
        for chosen in to_keep(ranked(self.lowered.encoder, pixels), ratio):
            self.kept_share = sum(block.share for block in chosen)
            self.kept = {
                layer: f"{block.name} alone in int8 moves the features by {block.error:.2g}"
                for block in chosen
                for layer in block.layers
            }
            self.build_encoder(types[0], arrays, sampling, payload)
            found = agreement()
            self.say(
                f"int8: {found:.2%} with {', '.join(block.name for block in chosen)} of the image "
                f"encoder in {types[0].compute}, {self.kept_share:.0%} of its products"
            )
            if found >= wanted:
                break

    def check_steps(self, sampling: Sampling) -> None:
        """Refuse a chain that is longer than what the backend builds for."""
        backend = self.settings.backend
        most = builder(backend).most_steps
        longest = max(len(point.timesteps) for point in sampling.points.values())
        if most is not None and longest > most:
            raise ExportError(
                f"{backend} builds loops of at most {most} steps, got {longest}; choose fewer with "
                "--steps, or another --backend"
            )

    def calibration(self, arrays: dict[str, NDArray], sampling: Sampling) -> Calibration:
        """Return the arrays that ranges of activations are measured on."""
        images = slice(0, CALIBRATION)
        tables = make_tables(arrays, sampling, sampling.with_loop, seed=sampling.seed, samples=1)
        return Calibration(
            self.fitted.pixels[images],
            self.fitted_reference.x_v[images].numpy(),
            tables.coefficients,
            tables.bias,
            tuple(self.kept),
        )

    def read_receipt(self, types: tuple[Types, Types], sampling: Sampling) -> dict[str, Share]:
        """Read the types of what was built; see `receipt`.

        Raises:
            VerificationFailed: it is not what was asked for.
        """
        shape = self.images.pixels.shape[1:]
        module = builder(self.settings.backend)
        try:
            products = module.products(self.fresh / PAYLOAD, types[0], shape)
        except Unread as error:
            self.say(f"{NOT_READ}: {error}; the receipt says so, and the answers are the proof")
            products = count_products(self.lowered, shape)
        asked = {"encoder": types[0], "loop": types[1]}
        if self.loop == NATIVE:
            products = loop_products(module, self.fresh / PAYLOAD, types[0], products)
            asked["loop"] = delivered(types[1])
        check_delivered(products, asked, self.settings.backend, kept=self.kept_share)
        steps = len(sampling.point.timesteps)
        products = answering(products, self.fresh / PAYLOAD, steps)
        return receipt(products, steps, sampling.point.samples)

    def write_beside(self, built: Built, fidelity: Fidelity) -> None:
        """Write what travels with the payload: golden answers, ready tables, text encoder,
        checkpoint.
        """
        _write_golden(self.fresh, self.images, built, self.checkpoint.preprocess, fidelity)
        sampling = built.sampling
        if sampling.noise == "shared" and sampling.point.timesteps:
            tables = built.tables(sampling.default, built.pixels[:1], sampling.point.samples)
            arrays = {"coefficients": tables.coefficients, "bias": tables.bias}
            save_file(arrays, self.fresh / TABLES)
        add_parts(self.fresh, self.checkpoint, self.lowered, self.settings)

    def check_in_second_process(self, classifier: Classifier) -> None:
        """Open the bundle in a fresh process, as it will be deployed, and compare the answers.

        Raises:
            VerificationFailed: it does not load there, or answers differently.
        """
        found = check_second_process(classifier.bundle, classifier)
        if found.outcome != PASSED:
            raise VerificationFailed(
                f"the bundle opens in this process, but in a second one {found.detail}. No bundle "
                "was written"
            )
        _add_to_report(self.fresh, second_process=found.detail)

    def pick_points(
        self,
    ) -> tuple[tuple[Types, Types], dict[str, SamplerTable], dict[str, int], str]:
        """Sweep, choose, write pareto.json; returns types, samplers, samples and the pick."""
        asked, truth = self.settings, self.images.labels
        if truth is None:
            raise DataError(
                "--steps auto compares accuracies, but some images have a class that the "
                "checkpoint does not know; name others with --data"
            )
        tables = swept_processes(self.model.config.schedule, asked.sampler, asked.eta)
        first, trained = next(iter(tables.items()))
        exact = mean_logits(self.reference.logits(trained, asked.seed, self.trained_samples))
        if alignment_head(self.lowered) is not None:
            tables[ZERO] = self.table(0)
        sampling = self.sampling(tables, 1, first)
        candidates: dict[str, list[Candidate]] = {}
        left_out: list[str] = []
        for precision in FLOATS if asked.precision == AUTO else (asked.precision,):
            try:
                types = check_types(replace(asked, precision=precision))
                built = self.build(types, tables, sampling, f"sweep-{precision}")
            except (ExportError, BackendUnavailable) as error:
                if asked.precision != AUTO:
                    raise
                shutil.rmtree(self.fresh / f"sweep-{precision}", ignore_errors=True)
                left_out.append(f"{precision} is left out: {error}")
                self.say(left_out[-1])
                continue
            candidates[precision] = sweep(
                built,
                truth,
                exact.argmax(axis=1),
                samples=SAMPLES if asked.samples is None else (asked.samples,),
                trained_samples=self.trained_samples,
                precision=precision,
                max_drop=asked.max_drop,
            )
        if not candidates:
            raise ExportError(f"no precision can be built: {'; '.join(left_out)}")
        everything = [c for found in candidates.values() for c in found]
        limits = (asked.max_drop, asked.latency_budget_ms)
        overall = choose(everything, next(iter(candidates.values()))[0], *limits)
        precision = overall.points[overall.picked].precision
        choice = choose(candidates[precision], candidates[precision][0], *limits)
        self._write_pareto(everything, choice)
        for other in candidates:
            if other != precision:
                shutil.rmtree(self.fresh / f"sweep-{other}")
        (self.fresh / f"sweep-{precision}").rename(self.fresh / PAYLOAD)
        schedule = self.model.config.schedule
        chosen = {
            name: process_table(schedule, c.sampler, c.steps, c.eta or 0.0)
            for name, c in choice.points.items()
        }
        samples = {name: c.samples for name, c in choice.points.items()}
        types = check_types(replace(asked, precision=precision))
        return types, chosen, samples, choice.picked

    def _write_pareto(self, everything: Sequence[Candidate], choice: Choice) -> None:
        about = {
            "backend": self.settings.backend,
            "noise": self.settings.noise,
            "seed": self.settings.seed,
            "checkpoint_sha256": self.checkpoint.sha256,
            "built_for": asdict(_built_for(self.settings)),
        }
        report = pareto_report(everything, choice, about)
        write_json(self.fresh / PARETO, report)
        plot_pareto(report, self.fresh / PARETO_PLOT)
        for name, point in choice.points.items():
            picked = " (picked)" if name == choice.picked else ""
            self.say(
                f"{name}{picked}: {point}: {point.latency_ms:.3g} ms, accuracy "
                f"{point.accuracy:.2%} (95 % interval of the difference {point.low:+.2%} to "
                f"{point.high:+.2%})"
            )
        self.say(choice.reason)

    def verify(
        self, built: Built, types: tuple[Types, Types], tables: dict[str, SamplerTable]
    ) -> Fidelity:
        """Hold every operating point against the reference; write fidelity.json.

        Raises:
            VerificationFailed: one does not agree.
        """
        found: dict[str, Fidelity] = {}
        for name, fidelity in self.measure(built, types, tables):
            if problems := fidelity.problems():
                raise self.failure(problems, built, types, tables[name], name)
            found[name] = fidelity
        default, table = built.sampling.default, tables[built.sampling.default]
        more = self.noise_matters(built, table) if table.timesteps else {}
        self.report(built, found, table, **more)
        return found[default]

    def measure(
        self, built: Built, types: tuple[Types, Types], tables: dict[str, SamplerTable]
    ) -> Iterator[tuple[str, Fidelity]]:
        """Hold the operating points against the reference, one by one."""
        pixels, sampling = self.images.pixels, built.sampling
        storages = {t.storage for t in types}
        minimum = self.min_agreement(types)
        known: dict[tuple, Fidelity] = {}
        for name, point in sampling.points.items():
            key = (point.sampler, point.eta, point.timesteps, point.samples)
            if key not in known:  # else another name for the same
                logits = self.reference.logits(tables[name], sampling.seed, point.samples)
                known[key] = measure_fidelity(
                    built.run(name),
                    pixels,
                    built.logits(name),
                    mean_logits(logits),
                    self.images.labels,
                    min_agreement=minimum,
                    row_tolerance=ROW_TOLERANCE["int8" if "int8" in storages else types[0].compute],
                    buckets=self.buckets,
                )
            yield name, known[key]

    def report(
        self, built: Built, found: Mapping[str, Fidelity], table: SamplerTable, **more: Any
    ) -> None:
        """Put what was measured, of each operating point, into fidelity.json.

        Args:
            table: of the default point.
        """
        default = built.sampling.default
        _add_to_report(
            self.fresh,
            **found[default].to_dict(),
            operating_points={name: f.to_dict() for name, f in found.items()},
            trajectory=trajectory_error(self.reference, built, default, table),
            latency_ms=_latency(built.run(default), self.images.pixels[:1]),
            **more,
        )

    @property
    def loop(self) -> str:
        """What runs the loop of what is built by now: `NATIVE` or `GRAPH`."""
        return NATIVE if (self.fresh / PAYLOAD / LAYERS).exists() else GRAPH

    def native_loop(
        self, graph: Built, types: tuple[Types, Types], tables: dict[str, SamplerTable]
    ) -> tuple[Built, Fidelity] | None:
        """Put the native loop beside a graph that is verified, where it passes too and is faster.

        Returns:
            What was built then, and its fidelity; None where the graph alone runs the loop.

        Raises:
            ExportError, VerificationFailed: it is asked for, and cannot be had.
        """
        asked, module = self.settings.loop, builder(self.settings.backend)
        insists = asked == NATIVE
        if asked == GRAPH or not (tables[graph.sampling.default].timesteps or insists):
            return None
        if reason := why_not(module, self.lowered):
            if insists:
                raise refused(reason)
            if module.head is not None:
                self.say(f"the graph runs the loop: {reason}")
            return None
        payload = self.fresh / PAYLOAD
        calibration = self.calibration(graph.plan, graph.sampling)
        write_native(module, self.lowered, types, payload, calibration)
        native = self.opened(graph.plan, graph.sampling, types, payload)
        found = dict(self.measure(native, types, tables))
        problems = [p for name in found for p in self.native_problems(name, native, graph, found)]
        taken = {} if problems else self.time_loops(native, graph)
        images = faster_up_to(taken)
        samples = graph.sampling.points[graph.sampling.with_loop].samples
        if problems and insists:
            raise VerificationFailed(
                f"the native loop: {'; '.join(problems)}. No bundle was written; try --loop graph"
            )
        if not images and not insists:
            why = "; ".join(problems) or f"the native loop is no faster here ({shown(taken)})"
            self.say(f"the graph runs the loop: {why}")
            remove_native(payload)
            return None
        most_rows = max(images * samples, MOST_ROWS if insists else 0)
        set_most_rows(payload, most_rows)
        self.say(f"the native loop runs up to {most_rows} rows at once: {shown(taken)}")
        served = self.opened(graph.plan, graph.sampling, types, payload)
        about = {"loop": loop_about(taken, most_rows)}
        self.report(served, found, tables[graph.sampling.default], **about)
        return served, found[graph.sampling.default]

    def native_problems(
        self, name: str, native: Built, graph: Built, found: Mapping[str, Fidelity]
    ) -> list[str]:
        """Why the native loop must not answer at an operating point; empty if it may."""
        fidelity = found[name]
        bound = fidelity.row_tolerance * fidelity.largest_logit
        alike = check_alike(native.logits(name), graph.logits(name), bound)
        return [f"{name}: {problem}" for problem in (*fidelity.problems(), *alike)]

    def time_loops(self, native: Built, graph: Built) -> dict[int, dict[str, float]]:
        """Milliseconds of both loops at the point that answers, by images in a call."""
        sampling = graph.sampling
        name = sampling.with_loop
        count = sampling.points[name].samples

        def tables(images: int) -> Tables:
            pixels = self.images.pixels
            return graph.tables(name, np.resize(pixels, (images, *pixels.shape[1:])), count)

        return time_loops(native.backend, graph.backend, graph.x_v, tables)

    def min_agreement(self, types: tuple[Types, Types]) -> float:
        """The share of labels that must not change."""
        if (asked := self.settings.min_agreement) is not None:
            return asked
        return min(MIN_AGREEMENT[t.storage] for t in types)

    def noise_matters(self, built: Built, table: SamplerTable) -> dict[str, Any]:
        """Measure how answers at the default point depend on the noise."""
        sampling = built.sampling
        floor = instability_floor(self.reference, table, sampling.seed, sampling.point.samples)
        self.say(
            f"instability floor: {floor['share']:.2%} of {floor['images']} images change their "
            f"label over {len(floor['seeds'])} noise seeds, in float32"
        )
        return {"instability": floor, "settled": settling(built, sampling.default)}

    def failure(
        self,
        problems: Sequence[str],
        built: Built,
        types: tuple[Types, Types],
        table: SamplerTable,
        name: str,
    ) -> VerificationFailed:
        """Say what is wrong, and the first layer or step that departs from the reference."""
        backend = self.settings.backend
        self.say(f"{backend}: {'; '.join(problems)}; looking for the first layer that departs")
        departure = diagnose(
            *(self.reference, built, self.fresh / PAYLOAD, self.lowered, backend),
            *(types[0], table, name),
            loop_types=types[1],
            order=self.order(built.plan, built.sampling),
        )
        which = "" if name == DEFAULT else f" at operating point {name}"
        return VerificationFailed(
            f"{backend} {types[0].storage}{which}: {'; '.join(problems)}; {departure.sentence}. "
            "No bundle was written; try --precision fp32, or a lower --min-agreement"
        )

    def order(self, arrays: dict[str, NDArray], sampling: Sampling) -> Order:
        """Return what the builder is told besides model and types."""
        return order_for(self.settings, self.calibration(arrays, sampling))

    def manifest_fields(
        self,
        types: tuple[Types, Types],
        shares: dict[str, Share],
        sampling: Sampling,
        fidelity: Fidelity,
    ) -> dict[str, Any]:
        checkpoint, backend = self.checkpoint, self.settings.backend
        return {
            "method": checkpoint.model.config.method,
            "labels": checkpoint.labels,
            "preprocess": checkpoint.preprocess.to_dict(),
            "backend": backend,
            "precision": Precision(
                types[0].storage, types[1].storage, types[0].compute, shares, self.kept
            ),
            "sampling": sampling,
            "buckets": self.buckets,
            "golden_tolerance": fidelity.row_tolerance,
            "built_for": _built_for(self.settings, self.fresh / PAYLOAD),
            "settings": asdict(self.settings),
            "checkpoint_sha256": checkpoint.sha256,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "loop": self.loop,
        }

    def with_thresholds(self, built: Built) -> Sampling:
        """Find the score under which each point should abstain; write the risk-coverage curve."""
        sampling, truth = built.sampling, self.images.labels
        target = self.settings.target_risk
        if truth is None:
            if target is not None:
                raise DataError("--target-risk needs images whose classes the checkpoint knows")
            return sampling
        points, curves = dict(sampling.points), {}
        for name, point in sampling.points.items():
            probabilities = softmax(built.samples(name, point.samples)).mean(axis=1)
            scores, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
            curve = risk_coverage(scores, correct)
            curves[name] = {
                key: np.asarray(getattr(curve, key)).tolist()
                for key in ("threshold", "coverage", "risk")
            }
            if target is not None:
                found = threshold_for_risk(scores, correct, target)
                points[name] = replace(point, abstain_below=found.threshold)
                curves[name]["chosen"] = found._asdict() | {"target": target}
                self.say(
                    f"{name}: scores below {found.threshold:.4f} are not to be relied on; on "
                    f"{len(truth)} images the others ({found.coverage:.1%}) are wrong in "
                    f"{found.risk:.2%}, at most {found.upper_bound:.2%} with 95 % confidence"
                    + (" if they had not also chosen the point" if len(points) > 1 else "")
                )
                if name == sampling.default:
                    plot_risk_coverage(
                        {name: curve}, self.fresh / RISK_PLOT, target=target, chosen=found
                    )
        write_json(self.fresh / RISK, {"images": len(truth), "operating_points": curves})
        return replace(sampling, points=points)


def finish(folder: Path, checkpoint_path: Path, settings: Settings) -> None:
    """Put text encoder and checkpoint into the folder of a bundle that was built without them."""
    checkpoint = load_checkpoint(checkpoint_path)
    add_parts(folder, checkpoint, lower(checkpoint.model), settings)


def add_parts(folder: Path, checkpoint: Checkpoint, lowered: Lowered, settings: Settings) -> None:
    """Write what is not needed to classify: `TEXT` and `SOURCE`, where they are asked for."""
    if settings.text and lowered.text is not None:
        types = check_types(settings)[0]
        order = order_for(settings)
        found = export_text(checkpoint, lowered, settings.backend, types, folder / TEXT, order)
        _add_to_report(folder, text=found)
    if settings.source:
        copy_files(checkpoint.path, folder / SOURCE, without=[BASELINE])


def _add_to_report(folder: Path, **found: Any) -> None:
    """Put more into the folder's fidelity.json."""
    path = folder / FIDELITY
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_json(path, known | found)


def _latency(run: Callable[[Floats], Floats], pixel: Floats, calls: int = 5) -> float:
    """Median milliseconds from the pixels of one image to its logits."""
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run(pixel)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds[1:])), 4)


def _write_golden(
    fresh: Path,
    images: Images,
    built: Built,
    preprocess: Preprocess,
    fidelity: Fidelity,
) -> None:
    """Keep a few images, of different labels and with a clear winner, and what they gave."""
    logits = built.logits(built.sampling.default)[: 8 * GOLDEN]
    bound = fidelity.row_tolerance * fidelity.largest_logit
    clear = np.flatnonzero(margin(logits) > 2 * bound)
    if not len(clear):
        clear = np.array([int(margin(logits).argmax())])
    _, first = np.unique(logits[clear].argmax(axis=1), return_index=True)
    rows = np.concatenate([clear[np.sort(first)], clear])[:GOLDEN]
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    folder = fresh / GOLDEN_IMAGES
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        source = images.examples[row].image
        (folder / f"{i}{source.suffix}").write_bytes(source.read_bytes())
    pixels = np.ascontiguousarray(images.pixels[rows])
    default, points = built.sampling.default, built.sampling.points
    answers = {f"logits.{name}": built.run(name)(pixels) for name in points if name != default}
    answers |= {"pixels": pixels, "logits": built.run(default)(pixels)}
    save_file(answers, fresh / GOLDEN_ANSWERS)


def _add_not_run(folder: Path, backend: str) -> str:
    """Note that what was compiled was not run, and say so."""
    note = (
        f"verified by running the graphs that were compiled, because this machine cannot run what "
        f"was ({why_unavailable(backend)}). What was compiled has not been run: it is held to its "
        "golden answers when it is first loaded, and marnet-bundle verify does the rest there"
    )
    _add_to_report(folder, not_run=note)
    return f"{backend}: {note}"


def _built_for(settings: Settings, payload: Path | None = None) -> BuiltFor:
    backend, device = settings.backend, device_of(settings.backend, settings.device)
    built = builder(backend)
    common = ("marnet", "numpy", "pillow", "torch", "transformers", "tokenizers", "onnx")
    packages = (*common, *built.packages)
    targets = built.targets(payload) if payload and built.targets else ()
    if device == "cuda" and built.cuda_compute:
        targets = (" ".join(gpu_name()),)
    return BuiltFor(device, platform.machine(), versions(packages), tuple(targets))

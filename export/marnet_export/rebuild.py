"""Again: the verification of a bundle on this machine, and its export with other settings.

Both start from the checkpoint that travels in the bundle, so a bundle is all they need.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from marnet_export.build.builder import ROUTES, Order, builder
from marnet_export.build.native import loop_products
from marnet_export.build.tensorrt.engines import BUCKETS, add_engines
from marnet_export.build.types import Calibration, Types, Unread
from marnet_export.choose.race import export_fastest
from marnet_export.inspection import (
    SKIPPED,
    Check,
    differences,
    failed,
    fidelity_of,
    flatten,
    passed,
)
from marnet_export.job import CALIBRATION, at_work, export_bundle
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.zero_steps import alignment_head, answering, process_table
from marnet_export.prove.departure import BOUNDS, diagnose, relative_errors
from marnet_export.prove.fidelity import (
    BATCH,
    Built,
    Fidelity,
    Reference,
    measure_fidelity,
    trajectory_error,
)
from marnet_export.prove.images import Images, load_images
from marnet_export.prove.receipt import NOT_READ, receipt
from marnet_export.settings import AUTO, Say, Settings
from marnet_export.text import verify_text
from marnet_sdk.alignment import read_head
from marnet_sdk.backends import open_backend
from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.bundle import (
    PAYLOAD,
    PLAN,
    SOURCE,
    TEXT,
    Bundle,
    Manifest,
    read_bundle,
    seal_bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import (
    BundleFormatError,
    EnvironmentMismatch,
    InvalidInput,
    NotFound,
    VerificationFailed,
)
from marnet_sdk.native_loop import NATIVE
from marnet_sdk.tensorrt_library import read_index
from marnet_sdk.uncertainty import mean_logits
from marnet_train.checkpoint import Checkpoint, checkpoint_hash, find_checkpoint, load_checkpoint
from marnet_train.diffusion import SamplerTable

_TENSORRT = "tensorrt"
_SAME = 1e-6  # of the largest value: sums in another order, rounded to float32
_STEPS = 100  # of the loop that are looked at where a bundle fails


def source_of(bundle: Bundle, named: str | None) -> Path:
    """The folder of the checkpoint that a bundle was made from.

    Args:
        named: a folder, or ORG/NAME on the hub; None: what travels in the bundle, whose bytes are
            checked.

    Raises:
        NotFound: the bundle has none and none is named.
        BundleCorrupt: a file of the bundle's is not what was written.
        InvalidInput: the one that is named is another checkpoint.
        VerificationFailed: the bundle's own is another checkpoint.
    """
    wanted = bundle.manifest.checkpoint_sha256
    if named is None:
        if not bundle.has(SOURCE):
            raise NotFound(
                f"{bundle.path} holds no checkpoint: it was exported with --no-source. Name the "
                f"one that it was made from (SHA-256 {wanted[:12]}...) with --checkpoint"
            )
        path, error = bundle.check(SOURCE), VerificationFailed
    else:
        path, error = find_checkpoint(named), InvalidInput
    if (found := checkpoint_hash(path)) != wanted:
        raise error(
            f"{path} is another checkpoint than {bundle.path} was made from: its SHA-256 is "
            f"{found[:12]}..., the manifest says {wanted[:12]}...; name the right one with "
            "--checkpoint, or make a new bundle with marnet-export"
        )
    return path


# --- verify


@dataclass
class Verification:
    """This is what came out of comparing a bundle with its checkpoint on this machine."""

    checks: list[Check] = field(default_factory=list)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)  # operating point -> measured here
    trajectory: list[dict[str, float]] = field(default_factory=list)
    departure: str | None = None  # where a bundle that fails leaves the reference


def verify_again(
    bundle: Bundle,
    checkpoint_path: Path,
    *,
    data: Path | None = None,
    min_agreement: float | None = None,
    say: Say = lambda _: None,
) -> Verification:
    """Hold every operating point of a bundle against the float32 checkpoint, on this machine.

    Args:
        data: as of `export_bundle`. min_agreement: None: what the export was held to.

    Raises:
        CheckpointError, DataError, NotFound: there is nothing to hold it against.
        MissingExtra, BackendUnavailable: the bundle cannot be opened here.
    """
    use_threads(None)
    checkpoint = load_checkpoint(checkpoint_path)
    images = load_images(data, checkpoint, say)
    found = Verification()
    found.checks.append(check_manifest(bundle, checkpoint))
    if found.checks[0].exit_code:
        return found  # its answers mean something else, or its images are prepared differently
    trial = _Trial.of(bundle, checkpoint, images)
    found.checks += [check_plan(trial), check_head(trial), check_receipt(bundle)]
    least = fidelity_of(bundle)["min_agreement"] if min_agreement is None else min_agreement
    found.fidelity = trial.measure(least)
    for name, fidelity in found.fidelity.items():
        found.checks.append(_agreement(name, fidelity))
    found.checks.append(check_text_agreement(trial, checkpoint))
    found.trajectory = trial.trajectory(bundle.manifest.sampling.default)
    broken = [name for name, fidelity in found.fidelity.items() if fidelity.problems()]
    if broken:
        found.departure = trial.departure(broken[0])
    return found


def check_manifest(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Tell whether labels, preprocessing and loop are the checkpoint's."""
    manifest, config = bundle.manifest, checkpoint.model.config
    sampling = manifest.sampling
    told = {
        "method": manifest.method,
        "labels": list(manifest.labels),
        "preprocess": manifest.preprocess,
        "train_steps": sampling.train_steps,
        "width": sampling.width,
    }
    true = {
        "method": config.method,
        "labels": list(checkpoint.labels),
        "preprocess": checkpoint.preprocess.to_dict(),
        "train_steps": config.schedule.steps,
        "width": checkpoint.model.latent_width,
    }
    wrong = list(differences(flatten(told), flatten(true)))
    name = "manifest"
    if wrong:
        return failed(name, f"not the checkpoint's: {', '.join(wrong)}")
    for point, steps in sampling.points.items():
        if _table(checkpoint, bundle, point).timesteps != steps.timesteps:
            return failed(name, f"operating point {point} visits other steps than its sampler")
    return passed(name, "labels, preprocessing and sampling are the checkpoint's")


def _table(checkpoint: Checkpoint, bundle: Bundle, name: str) -> SamplerTable:
    point = bundle.manifest.sampling.points[name]
    schedule = checkpoint.model.config.schedule
    return process_table(schedule, point.sampler, len(point.timesteps), point.eta)


def check_plan(trial: _Trial) -> Check:
    """Tell whether the loop's tables are the checkpoint's, up to rounding in float64."""
    name = "sampling plan"
    got, want = trial.built.plan, trial.lowered.plan.tensors(trial.tables)
    if {k: v.shape for k, v in got.items()} != {k: v.shape for k, v in want.items()}:
        return Check(name, SKIPPED, "this version of marnet rewrites the loop in another way")
    for key, array in want.items():
        error = float(np.abs(got[key] - array).max(initial=0))
        if not error <= _SAME * float(np.abs(array).max(initial=0)):  # NaN too
            return failed(name, f"{key} is off by up to {error:.3g} from the checkpoint's")
    return passed(name, f"its {len(want)} tables are the checkpoint's")


def check_head(trial: _Trial) -> Check:
    """Tell whether the branch that answers without the loop is the checkpoint's, to the bit."""
    name = "alignment branch"
    got, want = read_head(trial.bundle.path / PAYLOAD), alignment_head(trial.lowered)
    if got is None:
        return Check(name, SKIPPED, "no operating point is without the loop")
    if want is None:
        return failed(name, "the checkpoint has none")
    wrong = [key for key, array in vars(want).items() if not np.array_equal(vars(got)[key], array)]
    if wrong:
        return failed(name, f"{', '.join(wrong)} is not the checkpoint's")
    return passed(name, "it is the checkpoint's")


def check_receipt(bundle: Bundle) -> Check:
    """Read the receipt from the payload once more.

    What is stored cannot change with the machine; what is multiplied in may, where the runtime
    chooses.
    """
    manifest, name = bundle.manifest, "receipt"
    types = _types(bundle)[0]
    try:
        module = builder(manifest.backend)
        shape = manifest.preprocessing.output_shape
        products = module.products(bundle.path / PAYLOAD, types, shape)
        products = loop_products(module, bundle.path / PAYLOAD, types, products)
    except EnvironmentMismatch as error:
        return Check(name, SKIPPED, f"it cannot be read here: {error}")
    except Unread as error:
        return Check(name, SKIPPED, f"{NOT_READ}: {error}")
    point = manifest.sampling.point
    steps = len(point.timesteps)
    found = receipt(answering(products, bundle.path / PAYLOAD, steps), steps, point.samples)
    told = manifest.precision.receipt
    flat = [flatten({part: asdict(s) for part, s in x.items()}) for x in (told, found)]
    wrong = differences(*flat)
    if not wrong:
        count = manifest.precision.receipt["all"].multiply_adds
        return passed(name, f"read again, the same: {count:,} multiply-adds an image")
    key, (then, now) = next(iter(wrong.items()))
    elsewhere = all(".compute." in key for key in wrong)
    detail = f"{len(wrong)} entries differ, the first {key}: {then} in the manifest, {now} here"
    return (
        failed(name, detail, EnvironmentMismatch.exit_code) if elsewhere else failed(name, detail)
    )


def check_text_agreement(trial: _Trial, checkpoint: Checkpoint) -> Check:
    """Hold the text encoder against the checkpoint's."""
    name, bundle = "agreement, texts", trial.bundle
    if not bundle.has(TEXT):
        return Check(name, SKIPPED, "the bundle has no text encoder")
    backend, types = bundle.manifest.backend, _types(bundle)[0]
    try:
        device = bundle.manifest.built_for.device
        found = verify_text(bundle.path / TEXT, checkpoint, trial.lowered, backend, types, device)
    except VerificationFailed as error:
        return failed(name, re.split(r"[.;] [Nn]o bundle was written", str(error))[0])
    return passed(
        name,
        f"features are off by at most {found['error']:.2g} of their norm, the least cosine "
        f"similarity of an embedding is {found['cosine']:.6f}",
    )


def _agreement(name: str, fidelity: Fidelity) -> Check:
    what = f"agreement, {name}"
    if problems := fidelity.problems():
        return failed(what, "; ".join(problems))
    low, high = fidelity.top1_interval
    return passed(
        what,
        f"{fidelity.top1_agreement:.2%} of {fidelity.images} images (95 % interval {low:.2%} to "
        f"{high:.2%}), at least {fidelity.min_agreement:.2%} was asked",
    )


@dataclass(frozen=True, eq=False)
class _Trial:
    """A bundle and its checkpoint on the same images and noise."""

    bundle: Bundle
    images: Images
    reference: Reference
    built: Built
    tables: dict[str, SamplerTable]

    @classmethod
    def of(cls, bundle: Bundle, checkpoint: Checkpoint, images: Images) -> _Trial:
        manifest = bundle.manifest
        sampling = manifest.sampling
        compute = manifest.precision.compute
        device = manifest.built_for.device
        backend = open_backend(manifest.backend, bundle.path / PAYLOAD, compute, None, device)
        by_image = sampling.noise == "image"
        return cls(
            bundle,
            images,
            Reference(checkpoint.model, images.pixels, by_image=by_image),
            Built(
                backend,
                load_file(bundle.file(PLAN)),
                sampling,
                images.pixels,
                batch=1 if manifest.loop == NATIVE else BATCH,  # of many rows, the graph answers
            ),
            {name: _table(checkpoint, bundle, name) for name in sampling.points},
        )

    def measure(self, min_agreement: float) -> dict[str, Fidelity]:
        """Measure the fidelity of every operating point."""
        sampling = self.bundle.manifest.sampling
        known: dict[tuple, Fidelity] = {}
        out = {}
        for name, point in sampling.points.items():
            key = (point.sampler, point.eta, point.timesteps, point.samples)
            if key not in known:
                expected = self.reference.logits(self.tables[name], sampling.seed, point.samples)
                known[key] = measure_fidelity(
                    self.built.run(name),
                    self.images.pixels,
                    self.built.logits(name),
                    mean_logits(expected),
                    self.images.labels,
                    min_agreement=min_agreement,
                    row_tolerance=self.bundle.manifest.golden_tolerance,
                    buckets=self.bundle.manifest.buckets,
                )
            out[name] = known[key]
        return out

    @cached_property
    def lowered(self) -> Lowered:
        return lower(self.reference.model)

    def trajectory(self, name: str, most: int = 12) -> list[dict[str, float]]:
        """See `trajectory_error`."""
        return trajectory_error(self.reference, self.built, name, self.tables[name], most=most)

    def departure(self, name: str) -> str:
        """Say in one line where the payload departs from the reference at an operating point.

        The layers of its encoder cannot be seen, so they are built again. The steps of its loop
        can: a chain that is cut short returns the estimate of its last step.
        """
        encoder, loop = _types(self.bundle)
        apart = float(relative_errors(self.built.x_v, self.reference.x_v.numpy()).max())
        if not apart <= BOUNDS[_coarsest(encoder)].layer:  # NaN too
            found = diagnose(
                self.reference,
                self.built,
                self.bundle.path / PAYLOAD,
                self.lowered,
                self.bundle.manifest.backend,
                encoder,
                self.tables[name],
                name,
                loop_types=loop,
                order=self._order(name),
            )
            return found.sentence
        if not self.tables[name].timesteps:
            return (
                f"features are off by no more than their types explain, by up to {apart:.2g}; what "
                "departs is the alignment branch's head behind them"
            )
        bound, steps = BOUNDS[_coarsest(loop)].step, len(self.tables[name].timesteps)
        for row in self.trajectory(name, most=_STEPS):
            if not row["error"] <= bound:
                return (
                    f"the encoder agrees; the reverse loop or the head behind it departs from step "
                    f"{row['step']:.0f} of {steps} (t = {row['t']:.0f}) on, relative error "
                    f"{row['error']:.2g} (bound {bound:g})"
                )
        return (
            f"no step departs by more than its types explain: features are off by up to "
            f"{apart:.2g}, the logits of every step by up to {bound:g}"
        )

    def _order(self, name: str) -> Order:
        """Return what the builder is told: with a calibration, where the bundle has int8."""
        manifest, images = self.bundle.manifest, slice(0, CALIBRATION)
        device = manifest.built_for.device
        if "int8" not in (manifest.precision.asked, manifest.precision.loop):
            return Order(device)
        point = name if self.tables[name].timesteps else self.built.sampling.with_loop
        tables = self.built.tables(point, self.images.pixels[:1], 1)
        x_v = self.reference.x_v[images].numpy()
        pixels = self.images.pixels[images]
        kept = tuple(manifest.precision.kept)
        calibration = Calibration(pixels, x_v, tables.coefficients, tables.bias, kept)
        return Order(device, calibration=calibration)


def _coarsest(types: Types) -> str:
    return max((types.storage, types.compute), key=list(BOUNDS).index)


def _types(bundle: Bundle) -> tuple[Types, Types]:
    """Return the types of encoder and loop."""
    precision = bundle.manifest.precision
    return Types(precision.asked, precision.compute), Types(precision.loop, precision.compute)


# --- rebuild


def rebuild(
    path: Path,
    output: Path,
    changes: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    data: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Settings:
    """Export a bundle's checkpoint again, with the bundle's settings but for `changes`.

    Raises:
        NotFound, InvalidInput: the checkpoint is not there; see `source_of`.
        OutputExists: `output` is there, and `overwrite` is False.
        ExportError, VerificationFailed: as of `export_bundle`. What was at `output` is still there.
    """
    bundle = read_bundle(path, lazily=True)
    settings = changed_settings(bundle, changes)
    source = source_of(bundle, checkpoint)
    if data is None and checkpoint is None and not (source / "samples").is_dir():
        raise NotFound(
            f"{path} holds no images to verify on: its checkpoint was trained with --no-samples. "
            "Name a data set with --data"
        )
    export = export_fastest if settings.backend == AUTO else export_bundle
    export(source, output, settings, data=data, overwrite=overwrite, say=say)
    return settings


def changed_settings(bundle: Bundle, changes: Mapping[str, Any]) -> Settings:
    """The settings of a bundle's export, but for some.

    Raises:
        BundleFormatError: the manifest has settings that this version does not know.
        InvalidInput: they do not go together.
    """
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in bundle.manifest.settings.items()
    }
    if changes.get("backend", settings["backend"]) != settings["backend"]:
        # Those are another's.
        settings |= {"targets": (), "route": ROUTES[0], "device": None, "loop": AUTO}
    if settings["steps"] == AUTO and changes.get("steps", AUTO) != AUTO:  # those are of a sweep
        settings["latency_budget_ms"] = None
        if settings["precision"] == AUTO:
            settings["precision"] = bundle.manifest.precision.asked
        if changes.get("sampler", settings["sampler"]) != "ddim":
            settings["eta"] = 0.0
    if changes.get("steps") == 0:
        settings |= {"sampler": None, "eta": 0.0, "samples": None}  # those are of a loop
    try:
        return Settings(**settings | dict(changes))
    except TypeError as error:
        raise BundleFormatError(
            f"{bundle.path} was exported with settings that this version does not know ({error}); "
            "upgrade marnet, or export its source/ with marnet-export --checkpoint"
        ) from error


def add_targets(
    path: Path,
    output: Path,
    targets: Sequence[str],
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> None:
    """Build engines for more GPUs into a bundle of TensorRT; everything else stays.

    Raises:
        InvalidInput: a bundle of another backend.
        ExportError, MissingExtra: the engines cannot be built. `path` is what it was.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    if manifest.backend != _TENSORRT:
        raise InvalidInput(
            f"--target adds engines to a bundle of tensorrt, and {path} is one of "
            f"{manifest.backend}; make one with: marnet-bundle rebuild {path} --backend tensorrt"
        )
    with at_work(output, overwrite=overwrite) as fresh:
        shutil.copytree(path, fresh, dirs_exist_ok=True)
        buckets = manifest.buckets or BUCKETS
        for folder in (fresh / PAYLOAD, fresh / TEXT):
            if any(folder.glob("*.onnx")):
                add_engines(folder, targets, buckets=buckets)
        sets = read_index(fresh / PAYLOAD)
        built = [str(one) for one in sets]
        say(f"has engines: {'; '.join(built)}")
        names = sorted({name for one in sets for name in one.targets}, key=lambda n: (len(n), n))
        kept = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "files"}
        kept["built_for"] = replace(manifest.built_for, targets=tuple(built))
        kept["settings"] = manifest.settings | {"targets": names}
        seal_bundle(fresh, kept)
        try:
            Classifier(fresh)
        except EnvironmentMismatch as error:
            say(f"not tried, because it does not run here: {error}")

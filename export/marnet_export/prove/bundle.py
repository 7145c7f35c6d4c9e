"""A finished bundle is held against its checkpoint once more, on this machine."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from marnet_export.build.builder import Order, builder
from marnet_export.build.native import loop_products
from marnet_export.build.types import Arithmetic, Calibration, Types, Unread
from marnet_export.inspection import differences, fidelity_of, flatten
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.zero_steps import alignment_head, process_table
from marnet_export.prove.checks import SKIPPED, Check, failed, passed
from marnet_export.prove.departure import diagnose
from marnet_export.prove.fidelity import Fidelity
from marnet_export.prove.images import Images, load_images
from marnet_export.prove.receipt import NOT_READ, answering, receipt
from marnet_export.prove.reference import Reference
from marnet_export.prove.trial import BATCH, Built, Trial
from marnet_export.settings import Say
from marnet_export.text import verify_text
from marnet_export.work import CALIBRATION
from marnet_sdk.alignment import read_head
from marnet_sdk.backends import open_backend
from marnet_sdk.backends.torch_cpu import use_threads
from marnet_sdk.bundle import PAYLOAD, PLAN, TEXT, Bundle
from marnet_sdk.errors import EnvironmentMismatch, VerificationFailed
from marnet_sdk.native_loop import NATIVE
from marnet_train.checkpoint import Checkpoint, load_checkpoint
from marnet_train.diffusion import SamplerTable

_SAME = 1e-6  # of the largest value: sums in another order, rounded to float32


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
    least = fidelity_of(bundle)["min_agreement"] if min_agreement is None else min_agreement
    trial, lowered = open_trial(bundle, checkpoint, images, least), lower(checkpoint.model)
    found.checks += [check_plan(trial, lowered), check_head(bundle, lowered), check_receipt(bundle)]
    found.fidelity = dict(trial.measure())
    for name, fidelity in found.fidelity.items():
        found.checks.append(_agreement(name, fidelity))
    found.checks.append(check_text_agreement(bundle, checkpoint, lowered))
    found.trajectory = trial.trajectory(bundle.manifest.sampling.default)
    broken = [name for name, fidelity in found.fidelity.items() if fidelity.problems()]
    if broken:
        payload, order = bundle.path / PAYLOAD, _order(bundle, trial, broken[0])
        what = payload, lowered, bundle.manifest.backend, _types(bundle), order
        found.departure = diagnose(trial, broken[0], *what).sentence
    return found


def open_trial(
    bundle: Bundle, checkpoint: Checkpoint, images: Images, min_agreement: float
) -> Trial:
    """A bundle beside its checkpoint, held to what its export was held to but for the agreement."""
    manifest = bundle.manifest
    sampling, device = manifest.sampling, manifest.built_for.device
    compute, payload = manifest.precision.compute, bundle.path / PAYLOAD
    batch = 1 if manifest.loop == NATIVE else BATCH  # of many rows, the graph answers
    backend = open_backend(manifest.backend, payload, compute, None, device)
    return Trial(
        Reference(checkpoint.model, images.pixels, by_image=sampling.noise == "image"),
        Built(backend, load_file(bundle.file(PLAN)), sampling, images.pixels, batch=batch),
        images.labels,
        {name: _table(checkpoint, bundle, name) for name in sampling.points},
        min_agreement=min_agreement,
        row_tolerance=manifest.golden_tolerance,
        buckets=manifest.buckets,
    )


def check_manifest(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Tell whether labels, preprocessing and loop are the checkpoint's."""
    name, manifest, config = "manifest", bundle.manifest, checkpoint.model.config
    sampling = manifest.sampling
    pairs = {
        "method": (manifest.method, config.method),
        "labels": (list(manifest.labels), list(checkpoint.labels)),
        "preprocess": (manifest.preprocess, checkpoint.preprocess.to_dict()),
        "train_steps": (sampling.train_steps, config.schedule.steps),
        "width": (sampling.width, checkpoint.model.latent_width),
    }
    told, true = (flatten({key: pair[i] for key, pair in pairs.items()}) for i in range(2))
    if wrong := differences(told, true):
        return failed(name, f"not the checkpoint's: {', '.join(wrong)}")
    for point, steps in sampling.points.items():
        if _table(checkpoint, bundle, point).timesteps != steps.timesteps:
            return failed(name, f"operating point {point} visits other steps than its sampler")
    return passed(name, "labels, preprocessing and sampling are the checkpoint's")


def _table(checkpoint: Checkpoint, bundle: Bundle, name: str) -> SamplerTable:
    point = bundle.manifest.sampling.points[name]
    schedule = checkpoint.model.config.schedule
    return process_table(schedule, point.sampler, len(point.timesteps), point.eta)


def check_plan(trial: Trial, lowered: Lowered) -> Check:
    """Tell whether the loop's tables are the checkpoint's, up to rounding in float64."""
    name = "sampling plan"
    got, want = trial.built.plan, lowered.plan.tensors(dict(trial.tables))
    if {k: v.shape for k, v in got.items()} != {k: v.shape for k, v in want.items()}:
        return Check(name, SKIPPED, "this version of marnet rewrites the loop in another way")
    for key, array in want.items():
        error = float(np.abs(got[key] - array).max(initial=0))
        if not error <= _SAME * float(np.abs(array).max(initial=0)):  # NaN too
            return failed(name, f"{key} is off by up to {error:.3g} from the checkpoint's")
    return passed(name, f"its {len(want)} tables are the checkpoint's")


def check_head(bundle: Bundle, lowered: Lowered) -> Check:
    """Tell whether the branch that answers without the loop is the checkpoint's, to the bit."""
    name = "alignment branch"
    got, want = read_head(bundle.path / PAYLOAD), alignment_head(lowered)
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
    types = _types(bundle).encoder
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


def check_text_agreement(bundle: Bundle, checkpoint: Checkpoint, lowered: Lowered) -> Check:
    """Hold the text encoder against the checkpoint's."""
    name, manifest = "agreement, texts", bundle.manifest
    if not bundle.has(TEXT):
        return Check(name, SKIPPED, "the bundle has no text encoder")
    types, device = _types(bundle).encoder, manifest.built_for.device
    try:
        found = verify_text(
            bundle.path / TEXT, checkpoint, lowered, manifest.backend, types, device
        )
    except VerificationFailed as error:
        return failed(name, re.split(r"[.;] [Nn]o bundle was written", str(error))[0])
    return passed(
        name,
        f"features are off by at most {found['error']:.2g} of their norm, the least cosine "
        f"similarity of an embedding is {found['cosine']:.6f}",
    )


def _types(bundle: Bundle) -> Arithmetic:
    precision = bundle.manifest.precision
    encoder, loop = (Types(kind, precision.compute) for kind in (precision.asked, precision.loop))
    return Arithmetic(encoder, loop)


def _order(bundle: Bundle, trial: Trial, name: str) -> Order:
    """Return what the builder is told: with a calibration, where the bundle has int8."""
    manifest, images = bundle.manifest, slice(0, CALIBRATION)
    device = manifest.built_for.device
    if "int8" not in (manifest.precision.asked, manifest.precision.loop):
        return Order(device)
    built = trial.built
    point = name if trial.tables[name].timesteps else built.sampling.with_loop
    tables = built.tables(point, built.pixels[:1], 1)
    x_v, kept = trial.reference.x_v[images].numpy(), tuple(manifest.precision.kept)
    calibration = Calibration(built.pixels[images], x_v, tables.coefficients, tables.bias, kept)
    return Order(device, calibration=calibration)

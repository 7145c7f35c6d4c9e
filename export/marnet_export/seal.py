"""This module writes what travels beside a payload, the manifest, and the seal."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from marnet_export.build.builder import builder, device_of
from marnet_export.build.opened import runs_here
from marnet_export.build.types import Arithmetic
from marnet_export.lower.methods import Lowered, lower
from marnet_export.prove.checks import PASSED, check_second_process
from marnet_export.prove.fidelity import Fidelity, margin
from marnet_export.prove.trial import Built
from marnet_export.settings import Settings, check_types, order_for
from marnet_export.text import export_text
from marnet_export.work import Job, add_to_report
from marnet_sdk.backends import why_unavailable
from marnet_sdk.backends.torch_device import gpu_name
from marnet_sdk.bundle import (
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    PAYLOAD,
    SOURCE,
    TEXT,
    BatchTimes,
    BuiltFor,
    Precision,
    Sampling,
    Share,
    seal_bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import processor, versions
from marnet_sdk.errors import VerificationFailed
from marnet_sdk.native_loop import GRAPH, LAYERS, NATIVE
from marnet_train.checkpoint import BASELINE, Checkpoint, copy_files, load_checkpoint

GOLDEN = 8  # images that travel with the bundle
TABLES = f"{PAYLOAD}/tables.safetensors"
_TIMED, _ROUNDS = (1, 4, 16), 5  # batch sizes that are timed, and how often each is


def seal(
    job: Job,
    built: Built,
    types: Arithmetic,
    shares: Mapping[str, Share],
    sampling: Sampling,
    fidelity: Fidelity,
) -> None:
    """Write what is beside the payload and the manifest; what was written loads, here and in a
    second process.

    Args:
        sampling: with the thresholds that were found.

    Raises:
        VerificationFailed: it does not load there, or answers differently.
    """
    fresh, checkpoint, backend = job.fresh, job.checkpoint, job.settings.backend
    _write_beside(job, built, fidelity)
    encoder, loop = types
    precision = Precision(
        encoder.storage, loop.storage, encoder.compute, dict(shares), dict(job.kept.layers)
    )
    fields = {
        "method": checkpoint.model.config.method,
        "labels": checkpoint.labels,
        "preprocess": checkpoint.preprocess.to_dict(),
        "backend": backend,
        "precision": precision,
        "sampling": sampling,
        "buckets": builder(backend).buckets,
        "golden_tolerance": fidelity.row_tolerance,
        "built_for": built_for(job.settings, job.payload),
        "settings": asdict(job.settings),
        "checkpoint_sha256": checkpoint.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "loop": NATIVE if (job.payload / LAYERS).exists() else GRAPH,
    }
    seal_bundle(fresh, fields)
    if runs_here(backend):
        with Classifier(fresh) as classifier:
            _check_in_second_process(job, classifier)
            fields["batch_times"] = _batch_times(classifier)
    else:
        _note_not_run(job)
    seal_bundle(fresh, fields)


def _write_beside(job: Job, built: Built, fidelity: Fidelity) -> None:
    """Write golden answers, ready tables, text encoder, checkpoint."""
    _write_golden(job, built, fidelity)
    sampling = built.sampling
    if sampling.noise == "shared" and sampling.point.timesteps:
        tables = built.tables(sampling.default, built.pixels[:1], sampling.point.samples)
        arrays = {"coefficients": tables.coefficients, "bias": tables.bias}
        save_file(arrays, job.fresh / TABLES)
    add_parts(job.fresh, job.checkpoint, job.lowered, job.settings)


def _write_golden(job: Job, built: Built, fidelity: Fidelity) -> None:
    """Keep a few images, of different labels and with a clear winner, and what they gave."""
    logits = built.logits(built.sampling.default)[: 8 * GOLDEN]
    bound = fidelity.row_tolerance * fidelity.largest_logit
    clear = np.flatnonzero(margin(logits) > 2 * bound)
    if not len(clear):
        clear = np.array([int(margin(logits).argmax())])
    _, first = np.unique(logits[clear].argmax(axis=1), return_index=True)
    rows = np.concatenate([clear[np.sort(first)], clear])[:GOLDEN]
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    folder = job.fresh / GOLDEN_IMAGES
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        source = job.images.examples[row].image
        (folder / f"{i}{source.suffix}").write_bytes(source.read_bytes())
    pixels = np.ascontiguousarray(job.images.pixels[rows])
    default, points = built.sampling.default, built.sampling.points
    answers = {f"logits.{name}": built.run(name)(pixels) for name in points if name != default}
    answers |= {"pixels": pixels, "logits": built.run(default)(pixels)}
    save_file(answers, job.fresh / GOLDEN_ANSWERS)


def finish(folder: Path, checkpoint_path: Path, settings: Settings) -> None:
    """Put text encoder and checkpoint into the folder of a bundle that was built without them."""
    checkpoint = load_checkpoint(checkpoint_path)
    add_parts(folder, checkpoint, lower(checkpoint.model), settings)


def add_parts(folder: Path, checkpoint: Checkpoint, lowered: Lowered, settings: Settings) -> None:
    """Write what is not needed to classify: `TEXT` and `SOURCE`, where they are asked for."""
    if settings.text and lowered.text is not None:
        types, order = check_types(settings).encoder, order_for(settings)
        found = export_text(checkpoint, lowered, settings.backend, types, folder / TEXT, order)
        add_to_report(folder, text=found)
    if settings.source:
        copy_files(checkpoint.path, folder / SOURCE, without=[BASELINE])


def _check_in_second_process(job: Job, classifier: Classifier) -> None:
    """Open the bundle in a fresh process, as it will be deployed, and compare the answers."""
    found = check_second_process(classifier.bundle, classifier)
    if found.outcome != PASSED:
        raise VerificationFailed(
            f"the bundle opens in this process, but in a second one {found.detail}. No bundle "
            "was written"
        )
    job.report(second_process=found.detail)


def _batch_times(classifier: Classifier) -> BatchTimes | None:
    """Measure batches of a few sizes, so that a server on such a machine need not learn it."""
    if (threads := classifier.runtime.threads) is None:  # on a GPU
        return None
    pixels = load_file(classifier.bundle.file(GOLDEN_ANSWERS))["pixels"]
    taken: dict[int, list[float]] = {size: [] for size in _TIMED}
    for _ in range(_ROUNDS):
        for size, seconds in taken.items():
            batch = np.resize(pixels, (size, *pixels.shape[1:]))
            started = time.perf_counter()
            classifier.predict_pixels(batch)
            seconds.append(time.perf_counter() - started)
    # The least, which other work on this machine disturbs the least.
    least = tuple((size, min(seconds)) for size, seconds in taken.items())
    return BatchTimes(processor(), threads, least)


def _note_not_run(job: Job) -> None:
    """Note that what was compiled was not run, and say so."""
    backend = job.settings.backend
    note = (
        f"verified by running the graphs that were compiled, because this machine cannot run what "
        f"was ({why_unavailable(backend)}). What was compiled has not been run: it is held to its "
        "golden answers when it is first loaded, and marnet-bundle verify does the rest there"
    )
    job.report(not_run=note)
    job.say(f"{backend}: {note}")


def built_for(settings: Settings, payload: Path | None = None) -> BuiltFor:
    """The machine, the versions and, of what is in a payload, the targets of a build."""
    backend = builder(settings.backend)
    device = device_of(backend.name, settings.device)
    common = ("marnet", "numpy", "pillow", "torch", "transformers", "tokenizers", "onnx")
    targets = backend.targets(payload) if payload and backend.targets else ()
    if device == "cuda" and backend.cuda_compute:
        targets = (" ".join(gpu_name()),)
    packages = versions((*common, *backend.packages))
    return BuiltFor(device, platform.machine(), packages, tuple(targets))

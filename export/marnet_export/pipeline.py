"""From a checkpoint to a verified bundle.

Everything is built in a temporary folder beside the target, which is renamed into place last: an
export that fails or is killed leaves nothing half-written.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from marnet_export.builders import (
    BUILDERS,
    PRECISIONS,
    TORCH_TYPES,
    Types,
    builder,
    choose_types,
)
from marnet_export.plan import SamplingPlan, make_plan
from marnet_export.verify import (
    MIN_AGREEMENT,
    ROW_TOLERANCE,
    Fidelity,
    margin,
    measure_fidelity,
    reference_logits,
)
from marnet_sdk.backends import Floats, Tables, make_tables, open_backend
from marnet_sdk.bundle import (
    FIDELITY,
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    PLAN,
    BuiltFor,
    Precision,
    Sampling,
    is_bundle,
    seal_bundle,
)
from marnet_sdk.classifier import Classifier
from marnet_sdk.environment import versions
from marnet_sdk.errors import (
    DataError,
    ExportError,
    InvalidInput,
    NotFound,
    VerificationFailed,
)
from marnet_sdk.files import atomic_directory
from marnet_sdk.preprocess import Preprocess
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.checkpoint import Checkpoint, load_checkpoint, write_json
from marnet_train.data.dataset import Example, read_one_split
from marnet_train.data.imagefolder import is_split, read_split
from marnet_train.data.pixels import PixelStore
from marnet_train.models.marnet import MARNet

Say = Callable[[str], None]
MAX_IMAGES = 2000  # verified on at most so many
GOLDEN = 8  # images that travel with the bundle


@dataclass(frozen=True)
class Settings:
    """What an export is asked for."""

    backend: str = "torchscript"
    precision: str = "fp32"
    compute: str | None = None  # None: what the backend does best on a CPU
    sampler: str = "ddpm"
    steps: int | None = None  # None: T
    seed: int = 0  # of the noise trajectory
    min_agreement: float | None = None  # None: by precision

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("backend", self.backend, tuple(BUILDERS)),
            ("precision", self.precision, PRECISIONS),
            ("compute", self.compute or "fp32", PRECISIONS),
        ):
            if value not in choices:
                raise InvalidInput(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class _Images:
    """The images an export is verified on."""

    examples: tuple[Example, ...]
    pixels: Floats  # [N, 3, H, W]
    labels: NDArray[np.int64] | None  # [N]


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
    types = choose_types(settings.backend, settings.precision, settings.compute)
    with atomic_directory(output, overwrite=overwrite, replaceable=is_bundle) as fresh:
        checkpoint = load_checkpoint(checkpoint_path)
        images = _load_images(data, checkpoint, say)
        plan = make_plan(checkpoint.model, settings.sampler, settings.steps)
        check_range(checkpoint.model, plan, types.storage)
        say(plan.sentence)
        say(types.sentence)
        sampling = Sampling(
            sampler=settings.sampler,
            timesteps=plan.table.timesteps,
            train_steps=plan.table.train_steps,
            seed=settings.seed,
            width=checkpoint.model.denoiser.dim,
        )
        run = _build(fresh, checkpoint, plan, sampling, settings.backend, types, images.pixels)
        fidelity = _verify(run, checkpoint, plan, settings, types, images)
        if problems := fidelity.problems():
            raise VerificationFailed(
                f"{settings.backend} {settings.precision}: "
                + "; ".join(problems)
                + ". No bundle was written; try --precision fp32, or a lower --min-agreement"
            )
        write_json(fresh / FIDELITY, fidelity.to_dict())
        _write_golden(fresh, images, run, checkpoint.preprocess, fidelity)
        seal_bundle(fresh, _manifest_fields(checkpoint, settings, types, sampling, fidelity, fresh))
        Classifier(fresh)  # the last word: what was written loads and passes its own self-test
    return fidelity


def check_range(model: MARNet, plan: SamplingPlan, storage: str) -> None:
    """Refuse matrices that the storage type cannot hold.

    Raises:
        ExportError: names the first such matrix.
    """
    largest = torch.finfo(TORCH_TYPES[storage]).max
    used = {"vision": model.vision, "project_vision": model.project_vision}
    used |= {"classifier": model.classifier}
    matrices = {
        f"{part}.{name}": float(tensor.detach().abs().max())
        for part, module in used.items()
        for name, tensor in module.named_parameters()
        if tensor.ndim >= 2
    }
    matrices |= {f"denoiser: {name}": abs(m).max() for name, m in plan.matrices().items()}
    for name, value in matrices.items():
        if value > largest:
            raise ExportError(
                f"{name} holds {value:.4g}, beyond the largest {storage} value ({largest:.4g}); "
                "use --precision bf16 or fp32"
            )


def _load_images(data: Path | None, checkpoint: Checkpoint, say: Say) -> _Images:
    folder = checkpoint.samples if data is None else data
    if data is None and not folder.is_dir():
        raise DataError(
            f"{folder} does not exist: this checkpoint was trained with --no-samples, so name "
            "images to verify on with --data"
        )
    if not folder.is_dir():
        raise NotFound(f"{data} does not exist; --data takes a data set or one of its splits")
    if is_split(folder):
        examples = read_split(folder, needs_text=False)
    else:
        examples = read_one_split(folder, "val")
    # In random order, because a list may be sorted by class: a part of it must show all of them.
    order = np.random.default_rng(0).permutation(len(examples))[:MAX_IMAGES]
    examples = tuple(examples[i] for i in order)
    index = {label: i for i, label in enumerate(checkpoint.labels)}
    labels = np.array([index.get(e.label, -1) for e in examples])
    if (labels < 0).any():
        say(
            f"{(labels < 0).sum()} of {len(labels)} images have a class that the checkpoint does "
            "not know; agreement is measured on all, accuracy is not reported"
        )
    pixels = PixelStore(examples, checkpoint.preprocess, "val").batch(slice(None)).numpy()
    return _Images(examples, pixels, None if (labels < 0).any() else labels)


def _build(
    fresh: Path,
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    sampling: Sampling,
    backend: str,
    types: Types,
    pixels: Floats,
) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Write the payload and return the built graph, loaded back from it."""
    payload = (fresh / PLAN).parent
    payload.mkdir()
    save_file(plan.tensors(), fresh / PLAN)
    example = torch.from_numpy(np.resize(pixels, (2, *pixels.shape[1:])))
    builder(backend).build(checkpoint.model, plan, example, types, payload)
    loaded = open_backend(backend, payload, types.compute, None)
    tables: Tables = make_tables(
        fresh / PLAN,
        seed=sampling.seed,
        timesteps=sampling.timesteps,
        train_steps=sampling.train_steps,
        width=sampling.width,
    )
    return lambda batch: loaded.run(batch, tables)


def _verify(
    run: Callable[[Floats], tuple[Floats, Floats]],
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    settings: Settings,
    types: Types,
    images: _Images,
) -> Fidelity:
    table = plan.table
    trajectory = draw_trajectory(
        settings.seed, table.timesteps, table.train_steps, checkpoint.model.denoiser.dim
    )
    minimum = settings.min_agreement
    return measure_fidelity(
        lambda pixels: run(pixels)[0],
        images.pixels,
        reference_logits(checkpoint.model, table, trajectory, images.pixels),
        images.labels,
        min_agreement=MIN_AGREEMENT[settings.precision] if minimum is None else minimum,
        row_tolerance=ROW_TOLERANCE[types.compute],
    )


def _write_golden(
    fresh: Path,
    images: _Images,
    run: Callable[[Floats], tuple[Floats, Floats]],
    preprocess: Preprocess,
    fidelity: Fidelity,
) -> None:
    """Keep a few images, of different labels and with a clear winner, and what they gave."""
    logits, _ = run(images.pixels[: 8 * GOLDEN])
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
    save_file({"pixels": pixels, "logits": run(pixels)[0]}, fresh / GOLDEN_ANSWERS)


def _manifest_fields(
    checkpoint: Checkpoint,
    settings: Settings,
    types: Types,
    sampling: Sampling,
    fidelity: Fidelity,
    fresh: Path,
) -> dict[str, Any]:
    stored = builder(settings.backend).stored_elements((fresh / PLAN).parent)
    names = {dtype: name for name, dtype in TORCH_TYPES.items()}
    total = sum(stored.values())
    share = {names[dtype]: round(count / total, 6) for dtype, count in stored.items()}
    if share.get(types.storage, 0.0) < 0.5:
        raise VerificationFailed(
            f"--precision {settings.precision} was asked, but the built file stores {share}; "
            "no bundle was written"
        )
    packages = ("marnet", "numpy", "pillow", "torch", "transformers", "onnx", "onnxruntime")
    return {
        "method": checkpoint.model.config.method,
        "labels": checkpoint.labels,
        "preprocess": checkpoint.preprocess.to_dict(),
        "backend": settings.backend,
        "precision": Precision(settings.precision, types.compute, share),
        "sampling": sampling,
        "buckets": (),
        "golden_tolerance": fidelity.row_tolerance,
        "built_for": BuiltFor("cpu", platform.machine(), versions(packages)),
        "checkpoint_sha256": checkpoint.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }

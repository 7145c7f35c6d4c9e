"""From a checkpoint to a verified bundle.

Everything is built in a temporary folder beside the target, which is renamed into place last: an
export that fails or is killed leaves nothing half-written.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

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
from marnet_export.lower import Plan, lower
from marnet_export.selection import (
    Candidate,
    Choice,
    choose,
    pareto_report,
    plot_pareto,
    plot_risk_coverage,
    risk_coverage,
    threshold_for_risk,
)
from marnet_export.sweep import SAMPLES, as_points, sweep, swept_processes
from marnet_export.verify import (
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
from marnet_sdk.backends import Floats, open_backend
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
from marnet_sdk.uncertainty import mean_logits, softmax
from marnet_train.checkpoint import Checkpoint, load_checkpoint, write_json
from marnet_train.data.dataset import Example, read_one_split
from marnet_train.data.imagefolder import is_split, read_split
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import SAMPLERS, SamplerTable, sampler_table
from marnet_train.models.marnet import MARNet

Say = Callable[[str], None]
MAX_IMAGES = 2000  # verified on at most so many
GOLDEN = 8  # images that travel with the bundle
DEFAULT = "default"  # the operating point of a bundle that has one
PARETO, PARETO_PLOT = "pareto.json", "pareto.png"
RISK, RISK_PLOT = "risk_coverage.json", "risk_coverage.png"
NOISES = ("shared", "image")
FLOATS = ("fp32", "bf16", "fp16")  # what --precision auto tries


@dataclass(frozen=True)
class Settings:
    """What an export is asked for."""

    backend: str = "torchscript"
    precision: str = "fp32"  # "auto": the sweep's choice
    compute: str | None = None  # None: what the backend does best on a CPU
    sampler: str | None = None  # None: ddpm, or all of them where steps are swept
    steps: int | Literal["auto"] | None = None  # None: T
    eta: float = 0.0  # of ddim
    samples: int | None = None  # None: 1, or several where steps are swept
    noise: str = "shared"
    seed: int = 0  # of the noise
    min_agreement: float | None = None  # None: by precision
    max_drop: float = 0.002  # share of accuracy that a swept point may lose
    latency_budget_ms: float | None = None
    target_risk: float | None = None  # share of the answers that may be wrong

    def __post_init__(self) -> None:
        auto = ("auto",) if self.steps == "auto" else ()
        for name, value, choices in (
            ("backend", self.backend, tuple(BUILDERS)),
            ("precision", self.precision, (*PRECISIONS, *auto)),
            ("compute", self.compute or "fp32", PRECISIONS),
            ("sampler", self.sampler or "ddpm", SAMPLERS),
            ("noise", self.noise, NOISES),
        ):
            if value not in choices:
                raise InvalidInput(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
        if self.latency_budget_ms is not None and self.steps != "auto":
            raise InvalidInput("a latency budget is for choosing steps: add --steps auto")
        if self.eta and self.sampler != "ddim" and (self.sampler or self.steps != "auto"):
            raise InvalidInput(f"eta: got {self.eta}, but it is for ddim: add --sampler ddim")
        if not 0 < self.max_drop < 1:
            raise InvalidInput(f"max_drop: got {self.max_drop}, expected more than 0, less than 1")
        if not 0 <= self.seed < 2**64:
            raise InvalidInput(f"seed: got {self.seed}, expected 0 .. 2**64 - 1")


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
    first = FLOATS[0] if settings.precision == "auto" else settings.precision
    types = choose_types(settings.backend, first, settings.compute)
    with atomic_directory(output, overwrite=overwrite, replaceable=is_bundle) as fresh:
        checkpoint = load_checkpoint(checkpoint_path)
        images = _load_images(data, checkpoint, say)
        job = _Job(fresh, checkpoint, settings, images, say)
        if settings.steps == "auto":
            types, tables, samples, picked = job.pick_points()
        else:
            tables, samples, picked = {DEFAULT: job.table()}, {DEFAULT: settings.samples or 1}, None
        sampling = job.sampling(tables, samples, picked or DEFAULT)
        say(job.plan.sentence(tables[sampling.default], sampling.point.samples))
        if settings.noise == "image":
            say(job.plan.noise_cost(tables[sampling.default]))
        say(types.sentence)
        built = job.build(types, tables, sampling)
        fidelity = job.verify(built, types, tables)
        sampling = job.with_thresholds(built)
        _write_golden(fresh, images, built, checkpoint.preprocess, fidelity)
        seal_bundle(fresh, _manifest_fields(checkpoint, settings, types, sampling, fidelity, fresh))
        Classifier(fresh)  # the last word: what was written loads and passes its own self-test
    return fidelity


def explain(checkpoint_path: Path, settings: Settings) -> tuple[list[tuple[str, str, str]], str]:
    """What the rewrites save, without building anything: rows for a table, and a sentence."""
    checkpoint = load_checkpoint(checkpoint_path)
    steps = None if settings.steps == "auto" else settings.steps
    precision = "fp32" if settings.precision == "auto" else settings.precision
    compute = choose_types(settings.backend, precision, settings.compute).compute
    plan = lower(checkpoint.model).plan
    schedule = checkpoint.model.config.schedule
    sampler = settings.sampler or "ddpm"
    eta = settings.eta if sampler == "ddim" else 0.0
    table = sampler_table(schedule, sampler, steps, eta)
    sentences = [plan.sentence(table, settings.samples or 1)]
    if settings.noise == "image":
        sentences.append(plan.noise_cost(table))
    return plan.explain(compute), "\n".join(sentences)


class _Job:
    """One export: what all of its steps need."""

    def __init__(
        self, fresh: Path, checkpoint: Checkpoint, settings: Settings, images: _Images, say: Say
    ) -> None:
        self.fresh, self.checkpoint, self.settings = fresh, checkpoint, settings
        self.images, self.say = images, say
        self.model = checkpoint.model
        self.lowered = lower(self.model)
        self.plan = self.lowered.plan
        self.reference = Reference(self.model, images.pixels, by_image=settings.noise == "image")

    def table(self) -> SamplerTable:
        """The sampler that is asked for."""
        asked = self.settings
        assert asked.steps != "auto"
        schedule = self.model.config.schedule
        return sampler_table(schedule, asked.sampler or "ddpm", asked.steps, asked.eta)

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

    def build(
        self, types: Types, tables: dict[str, SamplerTable], sampling: Sampling, folder: str = ""
    ) -> Built:
        """Write the payload (unless a sweep has) and open it again."""
        payload = self.fresh / folder if folder else (self.fresh / PLAN).parent
        if not payload.exists():
            check_range(self.model, self.plan, types.storage)
            payload.mkdir(parents=True)
            pixels = self.images.pixels
            example = torch.from_numpy(np.resize(pixels, (2, *pixels.shape[1:])))
            module = builder(self.settings.backend)
            module.build_encoder(self.lowered, example, types, payload)
            module.build_refine(self.lowered, types, payload)
        arrays = self.plan.tensors(tables)
        if not folder:
            save_file(arrays, self.fresh / PLAN)
        backend = open_backend(self.settings.backend, payload, types.compute, None)
        return Built(backend, arrays, sampling, self.images.pixels)

    def pick_points(
        self,
    ) -> tuple[Types, dict[str, SamplerTable], dict[str, int], str]:
        """Sweep, choose, write pareto.json; returns types, samplers, samples and the pick."""
        asked, truth = self.settings, self.images.labels
        if truth is None:
            raise DataError(
                "--steps auto compares accuracies, but some images have a class that the "
                "checkpoint does not know; name others with --data"
            )
        tables = swept_processes(self.model.config.schedule, asked.sampler, asked.eta)
        sampling = self.sampling(tables, 1, next(iter(tables)))
        exact = mean_logits(self.reference.logits(tables[sampling.default], asked.seed))
        candidates: dict[str, list[Candidate]] = {}
        for precision in FLOATS if asked.precision == "auto" else (asked.precision,):
            types = choose_types(asked.backend, precision, asked.compute)
            candidates[precision] = sweep(
                self.build(types, tables, sampling, f"sweep-{precision}"),
                truth,
                exact.argmax(axis=1),
                samples=SAMPLES if asked.samples is None else (asked.samples,),
                precision=precision,
                max_drop=asked.max_drop,
            )
        everything = [c for found in candidates.values() for c in found]
        limits = (asked.max_drop, asked.latency_budget_ms)
        overall = choose(everything, next(iter(candidates.values()))[0], *limits)
        precision = overall.points[overall.picked].precision
        choice = choose(candidates[precision], candidates[precision][0], *limits)
        self._write_pareto(everything, choice)
        for other in candidates:
            if other != precision:
                shutil.rmtree(self.fresh / f"sweep-{other}")
        (self.fresh / f"sweep-{precision}").rename((self.fresh / PLAN).parent)
        schedule = self.model.config.schedule
        chosen = {
            name: sampler_table(schedule, c.sampler, c.steps, c.eta or 0.0)
            for name, c in choice.points.items()
        }
        samples = {name: c.samples for name, c in choice.points.items()}
        return choose_types(asked.backend, precision, asked.compute), chosen, samples, choice.picked

    def _write_pareto(self, everything: Sequence[Candidate], choice: Choice) -> None:
        about = {
            "backend": self.settings.backend,
            "noise": self.settings.noise,
            "seed": self.settings.seed,
            "checkpoint_sha256": self.checkpoint.sha256,
            "built_for": asdict(_built_for(self.settings.backend)),
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

    def verify(self, built: Built, types: Types, tables: dict[str, SamplerTable]) -> Fidelity:
        """Hold every operating point against the reference; write fidelity.json.

        Raises:
            VerificationFailed: one does not agree.
        """
        asked, pixels, sampling = self.settings, self.images.pixels, built.sampling
        minimum = asked.min_agreement
        precision = types.storage
        found: dict[tuple, Fidelity] = {}
        for name, point in sampling.points.items():
            key = (point.sampler, point.eta, point.timesteps, point.samples)
            if key in found:
                continue  # another name for the same
            logits = self.reference.logits(tables[name], sampling.seed, point.samples)
            found[key] = measure_fidelity(
                built.run(name),
                pixels,
                built.logits(name),
                mean_logits(logits),
                self.images.labels,
                min_agreement=MIN_AGREEMENT[precision] if minimum is None else minimum,
                row_tolerance=ROW_TOLERANCE[types.compute],
            )
            if problems := found[key].problems():
                which = "" if name == DEFAULT else f" at operating point {name}"
                raise VerificationFailed(
                    f"{asked.backend} {precision}{which}: "
                    + "; ".join(problems)
                    + ". No bundle was written; try --precision fp32, or a lower --min-agreement"
                )
        by_name = {
            name: found[(p.sampler, p.eta, p.timesteps, p.samples)]
            for name, p in sampling.points.items()
        }
        default, table = by_name[sampling.default], tables[sampling.default]
        error = trajectory_error(self.reference, built, sampling.default, table)
        floor = instability_floor(self.reference, table, sampling.seed, sampling.point.samples)
        self.say(
            f"instability floor: {floor['share']:.2%} of {floor['images']} images change their "
            f"label over {len(floor['seeds'])} noise seeds, in float32"
        )
        more = {
            "operating_points": {name: f.to_dict() for name, f in by_name.items()},
            "trajectory": error,
            "instability": floor,
            "settled": settling(built, sampling.default),
            "latency_ms": _latency(built.run(sampling.default), pixels[:1]),
        }
        write_json(self.fresh / FIDELITY, default.to_dict() | more)
        return default

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


def _latency(run: Callable[[Floats], Floats], pixel: Floats, calls: int = 5) -> float:
    """Median milliseconds from the pixels of one image to its logits."""
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run(pixel)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(seconds[1:])), 4)


def check_range(model: MARNet, plan: Plan, storage: str) -> None:
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


def _write_golden(
    fresh: Path,
    images: _Images,
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
            f"--precision {types.storage} was asked, but the built file stores {share}; "
            "no bundle was written"
        )
    return {
        "method": checkpoint.model.config.method,
        "labels": checkpoint.labels,
        "preprocess": checkpoint.preprocess.to_dict(),
        "backend": settings.backend,
        "precision": Precision(types.storage, types.compute, share),
        "sampling": sampling,
        "buckets": (),
        "golden_tolerance": fidelity.row_tolerance,
        "built_for": _built_for(settings.backend),
        "checkpoint_sha256": checkpoint.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _built_for(backend: str) -> BuiltFor:
    packages = ("marnet", "numpy", "pillow", "torch", "transformers", "onnx", backend)
    return BuiltFor("cpu", platform.machine(), versions(packages))

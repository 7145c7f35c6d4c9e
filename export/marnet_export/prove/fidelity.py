"""Does the built thing agree with the float32 checkpoint? Same noise on both sides, real images.

Axes: N images, K noise samples, C classes, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marnet_export.lower.plan import check_step
from marnet_sdk.backends import Backend
from marnet_sdk.bundle import Sampling
from marnet_sdk.classifier import pixel_key
from marnet_sdk.console import track
from marnet_sdk.errors import ExportError
from marnet_sdk.tables import Floats, Tables, make_tables
from marnet_sdk.trajectory import draw_trajectory
from marnet_sdk.uncertainty import mean_logits, schedule, settled, softmax, summarise
from marnet_train.diffusion import SamplerTable
from marnet_train.models.marnet import MARNet

Logits = Callable[[Floats], Floats]  # pixels [B, 3, H, W] -> logits [B, C]

# Share of images whose label must not change. bf16 and int8 keep 8 bits of every factor, so that
# labels with a small margin may change; float32 and fp16 storage must not.
MIN_AGREEMENT = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.995, "int8": 0.995}
# Largest difference of one image's logits between batches or machines, relative to the largest
# logit. A trained loop amplifies the last bits of its matrix products, which differ with the shape
# of the batch and the instruction set: 1e-3 has been seen on single images in plain float32.
ROW_TOLERANCE = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.15, "int8": 0.15}
# What the instability floor and settling may each cost: seconds for the paper's network.
CHAIN_STEPS = 200_000
BATCH = 64  # images that are measured together
BATCHES = (1, 2, 3, 7, 8, 16, 33, 64)  # sizes that are run, whatever a bundle is built for


@dataclass(frozen=True)
class Fidelity:
    """The content of fidelity.json."""

    images: int
    top1_agreement: float
    top1_interval: tuple[float, float]  # Wilson, 95 %
    top5_agreement: float  # share of images with the same set of five best labels
    logit_error_max: float
    logit_error_mean: float
    largest_logit: float
    reference_accuracy: float | None
    bundle_accuracy: float | None
    row_invariance: dict[str, Any]
    non_finite: int
    min_agreement: float
    row_tolerance: float

    def problems(self) -> list[str]:
        """Why the bundle must not be used; empty if it may."""
        found = []
        if self.non_finite:
            found.append(f"{self.non_finite} of its logits are NaN or infinite")
        if self.top1_agreement < self.min_agreement:
            low, high = self.top1_interval
            found.append(
                f"top-1 agreement is {self.top1_agreement:.4f} on {self.images} images "
                f"(95 % interval {low:.4f} to {high:.4f}), at least {self.min_agreement} was asked"
            )
        rows = self.row_invariance
        bound = self.row_tolerance * self.largest_logit
        if rows["flips"] or not rows["max_difference"] <= bound:  # NaN too
            found.append(
                f"an answer depends on the rest of its batch: {rows['flips']:.0f} labels change, "
                f"logits by up to {rows['max_difference']:.3g} (bound {bound:.3g})"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927); z = 1.96 is 95 %."""
    p = successes / count
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # clamp rounding errors


class Reference:
    """The float32 checkpoint on the images of a verification, with the loop as the paper has it."""

    def __init__(self, model: MARNet, pixels: Floats, *, by_image: bool = False, batch: int = 64):
        """Encode the images, once.

        Args:
            pixels: [N, 3, H, W]. by_image: key the noise by them; else all meet the same.

        Raises:
            ExportError: the encoder gives NaN or infinity.
        """
        self.model, self.batch, self.count = model, batch, len(pixels)
        self._keys = [pixel_key(row) for row in pixels] if by_image else None
        with torch.inference_mode():
            parts = [
                model.vision(torch.from_numpy(pixels[rows])) for rows in self._chunks("encode")
            ]
        self.x_v = torch.cat(parts)  # [N, D_v]
        _check_finite(self.x_v.numpy(), "image encoder")
        self._known: dict[tuple, Floats] = {}  # the logits of the last process that was asked for

    def _chunks(self, title: str, limit: int | None = None) -> Iterator[slice]:
        count = self.count if limit is None else min(limit, self.count)
        for start in track(range(0, count, self.batch), title):
            yield slice(start, min(start + self.batch, count))

    @torch.inference_mode()
    def logits(
        self, table: SamplerTable, seed: int, samples: int = 1, *, limit: int | None = None
    ) -> Floats:
        """Compute the logits of every image (or the first `limit`) and noise sample, [N, K, C]; of
        a table without a step, the alignment branch's, [N, 1, C].

        Raises:
            ExportError: a chain leaves the finite numbers; names the step, or the head.
        """
        if not table.timesteps:
            return self._without_loop(limit)
        asked = (table.sampler, table.eta, table.timesteps, seed, samples)
        if asked in self._known:
            return self._known[asked][:limit]
        out = []
        for rows in self._chunks("reference", limit):
            chains = [
                self._chain(table, seed, k, rows, lambda i, x0: check_step(x0, table, i))
                for k in range(samples)
            ]
            out.append(torch.stack(chains, dim=1).numpy())
        logits = np.concatenate(out)
        _check_finite(logits, "head, behind the reverse chain,")
        if limit is None:
            self._known = {asked: logits}
        return logits

    def _without_loop(self, limit: int | None) -> Floats:
        """The alignment branch's logits, [N, 1, C]."""
        aligned = self.model.align_vision(self.x_v[:limit])
        logits = self.model.alignment_classifier(aligned)[:, None].numpy()
        _check_finite(logits, "alignment branch")
        return logits

    @torch.inference_mode()
    def estimates(self, table: SamplerTable, seed: int, count: int) -> Floats:
        """Compute the head's answer to each step's estimate, first images only: [S, count, C]."""
        rows, found = slice(0, count), []
        self._chain(table, seed, 0, rows, lambda _, x0: found.append(self._head(rows, x0).numpy()))
        return np.stack(found)

    def _head(self, rows: slice, x_cdr: torch.Tensor) -> torch.Tensor:
        return self.model.head(self.x_v[rows], x_cdr)[0]

    def _chain(
        self,
        table: SamplerTable,
        seed: int,
        sample: int,
        rows: slice,
        watch: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """Logits [B, C] of one chain of each image."""
        x_v = self.x_v[rows]
        trajectories = [
            draw_trajectory(
                seed,
                table.timesteps,
                table.train_steps,
                self.model.latent_width,
                trajectory=(key + sample) % 2**64,
            )
            for key in ([0] if self._keys is None else self._keys[rows])
        ]
        initial = torch.as_tensor(np.stack([t.initial for t in trajectories])).to(
            x_v
        )  # [1 or B, D]
        noise = torch.as_tensor(np.stack([t.steps for t in trajectories], axis=1)).to(x_v)
        x_cdr = self.model.refine(x_v, table, initial.expand(len(x_v), -1), noise, watch)
        return self._head(rows, x_cdr)


def _check_finite(rows: Floats, part: str) -> None:
    """Refuse rows [N, ...], one for each image, that are not finite.

    Raises:
        ExportError: one holds NaN or infinity.
    """
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise ExportError(
            f"the {part} of the float32 checkpoint gives NaN or infinity for {(~finite).sum()} of "
            f"{len(rows)} images, so no precision will do; train it again, or take an earlier "
            "checkpoint"
        )


class Built:
    """Graphs that were built, opened again, with the tables of some operating points, on the images
    of a verification."""

    def __init__(
        self,
        backend: Backend,
        plan: dict[str, NDArray],
        sampling: Sampling,
        pixels: Floats,
        batch: int = BATCH,
    ) -> None:
        """pixels: [N, 3, H, W]. batch: images that go through the loop together."""
        self.backend, self.plan, self.sampling, self.pixels = backend, plan, sampling, pixels
        self.batch = batch

    @cached_property
    def x_v(self) -> Floats:
        """The images, encoded once for all that is measured behind the encoder: [N, D_v]."""
        starts = track(range(0, len(self.pixels), BATCH), "encode")
        return np.concatenate([self.backend.encode(self.pixels[i : i + BATCH]) for i in starts])

    def tables(self, name: str, pixels: Floats, samples: int, seed: int | None = None) -> Tables:
        """The tables of a batch [B, 3, H, W] at an operating point."""
        by_image = self.sampling.noise == "image"
        return make_tables(
            self.plan,
            self.sampling,
            name,
            seed=self.sampling.seed if seed is None else seed,
            samples=samples,
            keys=[pixel_key(row) for row in pixels] if by_image else None,
        )

    def samples(self, name: str, count: int, limit: int | None = None) -> Floats:
        """Logits of the images (or the first `limit`) and K noise samples, [N, K, C]."""
        pixels, x_v = self.pixels[:limit], self.x_v[:limit]
        shared = self.tables(name, pixels[:1], count) if self.sampling.noise == "shared" else None
        out = []
        for start in range(0, len(pixels), self.batch):
            rows = slice(start, start + self.batch)
            tables = shared or self.tables(name, pixels[rows], count)
            out.append(self.backend.refine(x_v[rows], tables)[0])
        return np.concatenate(out)

    def logits(self, name: str) -> Floats:
        """One row of logits for each image at an operating point, [N, C]."""
        return mean_logits(self.samples(name, self.sampling.points[name].samples))

    def run(self, name: str) -> Logits:
        """Return a function that computes the logits of an operating point for any pixels."""
        count = self.sampling.points[name].samples
        shared = self.sampling.noise == "shared"
        fixed = self.tables(name, self.pixels[:1], count) if shared else None

        def logits(pixels: Floats) -> Floats:
            if fixed:
                return mean_logits(self.backend.run(pixels, fixed)[0])
            tables = self.tables(name, pixels, count)
            return mean_logits(self.backend.refine(self.backend.encode(pixels), tables)[0])

        return logits


def trajectory_error(
    reference: Reference,
    built: Built,
    name: str,
    table: SamplerTable,
    *,
    images: int = 16,
    most: int = 12,
) -> list[dict[str, float]]:
    """Measure how far the built loop is from the reference on its way, at up to `most` of its
    steps.

    A chain that is cut short returns the estimate of its last step, so no graph needs a second
    output for this.

    Returns:
        For each step: `step` (1-based), `t`, and `error`, the norm of the difference of the logits
        that the head makes of the estimate, over the norm of the reference's. Nothing where there
        is no loop.
    """
    if not table.timesteps:
        return []
    pixels, x_v = built.pixels[:images], built.x_v[:images]
    expected = reference.estimates(table, built.sampling.seed, len(pixels))
    tables = built.tables(name, pixels, 1)
    steps = len(table.timesteps)
    out = []
    for step in np.unique(np.linspace(1, steps, min(steps, most)).round().astype(int)).tolist():
        got = built.backend.refine(x_v, tables.first_steps(step))[0][:, 0]
        want = expected[step - 1]
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        out.append({"step": step, "t": table.timesteps[step - 1], "error": error})
    return out


def instability_floor(
    reference: Reference,
    table: SamplerTable,
    seed: int,
    samples: int,
    *,
    seeds: int = 5,
    most: int = CHAIN_STEPS,
) -> dict[str, Any]:
    """Share of images whose label depends on the noise seed, in the float32 reference itself.

    No export can be expected to agree with itself at another seed better than this.

    Args:
        most: chain steps to take in all; of more images, the first ones are used.
    """
    count = max(16, most // (seeds * samples * len(table.timesteps)))
    used = [(seed + i) % 2**64 for i in range(seeds)]
    logits = [reference.logits(table, s, samples, limit=count) for s in used]
    labels = np.stack([mean_logits(found).argmax(axis=1) for found in logits])  # [seeds, N]
    changing = (labels != labels[0]).any(axis=0)
    return {
        "seeds": used,
        "images": len(changing),
        "share": float(changing.mean()),
        "interval": wilson_interval(int(changing.sum()), len(changing)),
    }


def settling(
    built: Built, name: str, *, samples: int = 8, most: int = CHAIN_STEPS // 2
) -> dict[str, Any]:
    """Measure how `stop="settled"` does against all of its samples, on these images.

    Returns:
        samples: what there would be; mean_samples: what was drawn; agreement: share of images
        with the label that all samples give, and its interval.
    """
    samples = max(samples, built.sampling.points[name].samples)
    steps = len(built.sampling.points[name].timesteps)
    limit = max(16, most // (samples * steps))
    probabilities = softmax(built.samples(name, samples, limit))  # [N, K, C]
    count = len(probabilities)
    drawn = np.full(count, samples)
    for look in reversed(schedule(samples)):
        drawn[settled(probabilities[:, :look], samples)] = look
    early = summarise(probabilities, drawn).winner
    same = int((early == summarise(probabilities).winner).sum())
    return {
        "samples": samples,
        "images": count,
        "mean_samples": float(drawn.mean()),
        "agreement": same / count,
        "interval": wilson_interval(same, count),
    }


@np.errstate(invalid="ignore")  # infinity minus itself: such logits are counted elsewhere
def row_invariance(
    run: Logits,
    pixels: Floats,
    logits: Floats,
    tolerance: float,
    limit: int = 64,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Shuffle, split, pad and duplicate a batch: does any image's answer change?

    Args:
        sizes: of batches to run as well; where there are fewer images, they are repeated. None:
            those of `BATCHES` that there are images for.

    Returns:
        flips: labels that change although the two best logits are further apart than the bound;
        max_difference: the largest change of any logit; sizes: of the batches that were run;
        worst_size: of the batch with the largest share of flips, or else the largest change; None
        if nothing changes.
    """
    pixels, expected = pixels[:limit], logits[:limit]
    bound = tolerance * float(np.abs(expected).max())
    flips: list[int] = []
    differences: list[float] = []
    groups = _groups(len(pixels), sizes)
    for rows in groups:
        got, want = run(np.ascontiguousarray(pixels[rows])), expected[rows]
        differences.append(float(np.abs(got - want).max()))
        decided = margin(want) > bound
        flips.append(int((decided & (got.argmax(axis=1) != want.argmax(axis=1))).sum()))
    badness = [
        (changed / len(rows), np.nan_to_num(difference, nan=np.inf))
        for changed, difference, rows in zip(flips, differences, groups, strict=True)
    ]
    worst = max(range(len(groups)), key=badness.__getitem__)
    return {
        "flips": sum(flips),
        "max_difference": float(np.max(differences)),  # keeps NaN
        "sizes": sorted({len(rows) for rows in groups}),
        "worst_size": len(groups[worst]) if any(badness[worst]) else None,
    }


def _groups(count: int, sizes: Sequence[int] | None) -> list[NDArray[np.intp]]:
    """Images to ask for together, by number."""
    every = np.arange(count)
    groups = [np.random.default_rng(0).permutation(count)]
    groups += np.array_split(every, max(1, count // 3))
    groups += [np.array([i]) for i in range(min(count, 8))]  # alone
    groups += [np.pad(every[:3], (0, 5), mode="edge")]  # padded with the last one
    groups += [np.zeros(min(count, 5), np.int64)]  # the same image in every row
    covered = {len(rows) for rows in groups}
    asked = [size for size in BATCHES if size <= count] if sizes is None else sizes
    start = 0
    for size in sorted(set(asked) - covered):
        groups.append((start + np.arange(size)) % count)
        start += size
    return groups


def margin(logits: Floats) -> Floats:
    """Distance between the two largest logits of each row, [N, C] -> [N]."""
    best = np.partition(logits, -2, axis=1)  # at least two classes: data sets with one are refused
    return best[:, -1] - best[:, -2]


@np.errstate(invalid="ignore")
def measure_fidelity(
    run: Logits,
    pixels: Floats,
    logits: Floats,
    reference: Floats,
    labels: NDArray[np.int64] | None,
    *,
    min_agreement: float,
    row_tolerance: float,
    buckets: Sequence[int] = (),
) -> Fidelity:
    """Compare a built graph with the reference logits [N, C] of the same images and noise.

    Args:
        run: the graph. logits: what it gave for the images, [N, C].
        labels: true classes [N], if they are known.
        buckets: batch sizes that it was built for, which are tried with their neighbours.
    """
    same = int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum())
    error = np.abs(logits - reference)
    count = len(pixels)
    around = sorted({size for b in buckets for size in (b - 1, b, b + 1)} - {0})
    return Fidelity(
        images=count,
        top1_agreement=same / count,
        top1_interval=wilson_interval(same, count),
        top5_agreement=float(np.mean(_best(logits) == _best(reference))),
        logit_error_max=float(error.max()),
        logit_error_mean=float(error.mean()),
        largest_logit=float(np.abs(reference).max()),
        reference_accuracy=_accuracy(reference, labels),
        bundle_accuracy=_accuracy(logits, labels),
        row_invariance=row_invariance(run, pixels, logits, row_tolerance, sizes=around or None),
        non_finite=int((~np.isfinite(logits)).sum()),
        min_agreement=min_agreement,
        row_tolerance=row_tolerance,
    )


def _best(logits: Floats, count: int = 5) -> NDArray[np.object_]:
    """The set of the `count` best labels of each row."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    out = np.empty(len(logits), object)
    out[:] = [frozenset(row.tolist()) for row in order]
    return out


def _accuracy(logits: Floats, labels: NDArray[np.int64] | None) -> float | None:
    return None if labels is None else float((logits.argmax(axis=1) == labels).mean())

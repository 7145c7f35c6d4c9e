"""Does the built thing agree with the float32 checkpoint? Same noise on both sides, real images.

Axes: N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.noise.tables import Floats

Logits = Callable[[Floats], Floats]  # pixels [B, 3, H, W] -> logits [B, C]
# Share of images whose label must not change. bf16 and int8 keep 8 bits of every factor, so that
# labels with a small margin may change; float32 and fp16 storage must not.
MIN_AGREEMENT = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.995, "int8": 0.995}
# Largest difference of one image's logits between batches or machines, relative to the largest
# logit. A trained loop amplifies the last bits of its matrix products, which differ with the shape
# of the batch and the instruction set: 1e-3 has been seen on single images in plain float32.
ROW_TOLERANCE = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.15, "int8": 0.15}
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
        """Say why the bundle must not be used; empty if it may."""
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


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927); z = 1.96 is 95 %."""
    p = successes / count
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # clamp rounding errors


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


@np.errstate(invalid="ignore")  # infinity minus itself: such logits are counted elsewhere
def row_invariance(
    run: Logits,
    pixels: Floats,
    logits: Floats,
    tolerance: float,
    limit: int = 64,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Shuffle, split, pad and duplicate a batch, and tell whether any image's answer changes.

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


def _best(logits: Floats, count: int = 5) -> NDArray[np.object_]:
    """The set of the `count` best labels of each row."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    out = np.empty(len(logits), object)
    out[:] = [frozenset(row.tolist()) for row in order]
    return out


def _accuracy(logits: Floats, labels: NDArray[np.int64] | None) -> float | None:
    return None if labels is None else float((logits.argmax(axis=1) == labels).mean())

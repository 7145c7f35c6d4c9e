"""The least time that the parts of a bundle need on this machine: multiplying, and reading weights.

Both are lower bounds. Where something is not known, the smaller need is taken. Multiply-adds and
types are those of the bundle's receipt, which was read from what was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marnet_sdk.bundle import Manifest, Share
from marnet_sdk.errors import requires_extra

if TYPE_CHECKING:  # it imports torch, which timing the stages does not need
    from marnet_bench.limits import Limits

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}  # bytes of a weight
ENCODER, REFINE = "encoder", "loop and head"


@dataclass(frozen=True)
class Need:
    """The work of a part in one call, and the least time that it takes."""

    multiply_adds: float
    multiplying_ms: float
    weight_bytes: float | None  # read from memory or caches; None: not counted
    reading_ms: float | None

    @property
    def bound_ms(self) -> float:
        """The slower of multiplying and reading, which a processor may do at the same time."""
        return max(self.multiplying_ms, self.reading_ms or 0.0)

    @property
    def bound_by(self) -> str:
        """Name the slower one."""
        return "multiplying" if self.bound_ms == self.multiplying_ms else "reading weights"


def explain(manifest: Manifest, batch: int, threads: int) -> tuple[dict[str, Need], Limits]:
    """Measure this machine, and count what the encoder, and the loop and the head, need of it.

    The weights of an encoder are not counted: each takes part in many products of one image, so
    that reading them is no limit. Those of the loop are read once for each step, whatever the
    number of images and samples.
    """
    with requires_extra("bench", "torch", "onnx"):
        from marnet_bench.limits import measure_limits

    limits = measure_limits([round(step_bytes(manifest))], threads)
    return needs(manifest, batch, limits), limits


def needs(manifest: Manifest, batch: int, limits: Limits) -> dict[str, Need]:
    """Count what the parts need, by the limits of a machine.

    Args:
        batch: images of a call.
    """
    receipt, point = manifest.precision.receipt, manifest.sampling.point
    encoder, head = receipt["encoder"], receipt["head"]
    multiplying = batch * _multiplying(encoder, limits)
    found = {ENCODER: Need(batch * encoder.multiply_adds, multiplying, None, None)}
    # The receipt has the head for each sample, but the condition in it is computed once.
    count = head.multiply_adds / point.samples
    multiplying = _multiplying(head, limits) / point.samples
    size = count * _weight_size(head)
    if loop := receipt.get("loop"):
        count += loop.multiply_adds
        multiplying += _multiplying(loop, limits)
        size += (len(point.timesteps) - 1) * step_bytes(manifest)
    (rate,) = limits.read.values()
    reading = 1e3 * size / rate.per_second
    found[REFINE] = Need(batch * count, batch * multiplying, size, reading)
    return found


def step_bytes(manifest: Manifest) -> float:
    """The bytes of weights that one step of the loop reads; without a loop, those of the head."""
    receipt, point = manifest.precision.receipt, manifest.sampling.point
    if not (loop := receipt.get("loop")):
        return receipt["head"].multiply_adds / point.samples * _weight_size(receipt["head"])
    # A weight of the loop takes part in one multiply-add of each step and sample.
    weights = loop.multiply_adds / ((len(point.timesteps) - 1) * point.samples)
    return weights * _weight_size(loop)


def _multiplying(share: Share, limits: Limits) -> float:
    """Milliseconds of a part's multiply-adds for one image, each type at its own rate."""
    rates = {kind: rate.per_second for kind, rate in limits.multiply_adds.items()}
    fastest = max(rates.values())  # of types that were not read back, or that are not measured
    taken = (part / rates.get(kind, fastest) for kind, part in share.compute.items())
    return 1e3 * share.multiply_adds * sum(taken)


def _weight_size(share: Share) -> float:
    """Bytes of a weight, as it is stored or as it is multiplied, whichever is smaller.

    A backend may keep the one or the other in memory.
    """
    return min(_mean_size(share.storage), _mean_size(share.compute))


def _mean_size(shares: Mapping[str, float]) -> float:
    return sum(part * SIZES.get(kind, 1) for kind, part in shares.items())

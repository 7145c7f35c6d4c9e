"""The alignment branch, which answers from the encoder's features without the reverse loop.

Two small float32 matrices in NumPy, so that it is the same for every backend.
Axes: B batch, C classes, D_v encoder features, D of the common space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from marnet_sdk.errors import BundleFormatError
from marnet_sdk.noise.tables import Floats, Tables

if TYPE_CHECKING:
    from marnet_sdk.backends import Backend, DeviceRows, RuntimeReport

HEAD = "alignment.safetensors"  # in a bundle's payload/
LEAKY_SLOPE = 0.01  # of g in eq. (7) and (8)
_ALONE = 2**18  # multiply-adds up to which OpenBLAS takes no other thread
_ROWS = 16  # at a time


def product(x: Floats, weight: Floats) -> Floats:
    """Multiply in the thread that calls, without others: [B, K] by [N, K] -> [B, N].

    OpenBLAS divides all but small products among threads of its own. Behind each of them these wait
    for more for some 50 milliseconds, on cores that the next call of the encoder needs. So here is
    one small product after the other.
    """
    return np.concatenate([_alone(x[i : i + _ROWS], weight) for i in range(0, len(x) or 1, _ROWS)])


def _alone(x: Floats, weight: Floats) -> Floats:
    if len(x) == 1:  # of a single row it divides smaller products
        return _alone(np.repeat(x, 2, axis=0), weight)[:1]
    part = max(1, _ALONE // max(1, len(x) * len(weight)))
    total = x[:, :part] @ weight[:, :part].T
    for k in range(part, x.shape[1], part):
        total += x[:, k : k + part] @ weight[:, k : k + part].T
    return total


def project(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """Apply g(E(x)) of eq. (7) and (8), a linear layer and its leaky ReLU: [B, D_v] -> [B, D]."""
    y = product(x, weight) + bias
    return np.where(y < 0, np.float32(LEAKY_SLOPE) * y, y)


@dataclass(frozen=True, eq=False)
class AlignmentHead:
    """The layers that classify an image by its aligned features alone."""

    vision_weight: Floats  # [D, D_v]
    vision_bias: Floats  # [D]
    classifier_weight: Floats  # [C, D]
    classifier_bias: Floats  # [C]

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        width, classes = self.vision_bias.shape, self.classifier_bias.shape
        shapes = self.vision_weight.shape[:1], self.classifier_weight.shape
        if shapes != (width, (*classes, *width)):
            raise ValueError(f"the shapes {shapes} do not fit biases {width} and {classes}")

    def __call__(self, x_v: Floats) -> tuple[Floats, Floats]:
        """Turn x_v [B, D_v] into logits [B, 1, C] and x_EMA [B, 1, D], as `Backend.refine` does."""
        aligned = project(x_v, self.vision_weight, self.vision_bias)
        logits = product(aligned, self.classifier_weight) + self.classifier_bias
        return logits[:, None], aligned[:, None]


def read_head(payload: Path) -> AlignmentHead | None:
    """The head in a bundle's payload/, if it has one.

    Raises:
        BundleFormatError: it is not what it should be.
    """
    path = payload / HEAD
    if not path.exists():
        return None
    try:
        return AlignmentHead(**load_file(path))
    except (TypeError, ValueError, SafetensorError) as error:
        raise BundleFormatError(
            f"{path} lacks what answering without the loop needs: {error}; export the bundle again"
        ) from error


@dataclass(frozen=True, eq=False)
class WithAlignment:
    """A backend that gives the alignment branch's answer where the tables have no step."""

    backend: Backend
    head: AlignmentHead

    def encode(self, pixels: Any) -> Floats:
        return self.backend.encode(pixels)

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        """Refine; without a step, give one sample, however many the tables are for."""
        return self.backend.refine(x_v, tables) if tables.steps else self.head(x_v)

    def run(self, pixels: Any, tables: Tables) -> tuple[Floats, Floats]:
        if tables.steps:
            return self.backend.run(pixels, tables)
        return self.head(self.backend.encode(pixels))

    def device_rows(self, array: Any) -> DeviceRows:
        return self.backend.device_rows(array)

    def report(self) -> RuntimeReport:
        return self.backend.report()

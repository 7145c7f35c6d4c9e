"""The types of a graph's matrices, what int8 is fitted to, and what a built graph multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from marnet_sdk.errors import ExportError
from marnet_sdk.noise.tables import Floats

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unread(ExportError):
    """A build may well be right, but the types of its products cannot be read back."""


@dataclass(frozen=True)
class Types:
    """These are the types in which a graph stores its matrices and computes with them.

    Matrices that are stored in int8 are multiplied in int8; `compute` is for everything else.
    """

    storage: str
    compute: str

    @property
    def sentence(self) -> str:
        """Say in one line how matrices are stored and multiplied, for `marnet-export`."""
        if self.storage == "int8":
            return f"int8: matrices stored and multiplied in int8, the rest in {self.compute}"
        if self.storage == self.compute:
            return f"{self.storage}: weights stored and products computed in {self.storage}"
        return (
            f"{self.storage}: weights stored in {self.storage}, products computed in "
            f"{self.compute}, because this backend has no faster {self.storage} arithmetic on a CPU"
        )


class Arithmetic(NamedTuple):
    """These are the types of an export: of its encoder, and of its loop and head."""

    encoder: Types
    loop: Types

    @property
    def storages(self) -> set[str]:
        """Return the types in which matrices are stored."""
        return {self.encoder.storage, self.loop.storage}


@dataclass(frozen=True, eq=False)
class Calibration:
    """The ranges of activations for int8 are measured on these arrays."""

    pixels: Floats  # [N, 3, H, W] real images
    x_v: Floats  # [N, D_v] what the float32 encoder makes of them
    coefficients: Floats  # [S, 3], the loop's tables at the operating point that is served
    bias: Floats  # [S, 1 or N, K, R]
    kept: tuple[str, ...] = ()  # the encoder's layers that stay float


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution of a built graph."""

    part: str  # encoder, loop, head
    name: str
    multiply_adds: int  # for one image and one noise sample; of the loop: of one step
    storage: str  # a precision, or "activation" where both factors are computed
    compute: str

"""Loops for tests of the native kernel, and the library compiled for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from compilers import need_compiler
from filelock import FileLock

from marnet_kernels.native import Kind, LoopLayer, LoopLayers, library
from marnet_kernels.reverse_sampler import to_bits

Floats = np.ndarray
Carry = Literal["hidden", "feature"]


@pytest.fixture(scope="session", autouse=True)
def _compiled(of_this_run: Path) -> None:
    """Import it into a test module: the first process that needs the library compiles it."""
    need_compiler()
    with FileLock(of_this_run / "native-loop.lock"):
        library(compile_it=True)


def layer(
    rng: np.random.Generator, outputs: int, inputs: int, kind: Kind, *, biased: bool
) -> LoopLayer:
    """Random weights whose loop contracts."""
    weight = (0.8 * rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)
    bias = (rng.standard_normal(outputs) / 10).astype(np.float32) if biased else None
    if kind == "int8":
        scale = np.abs(weight).max(axis=1) / np.float32(127)
        stored = np.round(weight / scale[:, None]).astype(np.int8)
        return LoopLayer("int8", stored, bias, scale)
    return LoopLayer(kind, weight if kind == "fp32" else to_bits(weight, kind), bias)


def make_layers(
    kind: Kind, carry: Carry = "hidden", *, hidden: int = 70, dim: int = 40, given: int = 30
) -> LoopLayers:
    """A loop with these widths; what is multiplied once an image is float32 beside int8."""
    rng = np.random.default_rng(hidden + dim)
    once: Kind = "fp32" if kind == "int8" else kind
    carried = hidden if carry == "hidden" else dim
    return LoopLayers(
        mean=rng.standard_normal(given).astype(np.float32),
        std=(0.5 + rng.random(given)).astype(np.float32),
        condition=layer(rng, hidden, given, once, biased=False),
        hidden2=layer(rng, hidden, hidden, kind, biased=True),
        hidden3=layer(rng, hidden, hidden, kind, biased=True),
        carry=layer(rng, carried, hidden, kind, biased=False),
        output=layer(rng, dim, hidden, once, biased=True),
        input=None if carry == "hidden" else layer(rng, hidden, carried, kind, biased=False),
    )


def make_input(
    layers: LoopLayers, images: int = 3, samples: int = 2, steps: int = 5, *, by_image: bool = False
) -> tuple[Floats, Floats, Floats]:
    """x_v, coefficients and bias table."""
    rng = np.random.default_rng(images + 10 * steps)
    hidden, given = layers.condition.weight.shape
    shape = (steps, images if by_image else 1, samples, hidden)
    x_v, bias = rng.standard_normal((images, given)), 0.3 * rng.standard_normal(shape)
    coefficients = np.column_stack([0.6 + 0.3 * rng.random(steps), *rng.random((2, steps)) / 4])
    return tuple(a.astype(np.float32) for a in (x_v, coefficients, bias))  # type: ignore[return-value]

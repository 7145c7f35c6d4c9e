"""This module holds what the graphs that are written by hand have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from marnet_bench.plain_loop import Problem
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats

GROUP = 128  # inputs of a product that share a scale where activations are quantised in groups


def layers(problem: Problem) -> Iterator[tuple[Floats, Floats]]:
    """Weight [out, in] and bias [out] of the denoiser's four layers."""
    denoiser = problem.model.denoiser
    for layer in (denoiser.layer1, denoiser.layer2, denoiser.layer3, denoiser.layer4):
        yield to_numpy(layer.weight), to_numpy(layer.bias)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().numpy())


def need_simple_fusion(problem: Problem) -> str:
    """The fusion of a model whose head can be written out.

    Raises:
        BackendUnavailable: it has another one.
    """
    fusion = problem.model.config.fusion
    if fusion not in ("concat", "add", "mul"):
        raise BackendUnavailable(f"its graph is written for concat, add and mul, not for {fusion}")
    return fusion

"""Quantise to int8 after training: what the backends share.

A product is int8 times int8: its weights have a scale for each output, its activations one scale
and zero point. These are static and come from calibration images, so no answer depends on the other
images of its batch. The range of an activation is the least and the largest value that it had:
cutting off even one in a thousand of them moved single logits of a trained model by a third of the
largest one, because a loop carries what it lost from step to step. Two more refinements were tried
on trained loops and gave nothing: spreading the range of channels over activations and weights
(SmoothQuant), and correcting biases by the mean error.
Axes: B batch, K noise samples, S steps, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_export.builders import Calibration, Types
from marnet_export.graph import Matrix, ScriptedLoop, Step
from marnet_export.lower import Lowered
from marnet_sdk.errors import ExportError
from marnet_sdk.tables import Floats, Tables

IMAGES = 300  # calibrated on at most so many
LEVELS = 256
_CHUNK = 50


@dataclass(frozen=True)
class Range:
    """The values of an activation, zero among them, on `LEVELS` equal steps of which one is 0."""

    least: float
    largest: float

    @property
    def scale(self) -> float:
        return (self.largest - self.least) / (LEVELS - 1) or 1.0

    @property
    def zero_point(self) -> int:
        return round(-self.least / self.scale)

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest step."""
        return -self.zero_point * self.scale, (LEVELS - 1 - self.zero_point) * self.scale


def quantised_rows(weight: NDArray) -> tuple[NDArray[np.int8], Floats]:
    """A weight [O, ...] as int8 and a scale for each of its rows, [O, 1, ...]."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    scale = (np.where(largest == 0, 1, largest) / 127).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def products_of_activations(graph: Any) -> list[str]:
    """Names of an ONNX graph's products without a stored factor, as those of attention are."""
    stored = {tensor.name for tensor in graph.initializer}
    products = (node for node in graph.node if node.op_type == "MatMul")
    return [node.name for node in products if not stored & set(node.input)]


def require_calibration(calibration: Calibration | None, types: Types) -> Calibration | None:
    """The calibration of an int8 graph, at most `IMAGES` of its images; None for other types.

    Raises:
        ExportError: int8 without images, or with values that are not finite.
    """
    if types.storage != "int8":
        return None
    if calibration is None or not len(calibration.pixels):
        raise ExportError(
            "int8 needs images to calibrate on, got none; name some with --data, or export with "
            "--precision bf16 or fp32"
        )
    pixels, x_v, bias = calibration.pixels, calibration.x_v, calibration.bias
    for name, array in (("images", pixels), ("image features", x_v), ("tables", bias)):
        if not np.isfinite(array).all():
            raise ExportError(
                f"the {name} to calibrate int8 on hold NaN or infinite values; "
                "export with --precision fp32 to see which"
            )
    shared = bias.shape[1] == 1
    return Calibration(
        pixels[:IMAGES],
        x_v[:IMAGES],
        calibration.coefficients,
        bias if shared else bias[:, :IMAGES],
    )


def loop_ranges(lowered: Lowered, calibration: Calibration) -> dict[str, Range]:
    """The range of the input of each product in the loop, over all steps, images and samples.

    The products are those that every step makes, by the name of their `Matrix` in the step. What is
    multiplied once per image (the condition, the last estimate) stays float.

    Raises:
        ExportError: an activation is not finite.
    """
    step = lowered.step(torch.float32)
    samples = calibration.bias.shape[2]
    images = min(len(calibration.x_v), max(1, IMAGES // samples))
    tables = Tables(calibration.coefficients, calibration.bias).at_least_two_steps()
    coefficients = torch.from_numpy(tables.coefficients)
    with torch.inference_mode(), _watched(step) as (seen, repeated):
        for i in range(0, images, _CHUNK):
            rows = np.arange(i, min(i + _CHUNK, images))
            x_v = torch.from_numpy(np.ascontiguousarray(calibration.x_v[rows]))
            ScriptedLoop(step)(x_v, coefficients, torch.from_numpy(tables.rows(rows).bias))
    found = {name: Range(*seen[name]) for name in seen if name in repeated}
    for name, values in found.items():
        if not np.isfinite([values.least, values.largest]).all():
            raise ExportError(
                f"the reverse chain's {name} takes values that are not finite on the images that "
                "int8 is calibrated on: its denoiser does not contract; train it again, or use "
                "fewer steps"
            )
    return found


@contextmanager
def _watched(step: Step) -> Iterator[tuple[dict[str, tuple[float, float]], set[str]]]:
    """Record the range of values that each `Matrix` of a step meets, and which `gain` uses."""
    seen: dict[str, tuple[float, float]] = {}
    repeated: set[str] = set()
    gain, gaining = step.gain, False

    def watched_gain(state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        nonlocal gaining
        gaining = True
        gained = gain(state, q, row)
        gaining = False
        return gained

    def watch(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            least, largest = (float(v) for v in torch.aminmax(inputs[0]))
            before = seen.get(name, (0.0, 0.0))
            # NumPy's keep NaN, Python's do not.
            seen[name] = (
                float(np.minimum(before[0], least)),
                float(np.maximum(before[1], largest)),
            )
            if gaining:
                repeated.add(name)

        return hook

    matrices = [(name, m) for name, m in step.named_modules() if isinstance(m, Matrix)]
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in matrices]  # type: ignore[arg-type]
    step.gain = watched_gain  # type: ignore[method-assign]
    try:
        yield seen, repeated
    finally:
        del step.gain
        for handle in handles:
            handle.remove()

"""The native loop in NumPy, slow and obvious; what it computes is in `marnet_kernels.native.loop`.

Products in int8 are the kernel's to the last bit. Other products are summed in float64 and rounded
once. Everything else is float32, in the kernel's order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marnet_kernels.native.loop import LEAST_SPAN, LEVELS, Floats, LoopLayer, LoopLayers
from marnet_kernels.reverse_sampler import from_bits


def loop_reference(layers: LoopLayers, x_v: Floats, coefficients: Floats, bias: Floats) -> Floats:
    """Map x_v [B, D_v], coefficients [S, 3] and bias [S, N, K, H] to estimates [B, K, D]."""
    q = layer_reference(layers.condition, (x_v - layers.mean) / layers.std)[:, None]
    shape = (len(x_v), bias.shape[2], len(layers.carry.weight))
    p, previous = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for (a, b, c), row in zip(coefficients[:-1], bias[:-1], strict=True):
        g = layer_reference(layers.carry, _hidden(layers, p, q, row))
        p, previous = (p * a + g * b) + previous * c, g
    return layer_reference(layers.output, _hidden(layers, p, q, bias[-1]))


def layer_reference(layer: LoopLayer, x: Floats) -> Floats:
    """Map x [..., I] to [..., O]."""
    bias = np.float32(0) if layer.bias is None else layer.bias
    if layer.kind == "int8":
        levels, step = on_levels(x)
        sums = levels @ layer.weight.T.astype(np.int64)
        assert layer.scale is not None
        return sums.astype(np.float32) * (layer.scale * step).astype(np.float32) + bias
    return (x.astype(np.float64) @ _values(layer).T).astype(np.float32) + bias


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def on_levels(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Put each row of x [..., I] on the levels of its own range.

    Returns:
        Levels [..., I], from that of 0, and the step between two of them, [..., 1]; the step is NaN
        for a row that is not finite, or whose range is not.
    """
    x, most = x.astype(np.float32), np.float32(LEVELS - 1)
    least = np.minimum(x.min(axis=-1, keepdims=True), np.float32(0))
    largest = np.maximum(x.max(axis=-1, keepdims=True), np.float32(0))
    span = largest - least
    finite, some = np.isfinite(span), span > LEAST_SPAN
    inverse = np.where(some & finite, most / span, np.float32(0))
    step = np.where(finite, np.where(some, span / most, np.float32(0)), np.float32(np.nan))
    zero = np.rint(-least * inverse)
    levels = np.rint(x * inverse).clip(-zero, most - zero)
    return np.where(finite, levels, 0).astype(np.int64), step.astype(np.float32)


def _hidden(layers: LoopLayers, p: Floats, q: Floats, row: Floats) -> Floats:
    into = p if layers.input is None else layer_reference(layers.input, p)
    h = _leaky(into + q + row, layers.slope)
    h = _leaky(layer_reference(layers.hidden2, h), layers.slope)
    return _leaky(layer_reference(layers.hidden3, h), layers.slope)


def _values(layer: LoopLayer) -> NDArray[np.float64]:
    if layer.kind in ("fp16", "bf16"):
        return from_bits(layer.weight, layer.kind).astype(np.float64)
    return layer.weight.astype(np.float64)


def _leaky(x: Floats, slope: float) -> Floats:
    return np.where(x > 0, x, np.float32(slope) * x)

"""The native loop in NumPy, slow and obvious; what it computes is in `marnet_kernels.native.loop`.

Products in int8 are the kernel's to the last bit. Other products are summed in float64 and rounded
once. Everything else is float32, in the kernel's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_kernels.native.loop import FINER, LEVELS, Floats, LoopLayer, LoopLayers
from marnet_kernels.reverse_sampler import from_bits


def loop_reference(layers: LoopLayers, x_v: Floats, coefficients: Floats, bias: Floats) -> Floats:
    """Map x_v [B, D_v], coefficients [S, 3] and bias [S, N, K, H] to estimates [B, K, D]."""
    q = layer_reference(layers.condition, (x_v - layers.mean) / layers.std)[:, None]
    shape = (len(x_v), bias.shape[2], len(layers.carry.weight))
    p, previous = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    coarse = len(bias) - layers.fine_steps  # the first steps
    for i, (a, b, c) in enumerate(coefficients[:-1]):
        h3 = _hidden(layers, p, q, bias[i], fine=i >= coarse)
        g = layer_reference(layers.carry, h3, fine=i >= coarse)
        p, previous = (p * a + g * b) + previous * c, g
    h3 = _hidden(layers, p, q, bias[-1], fine=layers.fine_steps > 0)
    return layer_reference(layers.output, h3)


def layer_reference(layer: LoopLayer, x: Floats, *, fine: bool = False) -> Floats:
    """Map x [..., I], of a layer in int8 on the levels of 8 bits or of 16, to [..., O]."""
    bias: Any = np.float32(0) if layer.bias is None else layer.bias
    if layer.kind != "int8":
        return (x.astype(np.float64) @ _values(layer).T).astype(np.float32) + bias
    weight = layer.weight.T.astype(np.int64)
    if not fine:
        levels = np.rint(x * layer.inverse).clip(-layer.zero, LEVELS - 1 - layer.zero)
        return (levels.astype(np.int64) @ weight).astype(np.float32) * layer.factors + bias
    zero, finer = layer.zero * FINER, np.float32(FINER)
    levels = np.rint(x * (layer.inverse * finer)).clip(-zero, LEVELS * LEVELS - 1 - zero)
    high, low = np.divmod(levels.astype(np.int64) + zero, LEVELS)
    high, low = (((part - layer.zero) @ weight).astype(np.float32) for part in (high, low))
    return (high * np.float32(LEVELS) + low) * (layer.factors * (1 / finer)) + bias


def _hidden(layers: LoopLayers, p: Floats, q: Floats, row: Floats, *, fine: bool) -> Floats:
    into = p if layers.input is None else layer_reference(layers.input, p, fine=fine)
    h = _leaky(into + q + row, layers.slope)
    h = _leaky(layer_reference(layers.hidden2, h, fine=fine), layers.slope)
    return _leaky(layer_reference(layers.hidden3, h, fine=fine), layers.slope)


def _values(layer: LoopLayer) -> NDArray[np.float64]:
    if layer.kind in ("fp16", "bf16"):
        return from_bits(layer.weight, layer.kind).astype(np.float64)
    return layer.weight.astype(np.float64)


def _leaky(x: Floats, slope: float) -> Floats:
    return np.where(x > 0, x, np.float32(slope) * x)

"""The native loop beside a bundle's graph: its weights, and what it multiplies.

The graph of the loop stays in the bundle. It answers where the kernel's library is not there, and,
but for int8, for more rows at once than those that the kernel was found to be faster for. So both
are held to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from marnet_export.build.builder import Builder
from marnet_export.build.quantise import quantised_rows
from marnet_export.build.types import Product, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.native_loop import (
    ANY_ROWS,
    LAYERS,
    Kind,
    LoopLayer,
    LoopLayers,
    compile_library,
    load_layers,
    save_layers,
    to_bits,
)
from marnet_train.models.denoiser import LEAKY_SLOPE


def why_not(builder: Builder, lowered: Lowered) -> str | None:
    """Say why a backend cannot have the native loop for this model here.

    This compiles its library.
    """
    if builder.head is None:
        return f"{builder.name} has no place for it"
    if not isinstance(lowered.plan, SamplingPlan):
        return "the method's loop is not of the form that it runs"
    if lowered.plan.fed:
        return "the denoiser is progressive, and the native loop feeds no estimate back"
    if lowered.plan.start_weight is not None:
        return "the chain starts from what stage 1 left, the native loop from noise"
    return compile_library()


def loop_layers(plan: SamplingPlan, types: Types) -> LoopLayers:
    """The plan's layers as the kernel takes them."""
    repeated = _kind(types)
    once: Kind = "fp32" if repeated == "int8" else repeated
    mean, std = (np.ascontiguousarray(a, np.float32) for a in plan.standardise)
    return LoopLayers(
        mean,
        std,
        condition=_layer(once, plan.condition_weight),
        hidden2=_layer(repeated, *plan.hidden2),
        hidden3=_layer(repeated, *plan.hidden3),
        carry=_layer(repeated, plan.carry_weight),
        output=_layer(once, *plan.output),
        input=None if plan.carry == "hidden" else _layer(repeated, plan.input_weight),
        slope=LEAKY_SLOPE,
    )


def _kind(types: Types) -> Kind:
    return cast(Kind, types.storage)


def _layer(kind: Kind, weight: NDArray, bias: NDArray | None = None) -> LoopLayer:
    biases = None if bias is None else bias.astype(np.float32)
    if kind == "int8":
        stored, scale = quantised_rows(weight)
        return LoopLayer(kind, stored, biases, scale[:, 0])
    single = weight.astype(np.float32)
    return LoopLayer(kind, single if kind == "fp32" else to_bits(single, kind), biases)


def write_native(builder: Builder, lowered: Lowered, types: Types, payload: Path) -> None:
    """Put the native loop and the graph of the head into a payload.

    Args:
        types: of the loop.
    """
    assert isinstance(lowered.plan, SamplingPlan)
    layers = loop_layers(lowered.plan, types)
    save_layers(layers, payload / LAYERS, ANY_ROWS)  # while it is verified, it answers everything
    assert builder.head is not None  # as `why_not` tells
    builder.head.build(lowered, types, payload)


def answers_alone(types: Types) -> bool:
    """Tell whether the native loop has to run every batch, however many rows are in it.

    In int8 it has a range of activations for each row, and the graph one for all. No answer is to
    depend on the size of its batch. In other types both compute the same.
    """
    return types.storage == "int8"


def remove_native(payload: Path) -> None:
    """Take it out again."""
    for path in (payload / LAYERS, *payload.glob("head.*")):
        path.unlink()


def set_most_rows(payload: Path, most_rows: int) -> None:
    """Set the most rows of which the native loop runs; of more rows, the graph runs the loop."""
    layers, _ = load_layers(payload / LAYERS)
    save_layers(layers, payload / LAYERS, most_rows)


def loop_products(
    builder: Builder, payload: Path, types: Types, graph: Sequence[Product]
) -> list[Product]:
    """Return what a payload multiplies: with a native loop, its products in the place of the
    graph's.

    Args:
        types: of the encoder. graph: what the graphs would multiply by themselves.
    """
    if builder.head is None or not (payload / LAYERS).exists():
        return list(graph)
    layers, _ = load_layers(payload / LAYERS)
    found = [product for product in graph if product.part == "encoder"]
    for name, layer in layers.layers():
        compute = "int8" if layer.kind == "int8" else "fp32"
        once = Product("head", f"last {name}", layer.weight.size, layer.kind, compute)
        if name not in ("condition", "output"):
            found.append(replace(once, part="loop", name=name))
        if name != "carry":  # the last step gives its estimate, and gains nothing
            found.append(once)
    return [*found, *builder.head.products(payload, types)]


def delivered(types: Types) -> Types:
    """Return what the native loop is asked for: it multiplies in float32 what is not int8."""
    return replace(types, compute="fp32")

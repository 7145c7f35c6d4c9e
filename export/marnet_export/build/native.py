"""The native loop as a candidate beside a bundle's graph: built, verified, timed, kept if faster.

The graph of the loop stays in the bundle. It answers where the kernel's library is not there, and
for more rows at once than those that the kernel was found to be faster for. So both are held to the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_export.build.builder import Builder
from marnet_export.build.quantise import Range, loop_ranges, quantised_rows, require_calibration
from marnet_export.build.types import Calibration, Product, Types
from marnet_export.choose.sweep import in_turn
from marnet_export.lower.methods import Lowered
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.backends import Backend
from marnet_sdk.errors import ExportError
from marnet_sdk.native_loop import (
    GRAPH,
    LAYERS,
    NATIVE,
    Kind,
    LoopLayer,
    LoopLayers,
    compile_library,
    load_layers,
    save_layers,
    to_bits,
)
from marnet_sdk.tables import Floats, Tables
from marnet_train.models.denoiser import LEAKY_SLOPE

MOST_ROWS = 16  # beyond which nobody looks: products of many rows are what runtimes are good at
ANY_ROWS = 2**31 - 1  # while it is verified, it answers everything
_ROWS = (1, 4, 16)  # images in a call that are timed


def why_not(builder: Builder, lowered: Lowered) -> str | None:
    """Why a backend cannot have the native loop for this model here; compiles its library."""
    if builder.head is None:
        return f"{builder.name} has no place for it"
    if not isinstance(lowered.plan, SamplingPlan):
        return "the method's loop is not of the form that it runs"
    return compile_library()


def loop_layers(plan: SamplingPlan, types: Types, ranges: Mapping[str, Range]) -> LoopLayers:
    """The plan's layers as the kernel takes them.

    Args:
        ranges: of the inputs of the products in int8, by their names in `PlanStep`.
    """
    once: Kind = "fp32" if types.storage == "int8" else _kind(types)
    mean, std = (np.ascontiguousarray(a, np.float32) for a in plan.standardise)

    def repeated(name: str, weight: NDArray, bias: NDArray | None = None) -> LoopLayer:
        return _layer(_kind(types), weight, bias, ranges.get(name))

    return LoopLayers(
        mean,
        std,
        condition=_layer(once, plan.condition_weight),
        hidden2=repeated("hidden2", *plan.hidden2),
        hidden3=repeated("hidden3", *plan.hidden3),
        carry=repeated("carry", plan.carry_weight),
        output=_layer(once, *plan.output),
        input=None if plan.carry == "hidden" else repeated("input", plan.input_weight),
        slope=LEAKY_SLOPE,
    )


def _kind(types: Types) -> Kind:
    kinds: dict[str, Kind] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}
    return kinds[types.storage]


def _layer(
    kind: Kind, weight: NDArray, bias: NDArray | None = None, values: Range | None = None
) -> LoopLayer:
    biases = None if bias is None else bias.astype(np.float32)
    if kind == "int8":
        assert values is not None
        stored, scale = quantised_rows(weight)
        step = float(np.float32(values.scale))
        return LoopLayer(kind, stored, biases, scale[:, 0], step, values.zero_point)
    single = weight.astype(np.float32)
    return LoopLayer(kind, single if kind == "fp32" else to_bits(single, kind), biases)


def write_native(
    builder: Builder,
    lowered: Lowered,
    types: tuple[Types, Types],
    payload: Path,
    calibration: Calibration | None,
) -> None:
    """Put the native loop and the graph of the head into a payload.

    Args:
        types: of encoder and loop.

    Raises:
        ExportError: int8 without calibration.
    """
    calibrated = require_calibration(calibration, types[1])
    assert isinstance(lowered.plan, SamplingPlan)
    ranges = {} if calibrated is None else loop_ranges(lowered, calibrated)
    save_layers(loop_layers(lowered.plan, types[1], ranges), payload / LAYERS, ANY_ROWS)
    assert builder.head is not None  # as `why_not` tells
    builder.head.build(lowered, types[1], payload)


def remove_native(payload: Path) -> None:
    """Take it out again."""
    for path in (payload / LAYERS, *payload.glob("head.*")):
        path.unlink()


def set_most_rows(payload: Path, most_rows: int) -> None:
    """Of more rows, the graph runs the loop."""
    layers, _ = load_layers(payload / LAYERS)
    save_layers(layers, payload / LAYERS, most_rows)


def loop_products(
    builder: Builder, payload: Path, types: Types, graph: Sequence[Product]
) -> list[Product]:
    """What a payload multiplies: with a native loop, its products in the place of the graph's.

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
    """What the native loop is asked for: it multiplies in float32 what is not int8."""
    return replace(types, compute="fp32")


def time_loops(
    native: Backend, graph: Backend, x_v: Floats, tables: Callable[[int], Tables]
) -> dict[int, dict[str, float]]:
    """Milliseconds from features to logits, by images in a call.

    Args:
        tables: of a batch of so many images.
    """
    taken = {}
    for count in _ROWS:
        rows = np.resize(x_v, (count, x_v.shape[1]))
        ready = tables(count)
        if count > 1 and count * ready.bias.shape[2] > MOST_ROWS:
            break
        calls = {
            name: lambda backend=backend, rows=rows, ready=ready: backend.refine(rows, ready)
            for name, backend in ((NATIVE, native), (GRAPH, graph))
        }
        taken[count] = {name: round(ms, 4) for name, ms in in_turn(calls).items()}
    return taken


def faster_up_to(taken: Mapping[int, Mapping[str, float]]) -> int:
    """Images in a call up to which the native loop is the faster one; 0: it never is."""
    most = 0
    for count, milliseconds in sorted(taken.items()):
        if milliseconds[NATIVE] >= milliseconds[GRAPH]:
            break
        most = count
    return most


def check_alike(native: Floats, graph: Floats, bound: float) -> list[str]:
    """Whether an image may be answered by either: logits [N, C] of both. Problems, or none."""
    difference = float(np.abs(native - graph).max())
    if difference <= bound:  # not so for NaN
        return []
    return [
        f"the native loop and the graph beside it differ by up to {difference:.3g} in a logit "
        f"(bound {bound:.3g})"
    ]


def about(taken: Mapping[int, Mapping[str, float]], most_rows: int) -> dict[str, Any]:
    """What fidelity.json says of both loops."""
    milliseconds = {str(count): dict(ms) for count, ms in taken.items()}
    return {"runs": NATIVE, "most_rows": most_rows, "milliseconds": milliseconds}


def shown(taken: Mapping[int, Mapping[str, float]]) -> str:
    """What both loops took, in part of a line."""
    return "; ".join(
        f"{ms[NATIVE]:.3g} ms for {count}, the graph {ms[GRAPH]:.3g}" for count, ms in taken.items()
    )


def refused(reason: str) -> ExportError:
    """`--loop native` cannot be had."""
    return ExportError(f"--loop native: {reason}; leave --loop out for whichever loop can be had")

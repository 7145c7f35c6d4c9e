"""The receipt of OpenVINO: every product of a payload, and the types that it is executed in.

Storage is read from the files, and what a product is computed in from the executed graphs of the
compiled models; a product that is not found there counts as fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from marnet_export.build.types import Product, Types
from marnet_sdk.backends.openvino import (
    ENCODER,
    FIRST_ORDER,
    HEAD,
    REFINE,
    compile_settings,
    constants,
    load_openvino,
)

ov = load_openvino()
PRODUCTS = {"MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention"}
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_EXECUTED = {"Convolution", "FullyConnected", "MatMul", "Subgraph", "ScaledDotProductAttention"}


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """List the products of both graphs, those of a step from the iterator's body alone, because the
    runtime does not show it.
    """
    core = ov.Core()
    encoder, refine = (core.read_model(payload / name) for name in (ENCODER, REFINE))
    encoder.reshape([1, *shape])
    results = [refine.output(name).get_node() for name in FIRST_ORDER]
    refine = ov.Model(results, refine.get_parameters(), "refine")
    _for_one_image(refine)
    loop = next(node for node in refine.get_ops() if node.get_type_name() == "TensorIterator")
    parts = {"encoder": encoder, "loop": loop.get_function().clone(), "head": refine}
    return [p for part, graph in parts.items() for p in _products_of(part, graph, core, types)]


def head_products(payload: Path, types: Types) -> list[Product]:
    """List the products of head.xml, which runs behind the native loop."""
    core = ov.Core()
    graph = core.read_model(payload / HEAD)
    _for_one_image(graph)
    return list(_products_of("head", graph, core, types))


def _for_one_image(graph: Any) -> None:
    """Fix the sizes of a graph behind the encoder, for one image and one sample."""
    free = {"x_v": (1,), "coefficients": (2,), "bias": (2, 1, 1), "x_cdr": (1, 1)}
    for port in graph.inputs:
        sizes = free[port.any_name]
        widths = [size.get_length() for size in list(port.partial_shape)[len(sizes) :]]
        port.get_node().set_partial_shape(ov.PartialShape([*sizes, *widths]))
    graph.validate_nodes_and_infer_types()


def _products_of(part: str, graph: Any, core: Any, types: Types) -> Iterator[Product]:
    compiled = core.compile_model(graph, "CPU", compile_settings(types.compute, None))
    runtime = compiled.get_runtime_model().get_ordered_ops()
    executed = [node for node in runtime if _about(node, "layerType") in _EXECUTED]
    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() in PRODUCTS]
    for node, runs in zip(nodes, _matched(nodes, executed), strict=True):
        name = node.get_friendly_name()
        if node.get_type_name() == "ScaledDotProductAttention":
            q, k, v = (node.input(i).get_shape() for i in range(3))
            sizes = (prod(q) * k[-2], prod(q[:-1]) * v[-2] * v[-1])
            factors = zip(("query key", "scores value"), sizes, (0, -1), strict=True)
            for which, size, place in factors:  # one fused kernel; its inputs are q, k, ..., v
                compute = "fp32" if runs is None else _kind(runs.inputs()[place])
                yield Product(part, f"{name}: {which}", size, "activation", compute)
        else:
            compute = "fp32" if runs is None else _PRECISIONS[_about(runs, "runtimePrecision")]
            yield Product(part, name, _multiply_adds(node), _stored_type(node), compute)


def _about(node: Any, key: str) -> str:
    return node.get_rt_info()[key].astype(str)


def _matched(nodes: Sequence[Any], executed: Sequence[Any]) -> list[Any]:
    """Map each node of a graph to what runs for it: by its name, or where a rewrite has lost that,
    the first of the same sizes that runs for no other.
    """
    ran: dict[str, int] = {}
    for i, run in enumerate(executed):
        names = _about(run, "originalLayersNames").split(",")
        ran |= {name.removesuffix("/DequantizationMultiply"): i for name in names}
    found = [ran.get(node.get_friendly_name()) for node in nodes]
    for place, node in enumerate(nodes):
        if found[place] is None:
            free = (i for i, run in enumerate(executed) if i not in found)
            found[place] = next((i for i in free if _sizes(executed[i]) == _sizes(node)), None)
    return [None if i is None else executed[i] for i in found]


def _sizes(node: Any) -> list[int]:
    """Numbers of elements: of the first two inputs and the output."""
    return [prod(port.get_shape()) for port in (*node.inputs()[:2], node.output(0))]


def _kind(port: Any) -> str:
    return _PRECISIONS[port.get_element_type().get_type_name()]


def _multiply_adds(node: Any) -> int:
    size = prod(node.output(0).get_shape())
    left, right = (node.input(i).get_shape() for i in range(2))
    match node.get_type_name():
        case "MatMul":
            return size * left[-2 if node.get_attributes()["transpose_a"] else -1]
        case "Convolution":  # [O, I, ...]
            return size * prod(right[1:])
        case _:  # [groups, O, I, ...]
            return size * prod(right[2:])


def _stored_type(node: Any) -> str:
    """The type of the stored matrix that is a factor of a product."""
    for source in (node.input_value(1), node.input_value(0)):
        if (stored := constants(source.get_node())) is not None:
            largest = max(stored, key=lambda constant: prod(constant.shape))
            return _kind(largest.output(0))
    return "activation"

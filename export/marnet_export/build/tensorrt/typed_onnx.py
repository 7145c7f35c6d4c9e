"""Strongly typed ONNX: the types of products are in the graph, whatever runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from marnet_export.build.onnx_graph import ONNX_TYPES, bodies, store

PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_FLOAT = int(TensorProto.FLOAT)


def type_products(proto: onnx.ModelProto, compute: str) -> onnx.ModelProto:
    """Cast the factors of every product that is still float32, and its result back.

    Layers have their type already (`with_compute`), or stand between Q and DQ nodes; left are
    the products of activations with activations, as in attention.
    """
    if compute == "fp32":
        return proto
    inferred = onnx.shape_inference.infer_shapes(proto)
    _type_products(inferred.graph, ONNX_TYPES[compute], {})
    _store_tables(inferred.graph, compute)
    return inferred


def _store_tables(graph: onnx.GraphProto, compute: str) -> None:
    """Store tables that rows are looked up in, such as embeddings of words, in 16 bits."""
    tables = {t.name: t for t in graph.initializer if t.data_type == _FLOAT and len(t.dims) == 2}
    read = Counter(name for node in graph.node for name in (*node.input, *_captured(node)))
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        tensor = tables.get(node.input[0])
        if tensor is None or read[tensor.name] > 1:
            continue
        for value in [v for v in graph.value_info if v.name == tensor.name]:
            graph.value_info.remove(value)
        store(tensor, compute)
        result, short = node.output[0], f"{node.name}.short"
        node.output[0] = short
        back = helper.make_node("Cast", [short], [result], short, to=_FLOAT)
        graph.node.insert(list(graph.node).index(node) + 1, back)


def drop_full_masks(graph: onnx.GraphProto) -> None:
    """Drop attention masks that are constant and let everything pass: a kernel without is faster.

    (transformers gives one to vision encoders, to say that no attention is causal.)
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Attention" or len(node.input) < 4:
            continue
        mask = made.get(node.input[3])
        source = mask.input[0] if mask is not None and mask.op_type == "Expand" else node.input[3]
        tensor = constants.get(source)
        if tensor is None or tensor.data_type != TensorProto.BOOL:
            continue
        if numpy_helper.to_array(tensor).all():
            node.input[3] = ""
            while node.input[-1] == "":
                node.input.pop()
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if kept & set(node.output):
            kept |= set(node.input) | _captured(node)
        else:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in kept]:
        graph.initializer.remove(tensor)


def _captured(node: onnx.NodeProto) -> set[str]:
    """Every name that graphs inside a node read, whether or not it is made there."""
    found = set()
    for body in bodies(node):
        found |= {value.name for value in body.output}
        for inner in body.node:
            found |= set(inner.input) | _captured(inner)
    return found


def _type_products(graph: onnx.GraphProto, kind: int, outer: Mapping[str, int]) -> None:
    types = dict(outer) | _element_types(graph)
    quantised = {
        n for node in graph.node if node.op_type == "DequantizeLinear" for n in node.output
    }
    nodes = []
    for node in graph.node:
        for body in bodies(node):
            _type_products(body, kind, types)
        factors = [i for i in range(len(node.input)) if types.get(node.input[i]) == _FLOAT]
        if node.op_type not in PRODUCTS or not factors or quantised & set(node.input):
            nodes.append(node)
            continue
        for i in factors:
            name = f"{node.name}.input{i}"
            nodes.append(helper.make_node("Cast", [node.input[i]], [name], name, to=kind))
            node.input[i] = name
        result = node.output[0]
        node.output[0] = f"{node.name}.result"
        back = helper.make_node("Cast", [node.output[0]], [result], node.output[0], to=_FLOAT)
        nodes += [node, back]
    del graph.node[:]
    graph.node.extend(nodes)


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def emulate_bfloat16(proto: onnx.ModelProto) -> None:
    """Make every bf16 tensor a float32 one that holds bf16 values."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    if _round_results(inferred.graph):
        _forget_types(inferred.graph)
        proto.CopyFrom(inferred)


def _round_results(graph: onnx.GraphProto) -> bool:
    """Round what is bf16 where it is made; whether there was any."""
    rounded = {n for n, kind in _element_types(graph).items() if kind == TensorProto.BFLOAT16}
    constants = [t for t in graph.initializer if t.data_type == TensorProto.BFLOAT16]
    for tensor in constants:
        bits = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(bits, tensor.name))
    found, nodes = bool(rounded), []
    for node in graph.node:
        for body in bodies(node):
            found |= _round_results(body)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in rounded:
                exact, short = f"{name}.exact", f"{name}.bf16"
                node.output[i] = exact
                if node.op_type == "Cast":
                    node.attribute[0].i = _FLOAT
                nodes.append(helper.make_node("Cast", [exact], [short], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [short], [name], to=_FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return found


def _forget_types(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for body in bodies(node):
            _forget_types(body)

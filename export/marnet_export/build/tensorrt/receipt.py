"""Read what the products of a built network are, as TensorRT itself reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from marnet_export.build.onnx_graph import bodies
from marnet_export.build.tensorrt.engines import INPUT_SIZES, cast_layer, layers_of, parse_network
from marnet_export.build.tensorrt.typed_onnx import PRODUCTS
from marnet_export.build.types import Product
from marnet_sdk.errors import BackendUnavailable, MissingExtra
from marnet_sdk.gpu.tensorrt_library import RTX, STANDARD, Library, load_library, make_log

_SIZES = {"batch": 1, "steps": 3, "samples": 1}


def _any_library() -> Library:
    try:
        return load_library(RTX)
    except (MissingExtra, BackendUnavailable):
        return load_library(STANDARD)


def read_products(path: Path) -> list[Product]:
    """The products of an ONNX file, for one image, one noise sample and one step of the loop."""
    library = _any_library()
    proto = onnx.load(path)
    for value in proto.graph.input:
        names = iter(INPUT_SIZES[value.name])
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = _SIZES[next(names)]
    parts = _parts(proto.graph, path.stem)
    with tempfile.TemporaryDirectory() as folder:
        fixed = Path(folder) / path.name
        onnx.save(proto, fixed)
        builder = library.module.Builder(log := make_log(library.module))
        network, _parser = parse_network(library, builder, log, fixed)
        reader = _NetworkReader(library.module, network)
        return [
            Product(parts[layer.name], layer.name, *measured)
            for layer in layers_of(network)
            if (measured := reader.product(layer)) and layer.name in parts
        ]


def _parts(graph: onnx.GraphProto, name: str) -> dict[str, str]:
    """Name of each product -> part of the model. "loop" is one step, "head" all that is done once
    for an image: the condition, the last step and the head."""
    outside = "encoder" if name == "encoder" else "head"
    found = {_layer_name(node): outside for node in graph.node if node.op_type in PRODUCTS}
    inner = [node for outer in graph.node for body in bodies(outer) for node in body.node]
    return found | {_layer_name(node): "loop" for node in inner if node.op_type in PRODUCTS}


def _layer_name(node: onnx.NodeProto) -> str:
    return f"{node.name}_AttentionOutput" if node.op_type == "Attention" else node.name


class _NetworkReader:
    """This reads what the product layers of a TensorRT network are made of."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt = trt
        self.makers = {
            layer.get_output(i).name: layer
            for layer in layers_of(network)
            for i in range(layer.num_outputs)
        }
        kinds = trt.DataType
        self.names = {
            kinds.FLOAT: "fp32",
            kinds.HALF: "fp16",
            kinds.BF16: "bf16",
            kinds.INT8: "int8",
        }

    def product(self, layer: Any) -> tuple[int, str, str] | None:
        """Multiply-adds, storage and compute type; None for a layer that is no product."""
        kinds = self.trt.LayerType
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        if layer.type == kinds.MATRIX_MULTIPLY:
            transposed = (
                cast_layer(self.trt.IMatrixMultiplyLayer, layer).op0
                == self.trt.MatrixOperation.TRANSPOSE
            )
            inner = inputs[0].shape[-2 if transposed else -1]
            return self._product(_volume(layer.get_output(0)) * inner, inputs[0], inputs[1])
        if layer.type == kinds.CONVOLUTION:
            return self._convolution(cast_layer(self.trt.IConvolutionLayer, layer), inputs)
        if layer.type == kinds.ATTENTION_OUTPUT:
            attention = cast_layer(self.trt.IAttentionOutputLayer, layer).attention
            query, key, value = (attention.get_input(i) for i in range(3))
            scores = _volume(query) // query.shape[-1] * key.shape[-2]
            kind = self.names[query.dtype]
            return scores * (key.shape[-1] + value.shape[-1]), "activation", kind
        return None

    def _convolution(self, layer: Any, inputs: list[Any]) -> tuple[int, str, str]:
        (_, channels, *_), groups = inputs[0].shape, layer.num_groups
        each = int(np.prod(layer.kernel_size_nd)) * channels // groups
        operations = _volume(layer.get_output(0)) * each
        if len(inputs) > 1 and inputs[1] is not None:  # the kernel is a tensor of its own
            return self._product(operations, inputs[0], inputs[1])
        # A kernel inside the layer has the type of its input: the network is strongly typed.
        kind = self.names[inputs[0].dtype]
        return operations, kind, kind

    def _product(self, operations: int, left: Any, right: Any) -> tuple[int, str, str]:
        storage, types = "activation", []
        for factor in (left, right):
            maker = self._maker(factor)
            if maker is not None and maker.type == self.trt.LayerType.DEQUANTIZE:
                factor = maker.get_input(0)  # in the type that it is multiplied in
                maker = self._maker(factor)
            types.append(self.names[factor.dtype])
            if maker is not None and maker.type == self.trt.LayerType.CONSTANT:
                storage = types[-1]
        compute = types[0] if types[0] == types[1] else self.names[left.dtype]
        return operations, storage, compute

    def _maker(self, tensor: Any) -> Any:
        """The layer that computes a tensor, behind those that only reshape it."""
        maker = self.makers.get(tensor.name)
        while maker is not None and maker.type == self.trt.LayerType.SHUFFLE:
            maker = self.makers.get(maker.get_input(0).name)
        return maker


def _volume(tensor: Any) -> int:
    return int(np.prod(tuple(tensor.shape)))

"""ONNX graphs, for ONNX Runtime and for TensorRT: exported from torch, and quantised to int8."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn

from marnet_export.build.quantise import kept_nodes
from marnet_export.build.tracing import Signature, quiet
from marnet_export.build.types import TORCH_TYPES, Calibration
from marnet_sdk.backends.onnxruntime import load_onnxruntime

load_onnxruntime()  # what is built is run before the export ends, so its absence ends it first

ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
_CALIBRATED_ON = 10  # images at a time


def to_onnx(module: nn.Module, signature: Signature, shapes: Any = None) -> dict[str, Any]:
    """Trace a module: the arguments with which `torch.onnx.export` makes a graph of it.

    Args:
        shapes: the free sizes, as `torch.export` has them; None: those of the signature.
    """
    shapes = shapes or signature.free()
    program = torch.export.export(module, signature.example, dynamic_shapes=shapes, strict=False)
    names = {"input_names": list(signature.inputs), "output_names": list(signature.outputs)}
    return {"model": program, "args": (), "dynamo": True, "verbose": False, **names}


def bodies(node: NodeProto) -> list[GraphProto]:
    """The graphs inside a node, such as the step of a `Scan`."""
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def store(tensor: TensorProto, kind: str) -> None:
    """Round the values of a float32 tensor to a type of 16 bits, and store them so."""
    rounded = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(TORCH_TYPES[kind])
    tensor.ClearField("float_data")
    tensor.data_type = ONNX_TYPES[kind]
    tensor.raw_data = rounded.view(torch.int16).numpy().astype("<i2").tobytes()


def quantise(
    proto: ModelProto,
    encoder: nn.Module,
    calibration: Calibration,
    *,
    kinds: list[str],
    activations: str,
    **options: Any,
) -> ModelProto:
    """The int8 twin of an encoder's float32 graph, by ONNX Runtime's own quantiser.

    Its products stand between Q and DQ nodes; weights have a scale for each row. Products of
    activations are left alone, and layers that stay float.

    Args:
        kinds: of nodes that are quantised. activations: their type, "QInt8" or "QUInt8".
        options: more for the quantiser.
    """
    from onnxruntime.quantization import QuantType, quantize_static  # only int8 needs it

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    factors = {
        node.name: numpy_helper.to_array(stored[node.input[1]])
        for node in products
        if node.input[1] in stored
    }
    matmuls = [node for node in products if node.op_type == "MatMul"]
    left = [node.name for node in matmuls if not stored.keys() & set(node.input)]
    left += kept_nodes(factors, encoder, calibration.kept)
    starts = range(0, len(calibration.pixels), _CALIBRATED_ON)
    batches = ({"pixels": calibration.pixels[i : i + _CALIBRATED_ON]} for i in starts)
    images: Any = SimpleNamespace(get_next=lambda: next(batches, None))
    with quiet(), silent_root_logger(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            path,
            images,
            op_types_to_quantize=kinds,
            nodes_to_exclude=left,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True, **options},
        )
        return onnx.load(path)


@contextmanager
def silent_root_logger() -> Iterator[None]:
    """ONNX Runtime's tools write to the root logger, which prints and installs a handler for it."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)

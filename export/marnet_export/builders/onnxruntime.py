"""ONNX for ONNX Runtime: the encoder, and the loop as one `Scan` with the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript  # noqa: F401 - torch.onnx needs it: let its absence show here
import torch
from onnx import TensorProto, helper, numpy_helper

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Head, Refine, ScanLoop
from marnet_export.plan import SamplingPlan
from marnet_sdk.backends.onnxruntime import ENCODER, REFINE
from marnet_train.models.marnet import MARNet

COMPUTE = ("fp32",)
_ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}


def build_encoder(model: MARNet, pixels: torch.Tensor, types: Types, payload: Path) -> None:
    """Write payload/encoder.onnx. `pixels` [B, 3, H, W] is the example that is traced, B >= 2."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},)
    _export(model.vision.eval(), (pixels,), shapes, ["pixels"], ["x_v"], types, payload / ENCODER)


def build_refine(model: MARNet, plan: SamplingPlan, types: Types, payload: Path) -> None:
    """Write payload/refine.onnx."""
    module = Refine(ScanLoop(plan), Head(model)).eval()
    # No size of the example is kept but the widths; each is different, so that none is mistaken.
    x_v = torch.zeros(2, plan.condition_weight.shape[1])
    tables = (torch.zeros(4, 3), torch.zeros(4, 2, 5, len(plan.input_weight)))
    batch, length, samples = (
        torch.export.Dim(name, min=least, max=1 << 20)
        for name, least in (("batch", 1), ("steps", 3), ("samples", 1))
    )
    shapes = ({0: batch}, {0: length}, {0: length, 1: batch, 2: samples})
    inputs, outputs = ["x_v", "coefficients", "bias"], ["logits", "features"]
    _export(module, (x_v, *tables), shapes, inputs, outputs, types, payload / REFINE)


def _export(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    shapes: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    types: Types,
    path: Path,
) -> None:
    with torch.no_grad(), quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=inputs, output_names=outputs, verbose=False
        )
        assert exported is not None  # only None for the old exporter
        proto = exported.model_proto
    _let_noise_broadcast(proto)
    _store(proto, types.storage)
    onnx.save(proto, path)


def _let_noise_broadcast(proto: onnx.ModelProto) -> None:
    """Allow one row of noise for a whole batch, beside a row for each image.

    The exporter can only be told that `bias` has as many rows as there are images. ONNX broadcasts
    a single one as well, if no shape in the graph claims otherwise.
    """
    for value in proto.graph.input:
        if value.name == "bias":
            value.type.tensor_type.shape.dim[1].dim_param = "noise_rows"
    _forget_shapes(proto.graph)


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Drop the shapes of everything inside; the runtime infers them from the inputs."""
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in (*attribute.g.input, *attribute.g.output):
                    value.type.tensor_type.ClearField("shape")
                _forget_shapes(attribute.g)


def _store(proto: onnx.ModelProto, storage: str) -> None:
    """Store every float32 matrix in another type, cast back when the model is loaded.

    The runtime folds a cast of a constant once, at load, so the graph computes as before.
    """
    if storage == "fp32":
        return
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, stored = tensor.name, f"{tensor.name}.{storage}"
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(TORCH_TYPES[storage])
        dims = list(tensor.dims)
        bits = values.view(torch.int16).numpy().astype("<i2")
        tensor.Clear()
        tensor.name, tensor.data_type = stored, _ONNX_TYPES[storage]
        tensor.dims.extend(dims)
        tensor.raw_data = bits.tobytes()
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def stored_elements(payload: Path) -> dict[torch.dtype, int]:
    """Number of stored floating-point weights per type, read back from the built files."""
    counts: dict[torch.dtype, int] = {}
    for file in (ENCODER, REFINE):
        for tensor in onnx.load(payload / file).graph.initializer:
            for name, kind in _ONNX_TYPES.items():
                if tensor.data_type == kind:
                    dtype = TORCH_TYPES[name]
                    counts[dtype] = counts.get(dtype, 0) + int(np.prod(tensor.dims))
    return counts

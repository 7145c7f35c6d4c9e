"""ONNX for ONNX Runtime: one graph from pixels and tables to logits, the loop as one `Scan`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxscript  # noqa: F401 - torch.onnx needs it: let its absence show here
import torch
from onnx import TensorProto, helper, numpy_helper

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Deployed, Head, ScanLoop
from marnet_export.plan import SamplingPlan
from marnet_sdk.backends.onnxruntime import MODEL
from marnet_train.models.marnet import MARNet

COMPUTE = ("fp32",)
_INPUTS = ("pixels", "initial", "coefficients", "time_bias", "noise")
_ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}


def build(
    model: MARNet, plan: SamplingPlan, pixels: torch.Tensor, types: Types, payload: Path
) -> None:
    """Write payload/model.onnx. `pixels` [B, 3, H, W] is the example that is traced, B >= 2."""
    module = Deployed(model.vision, ScanLoop(plan), Head(model)).eval()
    state = plan.carry_weight[0].shape[0]
    hidden, steps = plan.input_weight.shape[0], 4  # any length: the graph takes it from its inputs
    tables = [torch.zeros(shape) for shape in ((1, state), (steps, 4), (steps, hidden))]
    arguments = (pixels, *tables, torch.zeros(steps, state))
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    length = torch.export.Dim("steps", min=3, max=1 << 20)
    shapes = ({0: batch}, None, {0: length}, {0: length}, {0: length})
    with torch.no_grad(), quiet():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=list(_INPUTS),
            output_names=["logits", "features"],
            verbose=False,
        )
        assert exported is not None  # only None for the old exporter
        proto = exported.model_proto
    _store(proto, types.storage)
    onnx.save(proto, payload / MODEL)


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
    """Number of stored floating-point weights per type, read back from the built file."""
    counts: dict[torch.dtype, int] = {}
    for tensor in onnx.load(payload / MODEL).graph.initializer:
        for name, kind in _ONNX_TYPES.items():
            if tensor.data_type == kind:
                dtype = TORCH_TYPES[name]
                counts[dtype] = counts.get(dtype, 0) + int(np.prod(tensor.dims))
    return counts

"""ONNX for ONNX Runtime: the encoder, and the loop as one `Scan` with the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxscript import values
from torch import Tensor, nn

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Matrix, Refine, ScanLoop
from marnet_export.lower import Lowered
from marnet_sdk.backends.onnxruntime import ENCODER, REFINE, TEXT

STORAGE = ("fp32", "bf16", "fp16")
COMPUTE = ("fp32",)
_ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}


def build_encoder(lowered: Lowered, pixels: Tensor, types: Types, payload: Path) -> None:
    """Write payload/encoder.onnx. `pixels` [B, 3, H, W] is the example that is traced, B >= 2."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},)
    _export(lowered.encoder, (pixels,), shapes, ["pixels"], ["x_v"], types, payload / ENCODER)


def build_text(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/text.onnx."""
    assert lowered.text is not None
    ids = torch.ones(2, 5, dtype=torch.int64)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    inputs, outputs = ["ids", "mask"], ["x_s"]
    _export(lowered.text, (ids, ids), shapes, inputs, outputs, types, payload / TEXT)


def build_refine(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/refine.onnx.

    With storage "int8", the factors of the loop's products are stored and multiplied in int8, and
    everything else is float32.
    """
    step = lowered.step(torch.float32)
    if types.storage == "int8":
        for name in ("hidden2", "hidden3", "carry"):
            setattr(step, name, _Int8Matrix(getattr(step, name)))
    module = Refine(ScanLoop(step), lowered.head).eval()
    # No size of the example is kept but the widths; each is different, so that none is mistaken.
    x_v = torch.zeros(2, lowered.image_width)
    tables = (torch.zeros(4, 3), torch.zeros(4, 2, 5, lowered.row_width))
    batch, length, samples = (
        torch.export.Dim(name, min=least, max=1 << 20)
        for name, least in (("batch", 1), ("steps", 3), ("samples", 1))
    )
    shapes = ({0: batch}, {0: length}, {0: length, 1: batch, 2: samples})
    inputs, outputs = ["x_v", "coefficients", "bias"], ["logits", "features"]
    _export(module, (x_v, *tables), shapes, inputs, outputs, types, payload / REFINE)


_BLOCK = 128  # inputs of an int8 product that share a scale


def _matmul_nbits() -> values.Op:
    """ONNX Runtime's own operator, which onnx has no description of."""
    Schema = onnx.defs.OpSchema
    settings = ("K", "N", "bits", "block_size", "accuracy_level")
    schema = Schema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[
            Schema.FormalParameter(name, kind)
            for name, kind in (("A", "T1"), ("B", "T2"), ("scales", "T1"))
        ],
        outputs=[Schema.FormalParameter("Y", "T1")],
        type_constraints=[("T1", ["tensor(float)"], ""), ("T2", ["tensor(uint8)"], "")],
        attributes=[Schema.Attribute(name, Schema.AttrType.INT) for name in settings],
    )
    domain = values.Opset("com.microsoft", 1)
    return values.Op(domain, "MatMulNBits", schema)


_MATMUL_NBITS = _matmul_nbits()


@torch.library.custom_op("marnet::matmul_int8", mutates_args=())
def _matmul_int8(x: Tensor, stored: Tensor, scale: Tensor, columns: int) -> Tensor:
    """x [..., I], stored uint8 [O, blocks, 128] with zero point 128, scale [O, blocks] -> [..., O]

    It becomes `MatMulNBits`, in which each row of x is quantised in the same blocks.
    (`DynamicQuantizeMatMul` is faster for large batches, but has one scale for the activations of a
    whole batch, so that an answer would depend on the other images.)
    """
    weight = ((stored.float() - 128) * scale[:, :, None]).flatten(1)[:, :columns]
    return x @ weight.T


@_matmul_int8.register_fake
def _(x: Tensor, stored: Tensor, scale: Tensor, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], stored.shape[0]))


def _as_onnx(x: Any, stored: Any, scale: Any, columns: int) -> Any:
    return _MATMUL_NBITS(
        *(x, stored, scale),
        K=columns,
        N=stored.shape[0],
        bits=8,
        block_size=_BLOCK,
        accuracy_level=4,  # multiplies in int8
    )


class _Int8Matrix(nn.Module):
    """A linear layer with weights in int8."""

    def __init__(self, layer: Matrix) -> None:
        super().__init__()
        rows, self.columns = layer.matrix.shape
        blocks = -(-self.columns // _BLOCK)
        weight = F.pad(layer.matrix.detach(), (0, blocks * _BLOCK - self.columns))
        weight = weight.reshape(rows, blocks, _BLOCK)
        scale = weight.abs().amax(dim=2).clamp(min=1e-30) / 127
        stored = (weight / scale[:, :, None]).round() + 128
        self.stored = nn.Parameter(stored.to(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _matmul_int8(x, self.stored, self.scale, self.columns)
        return y if self.bias is None else y + self.bias


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
            program,
            (),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
            custom_translation_table={torch.ops.marnet.matmul_int8.default: _as_onnx},
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
    if storage not in ("bf16", "fp16"):
        return
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, stored = tensor.name, f"{tensor.name}.{storage}"
        rounded = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(TORCH_TYPES[storage])
        dims = list(tensor.dims)
        bits = rounded.view(torch.int16).numpy().astype("<i2")
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

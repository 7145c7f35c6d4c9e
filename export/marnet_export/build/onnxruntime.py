"""ONNX for ONNX Runtime: the encoder, and the loop as one `Scan` with the head.

In int8, the graphs hold int8 weights and pairs of QuantizeLinear and DequantizeLinear, which are
plain ONNX; the runtime fuses them with the products between them. The encoder is quantised by ONNX
Runtime's own tools. Float: attention, normalisation, softmax, residual sums of transformers, the
loop's state, the projection of the condition and the last estimate (once per image each), and the
head. The encoder's first convolution is int8 too: float, it makes the runtime turn the image around
twice, which costs a small ResNet all that int8 gains.
"""

from __future__ import annotations

import json
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from marnet_export.build.builder import USUAL, Builder, HeadAlone, Order
from marnet_export.build.onnx_graph import (
    ONNX_TYPES,
    bodies,
    quantise,
    silent_root_logger,
    store,
    to_onnx,
)
from marnet_export.build.quantise import (
    LEVELS,
    Range,
    corrected,
    loop_ranges,
    quantised_rows,
    require_calibration,
)
from marnet_export.build.tracing import (
    encoder_signature,
    head_signature,
    quiet,
    refine_signature,
    text_signature,
    tracing,
)
from marnet_export.build.types import Calibration, Product, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Matrix, Refine, ScanLoop
from marnet_sdk.backends.onnxruntime import (
    ENCODER,
    HEAD,
    REFINE,
    TEXT,
    load_onnxruntime,
    session_options,
)
from marnet_sdk.noise.tables import Floats


def build_encoder(
    lowered: Lowered, pixels: Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.onnx."""
    calibrated, encoder = require_calibration(order.calibration, types), lowered.encoder
    if calibrated is not None:
        encoder = corrected(encoder, calibrated.pixels, kept=calibrated.kept)
    with tracing():
        exported = torch.onnx.export(**to_onnx(encoder, encoder_signature(pixels)))
        _save(exported, types, payload / ENCODER)
    if calibrated is not None:
        _quantise_encoder(payload / ENCODER, encoder, calibrated)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.onnx."""
    assert lowered.text is not None
    free = torch.export.Dim.AUTO  # the encoder has positions for so many tokens and no more
    shapes = ({0: free, 1: free}, {0: free, 1: free})
    with tracing():
        exported = torch.onnx.export(**to_onnx(lowered.text, text_signature(), shapes))
        _save(exported, types, payload / TEXT)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.onnx."""
    calibrated = require_calibration(order.calibration, types)
    step = lowered.step(torch.float32)
    if calibrated is not None:
        for name, values in loop_ranges(lowered, calibrated).items():
            step.set_submodule(name, _Int8Matrix(step.get_submodule(name), values))
    module = Refine(ScanLoop(step), lowered.head).eval()
    with tracing():
        traced = to_onnx(module, refine_signature(lowered))
        own = {torch.ops.marnet.matmul_int8.default: _as_onnx}
        exported = torch.onnx.export(**traced, custom_translation_table=own)
        _save(exported, types, payload / REFINE)


def build_head(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/head.onnx, for behind the native loop."""
    with tracing():
        exported = torch.onnx.export(**to_onnx(lowered.head, head_signature(lowered)))
        _save(exported, types, payload / HEAD)


def _quantise_encoder(path: Path, encoder: nn.Module, calibration: Calibration) -> None:
    """Replace a float32 graph by its int8 twin.

    What a Clip (ReLU6) cuts off must not count for the range of the convolution before it.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process  # only int8 needs it

    with quiet(), silent_root_logger(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        proto = quantise(
            *(onnx.load(prepared), encoder, calibration),
            kinds=["Conv", "MatMul", "Gemm", "Relu", "Clip", "MaxPool"],
            activations="QUInt8",
            ActivationSymmetric=False,
            OpTypesToExcludeOutputQuantization=["MatMul", "Gemm"],
        )
        onnx.save(proto, path)


@torch.library.custom_op("marnet::matmul_int8", mutates_args=())
def _matmul_int8(x: Tensor, stored: Tensor, scale: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Multiply x [..., I], on steps of its range, with stored int8 [I, O] of scale [O]; returns
    [..., O].
    """
    on_steps = (torch.round(x / step) + zero).clamp(0, LEVELS - 1) - zero
    return (on_steps * step) @ (stored.float() * scale)


@_matmul_int8.register_fake
def _(x: Tensor, stored: Tensor, scale: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], stored.shape[1]))


def _as_onnx(x: Any, stored: Any, scale: Any, step: Any, zero: Any) -> Any:
    op: Any = onnxscript.opset20
    quantised = op.QuantizeLinear(x, step, zero)
    weight = op.DequantizeLinear(stored, scale, axis=1)
    return op.MatMul(op.DequantizeLinear(quantised, step, zero), weight)


class _Int8Matrix(nn.Module):
    """A linear layer with weights and activations in int8."""

    def __init__(self, layer: nn.Module, values: Range) -> None:
        super().__init__()
        assert isinstance(layer, Matrix)

        def parameter(array: Any) -> nn.Parameter:
            return nn.Parameter(torch.from_numpy(np.array(array)), requires_grad=False)

        stored, scale = quantised_rows(layer.matrix.detach().numpy())
        self.stored, self.scale = parameter(np.ascontiguousarray(stored.T)), parameter(scale[:, 0])
        self.step = parameter(np.float32(values.scale))
        self.zero = parameter(np.uint8(values.zero_point))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _matmul_int8(x, self.stored, self.scale, self.step, self.zero)
        return y if self.bias is None else y + self.bias


def _save(exported: Any, types: Types, path: Path) -> None:
    """Write a graph that is exported; its matrices are stored in another type if one is asked."""
    proto = exported.model_proto
    _let_noise_broadcast(proto)
    for node in (node for body in _parts(proto.graph)[1:] for node in body.node):
        node.name = f"step {node.name}"  # names also tell products of a step from others
    _store(proto, types.storage)
    onnx.save(proto, path)


def _let_noise_broadcast(proto: onnx.ModelProto) -> None:
    """Allow one row of noise for a whole batch, beside a row for each image.

    The exporter can only be told that `bias` has as many rows as there are images. ONNX broadcasts
    a single one as well, if no shape in the graph claims otherwise: the runtime infers them.
    """
    for value in proto.graph.input:
        if value.name == "bias":
            value.type.tensor_type.shape.dim[1].dim_param = "noise_rows"
    for part in _parts(proto.graph):
        del part.value_info[:]
    inside = _parts(proto.graph)[1:]
    for value in (value for body in inside for value in (*body.input, *body.output)):
        value.type.tensor_type.ClearField("shape")


def _parts(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph, and the body of every `Scan` in it."""
    return [graph, *(body for node in graph.node for body in bodies(node))]


def _store(proto: onnx.ModelProto, storage: str) -> None:
    """Store every float32 matrix in another type, cast back when the model is loaded.

    The runtime folds a cast of a constant once, at load, so the graph computes as before.
    """
    if storage not in ("bf16", "fp16"):
        return
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            name, tensor.name = tensor.name, f"{tensor.name}.{storage}"
            store(tensor, storage)
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


# The receipt

_INT8 = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger"}
_FLOAT = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
# Sizes of inputs: a step in the loop, one behind it.
_ONE = {"pixels": (1,), "x_v": (1,), "coefficients": (2, 3), "bias": (2, 1, 1), "x_cdr": (1, 1)}
_NAMES: dict[int, str] = {
    **{kind: name for name, kind in ONNX_TYPES.items()},
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """List what one call executes, by the runtime's profile; storage is read from the files."""
    return [*_executed(payload / ENCODER, "encoder"), *_executed(payload / REFINE, "head")]


def head_products(payload: Path, types: Types) -> list[Product]:
    """List the products of head.onnx, which runs behind the native loop."""
    return _executed(payload / HEAD, "head")


def _zeros(graph: onnx.GraphProto) -> dict[str, Floats]:
    """Inputs of a graph, for one image and one sample."""
    widths = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    return {
        name: np.zeros((*_ONE[name], *sizes[len(_ONE[name]) :]), np.float32)
        for name, sizes in widths.items()
    }


def _executed(path: Path, part: str) -> list[Product]:
    """The products of one call; those inside a `Scan` are the loop's, the others of a part.

    Without the change of layout that the runtime makes last, behind which weights have new names;
    it changes no type.
    """
    ort, file = load_onnxruntime(), onnx.load(path).graph
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(None)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        session.run(None, _zeros(file))
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    nodes = {node.name: (part, node) for node in graph.node}
    nodes |= {inside.name: ("loop", inside) for body in _parts(graph)[1:] for inside in body.node}
    sizes = {t.name: list(t.dims) for body in _parts(graph) for t in body.initializer}
    # Of what the runtime has made anew at load, its own; of everything else, the file's.
    types = _stored_types(graph) | _stored_types(file)
    found: dict[str, Product] = {}
    for event in events:
        name, about = event["name"].removesuffix("_kernel_time"), event.get("args", {})
        if name == event["name"] or about.get("op_name") not in _INT8 | _FLOAT:
            continue
        where, node = nodes[name]
        kind, factor = node.op_type, node.input[3 if node.op_type.startswith("Q") else 1]
        # Inputs are listed without those that the runtime has packed.
        ((came, first),) = about["input_type_shape"][0].items()
        (output,) = about["output_type_shape"][0].values()
        if factor not in sizes:
            multiply_adds = prod(output) * prod(first) // prod(output[:-1])
        elif "Conv" in kind:  # [O, I, height, width]
            multiply_adds = prod(output) * prod(sizes[factor][1:])
        else:  # [I, O] or [O, I]
            multiply_adds = prod(output[:-1]) * prod(sizes[factor])
        storage = types[factor] if factor in sizes else "activation"
        compute = "int8" if kind in _INT8 else {"float": "fp32", "float16": "fp16"}[came]
        found[name] = Product(where, name, multiply_adds, storage, compute)
    return list(found.values())


def _stored_types(graph: onnx.GraphProto) -> dict[str, str]:
    """Map everything that is made of stored values alone to the type that it is stored in."""
    largest = {
        tensor.name: (prod(tensor.dims), _NAMES.get(tensor.data_type, "other"))
        for part in _parts(graph)
        for tensor in part.initializer
    }
    for node in [node for part in _parts(graph) for node in part.node]:
        if node.input and all(name in largest for name in node.input):
            made = max(largest[name] for name in node.input)
            largest |= dict.fromkeys(node.output, made)
    return {name: kind for name, (_, kind) in largest.items()}


BUILDER = Builder(
    name="onnxruntime",
    storage=("fp32", "bf16", "fp16", "int8"),
    compute=("fp32",),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=("onnxruntime",),
    head=HeadAlone(build_head, head_products),
)

"""OpenVINO: the encoder converted, and the loop as a `TensorIterator` with the head.

In int8, NNCF quantises the encoder, and the loop is written with int8 weights and quantised
activations; the runtime fuses both into products of int8. In the type of `compute` stay the scores
of attention times its values, the projection of the condition and the last estimate (once per image
each), and the head; in float32 normalisation, residual sums and the loop's state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marnet_export.build.builder import USUAL, Builder, HeadAlone, Order
from marnet_export.build.openvino.loop import (
    PlanLoop,
    StepLoop,
    convert,
    inlined,
    keep_float32,
    parameter,
    refined,
)
from marnet_export.build.openvino.receipt import PRODUCTS, head_products, products
from marnet_export.build.quantise import corrected, kept_nodes, loop_ranges, require_calibration
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    head_signature,
    quiet,
    refine_signature,
    text_signature,
)
from marnet_export.build.types import TORCH_TYPES, Calibration, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.backends.openvino import (
    ENCODER,
    FIRST_ORDER,
    HEAD,
    OUTPUTS,
    REFINE,
    TEXT,
    hidden,
    load_openvino,
)
from marnet_sdk.cpus import int8_sums_overflow
from marnet_sdk.errors import ExportError, requires_extra

ov = load_openvino()
op = ov.opset15


def build_encoder(
    lowered: Lowered, pixels: torch.Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.xml and .bin; int8 needs NNCF."""
    calibrated, encoder = require_calibration(order.calibration, types), lowered.encoder
    if calibrated is not None:  # SmoothQuant rescales the weights of linear layers
        encoder = corrected(encoder, calibrated.pixels, kept=calibrated.kept, kinds=torch.nn.Conv2d)
    signature = encoder_signature(pixels)
    graph = _converted(encoder, signature)
    if calibrated is not None:
        graph = _quantise_encoder(graph, encoder, calibrated)
    _save(_with_float32_norms(graph), signature, types, payload / ENCODER)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.xml and .bin."""
    assert lowered.text is not None
    signature = text_signature()
    graph = _with_float32_norms(_converted(lowered.text, signature))
    _save(graph, signature, types, payload / TEXT)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.xml and .bin."""
    calibrated = require_calibration(order.calibration, types)
    if isinstance(lowered.plan, SamplingPlan):
        ranges = {} if calibrated is None else loop_ranges(lowered, calibrated)
        loop = PlanLoop(lowered.plan, ranges, bits=7 if int8_sums_overflow() else 8)
    elif calibrated is None:
        loop = StepLoop(lowered)
    else:
        raise ExportError(
            "openvino has int8 for the loop of MARNet only; use --loop-precision fp16"
        )
    signature = refine_signature(lowered)
    inputs = _parameters(signature)
    x_cdr = refined(loop, *inputs)
    outputs = [output for estimate in x_cdr for output in _head(lowered, inputs[0], estimate)]
    signature = replace(signature, outputs=(*OUTPUTS, *FIRST_ORDER))
    _save(ov.Model(outputs, inputs, "refine"), signature, types, payload / REFINE)


def build_head(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/head.xml and .bin, for behind the native loop."""
    signature = head_signature(lowered)
    inputs = _parameters(signature)
    _save(ov.Model(_head(lowered, *inputs), inputs, "head"), signature, types, payload / HEAD)


def _quantise_encoder(graph: Any, encoder: torch.nn.Module, calibration: Calibration) -> Any:
    """Quantise the products of a graph to int8.

    NNCF's mode for transformers keeps residual sums float and spreads outlying channels over
    activations and weights (SmoothQuant); on ResNets it is more accurate too. Some settings are not
    its defaults, for what trained ResNets showed: ranges are the least and the largest value of all
    images, not means over images (up to 3 times the error), and biases stay as they are, since ours
    are corrected already (NNCF's way made up to 5 times the error on ResNets).
    """
    factors = {
        node.get_friendly_name(): node.input_value(1).get_node().data
        for node in graph.get_ordered_ops()
        if node.get_type_name() in PRODUCTS
        and node.input_value(1).get_node().get_type_name() == "Constant"
    }
    kept = kept_nodes(factors, encoder, calibration.kept)
    with quiet():
        nncf = _load_nncf()
    with quiet("nncf"):
        ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
        fix = nncf.OverflowFix
        settings = nncf.AdvancedQuantizationParameters(
            # The default is 7 bits for the first layer alone.
            overflow_fix=fix.ENABLE if int8_sums_overflow() else fix.DISABLE,
            disable_bias_correction=True,
            activations_range_estimator_params=ranges,
        )
        return nncf.quantize(
            graph,
            nncf.Dataset([image[None] for image in calibration.pixels]),
            subset_size=len(calibration.pixels),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=kept),
            advanced_parameters=settings,
        )


def _load_nncf() -> Any:
    """NNCF, imported without telemetry."""
    kind = logging.getLoggerClass()
    try:
        with requires_extra("export", "nncf"), hidden("openvino_telemetry"):
            import nncf
            import nncf.quantization.range_estimator
    finally:
        logging.setLoggerClass(kind)  # NNCF puts its own in place for the whole process
    return nncf


def _parameters(signature: Signature) -> list[Any]:
    return [parameter(shape) for shape in _shapes(signature)]


def _shapes(signature: Signature) -> list[list[int]]:
    """The shape of every input; -1 stands for a free size."""
    return [
        [size if isinstance(size, int) else -1 for size in sizes]
        for _, sizes in signature.inputs.values()
    ]


def _with_float32_norms(graph: Any) -> Any:
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MVN":  # layer normalisation
            keep_float32(node)
    return graph


def _head(lowered: Lowered, x_v: Any, x_cdr: Any) -> list[Any]:
    """Logits [B, K, C] and fused features [B, K, D_f] of x_v [B, D_v] and x_CDR [B, K, D]."""
    return inlined(lowered.head, head_signature(lowered).example, (x_v, x_cdr))


def _converted(module: torch.nn.Module, signature: Signature) -> Any:
    graph = convert(module, *signature.example)
    graph.reshape(dict(zip(graph.inputs, _shapes(signature), strict=True)))
    return graph


def _save(graph: Any, signature: Signature, types: Types, path: Path) -> None:
    names = (*signature.inputs, *signature.outputs)
    for port, name in zip((*graph.inputs, *graph.outputs), names, strict=True):
        port.tensor.set_names({name})
    if types.storage in TORCH_TYPES and types.storage != "fp32":
        _store(graph, TORCH_TYPES[types.storage])
    ov.save_model(graph, path, compress_to_fp16=False)  # that would also take biases


def _store(graph: Any, storage: torch.dtype) -> None:
    """Store every float32 matrix in a type of 16 bits, converted back when it is compiled."""
    types = {torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}
    for node in list(_nodes(graph)):
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        shape = list(node.shape)
        if sum(size > 1 for size in shape) < 2:  # biases may come as [1, 1, O]
            continue
        bits = torch.from_numpy(node.data.copy()).to(storage).view(torch.int16).numpy()
        stored = op.constant(ov.Tensor(bits, shape, types[storage]), shared_memory=False)
        readers = node.output(0).get_target_inputs()
        for reader in readers:
            reader.replace_source_output(op.convert(stored, "f32").output(0))


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the bodies of its iterators."""
    for node in graph.get_ordered_ops():
        yield node
        if node.get_type_name() == "TensorIterator":
            yield from _nodes(node.get_function())


BUILDER = Builder(
    name="openvino",
    storage=("fp32", "bf16", "fp16", "int8"),
    compute=("fp32", "bf16"),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=("openvino",),
    head=HeadAlone(build_head, head_products),
)

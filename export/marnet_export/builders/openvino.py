"""OpenVINO: the encoder converted, and the loop as a `TensorIterator` with the head.

Where no step looks back at the estimate before (C = 0 throughout, as in samplers of first order),
an iterator without that term is 2 to 6 % faster. The file holds both, as separate outputs of one
graph that share their weights; the runtime compiles one graph of each. (An `If` inside the graph
would do too, but OpenVINO 2026.4 gives wrong answers with it at the first call of every new shape.)
Axes: B batch, K noise samples, S steps, N rows of noise (1 or B), H hidden, W carried state,
I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.lower import Lowered
from marnet_export.plan import SamplingPlan
from marnet_sdk.backends.openvino import (
    ENCODER,
    FIRST_ORDER,
    OUTPUTS,
    REFINE,
    TEXT,
    load_openvino,
)
from marnet_sdk.errors import ExportError
from marnet_train.models.denoiser import LEAKY_SLOPE

ov = load_openvino()
op = ov.opset15

STORAGE = ("fp32", "bf16", "fp16")
COMPUTE = ("fp32", "bf16")
_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}
_F32 = ov.Type.f32


def build_encoder(lowered: Lowered, pixels: torch.Tensor, types: Types, payload: Path) -> None:
    """Write payload/encoder.xml and .bin. `pixels` [B, 3, H, W] is the example that is traced."""
    graph = _convert(lowered.encoder, pixels)
    graph.reshape([-1, *pixels.shape[1:]])
    _keep_norms_float32(graph)
    _save(graph, ("pixels",), ("x_v",), types.storage, payload / ENCODER)


def build_text(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/text.xml and .bin."""
    assert lowered.text is not None
    ids = torch.ones(2, 5, dtype=torch.int64)
    graph = _convert(lowered.text, ids, ids)
    graph.reshape({port: [-1, -1] for port in graph.inputs})
    _keep_norms_float32(graph)
    _save(graph, ("ids", "mask"), ("x_s",), types.storage, payload / TEXT)


def _keep_norms_float32(graph: Any) -> None:
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MVN":  # layer normalisation
            _keep_float32(node)


def build_refine(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/refine.xml and .bin.

    With storage "int8", the factors of the loop's products are stored and multiplied in int8, and
    everything else is float32.
    """
    if not isinstance(lowered.plan, SamplingPlan):
        raise ExportError("openvino builds the loop of MARNet only")
    shapes = (-1, lowered.image_width), (-1, 3), (-1, -1, -1, lowered.row_width)
    x_v, coefficients, bias = map(_parameter, shapes)
    loop = _Loop(lowered.plan, quantise=types.storage == "int8")
    x_cdr = loop.refined(x_v, coefficients, bias)
    outputs = [output for estimate in x_cdr for output in _head(lowered, x_v, estimate)]
    graph = ov.Model(outputs, [x_v, coefficients, bias], "refine")
    inputs = ("x_v", "coefficients", "bias")
    _save(graph, inputs, (*OUTPUTS, *FIRST_ORDER), types.storage, payload / REFINE)


class _Loop:
    """The sampling plan: all steps but the last in an iterator, the last behind it."""

    def __init__(self, plan: SamplingPlan, *, quantise: bool) -> None:
        self.plan, self.quantise = plan, quantise

    def refined(self, x_v: Any, coefficients: Any, bias: Any) -> list[Any]:
        """x_v [B, D_v], coefficients [S, 3], bias [S, N, K, H] -> x_CDR [B, K, D].

        Twice: with the term of the estimate before, and without.
        """
        mean, std = map(_constant, self.plan.standardise)
        condition = _linear(op.divide(op.subtract(x_v, mean), std), self.plan.condition_weight)
        condition = op.unsqueeze(_keep_float32(condition), _integer(1))  # [B, 1, H]
        width = _integer([len(self.plan.carry_weight)])
        start = op.broadcast(_constant(0.0), op.concat([_size(x_v, 0), _size(bias, 2), width], 0))
        last = op.gather(bias, _integer(-1), _integer(0))  # [N, K, H]
        found = []
        for looks_back in (True, False):
            state = self.steps(start, condition, coefficients, bias, looks_back=looks_back)
            found.append(_linear(self.hidden(state, condition, last), *self.plan.output))
        return found

    def steps(
        self, start: Any, condition: Any, coefficients: Any, bias: Any, *, looks_back: bool
    ) -> Any:
        """All steps but the last: start [B, K, W], condition [B, 1, H] -> state [B, K, W]."""
        state, previous = (_parameter(start.output(0).partial_shape) for _ in range(2))
        q = _parameter(condition.output(0).partial_shape)
        hidden = len(self.plan.condition_weight)
        row, table = _parameter((1, -1, -1, hidden)), _parameter((1, 3))
        h3 = self.hidden(state, q, op.squeeze(row, _integer(0)))
        gained = _linear(h3, self.plan.carry_weight, quantise=self.quantise)
        columns = op.split(table, _integer(1), 3)
        a, b, c = (op.squeeze(columns.output(i), _integer([0, 1])) for i in range(3))
        following = op.add(op.multiply(state, a), op.multiply(gained, b))
        carried = [(state, following)]
        if looks_back:
            following = op.add(following, op.multiply(previous, c))
            carried = [(state, following), (previous, gained)]
        loop = op.tensor_iterator()
        parameters = [q, row, table, *(inside for inside, _ in carried)]
        loop.set_body(ov.Model([result for _, result in carried], parameters, "step"))
        for inside, result in carried:
            loop.set_merged_input(inside, start.output(0), result.output(0))
        loop.set_invariant_input(q, condition.output(0))
        for inside, whole in ((row, bias), (table, coefficients)):
            loop.set_sliced_input(inside, whole.output(0), 0, 1, 1, -2, 0)  # up to the last but one
        return loop.get_iter_value(following.output(0), -1)

    def hidden(self, state: Any, condition: Any, bias: Any) -> Any:
        """h3 of one step. state [B, K, W], condition [B, 1, H], bias [N, K, H] -> [B, K, H]"""
        plan, quantise = self.plan, self.quantise
        into = state
        if plan.carry == "feature":
            into = _linear(state, plan.input_weight, quantise=quantise)
        y = _keep_float32(op.add(_keep_float32(op.add(into, condition)), bias))
        h = _leaky(_linear(_leaky(y), *plan.hidden2, quantise=quantise))
        return _leaky(_linear(h, *plan.hidden3, quantise=quantise))


def _linear(x: Any, weight: NDArray, bias: NDArray | None = None, *, quantise: bool = False) -> Any:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    y = op.matmul(x, _quantised(weight) if quantise else _constant(weight), False, True)
    return y if bias is None else op.add(y, _constant(bias))


def _quantised(weight: NDArray) -> Any:
    """A weight [O, I] as int8 with a scale for each row."""
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest) / 127
    stored = op.constant(np.round(weight / scale).astype(np.int8))
    return op.multiply(op.convert(stored, "f32"), _constant(scale))


def _leaky(x: Any) -> Any:
    return op.prelu(x, _constant([LEAKY_SLOPE]))


def _constant(values: ArrayLike) -> Any:
    return op.constant(np.array(values, np.float32))


def _integer(values: ArrayLike) -> Any:
    return op.constant(np.array(values, np.int64))


def _size(x: Any, axis: int) -> Any:
    """One entry of a shape, [1]."""
    return op.gather(op.shape_of(x), _integer([axis]), _integer(0))


def _parameter(shape: Any) -> Any:
    return op.parameter(ov.PartialShape(shape), _F32)


def _keep_float32(node: Any) -> Any:
    """Mark a node that computes in float32 even where the graph is compiled for bfloat16.

    OpenVINO leaves the loop's update and a transformer's residual sums in float32 by itself.
    """
    node.get_rt_info()["precise_0"] = ""  # becomes DisablePrecisionConversion in the file
    return node


def _head(lowered: Lowered, x_v: Any, x_cdr: Any) -> list[Any]:
    """logits [B, K, C] and fused features [B, K, D_f] from x_v [B, D_v] and x_CDR [B, K, D]."""
    example = torch.zeros(2, lowered.image_width), torch.zeros(2, 3, lowered.latent_width)
    graph = _convert(lowered.head, *example)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Log":
            _make_log_sigmoid_finite(node)
    for parameter, value in zip(graph.get_parameters(), (x_v, x_cdr), strict=True):
        parameter.output(0).replace(value.output(0))
    return [result.input_value(0) for result in graph.get_results()]


def _make_log_sigmoid_finite(log: Any) -> None:
    """Replace the converter's log(sigmoid(x)), which underflows, by -softplus(-x)."""
    sigmoid = log.input_value(0).get_node()
    if sigmoid.get_type_name() == "Sigmoid":
        softplus = op.softplus(op.negative(sigmoid.input_value(0)))
        log.output(0).replace(op.negative(softplus).output(0))


def _convert(module: torch.nn.Module, *example: torch.Tensor) -> Any:
    with torch.no_grad(), quiet():
        # Shared weights would be gone with the module, though nodes of the graph live on in ours.
        return ov.convert_model(module, example_input=example, share_weights=False)


def _save(
    graph: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], storage: str, path: Path
) -> None:
    names = zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True)
    for port, name in names:
        port.tensor.set_names({name})
    if storage in TORCH_TYPES and storage != "fp32":
        _store(graph, TORCH_TYPES[storage])
    ov.save_model(graph, path, compress_to_fp16=False)  # that would also take biases


def _store(graph: Any, storage: torch.dtype) -> None:
    """Store every float32 matrix in a type of 16 bits, converted back when it is compiled."""
    types = {torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}
    for node in list(_nodes(graph)):
        if node.get_type_name() != "Constant" or node.get_element_type() != _F32:
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


def stored_elements(payload: Path) -> dict[torch.dtype, int]:
    """Number of stored weights per type, read back from the built files."""
    counts: dict[torch.dtype, int] = {}
    for name in (ENCODER, REFINE):
        # Two constants of the same content are one place in the file.
        places = {
            (data.get("offset"), data.get("size")): data
            for data in ElementTree.parse(payload / name).iter("data")
            if data.get("offset") is not None
        }
        for data in places.values():
            if dtype := _STORED.get(data.get("element_type", "")):
                size = int(data.get("size", 0)) // dtype.itemsize
                counts[dtype] = counts.get(dtype, 0) + size
    return counts

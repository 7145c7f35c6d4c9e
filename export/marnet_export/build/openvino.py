"""OpenVINO: the encoder converted, and the loop as a `TensorIterator` with the head.

In int8, NNCF quantises the encoder, and the loop is written with int8 weights and quantised
activations; the runtime fuses both into products of int8. In the type of `compute` stay the scores
of attention times its values, the projection of the condition and the last estimate (once per image
each), and the head; in float32 normalisation, residual sums and the loop's state.

Where no step looks back at the estimate before (C = 0 throughout, as in samplers of first order),
an iterator without that term is 2 to 6 % faster. The file holds both, as separate outputs of one
graph that share their weights; the runtime compiles one graph of each. (An `If` inside the graph
would do too, but OpenVINO 2026.4 gives wrong answers with it at the first call of every new shape.)
Axes: B batch, K noise samples, S steps, N rows of noise (1 or B), H hidden, W carried state,
I inputs and O outputs of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from marnet_export.build.builder import USUAL, Builder, HeadAlone, Order
from marnet_export.build.quantise import (
    LEVELS,
    Range,
    corrected,
    kept_nodes,
    loop_ranges,
    quantised_rows,
    require_calibration,
)
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    head_signature,
    quiet,
    refine_signature,
    text_signature,
    tracing,
)
from marnet_export.build.types import TORCH_TYPES, Calibration, Product, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.backends.openvino import (
    ENCODER,
    FIRST_ORDER,
    HEAD,
    OUTPUTS,
    REFINE,
    TEXT,
    compile_settings,
    hidden,
    load_openvino,
)
from marnet_sdk.errors import ExportError, requires_extra
from marnet_train.models.denoiser import LEAKY_SLOPE

ov = load_openvino()
op = ov.opset15

_F32 = ov.Type.f32


def build_encoder(
    lowered: Lowered, pixels: torch.Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.xml and .bin. `pixels` [B, 3, H, W] is the example that is traced.

    Raises:
        ExportError: int8 without calibration. MissingExtra: int8 without NNCF.
    """
    calibrated, encoder = require_calibration(order.calibration, types), lowered.encoder
    if calibrated is not None:  # SmoothQuant rescales the weights of linear layers
        encoder = corrected(encoder, calibrated.pixels, kept=calibrated.kept, kinds=torch.nn.Conv2d)
    signature = encoder_signature(pixels)
    graph = _reshaped(_convert(encoder, pixels), signature)
    if calibrated is not None:
        graph = _quantise_encoder(graph, encoder, calibrated)
    _keep_norms_float32(graph)
    _save(graph, signature, types, payload / ENCODER)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.xml and .bin."""
    assert lowered.text is not None
    signature = text_signature()
    graph = _reshaped(_convert(lowered.text, *signature.example), signature)
    _keep_norms_float32(graph)
    _save(graph, signature, types, payload / TEXT)


def _keep_norms_float32(graph: Any) -> None:
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MVN":  # layer normalisation
            _keep_float32(node)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.xml and .bin.

    Raises:
        ExportError: int8 without calibration, or for a loop that is not MARNet's.
    """
    calibrated = require_calibration(order.calibration, types)
    if isinstance(lowered.plan, SamplingPlan):
        ranges = {} if calibrated is None else loop_ranges(lowered, calibrated)
        loop = _PlanLoop(lowered.plan, ranges)
    elif calibrated is None:
        loop = _StepLoop(lowered)
    else:
        raise ExportError(
            "openvino has int8 for the loop of MARNet only; use --loop-precision fp16"
        )
    signature = refine_signature(lowered)
    inputs = _parameters(signature)
    x_cdr = _refined(loop, *inputs)
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
        if node.get_type_name() in _PRODUCTS
        and node.input_value(1).get_node().get_type_name() == "Constant"
    }
    kept = kept_nodes(factors, encoder, calibration.kept)
    with quiet(), _silent_nncf() as nncf:
        ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
        settings = nncf.AdvancedQuantizationParameters(
            # Else the first layer has weights of 7 bits, for CPUs whose sums of int8 overflow.
            overflow_fix=nncf.OverflowFix.DISABLE,
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


@contextmanager
def _silent_nncf() -> Iterator[Any]:
    """NNCF, imported without telemetry, whose notes no user can act on.

    Raises:
        MissingExtra: it is not installed.
    """
    kind = logging.getLoggerClass()
    try:
        with requires_extra("export", "nncf"), hidden("openvino_telemetry"):
            import nncf
            import nncf.quantization.range_estimator
    finally:
        logging.setLoggerClass(kind)  # NNCF puts its own in place for the whole process
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield nncf
    finally:
        logger.setLevel(level)


def _refined(loop: _PlanLoop | _StepLoop, x_v: Any, coefficients: Any, bias: Any) -> list[Any]:
    """Map x_v [B, D_v], coefficients [S, 3] and bias [S, N, K, R] to x_CDR [B, K, D].

    Twice: with the term of the estimate before, and without. All steps but the last are in an
    iterator, the last is behind it.
    """
    condition, width = loop.condition(x_v), _integer([loop.width])
    start = op.broadcast(_constant(0.0), op.concat([_size(x_v, 0), _size(bias, 2), width], 0))
    last = op.gather(bias, _integer(-1), _integer(0))  # [N, K, R]
    found = []
    for looks_back in (True, False):
        state = _steps(loop, start, condition, coefficients, bias, looks_back=looks_back)
        found.append(loop.finish(state, condition, last))
    return found


def _steps(
    method: _PlanLoop | _StepLoop,
    start: Any,
    condition: Any,
    coefficients: Any,
    bias: Any,
    *,
    looks_back: bool,
) -> Any:
    """All steps but the last: start [B, K, W], condition [B, 1, H] -> state [B, K, W]."""
    state, previous = (_parameter(start.output(0).partial_shape) for _ in range(2))
    q = _parameter(condition.output(0).partial_shape)
    row, table = _parameter((1, -1, -1, method.row_width)), _parameter((1, 3))
    gained = method.gain(state, q, op.squeeze(row, _integer(0)))
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


class _PlanLoop:
    """The sampling plan, operator by operator; its methods are as in `Step`."""

    def __init__(self, plan: SamplingPlan, ranges: Mapping[str, Range]) -> None:
        """Take the ranges of the inputs of the int8 products, by their names in `PlanStep`."""
        self.plan, self.ranges = plan, ranges
        self.width, self.row_width = len(plan.carry_weight), len(plan.input_weight)

    def condition(self, x_v: Any) -> Any:
        mean, std = map(_constant, self.plan.standardise)
        standard = op.divide(op.subtract(x_v, mean), std)
        q = self.linear("condition", standard, self.plan.condition_weight)
        return op.unsqueeze(_keep_float32(q), _integer(1))  # [B, 1, H]

    def gain(self, state: Any, q: Any, row: Any) -> Any:
        return self.linear("carry", self.hidden(state, q, row), self.plan.carry_weight)

    def finish(self, state: Any, q: Any, row: Any) -> Any:
        return self.linear("output", self.hidden(state, q, row, place="last "), *self.plan.output)

    def hidden(self, state: Any, condition: Any, bias: Any, *, place: str = "") -> Any:
        """Compute h3 [B, K, H] of one step, from state [B, K, W], condition [B, 1, H] and bias [N,
        K, H].

        place: in the graph; begins the names of the products, which must differ.
        """
        into = state
        if self.plan.carry == "feature":
            into = self.linear("input", state, self.plan.input_weight, place=place)
        y = _keep_float32(op.add(_keep_float32(op.add(into, condition)), bias))
        h = _leaky(self.linear("hidden2", _leaky(y), *self.plan.hidden2, place=place))
        return _leaky(self.linear("hidden3", h, *self.plan.hidden3, place=place))

    def linear(
        self, name: str, x: Any, weight: NDArray, bias: NDArray | None = None, *, place: str = ""
    ) -> Any:
        """Map x [..., I] with weight [O, I] and bias [O] to [..., O]."""
        if name in self.ranges:
            x, factor = _on_steps(x, self.ranges[name]), _quantised(weight)
        else:
            factor = _constant(weight)
        y = op.matmul(x, factor, False, True)
        y.set_friendly_name(place + name)
        return y if bias is None else op.add(y, _constant(bias))


def _quantised(weight: NDArray) -> Any:
    """A weight [O, I] as int8 with a scale for each row."""
    stored, scale = quantised_rows(weight)
    return op.multiply(op.convert(op.constant(stored), "f32"), _constant(scale))


class _StepLoop:
    """The step of any method, as OpenVINO converts it."""

    def __init__(self, lowered: Lowered) -> None:
        self.step = lowered.step(torch.float32)
        self.width, self.row_width = self.step.width, lowered.row_width
        self.x_v = torch.zeros(2, lowered.image_width)
        rows = torch.zeros(2, 3, self.width), torch.zeros(2, 3, self.row_width)
        self.examples = rows[0], self.step.condition(self.x_v), rows[1]

    def condition(self, x_v: Any) -> Any:
        return _keep_float32(self.call("condition", (self.x_v,), (x_v,)))

    def gain(self, state: Any, q: Any, row: Any) -> Any:
        return self.call("gain", self.examples, (state, q, row))

    def finish(self, state: Any, q: Any, row: Any) -> Any:
        return self.call("finish", self.examples, (state, q, row))

    def call(self, name: str, examples: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Any:
        """The node that computes what a method of the step does."""
        module = torch.nn.Module()
        module.step = self.step  # so that its weights are found
        module.forward = getattr(self.step, name)
        return _inlined(module, examples, inputs)[0].get_node()


def _inlined(
    module: torch.nn.Module, examples: Sequence[torch.Tensor], inputs: Sequence[Any]
) -> list[Any]:
    """The ports at which a graph computes a module's outputs from its own nodes."""
    graph = _convert(module, *examples)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Log":
            _make_log_sigmoid_finite(node)
    for parameter, value in zip(graph.get_parameters(), inputs, strict=True):
        # An iterator's value is a port already.
        parameter.output(0).replace(value.output(0) if isinstance(value, ov.Node) else value)
    return [result.input_value(0) for result in graph.get_results()]


def _on_steps(x: Any, values: Range) -> Any:
    """Put x on the steps of its range, which the runtime turns into uint8."""
    low, high = map(_constant, values.ends)
    return op.fake_quantize(x, low, high, low, high, LEVELS)


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


def _parameters(signature: Signature) -> list[Any]:
    return [_parameter(shape) for shape in _shapes(signature)]


def _reshaped(graph: Any, signature: Signature) -> Any:
    graph.reshape(dict(zip(graph.inputs, _shapes(signature), strict=True)))
    return graph


def _shapes(signature: Signature) -> list[list[int]]:
    """The shape of every input; -1 stands for a free size."""
    return [
        [size if isinstance(size, int) else -1 for size in sizes]
        for _, sizes in signature.inputs.values()
    ]


def _keep_float32(node: Any) -> Any:
    """Mark a node that computes in float32 even where the graph is compiled for bfloat16.

    OpenVINO leaves the loop's update and a transformer's residual sums in float32 by itself.
    """
    node.get_rt_info()["precise_0"] = ""  # becomes DisablePrecisionConversion in the file
    return node


def _head(lowered: Lowered, x_v: Any, x_cdr: Any) -> list[Any]:
    """Compute logits [B, K, C] and fused features [B, K, D_f] from x_v [B, D_v] and x_CDR
    [B, K, D].
    """
    return _inlined(lowered.head, head_signature(lowered).example, (x_v, x_cdr))


def _make_log_sigmoid_finite(log: Any) -> None:
    """Replace the converter's log(sigmoid(x)), which underflows, by -softplus(-x)."""
    sigmoid = log.input_value(0).get_node()
    if sigmoid.get_type_name() == "Sigmoid":
        softplus = op.softplus(op.negative(sigmoid.input_value(0)))
        log.output(0).replace(op.negative(softplus).output(0))


def _convert(module: torch.nn.Module, *example: torch.Tensor) -> Any:
    with tracing():
        # Shared weights would be gone with the module, though nodes of the graph live on in ours.
        return ov.convert_model(module, example_input=example, share_weights=False)


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


# The receipt

_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_PRODUCTS = {"MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention"}
_EXECUTED = {"Convolution", "FullyConnected", "MatMul", "Subgraph", "ScaledDotProductAttention"}
# Between a stored matrix and the product that it is a factor of.
_PASSES = {"Convert", "Multiply", "Subtract", "FakeQuantize", "Reshape", "Transpose", "Unsqueeze"}


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """Every matrix product and convolution, as OpenVINO executes it for one image.

    Storage is read from the files, what a product is computed in from the executed graphs of the
    compiled models; a product that is not found there counts as fp32. "loop" is one step: the body
    of the iterator, compiled by itself because the runtime does not show it. "head" is all that
    refine.xml does once per image: the condition, the last step and the head.

    Args:
        shape: of an image, (3, H, W).
    """
    core = ov.Core()
    encoder, refine = (core.read_model(payload / name) for name in (ENCODER, REFINE))
    encoder.reshape([1, *shape])
    results = [refine.output(name).get_node() for name in FIRST_ORDER]
    refine = ov.Model(results, refine.get_parameters(), "refine")
    _for_one_image(refine)
    loop = next(node for node in refine.get_ops() if node.get_type_name() == "TensorIterator")
    parts = {"encoder": encoder, "loop": loop.get_function().clone(), "head": refine}
    return [
        product
        for part, graph in parts.items()
        for product in _products_of(part, graph, _executed(core, graph, types.compute))
    ]


def head_products(payload: Path, types: Types) -> list[Product]:
    """List the products of head.xml, which runs behind the native loop."""
    core = ov.Core()
    graph = core.read_model(payload / HEAD)
    _for_one_image(graph)
    return list(_products_of("head", graph, _executed(core, graph, types.compute)))


def _for_one_image(graph: Any) -> None:
    """Fix the sizes of a graph behind the encoder, for one image and one sample."""
    free = {"x_v": (1,), "coefficients": (2,), "bias": (2, 1, 1), "x_cdr": (1, 1)}
    for port in graph.inputs:
        sizes = free[port.any_name]
        widths = [size.get_length() for size in list(port.partial_shape)[len(sizes) :]]
        port.get_node().set_partial_shape(ov.PartialShape([*sizes, *widths]))
    graph.validate_nodes_and_infer_types()


def _executed(core: Any, graph: Any, compute: str) -> list[Any]:
    """The nodes that run and may be products, in their order."""
    compiled = core.compile_model(graph, "CPU", compile_settings(compute, None))
    nodes = compiled.get_runtime_model().get_ordered_ops()
    return [node for node in nodes if _about(node, "layerType") in _EXECUTED]


def _about(node: Any, key: str) -> str:
    return node.get_rt_info()[key].astype(str)


def _products_of(part: str, graph: Any, executed: Sequence[Any]) -> Iterator[Product]:
    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() in _PRODUCTS]
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
        if (constants := _constants(source.get_node())) is not None:
            largest = max(constants, key=lambda constant: prod(constant.shape))
            return _kind(largest.output(0))
    return "activation"


def _constants(node: Any) -> list[Any] | None:
    """The constants that a value is made of; None where it depends on an input."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in _PASSES:
        return None
    found = [_constants(value.get_node()) for value in node.input_values()]
    if any(constants is None for constants in found):
        return None
    return [constant for constants in found if constants is not None for constant in constants]


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

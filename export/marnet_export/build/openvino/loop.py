"""The reverse loop as a `TensorIterator`, and modules of torch in the middle of a graph.

Where no step looks back at the estimate before (C = 0 throughout, as in samplers of first order),
an iterator without that term is 2 to 6 % faster. The graph holds both, as separate outputs that
share their weights; the runtime compiles one graph of each. (An `If` inside the graph would do too,
but OpenVINO 2026.4 gives wrong answers with it at the first call of every new shape.)
Axes: B batch, K noise samples, S steps, N rows of noise (1 or B), H hidden, W carried state,
I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from marnet_export.build.quantise import LEVELS, Range, quantised_rows
from marnet_export.build.tracing import tracing
from marnet_export.lower.methods import Lowered
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.backends.openvino import load_openvino
from marnet_train.models.denoiser import LEAKY_SLOPE

ov = load_openvino()
op = ov.opset15


def refined(loop: PlanLoop | StepLoop, x_v: Any, coefficients: Any, bias: Any) -> list[Any]:
    """Map x_v [B, D_v], coefficients [S, 3] and bias [S, N, K, R] to x_CDR [B, K, D].

    Twice: with the term of the estimate before, and without. All steps but the last are in an
    iterator, the last is behind it.
    """
    condition, width = loop.condition(x_v), _integer([loop.width])
    zero = op.broadcast(_constant(0.0), op.concat([_size(x_v, 0), _size(bias, 2), width], 0))
    start = keep_float32(op.add(zero, loop.begin(x_v))) if loop.starts else zero
    last = op.gather(bias, _integer(-1), _integer(0))  # [N, K, R]
    found = []
    for looks_back in (True, False):
        state = _steps(loop, start, zero, condition, coefficients, bias, looks_back=looks_back)
        found.append(loop.finish(state, condition, last))
    return found


def _steps(
    method: PlanLoop | StepLoop,
    start: Any,
    zero: Any,
    condition: Any,
    coefficients: Any,
    bias: Any,
    *,
    looks_back: bool,
) -> Any:
    """All steps but the last: start and zero [B, K, W], condition [B, 1, H] -> state [B, K, W]."""
    state, previous = (parameter(start.output(0).partial_shape) for _ in range(2))
    q = parameter(condition.output(0).partial_shape)
    row, table = parameter((1, -1, -1, method.row_width)), parameter((1, 3))
    gained = method.gain(state, q, op.squeeze(row, _integer(0)))
    columns = op.split(table, _integer(1), 3)
    a, b, c = (op.squeeze(columns.output(i), _integer([0, 1])) for i in range(3))
    following = op.add(op.multiply(state, a), op.multiply(gained, b))
    if looks_back:
        following = op.add(following, op.multiply(previous, c))
    if method.fed:
        (kept, _), (_, fed) = (_parted(x, method) for x in (keep_float32(following), gained))
        fed = keep_float32(op.multiply(fed, op.sign(b)))
        following = keep_float32(op.concat([kept, fed.output(0)], -1))
    carried = [(state, following, start)]
    if looks_back:
        carried.append((previous, gained, zero))
    loop = op.tensor_iterator()
    parameters = [q, row, table, *(inside for inside, _, _ in carried)]
    loop.set_body(ov.Model([result for _, result, _ in carried], parameters, "step"))
    for inside, result, first in carried:
        loop.set_merged_input(inside, first.output(0), result.output(0))
    loop.set_invariant_input(q, condition.output(0))
    for inside, whole in ((row, bias), (table, coefficients)):
        loop.set_sliced_input(inside, whole.output(0), 0, 1, 1, -2, 0)  # up to the last but one
    return loop.get_iter_value(following.output(0), -1)


def _parted(x: Any, method: PlanLoop | StepLoop) -> list[Any]:
    """The part of a state [B, K, W] that adds up, and the part that is fed back."""
    lengths = _integer([method.width - method.fed, method.fed])
    return keep_float32(op.variadic_split(x, _integer(-1), lengths)).outputs()


class PlanLoop:
    """The sampling plan, operator by operator; its methods are as in `Step`."""

    def __init__(self, plan: SamplingPlan, ranges: Mapping[str, Range], bits: int = 8) -> None:
        """Take the ranges of the inputs of the int8 products, by their names in `PlanStep`.

        bits: of the weights of these products.
        """
        self.plan, self.ranges, self.bits = plan, ranges, bits
        self.width, self.row_width = len(plan.carry_weight), len(plan.input_weight)
        self.fed, self.starts = plan.fed, plan.start_weight is not None

    def condition(self, x_v: Any) -> Any:
        if self.starts:
            x_v = self._parts(x_v)[0]
        mean, std = map(_constant, self.plan.standardise)
        standard = op.divide(op.subtract(x_v, mean), std)
        q = self.linear("condition", standard, self.plan.condition_weight)
        return op.unsqueeze(keep_float32(q), _integer(1))  # [B, 1, H]

    def begin(self, x_v: Any) -> Any:
        assert self.plan.start_weight is not None
        first = self.linear("start", self._parts(x_v)[1], self.plan.start_weight)
        return op.unsqueeze(keep_float32(first), _integer(1))  # [B, 1, W]

    def _parts(self, x_v: Any) -> list[Any]:
        """Split x_v into what the condition is made of, and what the first state is."""
        lengths = _integer([len(self.plan.standardise[0]), -1])
        return op.variadic_split(x_v, _integer(1), lengths).outputs()

    def gain(self, state: Any, q: Any, row: Any) -> Any:
        weights = self.plan.carry_weight, self.plan.carry_bias
        return self.linear("carry", self.hidden(state, q, row), *weights)

    def finish(self, state: Any, q: Any, row: Any) -> Any:
        return self.linear("output", self.hidden(state, q, row, place="last "), *self.plan.output)

    def hidden(self, state: Any, condition: Any, bias: Any, *, place: str = "") -> Any:
        """Compute h3 [B, K, H] of one step, from state [B, K, W], condition [B, 1, H] and bias [N,
        K, H].

        place: in the graph; begins the names of the products, which must differ.
        """
        into, fed = _parted(state, self) if self.fed else (state, None)
        if self.plan.carry == "feature":
            into = self.linear("input", into, self.plan.input_weight, place=place)
        if fed is not None:
            into = keep_float32(op.add(into, fed))
        y = keep_float32(op.add(keep_float32(op.add(into, condition)), bias))
        h = _leaky(self.linear("hidden2", _leaky(y), *self.plan.hidden2, place=place))
        return _leaky(self.linear("hidden3", h, *self.plan.hidden3, place=place))

    def linear(
        self, name: str, x: Any, weight: NDArray, bias: NDArray | None = None, *, place: str = ""
    ) -> Any:
        """Map x [..., I] with weight [O, I] and bias [O] to [..., O]."""
        factor = _constant(weight)
        if name in self.ranges:  # x on the steps of its range becomes uint8 in the runtime
            low, high = map(_constant, self.ranges[name].ends)
            x = op.fake_quantize(x, low, high, low, high, LEVELS)
            stored, scale = quantised_rows(weight, self.bits)
            factor = op.multiply(op.convert(op.constant(stored), "f32"), _constant(scale))
        y = op.matmul(x, factor, False, True)
        y.set_friendly_name(place + name)
        return y if bias is None else op.add(y, _constant(bias))


class StepLoop:
    """The step of any method, as OpenVINO converts it."""

    def __init__(self, lowered: Lowered) -> None:
        self.step = lowered.step(torch.float32)
        self.width, self.row_width = self.step.width, lowered.row_width
        self.fed, self.starts = self.step.fed, self.step.starts
        self.x_v = torch.zeros(2, lowered.image_width)
        rows = torch.zeros(2, 3, self.width), torch.zeros(2, 3, self.row_width)
        self.examples = rows[0], self.step.condition(self.x_v), rows[1]

    def condition(self, x_v: Any) -> Any:
        return keep_float32(self.call("condition", (self.x_v,), (x_v,)))

    def begin(self, x_v: Any) -> Any:
        return keep_float32(self.call("begin", (self.x_v,), (x_v,)))

    def gain(self, state: Any, q: Any, row: Any) -> Any:
        return self.call("gain", self.examples, (state, q, row))

    def finish(self, state: Any, q: Any, row: Any) -> Any:
        return self.call("finish", self.examples, (state, q, row))

    def call(self, name: str, examples: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Any:
        """The node that computes what a method of the step does."""
        module = torch.nn.Module()
        module.step = self.step  # so that its weights are found
        module.forward = getattr(self.step, name)
        return inlined(module, examples, inputs)[0].get_node()


def inlined(
    module: torch.nn.Module, examples: Sequence[torch.Tensor], inputs: Sequence[Any]
) -> list[Any]:
    """The ports at which a graph computes a module's outputs from its own nodes."""
    graph = convert(module, *examples)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Log":
            _make_log_sigmoid_finite(node)
    for parameter, value in zip(graph.get_parameters(), inputs, strict=True):
        # An iterator's value is a port already.
        parameter.output(0).replace(value.output(0) if isinstance(value, ov.Node) else value)
    return [result.input_value(0) for result in graph.get_results()]


def _leaky(x: Any) -> Any:
    return op.prelu(x, _constant([LEAKY_SLOPE]))


def _constant(values: ArrayLike) -> Any:
    return op.constant(np.array(values, np.float32))


def _integer(values: ArrayLike) -> Any:
    return op.constant(np.array(values, np.int64))


def _size(x: Any, axis: int) -> Any:
    """One entry of a shape, [1]."""
    return op.gather(op.shape_of(x), _integer([axis]), _integer(0))


def parameter(shape: Any) -> Any:
    return op.parameter(ov.PartialShape(shape), ov.Type.f32)


def keep_float32(node: Any) -> Any:
    """Mark a node that computes in float32 even where the graph is compiled for bfloat16.

    OpenVINO leaves the loop's update and a transformer's residual sums in float32 by itself.
    """
    node.get_rt_info()["precise_0"] = ""  # becomes DisablePrecisionConversion in the file
    return node


def _make_log_sigmoid_finite(log: Any) -> None:
    """Replace the converter's log(sigmoid(x)), which underflows, by -softplus(-x)."""
    sigmoid = log.input_value(0).get_node()
    if sigmoid.get_type_name() == "Sigmoid":
        softplus = op.softplus(op.negative(sigmoid.input_value(0)))
        log.output(0).replace(op.negative(softplus).output(0))


def convert(module: torch.nn.Module, *example: torch.Tensor) -> Any:
    with tracing():
        # Shared weights would be gone with the module, though nodes of the graph live on in ours.
        return ov.convert_model(module, example_input=example, share_weights=False)

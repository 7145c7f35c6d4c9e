"""The plain loop in OpenVINO: converted from torch, and a `TensorIterator` written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from loop_peers.shared import GROUP, layers, need_simple_fusion, to_numpy
from marnet_bench.plain_loop import Logits, PlainLoop, Problem
from marnet_export.build.quantise import quantised_rows
from marnet_export.build.tracing import quiet
from marnet_sdk.backends.openvino import check_arithmetic, load_openvino
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats
from marnet_train.models.denoiser import LEAKY_SLOPE


def openvino_loop(problem: Problem, precision: str, threads: int) -> Logits:
    """The scripted module, converted: the loop becomes one `Loop`."""
    ov = load_openvino()

    if precision == "int8":
        raise BackendUnavailable(
            "its conversion keeps float32 weights; the TensorIterator has int8 ones"
        )
    with quiet():
        model = ov.convert_model(torch.jit.script(PlainLoop(problem).eval()))
    node = model.inputs[0].get_node()
    node.set_element_type(ov.Type.f32)
    node.set_partial_shape(ov.PartialShape([-1, problem.model.vision.dim]))
    model.validate_nodes_and_infer_types()
    return _run_openvino(model, precision, threads)


def openvino_iterator(problem: Problem, precision: str, threads: int) -> Logits:
    """A `TensorIterator` written by hand."""
    return _run_openvino(_OpenvinoLoop(problem, precision).model(), precision, threads)


def _run_openvino(model: Any, precision: str, threads: int) -> Logits:
    ov = load_openvino()

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "ENABLE_CPU_PINNING": False,  # as ours: threads bound to a core meet those of others there
    }
    if precision == "int8":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(GROUP)
    core = ov.Core()
    if precision == "bf16":
        check_arithmetic(core, precision)
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def logits(x_v: Floats) -> Floats:
        return request.infer([x_v], share_inputs=True)[0]

    return logits


class _OpenvinoLoop:
    """Writes the plain loop as an OpenVINO model around a `TensorIterator`."""

    def __init__(self, problem: Problem, precision: str) -> None:
        self.ov = load_openvino()
        self.op = self.ov.opset15
        self.problem, self.precision = problem, precision
        self.float = np.float32

    def model(self) -> Any:
        """Return the model that maps x_v [B, D_v] to logits [B, C]."""
        op, problem = self.op, self.problem
        x_v = self.parameter([-1, problem.model.vision.dim])
        mean, std = (
            op.constant(to_numpy(t)) for t in (problem.model.vision_mean, problem.model.vision_std)
        )
        condition = op.divide(op.subtract(x_v, mean), std)
        batch = op.gather(op.shape_of(x_v), self.integers([0]), self.integers(0))
        x = self._repeated(to_numpy(problem.initial), batch)
        return self.ov.Model(
            [self._head(x_v, self._loop(x, condition, batch))], [x_v], "plain_loop"
        )

    def parameter(self, shape: list[int]) -> Any:
        return self.op.parameter(shape, self.float)

    def integers(self, values: int | list[int]) -> Any:
        return self.op.constant(np.array(values, np.int64))

    def _repeated(self, row: Any, batch: Any) -> Any:
        """Repeat a row [1, W] to [B, W]."""
        width = int(row.shape[-1]) if isinstance(row, np.ndarray) else row.output(0).shape[-1]
        row = self.op.constant(row) if isinstance(row, np.ndarray) else row
        return self.op.broadcast(row, self.op.concat([batch, self.integers([width])], 0))

    def _loop(self, x: Any, condition: Any, batch: Any) -> Any:
        """The iterator: state x, one slice of each table a step -> the last x [B, D]."""
        op, problem = self.op, self.problem
        denoiser = problem.model.denoiser
        state, fixed = (
            self.parameter([-1, denoiser.dim]),
            self.parameter([-1, problem.model.vision.dim]),
        )
        tables = self._tables()
        slices = [self.parameter([1, *table.shape[1:]]) for table in tables]
        before = self.parameter([-1, denoiser.dim]) if problem.second_order else None
        x0, moved = self._step(state, before, fixed, slices)
        states = [(state, x, moved)]
        if before is not None:
            states.append((before, op.multiply(x, op.constant(np.float32(0))), x0))
        iterator = op.tensor_iterator()
        results = [result for _, _, result in states]
        iterator.set_body(
            self.ov.Model(results, [p for p, _, _ in states] + [fixed, *slices], "step")
        )
        for parameter, start, result in states:
            iterator.set_merged_input(parameter, start.output(0), result.output(0))
        iterator.set_invariant_input(fixed, condition.output(0))
        for parameter, table in zip(slices, tables, strict=True):
            iterator.set_sliced_input(parameter, op.constant(table).output(0), 0, 1, 1, -1, 0)
        return iterator.get_iter_value(moved.output(0), -1)

    def _tables(self) -> list[Floats]:
        """Return tau [S, E], scaled noise [S, D], A, B and, where it is used, C, each [S, 1]."""
        problem = self.problem
        used = 3 if problem.second_order else 2
        rows = problem.table.coefficients[:, :used].astype(np.float32)
        columns = [np.ascontiguousarray(rows[:, j : j + 1]) for j in range(used)]
        return [to_numpy(problem.tau), to_numpy(problem.scaled_noise[:, 0]), *columns]

    def _step(self, x: Any, before: Any, condition: Any, slices: list[Any]) -> tuple[Any, Any]:
        """Map x [B, D] to its estimate and the next x."""
        op = self.op
        tau, z, a, b, *c = slices
        batch = op.gather(op.shape_of(condition), self.integers([0]), self.integers(0))
        h = op.concat([x, condition, self._repeated(tau, batch)], 1)
        for i, (weight, bias) in enumerate(layers(self.problem), 1):
            h = op.add(self._product(h, weight), op.constant(bias))
            if i < 4:
                h = op.prelu(h, op.constant(np.array([LEAKY_SLOPE], np.float32)))
        moved = op.add(op.add(op.multiply(x, a), op.multiply(h, b)), z)
        if c:
            moved = op.add(moved, op.multiply(before, c[0]))
        return h, moved

    def _product(self, x: Any, weight: Floats) -> Any:
        """Multiply x [B, in] with weight [out, in], stored in int8 where that is asked for."""
        op = self.op
        if self.precision != "int8":
            return op.matmul(x, op.constant(weight), False, True)
        packed, scale = quantised_rows(weight)
        restored = op.multiply(op.convert(op.constant(packed), "f32"), op.constant(scale))
        return op.matmul(x, restored, False, True)

    def _head(self, x_v: Any, x: Any) -> Any:
        op, model = self.op, self.problem.model
        fusion = need_simple_fusion(self.problem)

        def linear(value: Any, layer: nn.Linear) -> Any:
            product = op.matmul(value, op.constant(to_numpy(layer.weight)), False, True)
            return op.add(product, op.constant(to_numpy(layer.bias)))

        slope = op.constant(np.array([LEAKY_SLOPE], np.float32))
        aligned = op.prelu(linear(x_v, model.project_vision), slope)
        if fusion == "concat":
            fused = op.concat([aligned, x], 1)
        else:
            fused = {"add": op.add, "mul": op.multiply}[fusion](aligned, x)
        return linear(fused, model.classifier)

"""The plain reverse loop in other frameworks: x_v to logits, as each of them runs it best.

"Plain" is the loop as the paper writes it: every step multiplies the concatenated [x ; c ; tau(t)]
by the whole first layer, then the three others, then applies the sampler's row. What any port
would prepare once is prepared: tau(t) of every step and the scaled noise are constants, and a term
that the sampler never uses is left out. The head behind the loop is the model's own.
Axes: B batch, S steps, D feature, D_v encoder features, E time embedding, H hidden, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_export.build.tracing import quiet
from marnet_export.lower.modules import Head
from marnet_sdk.backends.onnxruntime import load_onnxruntime
from marnet_sdk.backends.openvino import load_openvino
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import MARNet

Logits = Callable[[Floats], Floats]  # x_v [B, D_v] -> logits [B, C]
PRECISIONS = ("fp32", "bf16", "int8")
_GROUP = 128  # inputs of a product that share a scale where activations are quantised in groups


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a sampler and the noise of one trajectory: the same for every candidate."""

    model: MARNet
    table: SamplerTable
    seed: int = 0

    @cached_property
    def initial(self) -> Tensor:
        """Return x_T, [1, D]."""
        return self._noise[0]

    @cached_property
    def noise(self) -> Tensor:
        """Return z of every step, [S, 1, D]."""
        return self._noise[1]

    @cached_property
    def _noise(self) -> tuple[Tensor, Tensor]:
        table, dim = self.table, self.model.denoiser.dim
        drawn = draw_trajectory(self.seed, table.timesteps, table.train_steps, dim)
        initial = torch.from_numpy(drawn.initial).float()[None]
        return initial, torch.from_numpy(drawn.steps).float()[:, None]

    @cached_property
    def tau(self) -> Tensor:
        """The time embedding of every step, [S, E]."""
        with torch.no_grad():
            return self.model.denoiser.time(torch.tensor(self.table.timesteps))

    @property
    def second_order(self) -> bool:
        """Tell whether any step uses the estimate of the one before."""
        return bool(self.table.coefficients[:, 2].any())

    @property
    def scaled_noise(self) -> Tensor:
        """S_i z_i, [S, 1, D]."""
        scale = torch.from_numpy(self.table.coefficients[:, 3]).float()
        return self.noise * scale[:, None, None]


def make_problem(model: MARNet, sampler: str, steps: int, seed: int = 0) -> Problem:
    """The loop of a model with a sampler of so many steps."""
    return Problem(model.eval(), sampler_table(model.config.schedule, sampler, steps), seed)


def reference(problem: Problem) -> Logits:
    """The model itself in float32, eager: what every candidate is held to."""
    model = problem.model

    def logits(x_v: Floats) -> Floats:
        with torch.inference_mode():
            x = torch.from_numpy(x_v)
            initial = problem.initial.expand(len(x), -1)
            refined = model.refine(x, problem.table, initial, problem.noise)
            return model.classifier(model.fuse(x, refined)).numpy()

    return logits


class PlainLoop(nn.Module):
    """The plain loop as one scriptable module; its state is float32, its network in `compute`."""

    def __init__(self, problem: Problem, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        model, denoiser = problem.model, problem.model.denoiser
        layers = (denoiser.layer1, denoiser.layer2, denoiser.layer3, denoiser.layer4)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            copy.deepcopy(layer).to(compute) for layer in layers
        )
        self.mean, self.std = _constant(model.vision_mean), _constant(model.vision_std)
        self.tau = _constant(problem.tau.to(compute))  # [S, E]
        rows = torch.from_numpy(problem.table.coefficients[:, :3]).float()
        self.coefficients = _constant(rows)  # [S, 3]
        self.initial = _constant(problem.initial)  # [1, D]
        self.noise = _constant(problem.scaled_noise)  # [S, 1, D]
        self.head = _traced_head(model)
        self.second_order = problem.second_order
        self.slope = LEAKY_SLOPE
        self.requires_grad_(False)

    def estimate(self, x: Tensor, condition: Tensor, tau: Tensor) -> Tensor:
        """Estimate x0 [B, D] float32 from x [B, D] float32, and condition [B, D_v] and tau [E] in
        `compute`.
        """
        h = torch.cat([x.to(tau.dtype), condition, tau.expand(x.shape[0], -1)], dim=1)
        h = F.leaky_relu(self.layer1(h), self.slope)
        h = F.leaky_relu(self.layer2(h), self.slope)
        h = F.leaky_relu(self.layer3(h), self.slope)
        return self.layer4(h).float()

    def step(
        self, x: Tensor, previous: Tensor, condition: Tensor, tau: Tensor, row: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step: x, previous [B, D], row [3], z [1, D] -> next x and this step's estimate."""
        x0 = self.estimate(x, condition, tau)
        x = row[0] * x + row[1] * x0 + z
        if self.second_order:
            x = x + row[2] * previous
        return x, x0

    def forward(self, x_v: Tensor) -> Tensor:
        """Map x_v [B, D_v] to logits [B, C]."""
        condition = ((x_v - self.mean) / self.std).to(self.tau.dtype)
        x = self.initial.expand(x_v.shape[0], -1)
        previous = torch.zeros_like(x)
        for i in range(self.coefficients.shape[0]):
            row, z = self.coefficients[i], self.noise[i]
            x, previous = self.step(x, previous, condition, self.tau[i], row, z)
        return self.head(x_v, x.unsqueeze(1))[0][:, 0]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _traced_head(model: MARNet) -> torch.jit.ScriptModule:
    widths = (model.vision.dim, model.denoiser.dim)
    example = (torch.zeros(2, widths[0]), torch.zeros(2, 1, widths[1]))
    with torch.no_grad(), quiet():
        return torch.jit.trace_module(Head(model).eval(), {"forward": example}, check_trace=False)


# PyTorch


def torch_eager(problem: Problem, precision: str, threads: int) -> Logits:
    """Eager: the model as it is, its layers in bfloat16, or quantised dynamically."""
    if precision == "fp32":
        return reference(problem)
    return _through_torch(_plain_in(problem, precision))


def torchscript(problem: Problem, precision: str, threads: int) -> Logits:
    """Scripted, so that the loop is not interpreted by Python, and frozen."""
    with quiet():
        module = torch.jit.freeze(torch.jit.script(_plain_in(problem, precision)))
    return _through_torch(module)


def torch_compile(problem: Problem, precision: str, threads: int) -> Logits:
    """One step compiled by inductor with frozen, repacked weights; Python calls it S times.

    The whole loop would be unrolled: minutes of compilation for a hundred steps.
    """
    if precision == "int8":
        raise BackendUnavailable(
            "it cannot trace the packed weights of dynamically quantised layers"
        )
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = 64  # one for each batch size and precision
    inductor.compile_threads = 1  # worker processes would outlive the measurement
    plain = _plain_in(problem, precision)
    step = torch.compile(plain.step, dynamic=False, fullgraph=True, options={"freezing": True})
    rows = list(zip(plain.tau, plain.coefficients, plain.noise, strict=True))

    def forward(x_v: Tensor) -> Tensor:
        condition = ((x_v - plain.mean) / plain.std).to(plain.tau.dtype)
        x = plain.initial.repeat(len(x_v), 1)  # as dense as what a step returns: one compilation
        previous = torch.zeros_like(x)
        for tau, row, z in rows:
            x, previous = step(x, previous, condition, tau, row, z)
        return plain.head(x_v, x.unsqueeze(1))[0][:, 0]

    return _through_torch(forward)


def _plain_in(problem: Problem, precision: str) -> PlainLoop:
    if precision == "bf16":
        return PlainLoop(problem, torch.bfloat16).eval()
    plain = PlainLoop(problem).eval()
    if precision == "fp32":
        return plain
    with quiet():
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)


def _through_torch(module: Callable[[Tensor], Tensor]) -> Logits:
    def logits(x_v: Floats) -> Floats:
        with torch.inference_mode():
            return module(torch.from_numpy(x_v)).numpy()

    return logits


# What the graphs written by hand below share


def _layers(problem: Problem) -> Iterator[tuple[Floats, Floats]]:
    """Weight [out, in] and bias [out] of the denoiser's four layers."""
    denoiser = problem.model.denoiser
    for layer in (denoiser.layer1, denoiser.layer2, denoiser.layer3, denoiser.layer4):
        yield _numpy(layer.weight), _numpy(layer.bias)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().numpy())


def _quantised_rows(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric int8 with one scale for each output: [out, in] and [out, 1]."""
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-12) / 127
    return np.round(weight / scale).astype(np.int8), scale.astype(np.float32)


def _need_simple_fusion(problem: Problem) -> str:
    fusion = problem.model.config.fusion
    if fusion not in ("concat", "add", "mul"):
        raise BackendUnavailable(f"its graph is written for concat, add and mul, not for {fusion}")
    return fusion


# ONNX Runtime


def onnx_scan(problem: Problem, precision: str, threads: int) -> Logits:
    """ONNX Runtime: the loop as one `Scan`; int8 with the weights in blocks (MatMulNBits)."""
    return _run_onnx(problem, {"fp32": "Gemm", "int8": "MatMulNBits"}.get(precision), threads)


def onnx_scan_dynamic(problem: Problem, precision: str, threads: int) -> Logits:
    """Run ONNX's `Scan` with int8 through DynamicQuantizeMatMul, as ONNX Runtime's own quantiser
    writes it.
    """
    return _run_onnx(problem, "DynamicQuantizeMatMul", threads)


def onnx_scan_sleeping(problem: Problem, precision: str, threads: int) -> Logits:
    """The faster kinds of product with threads that sleep while they wait.

    Spinning ones are up to 1.8 times as fast on an idle machine, and far slower on a busy one.
    """
    product = {"fp32": "Gemm", "int8": "DynamicQuantizeMatMul"}.get(precision)
    return _run_onnx(problem, product, threads, spin=False)


def _run_onnx(problem: Problem, product: str | None, threads: int, *, spin: bool = True) -> Logits:
    ort = load_onnxruntime()

    if product is None:
        raise BackendUnavailable("ONNX Runtime has no bfloat16 products on a CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 3
    model = _OnnxLoop(problem, product).model()
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])

    def logits(x_v: Floats) -> Floats:
        out: Any = session.run(["logits"], {"x_v": x_v})
        return out[0]

    return logits


class _OnnxLoop:
    """Writes the plain loop as ONNX: constants outside, the step as the body of a `Scan`."""

    def __init__(self, problem: Problem, product: str) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.helper, self.to_tensor, self.float = (
            helper,
            numpy_helper.from_array,
            TensorProto.FLOAT,
        )
        self.problem, self.product = problem, product
        self.constants: dict[str, Any] = {}
        self.nodes: list[Any] = []

    def model(self) -> bytes:
        """The whole graph, x_v [B, D_v] -> logits [B, C]."""
        problem = self.problem
        body = self._body()
        self._start()
        coefficients = problem.table.coefficients.astype(np.float32)
        scanned = {"tau_s": _numpy(problem.tau), "z_s": _numpy(problem.scaled_noise)}
        scanned |= {f"k{j}_s": coefficients[:, j].copy() for j in range(self._rows)}
        states = ["x_start", "x0_start"] if problem.second_order else ["x_start"]
        inputs = [*states, *(self.constant(k, v) for k, v in scanned.items())]
        outputs = ["x_end", "x0_end"] if problem.second_order else ["x_end"]
        self.node("Scan", inputs, outputs, body=body, num_scan_inputs=len(scanned))
        self._head("x_end")
        graph = self.helper.make_graph(
            self.nodes,
            "plain_loop",
            [self.value("x_v", ["B", problem.model.vision.dim])],
            [self.value("logits")],
            list(self.constants.values()),
        )
        opsets = [self.helper.make_opsetid(*pair) for pair in (("", 20), ("com.microsoft", 1))]
        model = self.helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10
        return model.SerializeToString()

    @property
    def _rows(self) -> int:
        """Count how many of A, B, C a step uses."""
        return 3 if self.problem.second_order else 2

    def node(self, kind: str, inputs: list[str], outputs: list[str] | str, **settings: Any) -> str:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(self.helper.make_node(kind, inputs, outputs, **settings))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = self.to_tensor(value, name)
        return name

    def value(self, name: str, shape: list[Any] | None = None) -> Any:
        return self.helper.make_tensor_value_info(name, self.float, shape)

    def _start(self) -> None:
        """The condition, the size of the batch and the first state, before the loop."""
        model, denoiser = self.problem.model, self.problem.model.denoiser
        self.constant("mean", _numpy(model.vision_mean))
        self.constant("std", _numpy(model.vision_std))
        self.node("Sub", ["x_v", "mean"], "centred")
        self.node("Div", ["centred", "std"], "condition")
        self.node("Shape", ["x_v"], "batch", start=0, end=1)
        for name, width in (("dim", denoiser.dim), ("time", denoiser.time.dim)):
            self.constant(f"{name}_width", np.array([width], np.int64))
            self.node("Concat", ["batch", f"{name}_width"], f"{name}_shape", axis=0)
        self.node(
            "Expand", [self.constant("x_T", _numpy(self.problem.initial)), "dim_shape"], "x_start"
        )
        zero = self.constant("zero", np.zeros(1, np.float32))
        self.node("Expand", [zero, "dim_shape"], "x0_start")

    def _body(self) -> Any:
        """One step. Weights, condition and shapes are those of the graph outside."""
        outer, self.nodes = self.nodes, []
        self.node("Expand", ["tau", "time_shape"], "tau_rows")
        h = self.node("Concat", ["x", "condition", "tau_rows"], "joined", axis=1)
        for i, (weight, bias) in enumerate(_layers(self.problem), 1):
            h = self._linear(h, f"layer{i}", weight, bias)
            if i < 4:
                h = self.node("LeakyRelu", [h], f"h{i}", alpha=LEAKY_SLOPE)
        self.node("Mul", ["x", "k0"], "from_x")
        self.node("Mul", [h, "k1"], "from_x0")
        self.node("Add", ["from_x", "from_x0"], "moved")
        last = self.node("Add", ["moved", "z"], "noised")
        states, results = ["x"], [last]
        if self.problem.second_order:
            self.node("Mul", ["x0_before", "k2"], "from_before")
            results = [
                self.node("Add", ["noised", "from_before"], "extrapolated"),
                self.node("Identity", [h], "x0_now"),
            ]
            states.append("x0_before")
        inputs = [*states, "tau", "z", *(f"k{j}" for j in range(self._rows))]
        body = self.helper.make_graph(
            self.nodes, "step", [self.value(n) for n in inputs], [self.value(n) for n in results]
        )
        self.nodes = outer
        return body

    def _linear(self, x: str, name: str, weight: Floats, bias: Floats) -> str:
        """Map x [B, in] to [B, out] by the chosen kind of product."""
        b = self.constant(f"{name}.bias", bias)
        if self.product == "Gemm":
            inputs = [x, self.constant(name, weight), b]
            return self.node("Gemm", inputs, f"{name}_out", transB=1)
        if self.product == "MatMulNBits":
            return self._blocked(x, name, weight, b)
        packed, scale = _quantised_rows(weight)
        inputs = [
            x,
            self.constant(name, np.ascontiguousarray(packed.T)),
            self.constant(f"{name}.scale", scale[:, 0]),
            self.constant(f"{name}.zero", np.zeros(len(packed), np.int8)),
            b,
        ]
        return self.node("DynamicQuantizeMatMul", inputs, f"{name}_out", domain="com.microsoft")

    def _blocked(self, x: str, name: str, weight: Floats, b: str) -> str:
        """Weights in blocks of 128 inputs with a scale each, activations quantised alike."""
        out, width = weight.shape
        blocks = -(-width // _GROUP)
        padded = np.zeros((out, blocks * _GROUP), np.float32)
        padded[:, :width] = weight
        packed, scale = _quantised_rows(padded.reshape(-1, _GROUP))
        stored = (packed.astype(np.int16) + 128).astype(np.uint8)  # the zero point is 128
        inputs = [
            x,
            self.constant(name, stored.reshape(out, blocks, _GROUP)),
            self.constant(f"{name}.scale", scale.reshape(out, blocks)),
        ]
        settings = {"K": width, "N": out, "bits": 8, "block_size": _GROUP, "accuracy_level": 4}
        self.node("MatMulNBits", inputs, f"{name}_product", domain="com.microsoft", **settings)
        return self.node("Add", [f"{name}_product", b], f"{name}_out")

    def _head(self, x: str) -> None:
        fusion = _need_simple_fusion(self.problem)
        model = self.problem.model
        for name, layer in (("align", model.project_vision), ("classify", model.classifier)):
            self.constant(name, _numpy(layer.weight))
            self.constant(f"{name}.bias", _numpy(layer.bias))
        self.node("Gemm", ["x_v", "align", "align.bias"], "aligned_linear", transB=1)
        self.node("LeakyRelu", ["aligned_linear"], "aligned", alpha=LEAKY_SLOPE)
        if fusion == "concat":
            self.node("Concat", ["aligned", x], "fused", axis=1)
        else:
            self.node({"add": "Add", "mul": "Mul"}[fusion], ["aligned", x], "fused")
        self.node("Gemm", ["fused", "classify", "classify.bias"], "logits", transB=1)


# OpenVINO


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
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(_GROUP)
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

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
            op.constant(_numpy(t)) for t in (problem.model.vision_mean, problem.model.vision_std)
        )
        condition = op.divide(op.subtract(x_v, mean), std)
        batch = op.gather(op.shape_of(x_v), self.integers([0]), self.integers(0))
        x = self._repeated(_numpy(problem.initial), batch)
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
        return [_numpy(problem.tau), _numpy(problem.scaled_noise[:, 0]), *columns]

    def _step(self, x: Any, before: Any, condition: Any, slices: list[Any]) -> tuple[Any, Any]:
        """Map x [B, D] to its estimate and the next x."""
        op = self.op
        tau, z, a, b, *c = slices
        batch = op.gather(op.shape_of(condition), self.integers([0]), self.integers(0))
        h = op.concat([x, condition, self._repeated(tau, batch)], 1)
        for i, (weight, bias) in enumerate(_layers(self.problem), 1):
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
        packed, scale = _quantised_rows(weight)
        restored = op.multiply(op.convert(op.constant(packed), "f32"), op.constant(scale))
        return op.matmul(x, restored, False, True)

    def _head(self, x_v: Any, x: Any) -> Any:
        op, model = self.op, self.problem.model
        fusion = _need_simple_fusion(self.problem)

        def linear(value: Any, layer: nn.Linear) -> Any:
            product = op.matmul(value, op.constant(_numpy(layer.weight)), False, True)
            return op.add(product, op.constant(_numpy(layer.bias)))

        slope = op.constant(np.array([LEAKY_SLOPE], np.float32))
        aligned = op.prelu(linear(x_v, model.project_vision), slope)
        if fusion == "concat":
            fused = op.concat([aligned, x], 1)
        else:
            fused = {"add": op.add, "mul": op.multiply}[fusion](aligned, x)
        return linear(fused, model.classifier)


@dataclass(frozen=True)
class Peer:
    """One form of the plain loop in one framework."""

    open: Callable[[Problem, str, int], Logits]  # problem, precision, threads
    precisions: tuple[str, ...] = PRECISIONS  # that it is asked for; it may still lack some


PEERS = {
    "torch eager": Peer(torch_eager),
    "TorchScript": Peer(torchscript),
    "torch.compile": Peer(torch_compile),
    "ONNX Runtime Scan": Peer(onnx_scan),
    "ONNX Runtime Scan, dynamic": Peer(onnx_scan_dynamic, ("int8",)),
    "ONNX Runtime Scan, sleeping": Peer(onnx_scan_sleeping, ("fp32", "int8")),
    "OpenVINO Loop": Peer(openvino_loop),
    "OpenVINO TensorIterator": Peer(openvino_iterator),
}

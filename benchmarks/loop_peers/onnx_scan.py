"""The plain loop in ONNX Runtime: one `Scan`, written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loop_peers.shared import GROUP, layers, need_simple_fusion, to_numpy
from marnet_bench.plain_loop import Logits, Problem
from marnet_export.build.quantise import quantised_rows
from marnet_sdk.backends.onnxruntime import load_onnxruntime
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats
from marnet_train.models.denoiser import LEAKY_SLOPE


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
        scanned = {"tau_s": to_numpy(problem.tau), "z_s": to_numpy(problem.scaled_noise)}
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
        self.constant("mean", to_numpy(model.vision_mean))
        self.constant("std", to_numpy(model.vision_std))
        self.node("Sub", ["x_v", "mean"], "centred")
        self.node("Div", ["centred", "std"], "condition")
        self.node("Shape", ["x_v"], "batch", start=0, end=1)
        for name, width in (("dim", denoiser.dim), ("time", denoiser.time.dim)):
            self.constant(f"{name}_width", np.array([width], np.int64))
            self.node("Concat", ["batch", f"{name}_width"], f"{name}_shape", axis=0)
        self.node(
            "Expand", [self.constant("x_T", to_numpy(self.problem.initial)), "dim_shape"], "x_start"
        )
        zero = self.constant("zero", np.zeros(1, np.float32))
        self.node("Expand", [zero, "dim_shape"], "x0_start")

    def _body(self) -> Any:
        """One step. Weights, condition and shapes are those of the graph outside."""
        outer, self.nodes = self.nodes, []
        self.node("Expand", ["tau", "time_shape"], "tau_rows")
        h = self.node("Concat", ["x", "condition", "tau_rows"], "joined", axis=1)
        for i, (weight, bias) in enumerate(layers(self.problem), 1):
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
        packed, scale = quantised_rows(weight)
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
        blocks = -(-width // GROUP)
        padded = np.zeros((out, blocks * GROUP), np.float32)
        padded[:, :width] = weight
        packed, scale = quantised_rows(padded.reshape(-1, GROUP))
        stored = (packed.astype(np.int16) + 128).astype(np.uint8)  # the zero point is 128
        inputs = [
            x,
            self.constant(name, stored.reshape(out, blocks, GROUP)),
            self.constant(f"{name}.scale", scale.reshape(out, blocks)),
        ]
        settings = {"K": width, "N": out, "bits": 8, "block_size": GROUP, "accuracy_level": 4}
        self.node("MatMulNBits", inputs, f"{name}_product", domain="com.microsoft", **settings)
        return self.node("Add", [f"{name}_product", b], f"{name}_out")

    def _head(self, x: str) -> None:
        fusion = need_simple_fusion(self.problem)
        model = self.problem.model
        for name, layer in (("align", model.project_vision), ("classify", model.classifier)):
            self.constant(name, to_numpy(layer.weight))
            self.constant(f"{name}.bias", to_numpy(layer.bias))
        self.node("Gemm", ["x_v", "align", "align.bias"], "aligned_linear", transB=1)
        self.node("LeakyRelu", ["aligned_linear"], "aligned", alpha=LEAKY_SLOPE)
        if fusion == "concat":
            self.node("Concat", ["aligned", x], "fused", axis=1)
        else:
            self.node({"add": "Add", "mul": "Mul"}[fusion], ["aligned", x], "fused")
        self.node("Gemm", ["fused", "classify", "classify.bias"], "logits", transB=1)

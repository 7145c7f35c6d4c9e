"""Measure what this machine can do at best: reading weights, and multiplying in each precision.

Both are measured as the highest rate that any of several kernels reaches, and name that kernel: a
rate that somebody's loop beats was no limit. From them comes a lower bound for a loop of steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marnet_sdk.backends.onnxruntime import load_onnxruntime
from marnet_sdk.backends.openvino import check_arithmetic, load_openvino
from marnet_sdk.errors import BackendUnavailable, MissingExtra

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}  # of one weight
_SIDE = 2048  # of the square products
_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Rate:
    """A rate per second, reached through a kernel."""

    per_second: float
    through: str


@dataclass(frozen=True)
class Limits:
    """Measured rates of the machine with so many threads."""

    threads: int
    read: dict[int, Rate]  # bytes read over and over -> bytes a second
    multiply_adds: dict[str, Rate]  # precision -> multiply-adds a second

    def bound_ms(
        self,
        multiply_adds: int,
        weights: int,
        precision: str,
        batch: int,
        steps: float,
        *,
        compute: str | None = None,
    ) -> float:
        """The least time of a loop at this precision, in milliseconds.

        Args:
            multiply_adds: per image and step. weights: how many of them a step reads.
            precision: of the weights. compute: what they are multiplied in; None: the same.
        """
        size = weights * BYTES[precision]
        nearest = min(self.read, key=lambda measured: abs(measured - size))
        arithmetic = self.multiply_adds[compute or precision].per_second
        reading = self.read[nearest].per_second
        return bound(multiply_adds, size, batch, steps, arithmetic, reading)

    def described(self) -> dict[str, Any]:
        """The rates as plain data, for a report."""
        return {
            "threads": self.threads,
            "read": [
                {"bytes": size, "gb_per_s": rate.per_second / 1e9, "through": rate.through}
                for size, rate in self.read.items()
            ],
            "multiply_adds": {
                precision: {"g_per_s": rate.per_second / 1e9, "through": rate.through}
                for precision, rate in self.multiply_adds.items()
            },
        }


def higher(first: Limits, second: Limits) -> Limits:
    """Two measurements of the same, each rate the higher: what disturbed one is no limit."""
    return Limits(
        threads=first.threads,
        read={k: _higher(rate, second.read[k]) for k, rate in first.read.items()},
        multiply_adds={
            k: _higher(rate, second.multiply_adds[k]) for k, rate in first.multiply_adds.items()
        },
    )


def _higher(a: Rate, b: Rate) -> Rate:
    return max(a, b, key=lambda rate: rate.per_second)


def bound(
    multiply_adds: int, size: int, batch: int, steps: float, arithmetic: float, reading: float
) -> float:
    """Roofline of a loop whose steps wait for one another, in milliseconds.

    A step multiplies for every image and reads its weights once; the slower of the two counts.

    Args:
        multiply_adds: per image and step. size: bytes of weights that a step reads.
        arithmetic: multiply-adds a second. reading: bytes a second.
    """
    return 1e3 * steps * max(batch * multiply_adds / arithmetic, size / reading)


def measure_limits(
    sizes: Sequence[int], threads: int, seconds: float = 0.1, side: int = _SIDE
) -> Limits:
    """Measure this machine.

    Args:
        sizes: bytes of weights that a step reads. seconds: for each kernel. side: of the square
            matrices that are multiplied.
    """
    rates = {p: product_rate(p, threads, seconds, side) for p in PRECISIONS}
    for precision in ("bf16", "fp16"):  # what is stored so may be multiplied in float32
        rates[precision] = _higher(rates[precision], rates["fp32"])
    return Limits(
        threads=threads,
        read={size: read_rate(size, threads, seconds) for size in dict.fromkeys(sizes)},
        multiply_adds=rates,
    )


def read_rate(size: int, threads: int, seconds: float) -> Rate:
    """Bytes a second at which `size` bytes are read again and again."""
    size = max(_LINE * threads, size // (_LINE * threads) * (_LINE * threads))
    found = [Rate(_read_in_threads(size, threads, seconds), "numpy.max of bytes, in threads")]
    for through, call in _available(_readers(size, threads)):
        found.append(Rate(size / _shortest(call, seconds), through))
    return max(found, key=lambda rate: rate.per_second)


def product_rate(precision: str, threads: int, seconds: float, side: int = _SIDE) -> Rate:
    """Multiply-adds a second of large square products."""
    found = [
        Rate(side**3 / _shortest(call, seconds), through)
        for through, call in _available(_multipliers(precision, side, threads))
    ]
    return max(found, key=lambda rate: rate.per_second)


Probe = tuple[str, Callable[[], Callable[[], object]]]  # name, and what prepares the call


def _available(probes: Iterator[Probe]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The probes that can run here; a framework or a kernel may be missing."""
    for through, prepare in probes:
        try:
            call = prepare()
            call()
        except (ImportError, MissingExtra, BackendUnavailable, RuntimeError, ValueError, TypeError):
            continue
        yield through, call


def _shortest(call: Callable[[], object], seconds: float, least: int = 5) -> float:
    """Seconds of the quickest of many calls: a limit is what is reached undisturbed.

    Args:
        least: calls, unless they take ten times as long: types that are emulated are no limit.
    """
    begin = time.perf_counter()
    best = float("inf")
    calls = 0
    while (span := time.perf_counter() - begin) < seconds or (
        calls < least and span < 10 * seconds
    ):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def _read_in_threads(size: int, threads: int, seconds: float) -> float:
    """Each thread reads its part over and over without waiting for the others."""
    parts = np.split(np.ones(size, np.uint8), threads)
    ready = threading.Barrier(threads)
    counts = [0] * threads
    spans = [0.0] * threads

    def read(i: int) -> None:
        part = parts[i]
        part.max()
        ready.wait()
        start = time.perf_counter()
        while (span := time.perf_counter() - start) < seconds or not counts[i]:
            part.max()
            counts[i] += 1
        spans[i] = span

    workers = [threading.Thread(target=read, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(n * part.nbytes / span for n, part, span in zip(counts, parts, spans, strict=True))


def _readers(size: int, threads: int) -> Iterator[Probe]:
    """Kernels that read `size` bytes once a call."""
    values = torch.ones(size // 4)
    yield "torch.sum", lambda: values.sum
    rows = max(1, min(1024, size // 4096))
    matrix = np.ones((rows, size // 4 // rows), np.float32)
    yield "ONNX Runtime MatMul of one row", lambda: _onnx_product(matrix, 1, threads)


def _multipliers(precision: str, side: int, threads: int) -> Iterator[Probe]:
    """Kernels that multiply two square matrices [side, side] once a call."""
    ones = np.ones((side, side), np.float32)
    if precision == "int8":
        b = torch.ones(side, side, dtype=torch.int8)
        yield "torch._int_mm", lambda: lambda: torch._int_mm(b, b)  # pyright: ignore
    elif precision != "fp16":  # which torch multiplies sixty times slower than float32
        a = torch.ones(side, side, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        yield "torch.mm", lambda: lambda: torch.mm(a, a)
    if precision == "fp32":
        yield "ONNX Runtime MatMul", lambda: _onnx_product(ones, side, threads)
    yield "OpenVINO MatMul", lambda: _openvino_product(precision, side, threads)


def _onnx_product(matrix: NDArray[np.float32], rows: int, threads: int) -> Callable[[], object]:
    """Return a call that multiplies [rows, in] by a constant matrix [in, out]."""
    ort = load_onnxruntime()
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])

    weight = numpy_helper.from_array(matrix, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "product", [value("x")], [value("y")], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    x = np.ones((rows, len(matrix)), np.float32)
    return lambda: session.run(None, {"x": x})


def _openvino_product(precision: str, side: int, threads: int) -> Callable[[], object]:
    """Return a call that squares [side, side]; int8 has the activations on a fixed grid of 256
    levels.
    """
    ov = load_openvino()
    op = ov.opset15
    x = parameter = op.parameter([side, side], np.float32)
    weight = op.constant(np.ones((side, side), np.float32))
    if precision == "int8":
        low, high = op.constant(np.float32(0)), op.constant(np.float32(1))
        x = op.fake_quantize(parameter, low, high, low, high, 256)
        grid = op.constant(np.full((side, side), 127, np.int8))
        scale = op.constant(np.full((side, 1), 1 / 127, np.float32))
        weight = op.multiply(op.convert(grid, "f32"), scale)
    model = ov.Model([op.matmul(x, weight, False, True)], [parameter], "product")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16"}.get(precision, "f32"),
    }
    core = ov.Core()
    if precision == "bf16":
        check_arithmetic(core, precision)
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    ones = np.ones((side, side), np.float32)
    return lambda: request.infer([ones], share_inputs=True, share_outputs=True)

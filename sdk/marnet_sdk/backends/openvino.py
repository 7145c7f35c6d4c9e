"""OpenVINO: payload/encoder.xml and payload/refine.xml, the loop a `TensorIterator`. No torch.

Where the payload holds the native loop, it runs instead, and payload/head.xml behind it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from marnet_sdk.backends import Backend, InTwoCalls, RuntimeReport, TextEncoder, check_device
from marnet_sdk.cpus import cpus, int8_sums_overflow
from marnet_sdk.errors import BackendUnavailable, requires_extra
from marnet_sdk.native_loop import Head, Refine, about_loop, open_refine
from marnet_sdk.noise.tables import Floats, Integers, Tables

ENCODER, REFINE, TEXT = "encoder.xml", "refine.xml", "text.xml"
HEAD = "head.xml"
# refine.xml computes the same twice, with different outputs: the second ones ignore the coefficient
# of the estimate before, which is faster where it is zero in every step.
OUTPUTS = ("logits", "features")
FIRST_ORDER = ("logits_first_order", "features_first_order")
_IMPORT = Lock()
# What a CPU must be able to do for a type not to be emulated, in OpenVINO's words.
_NEEDS = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
_COMPUTE = ("fp32", "bf16")
# Between a stored matrix and the product that it is a factor of.
_PASSES = {"Convert", "Multiply", "Subtract", "FakeQuantize", "Reshape", "Transpose", "Unsqueeze"}


def open_payload(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> Backend:
    """Compile the graphs for the CPU.

    Products whose weights are stored in int8 are multiplied in int8, whatever `compute` is.

    Raises:
        MissingExtra: openvino is not installed.
        BackendUnavailable: the installed openvino cannot run the graph, or this CPU has no
            arithmetic of that type, or would let its sums of int8 products overflow.
    """
    check_device("openvino", device, "cpu")
    (encoder,) = _compiled(payload / ENCODER, compute, threads, ("x_v",))
    refine = open_refine(
        payload,
        threads,
        lambda: _refine(*_compiled(payload / REFINE, compute, threads, OUTPUTS, FIRST_ORDER)),
        lambda: _head(*_compiled(payload / HEAD, compute, threads, OUTPUTS)),
    )
    return _OpenVino(encoder, refine)


def open_text(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> TextEncoder:
    """Compile the text encoder; as `open_payload`."""
    check_device("openvino", device, "cpu")
    (graph,) = _compiled(payload / TEXT, compute, threads, ("x_s",))

    def encode(ids: Integers, mask: Integers) -> Floats:
        (x_s,) = graph(ids=ids, mask=mask)
        return x_s

    return encode


def _compiled(
    path: Path, compute: str, threads: int | None, *outputs: Sequence[str]
) -> list[_Graph]:
    """A graph for each choice of the outputs in the file."""
    ov = load_openvino()
    core = ov.Core()
    # Mapped weights would change, or end the process, with a file that is written over.
    core.set_property({"ENABLE_MMAP": False})
    if compute not in _COMPUTE:
        raise BackendUnavailable(
            f"openvino computes in {' or '.join(_COMPUTE)} on a CPU, the bundle asks {compute}"
        )
    check_arithmetic(core, compute)
    settings = compile_settings(compute, threads)
    try:
        model = core.read_model(path)
        if _has_int8(model):
            check_arithmetic(core, "int8")
            _check_overflow(model, path)
        chosen = [[model.output(output).get_node() for output in names] for names in outputs]
        models = [ov.Model(results, model.get_parameters(), path.stem) for results in chosen]
        return [_Graph(core.compile_model(model, "CPU", settings)) for model in models]
    except RuntimeError as error:
        raise BackendUnavailable(
            f"openvino {ov.__version__} cannot open {path}: {error}"
        ) from error


def _has_int8(model: Any) -> bool:
    """Tell whether a graph, or the body of one of its iterators, has int8 weights."""
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_element_type().get_type_name() == "i8":
            return True
        if kind == "TensorIterator" and _has_int8(node.get_function()):
            return True
    return False


def _check_overflow(model: Any, path: Path) -> None:
    """Refuse int8 weights of 8 bits on a processor that cannot add their products up."""
    if int8_sums_overflow() and (name := next(_of_8_bits(model), None)):
        raise BackendUnavailable(
            f"{path} was exported on another processor: {name} has int8 weights of 8 bits, and "
            "on this one, which has no VNNI instructions, sums of their products overflow in "
            "openvino; export the bundle on this machine, where weights get 7 bits, or with "
            "--precision fp32"
        )


def _of_8_bits(model: Any) -> Iterator[str]:
    """The products of a graph whose int8 weights do not fit into 7 bits, but for depthwise ones,
    whose sums are short.
    """
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "TensorIterator":
            yield from _of_8_bits(node.get_function())
        elif kind in ("MatMul", "Convolution") or _is_grouped(node):
            for constant in constants(node.input_value(1).get_node()) or ():
                if constant.get_element_type().get_type_name() == "i8":
                    values = constant.data
                    if min(values.min(), -values.max()) < -64:
                        yield node.get_friendly_name()


def _is_grouped(node: Any) -> bool:
    """Tell whether a node is a convolution in groups, of several channels each."""
    is_group = node.get_type_name() == "GroupConvolution"
    return is_group and node.input_value(1).get_shape()[2] > 1  # [groups, O, I, ...]


def constants(node: Any) -> list[Any] | None:
    """The constants that a value is made of; None where it depends on an input."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in _PASSES:
        return None
    found = [constants(value.get_node()) for value in node.input_values()]
    if any(one is None for one in found):
        return None
    return [constant for one in found if one is not None for constant in one]


def check_arithmetic(core: Any, kind: str) -> None:
    """Refuse a type that this processor has no instructions for: "bf16" or "int8".

    Raises:
        BackendUnavailable: it has none.
    """
    if _NEEDS[kind] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        name = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        how = "--precision fp32" if kind == "int8" else "--compute fp32"
        raise BackendUnavailable(
            f"this CPU ({name}) has no {kind} arithmetic, and openvino would emulate it slowly; "
            f"export the bundle with {how}"
        )


def load_openvino() -> Any:
    """The package openvino, which is imported without telemetry.

    Raises:
        MissingExtra: it is not installed.
    """
    with _IMPORT, requires_extra("openvino", "openvino"):
        if known := sys.modules.get("openvino"):
            return known
        with hidden("openvino_telemetry"):
            import openvino
    return openvino


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Make the import of a module fail.

    openvino_telemetry is installed with openvino. It writes an identifier of the user to their home
    and reports every import to a web service. Without it, openvino is silent.
    """
    known = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's mark for "absent"
    try:
        yield
    finally:
        del sys.modules[name]
        if known is not None:
            sys.modules[name] = known


def compile_settings(compute: str, threads: int | None) -> dict[str, Any]:
    """Properties of compiled graphs; those not named here are OpenVINO's defaults."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        # Never left to OpenVINO, which takes bfloat16 by itself where a CPU has it.
        "INFERENCE_PRECISION_HINT": "bf16" if compute == "bf16" else "f32",
        # Activations have the ranges that the graph says, or none.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # Every process would pin its first thread to the first core: measured to make two of them,
        # of one thread each, take 1.6 times as long.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": threads or cpus().threads,  # its own choice knows no quota
    }


class _Graph:
    """A compiled graph, with as many requests as there were calls at once.

    Inputs are read where they lie: the tables of a batch with noise of its own are large.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self._idle: deque[Any] = deque()

    def __call__(self, **arrays: Floats | Integers) -> list[Floats]:
        """Run it; the outputs are in the graph's order, copied out of the request."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            results = request.infer(arrays, share_inputs=True, share_outputs=False)
        finally:
            self._idle.append(request)
        return list(results.values())


def _refine(whole: _Graph, first_order: _Graph) -> Refine:
    def run(x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        tables = tables.at_least_two_steps()  # a TensorIterator runs at least once
        coefficients = tables.coefficients
        graph = whole if coefficients[:, 2].any() else first_order
        logits, features = graph(x_v=x_v, coefficients=coefficients, bias=tables.bias)
        return logits, features

    return run


def _head(graph: _Graph) -> Head:
    def run(x_v: Floats, x_cdr: Floats) -> tuple[Floats, Floats]:
        logits, features = graph(x_v=x_v, x_cdr=x_cdr)
        return logits, features

    return run


class _OpenVino(InTwoCalls):
    def __init__(self, encoder: _Graph, refine: Refine) -> None:
        self._encoder, self.refine = encoder, refine  # which may be the native loop

    def threads(self) -> int:
        return self._encoder.threads

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder(pixels=pixels)
        return x_v

    def report(self) -> RuntimeReport:
        return replace(super().report(), loop=about_loop(self.refine))

"""TensorRT: strongly typed ONNX files, and the engines that are built from them.

Precision is a property of the ONNX files: the factors of every product are 16 bits wide (or int8
between Q and DQ nodes), and everything else, softmax and the loop's state included, is float32. The
files stay in the payload, so that engines for other GPUs and versions can be added to it.
TensorRT-RTX builds for GPUs by name, without one. Standard TensorRT builds for the one it runs on.
Axes: B batch, S steps, K noise samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from marnet_export.build.builder import ROUTES, USUAL, Builder, Order, StandIn
from marnet_export.build.onnx_graph import quantise, to_onnx
from marnet_export.build.quantise import corrected, require_calibration
from marnet_export.build.tensorrt.engines import (
    BUCKETS,
    CONDITION,
    ENCODER,
    FINISH,
    REFINE,
    STEPS,
    TEXT,
    TOKEN_LIMIT,
    add_engines,
    check_targets,
    replace_engine,
)
from marnet_export.build.tensorrt.receipt import read_products
from marnet_export.build.tensorrt.torch_route import NAME as TORCH_TENSORRT
from marnet_export.build.tensorrt.torch_route import encoder_engine, load_torch_tensorrt
from marnet_export.build.tensorrt.typed_onnx import drop_full_masks, emulate_bfloat16, type_products
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    most_tokens,
    refine_signature,
    text_signature,
    tracing,
)
from marnet_export.build.types import TORCH_TYPES, Product, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Refine, ScanLoop, Step, with_compute
from marnet_sdk.backends import Backend, InTwoCalls, TextEncoder
from marnet_sdk.backends.onnxruntime import load_onnxruntime
from marnet_sdk.backends.tensorrt import by_noise_row
from marnet_sdk.errors import ExportError, InvalidInput, nearest, requires_extra
from marnet_sdk.gpu.persistent_loop import LOOP
from marnet_sdk.gpu.tensorrt_library import RTX, STANDARD, read_index
from marnet_sdk.noise.tables import Floats, Integers, Tables

ONNX = ROUTES[0]
TOKENS = 512  # most, where the encoder does not say less
_OPSET = 23  # the first with an operator for attention, which TensorRT runs as one kernel


def targets(payload: Path) -> list[str]:
    """List the libraries and GPUs that the payload has engines for."""
    return [str(engines) for engines in read_index(payload)]


def check_loop(types: Types) -> None:
    """Refuse int8 for the loop."""
    if types.storage == "int8":
        raise ExportError(
            "tensorrt runs the reverse loop in fp16, bf16 or fp32, not in int8: on a GPU its small "
            "products wait for each other rather than for arithmetic. Build an int8 encoder with "
            "an fp16 loop: add --loop-precision fp16"
        )


# --- ONNX


def build_encoder(
    lowered: Lowered, pixels: Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.onnx and build its engine; see `add_engines`.

    With the route torch-tensorrt, the engine for this machine's GPU is replaced by that package's,
    which has one profile for all batches.

    Raises:
        ExportError: TensorRT cannot build it in these types, or not for these GPUs.
        MissingExtra, BackendUnavailable: TensorRT is not here, or torch-tensorrt, if asked for.
    """
    _check_types(types)
    _check_route(order.route, types, order.targets)
    check_targets(order.targets)
    calibrated = require_calibration(order.calibration, types)
    module = lowered.encoder
    if calibrated is None:
        module = with_compute(module, TORCH_TYPES[types.compute])
    else:
        module = corrected(module, calibrated.pixels, kept=calibrated.kept)
    with tracing():
        traced = to_onnx(module, encoder_signature(pixels))
        exported: Any = torch.onnx.export(**traced, opset_version=_OPSET)
    proto = exported.model_proto
    if calibrated is not None:
        proto = quantise(
            *(proto, module, calibrated),
            kinds=["MatMul", "Gemm", "Conv"],
            activations="QInt8",
            ActivationSymmetric=True,
            MatMulConstBOnly=True,
            QuantizeBias=False,  # TensorRT has no biases in int32
        )
    _save(proto, types, payload / ENCODER)
    buckets = order.buckets or BUCKETS
    (*_, engines) = add_engines(payload, order.targets, buckets=buckets)
    if order.route == TORCH_TENSORRT:
        if engines.flavour != STANDARD:
            raise ExportError(
                f"torch-tensorrt builds engines of standard TensorRT, this payload has those of "
                f"{engines}; install standard TensorRT, or use the ONNX route, which is the default"
            )
        content = encoder_engine(module, pixels, buckets, TORCH_TYPES[types.compute])
        replace_engine(payload, engines, "encoder", content, (1, max(buckets)))


def _check_route(route: str, types: Types, targets: Sequence[str]) -> None:
    if route not in ROUTES:
        raise InvalidInput(
            f"route: got {route!r}, expected {' or '.join(ROUTES)}.{nearest(route, ROUTES)}"
        )
    if route == ONNX:
        return
    if targets:
        raise ExportError(
            f"torch-tensorrt builds for the GPU of this machine, got targets {', '.join(targets)}; "
            "leave them out, or use the ONNX route, which is the default"
        )
    if types.storage == "int8":
        raise ExportError(
            "torch-tensorrt builds the encoder in fp16, bf16 or fp32, got int8; choose another "
            "--precision, or use the ONNX route, which is the default"
        )
    load_torch_tensorrt()


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.onnx, the loop as one `Scan` with the head, and build its engine.

    Where the persistent kernel can run the loop, also what it needs: the loop's weights, and what
    comes before and behind it as two more graphs. They do what refine does, another way.
    """
    _check_types(types)
    check_loop(types)
    compute = TORCH_TYPES[types.compute]
    step, head = lowered.step(compute), with_compute(lowered.head, compute)
    module = Refine(ScanLoop(step), head).eval()
    _export(module, refine_signature(lowered, rows=1), types, payload / REFINE)
    _save_around_kernel(step, head, lowered.image_width, types, payload)
    add_engines(payload, order.targets, buckets=order.buckets or BUCKETS)


def _save_around_kernel(
    step: Step, head: nn.Module, width: int, types: Types, payload: Path
) -> None:
    """Write condition.onnx, finish.onnx and loop.safetensors, or nothing for another kind of loop.

    Args:
        width: D_v.
    """
    for name in (CONDITION, FINISH, LOOP):  # of other types
        (payload / name).unlink(missing_ok=True)
    weights = step.kernel_weights()
    if weights is None:
        return
    weights.save(payload / LOOP)
    padded, hidden = weights.padded, len(weights.matrices["carry"])
    x_v = torch.zeros(2, width), ("batch", width)
    h3 = torch.zeros(2, 5, padded), ("batch", "samples", padded)
    before, behind = _Condition(step, padded).eval(), _Finish(step, head, hidden).eval()
    _export(before, Signature({"x_v": x_v}, ["q"]), types, payload / CONDITION)
    signature = Signature({"x_v": x_v, "h3": h3}, ["logits", "features"])
    _export(behind, signature, types, payload / FINISH)


class _Condition(nn.Module):
    """This runs before the persistent kernel: x_v [B, D_v] -> q [B, Hp], padded with zeros."""

    def __init__(self, step: Step, padded: int) -> None:
        """Take the step, and Hp, to which q is padded."""
        super().__init__()
        self.step, self.padded = step, padded

    def forward(self, x_v: Tensor) -> Tensor:
        q = self.step.condition(x_v).squeeze(1)
        return F.pad(q, (0, self.padded - q.shape[-1]))


class _Finish(nn.Module):
    """This runs behind the kernel: x_v and the last h3 [B, K, Hp] -> logits, fused features."""

    def __init__(self, step: Step, head: nn.Module, hidden: int) -> None:
        """Take the step, the head, and H, the hidden width without the padding."""
        super().__init__()
        self.step, self.head, self.hidden = step, head, hidden

    def forward(self, x_v: Tensor, h3: Tensor) -> tuple[Tensor, Tensor]:
        logits, fused = self.head(x_v, self.step.estimate(h3[:, :, : self.hidden]))
        return logits, fused


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.onnx and build its engine."""
    _check_types(types)
    assert lowered.text is not None
    limit = min(TOKENS, most_tokens(lowered.text) or TOKENS)
    module = with_compute(lowered.text, TORCH_TYPES[types.compute])
    shapes = text_signature().free({"length": limit})
    _export(module, text_signature(), types, payload / TEXT, shapes, {TOKEN_LIMIT: str(limit)})
    add_engines(payload, order.targets, buckets=order.buckets or BUCKETS)


def _check_types(types: Types) -> None:
    if types.storage not in (types.compute, "int8"):
        raise ExportError(
            f"tensorrt multiplies matrices in the type in which they are stored, got "
            f"{types.storage} stored and {types.compute} computed; choose --precision "
            f"{types.compute}, or leave out --compute"
        )


def _export(
    module: nn.Module,
    signature: Signature,
    types: Types,
    path: Path,
    shapes: Any = None,
    properties: dict[str, str] | None = None,
) -> None:
    with tracing():
        traced = to_onnx(module, signature, shapes)
        exported: Any = torch.onnx.export(**traced, opset_version=_OPSET)
    proto = exported.model_proto
    if properties is not None:
        helper.set_model_props(proto, properties)
    _save(proto, types, path)


def _save(proto: onnx.ModelProto, types: Types, path: Path) -> None:
    drop_full_masks(proto.graph)
    onnx.save(type_products(proto, types.compute), path)


# --- the receipt


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """List the products of the networks that TensorRT itself makes of the ONNX files.

    These are strongly typed, so an engine has no other types. The files know sizes and types.
    """
    return read_products(payload / ENCODER) + read_products(payload / REFINE)


# --- the same graphs without a GPU


def open_reference(payload: Path, threads: int | None) -> Backend:
    """The ONNX files that the engines were built from, run by ONNX Runtime on the CPU.

    It rounds where the engines round, so an export can be verified where there is no GPU; sums
    are taken in another order. ONNX Runtime has no bf16 products on a CPU: there, the factors and
    results are rounded to bf16, and what lies between is float32.
    """
    return _Reference(*(_session(payload / name, threads) for name in (ENCODER, REFINE)))


def open_text_reference(payload: Path, threads: int | None) -> TextEncoder:
    """Open the graph that the text encoder's engine was compiled from, in ONNX Runtime."""
    session = _session(payload / TEXT, threads)

    def encode(ids: Integers, mask: Integers) -> Floats:
        (x_s,) = session.run(["x_s"], {"ids": ids, "mask": mask})
        return x_s

    return encode


class _Reference(InTwoCalls):
    def __init__(self, encoder: Any, refine: Any) -> None:
        self._encoder, self._refine = encoder, refine

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder.run(["x_v"], {"pixels": pixels})
        return x_v

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        return by_noise_row(self._run, x_v, tables.at_least_two_steps())

    def _run(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        feed = {"x_v": x_v, "coefficients": tables.coefficients, "bias": tables.bias}
        logits, features = self._refine.run(["logits", "features"], feed)
        return logits, features


def _session(path: Path, threads: int | None) -> Any:
    with requires_extra("onnxruntime", "onnxruntime"):
        ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Q and DQ nodes as they stand: ONNX Runtime's own int8 products saturate on some CPUs.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 3
    proto = onnx.load(path)
    emulate_bfloat16(proto)
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


BUILDER = Builder(
    name="tensorrt",
    storage=("fp32", "bf16", "fp16", "int8"),
    compute=("fp16", "bf16", "fp32"),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=(STANDARD, RTX),  # whichever is installed
    device="cuda",
    buckets=BUCKETS,
    most_steps=STEPS[-1],
    check_loop=check_loop,
    targets=targets,
    stand_in=StandIn(open_reference, open_text_reference),
)

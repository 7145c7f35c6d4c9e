"""ONNX Runtime: payload/encoder.onnx and payload/refine.onnx, the loop as one `Scan`. No torch.

Where the payload holds the native loop, it runs instead, and payload/head.onnx behind it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from marnet_sdk.backends import Backend, InTwoCalls, RuntimeReport, TextEncoder, check_device
from marnet_sdk.cpus import cpus, int8_sums_overflow
from marnet_sdk.errors import BackendUnavailable, requires_extra
from marnet_sdk.native_loop import Head, Refine, about_loop, open_refine
from marnet_sdk.noise.tables import Floats, Integers, Tables

ENCODER, REFINE, TEXT = "encoder.onnx", "refine.onnx", "text.onnx"
HEAD = "head.onnx"
_IMPORT, _NO_TELEMETRY = Lock(), "ORT_DISABLE_TELEMETRY"


def open_payload(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> Backend:
    """Open inference sessions on the CPU.

    Raises:
        MissingExtra: onnxruntime is not installed.
        BackendUnavailable: the installed onnxruntime cannot run the graph.
    """
    check_device("onnxruntime", device, "cpu")

    def opened(name: str) -> Any:
        return _session(payload / name, compute, threads)

    encoder = opened(ENCODER)
    refine = open_refine(
        payload, threads, lambda: _refine(opened(REFINE)), lambda: _head(opened(HEAD))
    )
    return _OnnxRuntime(encoder, refine)


def open_text(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> TextEncoder:
    """Open the text encoder; as `open_payload`."""
    check_device("onnxruntime", device, "cpu")
    session = _session(payload / TEXT, compute, threads)

    def encode(ids: Integers, mask: Integers) -> Floats:
        (x_s,) = session.run(["x_s"], {"ids": ids, "mask": mask})
        return x_s

    return encode


def load_onnxruntime() -> Any:
    """The package onnxruntime, imported without telemetry.

    Its builds for Linux write an identifier of the user to their home when they are imported, and
    report every session to a web service; a variable of the environment is the way to decline.

    Raises:
        MissingExtra: it is not installed.
    """
    with _IMPORT, requires_extra("onnxruntime", "onnxruntime"):
        if known := sys.modules.get("onnxruntime"):
            return known
        before = os.environ.get(_NO_TELEMETRY)
        os.environ[_NO_TELEMETRY] = "1"
        try:
            import onnxruntime
        finally:
            if before is None:
                del os.environ[_NO_TELEMETRY]
            else:
                os.environ[_NO_TELEMETRY] = before
    return onnxruntime


def session_options(threads: int | None) -> Any:
    """Say how graphs are run; what is not set here is ONNX Runtime's default."""
    options = load_onnxruntime().SessionOptions()
    # Its own choice knows no quota, and would bind each thread to a core.
    options.intra_op_num_threads = threads or cpus().threads
    # Worker threads spin between the products of one call, and sleep as soon as it returns: left
    # spinning, they would take a core from whatever runs next, this backend's own caller included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # For a millisecond at most, and work is handed out in small pieces: where a core is shared,
    # its thread comes late and has little left to do.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    options.add_session_config_entry("session.dynamic_block_base", "4")
    if int8_sums_overflow():  # slower products, whose sums do not
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # its errors are raised as exceptions anyway
    return options


def _session(path: Path, compute: str, threads: int | None) -> Any:
    ort = load_onnxruntime()
    if compute != "fp32":
        raise BackendUnavailable(
            f"onnxruntime computes in fp32 on a CPU, the bundle asks {compute}; export it with "
            "--compute fp32"
        )
    try:
        return ort.InferenceSession(path, session_options(threads), ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BackendUnavailable(
            f"onnxruntime {ort.__version__} cannot open {path}: {error}"
        ) from error


def _refine(session: Any) -> Refine:
    def run(x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        tables = tables.at_least_two_steps()  # a Scan of length 0 is refused
        feed = {"x_v": x_v, "coefficients": tables.coefficients, "bias": tables.bias}
        logits, features = session.run(["logits", "features"], feed)
        return logits, features

    return run


def _head(session: Any) -> Head:
    def run(x_v: Floats, x_cdr: Floats) -> tuple[Floats, Floats]:
        logits, features = session.run(["logits", "features"], {"x_v": x_v, "x_cdr": x_cdr})
        return logits, features

    return run


class _OnnxRuntime(InTwoCalls):
    def __init__(self, encoder: Any, refine: Refine) -> None:
        self._encoder, self.refine = encoder, refine  # which may be the native loop

    def threads(self) -> int:
        return self._encoder.get_session_options().intra_op_num_threads

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder.run(["x_v"], {"pixels": pixels})
        return x_v

    def report(self) -> RuntimeReport:
        return replace(super().report(), loop=about_loop(self.refine))

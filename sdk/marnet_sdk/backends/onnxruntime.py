"""ONNX Runtime: payload/model.onnx, the loop as one `Scan`. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from marnet_sdk.backends import Backend, Floats, Tables
from marnet_sdk.errors import BackendUnavailable, requires_extra

MODEL = "model.onnx"


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Open an inference session on the CPU.

    Raises:
        MissingExtra: onnxruntime is not installed.
        BackendUnavailable: the installed onnxruntime cannot run the graph.
    """
    with requires_extra("onnxruntime", "onnxruntime"):
        import onnxruntime as ort
    if compute != "fp32":
        raise BackendUnavailable(
            f"onnxruntime computes in fp32 on a CPU, the bundle asks {compute}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Idle worker threads would otherwise burn a core after every call, taking it from whatever runs
    # next: measured to slow other work in the process, and this backend itself at batch 64.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # its errors are raised as exceptions anyway
    try:
        session = ort.InferenceSession(payload / MODEL, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BackendUnavailable(
            f"onnxruntime {ort.__version__} cannot open {payload / MODEL}: {error}"
        ) from error
    return _OnnxRuntime(session)


class _OnnxRuntime:
    def __init__(self, session) -> None:
        self._session = session

    def run(self, pixels: Floats, tables: Tables) -> tuple[Floats, Floats]:
        feed = {"pixels": pixels, **_at_least_two_steps(tables).named()}
        logits, features = self._session.run(["logits", "features"], feed)
        return logits, features


def _at_least_two_steps(tables: Tables) -> Tables:
    """Put a step that changes nothing before a single one: a Scan of length 0 is refused."""
    if len(tables.coefficients) > 1:
        return tables
    unchanged = np.array([[1, 0, 0, 0]], np.float32)
    return replace(
        tables,
        coefficients=np.concatenate([unchanged, tables.coefficients]),
        time_bias=np.repeat(tables.time_bias, 2, axis=0),
        noise=np.repeat(tables.noise, 2, axis=0),
    )

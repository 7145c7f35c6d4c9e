"""A whole model as it was trained, with its plain loop, in each framework's best form."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from loop_peers import PEERS
from marnet_bench.peers import load_peer
from marnet_bench.plain_loop import make_problem
from marnet_export.build.builder import builder
from marnet_export.build.tracing import quiet
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower_marnet
from marnet_sdk.backends.onnxruntime import load_onnxruntime
from marnet_sdk.backends.openvino import load_openvino
from marnet_sdk.classifier import Classifier
from marnet_sdk.console import say
from marnet_sdk.noise.tables import Floats
from marnet_train.checkpoint import load_checkpoint
from marnet_train.models.marnet import MARNet

Logits = Callable[[Floats], Floats]  # pixels [B, 3, H, W] -> logits [B, C]


def peers(
    checkpoint: Path, classifier: Classifier, pixels: Floats, threads: int
) -> Iterator[tuple[str, str, Logits]]:
    """Framework, precision, pixels to logits; what a framework cannot do is left out, and said."""
    model, manifest = load_checkpoint(checkpoint).model, classifier.bundle.manifest
    example = torch.from_numpy(pixels[:2])
    problem = make_problem(model, "ddpm", model.config.schedule.steps)
    yield "torch eager", "fp32", load_peer(checkpoint, manifest, threads)[1].logits
    loops = {
        "torch.compile": ("torch.compile", _compiled),
        "ONNX Runtime": ("ONNX Runtime Scan", _onnx),
        "OpenVINO": ("OpenVINO Loop", _openvino),
    }
    for name, (loop, encoder) in loops.items():
        for precision in ("fp32", "bf16"):
            try:
                encode = encoder(model, example, precision, threads)
                refine = PEERS[loop].open(problem, precision, threads)
            except Exception as error:  # whatever a framework raises is why it is missing
                say(f"no peer {name} {precision}: {str(error).splitlines()[0][:200]}")
                continue
            yield name, precision, lambda pixels, e=encode, r=refine: r(e(pixels))


def _compiled(model: MARNet, example: torch.Tensor, precision: str, threads: int) -> Logits:
    torch.set_num_threads(threads)
    encoder = torch.compile(model.vision.eval(), dynamic=False)

    def encode(pixels: Floats) -> Floats:
        with torch.inference_mode(), torch.autocast("cpu", enabled=precision == "bf16"):
            return encoder(torch.from_numpy(pixels)).float().numpy()

    return encode


def _onnx(model: MARNet, example: torch.Tensor, precision: str, threads: int) -> Logits:
    ort = load_onnxruntime()

    if precision != "fp32":
        raise ValueError("ONNX Runtime has no bf16 on a CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        module = builder("onnxruntime")
        lowered = replace(lower_marnet(model), encoder=model.vision.eval())  # all that is written
        module.build_encoder(lowered, example, Types("fp32", "fp32"), Path(folder))
        session = ort.InferenceSession(Path(folder) / "encoder.onnx", options)
    return lambda pixels: np.asarray(session.run(None, {"pixels": pixels})[0])


def _openvino(model: MARNet, example: torch.Tensor, precision: str, threads: int) -> Logits:
    ov = load_openvino()
    with torch.no_grad(), quiet():
        graph = ov.convert_model(model.vision.eval(), example_input=example)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = ov.Core().compile_model(graph, "CPU", settings)
    return lambda pixels: compiled(pixels)[0]

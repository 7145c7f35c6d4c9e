"""TorchScript: encoder and head traced, loop scripted."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Head, Refine, ReverseLoop, with_compute
from marnet_export.plan import SamplingPlan
from marnet_sdk.backends.torchscript import ENCODER, REFINE
from marnet_train.models.marnet import MARNet

COMPUTE = ("fp32", "bf16")


def build_encoder(model: MARNet, pixels: torch.Tensor, types: Types, payload: Path) -> None:
    """Write payload/encoder.pt. `pixels` [B, 3, H, W] is the example that is traced."""
    encoder = with_compute(model.vision, TORCH_TYPES[types.compute]).eval()
    with torch.no_grad(), quiet():
        module = torch.jit.trace_module(encoder, {"forward": pixels}, check_trace=False)
        _save(module, types, payload / ENCODER)


def build_refine(model: MARNet, plan: SamplingPlan, types: Types, payload: Path) -> None:
    """Write payload/refine.pt."""
    loop = ReverseLoop(plan, TORCH_TYPES[types.compute]).eval()
    with torch.no_grad(), quiet():
        example = (torch.zeros(2, plan.condition_weight.shape[1]),)
        example += (torch.zeros(2, 3, model.denoiser.dim),)
        head = torch.jit.trace_module(Head(model), {"forward": example}, check_trace=False)
        module = torch.jit.script(Refine(torch.jit.script(loop), head))
        _save(module, types, payload / REFINE)


def _save(module: torch.jit.ScriptModule, types: Types, path: Path) -> None:
    _store(module, TORCH_TYPES[types.storage])
    buffer = io.BytesIO()  # on a full disk, its own writer aborts the process
    torch.jit.save(module, buffer)
    path.write_bytes(buffer.getbuffer())


def _store(module: nn.Module, storage: torch.dtype) -> None:
    """Cast every matrix to the storage type; vectors (biases, norms) stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(storage)


def stored_elements(payload: Path) -> dict[torch.dtype, int]:
    """Number of stored floating-point weights per type, read back from the built files."""
    counts: dict[torch.dtype, int] = {}
    for name in (ENCODER, REFINE):
        with quiet():
            module = torch.jit.load(str(payload / name), map_location="cpu")
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return counts

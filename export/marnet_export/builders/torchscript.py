"""TorchScript: encoder and head traced, loop scripted, composed: pixels and tables to logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Deployed, Head, ReverseLoop, with_compute
from marnet_export.plan import SamplingPlan
from marnet_sdk.backends.torchscript import MODEL
from marnet_train.models.marnet import MARNet

COMPUTE = ("fp32", "bf16")


def build(
    model: MARNet, plan: SamplingPlan, pixels: torch.Tensor, types: Types, payload: Path
) -> None:
    """Write payload/model.pt. `pixels` [B, 3, H, W] is the example that is traced."""
    compute = TORCH_TYPES[types.compute]
    encoder = with_compute(model.vision, compute).eval()
    loop = ReverseLoop(plan, compute).eval()
    with torch.no_grad(), quiet():
        x_v = encoder(pixels)
        x_cdr = x_v.new_zeros(len(x_v), model.denoiser.dim)
        traced = torch.jit.trace_module(encoder, {"forward": pixels}, check_trace=False)
        head = torch.jit.trace_module(Head(model), {"forward": (x_v, x_cdr)}, check_trace=False)
        module = torch.jit.script(Deployed(traced, torch.jit.script(loop), head))
        _store(module, TORCH_TYPES[types.storage])
        torch.jit.save(module, str(payload / MODEL))


def _store(module: nn.Module, storage: torch.dtype) -> None:
    """Cast every matrix to the storage type; vectors (biases, norms) stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(storage)


def stored_elements(payload: Path) -> dict[torch.dtype, int]:
    """Number of stored floating-point weights per type, read back from the built file."""
    counts: dict[torch.dtype, int] = {}
    with quiet():
        module = torch.jit.load(str(payload / MODEL), map_location="cpu")
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return counts

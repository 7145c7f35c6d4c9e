"""TorchScript: encoder and head traced, loop scripted."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch
from torch import nn

from marnet_export.builders import TORCH_TYPES, Types, quiet
from marnet_export.graph import Refine, ScriptedLoop, with_compute
from marnet_export.lower import Lowered
from marnet_sdk.backends.torchscript import ENCODER, REFINE, TEXT

STORAGE = ("fp32", "bf16", "fp16")
COMPUTE = ("fp32", "bf16")


def build_encoder(lowered: Lowered, pixels: torch.Tensor, types: Types, payload: Path) -> None:
    """Write payload/encoder.pt. `pixels` [B, 3, H, W] is the example that is traced."""
    encoder = with_compute(lowered.encoder, TORCH_TYPES[types.compute]).eval()
    with torch.no_grad(), quiet():
        module = torch.jit.trace_module(encoder, {"forward": pixels}, check_trace=False)
        _save(module, types, payload / ENCODER)


def build_text(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/text.pt."""
    assert lowered.text is not None
    encoder = with_compute(lowered.text, TORCH_TYPES[types.compute]).eval()
    ids = torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad(), quiet():
        module = torch.jit.trace_module(encoder, {"forward": (ids, ids)}, check_trace=False)
        _save(module, types, payload / TEXT)


def build_refine(lowered: Lowered, types: Types, payload: Path) -> None:
    """Write payload/refine.pt."""
    loop = ScriptedLoop(lowered.step(TORCH_TYPES[types.compute])).eval()
    with torch.no_grad(), quiet():
        example = (torch.zeros(2, lowered.image_width), torch.zeros(2, 3, lowered.latent_width))
        own = copy.deepcopy(lowered.head)  # `_store` casts what the traced module shares with it
        head = torch.jit.trace_module(own, {"forward": example}, check_trace=False)
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

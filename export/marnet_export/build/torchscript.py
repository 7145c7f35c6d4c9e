"""TorchScript: encoder and head traced, loop scripted.

A traced graph makes its own tensors where it was traced; what shall run on a GPU is traced there.
"""

from __future__ import annotations

import copy
import io
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from marnet_export.build.builder import USUAL, Builder, Order
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    head_signature,
    quiet,
    text_signature,
    tracing,
)
from marnet_export.build.types import TORCH_TYPES, Product, Types, Unread
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Refine, ScriptedLoop, on_device
from marnet_sdk.backends.torchscript import ENCODER, REFINE, TEXT, TRACED_ON, traced_on
from marnet_sdk.backends.torchscript import _module as open_module
from marnet_sdk.bundle import PLAN


def build_encoder(
    lowered: Lowered, pixels: torch.Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.pt. `pixels` [B, 3, H, W] is the example that is traced."""
    _build(lowered.encoder, encoder_signature(pixels), types, payload / ENCODER, order.device)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.pt."""
    assert lowered.text is not None
    _build(lowered.text, text_signature(), types, payload / TEXT, order.device)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.pt."""
    loop = ScriptedLoop(lowered.step(TORCH_TYPES[types.compute])).eval().to(order.device)
    # `_store` casts what the traced module shares with it.
    own = copy.deepcopy(lowered.head).to(order.device)
    with tracing():
        head = _trace(own, head_signature(lowered), order.device)
        module = torch.jit.script(Refine(torch.jit.script(loop), head))
        _save(module, types, payload / REFINE, order.device)


def _build(module: nn.Module, signature: Signature, types: Types, path: Path, device: str) -> None:
    encoder = on_device(module, TORCH_TYPES[types.compute], device, *signature.example)
    with tracing():
        _save(_trace(encoder, signature, device), types, path, device)


def _trace(module: nn.Module, signature: Signature, device: str) -> Any:
    example = tuple(tensor.to(device) for tensor in signature.example)
    return torch.jit.trace_module(module, {"forward": example}, check_trace=False)


def _save(module: torch.jit.ScriptModule, types: Types, path: Path, device: str) -> None:
    _store(module, TORCH_TYPES[types.storage])
    buffer = io.BytesIO()  # on a full disk, its own writer aborts the process
    torch.jit.save(module, buffer, _extra_files={} if device == "cpu" else {TRACED_ON: device})
    path.write_bytes(buffer.getbuffer())


def _store(module: nn.Module, storage: torch.dtype) -> None:
    """Cast every matrix to the storage type; vectors (biases, norms) stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(storage)


def products(payload: Path, types: Types, shape: tuple[int, int, int]) -> list[Product]:
    """Every matrix product and convolution that the loaded modules execute for one image.

    The modules are loaded and frozen as the SDK does it, and run on an image of zeros while each
    call into torch's kernels is recorded: sizes and the type computed in are those of the tensors
    that it was given. A factor that is a constant of the frozen graph is a weight, and its type of
    storage is read from the file. "loop" is one step: what a second step adds; "head" is all that
    refine.pt does once per image: the condition, the last step and the head.

    Args:
        shape: of an image, (3, H, W).

    Raises:
        Unread: a kernel that is not known, or a weight that cannot be told from others, which are
            stored in another type.
    """
    device, width = traced_on(payload / ENCODER), _row_width(payload)
    with quiet(), torch.inference_mode():
        pixels = torch.zeros(1, *shape, device=device)
        encoder, x_v = _executed(payload / ENCODER, types, (pixels,), device)
        once, twice = (
            _executed(payload / REFINE, types, (x_v, *tables), device)[0]
            for tables in (
                (torch.zeros(n, 3, device=device), torch.zeros(n, 1, 1, width, device=device))
                for n in (1, 2)
            )
        )
    # What was added stands somewhere in between; turned around, it is the same products.
    pairs = zip(once, twice, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    step = twice[same : same + len(twice) - len(once)]
    parts = {"encoder": encoder, "loop": step, "head": once}
    return [replace(p, part=part) for part, found in parts.items() for p in found]


def _row_width(payload: Path) -> int:
    """R, of the plan that lies beside the graphs; 1, which is broadcast, where there is none."""
    path = payload / Path(PLAN).name
    return load_file(path)["time_bias"].shape[1] if path.exists() else 1


def _executed(
    path: Path, types: Types, given: tuple[Tensor, ...], device: str
) -> tuple[list[Product], Tensor]:
    """The products of a call, in order, and its first output."""
    stored = {
        name: tensor
        for name, tensor in torch.jit.load(str(path), map_location="cpu").state_dict().items()
        if tensor.ndim >= 2 and tensor.is_floating_point()
    }
    module = open_module(path, types.compute, None, device)
    graph = module.inlined_graph  # which the nodes do not keep alive
    constants = {
        node.t("value").untyped_storage().data_ptr()
        for node in graph.findAllNodes("prim::Constant", recurse=True)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    }
    with torch.autocast(device, enabled=False), _Recorder(stored, constants) as recorder:
        out = module(*given)
    if recorder.problems:
        raise Unread(f"{path.name}: {recorder.problems[0]}")
    return recorder.found, out[0] if isinstance(out, tuple) else out


class _Recorder(TorchDispatchMode):
    """Notes every product that torch's kernels are called for."""

    def __init__(self, stored: dict[str, Tensor], constants: set[int]) -> None:
        super().__init__()
        self.stored, self.constants = stored, constants
        self.found: list[Product] = []
        self.problems: list[str] = []  # an error raised inside a scripted module loses its type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        match name:
            case "mm" | "bmm" | "matmul":
                self._note(name, out.numel() * args[1].shape[-2], args[1])
            case "addmm" | "baddbmm":
                self._note(name, out.numel() * args[2].shape[-2], args[2])
            case "linear":
                self._note(name, out.numel() * args[1].shape[-1], args[1])
            case "convolution" | "_convolution" | "_convolution_mode" | "mkldnn_convolution":
                self._note(name, out.shape[2:].numel() * out.shape[0] * args[1].numel(), args[1])
            case _ if "scaled_dot_product" in name:
                self._note("attention", 2 * args[0].numel() * args[1].shape[-2], args[1])
            case _ if _UNKNOWN.search(name):
                self.problems.append(f"it calls {name}, which this version cannot count")
        return out

    def _note(self, name: str, multiply_adds: int, weight: Tensor) -> None:
        storage = "activation"
        if weight.untyped_storage().data_ptr() in self.constants:
            name, storage = self._stored(name, weight)
        compute = _NAMES[weight.dtype]
        self.found.append(Product("", name, multiply_adds, storage, compute))

    def _stored(self, name: str, weight: Tensor) -> tuple[str, str]:
        """Name and type of a weight in the file, by its sizes."""
        sizes = sorted(weight.shape)
        fitting = {k: t for k, t in self.stored.items() if sorted(t.shape) == sizes}
        # Freezing may join weights: then all that there are must be of one type.
        kinds = {tensor.dtype for tensor in (fitting or self.stored).values()}
        if len(kinds) != 1:
            self.problems.append(
                f"a weight {list(weight.shape)} may be any of {', '.join(fitting or self.stored)}, "
                "which are stored in different types"
            )
        return next(iter(fitting)) if len(fitting) == 1 else name, _NAMES[kinds.pop()]


_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
_UNKNOWN = re.compile("mm|linear|conv|attention|dot|einsum|bilinear|mv$|addr|rnn|lstm")


BUILDER = Builder(
    name="torchscript",
    storage=("fp32", "bf16", "fp16"),
    compute=("fp32", "bf16"),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=("torchscript",),
    cuda_compute=("fp32", "bf16", "fp16"),
)

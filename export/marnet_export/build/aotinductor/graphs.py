"""AOTInductor: torch.export programs, compiled to machine code for the processor of this machine,
or for its GPU.

The loop is torch's `scan`, which becomes one loop of any length. The table of noise comes as it is
and with the row of each image, so that one row for all images is looked up and not copied.
Matrices that are stored in another type than they are multiplied in are cast by a graph of its own,
which runs once when the code is loaded (inductor's runtime constant folding).
"""

from __future__ import annotations

import copy
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marnet_export.build.aotinductor.receipt import products
from marnet_export.build.builder import USUAL, Builder, Order
from marnet_export.build.tracing import (
    Signature,
    encoder_signature,
    most_tokens,
    text_signature,
    tracing,
)
from marnet_export.build.types import TORCH_TYPES, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import ScanLoop, Step, on_device
from marnet_sdk.backends.aotinductor import (
    CPU_FLAGS,
    ENCODER,
    GPU,
    INPUTS,
    LIMITS,
    REFINE,
    STEPS,
    TEXT,
    TORCH,
    host_flags,
    read_metadata,
)
from marnet_sdk.backends.torch_device import gpu_name
from marnet_sdk.errors import BackendUnavailable, ExportError

_OLDEST = (2, 13)  # torch; 2.11 and 2.12 cannot write a `scan` in C++


def targets(payload: Path) -> list[str]:
    """The instruction sets that the code in the payload uses."""
    return read_metadata(payload / ENCODER)[CPU_FLAGS].split()


def build_encoder(
    lowered: Lowered, pixels: Tensor, types: Types, payload: Path, order: Order = USUAL
) -> None:
    """Write payload/encoder.pt2.

    Raises:
        BackendUnavailable: this machine has no C++ compiler, or too old a torch.
        ExportError: the compiler failed.
    """
    compute, signature = TORCH_TYPES[types.compute], encoder_signature(pixels)
    encoder = on_device(lowered.encoder, compute, order.device, pixels)
    _build(encoder, signature, types, payload / ENCODER, device=order.device)


def build_refine(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/refine.pt2; as `build_encoder`."""
    step = lowered.step(TORCH_TYPES[types.compute])
    image, width = lowered.image_width, lowered.row_width
    table = torch.zeros(4, 7, 5, width)
    inputs = {
        "x_v": (torch.zeros(2, image), ("batch", image)),
        "coefficients": (torch.zeros(4, 3), (STEPS, 3)),
        "bias": (table, (STEPS, "rows", "samples", width)),
        "the last bias": (table[-1].clone(), ("rows", "samples", width)),
        "row": (torch.zeros(2, dtype=torch.int64), ("batch",)),
    }
    module = _Refine(step, copy.deepcopy(lowered.head))
    signature = Signature(inputs, ("logits", "features"))
    _build(module, signature, types, payload / REFINE, device=order.device)


def build_text(lowered: Lowered, types: Types, payload: Path, order: Order = USUAL) -> None:
    """Write payload/text.pt2; as `build_encoder`."""
    assert lowered.text is not None
    signature, compute = text_signature(), TORCH_TYPES[types.compute]
    encoder = on_device(lowered.text, compute, order.device, *signature.example)
    limits = _text_limits(lowered.text)
    _build(encoder, signature, types, payload / TEXT, limits, order.device)


def _text_limits(text: nn.Module) -> dict[str, int]:
    """The largest token and the longest text, beyond which compiled code would read anything."""
    longest = most_tokens(text)
    for module in text.modules():
        if get := getattr(module, "get_input_embeddings", None):
            limits = {"mask": 1, "ids": get().num_embeddings - 1}
            return limits | ({"length": longest} if longest else {})
    raise ExportError("aotinductor cannot tell how many tokens this text encoder knows")


class _Refine(nn.Module):
    """This is `ScanLoop` and the head; each image says which row of the table is its noise."""

    def __init__(self, step: Step, head: nn.Module) -> None:
        super().__init__()
        self.loop, self.head = ScanLoop(step), head

    def forward(
        self, x_v: Tensor, coefficients: Tensor, bias: Tensor, last: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map x_v [B, D_v], coefficients [S - 1, 3], bias [S - 1, N, K, R] and that of the last
        step [N, K, R], and row [B] to logits [B, K, C] and features [B, K, D_f].
        """
        own = last.index_select(0, row)
        q, state = self.loop.start(x_v, own)
        state = self.loop.repeated(state, q, coefficients, bias, lambda b: b.index_select(0, row))
        logits, fused = self.head(x_v, self.loop.step.finish(state, q, own))
        return logits, fused


class _Stored(nn.Module):
    """A module whose matrices are stored in another type than they are multiplied in."""

    def __init__(self, module: nn.Module, storage: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.types: dict[str, torch.dtype] = {}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(False)
            if parameter.ndim >= 2 and parameter.is_floating_point():
                self.types[name] = parameter.dtype
                parameter.data = parameter.data.to(storage)

    @property
    def casts(self) -> bool:
        stored = dict(self.module.named_parameters())
        return any(stored[name].dtype != wanted for name, wanted in self.types.items())

    def forward(self, *arguments: Tensor) -> Any:
        stored = dict(self.module.named_parameters())
        used = {name: stored[name].to(wanted) for name, wanted in self.types.items()}
        return torch.func.functional_call(self.module, used, arguments)


def _build(
    module: nn.Module,
    signature: Signature,
    types: Types,
    path: Path,
    limits: Mapping[str, int] | None = None,
    device: str = "cpu",
) -> None:
    """Compile `module`, which is changed, and write the package."""
    from torch._inductor import config

    stored = _Stored(module.eval(), TORCH_TYPES[types.storage]).to(device)
    inputs = signature.inputs.items()
    kinds = [[name, str(x.dtype).removeprefix("torch."), sizes] for name, (x, sizes) in inputs]
    example = tuple(tensor.to(device) for tensor in signature.example)
    # Of a module that takes any number of arguments, their shapes come as one tuple.
    shapes = (signature.free(limits),)
    package = io.BytesIO()  # on a full disk, torch's own writer would end the process
    with tracing(), _private_compiler(path):
        program = torch.export.export(stored, example, dynamic_shapes=shapes, strict=False)
        metadata = {
            CPU_FLAGS: " ".join(_code_flags()),
            INPUTS: json.dumps(kinds),
            LIMITS: json.dumps(limits or {}),
            TORCH: torch.__version__,
        }
        if device == "cuda":
            metadata[GPU] = gpu_name()[0]
        settings = _SETTINGS | {"aot_inductor.metadata": metadata}
        settings["aot_inductor.use_runtime_constant_folding"] = stored.casts
        with config.patch(settings):
            torch._inductor.aoti_compile_and_package(program, package_path=package)
    path.write_bytes(package.getbuffer())


_SETTINGS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # else the number of threads of this process is compiled in
    "cpp.march": "",  # only instruction sets that `_code_flags` names
    "compile_threads": 1,  # in this process: a pool would outlive the call
    "aot_inductor.precompile_headers": False,  # takes longer than it saves in one compilation
}


def _code_flags() -> list[str]:
    """The instruction sets that the compiler may use, as its options name them."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = str(pick_vec_isa().build_arch_flags()).split()
    if any(option.startswith("-march") for option in options):
        return sorted(host_flags())  # whatever this processor has
    return sorted({option.removeprefix("-m") for option in options})


@contextmanager
def _private_compiler(path: Path) -> Iterator[None]:
    """A compiler whose files are gone afterwards; its errors in one line."""
    from torch._inductor import cpp_builder, exc
    from torch._inductor.utils import fresh_cache

    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        raise BackendUnavailable(
            f"aotinductor exports with torch {'.'.join(map(str, _OLDEST))} or newer, got "
            f"{torch.__version__}, whose compiler fails at the loop; upgrade torch, or choose "
            "--backend torchscript"
        )
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise BackendUnavailable(
            "aotinductor compiles with g++ when it exports, and there is none here; install g++, "
            "name another compiler in CXX, or choose --backend torchscript"
        ) from error
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it logs where it left files, which are gone by then
        with tempfile.TemporaryDirectory(prefix="marnet-") as folder, fresh_cache(dir=folder):
            yield
    except (exc.CppCompileError, exc.InductorError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise ExportError(f"aotinductor could not compile {path.name}: {reason.strip()}") from error
    finally:
        logger.setLevel(level)


BUILDER = Builder(
    name="aotinductor",
    storage=("fp32", "bf16", "fp16"),
    compute=("fp32", "bf16"),
    build_encoder=build_encoder,
    build_refine=build_refine,
    build_text=build_text,
    products=products,
    packages=("aotinductor",),
    cuda_compute=("fp32", "bf16", "fp16"),
    targets=targets,
)

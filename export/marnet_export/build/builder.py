"""One file per backend that can be built. Each has

STORAGE, COMPUTE            types it can store matrices in, and multiply the others in, here
build_encoder(lowered, pixels, types, payload)   pixels [B >= 2, 3, H, W] is the example to trace
build_refine(lowered, types, payload)            the loop and the head
build_text(lowered, types, payload)              the text encoder
products(payload, types, shape)                  every matrix product of what was built; raises
                                                 `Unread` where that cannot be told

The first two take `calibration` where STORAGE has int8. A backend that builds for other machines
than this one also has

DEVICE, BUCKETS, MOST_STEPS cuda; the batch sizes and the longest loop that it builds for
check_loop(types)           raises ExportError where the loop cannot be built in them
targets(payload)            what the native code in a payload was compiled for
open_reference(payload, threads), open_text_reference(payload, threads)
                            the graphs that were compiled, run here by something else

One whose loop the native kernel can stand in for, on a CPU, also has

build_head(lowered, types, payload), head_products(payload, types)
                            the graph of the head alone, and its products

One that builds for this machine's processor or its GPU also has

CUDA_COMPUTE                as COMPUTE, on a GPU
device                      "cpu" or "cuda", an argument of its build_... functions
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from marnet_sdk.backends import (
    Backend,
    TextEncoder,
    open_backend,
    open_text,
    why_unavailable,
    with_alignment,
)
from marnet_sdk.backends.torch_cuda import check_cuda
from marnet_sdk.errors import ExportError, MarnetError, requires_extra

Floats = NDArray[np.float32]


class Unread(ExportError):
    """A build may well be right, but the types of its products cannot be read back."""


BUILDERS = {
    "aotinductor": "marnet_export.build.aotinductor",
    "onnxruntime": "marnet_export.build.onnxruntime",
    "openvino": "marnet_export.build.openvino",
    "tensorrt": "marnet_export.build.tensorrt.graphs",
    "torchscript": "marnet_export.build.torchscript",
}
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Types:
    """These are the types in which a graph stores its matrices and computes with them.

    Matrices that are stored in int8 are multiplied in int8; `compute` is for everything else.
    """

    storage: str
    compute: str

    @property
    def sentence(self) -> str:
        """Say in one line how matrices are stored and multiplied, for `marnet-export`."""
        if self.storage == "int8":
            return f"int8: matrices stored and multiplied in int8, the rest in {self.compute}"
        if self.storage == self.compute:
            return f"{self.storage}: weights stored and products computed in {self.storage}"
        return (
            f"{self.storage}: weights stored in {self.storage}, products computed in "
            f"{self.compute}, because this backend has no faster {self.storage} arithmetic on a CPU"
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """The ranges of activations for int8 are measured on these arrays."""

    pixels: Floats  # [N, 3, H, W] real images
    x_v: Floats  # [N, D_v] what the float32 encoder makes of them
    coefficients: Floats  # [S, 3], the loop's tables at the operating point that is served
    bias: Floats  # [S, 1 or N, K, R]
    kept: tuple[str, ...] = ()  # the encoder's layers that stay float


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution of a built graph."""

    part: str  # encoder, loop, head
    name: str
    multiply_adds: int  # for one image and one noise sample; of the loop: of one step
    storage: str  # a precision, or "activation" where both factors are computed
    compute: str


def builder(backend: str) -> ModuleType:
    """The module that builds `backend`.

    Raises:
        MissingExtra: the packages that build it are not installed.
    """
    with requires_extra("export", "onnx", "onnxscript", "onnxruntime"):
        return import_module(BUILDERS[backend])


def open_built(backend: str, payload: Path, compute: str, device: str | None = None) -> Backend:
    """Open what was built as the SDK does; where this machine cannot run it, open the graphs that
    it was compiled from (`runs_here` tells).

    Args:
        device: that it was built for; None: what the backend builds for when it is not told.

    Raises:
        BackendUnavailable: neither can be run here.
    """
    if runs_here(backend):
        return open_backend(backend, payload, compute, None, device)
    return with_alignment(builder(backend).open_reference(payload, None), payload)


def open_built_text(
    backend: str, folder: Path, compute: str, threads: int | None, device: str | None = None
) -> TextEncoder:
    """Open the text encoder that was built; where this machine cannot run it, open the graph that
    it was compiled from.
    """
    if runs_here(backend):
        return open_text(backend, folder, compute, threads, device)
    return builder(backend).open_text_reference(folder, threads)


def runs_here(backend: str) -> bool:
    """Tell whether this machine runs what the backend builds, rather than builds it for others."""
    return not (why_unavailable(backend) and hasattr(builder(backend), "open_reference"))


def device_of(backend: str, asked: str | None) -> str:
    """The device that a backend builds for: "cpu" or "cuda".

    Args:
        asked: None: the one that it builds for when it is not told.

    Raises:
        ExportError: it does not build for that one.
    """
    own = _devices(backend)
    if asked in (None, *own):
        return asked or own[0]
    others = [name for name in BUILDERS if name != backend and _builds_for(name, asked)]
    raise ExportError(
        f"{backend} builds for {own[0]} alone, got --device {asked}; leave --device out, or choose "
        f"--backend {' or '.join(others)}"
    )


def _devices(backend: str) -> tuple[str, ...]:
    """Those that a backend builds for, the usual one first."""
    module = builder(backend)
    usual = getattr(module, "DEVICE", "cpu")
    return (usual, "cuda") if hasattr(module, "CUDA_COMPUTE") else (usual,)


def _builds_for(backend: str, device: str) -> bool:
    with contextlib.suppress(MarnetError):  # its packages are not here
        return device in _devices(backend)
    return False


def check_device(backend: str, device: str) -> None:
    """Refuse to build for a GPU that is not here, where it must be.

    Raises:
        BackendUnavailable: says why torch runs on no GPU, and what to do.
    """
    if device == "cuda" and hasattr(builder(backend), "CUDA_COMPUTE"):
        check_cuda(backend)


def choose_types(
    backend: str, precision: str, compute: str | None, device: str | None = None
) -> Types:
    """Resolve `--precision` and `--compute` for a backend.

    fp16 is a storage type on a CPU, where its products are slower than float32's; bf16 has not
    fp16's accuracy, so it is computed with only where it is asked for. On a GPU products are
    computed in the type that is asked for.

    Args:
        device: as of `device_of`.

    Raises:
        ExportError: the backend cannot store or compute in the asked type, or not there.
    """
    module, device = builder(backend), device_of(backend, device)
    computes = _computes(module, device)
    if precision not in module.STORAGE:
        raise ExportError(
            f"{backend} cannot store matrices in {precision}; choose --precision "
            f"{' or '.join(module.STORAGE)}{_others(precision, 'STORAGE')}"
        )
    chosen = compute or (precision if precision in computes else computes[0])
    if chosen not in computes:
        raise ExportError(
            f"{backend} cannot compute in {chosen} here; choose --compute {computes[0]}"
            f"{_others(chosen, 'COMPUTE')}"
        )
    return Types(precision, chosen)


def _computes(module: ModuleType, device: str) -> tuple[str, ...]:
    """Types of products on a device, the usual one first."""
    return getattr(module, "CUDA_COMPUTE", module.COMPUTE) if device == "cuda" else module.COMPUTE


def _others(name: str, kind: str) -> str:
    """The end of a sentence: which other backends can, of those that are installed."""
    found = []
    for backend in BUILDERS:
        with contextlib.suppress(MarnetError):
            if name in getattr(builder(backend), kind):
                found.append(backend)
    return f", or --backend {' or '.join(found)}" if found else ""


def example_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [2, 5] to trace a text encoder with: two tensors, or they are taken for one."""
    ids = torch.ones(2, 5, dtype=torch.int64)
    return ids, ids.clone()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notes of the exporters that no user can act on off the terminal.

    They warn that TorchScript is deprecated, that transformers checks shapes in Python (other batch
    sizes are verified on the built bundle), and of optional packages that we do not use.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

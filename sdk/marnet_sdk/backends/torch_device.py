"""The devices and types that torch computes with on this machine, and why a GPU is none of them."""

from __future__ import annotations

import warnings
from typing import Any

from marnet_sdk.cpus import wait_briefly
from marnet_sdk.errors import BackendUnavailable, requires_extra
from marnet_sdk.process import import_apart

COMPUTE = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def why_no_cuda() -> str | None:
    """Tell why torch runs on no GPU here, and what to do about it; None: it does.

    Raises:
        MissingExtra: torch is not installed.
    """
    with requires_extra("torch", "torch"):
        import torch
    install = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one with it: {install}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    detail = f" ({' '.join(str(said[0].message).split())})" if said else ""
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU{detail}; look at what "
        "nvidia-smi says, or export for the processor: marnet-export --device cpu"
    )


def check_types(backend: str, compute: str, device: str) -> None:
    """Refuse a device or a type that torch does not compute with here.

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: torch runs on no GPU here, or does not compute in this type there.
    """
    wait_briefly()
    with requires_extra("torch", "torch"):
        import_apart("torch")
    if device == "cuda":
        check_cuda(backend)
    types = COMPUTE[device]
    if compute not in types:
        where = {"cpu": "on a CPU", "cuda": "on a GPU"}[device]
        raise BackendUnavailable(
            f"{backend} computes in {', '.join(types[:-1])} or {types[-1]} {where}, the bundle "
            f"asks {compute}"
        )


def check_cuda(backend: str) -> None:
    """Refuse a GPU where torch has none.

    Raises:
        BackendUnavailable: torch runs on no GPU here; says why.
    """
    if reason := why_no_cuda():
        raise BackendUnavailable(f"{backend} cannot run on cuda: {reason}")


def torch_type(compute: str) -> Any:
    """The type of torch that fp32, bf16 or fp16 stands for."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]


def gpu_name() -> tuple[str, str]:
    """The kind of the GPU that is used, as compilers call it, and its name: sm90, NVIDIA H100."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}", torch.cuda.get_device_name()

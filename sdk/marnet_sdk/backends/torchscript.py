"""TorchScript: payload/encoder.pt traced, payload/refine.pt a scripted loop and a traced head.

TorchScript is deprecated upstream. It is here because it works wherever torch does; everything
about it is in this file and in the builder of the same name.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from marnet_sdk.backends import Backend, Floats, Integers, Tables, TextEncoder
from marnet_sdk.errors import BackendUnavailable, requires_extra

ENCODER, REFINE, TEXT = "encoder.pt", "refine.pt", "text.pt"
MATRIX = ".matrix"  # parameters of this name hold the factors of the low-precision products


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Load and freeze the modules. `threads` sets torch's thread count for the whole process.

    Weights are stored in one type and computed with in another: the factors of matrix products
    go to `compute`, everything else to float32.

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: this torch cannot load the archive.
    """
    encoder, refine = (_module(payload / name, compute, threads) for name in (ENCODER, REFINE))
    return _TorchScript(encoder, refine)


def open_text(payload: Path, compute: str, threads: int | None) -> TextEncoder:
    """Load the text encoder; as `open_payload`."""
    module = _module(payload / TEXT, compute, threads)
    return lambda ids, mask: _call(module, ids, mask).numpy()


def _module(path: Path, compute: str, threads: int | None) -> Any:
    with requires_extra("torch", "torch"):
        import torch
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if compute not in types:
        raise BackendUnavailable(f"torchscript computes in fp32 or bf16, the bundle asks {compute}")
    if threads is not None:
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        try:
            module = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"torch {torch.__version__} cannot load {path}: {error}"
            ) from error
        for key, parameter in module.named_parameters():
            target = types[compute] if key.endswith(MATRIX) else torch.float32
            parameter.data = parameter.data.to(target)
        return torch.jit.freeze(module.eval())


class _TorchScript:
    def __init__(self, encoder: Any, refine: Any) -> None:
        self._encoder, self._refine = encoder, refine

    def encode(self, pixels: Floats) -> Floats:
        return _call(self._encoder, pixels).numpy()

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        logits, features = _call(self._refine, x_v, tables.coefficients, tables.bias)
        return logits.numpy(), features.numpy()


def _call(module: Any, *arrays: Floats | Integers) -> Any:
    import torch

    # torch warns of arrays that it must not write to, though nothing here writes to them.
    writeable = [array if array.flags.writeable else array.copy() for array in arrays]
    # A caller's autocast would change the types that the bundle was verified with.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        return module(*map(torch.from_numpy, writeable))

"""TorchScript: payload/encoder.pt traced, payload/refine.pt a scripted loop and a traced head.

TorchScript is deprecated upstream. It is here because it works wherever torch does; everything
about it is in this file and in the builder of the same name.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from marnet_sdk.backends import Backend, Floats, Tables
from marnet_sdk.errors import BackendUnavailable, requires_extra

ENCODER, REFINE = "encoder.pt", "refine.pt"
MATRIX = ".matrix"  # parameters of this name hold the factors of the low-precision products


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Load and freeze the modules. `threads` sets torch's thread count for the whole process.

    Weights are stored in one type and computed with in another: the factors of matrix products
    go to `compute`, everything else to float32.

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: this torch cannot load the archive.
    """
    with requires_extra("torch", "torch"):
        import torch
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if compute not in types:
        raise BackendUnavailable(f"torchscript computes in fp32 or bf16, the bundle asks {compute}")
    if threads is not None:
        torch.set_num_threads(threads)

    def load(name: str):
        try:
            module = torch.jit.load(str(payload / name), map_location="cpu")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"torch {torch.__version__} cannot load {payload / name}: {error}"
            ) from error
        for key, parameter in module.named_parameters():
            target = types[compute] if key.endswith(MATRIX) else torch.float32
            parameter.data = parameter.data.to(target)
        return torch.jit.freeze(module.eval())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return _TorchScript(load(ENCODER), load(REFINE))


class _TorchScript:
    def __init__(self, encoder, refine) -> None:
        self._encoder, self._refine = encoder, refine

    def encode(self, pixels: Floats) -> Floats:
        return _call(self._encoder, pixels).numpy()

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        logits, features = _call(self._refine, x_v, tables.coefficients, tables.bias)
        return logits.numpy(), features.numpy()


def _call(module, *arrays: Floats):
    import torch

    # torch warns of arrays that it must not write to, though nothing here writes to them.
    writeable = [array if array.flags.writeable else array.copy() for array in arrays]
    # A caller's autocast would change the types that the bundle was verified with.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        return module(*map(torch.from_numpy, writeable))

"""TorchScript: payload/model.pt, encoder and head traced, loop scripted.

TorchScript is deprecated upstream. It is here because it works wherever torch does; everything
about it is in this file and in the builder of the same name.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from marnet_sdk.backends import Backend, Floats, Tables
from marnet_sdk.errors import BackendUnavailable, requires_extra

MODEL = "model.pt"
MATRIX = ".matrix"  # parameters of this name hold the factors of the low-precision products


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Load and freeze the module. `threads` sets torch's thread count for the whole process.

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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        try:
            module = torch.jit.load(str(payload / MODEL), map_location="cpu")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"torch {torch.__version__} cannot load {payload / MODEL}: {error}"
            ) from error
        for name, parameter in module.named_parameters():
            target = types[compute] if name.endswith(MATRIX) else torch.float32
            parameter.data = parameter.data.to(target)
        frozen = torch.jit.freeze(module.eval())
    return _TorchScript(frozen)


class _TorchScript:
    def __init__(self, module) -> None:
        self._module = module

    def run(self, pixels: Floats, tables: Tables) -> tuple[Floats, Floats]:
        import torch

        arrays = [pixels, *tables.named().values()]
        # torch warns of arrays that it must not write to, though nothing here writes to them.
        writeable = [array if array.flags.writeable else array.copy() for array in arrays]
        # A caller's autocast would change the types that the bundle was verified with.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            logits, features = self._module(*map(torch.from_numpy, writeable))
        return logits.numpy(), features.numpy()

"""TorchScript: payload/encoder.pt traced, payload/refine.pt a scripted loop and a traced head.

TorchScript is deprecated upstream. It is here because it works wherever torch does; everything
about it is in this file and in the builder of the same name.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marnet_sdk.backends import (
    Backend,
    InTwoCalls,
    TextEncoder,
    torch_cpu,
    torch_cuda,
    torch_device,
)
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.gpu.torch_programs import Model
from marnet_sdk.noise.tables import Floats, Integers, Tables

ENCODER, REFINE, TEXT = "encoder.pt", "refine.pt", "text.pt"
MATRIX = ".matrix"  # parameters of this name hold the factors of the low-precision products
TRACED_ON = "marnet.device"  # a file in the archive: what it was traced on; without it, cpu


def open_payload(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> Backend:
    """Load and freeze the modules. Torch's number of threads is set for the whole process.

    Weights are stored in one type and computed with in another: the factors of matrix products
    go to `compute`, everything else to float32. On "cuda", encoder, loop and head run as one
    captured graph (`torch_cuda`).

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: this torch cannot load the archive, or has no such device.
    """
    torch_device.check_types("torchscript", compute, device)
    if device == "cuda":
        return torch_cuda.TorchOnCuda(load_model(payload, compute, device))
    encoder, refine = (_module(payload / name, compute, threads) for name in (ENCODER, REFINE))
    return _TorchScript(encoder, refine, adapts=threads is None)


def open_text(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> TextEncoder:
    """Load the text encoder; as `open_payload`, but it is not captured."""
    torch_device.check_types("torchscript", compute, device)
    module = _module(payload / TEXT, compute, threads, device)
    if device == "cuda":
        return torch_cuda.plain_text(module)
    return lambda ids, mask: _copied(_call(module, ids, mask, adapts=threads is None))


def load_model(payload: Path, compute: str, device: str) -> Model:
    """The modules as what is captured on a GPU."""
    refine = _load(payload / REFINE, compute, device)
    parts = torch_cuda.loop_parts(refine, compute)  # freezing leaves none
    encoder = _module(payload / ENCODER, compute, None, device)
    return Model(encoder, _freeze(refine), parts)


def _module(path: Path, compute: str, threads: int | None, device: str = "cpu") -> Any:
    """Loaded and frozen."""
    if device == "cpu":
        torch_cpu.use_threads(threads)
    return _freeze(_load(path, compute, device))


def _freeze(module: Any) -> Any:
    import torch

    with _deprecated():
        return torch.jit.freeze(module)


def _load(path: Path, compute: str, device: str) -> Any:
    """Loaded, with the types that it computes in.

    Raises:
        BackendUnavailable: this torch cannot load it, or it was made for another device.
    """
    import torch

    built_on = traced_on(path)
    if built_on != device:  # tensors that the graph makes itself would be on the other
        raise BackendUnavailable(
            f"{path} was traced on {built_on} and cannot run on {device}; export the bundle again: "
            f"marnet-export --backend torchscript --device {device}"
        )
    try:
        with _deprecated():
            module = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"torch {torch.__version__} cannot load {path}: {error}"
        ) from error
    for key, parameter in module.named_parameters():
        if parameter.ndim >= 2:  # vectors are stored as they are used
            target = torch_device.torch_type(compute) if key.endswith(MATRIX) else torch.float32
            parameter.data = parameter.data.to(target)
    return module.eval()


def traced_on(path: Path) -> str:
    """The device that an archive was traced on: "cpu" where it does not say. Nothing is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith(f"/extra/{TRACED_ON}")]
            return archive.read(found[0]).decode() if found else "cpu"
    except (OSError, zipfile.BadZipFile):  # torch says what is wrong with it
        return "cpu"


@contextmanager
def _deprecated() -> Iterator[None]:
    """Silence torch's warning that TorchScript is deprecated: whoever uses this backend knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # a FutureWarning since torch 2.14
        yield


class _TorchScript(InTwoCalls):
    def __init__(self, encoder: Any, refine: Any, *, adapts: bool) -> None:
        self._encoder, self._refine, self._adapts = encoder, refine, adapts

    def threads(self) -> int:
        return torch_cpu.threads_now()

    def encode(self, pixels: Floats) -> Floats:
        return _copied(_call(self._encoder, pixels, adapts=self._adapts))

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        inputs = x_v, tables.coefficients, tables.bias
        logits, features = _call(self._refine, *inputs, adapts=self._adapts)
        return _copied(logits), _copied(features)


def _copied(tensor: Any) -> Floats:
    """An array of its own: one that needs a tensor would end it wherever it is dropped itself."""
    return tensor.numpy().copy()


def _call(module: Any, *arrays: Floats | Integers, adapts: bool) -> Any:
    import torch

    # torch warns of arrays that it must not write to, though nothing here writes to them.
    writeable = [array if array.flags.writeable else array.copy() for array in arrays]
    # A caller's autocast would change the types that the bundle was verified with.
    exact = torch.inference_mode(), torch.autocast("cpu", enabled=False)
    with torch_cpu.computing(adapts=adapts), exact[0], exact[1]:
        return module(*map(torch.from_numpy, writeable))

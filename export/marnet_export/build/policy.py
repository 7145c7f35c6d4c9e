"""On which device, and in which types, a backend builds here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from marnet_export.build.builder import BUILDERS, Builder, builder
from marnet_export.build.types import Types
from marnet_sdk.backends.torch_device import check_cuda
from marnet_sdk.errors import ExportError, MarnetError


def device_of(backend: str, asked: str | None) -> str:
    """The device that a backend builds for: "cpu" or "cuda".

    Args:
        asked: None: the one that it builds for when it is not told.

    Raises:
        ExportError: it does not build for that one.
    """
    own = builder(backend).devices
    if asked in (None, *own):
        return asked or own[0]
    others = _backends(lambda other: asked in other.devices)
    raise ExportError(
        f"{backend} builds for {own[0]} alone, got --device {asked}; leave --device out, or choose "
        f"--backend {' or '.join(others)}"
    )


def check_device(backend: str, device: str) -> None:
    """Refuse to build for a GPU that is not here, where it must be.

    Raises:
        BackendUnavailable: says why torch runs on no GPU, and what to do.
    """
    if device == "cuda" and builder(backend).cuda_compute:
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
    built, device = builder(backend), device_of(backend, device)
    computes = built.computes(device)
    if precision not in built.storage:
        raise ExportError(
            f"{backend} cannot store matrices in {precision}; choose --precision "
            f"{' or '.join(built.storage)}{_others(lambda other: precision in other.storage)}"
        )
    chosen = compute or (precision if precision in computes else computes[0])
    if chosen not in computes:
        raise ExportError(
            f"{backend} cannot compute in {chosen} here; choose --compute {computes[0]}"
            f"{_others(lambda other: chosen in other.compute)}"
        )
    return Types(precision, chosen)


def _others(can: Callable[[Builder], bool]) -> str:
    """The end of a sentence: which other backends can."""
    found = _backends(can)
    return f", or --backend {' or '.join(found)}" if found else ""


def _backends(can: Callable[[Builder], bool]) -> list[str]:
    """The backends that can, of those that are installed."""
    found = []
    for backend in BUILDERS:
        with suppress(MarnetError):  # its packages are not here
            if can(builder(backend)):
                found.append(backend)
    return found

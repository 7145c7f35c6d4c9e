"""This module defines what a backend can build, one `Builder` each in the file of its name beside
this one, and for which device and in which types it builds here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from marnet_export.build.types import Calibration, Product, Types
from marnet_export.lower.methods import Lowered
from marnet_sdk.backends import Backend, TextEncoder
from marnet_sdk.backends.torch_device import check_cuda
from marnet_sdk.errors import ExportError, MarnetError, requires_extra

# The module of each backend's `BUILDER`.
BUILDERS = {
    "aotinductor": "marnet_export.build.aotinductor.graphs",
    "onnxruntime": "marnet_export.build.onnxruntime",
    "openvino": "marnet_export.build.openvino.graphs",
    "tensorrt": "marnet_export.build.tensorrt.graphs",
    "torchscript": "marnet_export.build.torchscript",
}
ROUTES = ("onnx", "torch-tensorrt")  # to the engine of tensorrt's encoder; the first is usual


@dataclass(frozen=True, eq=False)
class Order:
    """A builder is told this beside the model and its types; each reads what it knows of."""

    device: str = "cpu"  # or "cuda", where it builds for this machine's processor or its GPU
    targets: Sequence[str] = ()  # where it builds for other machines: their GPUs; none: this one's
    buckets: Sequence[int] = ()  # where it builds for batch sizes: which; none: its own
    route: str = ROUTES[0]
    calibration: Calibration | None = None  # for int8


USUAL = Order()


class BuildEncoder(Protocol):
    def __call__(
        self, lowered: Lowered, pixels: Tensor, types: Types, payload: Path, order: Order = ..., /
    ) -> None:
        """Write the encoder; pixels [B >= 2, 3, H, W] is the example to trace."""
        ...


class BuildPart(Protocol):
    def __call__(
        self, lowered: Lowered, types: Types, payload: Path, order: Order = ..., /
    ) -> None:
        """Write a part behind the encoder, or the text encoder."""
        ...


class ReadProducts(Protocol):
    def __call__(
        self, payload: Path, types: Types, shape: tuple[int, int, int], /
    ) -> list[Product]:
        """List every matrix product of what was built, for images of a shape; or raise `Unread`."""
        ...


@dataclass(frozen=True)
class StandIn:
    """It runs here the graphs that were compiled for other machines."""

    open: Callable[[Path, int | None], Backend]  # a payload, threads
    open_text: Callable[[Path, int | None], TextEncoder]


@dataclass(frozen=True)
class HeadAlone:
    """It builds the head without a loop, for behind the native one."""

    build: Callable[[Lowered, Types, Path], None]
    products: Callable[[Path, Types], list[Product]]


@dataclass(frozen=True)
class Builder:
    """All that is known of a backend before and after it builds."""

    name: str
    storage: tuple[str, ...]  # types that it can store matrices in
    compute: tuple[str, ...]  # types that it can multiply the others in, the usual one first
    build_encoder: BuildEncoder
    build_refine: BuildPart  # the loop and the head
    build_text: BuildPart
    products: ReadProducts
    packages: tuple[str, ...]  # what its bundles depend on, as far as they are installed
    device: str = "cpu"  # what it builds for when it is not told
    cuda_compute: tuple[str, ...] = ()  # as `compute`, on this machine's GPU; none: not for that
    buckets: tuple[int, ...] = ()  # batch sizes that it builds for; none: any
    most_steps: int | None = None  # the longest loop that it builds; None: any
    check_loop: Callable[[Types], None] | None = None  # raises where the loop cannot be in these
    targets: Callable[[Path], Sequence[str]] | None = None  # what a payload was compiled for
    stand_in: StandIn | None = None  # of one that builds for other machines than this
    head: HeadAlone | None = None  # of one whose loop the native one can take the place of

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the devices that it builds for, the usual one first."""
        return (self.device, "cuda") if self.cuda_compute else (self.device,)

    def computes(self, device: str) -> tuple[str, ...]:
        """Return the types of products on a device, the usual one first."""
        return self.cuda_compute if device == "cuda" and self.cuda_compute else self.compute


def builder(backend: str) -> Builder:
    """Import what builds `backend`.

    Raises:
        MissingExtra: the packages that build it are not installed.
    """
    with requires_extra("export", "onnx", "onnxscript", "onnxruntime"):
        return import_module(BUILDERS[backend]).BUILDER


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
    """Refuse to build for a GPU that is not here, where it must be."""
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

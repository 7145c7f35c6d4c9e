"""Backends: one leaf file each, imported only when a bundle needs it.

A backend takes and returns NumPy arrays, so nothing of its framework reaches the caller. It runs
two graphs, the encoder, and the reverse loop with the head behind it, so that an image that meets
several noise samples is encoded once. `run` is both in one, for a backend that is faster so.
Axes: B batch, K noise samples, S steps, H hidden, C classes, D_v encoder features, D_f fused ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from marnet_sdk.alignment import WithAlignment, read_head
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import BackendUnavailable, BundleFormatError, InvalidInput
from marnet_sdk.noise.tables import Floats, Integers, Tables

IN_GRAPH = "in the graph"  # the loop of a backend that just calls its graphs
BACKENDS = {
    "aotinductor": "marnet_sdk.backends.aotinductor",
    "onnxruntime": "marnet_sdk.backends.onnxruntime",
    "openvino": "marnet_sdk.backends.openvino",
    "tensorrt": "marnet_sdk.backends.tensorrt",
    "torchscript": "marnet_sdk.backends.torchscript",
}
# The distributions that a backend computes with, one of which it needs.
PACKAGES = {
    "aotinductor": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-rtx"),
    "torchscript": ("torch",),
}


class DeviceRows(Protocol):
    """A batch of a caller that lies on the GPU already: rows of one size, one after another."""

    @property
    def address(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> DeviceRows: ...


@dataclass(frozen=True)
class RuntimeReport:
    """The way a backend runs, for whoever asks why it is as fast as it is."""

    device: str
    loop: str  # what runs the reverse loop, and why
    buckets: tuple[int, ...]  # batch sizes that exist; others are padded or split
    memory: dict[str, int] = field(default_factory=dict)  # bytes on the GPU by purpose
    captures: int = 0  # programs that were captured
    replays: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)  # plain runs by reason
    copies: int = 0  # batches on the device that were copied there and not read in place
    threads: int | None = None  # of the processor, that one call computes with; None on a GPU
    cpus: str = ""  # the CPUs that the process may use


class Backend(Protocol):
    """Runs the built graphs. May be called from several threads at once."""

    def encode(self, pixels: Floats) -> Floats:
        """Encode pixels [B, 3, height, width] to x_v [B, D_v]."""
        ...

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        """Refine x_v [B, D_v] to logits [B, K, C] and fused features [B, K, D_f]."""
        ...

    def run(self, pixels: Any, tables: Tables) -> tuple[Floats, Floats]:
        """Encode pixels [B, 3, height, width] and refine what comes out, in one call.

        `pixels` is a NumPy array, or what `device_rows` made of an array on the GPU.
        """
        ...

    def device_rows(self, array: Any) -> DeviceRows:
        """Take a caller's array on the GPU, float32 [B, 3, height, width], for `run`.

        Raises:
            InvalidInput: this backend reads the host's memory alone, or cannot read that array.
        """
        ...

    def report(self) -> RuntimeReport:
        """Tell how it runs."""
        ...


class InTwoCalls:
    """The rest of a `Backend` on the processor that has no faster way than its two graphs, one
    after the other."""

    def threads(self) -> int:
        """The number of threads that a call computes with."""
        return 1

    def run(self: Backend, pixels: Any, tables: Tables) -> tuple[Floats, Floats]:
        return self.refine(self.encode(pixels), tables)

    def device_rows(self, array: Any) -> DeviceRows:
        raise InvalidInput(
            f"this bundle's backend reads arrays in the host's memory, got {type(array).__name__} "
            "on another device; pass a NumPy array, as in pixels.cpu().numpy()"
        )

    def report(self) -> RuntimeReport:
        return RuntimeReport("cpu", IN_GRAPH, (), threads=self.threads(), cpus=str(cpus()))


TextEncoder = Callable[[Integers, Integers], Floats]  # ids and mask [B, L] -> x_s [B, D_s]


def open_backend(
    name: str, payload: Path, compute: str, threads: int | None, device: str | None = None
) -> Backend:
    """Load the built graphs in `payload`, and the alignment branch's head if it is there.

    Args:
        compute: type of the matrix products, as recorded in the manifest.
        threads: cores to use; None: as many as `cpus` says are worth having.
        device: "cpu" or "cuda"; None: cuda for tensorrt, cpu for all others.

    Raises:
        BundleFormatError: no such backend in this version.
        MissingExtra: its packages are not installed.
        BackendUnavailable: it does not run on that device, or not on this machine's.
    """
    leaf = _leaf(name, payload)
    return with_alignment(leaf.open_payload(payload, compute, threads, *_given(device)), payload)


def with_alignment(backend: Backend, payload: Path) -> Backend:
    """Let a backend answer without the loop, too, where `payload` has the head for it.

    Raises:
        BundleFormatError: the head is not what it should be.
    """
    head = read_head(payload)
    return backend if head is None else WithAlignment(backend, head)


def why_unavailable(name: str) -> str | None:
    """Tell why a backend cannot run on this machine, as far as that is known without loading it."""
    probe = getattr(_leaf(name, Path(name)), "why_unavailable", None)
    return probe() if probe else None


def open_text(
    name: str, payload: Path, compute: str, threads: int | None, device: str | None = None
) -> TextEncoder:
    """Load the built text encoder in `payload`; as `open_backend`."""
    return _leaf(name, payload).open_text(payload, compute, threads, *_given(device))


def check_device(backend: str, device: str, runs_on: str) -> None:
    """Refuse a device on which a backend does not run.

    Raises:
        BackendUnavailable
    """
    if device != runs_on:
        raise BackendUnavailable(
            f"{backend} runs on {runs_on}, got device {device!r}; leave device out, or export the "
            "bundle with another --backend"
        )


def _given(device: str | None) -> tuple[str, ...]:
    return () if device is None else (device,)


def _leaf(name: str, payload: Path) -> ModuleType:
    if name not in BACKENDS:
        raise BundleFormatError(
            f"{payload.parent}: backend {name!r} is unknown to this version of marnet, which has "
            f"{', '.join(sorted(BACKENDS))}; upgrade marnet or export the bundle again"
        )
    return import_module(BACKENDS[name])

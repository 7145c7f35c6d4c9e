"""The reverse loop as the native kernel runs it, in bundles that hold its layers.

A payload then has native_loop.safetensors and the graph of the head alone, beside the graph of
loop and head that every payload has. That one answers where the kernel's library is not there,
which is warned of once. It also runs more rows at once than those that the export found the kernel
faster for, unless the kernel is to run them all.
Axes: B batch, K noise samples, S steps, D feature.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from marnet_kernels.native import Kind, LoopLayer, LoopLayers, NativeLoop, why_missing
from marnet_kernels.reverse_sampler import to_bits
from marnet_sdk.backends import IN_GRAPH
from marnet_sdk.cpus import cpus
from marnet_sdk.errors import BundleFormatError, NativeLoopMissing
from marnet_sdk.noise.tables import Floats, Tables

__all__ = [
    "ANY_ROWS",
    "GRAPH",
    "LAYERS",
    "NATIVE",
    "Kind",
    "LoopLayer",
    "LoopLayers",
    "NativeLoop",
    "NativeRefine",
    "about_loop",
    "compile_library",
    "load_layers",
    "open_refine",
    "save_layers",
    "to_bits",
]
LAYERS = "native_loop.safetensors"
NATIVE, GRAPH = "native", "graph"  # what runs a bundle's loop
ANY_ROWS = 2**31 - 1  # the most rows of a loop that runs every batch

Head = Callable[[Floats, Floats], tuple[Floats, Floats]]  # x_v, x_CDR -> logits, features
_warned: set[str] = set()


class Refine(Protocol):
    """Loop and head, as `Backend.refine` runs them."""

    def __call__(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]: ...


def compile_library() -> str | None:
    """Compile the kernel's library where it is not there yet; why that cannot be, or None."""
    return why_missing(compile_it=True)


def save_layers(layers: LoopLayers, path: Path, most_rows: int) -> None:
    """Write native_loop.safetensors.

    Args:
        most_rows: of more (images times samples), the graph runs the loop.
    """
    arrays: dict[str, NDArray] = {"mean": layers.mean, "std": layers.std}
    about = {"most_rows": most_rows, "slope": layers.slope, "kinds": {}}
    for name, layer in layers.layers():
        about["kinds"][name] = layer.kind
        parts = {"weight": layer.weight, "bias": layer.bias, "scale": layer.scale}
        arrays |= {f"{name}.{part}": a for part, a in parts.items() if a is not None}
    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(ready, path, {"loop": json.dumps(about)})


def load_layers(path: Path) -> tuple[LoopLayers, int]:
    """The layers, and the most rows that they are for.

    Raises:
        BundleFormatError: it is not what `save_layers` writes.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["loop"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = {
            name: LoopLayer(
                kind,
                arrays[f"{name}.weight"],
                arrays.get(f"{name}.bias"),
                arrays.get(f"{name}.scale"),
            )
            for name, kind in about["kinds"].items()
        }
        slope, most_rows = float(about["slope"]), int(about["most_rows"])
        return LoopLayers(arrays["mean"], arrays["std"], **layers, slope=slope), most_rows
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise BundleFormatError(
            f"{path} does not hold the layers of a loop ({type(error).__name__}: {error}); export "
            "the bundle again"
        ) from error


def open_refine(
    payload: Path,
    threads: int | None,
    open_graph: Callable[[], Refine],
    open_head: Callable[[], Head],
) -> Refine:
    """Open what runs loop and head of a payload.

    It is the native loop where the payload has one and this machine the library, else the graph.

    Args:
        threads: cores to use; None: as many as `cpus` says are worth having.
        open_graph: loads the graph of both. open_head: loads that of the head.

    Raises:
        BundleFormatError: the layers are not what they should be.
    """
    if not (payload / LAYERS).exists():
        return open_graph()
    if reason := why_missing():
        _warn(reason)
        return open_graph()
    return NativeRefine(payload / LAYERS, threads, open_graph, open_head())


def about_loop(refine: Refine) -> str:
    """Say what runs the loop, for `RuntimeReport.loop`."""
    return refine.about() if isinstance(refine, NativeRefine) else IN_GRAPH


class NativeRefine:
    """Loop and head with the native loop. May be called from several threads at once."""

    def __init__(
        self, path: Path, threads: int | None, open_graph: Callable[[], Refine], head: Head
    ) -> None:
        layers, self.most_rows = load_layers(path)
        self.loop = NativeLoop(layers, threads or cpus().threads)
        self._head, self._open_graph = head, open_graph
        self._graph: Refine | None = None
        self._lock = Lock()

    def __call__(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        rows = len(x_v) * tables.bias.shape[2]
        if rows > self.most_rows:
            return self._graph_opened()(x_v, tables)
        return self._head(x_v, self.loop(x_v, tables.coefficients, tables.bias))

    def about(self) -> str:
        """Say with which instructions and how many threads it runs, and up to how many rows."""
        most = self.loop.threads(self.most_rows)
        how = f"native: {self.loop.instructions}, up to {most} thread{'s'[: most > 1]}"
        unbound = self.most_rows == ANY_ROWS
        return how if unbound else f"{how}; of more than {self.most_rows} rows the graph"

    def _graph_opened(self) -> Refine:
        """Loaded when it is first wanted: most processes never want it."""
        with self._lock:
            if self._graph is None:
                self._graph = self._open_graph()
            return self._graph


def _warn(reason: str) -> None:
    """Say once in a process that graphs stand in."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"the bundle's loop runs as a graph, which is slower: {reason}",
            NativeLoopMissing,
            stacklevel=4,
        )

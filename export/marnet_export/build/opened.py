"""This module opens again what was built."""

from __future__ import annotations

from pathlib import Path

from marnet_export.build.builder import StandIn, builder
from marnet_sdk.backends import (
    Backend,
    TextEncoder,
    open_backend,
    open_text,
    why_unavailable,
    with_alignment,
)


def open_built(backend: str, payload: Path, compute: str, device: str | None = None) -> Backend:
    """Open what was built as the SDK does; where this machine cannot run it, open the graphs that
    it was compiled from (`runs_here` tells).

    Args:
        device: that it was built for; None: what the backend builds for when it is not told.

    Raises:
        BackendUnavailable: neither can be run here.
    """
    if stand_in := _needed(backend):
        return with_alignment(stand_in.open(payload, None), payload)
    return open_backend(backend, payload, compute, None, device)


def open_built_text(
    backend: str, folder: Path, compute: str, threads: int | None, device: str | None = None
) -> TextEncoder:
    """Open the text encoder that was built; where this machine cannot run it, open the graph that
    it was compiled from.
    """
    if stand_in := _needed(backend):
        return stand_in.open_text(folder, threads)
    return open_text(backend, folder, compute, threads, device)


def runs_here(backend: str) -> bool:
    """Tell whether this machine runs what the backend builds, rather than builds it for others."""
    return _needed(backend) is None


def _needed(backend: str) -> StandIn | None:
    return builder(backend).stand_in if why_unavailable(backend) else None

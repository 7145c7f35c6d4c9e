"""Backends: one leaf file each, imported only when a bundle needs it.

A backend takes and returns NumPy arrays, so nothing of its framework reaches the caller.
Axes: B batch, S sampling steps, W carried state, H hidden, K classes, D_f fused features.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from marnet_sdk.errors import BundleFormatError
from marnet_sdk.trajectory import draw_trajectory, fold

Floats = NDArray[np.float32]

BACKENDS = {
    "onnxruntime": "marnet_sdk.backends.onnxruntime",
    "torchscript": "marnet_sdk.backends.torchscript",
}


@dataclass(frozen=True)
class Tables:
    """What the reverse-sampling loop reads: inputs of the graph, so one graph serves them all."""

    initial: Floats  # [1, W] the state that the chain starts from
    coefficients: Floats  # [S, 4] A, B, C, S of each step
    time_bias: Floats  # [S, H] W_t tau(t) + b_1
    noise: Floats  # [S, W] the noise of each step, folded into the carried state

    def named(self) -> dict[str, Floats]:
        """The tables by the names that the graphs use, in the order of their inputs."""
        return {
            "initial": self.initial,
            "coefficients": self.coefficients,
            "time_bias": self.time_bias,
            "noise": self.noise,
        }


def make_tables(
    plan_file: Path, *, seed: int, timesteps: tuple[int, ...], train_steps: int, width: int
) -> Tables:
    """Fold the noise trajectory of `seed` into the tables of a bundle's plan.

    plan.safetensors holds `coefficients`, `time_bias` and, where the loop carries the hidden
    state, `input_weight` (W_x [H, D]), which takes each noise vector there.
    """
    plan = load_file(plan_file)
    trajectory = draw_trajectory(seed, timesteps, train_steps, width)
    initial, noise = fold(trajectory, plan.get("input_weight"))
    return Tables(initial, plan["coefficients"], plan["time_bias"], noise)


class Backend(Protocol):
    """Runs the built graph. `run` may be called from several threads at once."""

    def run(self, pixels: Floats, tables: Tables) -> tuple[Floats, Floats]:
        """pixels [B, 3, height, width] -> logits [B, K] and fused features [B, D_f]."""
        ...


def open_backend(name: str, payload: Path, compute: str, threads: int | None) -> Backend:
    """Load the built graph in `payload`.

    Args:
        compute: type of the matrix products, as recorded in the manifest.
        threads: cores to use; None leaves the framework's default.

    Raises:
        BundleFormatError: no such backend in this version.
        MissingExtra: its packages are not installed.
    """
    if name not in BACKENDS:
        raise BundleFormatError(
            f"{payload.parent}: backend {name!r} is unknown to this version of marnet, which has "
            f"{', '.join(sorted(BACKENDS))}; upgrade marnet or export the bundle again"
        )
    return import_module(BACKENDS[name]).open_payload(payload, compute, threads)

"""The two ways in which cuda.bindings can fail, as errors that say what to do."""

import importlib
from typing import Any

INSTALL = 'pip install "marnet[cuda]"'


def load(library: str) -> Any:
    """Import cuda.bindings.<library>; where it is missing, RuntimeError names the line that
    installs it.
    """
    name = f"cuda.bindings.{library}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the package itself: an error from inside it must not pass for a missing install.
        if error.name not in {"cuda", "cuda.bindings", name}:
            raise
        raise RuntimeError(
            f"CUDA kernels need {name}, which is not installed: {INSTALL}"
        ) from error


def check(result: tuple[Any, ...], action: str) -> Any:
    """The value in a result tuple (status, *values), or RuntimeError with the action and status."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{action} failed: got {status.name}, expected success")
    return values[0] if len(values) == 1 else tuple(values)

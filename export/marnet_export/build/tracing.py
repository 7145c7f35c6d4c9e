"""This module holds what exporters have in common: texts to trace with, and their noise on a
terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch


def example_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [2, 5] to trace a text encoder with: two tensors, or they are taken for one."""
    ids = torch.ones(2, 5, dtype=torch.int64)
    return ids, ids.clone()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notes of the exporters that no user can act on off the terminal.

    They warn that TorchScript is deprecated, that transformers checks shapes in Python (other batch
    sizes are verified on the built bundle), and of optional packages that we do not use.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

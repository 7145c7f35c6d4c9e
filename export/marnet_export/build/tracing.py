"""This module holds what exporters have in common: what each graph takes and gives, and their noise
on a terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marnet_export.lower.methods import Lowered
from marnet_sdk.gpu.torch_stream import exact_float32

_LARGEST = 1 << 20  # of every size that is free
_LEAST = {"steps": 3}  # two of them before the last: torch would take a size of 1 for a fixed one


@dataclass(frozen=True, eq=False)
class Signature:
    """A graph takes and gives this.

    Free sizes of the examples differ from each other, so that none is mistaken for another.
    """

    # Name -> an example, and its sizes in order: a number, or the name of a free one.
    inputs: Mapping[str, tuple[Tensor, Sequence[int | str]]]
    outputs: Sequence[str]

    @property
    def example(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor, _ in self.inputs.values())

    def free(self, most: Mapping[str, int] | None = None) -> tuple[dict[int, Any], ...]:
        """The free sizes of every input by their axes, as `torch.export` has them.

        Args:
            most: the largest that some of them may be.
        """
        names = {size for _, sizes in self.inputs.values() for size in sizes}
        dims = {
            name: torch.export.Dim(
                re.sub(r"\W+", "_", name),
                min=_LEAST.get(name, 1),
                max=(most or {}).get(name, _LARGEST),
            )
            for name in names
            if isinstance(name, str)
        }
        return tuple(
            {axis: dims[size] for axis, size in enumerate(sizes) if isinstance(size, str)}
            for _, sizes in self.inputs.values()
        )


def encoder_signature(pixels: Tensor) -> Signature:
    """The encoder maps pixels [B, 3, H, W] to x_v. `pixels`, B >= 2, is what is traced."""
    return Signature({"pixels": (pixels, ("batch", *pixels.shape[1:]))}, ("x_v",))


def text_signature() -> Signature:
    """The text encoder maps ids and mask [B, L] to x_s: two tensors, or they are taken for one."""
    ids, sizes = torch.ones(2, 5, dtype=torch.int64), ("batch", "length")
    return Signature({"ids": (ids, sizes), "mask": (ids.clone(), sizes)}, ("x_s",))


def most_tokens(text: nn.Module) -> int | None:
    """The longest text that every encoder inside has positions for; None: none of them says."""
    configs = [getattr(module, "config", None) for module in text.modules()]
    found = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def refine_signature(lowered: Lowered, rows: int | str = "batch") -> Signature:
    """The loop and the head map x_v and the tables to logits and features.

    Args:
        rows: of noise, in the tables.
    """
    image, width = lowered.image_width, lowered.row_width
    bias = torch.zeros(4, rows if isinstance(rows, int) else 2, 5, width)
    inputs = {
        "x_v": (torch.zeros(2, image), ("batch", image)),
        "coefficients": (torch.zeros(4, 3), ("steps", 3)),
        "bias": (bias, ("steps", rows, "samples", width)),
    }
    return Signature(inputs, ("logits", "features"))


def head_signature(lowered: Lowered) -> Signature:
    """The head maps x_v and the estimate x_CDR to logits and features."""
    image, latent = lowered.image_width, lowered.latent_width
    inputs = {
        "x_v": (torch.zeros(2, image), ("batch", image)),
        "x_cdr": (torch.zeros(2, 3, latent), ("batch", "samples", latent)),
    }
    return Signature(inputs, ("logits", "features"))


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Trace without gradients, quietly, in exact float32: a traced convolution keeps for ever
    whether TF32 was allowed when it was traced.
    """
    with torch.no_grad(), quiet(), exact_float32():
        yield


@contextlib.contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keep notes of the exporters that no user can act on off the terminal.

    They warn that TorchScript is deprecated, that transformers checks shapes in Python (other batch
    sizes are verified on the built bundle), and of optional packages that we do not use.

    Args:
        more: names of other loggers that write errors alone.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", *more)]
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

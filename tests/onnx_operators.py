"""The exporter to ONNX looks up its operators once a process, not a second for each graph.

`torch.onnx.export` makes its table anew in each call, and has no public way to share one. So this
takes the place of a private name of torch. Where that is gone, or is something else, exports take
longer, and nothing else changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Share the table within the block, if this torch lets us."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        make = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return
    known = cache(make)

    def shared(**opset: int) -> Any:
        whole = known(**opset)
        if not isinstance(getattr(whole, "functions", None), dict):
            return make(**opset)
        own = copy.copy(whole)  # to which the caller may add operators
        own.functions = {name: [*found] for name, found in whole.functions.items()}
        return own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(shared))
        yield

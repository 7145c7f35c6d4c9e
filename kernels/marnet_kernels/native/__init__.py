"""The reverse-sampling loop on CPU cores: C++ compiled to one library, and its NumPy twin."""

from marnet_kernels.native.library import build, library, why_missing
from marnet_kernels.native.loop import (
    KINDS,
    Kind,
    LoopLayer,
    LoopLayers,
    NativeLoop,
    instruction_sets,
)
from marnet_kernels.native.twin import layer_reference, loop_reference

__all__ = [
    "KINDS",
    "Kind",
    "LoopLayer",
    "LoopLayers",
    "NativeLoop",
    "build",
    "instruction_sets",
    "layer_reference",
    "library",
    "loop_reference",
    "why_missing",
]

"""CUDA kernels of the sampling loop, with their NumPy twins.

Importing this package needs NumPy alone. Compiling a kernel needs NVRTC, and running one needs a
GPU and its driver: `pip install "marnet[cuda]"`. Device memory and streams are passed as plain
integers, so any framework's will do.
"""

from marnet_kernels.compile import TARGETS, Cubin, compile_cubin
from marnet_kernels.step_update import StepUpdate, StepUpdateArguments, step_update_reference

__all__ = [
    "TARGETS",
    "Cubin",
    "StepUpdate",
    "StepUpdateArguments",
    "compile_cubin",
    "step_update_reference",
]

"""The CUDA kernel of the sampling loop, with its NumPy twin.

Importing this package needs NumPy alone. Running a kernel needs a GPU and its driver, and compiling
one that was not shipped needs NVRTC: `pip install "marnet[cuda]"`. Device memory and streams are
passed as plain integers, so any framework's will do.
"""

from marnet_kernels.compile import TARGETS, Cubin, compile_cubin
from marnet_kernels.loader import DeviceInfo, current_device
from marnet_kernels.persistent import (
    ReverseSampler,
    ReverseSamplerArguments,
    Variant,
    choose_variant,
)

__all__ = [
    "TARGETS",
    "Cubin",
    "DeviceInfo",
    "ReverseSampler",
    "ReverseSamplerArguments",
    "Variant",
    "choose_variant",
    "compile_cubin",
    "current_device",
]

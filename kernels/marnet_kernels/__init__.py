"""CUDA kernels of preprocessing, the sampling loop and the head, with their NumPy twins.

Importing this package needs NumPy alone. Running a kernel needs a GPU and its driver, and compiling
one that was not shipped needs NVRTC: `pip install "marnet[cuda]"`. Device memory and streams are
passed as plain integers, so any framework's will do.
"""

from marnet_kernels.compile import TARGETS, Cubin, compile_cubin
from marnet_kernels.fuse_head import FuseHead, FuseHeadArguments
from marnet_kernels.loader import DeviceInfo, current_device
from marnet_kernels.persistent import (
    ReverseSampler,
    ReverseSamplerArguments,
    Variant,
    choose_variant,
)
from marnet_kernels.preprocess import PreprocessArguments, PreprocessKernel
from marnet_kernels.step_update import StepUpdate, StepUpdateArguments, step_update_reference

__all__ = [
    "TARGETS",
    "Cubin",
    "DeviceInfo",
    "FuseHead",
    "FuseHeadArguments",
    "PreprocessArguments",
    "PreprocessKernel",
    "ReverseSampler",
    "ReverseSamplerArguments",
    "StepUpdate",
    "StepUpdateArguments",
    "Variant",
    "choose_variant",
    "compile_cubin",
    "current_device",
    "step_update_reference",
]

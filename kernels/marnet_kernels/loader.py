"""Kernels into the CUDA context that is current, and what its device can do."""

from dataclasses import dataclass
from typing import Any

from marnet_kernels import _cuda
from marnet_kernels.compile import Cubin

_PLAIN_SHARED = 48 * 1024  # bytes of dynamic shared memory that every kernel may be launched with


@dataclass(frozen=True)
class DeviceInfo:
    """These properties of a device decide whether a kernel runs on it, and how."""

    capability: tuple[int, int]  # compute capability, (major, minor)
    multiprocessors: int
    shared_bytes: int  # that one block may have
    cooperative: bool  # whether it launches kernels whose blocks wait for each other


def current_device() -> DeviceInfo:
    """The device whose context is current. RuntimeError where none is."""
    driver = _cuda.load("driver")
    try:
        device = _cuda.check(driver.cuCtxGetDevice(), "cuCtxGetDevice")
    except RuntimeError as error:  # cuda.bindings raises one too, where there is no driver
        raise RuntimeError(
            f"CUDA kernels: got no current CUDA context ({error}), expected one; make one first, "
            "for example with torch.cuda.init() or cuda.core.Device().set_current()"
        ) from error

    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return _cuda.check(driver.cuDeviceGetAttribute(kind, device), f"reading {name}")

    return DeviceInfo(
        capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        cooperative=bool(attribute("COOPERATIVE_LAUNCH")),
    )


def load_function(cubin: Cubin, name: str, shared_bytes: int = 0) -> Any:
    """The kernel of this name as a CUfunction, for as long as the current context lives.

    Args:
        cubin: its machine code, for the device of the current context.
        name: of the `extern "C" __global__` function.
        shared_bytes: of dynamic shared memory that a launch will ask for.

    Raises:
        RuntimeError: no context, no such kernel, or a device without that much shared memory.
    """
    driver, check = _cuda.load("driver"), _cuda.check
    module = check(driver.cuModuleLoadData(cubin.code), f"loading {name} ({cubin.arch})")
    function = check(driver.cuModuleGetFunction(module, name.encode()), f"finding kernel {name}")
    if shared_bytes > _PLAIN_SHARED:
        kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(
            driver.cuFuncSetAttribute(function, kind, shared_bytes),
            f"asking for {shared_bytes} bytes of shared memory for {name}",
        )
    return function

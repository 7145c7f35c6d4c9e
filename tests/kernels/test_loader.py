"""Loading kernels, with a driver that only takes notes; and the device on a real one."""

from enum import IntEnum
from types import SimpleNamespace

import pytest

from marnet_kernels import Cubin, loader
from marnet_kernels.compile import arch_for
from marnet_kernels.loader import DeviceInfo, current_device, load_function

Status = IntEnum("Status", {"CUDA_SUCCESS": 0, "CUDA_ERROR_INVALID_CONTEXT": 201,
                            "CUDA_ERROR_NOT_FOUND": 500})  # fmt: skip
ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
    "COOPERATIVE_LAUNCH": 1,
}
CUBIN = Cubin(b"\x7fELF", "sm_90", 32, 0, "", "NVRTC 13.0")


class Driver:
    """The functions of cuda.bindings.driver that loading uses."""

    CUdevice_attribute = SimpleNamespace(
        **{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES}
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared bytes"
    )

    def __init__(self):
        self.set = []

    def cuCtxGetDevice(self):  # noqa: N802
        return Status.CUDA_SUCCESS, 0

    def cuDeviceGetAttribute(self, kind, device):  # noqa: N802
        return Status.CUDA_SUCCESS, ATTRIBUTES[kind]

    def cuModuleLoadData(self, code):  # noqa: N802
        return Status.CUDA_SUCCESS, code

    def cuModuleGetFunction(self, module, name):  # noqa: N802
        missing = name == b"missing"
        return (Status.CUDA_ERROR_NOT_FOUND if missing else Status.CUDA_SUCCESS), (module, name)

    def cuFuncSetAttribute(self, *what):  # noqa: N802
        self.set.append(what)
        return (Status.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(loader._cuda, "load", lambda _: driver)
    return driver


@pytest.mark.usefixtures("driver")
def test_the_device_is_described():
    assert current_device() == DeviceInfo((9, 0), 132, 232448, True)


def test_without_a_context_the_error_says_how_to_make_one(driver, monkeypatch):
    monkeypatch.setattr(driver, "cuCtxGetDevice", lambda: (Status.CUDA_ERROR_INVALID_CONTEXT, None))
    with pytest.raises(RuntimeError, match=r"INVALID_CONTEXT.*expected one; make one first"):
        current_device()


def test_a_kernel_is_found_by_name(driver):
    assert load_function(CUBIN, "twice") == (CUBIN.code, b"twice")
    assert driver.set == []


def test_more_shared_memory_than_every_kernel_may_have_is_asked_for(driver):
    load_function(CUBIN, "twice", shared_bytes=48 * 1024)
    assert driver.set == []
    function = load_function(CUBIN, "twice", shared_bytes=48 * 1024 + 1)
    assert driver.set == [(function, "shared bytes", 48 * 1024 + 1)]


@pytest.mark.usefixtures("driver")
def test_an_unknown_kernel_is_named():
    with pytest.raises(RuntimeError, match="finding kernel missing failed: got CUDA_ERROR_NOT_FOU"):
        load_function(CUBIN, "missing")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_described():
    device = current_device()
    assert arch_for(device.capability).startswith("sm_")
    assert device.multiprocessors > 0
    assert device.shared_bytes >= 48 * 1024
    assert device.cooperative

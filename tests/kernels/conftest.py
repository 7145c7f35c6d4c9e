"""Machines that tests run kernels on: the emulator, and a GPU where there is one."""

import ctypes
from importlib.resources import files

import numpy as np
import pytest
from emulate import Cpu

from marnet_kernels import compile_cubin, loader
from marnet_kernels.compile import arch_for


class Gpu:
    """Device memory and a stream, through the driver alone; freed at the end of the test."""

    GUARD = 64  # bytes after every array, which no kernel may touch

    def __init__(self, driver):
        self.driver, self.memory = driver, {}
        self.stream = self.do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def do(self, function, *args):
        status, *values = getattr(self.driver, function)(*args)
        assert int(status) == 0, f"{function}: {status.name}"
        return values[0] if values else None

    def empty(self, nbytes):
        """Address of nbytes in which every float is NaN."""
        address = int(self.do("cuMemAlloc", nbytes + self.GUARD))
        self.do("cuMemsetD8", address, 0xFF, nbytes + self.GUARD)
        self.do("cuCtxSynchronize")  # the stream of the tests does not wait for the default stream
        self.memory[address] = nbytes
        return address

    def put(self, array):
        address = self.empty(array.nbytes)
        self.fill(address, array)
        return address

    def fill(self, address, array):
        self.do("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        self.do("cuCtxSynchronize")

    def get(self, address, shape, dtype=np.float32):
        array = np.empty(shape, dtype)
        self.do("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)
        return array

    def wait(self):
        self.do("cuStreamSynchronize", self.stream)

    def launch(
        self, text, function, arguments, *, grid, block, shared=0, seed=0, cooperative=False
    ):
        """One launch of a kernel of this text, which lacks device.cuh, and its end.

        `seed` is for the emulator. `cooperative`: blocks wait for each other.
        """
        device = (files("marnet_kernels") / "csrc" / "device.cuh").read_text()
        cubin = compile_cubin(device + text, arch_for(loader.current_device().capability))
        loaded = loader.load_function(cubin, function, shared)
        x, y = (grid, 1) if isinstance(grid, int) else grid
        table = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        shape = (loaded, x, y, 1, block, 1, 1, shared, self.stream, ctypes.addressof(table))
        if cooperative:
            self.do("cuLaunchCooperativeKernel", *shape)
        else:
            self.do("cuLaunchKernel", *shape, 0)
        self.wait()

    def graph(self, enqueue):
        """What `enqueue` puts on the stream, captured; returns a function that replays it."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.do("cuStreamBeginCapture", self.stream, mode)
        enqueue()
        graph = self.do("cuStreamEndCapture", self.stream)
        executable = self.do("cuGraphInstantiate", graph, 0)
        return lambda: self.do("cuGraphLaunch", executable, self.stream)

    def check_guards_and_free(self):
        self.do("cuCtxSynchronize")
        for address, nbytes in self.memory.items():
            guard = self.get(address + nbytes, self.GUARD, np.uint8)
            assert (guard == 0xFF).all(), "a kernel wrote past the end of an array"
            self.do("cuMemFree", address)
        self.do("cuStreamDestroy", self.stream)


@pytest.fixture
def emulator():
    return Cpu()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    driver = pytest.importorskip(
        "cuda.bindings.driver", reason='the CUDA extra is optional: pip install "marnet[cuda]"'
    )
    try:
        found = int(driver.cuInit(0)[0]) == 0 and driver.cuDeviceGetCount()[1] > 0
    except RuntimeError:  # no driver library
        found = False
    if not found:
        pytest.skip("no CUDA device")
    context = driver.cuDevicePrimaryCtxRetain(0)[1]
    driver.cuCtxPushCurrent(context)
    gpu = Gpu(driver)
    yield gpu
    try:
        gpu.check_guards_and_free()
    finally:  # also behind a kernel that failed, which leaves nothing of its context
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(0)


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request):
    """A Cpu or a Gpu."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def nvrtc():
    pytest.importorskip(
        "cuda.bindings.nvrtc", reason='NVRTC is optional: pip install "marnet[cuda]"'
    )

"""A GPU that is played: the calls of cuda.bindings.driver that are used, on memory of the host.

Work that is enqueued on a stream runs at once, or is recorded while the stream captures and runs
when its graph is launched. `log` holds the name of every call in order.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.gpu.driver import Gpu

ALIGNMENT = 256
CONTEXT = 77


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK, INVALID = Status.CUDA_SUCCESS, Status.CUDA_ERROR_INVALID_VALUE
BROKEN = Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
Work = Callable[[], None]


class PlayedDriver:
    """Functions of the driver, each of which gives its status first."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory: dict[int, Any] = {}  # address -> the buffer around it, and its size
        self.pinned: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Work]] = {}
        self.recording: dict[int, list[Work]] = {}
        self.broken: set[int] = set()  # streams whose capture went wrong
        self.largest = 1 << 40  # bytes, of one allocation
        self.thread = threading.local()
        self.handles = count(5)

    def __getattr__(self, name: str) -> Any:
        """cuInit, cuStreamSynchronize and others that have nothing to do here."""
        if not name.startswith("cu"):
            raise AttributeError(name)
        values = {"cuDeviceGet": (0,), "cuDevicePrimaryCtxRetain": (CONTEXT,)}
        values["cuMemGetInfo"] = (1 << 30, 1 << 34)

        def call(*_: Any) -> tuple:
            self.log.append(name)
            return OK, *values.get(name, ())

        return call

    # --- contexts

    def current(self) -> list[int]:
        if not hasattr(self.thread, "stack"):
            self.thread.stack = []
        return self.thread.stack

    def cuCtxPushCurrent(self, context: int) -> tuple:  # noqa: N802
        self.current().append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple:  # noqa: N802
        return OK, self.current().pop()

    # --- memory

    def cuMemAlloc(self, size: int) -> tuple:  # noqa: N802
        self.log.append("cuMemAlloc")
        if not self.current() or size <= 0:
            return (INVALID, 0)
        if size > self.largest:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, 0)
        buffer = ctypes.create_string_buffer(size + ALIGNMENT)
        ctypes.memset(buffer, 0xFF, size + ALIGNMENT)  # NaN, as what others left may be
        address = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = buffer, size
        return OK, address

    def cuMemFree(self, address: int) -> tuple:  # noqa: N802
        self.log.append("cuMemFree")
        return (OK if self.current() and self.memory.pop(address, None) else INVALID,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple:  # noqa: N802
        self.log.append("cuMemHostAlloc")
        buffer = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cuMemFreeHost(self, address: int) -> tuple:  # noqa: N802
        self.log.append("cuMemFreeHost")
        return (OK if self.pinned.pop(address, None) else INVALID,)

    def holds(self, address: int, size: int) -> bool:
        """Whether these bytes lie in one allocation."""
        return any(
            start <= address and address + size <= start + given
            # A copy, in one go: a collection of garbage on the way frees memory.
            for start, (_, given) in self.memory.copy().items()
        )

    def array(self, address: int, shape: tuple[int, ...], kind: Any = ctypes.c_float) -> np.ndarray:
        """What lies at an address of the GPU."""
        assert self.holds(address, int(np.prod(shape)) * ctypes.sizeof(kind))
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), shape)

    # --- streams

    def cuStreamCreate(self, flags: int) -> tuple:  # noqa: N802
        assert flags == 1, "CU_STREAM_NON_BLOCKING"
        self.log.append("cuStreamCreate")
        self.streams.add(handle := next(self.handles))
        return OK, handle

    def cuStreamDestroy(self, stream: int) -> tuple:  # noqa: N802
        self.streams.discard(stream)
        return (OK,)

    def enqueue(self, stream: int, work: Work) -> None:
        assert stream in self.streams, "a stream that there is"
        if stream in self.recording:
            self.recording[stream].append(work)
        else:
            work()

    def _copy(self, name: str, to: int, source: int, size: int, stream: int, fits: bool) -> tuple:
        self.log.append(name)
        if not self.current() or not fits:
            return (INVALID,)
        self.enqueue(stream, lambda: ctypes.memmove(to, source, size) and None)
        return (OK,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int):  # noqa: N802
        fits = self.holds(to, size)
        return self._copy("cuMemcpyHtoDAsync", to, source, size, stream, fits)

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int):  # noqa: N802
        fits = self.holds(source, size)
        return self._copy("cuMemcpyDtoHAsync", to, source, size, stream, fits)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int):  # noqa: N802
        fits = self.holds(source, size) and self.holds(to, size)
        return self._copy("cuMemcpyDtoDAsync", to, source, size, stream, fits)

    def cuMemsetD8Async(self, to: int, value: int, size: int, stream: int):  # noqa: N802
        self.log.append("cuMemsetD8Async")
        if not self.current() or not self.holds(to, size):
            return (INVALID,)
        self.enqueue(stream, lambda: ctypes.memset(to, value, size) and None)
        return (OK,)

    # --- captured graphs

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple:  # noqa: N802
        self.log.append("cuStreamBeginCapture")
        self.recording[stream] = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple:  # noqa: N802
        self.log.append("cuStreamEndCapture")
        work = self.recording.pop(stream)
        if stream in self.broken:
            return (BROKEN, 0)
        self.graphs[handle := next(self.handles)] = work
        return OK, handle

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple:  # noqa: N802
        self.graphs[handle := next(self.handles)] = self.graphs[graph]
        return OK, handle

    def cuGraphDestroy(self, graph: int) -> tuple:  # noqa: N802
        return (OK if self.graphs.pop(graph, None) is not None else INVALID,)

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple:  # noqa: N802
        self.log.append("cuGraphLaunch")
        assert self.current(), "a context that is current"
        assert stream in self.streams
        for work in self.graphs[graph]:
            work()
        return (OK,)


def played_array(driver: PlayedDriver, values: np.ndarray, offset: int = 0) -> Any:
    """An array of another library in the played GPU's memory, as the CUDA array interface has it.

    Args:
        offset: bytes from the start of an allocation.
    """
    driver.current().append(CONTEXT)
    status, address = driver.cuMemAlloc(values.nbytes + offset)
    driver.current().pop()
    assert status == OK
    values = np.ascontiguousarray(values)
    ctypes.memmove(address + offset, values.ctypes.data, values.nbytes)
    interface = {
        "shape": values.shape,
        "typestr": values.dtype.str,
        "data": (address + offset, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    return SimpleNamespace(__cuda_array_interface__=interface)


# --- and a real one


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def real_gpu() -> Gpu:
    """The GPU of this machine; without one, the test is skipped."""
    if not has_driver():
        pytest.skip("no CUDA device on this machine")
    try:
        return Gpu("cuda")
    except BackendUnavailable as error:
        pytest.skip(f"no CUDA device on this machine ({error})")

"""The calls of the CUDA driver that captured programs are made of, and a plan of their memory.

Nothing of CUDA is imported before a `Gpu` is made. What a `Gpu` hands out (streams, memory, graphs)
is given back when it is collected.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput, requires_extra

ALIGNMENT = 256  # bytes; what cuMemAlloc itself gives, and more than any kernel here asks for
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with the default stream
# The stricter modes forbid this thread (or all) to free memory meanwhile, which a collection of
# garbage does whenever it likes.
_CAPTURE_MODE = "CU_STREAM_CAPTURE_MODE_RELAXED"
# After a memory, launch or hardware error of a kernel the driver answers everything with it, for as
# long as the process lives: CUDA_ERROR_ECC_UNCORRECTABLE, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, ASSERT,
# and HARDWARE_STACK_ERROR to LAUNCH_FAILED.
_FATAL = frozenset((214, 700, 702, 710, *range(714, 720)))
_END = "; nothing runs on this GPU in this process any more: start it again"


# --- what needs no GPU


class MemoryPlan:
    """The places of named buffers in one allocation."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Lay buffers one after another.

        Args:
            sizes: bytes by name, in the order in which they lie.

        Raises:
            InferenceError: a size below 1.
        """
        self.sizes, self.offsets, self.total = dict(sizes), {}, 0
        for name, size in self.sizes.items():
            if size < 1:
                raise InferenceError(f"{name}: got {size} bytes of GPU memory, expected at least 1")
            self.offsets[name] = self.total
            self.total += -(-size // ALIGNMENT) * ALIGNMENT

    def addresses(self, base: int) -> dict[str, int]:
        """The address of every buffer, in an allocation that starts at `base`, a multiple of 256.

        Raises:
            InferenceError: it does not start at one.
        """
        if base <= 0 or base % ALIGNMENT:
            raise InferenceError(
                f"got GPU memory at {base:#x}, expected a multiple of {ALIGNMENT}; allocate it "
                "with cuMemAlloc"
            )
        return {name: base + offset for name, offset in self.offsets.items()}


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Rows of a caller's array on the GPU, float32 and C-contiguous. Keeps that array alive."""

    address: int
    shape: tuple[int, ...]
    owner: Any
    gpu: Gpu

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        start, stop, _ = rows.indices(len(self))
        shape = (max(stop - start, 0), *self.shape[1:])
        return replace(self, address=self.address + start * self.row_bytes, shape=shape)

    @property
    def row_bytes(self) -> int:
        return 4 * prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return len(self) * self.row_bytes

    def order_before(self, stream: Stream | int) -> None:
        """Make what is enqueued on a stream from now on wait for whoever writes this array."""
        _strided_view(self.owner, stream)

    def numpy(self) -> NDArray[np.float32]:
        """A copy in the host's memory."""
        result = np.empty(self.shape, np.float32)
        with self.gpu.current():
            stream = self.gpu.make_stream()
            self.order_before(stream)
            self.gpu.download(result, self.address, stream)
            self.gpu.wait(stream)
        return result


def device_array(gpu: Gpu, array: Any, shape: tuple[int, ...], stream: Stream | int) -> DeviceArray:
    """Take what another library holds on the GPU, without a copy: an array of torch, cupy, jax or
    any other that speaks DLPack or the CUDA array interface.

    Args:
        shape: of one row.
        stream: what its library is told to make wait for the array's writers.

    Raises:
        InvalidInput: it is not float32 [rows, *shape], C-contiguous, on this GPU.
        MissingExtra: cuda-core is not installed.
    """
    with requires_extra(gpu.extra, "cuda"):
        try:
            view = _strided_view(array, stream)
        except (BufferError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise InvalidInput(
                f"got {type(array).__name__}, which is no array on a GPU that other libraries may "
                f"read ({error}); pass a NumPy array, or detach it, as in pixels.detach()"
            ) from error
    if not view.is_device_accessible or view.device_id != gpu.ordinal:
        where = f"GPU {view.device_id}" if view.is_device_accessible else "the host"
        raise InvalidInput(
            f"got an array on {where}, expected GPU {gpu.ordinal}, on which the bundle runs; copy "
            "it there, or pass a NumPy array"
        )
    expected = f"float32 [B, {', '.join(map(str, shape))}]"
    got = tuple(view.shape)
    if view.dtype != np.float32 or len(got) != 1 + len(shape) or got[1:] != shape:
        raise InvalidInput(f"got an array on the GPU of {view.dtype} {got}, expected {expected}")
    if not _is_contiguous(got, view.strides):
        raise InvalidInput(
            f"got an array on the GPU with strides {tuple(view.strides)}, expected its rows one "
            "after another; make a copy that is, as in pixels.contiguous()"
        )
    return DeviceArray(int(view.ptr), got, array, gpu)


def _strided_view(array: Any, stream: Stream | int) -> Any:
    from cuda.core.utils import StridedMemoryView  # pyright: ignore[reportMissingImports]

    return StridedMemoryView.from_any_interface(array, stream_ptr=int(stream))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    """Tell whether rows lie one after another; strides are in elements, None: they do."""
    if strides is None or 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# --- the GPU


class Gpu:
    """The calls of the CUDA driver that are needed, on the primary context of a GPU.

    TensorRT's own calls use that context too, and so do those of other libraries in the process.
    """

    def __init__(self, extra: str, ordinal: int = 0) -> None:
        """Start the driver and take the GPU's primary context.

        Args:
            extra: of marnet, which installs cuda-bindings with whatever else is needed.

        Raises:
            MissingExtra: cuda-bindings is not installed.
            BackendUnavailable: there is no driver, or no such GPU.
        """
        with requires_extra(extra, "cuda"):
            from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
        self.driver, self.extra, self.ordinal = driver, extra, ordinal
        try:
            self.call("cuInit", 0)
            device = self.call("cuDeviceGet", ordinal)
            self._context = self.call("cuDevicePrimaryCtxRetain", device)
        except InferenceError as error:
            raise BackendUnavailable(str(error)) from error

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; returns what it gives beside its status.

        Raises:
            InferenceError: the driver answers with an error.
        """
        try:
            status, *values = getattr(self.driver, name)(*arguments)
        except RuntimeError as error:  # cuda.bindings finds no such function to call
            raise InferenceError(f"the CUDA driver cannot be asked for {name}: {error}") from error
        if int(status) != 0:
            end = _END if int(status) in _FATAL else ""
            raise InferenceError(f"the CUDA driver answers {name} with {status.name}{end}")
        return values[0] if len(values) == 1 else tuple(values)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context the calling thread's, and leave the thread as it was."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def memory_info(self) -> tuple[int, int]:
        """The bytes that are free, and those that there are."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def make_stream(self) -> Stream:
        return Stream(self, self.call("cuStreamCreate", _NON_BLOCKING))

    def wait(self, stream: Stream | int) -> None:
        """Wait until all that was enqueued is done."""
        self.call("cuStreamSynchronize", int(stream))

    def allocate(self, size: int) -> Memory:
        """Allocate `size` bytes on the GPU."""
        return Memory(self, int(self.call("cuMemAlloc", size)), size)

    def pinned(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array in page-locked memory of the host, which the GPU itself reads and writes."""
        size = 4 * prod(shape)
        address = int(self.call("cuMemHostAlloc", size, 0))
        memory = (ctypes.c_byte * size).from_address(address)
        self.release_with(memory, "cuMemFreeHost", address)
        return np.frombuffer(memoryview(memory), np.float32).reshape(shape)

    def upload(self, address: int, array: NDArray, stream: Stream | int) -> None:
        """Enqueue a copy from the host; the array must stay as it is until that is done."""
        source = array.ctypes.data
        self.call("cuMemcpyHtoDAsync", address, source, array.nbytes, int(stream))

    def download(self, array: NDArray, address: int, stream: Stream | int) -> None:
        """Enqueue a copy to the host."""
        self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, int(stream))

    def copy(self, to: int, source: int, size: int, stream: Stream | int) -> None:
        """Enqueue a copy on the GPU."""
        self.call("cuMemcpyDtoDAsync", to, source, size, int(stream))

    def clear(self, memory: Memory, stream: Stream | int) -> None:
        """Enqueue zeros for all of it."""
        self.call("cuMemsetD8Async", memory.address, 0, memory.size, int(stream))

    def capture(self, stream: Stream | int, work: Callable[[], None]) -> Graph:
        """Record what `work` enqueues on the stream, without running it.

        Raises:
            InferenceError: something of it cannot be captured.
        """
        mode = getattr(self.driver.CUstreamCaptureMode, _CAPTURE_MODE)
        self.call("cuStreamBeginCapture", int(stream), mode)
        try:
            work()
        except BaseException:
            with suppress(InferenceError):  # it says again that the capture is broken
                self.call("cuGraphDestroy", self.call("cuStreamEndCapture", int(stream)))
            raise
        template = self.call("cuStreamEndCapture", int(stream))
        try:
            graph = Graph(self, self.call("cuGraphInstantiate", template, 0))
        finally:
            self.call("cuGraphDestroy", template)
        self.call("cuGraphUpload", graph.handle, int(stream))  # else the first launch would
        return graph

    def launch(self, graph: Graph, stream: Stream | int) -> None:
        """Enqueue all that was captured."""
        self.call("cuGraphLaunch", graph.handle, int(stream))

    def release_with(self, owner: Any, name: str, handle: Any) -> None:
        """Call a function of the driver with the handle when its owner is collected."""
        # When the process ends, the driver may be gone before; it frees everything then.
        weakref.finalize(owner, _release, self, name, handle).atexit = False


def _release(gpu: Gpu, name: str, handle: Any) -> None:
    with suppress(Exception), gpu.current():
        gpu.call(name, handle)


class Stream:
    """A queue of the GPU, whose work runs in order."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self.handle = handle
        gpu.release_with(self, "cuStreamDestroy", handle)

    def __int__(self) -> int:
        return int(self.handle)


class Memory:
    """An allocation on the GPU."""

    def __init__(self, gpu: Gpu, address: int, size: int) -> None:
        self.address, self.size = address, size
        gpu.release_with(self, "cuMemFree", address)


class Graph:
    """Captured work."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self.handle = handle
        gpu.release_with(self, "cuGraphExecDestroy", handle)

"""The calls of torch.cuda that captured programs are made of, on one stream, and exact float32.

Nothing else in the SDK calls torch.cuda to copy, to wait or to capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from marnet_sdk.backends.torch_device import gpu_name
from marnet_sdk.errors import InferenceError, one_line
from marnet_sdk.noise.tables import Floats, Integers

_EXACT = Lock()  # held to change the process's settings, not while they are as they should be
_exact_users: list[Callable[[], None]] = []  # of each one inside, what puts the settings back


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 factors keep all their bits: no TF32, which convolutions use.

    These are settings of the process. They are read when work is enqueued, so what was captured
    needs them no longer. Any number of threads may be inside at once: the first changes the
    settings, and the last puts them back.
    """
    with _EXACT:
        _exact_users.append(_exact_users[0] if _exact_users else _set_exact())
    try:
        yield
    finally:
        with _EXACT:
            put_back = _exact_users.pop()
            if not _exact_users:
                put_back()


def _set_exact() -> Callable[[], None]:
    """Change the settings; returns what puts them back."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    newer = (cudnn.conv, cudnn.rnn, matmul)
    # torch can be told in an older and a newer way, and answers with an error where the two
    # differ: where a caller uses the newer one, the older one cannot be asked.
    tf32, precision = _ask(lambda: cudnn.allow_tf32), _ask(torch.get_float32_matmul_precision)
    before = [setting.fp32_precision for setting in newer]

    def put_back() -> None:
        _tell_older(tf32, precision)
        for setting, value in zip(newer, before, strict=True):
            setting.fp32_precision = value

    try:
        _tell_older(None if tf32 is None else False, precision and "highest")
        for setting in newer:
            setting.fp32_precision = "ieee"
    except BaseException:
        put_back()
        raise
    return put_back


def _ask(question: Callable[[], Any]) -> Any:
    """Ask torch; None: it does not answer."""
    try:
        return question()
    except RuntimeError:
        return None


def _tell_older(tf32: bool | None, precision: str | None) -> None:
    import torch

    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


class Cuda:
    """The calls of torch.cuda that are needed, on one stream: what is enqueued runs in order."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def name(self) -> str:
        target, name = gpu_name()
        return f"{name} ({target})"

    @property
    def stream(self) -> int:
        """The driver's handle."""
        return self._stream.cuda_stream

    @contextmanager
    def current(self) -> Iterator[None]:
        """Send the thread's work to this stream within the block."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def follow_caller(self) -> None:
        """Make what is enqueued from now on wait for what the calling thread's stream has to do."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def zeros(self, *shape: int) -> Any:
        import torch

        return torch.zeros(shape, device=self.device)

    def pinned(self, *shape: int) -> Any:
        """Memory of the host that the GPU can read and write while the host goes on."""
        import torch

        return torch.zeros(shape, pin_memory=True)

    def at(self, address: int, shape: Sequence[int]) -> Any:
        """The float32 tensor that a caller keeps at an address."""
        import torch

        return torch.as_tensor(_Array(address, tuple(shape)), device=self.device)

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, array: Floats | Integers) -> Any:
        return as_tensor(array).to(self.device)

    def download(self, tensor: Any) -> Floats:
        """Waits until it is there."""
        return tensor.cpu().numpy().copy()

    def capture(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], None], Any]:
        """Capture `run`: what replays it, and the tensors that it then writes to.

        Raises:
            InferenceError: torch cannot capture it; says why.
        """
        import torch

        # cuBLAS's own memory must lie in the graph's pool: who clears it elsewhere in the process
        # (torch.compile does) would give away what the graph writes to.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        clear()
        graph = torch.cuda.CUDAGraph()
        try:
            # The stricter modes forbid to free memory meanwhile, which a collection of garbage
            # does whenever it likes.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"
            ):
                outputs = run()
        except RuntimeError as error:
            self._leave_pool()
            raise InferenceError(f"torch cannot capture a graph: {first_cause(error)}") from error
        finally:
            clear()
        return graph.replay, outputs

    def _leave_pool(self) -> None:
        """End a capture that was broken off, which some versions of torch never do."""
        import torch

        with suppress(Exception):  # others have
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)  # type: ignore[attr-defined]
        self._pool = torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def reserved(self) -> int:
        """The bytes that torch holds on the GPU in this process, for everybody."""
        import torch

        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True)
class _Array:
    """Memory on the GPU, as libraries tell each other of it."""

    address: int
    shape: tuple[int, ...]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = {"data": (self.address, False), "strides": None, "version": 3}
        return {"shape": self.shape, "typestr": "<f4"} | place


def as_tensor(array: np.ndarray) -> Any:
    import torch

    # torch warns of arrays that it must not write to, though nothing here writes to them.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def nbytes_of(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def first_cause(error: BaseException) -> str:
    """Tell in one line what came before the errors that came of it.

    A capture that is broken off fails once more when it is ended, which tells nothing.
    """
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)


@dataclass(frozen=True, eq=False)
class Rows:
    """A caller's tensor on the GPU, as `marnet_sdk.gpu.captured.DeviceRows`."""

    tensor: Any  # float32 [B, 3, height, width], contiguous

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: slice, /) -> Rows:
        return Rows(self.tensor[rows])

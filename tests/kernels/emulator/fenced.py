"""Memory in which a read beyond the end of an array ends the process.

The emulator sees writes outside of an array, but no reads. A GPU may or may not: the next
allocation often follows at once.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from emulate import Cpu
from numpy.typing import NDArray

_PROT_NONE = 0


class Fenced(Cpu):
    """Arrays whose last 16 bytes are the last of a page, before one that nobody may touch."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: list[Any] = []

    def empty(self, nbytes: int) -> int:
        """Address of nbytes in which every float is NaN."""
        room = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, room + mmap.PAGESIZE)
        pages.write(b"\xff" * room)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        libc = ctypes.CDLL(None, use_errno=True)
        fence = ctypes.c_void_p(start + room)
        if libc.mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._pages.append(pages)
        return start + room - -(-nbytes // 16) * 16

    def put(self, array: NDArray[Any]) -> int:
        address = self.empty(array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

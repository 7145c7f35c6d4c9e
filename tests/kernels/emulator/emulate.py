"""Run a kernel's source on the CPU, on NumPy arrays, as if it were launched on a GPU.

Needs g++ alone. `emulator.h` says what is emulated and what is not.

    kernel = emulate("reverse_sampler", options)
    kernel.launch("reverse_sampler", parameters, grid=(32, 1), block=256, shared=bytes)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from marnet_kernels.compile import portable_source

FOLDER = Path(__file__).parent
GUARD_BYTES = 256  # before and after an array
GUARD = 0xA5
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-fno-strict-aliasing")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
# Memory of `guarded`, with the first byte of the array in it and the one after its last.
_guarded: list[tuple[weakref.ref[NDArray[np.uint8]], int, int]] = []


class Shape(ctypes.Structure):
    """`struct Shape` of emulator.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "block", "shared_bytes")),
        ("seed", ctypes.c_uint64),
    )


class Emulated:
    """A kernel's source, built for the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        function: str,
        arguments: ctypes.Structure,
        *,
        grid: int | tuple[int, int],
        block: int,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Run one launch to its end.

        Args:
            function: name of the kernel.
            arguments: its one argument; pointers in it are addresses of arrays of this process.
            grid: blocks, (x, y) or x alone. All of them are resident at once.
            block: threads of a block.
            shared: bytes of shared memory of a block, all NaN at the start.
            seed: 0 runs blocks, warps and lanes in order. Any other changes the order, and stops
                threads at loads and stores, so that what depends on the order shows.

        Raises:
            RuntimeError: a deadlock, a misaligned address, a write outside of shared memory or
                of an array from `guarded`.
        """
        x, y = (grid, 1) if isinstance(grid, int) else grid
        entry = getattr(self._library, f"launch_{function}")
        entry.restype = ctypes.c_char_p
        shape = Shape(x, y, block, shared, seed)
        size = ctypes.c_uint64(ctypes.sizeof(arguments))
        error = entry(ctypes.byref(arguments), size, ctypes.byref(shape))
        if error is not None:
            raise RuntimeError(f"{function}: {error.decode()}")
        _check_guards(function)


def emulate(name: str, options: Sequence[str] = ()) -> Emulated:
    """csrc/NAME.cu with these -D options; others, which are for a GPU's compiler, are left out."""
    return emulate_text(portable_source(name), options)


def emulate_text(text: str, options: Sequence[str] = ()) -> Emulated:
    """CUDA C++ source, without csrc/device.cuh. Skips the test where g++ is missing."""
    return _load(text, tuple(option for option in options if option.startswith("-D")))


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy, aligned as cuMemAlloc does, with bytes around it that every launch checks."""
    memory = np.full(array.nbytes + 3 * GUARD_BYTES, GUARD, np.uint8)
    start = GUARD_BYTES + -memory.ctypes.data % GUARD_BYTES
    end = start + array.nbytes
    copy = memory[start:end].view(array.dtype).reshape(array.shape)
    copy[...] = array
    _guarded.append((weakref.ref(memory), start, end))
    return copy


class Cpu:
    """Guarded memory of this process, with the methods that a test's GPU has (conftest.py)."""

    def __init__(self) -> None:
        self._memory: dict[int, NDArray[Any]] = {}

    def empty(self, nbytes: int) -> int:
        """Address of nbytes in which every float is NaN."""
        return self._keep(guarded(np.full(nbytes, 0xFF, np.uint8)))

    def put(self, array: NDArray[Any]) -> int:
        return self._keep(guarded(array))

    def get(
        self, address: int, shape: tuple[int, ...], dtype: DTypeLike = np.float32
    ) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def launch(
        self,
        text: str,
        function: str,
        arguments: ctypes.Structure,
        *,
        cooperative: bool = False,
        **how: Any,
    ) -> None:
        """`emulate_text(text).launch`, where every launch is cooperative."""
        emulate_text(text).launch(function, arguments, **how)

    def wait(self) -> None:
        pass  # a launch returns when it has ended

    def _keep(self, array: NDArray[Any]) -> int:
        self._memory[array.ctypes.data] = array
        return array.ctypes.data


def _check_guards(function: str) -> None:
    _guarded[:] = [entry for entry in _guarded if entry[0]() is not None]
    for reference, start, end in _guarded:
        memory = reference()
        if memory is None:
            continue
        for part, offset in ((memory[:start], -start), (memory[end:], end - start)):
            wrong = np.flatnonzero(part != GUARD)
            if len(wrong):
                part[:] = GUARD  # tell it once
                raise RuntimeError(
                    f"{function}: it wrote to byte {wrong[0] + offset} of an array of"
                    f" {end - start} bytes; {len(wrong)} bytes outside of it have changed"
                )


@functools.cache
def _load(text: str, options: tuple[str, ...]) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator of kernels needs g++, which is not installed")
    scheduler = (FOLDER / "emulator.cpp").read_text()
    of_scheduler = tuple(option for option in options if option == "-DPORTABLE_SWITCH")
    built = _build(compiler, scheduler, (*of_scheduler, "-c"), ".o")
    return Emulated(_build(compiler, _program(text), (*options, "-shared"), ".so", built))


def _build(compiler: str, text: str, options: tuple[str, ...], suffix: str, *objects: Path) -> Path:
    """What g++ makes of a program and of objects, kept in the cache by content."""
    header = (FOLDER / "emulator.h").read_text()
    parts = [header, text, *_FLAGS, *options, suffix, *(built.name for built in objects)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256("\0".join(parts).encode() + version).hexdigest()[:32]
    kept = _cache() / f"{key}{suffix}"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        program, built = Path(folder) / "kernel.cpp", Path(folder) / "built"
        program.write_text(text)
        command = [compiler, *_FLAGS, *options, f"-I{FOLDER}", program, *objects, "-o", built]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ refuses the kernel for the emulator:\n{done.stderr}")
        built.replace(kept)  # another process sees the whole file or none
    return kept


def _program(text: str) -> str:
    """The source with a C function for each of its kernels, which ctypes can call."""
    names = _KERNEL.findall(text)
    if not names:
        raise ValueError("source: got none, expected at least one __global__ void function")
    entries = "".join(
        f"""
extern "C" __attribute__((visibility("default"))) const char* launch_{name}(
    const void* arguments, uint64_t bytes, const emulator::Shape& shape) {{
    return emulator::launch({name}, arguments, bytes, shape);
}}
"""
        for name in names
    )
    return f'#include "emulator.h"\n{text}\n{entries}'


@functools.cache
def _cache() -> Path:
    """Kept from run to run; not below $MARNET_CACHE, which tests point elsewhere."""
    folder = Path.home() / ".cache" / "marnet" / "emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="marnet-emulator-"))
    return folder

"""CUDA source -> machine code (cubin): shipped with the package, or kept in a cache, or from NVRTC.

The package ships the code of the common kernels (marnet_kernels.ship), and they run without NVRTC.
All others are compiled where they run, once, and kept in the user's cache. Both are found by a key
of the content, so a changed source or option is never answered with old code.

Neither a GPU nor a driver is needed. Machine code is kept rather than PTX: a driver older than
NVRTC refuses newer PTX, but runs machine code made by any NVRTC of its own major version.
"""

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from marnet_kernels import _cuda

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""The kernels are built for these. Code for sm_XY runs on X.Y and on later GPUs of the same X."""

SHIPPED = Path(__file__).parent / "cubins"
"""The folder of the machine code from `marnet_kernels.ship`; some wheels lack it."""

_FORMAT = 2  # part of the key: raise it when the layout of a cache entry changes
_INCLUDES = ("-I", "--include-path", "-include", "--pre-include")


@dataclass(frozen=True)
class Cubin:
    """Machine code and what it costs."""

    code: bytes
    arch: str
    registers: int  # per thread, the largest of the kernels inside
    spill_bytes: int  # stores and loads to local memory, all kernels together
    log: str  # what the compiler said
    compiler: str  # name and version


def source(name: str) -> str:
    """Return the one text that is compiled: csrc/NAME.cu after csrc/device.cuh.

    `compile_cubin` refuses include paths, because its key covers the source alone.
    """
    return _text("device.cuh") + portable_source(name)


def portable_source(name: str) -> str:
    """The same without csrc/device.cuh, which holds all that is written in PTX."""
    return _text(f"{name}.cu")


def _text(file: str) -> str:
    # With the line directive, compilers name the file and its own line numbers in their messages.
    text = (files("marnet_kernels") / "csrc" / file).read_text("utf-8")
    return f'#line 1 "{file}"\n{text}'


def compile_cubin(source: str, arch: str, options: Sequence[str] = ()) -> Cubin:
    """Machine code for one of TARGETS: shipped, from the cache, or compiled now.

    Raises:
        ValueError: an unknown target, or an option that includes a header.
        RuntimeError: the source is wrong, or has to be compiled and NVRTC is not installed.
    """
    flags = _flags(arch, options)
    shipped = _read(SHIPPED / f"{_key(source, flags)}.cubin")
    if shipped is not None:
        return shipped
    # A newer compiler makes better code, so each has entries of its own.
    path = cache_dir() / f"{_key(source, flags, nvrtc_version())}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = _compile(source, arch, flags)
        _write(path, cubin)
    return cubin


def ship_cubin(source: str, arch: str, options: Sequence[str], folder: Path) -> Cubin:
    """Compile now, and put the result into a folder where compile_cubin finds it as SHIPPED.

    Raises OSError where the folder cannot be written, and otherwise as compile_cubin.
    """
    flags = _flags(arch, options)
    cubin = _compile(source, arch, flags)
    _put(folder / f"{_key(source, flags)}.cubin", cubin)
    return cubin


def arch_for(compute_capability: tuple[int, int]) -> str:
    """The target whose code runs on a GPU of this compute capability."""
    major, minor = compute_capability
    targets = [(int(target[3:-1]), int(target[-1])) for target in TARGETS]
    fitting = [target for target in targets if target[0] == major and target[1] <= minor]
    if not fitting:
        raise ValueError(
            f"compute capability: got {major}.{minor}, expected a GPU that runs one of "
            f"{', '.join(TARGETS)}; use a backend without these kernels, such as torchscript"
        )
    return "sm_{}{}".format(*max(fitting))


def cache_dir() -> Path:
    """Return $MARNET_CACHE/cubin, or ~/.cache/marnet/cubin."""
    root = os.environ.get("MARNET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "marnet") / "cubin"


def nvrtc_version() -> tuple[int, int]:
    """Return (major, minor) of the NVRTC that compiles here."""
    nvrtc = _cuda.load("nvrtc")
    try:
        return _cuda.check(nvrtc.nvrtcVersion(), "nvrtcVersion")
    except RuntimeError as error:  # cuda.bindings is there, but finds no library to load
        raise RuntimeError(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded: {_cuda.INSTALL}"
        ) from error


def _flags(arch: str, options: Sequence[str]) -> list[str]:
    """All flags of NVRTC, checked."""
    if arch not in TARGETS:
        raise ValueError(
            f"arch: got {arch!r}, expected one of {', '.join(TARGETS)}; "
            "arch_for(compute_capability) chooses"
        )
    for option in options:
        # A header is not part of the key, so a changed header would be answered with old code.
        if option.startswith(_INCLUDES):
            raise ValueError(
                f"options: got {option!r}, expected a source without headers; "
                "paste what it needs into the source"
            )
    # NVRTC's own cache, kept where there is a driver, returns code without its resource report.
    fixed = (f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", "--no-cache")
    return [*fixed, *options]


def _key(source: str, flags: list[str], compiler: tuple[int, int] | None = None) -> str:
    """Name of an entry. Shipped code has no compiler in it: it is used whatever NVRTC is here."""
    parts = [_FORMAT, source, flags, compiler]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compile(source: str, arch: str, flags: list[str]) -> Cubin:
    nvrtc, check = _cuda.load("nvrtc"), _cuda.check
    compiler = "NVRTC {}.{}".format(*nvrtc_version())
    program = check(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), "nvrtcCreateProgram"
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
        log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize"))
        check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
        text = log.rstrip(b"\0").decode(errors="replace").strip()
        text = re.sub(r"\n.*Compile time = .*", "", text)  # equal compilations have equal entries
        if int(status) != 0:
            raise RuntimeError(
                f"NVRTC refuses this source for {arch}: got {status.name}, expected success; "
                f"correct the source or the options:\n{text}"
            )
        code = bytearray(check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize"))
        check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    registers, spill_bytes = _resources(text)
    return Cubin(bytes(code), arch, registers, spill_bytes, text, compiler)


def _resources(log: str) -> tuple[int, int]:
    """Read (registers, spill bytes) from the report of `ptxas -v`."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not registers or not spills:
        raise RuntimeError(
            "ptxas report: got no kernel, expected 'Used N registers' for at least one; "
            f'does the source have an extern "C" __global__ function?\n{log}'
        )
    return max(registers), sum(spills)


# A cache entry is: sha256 of the rest (32 bytes), one line of JSON, the machine code.


def _read(path: Path) -> Cubin | None:
    """The entry, or None where it cannot be read or is damaged (a full disk, a broken copy)."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, body = entry[:32], entry[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    head, _, code = body.partition(b"\n")
    return Cubin(code=code, **json.loads(head))


def _put(path: Path, cubin: Cubin) -> None:
    """Write an entry; a reader sees the whole of it or none."""
    head = {key: value for key, value in vars(cubin).items() if key != "code"}
    body = json.dumps(head).encode() + b"\n" + cubin.code
    # Not tempfile: its files are private, and a cache folder may be shared between users.
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(hashlib.sha256(body).digest() + body)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, cubin: Cubin) -> None:
    try:
        _put(path, cubin)
    except OSError as error:
        # A read-only home is common in containers, and compiling again is correct, only slower.
        warnings.warn(
            f"cannot keep the compiled kernel in {path.parent} ({error}), so every process compiles"
            " it again; set MARNET_CACHE to a writable folder",
            RuntimeWarning,
            stacklevel=3,
        )

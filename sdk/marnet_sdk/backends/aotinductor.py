"""AOTInductor: machine code that torch's compiler made of the encoder, and of the loop and head.

payload/encoder.pt2 and payload/refine.pt2 hold a shared library each, for processors like that of
the machine that exported them. Loading and running needs torch and no compiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import Backend, Floats, Tables, TextEncoder
from marnet_sdk.errors import BackendUnavailable, InvalidInput, requires_extra

ENCODER, REFINE, TEXT = "encoder.pt2", "refine.pt2", "text.pt2"
# What the builder writes into a package, beside torch's own AOTI_... entries.
CPU_FLAGS = "MARNET_CPU_FLAGS"  # instruction sets that the code uses, separated by spaces
INPUTS = "MARNET_INPUTS"  # JSON: [[name, type, [size or name of a size, ...]], ...]
LIMITS = "MARNET_LIMITS"  # JSON: name of an integer input or of a size -> the largest it may hold
TORCH = "MARNET_TORCH"  # the version that compiled it
STEPS = "steps - 1"  # the one size that may be zero
_COMPUTE = ("fp32", "bf16")
_REBUILD = "export the bundle again on this machine: marnet-export --backend aotinductor"
_AT_ONCE = 4  # calls that may run at the same time; they share the weights


def open_payload(payload: Path, compute: str, threads: int | None) -> Backend:
    """Load the compiled code. `threads` sets torch's thread count for the whole process.

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: the code is for another processor, or this torch cannot load it.
    """
    encoder, refine = (_open(payload / name, compute, threads) for name in (ENCODER, REFINE))
    return _AotInductor(encoder, refine)


def open_text(payload: Path, compute: str, threads: int | None) -> TextEncoder:
    """Load the text encoder; as `open_payload`."""
    graph = _open(payload / TEXT, compute, threads)
    return lambda ids, mask: graph(ids, mask)[0]


def _open(path: Path, compute: str, threads: int | None) -> _Graph:
    with requires_extra("torch", "torch"):
        import torch
    if compute not in _COMPUTE:
        raise BackendUnavailable(f"aotinductor computes in fp32 or bf16, the bundle asks {compute}")
    if threads is not None:
        torch.set_num_threads(threads)
    metadata = read_metadata(path)
    _check_host(path, metadata)
    return _Graph(path, metadata, _load(path, metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """What a package says about itself. Nothing of it is run.

    Raises:
        BackendUnavailable: it is no package that marnet-export wrote.
    """
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    found |= json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise BackendUnavailable(f"aotinductor cannot open {path}: {error}; {_REBUILD}") from error
    if missing := {CPU_FLAGS, INPUTS, LIMITS, TORCH} - found.keys():
        raise BackendUnavailable(
            f"aotinductor cannot open {path}: it does not state {', '.join(sorted(missing))}, as "
            f"packages of marnet-export do; {_REBUILD}"
        )
    return found


def _check_host(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse code that this processor cannot run: it would end the process, not raise."""
    built = (metadata.get("AOTI_PLATFORM"), metadata.get("AOTI_MACHINE"))
    host = sys.platform, machine()
    here = {_plain(flag) for flag in host_flags()}
    lacking = [flag for flag in metadata[CPU_FLAGS].split() if _plain(flag) not in here]
    if built == host and not lacking:
        return
    isa = metadata.get("AOTI_CPU_ISA", "")
    without = f" without {', '.join(lacking)}" if lacking else ""
    raise BackendUnavailable(
        f"{path} was compiled for {' '.join(map(str, built))} {isa}; this machine is "
        f"{' '.join(host)}{without}; {_REBUILD}"
    )


def _plain(flag: str) -> str:
    """Compilers and the kernel spell instruction sets differently: avx512vnni, avx512_vnni."""
    return flag.replace("_", "").replace("-", "")


def host_flags() -> frozenset[str]:
    """The instruction sets of this processor, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(
        flag for name, _, flags in named if name.strip() in ("flags", "Features")
        for flag in flags.split()
    )  # fmt: skip


def _load(path: Path, metadata: Mapping[str, str]) -> Any:
    """The library in a package, loaded.

    torch's own loader asks a compiler what this processor is, and leaves the unpacked library
    behind if the process is killed. Once loaded, the library needs its file no longer.
    """
    import torch

    # In C++; the public loader's Python part is what needs the compiler.
    open_library = torch._C._aoti.AOTIModelContainerRunnerCpu  # type: ignore[attr-defined]
    try:
        with (
            zipfile.ZipFile(path) as archive,
            tempfile.TemporaryDirectory(prefix="marnet-") as folder,
        ):
            (library,) = (name for name in archive.namelist() if name.endswith(".so"))
            return open_library(archive.extract(library, folder), _AT_ONCE)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise BackendUnavailable(
            f"torch {torch.__version__} cannot load {path}, which torch {metadata[TORCH]} "
            f"compiled: {error}; {_REBUILD}"
        ) from error


class _AotInductor:
    def __init__(self, encoder: _Graph, refine: _Graph) -> None:
        self._encoder, self._refine = encoder, refine

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder(pixels)
        return x_v

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        # The graph looks up the row of noise of each image, so that one for all is not copied.
        batch, shape = len(x_v), tables.bias.shape
        if len(shape) != 4 or shape[0] < 1 or shape[1] not in (1, batch):
            raise InvalidInput(
                f"the table of {batch} images is {shape}; expected [steps, 1 or {batch}, samples, "
                "width], with a step at least"
            )
        row = np.arange(batch) if shape[1] > 1 else np.zeros(batch, np.int64)
        steps = tables.coefficients[:-1], tables.bias[:-1]
        logits, features = self._refine(x_v, *steps, tables.bias[-1], row)
        return logits, features


class _Graph:
    """Compiled code, which takes any address for an array: nothing wrong may reach it."""

    def __init__(self, path: Path, metadata: Mapping[str, str], runner: Any) -> None:
        self._path, self._runner = path, runner
        self._inputs: list[tuple[str, str, list[int | str]]] = json.loads(metadata[INPUTS])
        self._limits: dict[str, int] = json.loads(metadata[LIMITS])
        # The first call converts the stored weights, while others would have to wait.
        self(*(np.zeros(_smallest(shape), kind) for _, kind, shape in self._inputs))

    def __call__(self, *arrays: NDArray) -> list[Any]:
        """Outputs in the graph's order.

        Raises:
            InvalidInput: an array of another type or shape, or an integer out of range.
        """
        import torch

        self._check(arrays)
        # Contiguous, and torch warns of arrays that it must not write to.
        given = [np.require(array, requirements=["C", "W"]) for array in arrays]
        torch.get_num_threads()  # OpenMP keeps the setting for each thread; this hands it to ours
        # A caller's autocast would change the types that the bundle was verified with.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            outputs = self._runner.run([torch.from_numpy(array) for array in given])
        return [output.numpy() for output in outputs]

    def _check(self, arrays: tuple[NDArray, ...]) -> None:
        sizes: dict[str, int] = {}
        for array, (name, kind, shape) in zip(arrays, self._inputs, strict=True):
            known = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
            fits = array.dtype == kind and array.ndim == len(shape)
            if not fits or not all(map(self._size_fits, array.shape, known)):
                raise InvalidInput(
                    f"{self._path.name} was given {array.dtype} {array.shape} as {name}; it takes "
                    f"{kind} [{', '.join(map(self._described, known))}]"
                )
            sizes |= {s: n for s, n in zip(shape, array.shape, strict=True) if isinstance(s, str)}
            if name in self._limits and not _within(array, self._limits[name]):
                raise InvalidInput(
                    f"{self._path.name} was given {name} from {array.min()} to {array.max()}; "
                    f"they must be from 0 to {self._limits[name]}"
                )

    def _described(self, size: int | str) -> str:
        limit = self._limits.get(str(size))
        return f"{size}" if limit is None else f"{size} up to {limit}"

    def _size_fits(self, size: int, wanted: int | str) -> bool:
        if isinstance(wanted, int):
            return size == wanted
        return _least(wanted) <= size <= self._limits.get(wanted, size)


def _within(array: NDArray, largest: int) -> bool:
    return int(array.min()) >= 0 and int(array.max()) <= largest


def _least(size: str) -> int:
    return 0 if size == STEPS else 1


def _smallest(shape: list[int | str]) -> list[int]:
    return [_least(size) if isinstance(size, str) else size for size in shape]

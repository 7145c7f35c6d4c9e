"""AOTInductor: machine code that torch's compiler made of the encoder, and of the loop and head.

payload/encoder.pt2 and payload/refine.pt2 hold a shared library each, for processors like that of
the machine that exported them, or for GPUs like that one's. Loading and running needs torch and no
compiler.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from platform import machine
from secrets import token_hex
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_sdk.backends import (
    Backend,
    InTwoCalls,
    TextEncoder,
    torch_cpu,
    torch_cuda,
    torch_device,
)
from marnet_sdk.errors import BackendUnavailable, InvalidInput
from marnet_sdk.gpu.torch_programs import Model
from marnet_sdk.noise.tables import Floats, Integers, Tables

ENCODER, REFINE, TEXT = "encoder.pt2", "refine.pt2", "text.pt2"
# What the builder writes into a package, beside torch's own AOTI_... entries.
CPU_FLAGS = "MARNET_CPU_FLAGS"  # instruction sets that the code uses, separated by spaces
INPUTS = "MARNET_INPUTS"  # JSON: [[name, type, [size or name of a size, ...]], ...]
LIMITS = "MARNET_LIMITS"  # JSON: name of an integer input or of a size -> the largest it may hold
TORCH = "MARNET_TORCH"  # the version that compiled it
GPU = "MARNET_GPU"  # of code for a GPU: what that one can do, as compilers call it, like sm90
STEPS = "steps - 1"  # the one size that may be zero
_REBUILD = "export the bundle again on this machine: marnet-export --backend aotinductor"
_NO_PARTS = "compiled code has no place for the persistent kernel between its loop and the rest"
_NAME, _UNPACKING = f"marnet-{token_hex(8)}", Lock()  # of unpacked libraries in this process
_AT_ONCE = 4  # calls that may run at the same time; they share the weights


def open_payload(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> Backend:
    """Load the compiled code. Torch's number of threads is set for the whole process.

    On "cuda", encoder, loop and head run as one captured graph (`torch_cuda`).

    Raises:
        MissingExtra: torch is not installed.
        BackendUnavailable: the code is for another processor, GPU or device, or this torch cannot
            load it.
    """
    torch_device.check_types("aotinductor", compute, device)
    if device == "cuda":
        return torch_cuda.TorchOnCuda(load_model(payload, device))
    encoder, refine = (_open(payload / name, threads) for name in (ENCODER, REFINE))
    return _AotInductor(encoder, refine)


def open_text(payload: Path, compute: str, threads: int | None, device: str = "cpu") -> TextEncoder:
    """Load the text encoder; as `open_payload`, but it is not captured."""
    torch_device.check_types("aotinductor", compute, device)
    if device == "cuda":
        return _text_on_cuda(_DeviceGraph(payload / TEXT, device))
    graph = _open(payload / TEXT, threads)
    return lambda ids, mask: graph(ids, mask)[0]


def _open(path: Path, threads: int | None) -> _Graph:
    torch_cpu.use_threads(threads)
    metadata = read_metadata(path)
    _check_device(path, metadata, "cpu")
    _check_host(path, metadata)
    return _Graph(path, metadata, _load(path, metadata), adapts=threads is None)


def read_metadata(path: Path) -> dict[str, str]:
    """Read what a package says about itself. Nothing of it is run.

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


def _check_device(path: Path, metadata: Mapping[str, str], device: str) -> None:
    """Refuse code for another device, or for a GPU that can do other things than this one."""
    built = metadata.get("AOTI_DEVICE_KEY", "cpu")
    if built != device:
        raise BackendUnavailable(
            f"{path} was compiled for {built}, and is opened on {device}; {_REBUILD} "
            f"--device {device}"
        )
    if device != "cuda":
        return
    target, here = metadata.get(GPU, "no GPU that it names"), torch_device.gpu_name()
    # Code for sm86 runs on sm86 and sm89, and on no other generation.
    if target[:-1] != here[0][:-1] or target > here[0]:
        raise BackendUnavailable(
            f"{path} was compiled for {target}; this machine's GPU is {here[1]}, {here[0]}; "
            f"{_REBUILD} --device cuda"
        )


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
    """The one spelling of an instruction set: compilers say avx512vnni, the kernel avx512_vnni."""
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

    The C library never unloads it: it has symbols that are unique in the process, and objects of
    threads that have not ended. So the same library gets the same name again, by which it is found
    where it is loaded, and reloading a bundle takes no more memory each time.
    """
    import torch

    # In C++; the public loader's Python part is what needs the compiler.
    open_library = torch._C._aoti.AOTIModelContainerRunnerCpu  # type: ignore[attr-defined]
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".so"))
            code = archive.read(name)
        with _unpacked(code) as library:
            return open_library(str(library), _AT_ONCE)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise BackendUnavailable(
            f"torch {torch.__version__} cannot load {path}, which torch {metadata[TORCH]} "
            f"compiled: {error}; {_REBUILD}"
        ) from error


@contextmanager
def _unpacked(code: bytes) -> Iterator[Path]:
    """A file that holds a library, with a name in this process that depends on its bytes alone."""
    folder = Path(tempfile.gettempdir()) / f"{_NAME}-{hashlib.sha256(code).hexdigest()}"
    with _UNPACKING:
        folder.mkdir(mode=0o700)
        try:
            library = folder / "code.so"
            library.write_bytes(code)
            yield library
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _AotInductor(InTwoCalls):
    def __init__(self, encoder: _Graph, refine: _Graph) -> None:
        self._encoder, self._refine = encoder, refine

    def threads(self) -> int:
        return torch_cpu.threads_now()

    def encode(self, pixels: Floats) -> Floats:
        (x_v,) = self._encoder(pixels)
        return x_v

    def refine(self, x_v: Floats, tables: Tables) -> tuple[Floats, Floats]:
        # The graph looks up the row of noise of each image, so that one for all is not copied.
        batch, shape = len(x_v), tables.bias.shape
        _check_table(batch, shape)
        row = np.arange(batch) if shape[1] > 1 else np.zeros(batch, np.int64)
        steps = tables.coefficients[:-1], tables.bias[:-1]
        logits, features = self._refine(x_v, *steps, tables.bias[-1], row)
        return logits, features


def _check_table(batch: int, shape: tuple[int, ...]) -> None:
    """Refuse tables that the loop cannot take.

    Raises:
        InvalidInput: it is no table of the loop for so many images.
    """
    if len(shape) != 4 or shape[0] < 1 or shape[1] not in (1, batch):
        raise InvalidInput(
            f"the table of {batch} images is {shape}; expected [steps, 1 or {batch}, samples, "
            "width], with a step at least"
        )


class _Inputs:
    """The inputs of compiled code, which believes any address: nothing wrong may reach it."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.name = path.name
        self.known: list[tuple[str, str, list[int | str]]] = json.loads(metadata[INPUTS])
        self._limits: dict[str, int] = json.loads(metadata[LIMITS])

    def check(self, *arrays: Any) -> None:
        """Refuse inputs of other types or shapes than were compiled for.

        Args:
            arrays: NumPy's, or tensors. Of tensors, only types and shapes are looked at.

        Raises:
            InvalidInput: an array of another type or shape, or an integer out of range.
        """
        sizes: dict[str, int] = {}
        for array, (name, kind, shape) in zip(arrays, self.known, strict=True):
            known = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
            is_numpy = isinstance(array, np.ndarray)
            dtype = array.dtype if is_numpy else str(array.dtype).removeprefix("torch.")
            fits = dtype == kind and array.ndim == len(shape)
            if not fits or not all(map(self._size_fits, array.shape, known)):
                raise InvalidInput(
                    f"{self.name} was given {dtype} {tuple(array.shape)} as {name}; it takes "
                    f"{kind} [{', '.join(map(self._described, known))}]"
                )
            sizes |= {s: n for s, n in zip(shape, array.shape, strict=True) if isinstance(s, str)}
            if is_numpy and name in self._limits and not _within(array, self._limits[name]):
                raise InvalidInput(
                    f"{self.name} was given {name} from {array.min()} to {array.max()}; "
                    f"they must be from 0 to {self._limits[name]}"
                )

    def _described(self, size: int | str) -> str:
        limit = self._limits.get(str(size))
        return f"{size}" if limit is None else f"{size} up to {limit}"

    def _size_fits(self, size: int, wanted: int | str) -> bool:
        if isinstance(wanted, int):
            return size == wanted
        return _least(wanted) <= size <= self._limits.get(wanted, size)


class _Graph:
    """Compiled code for the processor."""

    def __init__(
        self, path: Path, metadata: Mapping[str, str], runner: Any, *, adapts: bool
    ) -> None:
        self._inputs, self._runner, self._adapts = _Inputs(path, metadata), runner, adapts
        # The first call converts the stored weights, while others would have to wait.
        self(*(np.zeros(_smallest(shape), kind) for _, kind, shape in self._inputs.known))

    def __call__(self, *arrays: NDArray) -> list[Any]:
        """Run it; the outputs are in the graph's order.

        Raises:
            InvalidInput: an array of another type or shape, or an integer out of range.
        """
        import torch

        self._inputs.check(*arrays)
        # Contiguous, and torch warns of arrays that it must not write to.
        given = [np.require(array, requirements=["C", "W"]) for array in arrays]
        # A caller's autocast would change the types that the bundle was verified with.
        exact = torch.inference_mode(), torch.autocast("cpu", enabled=False)
        with torch_cpu.computing(adapts=self._adapts), exact[0], exact[1]:
            outputs = self._runner.run([torch.from_numpy(array) for array in given])
        # Arrays of their own: one that needs a tensor would end it wherever it is dropped itself.
        return [output.numpy().copy() for output in outputs]


def _within(array: NDArray, largest: int) -> bool:
    return int(array.min()) >= 0 and int(array.max()) <= largest


def _least(size: str) -> int:
    return 0 if size == STEPS else 1


def _smallest(shape: list[int | str]) -> list[int]:
    return [_least(size) if isinstance(size, str) else size for size in shape]


# --- on a GPU


class _DeviceGraph:
    """Compiled code that takes and returns tensors on its device, for one call at a time.

    torch's own loader is the one that runs code without noting an event behind each call, which a
    captured graph must not hold. It unpacks the package into a temporary folder, where the code's
    kernels are read from when they first run, and removes it when it is collected.
    """

    def __init__(self, path: Path, device: str) -> None:
        import torch

        metadata = read_metadata(path)
        _check_device(path, metadata, device)
        _check_host(path, metadata)
        self.inputs = _Inputs(path, metadata)
        index = torch.cuda.current_device() if device == "cuda" else -1
        open_package = torch._C._aoti.AOTIModelPackageLoader  # type: ignore[attr-defined]
        try:
            self._loader = open_package(str(path), "model", True, 1, index)
        except (OSError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(
                f"torch {torch.__version__} cannot load {path}, which torch {metadata[TORCH]} "
                f"compiled: {error}; {_REBUILD}"
            ) from error

    def __call__(self, *tensors: Any) -> list[Any]:
        self.inputs.check(*tensors)
        return self._loader.run([_as_compiled(tensor) for tensor in tensors])


def _as_compiled(tensor: Any) -> Any:
    """The array, contiguous and at a multiple of 16: the code reads several values at once."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def load_model(payload: Path, device: str) -> Model:
    """The compiled code as what is captured on a GPU."""
    encoder, refine = (_DeviceGraph(payload / name, device) for name in (ENCODER, REFINE))

    def run_refine(x_v: Any, coefficients: Any, bias: Any) -> tuple[Any, Any]:
        import torch

        _check_table(len(x_v), tuple(bias.shape))
        row = torch.zeros(len(x_v), dtype=torch.int64, device=x_v.device)
        if bias.shape[1] > 1:
            row = torch.arange(len(x_v), device=x_v.device)
        logits, features = refine(x_v, coefficients[:-1], bias[:-1], bias[-1], row)
        return logits, features

    return Model(lambda pixels: encoder(pixels)[0], run_refine, _NO_PARTS)


def _text_on_cuda(graph: _DeviceGraph) -> TextEncoder:
    run = torch_cuda.plain_text(lambda ids, mask: graph(ids, mask)[0])

    def encode(ids: Integers, mask: Integers) -> Floats:
        graph.inputs.check(ids, mask)  # the values, while they are where they can be looked at
        return run(ids, mask)

    return encode

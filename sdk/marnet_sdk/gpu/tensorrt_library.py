"""TensorRT in both of its flavours: which is installed, what it built, and for which GPUs.

`tensorrt` (10 and 11, data-centre GPUs, built on the GPU itself) and `tensorrt_rtx` (GeForce and
RTX GPUs, built anywhere) have the same interface but for a few names. Both sides of the backend
`tensorrt` use this file; nothing here starts a runtime, which without a driver would crash.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from marnet_kernels.compile import cache_dir
from marnet_sdk.errors import (
    BackendUnavailable,
    BundleCorrupt,
    BundleFormatError,
    MarnetError,
    MarnetWarning,
    MissingExtra,
)
from marnet_sdk.outputs import atomic_file

INDEX = "engines.json"  # beside the ONNX files, in the payload
STANDARD, RTX = "tensorrt", "tensorrt_rtx"
_FORMAT = 1
_TITLES = {STANDARD: "TensorRT", RTX: "TensorRT-RTX"}
_INSTALL = {
    STANDARD: "pip install --extra-index-url https://pypi.nvidia.com tensorrt",
    RTX: "pip install tensorrt-rtx",
}
_EXTRAS = {STANDARD: "tensorrt", RTX: "rtx"}


# --- the machine


@dataclass(frozen=True)
class Device:
    """The GPU that the driver lists first (CUDA_VISIBLE_DEVICES decides which that is)."""

    name: str
    capability: tuple[int, int]
    driver: int  # the CUDA version of the driver, 13000 for 13.0

    @property
    def target(self) -> str:
        """The GPU's kind as compilers call it, for example "sm86"."""
        return "sm{}{}".format(*self.capability)

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


def find_device() -> Device:
    """The GPU of this machine, asked of the driver alone.

    Raises:
        BackendUnavailable: no driver, or no GPU; the message is the reason and nothing else.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BackendUnavailable("no CUDA driver (libcuda.so.1 is not here)") from None
    if status := driver.cuInit(0):
        raise BackendUnavailable(f"a CUDA driver that does not start (cuInit gives {status})")
    count = _integer(driver.cuDeviceGetCount)
    if not count:
        raise BackendUnavailable("a CUDA driver, but no GPU")
    name = ctypes.create_string_buffer(256)
    _succeed(driver.cuDeviceGetName, name, len(name), 0)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    major, minor = (_integer(driver.cuDeviceGetAttribute, which, 0) for which in (75, 76))
    version = _integer(driver.cuDriverGetVersion)
    return Device(name.value.decode(errors="replace"), (major, minor), version)


def _integer(function: Callable[..., int], *arguments: int) -> int:
    value = ctypes.c_int()
    _succeed(function, ctypes.byref(value), *arguments)
    return value.value


def _succeed(function: Any, *arguments: Any) -> None:
    if status := function(*arguments):
        raise BackendUnavailable(f"a CUDA driver that answers {function.__name__} with {status}")


# --- the library


@dataclass(frozen=True)
class Library:
    """One flavour of TensorRT, imported."""

    flavour: str
    version: str
    module: ModuleType

    @property
    def is_rtx(self) -> bool:
        return self.flavour == RTX

    @property
    def extra(self) -> str:
        """The extra of marnet that installs it."""
        return _EXTRAS[self.flavour]

    def __str__(self) -> str:
        return f"{_TITLES[self.flavour]} {self.version}"


@cache
def load_library(flavour: str) -> Library:
    """Import a flavour.

    Raises:
        MissingExtra: it is not installed.
        BackendUnavailable: it is, but without the libraries that its Python package wraps.
    """
    try:
        module = import_module(flavour)
        return Library(flavour, module.__version__, _complete(module))
    except ModuleNotFoundError as error:
        if error.name == flavour:
            extra = f'pip install "marnet[{_EXTRAS[flavour]}]"'
            raise MissingExtra(
                f"{_TITLES[flavour]} is not installed; run: {extra} (or: {_INSTALL[flavour]})"
            ) from error
        problem = error
    except (ImportError, OSError, AttributeError) as error:
        problem = error
    # The wheel `tensorrt` on PyPI is such a shell, where NVIDIA's index could not be reached.
    raise BackendUnavailable(
        f"the package {flavour} is installed without the libraries of {_TITLES[flavour]} "
        f"({type(problem).__name__}: {problem}); replace it: pip uninstall -y {flavour}, then "
        f"{_INSTALL[flavour]}"
    ) from problem


def _complete(module: ModuleType) -> ModuleType:
    for name in ("Logger", "Builder", "OnnxParser", "Runtime"):
        getattr(module, name)
    return module


def make_log(trt: Any) -> Any:
    """A logger that keeps what goes wrong: TensorRT tells it nowhere else."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(msg)

        def sentence(self) -> str:
            return "; ".join(self.errors) or "it does not say why"

    return Log()


# --- what was built


@dataclass(frozen=True)
class Engine:
    """One engine file. `batches` are its optimisation profiles: the batches, least to most, that
    each takes; `ranges` are the other sizes that vary."""

    sha256: str
    size: int  # bytes
    onnx_sha256: str  # of the file that it was built from
    batches: tuple[tuple[int, int], ...]
    ranges: dict[str, tuple[int, int]]  # steps, samples, tokens

    @property
    def largest(self) -> int:
        return max(most for _, most in self.batches)


@dataclass(frozen=True)
class EngineSet:
    """The engines that one flavour and version built for some GPUs."""

    flavour: str
    version: str
    targets: tuple[str, ...]  # compute capabilities, as in "sm86"
    engines: dict[str, Engine]  # by graph: encoder, refine, text

    @property
    def folder(self) -> str:
        """The folder of the engines, below the payload."""
        return f"engines/{self.flavour}-{self.version}-{'-'.join(self.targets)}"

    def file(self, payload: Path, graph: str) -> Path:
        return payload / self.folder / f"{graph}.engine"

    def __str__(self) -> str:
        return f"{_TITLES.get(self.flavour, self.flavour)} {self.version} on {_some(self.targets)}"


def read_index(payload: Path) -> list[EngineSet]:
    """Read what payload/engines.json lists; nothing where there is none.

    Raises:
        BundleFormatError: it is not such a file, or of a newer format.
    """
    path = payload / INDEX
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise BundleFormatError(
                f"{path}: format {content['format']!r}, this version of marnet reads {_FORMAT}; "
                "upgrade marnet"
            )
        return [_read_set(entry) for entry in content["sets"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleFormatError(
            f"{path} is not a list of engines ({type(error).__name__}: {error}); export again"
        ) from error


def _read_set(entry: dict[str, Any]) -> EngineSet:
    engines = {
        name: Engine(
            **{key: value[key] for key in ("sha256", "size", "onnx_sha256")},
            batches=tuple((least, most) for least, most in value["batches"]),
            ranges={key: (least, most) for key, (least, most) in value["ranges"].items()},
        )
        for name, value in entry["engines"].items()
    }
    return EngineSet(entry["flavour"], entry["version"], tuple(entry["targets"]), engines)


def write_index(payload: Path, sets: Sequence[EngineSet]) -> None:
    """Replace payload/engines.json. The same sets give the same bytes."""
    entries = [asdict(one) for one in sorted(sets, key=lambda one: one.folder)]
    text = json.dumps({"format": _FORMAT, "sets": entries}, indent=2, sort_keys=True)
    with atomic_file(payload / INDEX) as fresh:
        fresh.write_text(text + "\n", "utf-8")


def choose_engines(
    sets: Sequence[EngineSet],
    device: Device,
    load: Callable[[str], Library] = load_library,
) -> tuple[Library, EngineSet]:
    """The installed library and the engines that fit it and the GPU; standard TensorRT first.

    Raises:
        BackendUnavailable: nothing was built for this GPU, or by the version that is installed.
        MissingExtra: the library that would fit is not installed.
    """
    fitting = [one for one in sets if device.target in one.targets]
    rebuild = f"run: marnet-bundle rebuild BUNDLE --target {device.target}"
    if not fitting:
        raise BackendUnavailable(
            f"the engines were built for {_some(sets)}, this GPU is {device}; {rebuild}"
        )
    problems: list[MarnetError] = []
    for one in sorted(fitting, key=lambda one: one.flavour != STANDARD):
        try:
            library = load(one.flavour)
        except (MissingExtra, BackendUnavailable) as error:
            problems.append(error)
            continue
        if library.version == one.version:
            return library, one
        problems.append(
            BackendUnavailable(
                f"the engines for {device} were built by {one}, but {library} is installed, and "
                f"engines run with the version that built them; {rebuild}"
            )
        )
    raise next((p for p in problems if not isinstance(p, MissingExtra)), problems[0])


def _some(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things)) or "no GPU at all"


@dataclass(frozen=True)
class PlanHeader:
    """The header of an engine of TensorRT-RTX, which can be read without a runtime."""

    version: str
    size: int  # bytes


def read_header(path: Path) -> PlanHeader:
    """The header of an engine of TensorRT-RTX: magic, size at 16, version at 24.

    Raises:
        BundleCorrupt: it is none, or was cut short.
    """
    with path.open("rb") as file:
        head = file.read(28)
    if len(head) < 28 or head[:4] != b"vtrt":
        raise BundleCorrupt(f"{path} is not an engine of TensorRT-RTX; get the bundle again")
    header = PlanHeader(
        version=".".join(str(part) for part in head[24:28]),
        size=int.from_bytes(head[16:24], "little"),
    )
    if header.size != path.stat().st_size:
        raise BundleCorrupt(
            f"{path} has {path.stat().st_size} bytes, its header says {header.size}; get the "
            "bundle again"
        )
    return header


def check_engine(library: Library, path: Path) -> None:
    """Refuse an engine of another library; standard TensorRT's says so only when it is loaded.

    Raises:
        BundleCorrupt: it is no engine. BackendUnavailable: another version built it.
    """
    if not library.is_rtx:
        return
    header = read_header(path)
    if header.version != library.version:
        raise BackendUnavailable(
            f"{path} was built by TensorRT-RTX {header.version}, but {library} is installed, and "
            f"engines run with the version that built them; pip install "
            f"tensorrt-rtx=={header.version}, or: marnet-bundle rebuild BUNDLE"
        )


_INVALID = {
    "VERSION_MISMATCH": "another version of the library built it",
    "UNSUPPORTED_CC": "it was not built for a GPU of this compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old; update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old; update it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "the file is damaged",
    "CUDA_ERROR": "CUDA failed while the GPU was asked",
}


def describe_invalidity(module: Any, mask: int) -> str:
    """The words for a bit mask of `Runtime.get_engine_validity` of TensorRT-RTX."""
    flags = module.EngineInvalidityDiagnostics
    bits = {name: int(getattr(flags, name)) for name in _INVALID if hasattr(flags, name)}
    words = [_INVALID[name] for name, bit in bits.items() if mask & bit]
    if rest := mask & ~sum(bits.values()):
        words.append(f"unknown reason {rest:#x}")
    return "; ".join(words) or "no reason is given"


# --- what libraries learn about a GPU and may keep


def timing_cache_path(library: Library, device: Device) -> Path:
    """The file that keeps standard TensorRT's timings of kernels on this GPU."""
    return _cached("timing", library, device)


def runtime_cache_path(library: Library, device: Device, engine_sha256: str) -> Path:
    """The file that keeps the kernels that TensorRT-RTX compiled for an engine on this GPU."""
    return _cached("runtime", library, device, engine_sha256)


def _cached(kind: str, library: Library, device: Device, *more: str) -> Path:
    parts = [_FORMAT, kind, library.flavour, library.version, *asdict(device).values(), *more]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_dir().with_name("tensorrt") / f"{key}.{kind}"


def read_cached(path: Path) -> bytes:
    """Read what `write_cached` kept; nothing where it cannot be read or is damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return b""
    digest, content = entry[:32], entry[32:]
    return content if hashlib.sha256(content).digest() == digest else b""


def write_cached(path: Path, content: bytes) -> None:
    """Keep bytes behind their SHA-256; a reader sees all of them or none."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # A read-only home is common in containers, and learning again is correct, only slower.
        warnings.warn(
            f"cannot keep what TensorRT learnt about this GPU in {path.parent} ({error}), so every "
            "process learns it again; set MARNET_CACHE to a writable folder",
            MarnetWarning,
            stacklevel=2,
        )

"""Find out what this machine can run, and what is missing, without importing what takes long.

Every finding is a plain value, as JSON. A probe that fails is a finding, too: the one command that
people run on a broken machine must not break on it.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path
from typing import Any, TypeVar

from marnet_kernels.native import instruction_sets, why_missing
from marnet_kernels.native.library import cache_dir, compiler_for
from marnet_sdk.backends import PACKAGES
from marnet_sdk.backends.aotinductor import host_flags
from marnet_sdk.cpus import cpus
from marnet_sdk.environment import processor, versions
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.gpu.tensorrt_library import find_device

T = TypeVar("T")
_FEATURES = (  # of processors, that the native loop, ONNX Runtime, OpenVINO or oneDNN ask for
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
_BASE = ("marnet", "numpy", "pillow", "safetensors", "click", "rich")
_EXTRAS = {  # that installs a backend
    "aotinductor": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "rtx",
    "torchscript": "torch",
}
_NOT_FOR_USERS = ("all", "dev", "docs")  # extras of which the others are parts, or for developers
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?(?P<versions>[^;]*)"
    r"(?:;.*extra == ['\"](?P<extra>[\w-]+)['\"].*)?"
)
_CLAUSE = re.compile(r"(>=|<=|==|<|>)\s*(\d+(?:\.\d+)*)")
_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "<": operator.lt,
            ">": operator.gt}  # fmt: skip
_SECONDS = 600  # that a bundle may take to open


def examine(bundles: Iterable[Path] = ()) -> dict[str, Any]:
    """Everything about this machine that decides what runs on it. Never raises.

    Args:
        bundles: are opened, each in a process of its own, which tests them.
    """
    return {
        "versions": _told(lambda: versions(_BASE) | {"system": platform.platform()}),
        "processor": _told(_processor),
        "cpus": _told(_cpus),
        "gpu": _told(_gpu),
        "native_loop": _told(_native_loop),
        "backends": {name: _told(lambda name=name: _backend(name)) for name in PACKAGES},
        "extras": _told(_extras),
        "bundles": [_told(lambda path=path: _bundle(path)) for path in bundles],
    }


def _told(probe: Callable[[], T]) -> T | dict[str, Any]:
    """Return what a probe finds, or why it does not."""
    try:
        return probe()
    except Exception as error:  # of any kind: see the top of this file
        return {"ok": False, "problem": f"cannot be told: {type(error).__name__}: {error}"}


# --- the machine


def _processor() -> dict[str, Any]:
    flags = host_flags()
    return {
        "name": processor() or "unknown",
        "architecture": platform.machine(),
        "features": [feature for feature in _FEATURES if feature in flags],
    }


def _cpus() -> dict[str, Any]:
    here = cpus()
    settings = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return {
        "machine": here.machine,
        "allowed": here.allowed,
        "cores": here.cores,
        "quota": here.quota,
        "threads": here.threads,
        "environment": {name: os.environ[name] for name in settings if name in os.environ},
    }


def _gpu() -> dict[str, Any]:
    try:
        device = find_device()
    except BackendUnavailable as error:
        return {"ok": False, "problem": str(error)}
    driver = f"{device.driver // 1000}.{device.driver % 1000 // 10}"
    return {"ok": True, "name": device.name, "kind": device.target, "driver_cuda": driver}


def _native_loop() -> dict[str, Any]:
    """Tell whether its library is there, and whether it can be compiled. Compiles nothing."""
    found = {"compiler": shutil.which(compiler_for()), "cache": str(cache_dir())}
    if reason := why_missing():
        return {"ok": False, "problem": reason, **found}
    return {"ok": True, "instructions": next(iter(instruction_sets())), **found}


# --- packages


def _backend(name: str) -> dict[str, Any]:
    """Tell whether a backend's package is there, in a version that fits; it is not imported."""
    wanted, pip = _wanted(), f'pip install "marnet[{_EXTRAS[name]}]"'
    found = {package: _installed(package) for package in PACKAGES[name]}
    there = {package: version for package, version in found.items() if version is not None}
    report: dict[str, Any] = {"packages": there}
    if name == "tensorrt" and not (gpu := _gpu())["ok"]:
        return report | {"ok": False, "problem": gpu["problem"]}
    if not there:
        problem = f"{' or '.join(PACKAGES[name])} is not installed"
        return report | {"ok": False, "problem": problem, "install": pip}
    for package, version in there.items():
        if not _fits(version, wanted.get(package, "")):
            problem = f"{package} is {version}, expected {wanted[package]}"
            return report | {"ok": False, "problem": problem, "install": f"{pip} --upgrade"}
    if name == "tensorrt" and find_spec("cuda") is None:
        problem = "cuda-bindings is not installed"
        return report | {"ok": False, "problem": problem, "install": pip}
    if PACKAGES[name] == ("torch",):
        report["cuda"] = _cuda_of_torch()
    return report | {"ok": True}


def _installed(package: str) -> str | None:
    """The version of a package that can be imported, "unknown" if it does not tell; None: none."""
    if find_spec(package.replace("-", "_")) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # another distribution, such as onnxruntime-gpu
        return "unknown"


def _cuda_of_torch() -> str | None:
    """The version of CUDA that torch is built with, read from its file; None: without."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    match = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return match[1] if match else None


def _requirements() -> list[re.Match[str]]:
    """List what marnet requires, as it is installed; nothing where it is not."""
    try:
        lines = metadata.requires("marnet") or []
    except metadata.PackageNotFoundError:
        return []
    return [match for line in lines if (match := _REQUIREMENT.match(line))]


def _wanted() -> dict[str, str]:
    """Package -> the versions that marnet works with."""
    return {match["name"]: match["versions"].strip(" ()") for match in _requirements()}


def _extras() -> dict[str, Any]:
    """Each extra: what of it is missing, and the line that installs that."""
    needs: dict[str, list[re.Match[str]]] = {}
    for match in _requirements():
        if (extra := match["extra"]) and extra not in _NOT_FOR_USERS:
            needs.setdefault(extra, []).append(match)

    def missing(extra: str) -> list[str]:
        out = []
        for match in needs.get(extra, []):
            if match["name"] == "marnet":
                for inner in match["extras"].split(","):
                    out += missing(inner)
            elif not _has(match["name"], match["versions"]):
                out.append(match["name"])
        return list(dict.fromkeys(out))

    lacking = {extra: missing(extra) for extra in needs}
    return {
        extra: {"ok": not names, "missing": names}
        | ({"install": f'pip install "marnet[{extra}]"'} if names else {})
        for extra, names in lacking.items()
    }


def _has(package: str, wanted: str) -> bool:
    try:
        return _fits(metadata.version(package), wanted)
    except metadata.PackageNotFoundError:
        return False


def _fits(version: str, wanted: str) -> bool:
    """Tell whether a version is one of those that are wanted, by its numbers alone."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    if numbers is None:
        return True
    here = _release(numbers[0])
    return all(_COMPARE[how](here, _release(other)) for how, other in _CLAUSE.findall(wanted))


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version without zeros at its end: 2.11.0 is 2.11."""
    numbers = [int(part) for part in version.split(".")]
    return tuple(reversed(list(dropwhile(lambda n: n == 0, reversed(numbers)))))


# --- bundles

_OPEN = """
import json, sys
try:
    from marnet_sdk import Classifier
    from marnet_sdk.errors import MarnetError
    try:
        with Classifier(sys.argv[1]) as classifier:
            runtime = classifier.runtime
            found = {"ok": True, "what": repr(classifier), "loop": runtime.loop,
                     "threads": runtime.threads, "device": runtime.device}
    except MarnetError as error:
        found = {"ok": False, "problem": str(error)}
except Exception as error:
    found = {"ok": False, "problem": f"{type(error).__name__}: {error}"}
with open(sys.argv[2], "w", encoding="ascii") as out:
    json.dump(found, out)
"""


def _bundle(path: Path) -> dict[str, Any]:
    """Open a bundle as a deployed process would, in another process, which may crash."""
    about = {"bundle": str(path)}
    with tempfile.TemporaryDirectory() as folder:  # what a process prints may be anybody's
        out = Path(folder) / "found.json"
        command = [sys.executable, "-P", "-c", _OPEN, path.absolute(), out]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return about | {"ok": False, "problem": f"did not open within {_SECONDS} seconds"}
        if done.returncode == 0 and out.exists():
            return about | json.loads(out.read_text("ascii"))
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return about | {"ok": False, "problem": f"{_ended(done.returncode)}: {''.join(last)}"}


def _ended(code: int) -> str:
    if code >= 0:
        return f"opening it ends with exit code {code}"
    return f"opening it ends the process with {signal.Signals(-code).name}"

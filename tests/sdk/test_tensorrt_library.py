"""Which TensorRT is here, what it built and for which GPUs: all that needs no GPU."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from marnet_export.build.tensorrt.engines import add_engines
from marnet_sdk.errors import (
    BackendUnavailable,
    BundleCorrupt,
    BundleFormatError,
    MarnetError,
    MissingExtra,
)
from marnet_sdk.gpu import tensorrt_library
from marnet_sdk.gpu.tensorrt_library import (
    Device,
    Engine,
    EngineSet,
    Library,
    check_engine,
    choose_engines,
    describe_invalidity,
    find_device,
    load_library,
    make_log,
    read_cached,
    read_header,
    read_index,
    runtime_cache_path,
    timing_cache_path,
    write_cached,
    write_index,
)

RTX = load_library("tensorrt_rtx")
ADA = Device("NVIDIA L4", (8, 9), 13000)
ENGINE = Engine("ab" * 32, 1000, "cd" * 32, ((1, 1), (8, 8)), {"steps": (2, 1000)})


def engines_of(flavour: str, *targets: str, version: str = RTX.version) -> EngineSet:
    return EngineSet(flavour, version, targets, {"refine": ENGINE})


@pytest.fixture(scope="module")
def payload(tmp_path_factory) -> Path:
    """A real engine, of one product. Read-only."""
    folder = tmp_path_factory.mktemp("payload")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 4])
    x_v = helper.make_tensor_value_info("x_v", TensorProto.FLOAT, ["batch", 2])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 2], [0.5] * 8)
    node = helper.make_node("MatMul", ["pixels", "weight"], ["x_v"])
    graph = helper.make_graph([node], "encoder", [pixels], [x_v], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "encoder.onnx")
    add_engines(folder, ["sm80", "sm89"], buckets=[1, 8])
    return folder


@pytest.fixture
def engine_file(payload) -> Path:
    (one,) = read_index(payload)
    return one.file(payload, "encoder")


# --- the machine


class Driver:
    """A CUDA driver with one Ada GPU, as ctypes shows it."""

    def __init__(self, status: int = 0, count: int = 1) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, place) -> int:  # noqa: N802
        place._obj.value = self.count
        return 0

    def cuDeviceGetName(self, place, size: int, device: int) -> int:  # noqa: N802
        place.value = b"NVIDIA L4"
        return 0

    def cuDeviceGetAttribute(self, place, which: int, device: int) -> int:  # noqa: N802
        place._obj.value = {75: 8, 76: 9}[which]
        return 0

    def cuDriverGetVersion(self, place) -> int:  # noqa: N802
        place._obj.value = 13000
        return 0


def test_the_gpu_is_asked_of_the_driver_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert find_device() == ADA
    assert (ADA.target, str(ADA)) == ("sm89", "NVIDIA L4 (sm89)")


def test_a_machine_without_a_driver_says_so(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendUnavailable, match=r"no CUDA driver \(libcuda.so.1 is not here\)"):
        find_device()


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (Driver(status=100), r"does not start \(cuInit gives 100\)"),
        (Driver(count=0), "a CUDA driver, but no GPU"),
    ],
)
def test_a_driver_without_a_gpu_says_so(driver, message, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(BackendUnavailable, match=message):
        find_device()


# --- the library


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder whose packages are found before those that are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    for flavour in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, flavour, raising=False)
    load_library.cache_clear()
    yield tmp_path
    load_library.cache_clear()


def test_the_installed_library_is_found():
    assert (RTX.flavour, RTX.is_rtx, RTX.extra) == ("tensorrt_rtx", True, "rtx")
    assert str(RTX) == f"TensorRT-RTX {RTX.version}"
    assert RTX.version.startswith("1.")


@pytest.mark.parametrize(
    "content",
    [
        "",  # a package without symbols
        "__version__ = '11.4.0'",
        "from tensorrt_libs import load",  # its wheel fetches this one from NVIDIA's index
        "raise OSError('libnvinfer.so.11: cannot open shared object file')",
        "raise ImportError('libnvinfer.so.11')",
    ],
)
def test_the_shell_of_tensorrt_from_pypi_is_told_from_the_real_one(content, packages):
    (packages / "tensorrt.py").write_text(content)
    importlib.invalidate_caches()
    message = (
        r"the package tensorrt is installed without the libraries of TensorRT \(\w+Error: .*\); "
        r"replace it: pip uninstall -y tensorrt, then pip install --extra-index-url https"
    )
    with pytest.raises(BackendUnavailable, match=message):
        load_library("tensorrt")


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
def test_a_library_that_is_not_installed_is_named_with_its_pip_line(
    flavour, extra, packages, monkeypatch
):
    monkeypatch.setitem(sys.modules, flavour, None)
    with pytest.raises(MissingExtra, match=rf'is not installed; run: pip install "marnet\[{extra}'):
        load_library(flavour)


# --- the index


def test_the_index_holds_what_was_built_whatever_the_order(tmp_path):
    sets = [engines_of("tensorrt_rtx", "sm80", "sm89"), engines_of("tensorrt", "sm90")]
    write_index(tmp_path, sets)
    first = (tmp_path / "engines.json").read_bytes()
    assert {one.folder: one for one in read_index(tmp_path)} == {one.folder: one for one in sets}
    write_index(tmp_path, sets[::-1])
    assert (tmp_path / "engines.json").read_bytes() == first
    assert sets[0].folder == f"engines/tensorrt_rtx-{RTX.version}-sm80-sm89"


def test_a_payload_without_an_index_has_no_engines(tmp_path):
    assert read_index(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a list of engines"),
        ("[]", "is not a list of engines"),
        ('{"format": 1, "sets": [{}]}', r"is not a list of engines \(KeyError"),
        ('{"format": 2, "sets": []}', "format 2, this version of marnet reads 1; upgrade marnet"),
    ],
)
def test_an_index_that_is_none_is_refused(content, message, tmp_path):
    (tmp_path / "engines.json").write_text(content)
    with pytest.raises(BundleFormatError, match=message):
        read_index(tmp_path)


# --- the choice


def load(*installed: Library):
    """What `load_library` does where these are installed."""

    def find(flavour: str) -> Library:
        for library in installed:
            if library.flavour == flavour:
                return library
        raise MissingExtra(f"{flavour} is not installed")

    return find


STANDARD = Library("tensorrt", "11.4.0.106", RTX.module)


def test_engines_are_chosen_by_gpu_and_by_what_is_installed():
    rtx = engines_of("tensorrt_rtx", "sm86", "sm89")
    other = engines_of("tensorrt_rtx", "sm120")
    standard = engines_of("tensorrt", "sm89", version="11.4.0.106")
    sets = [rtx, other, standard]
    assert choose_engines(sets, ADA, load(RTX)) == (RTX, rtx)
    assert choose_engines(sets, ADA, load(RTX, STANDARD)) == (STANDARD, standard)
    older = replace(STANDARD, version="10.16.1.11")
    assert choose_engines(sets, ADA, load(RTX, older)) == (RTX, rtx)


@pytest.mark.parametrize(
    ("sets", "installed", "kind", "message"),
    [
        (
            [engines_of("tensorrt_rtx", "sm80", "sm86")],
            [RTX],
            BackendUnavailable,
            rf"built for TensorRT-RTX {RTX.version} on sm80, sm86, this GPU is NVIDIA L4 \(sm89\); "
            "run: marnet-bundle rebuild BUNDLE --target sm89",
        ),
        (
            [],
            [RTX],
            BackendUnavailable,
            "built for no GPU at all, this GPU is NVIDIA L4",
        ),
        (
            [engines_of("tensorrt_rtx", "sm89", version="1.6.1.120")],
            [RTX],
            BackendUnavailable,
            rf"built by TensorRT-RTX 1.6.1.120 on sm89, but TensorRT-RTX {RTX.version} is "
            "installed, and engines run with the version that built them; run: marnet-bundle",
        ),
        (
            [engines_of("tensorrt_rtx", "sm89")],
            [],
            MissingExtra,
            "tensorrt_rtx is not installed",
        ),
        (  # installing the other one is not asked of someone who only has to rebuild
            [engines_of("tensorrt_rtx", "sm89", version="1.6"), engines_of("tensorrt", "sm89")],
            [RTX],
            BackendUnavailable,
            "built by TensorRT-RTX 1.6 on sm89",
        ),
    ],
)
def test_where_nothing_fits_the_error_says_built_for_met_and_what_to_do(
    sets, installed, kind: type[MarnetError], message
):
    with pytest.raises(kind, match=message):
        choose_engines(sets, ADA, load(*installed))


# --- the header


def test_the_header_of_a_real_engine_says_who_built_it(engine_file):
    header = read_header(engine_file)
    assert header.version == RTX.version
    assert header.size == engine_file.stat().st_size
    check_engine(RTX, engine_file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"has \d+ bytes, its header says \d+; get the bundle again"),
        (lambda content: content[:20], "is not an engine of TensorRT-RTX"),
        (lambda content: b"onnx" + content[4:], "is not an engine of TensorRT-RTX"),
    ],
)
def test_a_file_that_is_no_whole_engine_is_refused(damage, message, engine_file, tmp_path):
    path = tmp_path / "encoder.engine"
    path.write_bytes(damage(engine_file.read_bytes()))
    with pytest.raises(BundleCorrupt, match=message):
        check_engine(RTX, path)


def test_an_engine_of_another_version_is_refused_before_it_is_loaded(engine_file, tmp_path):
    path = tmp_path / "encoder.engine"
    content = bytearray(engine_file.read_bytes())
    content[24:28] = bytes([1, 6, 1, 120])
    path.write_bytes(content)
    with pytest.raises(
        BackendUnavailable,
        match=rf"built by TensorRT-RTX 1.6.1.120, but TensorRT-RTX {RTX.version} is installed.*"
        "pip install tensorrt-rtx==1.6.1.120, or: marnet-bundle rebuild BUNDLE",
    ):
        check_engine(RTX, path)


def test_engines_of_standard_tensorrt_are_judged_by_itself(tmp_path):
    check_engine(STANDARD, tmp_path / "not even there")


def test_every_reason_why_an_engine_is_invalid_has_words():
    flags = RTX.module.EngineInvalidityDiagnostics
    names = [name for name in dir(flags) if name.isupper()]
    texts = [describe_invalidity(RTX.module, int(getattr(flags, name))) for name in names]
    assert len(set(texts)) == len(names) == 7
    assert not any("unknown" in text for text in texts)
    both = int(flags.VERSION_MISMATCH) | int(flags.OLD_CUDA_DRIVER)
    assert describe_invalidity(RTX.module, both) == (
        "another version of the library built it; the CUDA driver is too old; update it"
    )
    assert describe_invalidity(RTX.module, 1 << 20) == "unknown reason 0x100000"
    assert describe_invalidity(RTX.module, 0) == "no reason is given"


def test_the_log_keeps_the_last_errors_and_nothing_else():
    log, severity = make_log(RTX.module), RTX.module.ILogger.Severity
    assert log.sentence() == "it does not say why"
    for kind, text in [(severity.WARNING, "w"), *((severity.ERROR, str(i)) for i in range(5))]:
        log.log(kind, text)
    assert log.sentence() == "2; 3; 4"


# --- what is kept


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tensorrt"


def test_what_is_kept_is_keyed_by_everything_it_depends_on(cache):
    paths = [
        runtime_cache_path(library, device, engine)
        for library in (RTX, STANDARD, replace(RTX, version="1.8"))
        for device in (ADA, replace(ADA, driver=13010), replace(ADA, name="NVIDIA L40"))
        for engine in ("ab", "cd")
    ]
    paths += [timing_cache_path(library, ADA) for library in (RTX, STANDARD)]
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {cache}
    assert runtime_cache_path(RTX, ADA, "ab") == paths[0]


def test_what_was_kept_is_read_and_what_is_damaged_is_not(cache):
    path = timing_cache_path(STANDARD, ADA)
    assert read_cached(path) == b""
    write_cached(path, b"tactics")
    write_cached(path, b"more tactics")
    assert read_cached(path) == b"more tactics"
    assert list(cache.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-1])
    assert read_cached(path) == b""


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="set MARNET_CACHE to a writable folder"):
        write_cached(timing_cache_path(STANDARD, ADA), b"tactics")


def test_the_file_imports_no_tensorrt():
    code = (
        f"import json, sys; import {tensorrt_library.__name__}; print(json.dumps([*sys.modules]))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorrt", "tensorrt_rtx", "cuda", "torch"} & set(json.loads(done.stdout))

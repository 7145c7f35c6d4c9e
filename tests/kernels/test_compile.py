"""Compilation and its cache. Needs NVRTC but neither a GPU nor a driver."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from marnet_kernels import compile as compile_module
from marnet_kernels import compile_cubin

SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.f; }'
# 64 values alive at once, so that a limit of 24 registers forces spills
CROWDED = """
extern "C" __global__ void crowded(float* x) {
    float v[64];
    for (int i = 0; i < 64; i++) v[i] = x[i * 32 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; i++) x[(63 - i) * 32 + threadIdx.x] = v[i] * v[(i + 7) % 64];
}
"""

needs_nvrtc = pytest.mark.usefixtures("nvrtc")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    monkeypatch.setattr(compile_module, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "cubin"


@pytest.fixture
def compilations(monkeypatch):
    """The architectures that NVRTC was really asked for, in order."""
    asked, original = [], compile_module._compile

    def counted(source, arch, flags):
        asked.append(arch)
        return original(source, arch, flags)

    monkeypatch.setattr(compile_module, "_compile", counted)
    return asked


@needs_nvrtc
def test_spills_are_reported():
    cubin = compile_cubin(CROWDED, "sm_90", ["--maxrregcount=24"])
    assert cubin.registers <= 24
    assert cubin.spill_bytes > 0


@needs_nvrtc
def test_compiling_again_reports_the_same_resources(monkeypatch, tmp_path):
    """NVRTC's own cache, where a driver provides one, must not swallow the report."""
    first = compile_cubin(SOURCE, "sm_90")
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "another"))
    again = compile_cubin(SOURCE, "sm_90")
    assert (again.registers, again.spill_bytes) == (first.registers, first.spill_bytes)
    assert again.code == first.code


@needs_nvrtc
def test_equal_compilation_is_read_from_the_cache(compilations):
    first = compile_cubin(SOURCE, "sm_90")
    assert compile_cubin(SOURCE, "sm_90") == first
    assert compilations == ["sm_90"]


@needs_nvrtc
@pytest.mark.parametrize("changed", ["source", "arch", "options", "nvrtc"])
def test_any_changed_input_compiles_again(changed, compilations, monkeypatch):
    compile_cubin(SOURCE, "sm_90")
    if changed == "nvrtc":
        monkeypatch.setattr(compile_module, "nvrtc_version", lambda: (99, 0))
    compile_cubin(
        SOURCE + "\n" if changed == "source" else SOURCE,
        "sm_80" if changed == "arch" else "sm_90",
        ["--fmad=false"] if changed == "options" else [],
    )
    assert len(compilations) == 2


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:40], lambda _: b"", lambda b: b[:-1] + b"\1"],
    ids=["one byte short", "head only", "empty", "one byte wrong"],
)
def test_damaged_entry_is_compiled_again(damage, cache, compilations):
    first = compile_cubin(SOURCE, "sm_90")
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    assert compile_cubin(SOURCE, "sm_90").code == first.code
    assert compilations == ["sm_90", "sm_90"]
    assert compile_cubin(SOURCE, "sm_90").code == first.code
    assert len(compilations) == 2


@needs_nvrtc
def test_threads_racing_for_one_entry_leave_one_whole_entry(cache, compilations):
    with ThreadPoolExecutor(8) as pool:
        codes = {c.code for c in pool.map(lambda _: compile_cubin(SOURCE, "sm_90"), range(32))}
    assert len(codes) == 1
    assert len(list(cache.iterdir())) == 1
    compilations.clear()
    compile_cubin(SOURCE, "sm_90")
    assert compilations == []


@needs_nvrtc
def test_unwritable_cache_warns_and_still_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="set MARNET_CACHE to a writable folder"):
        cubin = compile_cubin(SOURCE, "sm_90")
    assert cubin.code.startswith(b"\x7fELF")


def test_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("MARNET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_module.cache_dir() == tmp_path / ".cache" / "marnet" / "cubin"


@needs_nvrtc
def test_a_wrong_source_shows_what_the_compiler_said(cache):
    with pytest.raises(RuntimeError, match=r'(?s)NVRTC refuses this source for sm_90.*"nonsense"'):
        compile_cubin(SOURCE.replace("2.f", "nonsense"), "sm_90")
    assert not cache.exists()  # a failure is not kept


@needs_nvrtc
def test_a_source_without_a_kernel_is_refused():
    with pytest.raises(RuntimeError, match="got no kernel, expected 'Used N registers'"):
        compile_cubin("__device__ int unused;", "sm_90")


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"arch: got 'sm_75', expected one of sm_80.*arch_for"):
        compile_cubin(SOURCE, "sm_75")


@pytest.mark.parametrize("option", ["-I/usr/include", "--include-path=x", "--pre-include=x.h"])
def test_headers_are_refused_because_the_key_does_not_cover_them(option):
    with pytest.raises(ValueError, match="expected a source without headers; paste"):
        compile_cubin(SOURCE, "sm_90", [option])


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(RuntimeError, match=r'not installed: pip install "marnet\[cuda\]"'):
        compile_cubin(SOURCE, "sm_90")


def test_missing_library_names_the_extra(monkeypatch):
    def no_library():
        raise RuntimeError("no libnvrtc.so")  # what cuda.bindings does without the library

    bindings = SimpleNamespace(nvrtcVersion=no_library)
    monkeypatch.setattr(compile_module._cuda, "load", lambda _: bindings)
    with pytest.raises(RuntimeError, match=r'cannot be loaded: pip install "marnet\[cuda\]"'):
        compile_cubin(SOURCE, "sm_90")


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_target_of_a_gpu(capability, target):
    assert compile_module.arch_for(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_a_gpu_without_a_target_is_refused(capability):
    with pytest.raises(ValueError, match=r"got \d+\.\d, expected a GPU .* such as torchscript"):
        compile_module.arch_for(capability)

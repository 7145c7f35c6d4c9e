"""Machine code that the package brings along: used without NVRTC, and never for another source."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from quick import kept

from marnet_kernels import TARGETS, compile_cubin, ship
from marnet_kernels import compile as compile_module
from marnet_kernels.compile import source
from marnet_kernels.native.library import file_name
from marnet_kernels.persistent import shipped_options

ROOT = Path(__file__).parent.parent.parent
OPTIONS = shipped_options()[0]
ONE = [("reverse_sampler", OPTIONS)]

needs_nvrtc = pytest.mark.usefixtures("nvrtc")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of shipped code, empty."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(compile_module, "SHIPPED", folder)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    return folder


def forget_nvrtc(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)


@needs_nvrtc
def test_shipped_code_needs_no_compiler(shipped, monkeypatch, tmp_path):
    ((_, compiled),) = ship.ship(shipped, ONE, ["sm_90"]).items()
    forget_nvrtc(monkeypatch)
    cubin = compile_cubin(source("reverse_sampler"), "sm_90", OPTIONS)
    assert cubin == compiled
    assert b"reverse_sampler" in cubin.code
    assert cubin.compiler.startswith("NVRTC ")
    assert not (tmp_path / "cache").exists()


@needs_nvrtc
@pytest.mark.parametrize("changed", ["source", "arch", "options"])
def test_shipped_code_answers_for_its_own_source_alone(changed, shipped, monkeypatch):
    ship.ship(shipped, ONE, ["sm_90"])
    forget_nvrtc(monkeypatch)
    with pytest.raises(RuntimeError, match=r'not installed: pip install "marnet\[cuda\]"'):
        compile_cubin(
            source("reverse_sampler") + (" " if changed == "source" else ""),
            "sm_80" if changed == "arch" else "sm_90",
            [*OPTIONS, "-DN=1"] if changed == "options" else OPTIONS,
        )


@needs_nvrtc
def test_a_damaged_file_is_compiled_anew(shipped):
    ((_, compiled),) = ship.ship(shipped, ONE, ["sm_90"]).items()
    (file,) = shipped.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert compile_cubin(source("reverse_sampler"), "sm_90", OPTIONS) == compiled


@needs_nvrtc
def test_shipping_twice_gives_the_same_bytes(shipped):
    """So that a wheel can be built again."""
    ship.ship(shipped, ONE, ["sm_90"])
    (file,) = shipped.iterdir()
    first = file.read_bytes()
    ship.ship(shipped, ONE, ["sm_90"])
    assert file.read_bytes() == first


@needs_nvrtc
def test_shipping_again_removes_what_is_out_of_date(shipped):
    ship.ship(shipped, ONE, ["sm_80"])
    (old,) = shipped.iterdir()
    kept = shipped / "README"
    kept.touch()
    ship.ship(shipped, ONE, ["sm_90"])
    assert not old.exists()
    assert len(list(shipped.glob("*.cubin"))) == 1
    assert kept.exists()


@pytest.mark.slow
@needs_nvrtc
def test_the_command_tells_what_it_made(shipped, monkeypatch, capsys):
    monkeypatch.setattr(ship, "shipped_variants", lambda: ONE)
    ship.main([str(shipped)])
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"reverse_sampler {t}" for t in TARGETS]
    assert all("0 bytes spilled" in line for line in lines)
    assert total.startswith(f"{len(TARGETS)} files, 0.")
    assert total.endswith(f" MiB in {shipped}")
    assert len(list(shipped.glob("*.cubin"))) == len(TARGETS)


def test_without_nvrtc_the_command_says_what_to_install(shipped, monkeypatch):
    forget_nvrtc(monkeypatch)
    with pytest.raises(RuntimeError, match=r'not installed: pip install "marnet\[cuda\]"'):
        ship.main([str(shipped)])


def test_every_variant_is_listed_once_and_has_a_source():
    variants = ship.shipped_variants()
    assert len(set(variants)) == len(variants)
    for name, options in variants:
        assert "__global__" in source(name)
        assert all(isinstance(option, str) for option in options)


@pytest.mark.parametrize("kind", kept(["wheel", "sdist"], {"wheel"}))
def test_what_is_built_holds_the_shipped_code(kind, tmp_path):
    """It is ignored by git, which hatch goes by, so it has to be named."""
    copy = tmp_path / "marnet"
    packages = ("sdk", "kernels", "train", "export", "benchmarks")
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.cubin")
    for folder in packages:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "hatch_build.py", ".gitignore", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    cubins = copy / "kernels/marnet_kernels/cubins"
    cubins.mkdir(exist_ok=True)
    shipped = {
        "marnet_kernels/cubins/0123.cubin": b"code",
        f"marnet_kernels/native/{file_name()}": b"compiled",  # so it is not compiled again
    }
    for name, content in shipped.items():
        (copy / "kernels" / name).write_bytes(content)
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", tmp_path / "dist"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (built,) = (tmp_path / "dist").iterdir()
    if kind == "wheel":
        assert {name: ZipFile(built).read(name) for name in shipped} == shipped
    else:
        shutil.unpack_archive(built, tmp_path / "unpacked", filter="data")
        (folder,) = (tmp_path / "unpacked").iterdir()
        found = {name: (folder / "kernels" / name).read_bytes() for name in shipped}
        assert found == shipped

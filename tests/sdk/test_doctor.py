"""marnet-doctor tells what runs here and what does not, and breaks on nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from marnet_sdk.commands import examination
from marnet_sdk.commands.doctor import main
from marnet_sdk.commands.examination import examine
from marnet_sdk.cpus import cpus


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_table_tells_versions_threads_and_backends():
    result = run()
    assert result.exit_code == 0, result.stderr
    said, here = one_line(result.stdout), cpus()
    assert f"marnet {metadata.version('marnet')}" in said
    assert f"CPUs {here.allowed} of {here.machine} CPUs, {here.cores} cores" in said
    assert f"threads {here.threads} by default" in said
    assert f"onnxruntime yes onnxruntime {metadata.version('onnxruntime')}" in said
    assert "native loop" in said
    assert "Next: marnet-doctor BUNDLE" in one_line(result.stderr)


def test_json_has_the_same_for_programs():
    found = json.loads(run("--format", "json").stdout)
    assert found["backends"]["torchscript"]["packages"]["torch"] == metadata.version("torch")
    assert found["cpus"]["threads"] == cpus().threads
    assert found["extras"]["onnxruntime"] == {"ok": True, "missing": []}
    assert found["bundles"] == []


def test_nothing_that_takes_long_is_imported():
    code = (
        "import sys; from marnet_sdk.commands.examination import examine; examine();"
        "print([n for n in ('torch', 'onnxruntime', 'openvino', 'transformers', 'tensorrt_rtx')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make these look as if they were not installed."""
    find, version = importlib.util.find_spec, metadata.version
    hidden = {name.replace("-", "_") for name in packages}

    def tell(name: str) -> str:
        if name in packages:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(examination, "find_spec", lambda n: None if n in hidden else find(n))
    monkeypatch.setattr(examination.metadata, "version", tell)


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    without(monkeypatch, "openvino", "torch", "psutil")
    found = examine()
    assert found["backends"]["openvino"]["problem"] == "openvino is not installed"
    result = one_line(run().stdout)
    assert 'openvino no openvino is not installed; run: pip install "marnet[openvino]"' in result
    assert 'torchscript no torch is not installed; run: pip install "marnet[torch]"' in result
    assert found["extras"]["train"]["missing"] == ["psutil", "torch"]
    assert {"torch", "openvino", "psutil"} <= set(found["extras"]["bench"]["missing"])
    assert 'run: pip install "marnet[bench]"' in result


def test_a_version_that_does_not_fit_is_a_reason(monkeypatch):
    version = metadata.version
    old = {"onnxruntime": "1.2.0"}
    monkeypatch.setattr(examination.metadata, "version", lambda n: old.get(n) or version(n))
    found = examine()["backends"]["onnxruntime"]
    assert found["problem"] == "onnxruntime is 1.2.0, expected >=1.19"
    assert found["install"] == 'pip install "marnet[onnxruntime]" --upgrade'


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.11.0", ">=2.11", True),
        ("2.11", ">=2.11.0", True),
        ("2.9.1+cpu", ">=2.11", False),
        ("2.13.0+cpu", ">=2.11", True),
        ("1.8.0", "<1.8,>=1.7", False),
        ("1.7.2", "<1.8,>=1.7", True),
        ("0.1.0", "==0.1.0", True),
        ("dev", ">=3", True),
        ("3", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, fits):
    assert examination._fits(version, wanted) is fits


def test_a_gpu_that_is_there_is_named(monkeypatch):
    from marnet_sdk.gpu.tensorrt_library import Device

    monkeypatch.setattr(examination, "find_device", lambda: Device("NVIDIA L4", (8, 9), 13020))
    result = one_line(run().stdout)
    assert "GPU NVIDIA L4 (sm89), driver of CUDA 13.2" in result
    found = examine()
    assert "no CUDA" not in json.dumps(found["backends"]["tensorrt"])


def test_a_probe_that_fails_is_a_finding_and_no_error(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("a strange machine")

    for name in ("cpus", "host_flags", "find_device", "why_missing", "versions", "_requirements"):
        monkeypatch.setattr(examination, name, broken)
    result = run()
    assert result.exit_code == 0, result.output
    problems = Counter(one_line(result.stdout).split("cannot be told: "))
    assert sum(problems.values()) > 6
    assert "RuntimeError: a strange machine" in result.stdout
    assert 'pip install "marnet[onnxruntime]"' in result.stderr


def test_the_native_loop_that_is_missing_says_so_and_names_the_compiler(monkeypatch, tmp_path):
    reason = "the native loop is not compiled: no libx.so"
    monkeypatch.setattr(examination, "why_missing", lambda: reason)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    result = one_line(run().stdout)
    assert f"native loop {reason}" in result
    assert "compiler none; install g++" in result


def test_bundles_are_opened_and_one_that_cannot_be_used_is_exit_code_5(bundle_of, tmp_path):
    good = bundle_of("onnxruntime", "fp32")
    bad = shutil.copytree(good, tmp_path / "bad.marnet")
    with next((bad / "payload").iterdir()).open("ab") as file:
        file.write(b"x")
    result = run(good, bad, tmp_path / "none", "--format", "json")
    assert result.exit_code == 5
    first, second, third = json.loads(result.stdout)["bundles"]
    assert first["ok"]
    assert first["what"].startswith(f"Classifier('{good}': 10 classes, onnxruntime fp32")
    assert first["threads"] >= 1
    assert "copy or export the bundle again" in second["problem"]
    assert "is not a directory" in third["problem"]


def test_a_bundle_that_is_usable_ends_with_the_command_that_uses_it(bundle_of):
    good = bundle_of("onnxruntime", "fp32")
    result = run(good)
    assert result.exit_code == 0
    assert f"{good} yes Classifier(" in one_line(result.stdout)
    assert f"Next: marnet-classify IMAGE --model {good}" in one_line(result.stderr)


def test_a_bundle_that_ends_its_process_does_not_end_the_doctor(monkeypatch, tmp_path):
    monkeypatch.setattr(
        examination, "_OPEN", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    )
    result = run(tmp_path)
    assert result.exit_code == 5
    assert "opening it ends the process with SIGILL" in one_line(result.stdout)


def test_names_with_control_characters_are_shown_as_escapes(tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "_OPEN", "raise SystemExit('\\x1b[2J')")
    result = run(tmp_path / "\x1b[2J\n")
    assert "\x1b" not in result.stdout

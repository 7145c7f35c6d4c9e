"""What importing the SDK costs a process that may never classify anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from marnet_sdk import Classifier

HEAVY = (
    "torch", "transformers", "tokenizers", "onnx", "onnxruntime", "sklearn", "scipy", "rich",
    "click", "marnet_train", "marnet_export", "marnet_bench", "fastapi", "starlette", "uvicorn",
    "pydantic", "prometheus_client", "ray", "pyarrow",
)  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "import marnet_sdk",
        "from marnet_sdk import Classifier, ImageError, InvalidImages, Prediction",
        "import marnet_sdk.backends, marnet_sdk.bundle, marnet_sdk.noise.trajectory",
        "import marnet_sdk.backends.onnxruntime, marnet_sdk.backends.torchscript",
    ],
)
def test_importing_the_sdk_imports_no_framework(code):
    assert imported_by(code) == []


def test_importing_the_commands_imports_no_framework_either():
    """So that --help and a wrong flag answer at once."""
    modules = (
        "marnet_sdk.commands.classify, marnet_sdk.commands.doctor, marnet_sdk.server.cli, "
        "marnet_train.cli, marnet_export.cli, marnet_export.bundle_cli, marnet_bench.cli"
    )
    code = f"import {modules}"
    light = {"rich", "click", "marnet_train", "marnet_export", "marnet_bench"}
    assert set(imported_by(code)) - light == set()


def test_importing_the_sdk_needs_nothing_that_only_unix_has():
    leaves = "marnet_sdk.text, marnet_sdk.backends.onnxruntime, marnet_sdk.backends.openvino"
    code = (
        "import os, sys, sysconfig\n"
        "for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
        "for name in ('fork', 'register_at_fork', 'sched_getaffinity'): delattr(os, name)\n"
        f"import marnet_sdk, {leaves}\n"
        "from marnet_sdk.cpus import cpus; assert cpus().threads >= 1"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_classifying_needs_nothing_that_only_unix_has(bundle_of, digits, backend):
    """This concerns our own code; what the backend's package imports is its own business."""
    code = (
        "import os, sys\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '1'; sys.modules['openvino_telemetry'] = None\n"
        f"import numpy, PIL.Image, safetensors, {backend}\n"
        "for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
        "for name in ('fork', 'pread', 'register_at_fork', 'sched_getaffinity', 'umask'):\n"
        "    delattr(os, name)\n"
        "from marnet_sdk import Classifier\n"
        "from marnet_sdk.cpus import cpus\n"
        "assert cpus().threads >= 1\n"
        "print(Classifier(sys.argv[1], threads=1).predict(sys.argv[2]).label)\n"
        "assert 'marnet_sdk.outputs' not in sys.modules, 'writers alone need it'\n"
        "assert not [name for name in sys.modules if name.startswith('marnet_sdk.gpu.')]"
    )
    bundle, image = bundle_of(backend, "fp32"), min((digits / "test").glob("*.png"))
    command = [sys.executable, "-c", code, str(bundle), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [Classifier(bundle).predict(image).label]


def imported_by(code: str) -> list[str]:
    """Which of the heavy packages a fresh process has after `code`."""
    probe = f"{code}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    command = [sys.executable, "-W", "error", "-c", probe]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_the_public_face_is_what_a_user_types():
    import marnet_sdk

    assert set(marnet_sdk.__all__) == {
        "Classifier", "ImageError", "InvalidImages", "MarnetError", "Prediction", "Score",
        "__version__",
    }  # fmt: skip
    assert all(hasattr(marnet_sdk, name) for name in marnet_sdk.__all__)

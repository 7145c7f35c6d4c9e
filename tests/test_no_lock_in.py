"""The programs of docs/without-marnet.md run as they stand, where marnet is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from compilers import need_compiler
from quick import kept
from safetensors.numpy import load_file
from tolerances import BUILT

PAGE = (Path(__file__).parents[1] / "docs/without-marnet.md").read_text("utf-8")
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torchscript": "TorchScript",
    "aotinductor": "AOTInductor",
}
# Packages are found without the .pth files of site-packages, one of which points at marnet.
BEFORE = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
ours = ("marnet_sdk", "marnet_export", "marnet_train", "marnet_kernels", "marnet_bench")
assert not any(importlib.util.find_spec(name) for name in ours)
sys.modules["openvino_telemetry"] = None
BUNDLE = sys.argv[1]
"""
AFTER = """
import numpy
numpy.save(sys.argv[2], numpy.asarray(logits))
"""


def program(backend: str) -> str:
    """The code under the backend's title."""
    found = re.search(rf"^## {TITLES[backend]}\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert found, backend
    return found[1]


@pytest.mark.parametrize(
    ("backend", "precision"),
    kept(
        [
            ("onnxruntime", "fp32"),
            ("onnxruntime", "fp16"),
            ("openvino", "fp32"),
            ("openvino", "fp16"),
            ("torchscript", "fp16"),
            ("aotinductor", "fp32"),
        ],
        {("onnxruntime", "fp32"), ("openvino", "fp32"), ("torchscript", "fp16")},
        many=True,
    ),
)
def test_the_graphs_give_their_golden_logits_without_marnet(
    backend, precision, bundle_of, tmp_path
):
    if backend == "aotinductor":
        need_compiler()
    bundle = bundle_of(backend, precision)
    code, out = tmp_path / "program.py", tmp_path / "logits.npy"
    code.write_text(BEFORE + program(backend) + AFTER)
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "HOME": str(tmp_path)}
    kept = {name: os.environ[name] for name in ("PATH", "OMP_WAIT_POLICY") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(code), str(bundle), str(out)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    want = load_file(bundle / "golden/answers.safetensors")["logits"]
    got = np.load(out)[:, 0]
    assert np.abs(got - want).max() <= BUILT["fp32"] * np.abs(want).max()

"""The question to TensorRT-RTX's runtime: the engine is built here, the rest needs a driver."""

from __future__ import annotations

import json
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from benchmark_scripts import load_script

from marnet_sdk.errors import BackendUnavailable, ExportError
from marnet_sdk.gpu.tensorrt_library import (
    RTX,
    Device,
    Library,
    find_device,
    load_library,
    read_header,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks/rtx_validity.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = list(sys.path)
    module = load_script("rtx_validity.py")
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    return load_library(RTX)


@pytest.mark.parametrize("targets", [(), ("sm86", "sm120")])
def test_an_engine_is_built_without_a_gpu(script, library, tmp_path, targets):
    file = tmp_path / "small.engine"
    file.write_bytes(script.build_engine(library, targets))
    header = read_header(file)
    assert header.version == library.version
    assert header.size > 2 * script.WIDTH**2


def test_a_target_that_the_library_does_not_have_is_named(script, library):
    with pytest.raises(ExportError, match="does not build for sm12345; leave it out of --target"):
        script.build_engine(library, ["sm12345"])


def test_without_a_driver_it_says_so_before_the_runtime_is_touched(tmp_path):
    try:
        find_device()
    except BackendUnavailable as error:
        reason = str(error)
    else:
        pytest.skip("there is a GPU here")
    output = tmp_path / "validity.json"
    command = [sys.executable, SCRIPT, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == f"no GPU to ask about: {reason}\n"
    assert not output.exists()


class Validity(Enum):
    VALID, INVALID = 0, 2


def test_the_answer_is_kept_with_the_gpu_and_the_versions(script, tmp_path, monkeypatch, capsys):
    class Runtime:
        def __init__(self, log: object) -> None:
            pass

        def get_engine_validity(self, engine: bytes) -> tuple[Validity, int]:
            return Validity.INVALID, 2

    flags = SimpleNamespace(UNSUPPORTED_CC=2)
    logger = type("ILogger", (), {"__init__": lambda self: None})
    module: object = SimpleNamespace(
        Runtime=Runtime, ILogger=logger, EngineInvalidityDiagnostics=flags
    )
    found = Library(RTX, "1.2.3", module)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(script, "find_device", lambda: Device("A GPU", (9, 0), 13000))
    monkeypatch.setattr(script, "load_library", lambda flavour: found)
    engine, output = tmp_path / "any.engine", tmp_path / "validity.json"
    engine.write_bytes(b"vtrt")
    assert script.main(["--engine", str(engine), "--output", str(output)]) == 0
    said = "A GPU (sm90): INVALID (it was not built for a GPU of this compute capability)"
    assert said in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["gpu"] == {"name": "A GPU", "capability": [9, 0], "driver": 13000}
    assert (report["answer"], report["mask"]) == ("INVALID", 2)
    assert report["library"] == "TensorRT-RTX 1.2.3"
    assert report["engine"] == {"from": str(engine), "targets": "default", "bytes": 4}

"""The second route to the encoder's engine: what is asked of torch-tensorrt, and what is refused.

Where there is no GPU, packages stand in for it that do what the real one was seen to do there.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick import kept
from tiny import make_model
from tolerances import BUILT, FLOAT32_LAYER

from marnet_export.build.builder import Order
from marnet_export.build.tensorrt import engines
from marnet_export.build.tensorrt.graphs import build_encoder, build_refine, open_reference
from marnet_export.build.tensorrt.torch_route import (
    encoder_engine,
    export_program,
    load_torch_tensorrt,
)
from marnet_export.build.types import TORCH_TYPES, Types
from marnet_export.lower.methods import Lowered, lower
from marnet_export.lower.modules import with_compute
from marnet_sdk.backends.tensorrt import open_payload
from marnet_sdk.errors import BackendUnavailable, ExportError, InvalidInput, MissingExtra
from marnet_sdk.files import sha256_file
from marnet_sdk.gpu.tensorrt_library import STANDARD, Device, Library, load_library, read_index
from marnet_sdk.noise.tables import Floats

BUCKETS = (1, 4)
TYPES = Types("fp16", "fp16")
INSTEAD = "use the ONNX route, which is the default"
# What torch_tensorrt 2.13.0 does when it is imported without the libraries of TensorRT.
WITHOUT_LIBRARIES = """
error = "Could not find libnvinfer.so.11"
print(f"import error when try to import _TensorRTProxyModule, got error {error}")
raise Exception(f"import error when try to import _TensorRTProxyModule, got error {error}")
"""
WITHOUT_CUDA = "raise AssertionError('Torch not compiled with CUDA enabled')"
# Writes down what it is asked for, and answers as it is told.
RECORDER = '''
import json, logging
from pathlib import Path
from typing import Any
from types import SimpleNamespace

__version__ = "2.13.0"

class Input:
    def __init__(self, **shape):
        self.shape = shape

def convert(program, *, arg_inputs, **settings):
    """of the signature of 2.13.0, as far as it is used"""
    asked = {name: str(value) for one in arg_inputs for name, value in one.shape.items()}
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    record = {"input": asked, "settings": settings, "names": nodes}
    Path(__file__).with_name("asked.json").write_text(json.dumps(record))
    answer = Path(__file__).with_name("answer").read_bytes()
    if not answer:
        logging.getLogger("torch_tensorrt").error("a long story")
        raise RuntimeError("While interpreting the module got an error: no converter\\nand more")
    return bytearray(answer)

dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
'''


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder whose packages are found before those that are installed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    sys.modules.pop("torch_tensorrt", None)


def install(folder: Path, content: str, answer: bytes = b"an engine") -> None:
    (folder / "torch_tensorrt.py").write_text(content)
    (folder / "answer").write_bytes(answer)
    importlib.invalidate_caches()


def vision_of(kind: str) -> Lowered:
    settings = {
        "vit": {"hidden_size": 24, "image_size": 32, "patch_size": 8, "intermediate_size": 48,
                "num_hidden_layers": 1, "num_attention_heads": 2},
        "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2],
                 "num_heads": [2], "window_size": 4},
    }  # fmt: skip
    return lower(make_model(vision={"model_type": kind, **settings[kind]}))


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return vision_of("vit")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def answer_of(lowered: Lowered, pixels: torch.Tensor) -> Floats:
    return lowered.encoder(pixels).numpy()


# --- the package


def test_where_it_is_not_installed_the_pip_line_and_the_other_route_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(
        MissingExtra, match=rf'run: pip install "marnet\[torch-tensorrt\]", or {INSTEAD}'
    ):
        load_torch_tensorrt()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WITHOUT_LIBRARIES, r"Exception: import error when .* Could not find libnvinfer\.so\.11"),
        (WITHOUT_CUDA, "AssertionError: Torch not compiled with CUDA enabled"),
        ("import tensorrt_that_is_not_here", "ModuleNotFoundError: No module named 'tensorrt_"),
        ("__version__ = '2.13.0'", "AttributeError: .* no attribute 'dynamo'"),
    ],
)
def test_where_it_cannot_be_imported_the_reason_is_quoted(content, reason, packages, capfd):
    install(packages, content)
    with pytest.raises(
        BackendUnavailable, match=rf"cannot be imported here \({reason}.*\); it needs.*{INSTEAD}"
    ) as caught:
        load_torch_tensorrt()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_one_whose_engines_have_not_the_types_of_the_model_is_refused(packages):
    install(packages, RECORDER.replace("2.13.0", "2.12.1+cu130"))
    with pytest.raises(BackendUnavailable, match=r"2\.12\.1\S* is installed, expected 2\.13 or"):
        load_torch_tensorrt()


def test_the_one_for_tensorrt_rtx_is_refused_before_it_is_imported(packages):
    """Imported, it would stand in sys.modules under the name of standard TensorRT."""
    install(packages, "raise SystemExit('imported')")
    about = packages / "torch_tensorrt_rtx-2.13.0.dist-info/METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: torch-tensorrt-rtx\nVersion: 2.13.0\n")
    importlib.invalidate_caches()
    with pytest.raises(BackendUnavailable, match=r"torch-tensorrt-rtx is installed, expected"):
        load_torch_tensorrt()


# --- the graph


@pytest.mark.parametrize("kind", kept(["vit", "swin"], {"vit"}))
@pytest.mark.parametrize("compute", kept(["fp32", "fp16", "bf16"], {"fp16"}))
def test_every_product_has_the_type_that_was_asked_for(kind, compute, pixels):
    lowered, dtype = vision_of(kind), TORCH_TYPES[compute]
    program = export_program(with_compute(lowered.encoder, dtype), pixels[:2], dtype)
    kinds = ("addmm", "linear", "convolution", "conv2d", "matmul", "bmm", "attention")
    seen = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and any(kind in str(node.target) for kind in kinds):
            seen[node.meta["val"].dtype] += 1
    assert set(seen) == {dtype}
    assert seen[dtype] >= 8
    tolerance = FLOAT32_LAYER if compute == "fp32" else BUILT[compute]
    for batch in (1, 2, 4):
        got = program.module()(pixels[:batch]).detach().numpy()
        want = answer_of(lowered, pixels[:batch])
        assert got.dtype == np.float32
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# --- what it is asked for


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_one_profile_takes_every_batch_and_float32_is_not_cut_short(
    compute, lowered, pixels, packages
):
    install(packages, RECORDER)
    dtype = TORCH_TYPES[compute]
    module = with_compute(lowered.encoder, dtype)
    assert encoder_engine(module, pixels[:2], (64, 1, 16), dtype) == b"an engine"
    asked = json.loads((packages / "asked.json").read_text())
    assert asked["input"] == {
        "min_shape": "(1, 3, 32, 32)",
        "opt_shape": "(8, 3, 32, 32)",
        "max_shape": "(64, 3, 32, 32)",
        "dtype": "torch.float32",
    }
    assert asked["settings"] == {"disable_tf32": True, "decompose_attention": compute == "fp32"}
    assert asked["names"][-1] == "pixels"  # the name by which the engine is run


def test_what_it_cannot_convert_is_one_line_and_no_traceback(
    lowered, pixels, packages, capfd, caplog
):
    install(packages, RECORDER, answer=b"")
    with pytest.raises(
        ExportError, match=rf"2\.13\.0 cannot build the encoder \(RuntimeError: .*\); {INSTEAD}$"
    ) as caught:
        encoder_engine(lowered.encoder, pixels[:2], BUCKETS, torch.float32)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert "torch_tensorrt" not in {record.name for record in caplog.records}
    assert logging.root.manager.disable == logging.NOTSET


# --- the payload


Build = Callable[..., None]


@pytest.fixture
def build(lowered, pixels, tmp_path, monkeypatch) -> Build:
    """Builds an encoder as on a machine with an Ada GPU, whose standard TensorRT is TensorRT-RTX
    here: what it is called decides."""
    ada, rtx = Device("NVIDIA L4", (8, 9), 13000), load_library("tensorrt_rtx")
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "find_device", lambda: ada)

    def run(flavour: str = STANDARD, **settings: Any) -> None:
        library = Library(flavour, rtx.version, rtx.module)
        monkeypatch.setattr(engines, "load_library", lambda name: library)
        types = settings.pop("types", TYPES)
        order = Order(**{"route": "torch-tensorrt", "buckets": BUCKETS} | settings)
        (tmp_path / "payload").mkdir(exist_ok=True)
        build_encoder(lowered, pixels[:2], types, tmp_path / "payload", order)

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_its_engine_takes_the_place_of_the_other_s(build, lowered, pixels, packages, tmp_path):
    payload = tmp_path / "payload"
    install(packages, RECORDER)
    build()
    (engines,) = read_index(payload)
    assert (engines.flavour, engines.targets) == ("tensorrt", ("sm89",))
    path, engine = engines.file(payload, "encoder"), engines.engines["encoder"]
    assert path.read_bytes() == b"an engine"
    assert (engine.sha256, engine.size) == (sha256_file(path), len(b"an engine"))
    assert engine.batches == ((1, 4),)
    assert engine.onnx_sha256 == sha256_file(payload / "encoder.onnx")
    # The loop comes by the other route, and leaves the encoder as it is.
    build_refine(lowered, TYPES, payload, Order(buckets=BUCKETS))
    (both,) = read_index(payload)
    assert both.engines["encoder"] == engine
    assert both.engines["refine"].batches == ((1, 1), (4, 4))
    assert path.read_bytes() == b"an engine"
    # What is verified without a GPU, and rebuilt from, is there.
    got, want = open_reference(payload, 1).encode(pixels.numpy()), answer_of(lowered, pixels)
    assert np.abs(got - want).max() <= BUILT["fp16"] * np.abs(want).max()


def test_it_is_not_mixed_with_engines_of_tensorrt_rtx(build, packages):
    install(packages, RECORDER)
    with pytest.raises(
        ExportError, match=r"engines of standard TensorRT, this .* TensorRT-RTX 1\."
    ):
        build("tensorrt_rtx")
    assert not (packages / "asked.json").exists()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"route": "torch_tensorrt"}, InvalidInput, r"expected onnx or torch-tensorrt\. Did you"),
        ({"route": "onxx"}, InvalidInput, "route: got 'onxx', .* Did you mean 'onnx'"),
        ({"types": Types("int8", "fp16")}, ExportError, f"bf16 or fp32, got int8.*{INSTEAD}"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(
    settings, kind: type[Exception], message, build, packages, tmp_path
):
    install(packages, RECORDER)
    with pytest.raises(kind, match=message):
        build(**settings)
    assert list((tmp_path / "payload").iterdir()) == []


def test_other_gpus_are_refused_with_the_route_that_builds_for_them(lowered, pixels, tmp_path):
    how: dict[str, Any] = {"route": "torch-tensorrt", "targets": ["sm86", "sm89"]}
    with pytest.raises(ExportError, match=f"this machine, got targets sm86, sm89; .*{INSTEAD}"):
        build_encoder(lowered, pixels[:2], TYPES, tmp_path, Order(**how))
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_imported_nothing_is_written(build, packages, tmp_path):
    install(packages, WITHOUT_CUDA)
    with pytest.raises(BackendUnavailable, match="Torch not compiled with CUDA enabled"):
        build()
    assert list((tmp_path / "payload").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_the_real_engine_answers_as_the_model_does(compute, lowered, pixels, tmp_path):
    try:
        load_torch_tensorrt()
    except (MissingExtra, BackendUnavailable) as error:
        pytest.skip(str(error))
    types = Types(compute, compute)
    how: dict[str, Any] = {"buckets": BUCKETS, "route": "torch-tensorrt"}
    build_encoder(lowered, pixels[:2], types, tmp_path, Order(**how))
    build_refine(lowered, types, tmp_path, Order(buckets=BUCKETS))
    run = open_payload(tmp_path, compute, None)
    for batch in (1, 3, 4):
        want = answer_of(lowered, pixels[:batch])
        got = run.encode(pixels[:batch].numpy())
        assert np.abs(got - want).max() <= BUILT[compute] * np.abs(want).max()

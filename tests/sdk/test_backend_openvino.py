"""The OpenVINO leaf: silent, safe to call from several threads, clear about what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration import calibrate
from tiny import make_model, tables_of

from marnet_export.build.builder import Order
from marnet_export.build.openvino.graphs import build_encoder, build_refine
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower
from marnet_export.lower.plan import make_plan
from marnet_sdk.backends import open_backend
from marnet_sdk.backends.openvino import ENCODER, REFINE, load_openvino
from marnet_sdk.errors import BackendUnavailable, MissingExtra
from marnet_sdk.noise.tables import Tables
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

GRAPHS = (ENCODER, REFINE)
OV = load_openvino()


@pytest.fixture(scope="module")
def model() -> MARNet:
    return make_model(hidden=48, dim=32)


@pytest.fixture(scope="module")
def payload(model, tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("openvino")
    types = Types("fp32", "fp32")
    build_encoder(lower(model), torch.rand(2, 3, 32, 32), types, folder)
    build_refine(lower(model), types, folder)
    return folder


def tables(model: MARNet, samples: int = 1, seed: int = 0) -> Tables:
    table = sampler_table(model.config.schedule, "ddpm", 20)
    return tables_of(model, make_plan(model), table, samples=samples, seed=seed)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, 32, 32), np.float32)


def test_calls_from_eight_threads_give_what_calls_one_after_another_give(model, payload):
    backend = open_backend("openvino", payload, "fp32", 2)
    inputs = [
        (pixels(1 + i % 5, seed=i), tables(model, samples=1 + i % 3, seed=i)) for i in range(48)
    ]

    def answer(given: tuple[np.ndarray, Tables]) -> list[np.ndarray]:
        x_v = backend.encode(given[0])
        return [x_v, *backend.refine(x_v, given[1])]

    one_after_another = [answer(given) for given in inputs]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(answer, inputs))
    for got, want in zip(at_once, one_after_another, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_requests_are_kept_for_the_next_call(model, payload):
    backend: Any = open_backend("openvino", payload, "fp32", 1)
    for _ in range(3):
        backend.encode(pixels(2))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: backend.encode(pixels(2)), range(40)))
    assert 1 <= len(backend._encoder._idle) <= 4


def test_a_call_that_fails_does_not_cost_the_next_one(model, payload):
    backend = open_backend("openvino", payload, "fp32", 1)
    want = backend.encode(pixels(2))
    with pytest.raises(RuntimeError):
        backend.encode(np.zeros((2, 4, 32, 32), np.float32))
    np.testing.assert_array_equal(backend.encode(pixels(2)), want)


def test_answers_outlive_the_next_call_and_belong_to_the_caller(model, payload):
    backend = open_backend("openvino", payload, "fp32", 1)
    x_v = backend.encode(pixels(3))
    first = [x_v, *backend.refine(x_v, tables(model))]
    kept = [array.copy() for array in first]
    other = backend.encode(pixels(3, seed=1))
    backend.refine(other, tables(model, seed=1))
    assert not np.array_equal(other, x_v)
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert array.dtype == np.float32
        assert array.flags.writeable
        array[:] = 0
    np.testing.assert_array_equal(backend.encode(pixels(3)), kept[0])


def test_inputs_are_left_alone_and_may_be_changed_afterwards(model, payload):
    backend = open_backend("openvino", payload, "fp32", 1)
    given, table = pixels(3), tables(model, samples=2)
    want = backend.refine(backend.encode(given), table)[0]
    arrays = [given, table.coefficients, table.bias]
    for array, copy in zip(arrays, [a.copy() for a in arrays], strict=True):
        np.testing.assert_array_equal(array, copy)
        array[:] = np.nan
    again = backend.refine(backend.encode(pixels(3)), tables(model, samples=2))[0]
    np.testing.assert_array_equal(again, want)


def test_arrays_that_are_read_only_or_not_contiguous_are_taken(model, payload):
    backend = open_backend("openvino", payload, "fp32", 1)
    want = backend.encode(pixels(3))
    wide = np.zeros((3, 3, 32, 64), np.float32)
    wide[..., ::2] = pixels(3)
    np.testing.assert_array_equal(backend.encode(wide[..., ::2]), want)
    fixed = pixels(3)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(backend.encode(fixed), want)


def test_threads_are_those_that_were_asked_for(payload):
    backend: Any = open_backend("openvino", payload, "fp32", 1)
    compiled = backend._encoder._compiled  # all graphs are compiled by one function
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == OV.Type.f32


def test_a_type_that_openvino_cannot_compute_in_is_refused(payload):
    message = "openvino computes in fp32 or bf16 on a CPU, the bundle asks fp16"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend("openvino", payload, "fp16", None)


@pytest.fixture
def old_cpu(monkeypatch) -> None:
    """Only float32."""
    real = OV.Core()

    class Old:
        read_model = staticmethod(real.read_model)
        compile_model = staticmethod(real.compile_model)
        set_property = staticmethod(real.set_property)

        def get_property(self, device: str, name: str) -> Any:
            return {"OPTIMIZATION_CAPABILITIES": ["FP32"], "FULL_DEVICE_NAME": "Old CPU "}[name]

    monkeypatch.setattr(OV, "Core", Old)


def test_arithmetic_that_this_cpu_lacks_is_refused(payload, old_cpu):
    message = r"this CPU \(Old CPU\) has no bf16 arithmetic.*--compute fp32"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend("openvino", payload, "bf16", None)


@pytest.mark.parametrize("part", ["encoder", "loop"])
def test_a_part_in_int8_is_refused_where_this_cpu_lacks_it(part, model, tmp_path, request):
    types = {"encoder": Types("fp32", "fp32"), "loop": Types("fp32", "fp32")}
    types[part] = Types("int8", "fp32")
    calibration, lowered = calibrate(model, steps=3), lower(model)
    pixels = torch.rand(2, 3, 32, 32)
    build_encoder(lowered, pixels, types["encoder"], tmp_path, Order(calibration=calibration))
    build_refine(lowered, types["loop"], tmp_path, Order(calibration=calibration))
    request.getfixturevalue("old_cpu")
    message = r"this CPU \(Old CPU\) has no int8 arithmetic.*--precision fp32"
    with pytest.raises(BackendUnavailable, match=message):
        open_backend("openvino", tmp_path, "fp32", None)


@pytest.mark.parametrize("broken", GRAPHS)
@pytest.mark.parametrize("how", ["damaged", "without weights", "missing"])
def test_a_graph_that_cannot_be_opened_names_file_and_version(broken, how, payload, tmp_path):
    for path in payload.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / broken
    match how:
        case "damaged":
            file.write_bytes(b"not a graph")
        case "without weights":
            file.with_suffix(".bin").unlink()
        case "missing":
            file.unlink()
    with pytest.raises(BackendUnavailable, match=rf"openvino \d+\.\d+\S* cannot open .*{broken}"):
        open_backend("openvino", tmp_path, "fp32", None)


def test_without_openvino_the_pip_line_is_named(payload, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[openvino\]"'):
        open_backend("openvino", payload, "fp32", None)


def test_openvino_is_imported_without_telemetry_and_without_torch(payload, tmp_path):
    """Its telemetry would write to the home folder and start threads that send."""
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from marnet_sdk.backends import open_backend\n"
        f"backend = open_backend('openvino', Path({str(payload)!r}), 'fp32', 1)\n"
        "backend.encode(np.zeros((1, 3, 32, 32), np.float32))\n"
        "found = {name.split('.')[0] for name in sys.modules}\n"
        "print(found & {'openvino_telemetry', 'torch'}, threading.active_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("set() 1\n", "")
    assert list(tmp_path.iterdir()) == []


def test_telemetry_can_be_imported_by_others_afterwards():
    import openvino_telemetry

    load_openvino()
    assert sys.modules["openvino_telemetry"] is openvino_telemetry


def test_threads_that_open_it_at_once_do_not_disturb_one_another():
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from marnet_sdk.backends.openvino import load_openvino\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    found = list(pool.map(lambda _: load_openvino(), range(16)))\n"
        "print(len(set(map(id, found))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr

"""The AOTInductor leaf: machine code, so nothing that is wrong may reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick import kept
from tiny import make_model, tables_of
from tolerances import BUILT, FLOAT32_TWICE

from marnet_export.build.aotinductor.graphs import build_encoder, build_refine
from marnet_export.build.builder import Order
from marnet_export.build.types import Types
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import make_plan
from marnet_sdk.backends import aotinductor, torch_device
from marnet_sdk.backends.aotinductor import ENCODER, REFINE, load_model, open_payload
from marnet_sdk.backends.torch_cuda import TorchOnCuda
from marnet_sdk.bundle import PAYLOAD
from marnet_sdk.errors import BackendUnavailable, InvalidInput, MissingExtra
from marnet_sdk.gpu.torch_stream import Cuda
from marnet_sdk.noise.tables import Tables
from marnet_train.diffusion import sampler_table
from marnet_train.models.marnet import MARNet

ROOT = Path(__file__).parents[2]
REBUILD = "export the bundle again on this machine: marnet-export --backend aotinductor"


@pytest.fixture(scope="module")
def model() -> MARNet:
    return make_model(hidden=48, dim=32)


@pytest.fixture(scope="module", params=kept(["fp32", "fp16"], {"fp32"}))
def payload(model, compiled_bundle, request, tmp_path_factory) -> Path:
    """Read-only. Of what is stored in fp16 there is something to convert when it is loaded."""
    if request.param == "fp32":
        return compiled_bundle / PAYLOAD
    folder = tmp_path_factory.mktemp("aotinductor")
    lowered, types = lower_marnet(model), Types("fp16", "fp32")
    build_encoder(lowered, torch.rand(2, 3, 32, 32), types, folder)
    build_refine(lowered, types, folder)
    return folder


def tables(model: MARNet, samples: int = 1, seed: int = 0) -> Tables:
    table = sampler_table(model.config.schedule, "ddpm", 20)
    return tables_of(model, make_plan(model), table, samples=samples, seed=seed)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, 32, 32), np.float32)


def test_calls_from_eight_threads_give_what_calls_one_after_another_give(model, payload):
    """Also right after loading, when the stored weights are converted."""
    inputs = [
        (pixels(1 + i % 5, seed=i), tables(model, samples=1 + i % 3, seed=i)) for i in range(48)
    ]
    backend = open_payload(payload, "fp32", 2)

    def answer(given: tuple[np.ndarray, Tables]) -> list[np.ndarray]:
        x_v = backend.encode(given[0])
        return [x_v, *backend.refine(x_v, given[1])]

    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(answer, inputs))
    one_after_another = [answer(given) for given in inputs]
    for got, want in zip(at_once, one_after_another, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_encoder_is_the_model_s_for_any_batch(model, payload):
    backend = open_payload(payload, "fp32", 1)
    with torch.inference_mode():
        want = model.vision(torch.from_numpy(pixels(5))).numpy()
    for batch in (1, 2, 5):
        error = np.abs(backend.encode(pixels(5)[:batch]) - want[:batch]).max()
        assert error <= BUILT["fp16"] * np.abs(want).max()


def test_one_row_of_noise_for_all_is_that_row_for_each(model, payload):
    backend, table = open_payload(payload, "fp32", 1), tables(model, samples=2)
    x_v = backend.encode(pixels(5))
    each = replace(table, bias=np.repeat(table.bias, 5, axis=1))
    np.testing.assert_array_equal(backend.refine(x_v, each)[0], backend.refine(x_v, table)[0])


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_a_caller_s_autocast_and_gradients_do_not_change_answers(model, payload, context):
    backend = open_payload(payload, "fp32", 1)
    x_v = backend.encode(pixels(3))
    want = [x_v, *backend.refine(x_v, tables(model))]
    with context(), torch.autocast("cpu", torch.bfloat16):
        got = [backend.encode(pixels(3)), *backend.refine(x_v, tables(model))]
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_outlive_the_next_call_and_belong_to_the_caller(model, payload):
    backend = open_payload(payload, "fp32", 1)
    x_v = backend.encode(pixels(3))
    first = [x_v, *backend.refine(x_v, tables(model))]
    kept = [array.copy() for array in first]
    backend.refine(backend.encode(pixels(3, seed=1)), tables(model, seed=1))
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert array.dtype == np.float32
        array[:] = 0
    np.testing.assert_array_equal(backend.encode(pixels(3)), kept[0])


def test_arrays_that_are_read_only_or_not_contiguous_are_taken_and_left_alone(model, payload):
    backend, table = open_payload(payload, "fp32", 1), tables(model)
    want = backend.encode(pixels(3))
    wide = np.zeros((3, 3, 32, 64), np.float32)
    wide[..., ::2] = pixels(3)
    np.testing.assert_array_equal(backend.encode(wide[..., ::2]), want)
    np.testing.assert_array_equal(wide[..., ::2], pixels(3))
    logits = backend.refine(want, table)[0]
    for array in (wide, want, table.bias, table.coefficients):
        array.flags.writeable = False
    np.testing.assert_array_equal(backend.encode(wide[..., ::2]), want)
    np.testing.assert_array_equal(backend.refine(want, table)[0], logits)


WRONG_PIXELS: dict[str, np.ndarray] = {
    "too small": np.zeros((2, 3, 31, 32), np.float32),
    "too large": np.zeros((2, 3, 33, 32), np.float32),
    "channels": np.zeros((2, 4, 32, 32), np.float32),
    "axes": np.zeros((3, 32, 32), np.float32),
    "empty": np.zeros((0, 3, 32, 32), np.float32),
    "float64": np.zeros((2, 3, 32, 32)),
    "integers": np.zeros((2, 3, 32, 32), np.uint8),
    "byte order": np.zeros((2, 3, 32, 32), ">f4"),
}


@pytest.mark.parametrize("wrong", WRONG_PIXELS)
def test_pixels_of_another_shape_or_type_are_refused(payload, wrong):
    array = WRONG_PIXELS[wrong]
    message = r"encoder.pt2 was given \S+ \(.*\) as pixels; it takes float32 \[batch, 3, 32, 32\]"
    with pytest.raises(InvalidInput, match=message):
        open_payload(payload, "fp32", 1).encode(array)


Change = Callable[[np.ndarray, Tables], tuple[np.ndarray, Tables]]
WRONG: dict[str, tuple[Change, str]] = {
    "image width": (lambda x, t: (x[:, :-1], t), r"as x_v; it takes float32 \[batch, 10\]"),
    "coefficients": (
        lambda x, t: (x, replace(t, coefficients=t.coefficients[:, :2].copy())),
        r"as coefficients; it takes float32 \[steps - 1, 3\]",
    ),
    "steps": (
        lambda x, t: (x, replace(t, coefficients=t.coefficients[1:])),
        r"\(19, 1, 2, 48\) as bias; it takes float32 \[18, rows, samples, 48\]",
    ),
    "width": (lambda x, t: (x, replace(t, bias=t.bias[..., :-1])), r"as bias; it takes float32"),
    "type": (lambda x, t: (x, replace(t, bias=t.bias.astype(np.float64))), "float64 .* as bias"),
    "samples": (lambda x, t: (x, replace(t, bias=t.bias[:, :, :0])), r"as bias; it takes float32"),
    "rows": (
        lambda x, t: (x, replace(t, bias=np.repeat(t.bias, 2, axis=1))),
        r"the table of 3 images is \(20, 2, 2, 48\); expected \[steps, 1 or 3, samples, width\]",
    ),
    "no step": (lambda x, t: (x, t.first_steps(0)), "with a step at least"),
    "axes": (lambda x, t: (x, replace(t, bias=t.bias[0])), "with a step at least"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_features_and_tables_of_another_shape_or_type_are_refused(model, payload, wrong):
    change, message = WRONG[wrong]
    backend = open_payload(payload, "fp32", 1)
    x_v, table = backend.encode(pixels(3)), tables(model, samples=2)
    with pytest.raises(InvalidInput, match=message):
        backend.refine(*change(x_v, table))


def test_threads_are_torch_s_for_the_process(payload):
    before = torch.get_num_threads()
    try:
        open_payload(payload, "fp32", 2)
        assert torch.get_num_threads() == 2
        open_payload(payload, "fp32", None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def repacked(source: Path, target: Path, **metadata: str) -> None:
    """A copy that states something else about itself."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("_metadata.json"):
                content = json.dumps(json.loads(content) | metadata).encode()
            new.writestr(entry, content)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"MARNET_CPU_FLAGS": "avx512f avx9_tile", "AOTI_CPU_ISA": "AVX9"},
            r"was compiled for linux \S+ AVX9; this machine is linux \S+ without (avx512f, )?"
            rf"avx9_tile; {REBUILD}",
        ),
        (
            {"AOTI_MACHINE": "riscv128"},
            rf"was compiled for linux riscv128 .*; this machine is linux \S+; {REBUILD}",
        ),
    ],
)
def test_code_for_another_processor_is_refused(payload, tmp_path, metadata, message):
    repacked(payload / ENCODER, tmp_path / ENCODER, **metadata)
    with pytest.raises(BackendUnavailable, match=message):
        open_payload(tmp_path, "fp32", None)


def test_a_processor_that_lacks_what_the_code_uses_refuses_it(payload, monkeypatch):
    needed = aotinductor.read_metadata(payload / ENCODER)[aotinductor.CPU_FLAGS].split()
    if not needed:
        pytest.skip("the compiler found no vector instructions here, so the code needs none")
    monkeypatch.setattr(aotinductor, "host_flags", lambda: frozenset(needed[1:]))
    with pytest.raises(BackendUnavailable, match=f"without {needed[0]}; {REBUILD}"):
        open_payload(payload, "fp32", None)


@pytest.mark.parametrize("broken", [ENCODER, REFINE])
@pytest.mark.parametrize("how", ["damaged", "missing", "without code", "foreign", "not code"])
def test_a_package_that_cannot_be_opened_is_named(payload, tmp_path, broken, how):
    for name in (ENCODER, REFINE):
        if name != broken:
            (tmp_path / name).symlink_to(payload / name)
    match how:
        case "damaged":
            (tmp_path / broken).write_bytes(b"not a package")
        case "foreign":
            with zipfile.ZipFile(tmp_path / broken, "w") as archive:
                archive.writestr("model/some_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
        case "without code" | "not code":
            metadata = aotinductor.read_metadata(payload / broken)
            with zipfile.ZipFile(tmp_path / broken, "w") as archive:
                archive.writestr("model/wrapper_metadata.json", json.dumps(metadata))
                if how == "not code":
                    archive.writestr("model/wrapper.so", b"not a library")
    with pytest.raises(BackendUnavailable, match=rf"cannot (open|load) .*{broken}.*; {REBUILD}"):
        open_payload(tmp_path, "fp32", None)


def test_a_type_that_it_cannot_compute_in_is_refused(payload):
    message = "aotinductor computes in fp32 or bf16 on a CPU, the bundle asks int8"
    with pytest.raises(BackendUnavailable, match=message):
        open_payload(payload, "int8", None)


def test_without_torch_the_pip_line_is_named(payload, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[torch\]"'):
        open_payload(payload, "fp32", None)


def test_it_runs_without_a_compiler_and_leaves_nothing_behind(model, payload, tmp_path):
    """Not even when the process is killed: the unpacked code is gone once it is loaded."""
    x_v = open_payload(payload, "fp32", 1).encode(pixels(2))
    np.save(tmp_path / "x_v.npy", x_v)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
from marnet_sdk.backends.aotinductor import open_payload
backend = open_payload(Path({str(payload)!r}), "fp32", 1)
x_v = backend.encode(np.random.default_rng(0).random((2, 3, 32, 32), np.float32))
np.testing.assert_array_equal(x_v, np.load({str(tmp_path / "x_v.npy")!r}))
wanted = {{"marnet_export", "marnet_train", "transformers", "torch._inductor.cpp_builder"}}
print(sorted(wanted & set(sys.modules)), os.listdir({str(temporary)!r}), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={
            "HOME": str(temporary), "TMPDIR": str(temporary), "PATH": "",
            "PYTHONPATH": f"{ROOT / 'sdk'}{os.pathsep}{ROOT / 'kernels'}",
        },
        cwd=temporary, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("[] []\n", "", -9)
    assert list(temporary.iterdir()) == []


# --- on a GPU, with the processor in its place


class Now(Cuda):
    """A stream on the CPU, where nothing waits; what is captured is run again."""

    name = "the CPU"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def zeros(self, *shape: int) -> Any:
        return torch.zeros(shape)

    def pinned(self, *shape: int) -> Any:
        return torch.zeros(shape)

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def capture(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], None], Any]:
        outputs = [torch.full_like(output, torch.nan) for output in run()]

        def replay() -> None:
            for target, value in zip(outputs, run(), strict=True):
                target.copy_(value)

        return replay, outputs

    def synchronize(self) -> None:
        pass

    def reserved(self) -> int:
        return 0


def test_captured_code_gives_what_two_calls_give(model, payload):
    two_calls = open_payload(payload, "fp32", 1)
    captured = TorchOnCuda(load_model(payload, "cpu"), Now, buckets=(1, 4))
    for count, table in ((1, tables(model)), (4, tables(model, samples=3)), (6, tables(model))):
        got = captured.run(pixels(count), table)
        want = two_calls.refine(two_calls.encode(pixels(count)), table)
        for one, other in zip(got, want, strict=True):
            assert np.abs(one - other).max() <= FLOAT32_TWICE * np.abs(other).max()
    report = captured.report()
    assert report.loop == (
        "operators in the captured graph, because compiled code has no place for the persistent "
        "kernel between its loop and the rest"
    )
    assert (report.captures, report.replays, report.fallbacks) == (3, 4, {})


def test_noise_of_each_image_is_its_row_on_a_device_too(model, payload):
    backend, table = TorchOnCuda(load_model(payload, "cpu"), Now), tables(model, samples=2)
    x_v = backend.encode(pixels(5))
    each = replace(table, bias=np.repeat(table.bias, 5, axis=1))
    np.testing.assert_array_equal(backend.refine(x_v, each)[0], backend.refine(x_v, table)[0])


def test_tensors_of_another_shape_or_type_are_refused_too(model, payload):
    backend = TorchOnCuda(load_model(payload, "cpu"), Now)
    with pytest.raises(
        InvalidInput, match=r"encoder.pt2 was given float64 \(2, 3, 32, 32\) as pix"
    ):
        backend.encode(np.zeros((2, 3, 32, 32)))
    x_v, table = backend.encode(pixels(3)), tables(model)
    with pytest.raises(InvalidInput, match=r"expected \[steps, 1 or 3, samples, width\]"):
        backend.refine(x_v, replace(table, bias=np.repeat(table.bias, 2, axis=1)))
    with pytest.raises(InvalidInput, match=r"as bias; it takes float32 \[19, rows, samples, 48\]"):
        backend.refine(x_v, replace(table, bias=table.bias[..., :-1]))


def test_compiled_code_is_given_addresses_that_it_can_read_from():
    tensor = torch.arange(8.0)
    assert aotinductor._as_compiled(tensor).data_ptr() == tensor.data_ptr()
    moved = aotinductor._as_compiled(tensor[1:])
    assert moved.data_ptr() % 16 == 0
    assert moved.tolist() == tensor[1:].tolist()


def test_code_for_the_other_device_is_refused_with_the_command_that_rebuilds_it(
    payload, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch_device, "why_no_cuda", lambda: None)
    message = rf"was compiled for cpu, and is opened on cuda; {REBUILD} --device cuda"
    with pytest.raises(BackendUnavailable, match=message):
        open_payload(payload, "fp16", None, "cuda")
    repacked(payload / ENCODER, tmp_path / ENCODER, AOTI_DEVICE_KEY="cuda")
    message = rf"was compiled for cuda, and is opened on cpu; {REBUILD} --device cpu"
    with pytest.raises(BackendUnavailable, match=message):
        open_payload(tmp_path, "fp32", None)


@pytest.mark.parametrize(
    ("target", "here", "runs"),
    [
        ("sm90", "sm90", True),
        ("sm86", "sm89", True),  # the same generation, and newer
        ("sm89", "sm86", False),
        ("sm90", "sm100", False),
        ("sm80", "sm90", False),
        ("sm100", "sm103", True),
    ],
)
def test_code_for_another_gpu_is_refused(payload, tmp_path, monkeypatch, target, here, runs):
    monkeypatch.setattr(torch_device, "gpu_name", lambda: (here, "NVIDIA Abacus"))
    metadata = {"AOTI_DEVICE_KEY": "cuda", aotinductor.GPU: target}
    message = rf"compiled for {target}; this machine's GPU is NVIDIA Abacus, {here}; {REBUILD} --de"
    expected = nullcontext() if runs else pytest.raises(BackendUnavailable, match=message)
    with expected:
        aotinductor._check_device(tmp_path / ENCODER, metadata, "cuda")


def test_a_torch_without_cuda_is_told_how_to_get_one(payload, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = r"aotinductor cannot run on cuda: torch \S+ is built without CUDA; install one with"
    with pytest.raises(BackendUnavailable, match=message):
        open_payload(payload, "fp32", None, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_code_for_a_gpu_gives_the_model_s_answers(model, payload, tmp_path, compute):
    lowered, types = lower_marnet(model), Types(compute, compute)
    build_encoder(lowered, torch.rand(2, 3, 32, 32), types, tmp_path, Order("cuda"))
    build_refine(lowered, types, tmp_path, Order("cuda"))
    on_gpu, on_cpu = open_payload(tmp_path, compute, None, "cuda"), open_payload(payload, "fp32", 1)
    for count, table in ((1, tables(model)), (9, tables(model, samples=2)), (1, tables(model))):
        got = on_gpu.run(pixels(count), table)[0]
        want = on_cpu.refine(on_cpu.encode(pixels(count)), table)[0]
        assert np.abs(got - want).max() <= 2 * BUILT["fp16"] * np.abs(want).max()
    report = on_gpu.report()
    assert report is not None
    assert report.fallbacks == {}

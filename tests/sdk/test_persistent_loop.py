"""From the weights in loop.safetensors to the kernel's launch, on a GPU that is played."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_gpu import PlayedDriver, real_gpu
from safetensors.numpy import load_file, save_file
from tolerances import TWIN_LOOP

import marnet_kernels.loader
import marnet_kernels.persistent
from marnet_kernels.loader import DeviceInfo
from marnet_kernels.persistent import ReverseSamplerArguments, check_launch
from marnet_kernels.reverse_sampler import (
    from_bits,
    pack_tables,
    reverse_sampler_reference,
    to_bits,
)
from marnet_sdk.errors import BundleFormatError, InvalidInput
from marnet_sdk.gpu.driver import Gpu
from marnet_sdk.gpu.persistent_loop import LoopWeights, PersistentLoop
from marnet_sdk.noise.tables import Tables

HIDDEN, PADDED = 20, 256
BIG = DeviceInfo((9, 0), 132, 227 << 10, True)


def weights(operand: Any = "fp16", hidden: int = HIDDEN) -> LoopWeights:
    rng = np.random.default_rng(0)

    def matrix() -> np.ndarray:
        values = rng.standard_normal((hidden, hidden)).astype(np.float32) / np.sqrt(hidden)
        return from_bits(to_bits(values, operand), operand)

    matrices = {name: matrix() for name in ("hidden2", "hidden3", "carry")}
    biases = {n: rng.standard_normal(hidden).astype(np.float32) for n in ("hidden2", "hidden3")}
    return LoopWeights(matrices, biases, 0.01, operand)


def tables(steps: int = 4, samples: int = 2, seed: int = 0, hidden: int = HIDDEN) -> Tables:
    rng = np.random.default_rng(seed)
    coefficients = rng.random((steps, 3)).astype(np.float32) / 3
    return Tables(coefficients, rng.random((steps, 1, samples, hidden)).astype(np.float32))


# --- the file


@pytest.mark.parametrize("operand", ["fp16", "bf16"])
def test_weights_come_back_bit_for_bit(operand, tmp_path):
    written = weights(operand)
    written.save(tmp_path / "loop.safetensors")
    read = LoopWeights.load(tmp_path / "loop.safetensors")
    assert (read.operand, read.padded) == (operand, PADDED)
    assert read.slope == pytest.approx(0.01)
    for name, matrix in written.matrices.items():
        np.testing.assert_array_equal(read.matrices[name], matrix)
    for name, bias in written.biases.items():
        np.testing.assert_array_equal(read.biases[name], bias)


def test_a_file_holds_two_bytes_a_weight(tmp_path):
    path = tmp_path / "loop.safetensors"
    weights().save(path)
    stored = load_file(path)
    assert {stored[f"{name}.weight"].dtype for name in weights().matrices} == {np.dtype(np.uint16)}


@pytest.mark.parametrize("spoil", ["nothing", "cut", "no operand", "no carry", "no file"])
def test_a_file_that_holds_no_loop_is_refused_by_name(spoil, tmp_path):
    path = tmp_path / "loop.safetensors"
    weights().save(path)
    arrays = load_file(path)
    if spoil == "nothing":
        path.write_bytes(b"")
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif spoil == "no operand":
        save_file(arrays, path)
    elif spoil == "no carry":
        del arrays["carry.weight"]
        save_file(arrays, path, {"operand": "fp16"})
    else:
        path.unlink()
    with pytest.raises(BundleFormatError, match=r"loop.safetensors does not hold the weights of a"):
        LoopWeights.load(path)


# --- the kernel


class Recorded:
    """A kernel that notes what it is launched with."""

    def __init__(self, layout: Any, variant: Any) -> None:
        self.layout, self.variant = layout, variant
        self.launches: list[tuple[int, ReverseSamplerArguments]] = []
        MADE.append(self)

    def launch(self, stream: int, arguments: ReverseSamplerArguments) -> None:
        check_launch(self.layout, self.variant, arguments)
        self.launches.append((stream, arguments))


MADE: list[Recorded] = []


@pytest.fixture
def played(monkeypatch) -> Iterator[SimpleNamespace]:
    """A GPU, memory on it, and the device that the kernel is chosen for."""
    driver, held, device = PlayedDriver(), [], [BIG]
    monkeypatch.setattr(import_module("cuda.bindings"), "driver", driver, raising=False)
    monkeypatch.setattr(marnet_kernels.persistent, "ReverseSampler", Recorded)
    monkeypatch.setattr(marnet_kernels.loader, "current_device", lambda: device[0])
    MADE.clear()
    gpu = Gpu("cuda")

    def allocate(size: int) -> int:
        held.append(gpu.allocate(size))
        return held[-1].address

    with gpu.current():
        stream = gpu.make_stream()
        yield SimpleNamespace(
            driver=driver, gpu=gpu, allocate=allocate, stream=stream, held=held, device=device
        )


def open_loop(played: SimpleNamespace, given: LoopWeights | None = None) -> PersistentLoop:
    return PersistentLoop(given or weights(), played.gpu, played.allocate, played.stream)


def test_the_weights_are_packed_and_copied_once_for_all_shapes(played):
    loop = open_loop(played)
    packed = weights().pack()
    (memory,) = played.held
    assert memory.size == loop.bytes
    prepared = [loop.prepare(images, 1, 3, played.allocate) for images in (1, 2, 4)]
    for one in prepared:
        one.enqueue(played.stream, q=4096, h3=8192)
    launched = [arguments for made in MADE for _, arguments in made.launches]
    assert len(launched) == 3
    assert len({(a.weights, a.biases) for a in launched}) == 1
    array = played.driver.array
    found = array(launched[0].weights, packed.weights.shape, ctypes.c_uint16)
    np.testing.assert_array_equal(found, packed.weights)
    np.testing.assert_array_equal(array(launched[0].biases, (2, PADDED)), packed.biases)


def test_a_launch_has_the_shape_s_sizes_and_addresses(played):
    loop = open_loop(played)
    prepared = loop.prepare(3, 2, 4, played.allocate)
    prepared.set_tables(tables(), played.stream)
    prepared.enqueue(played.stream, q=4096, h3=8192)
    ((stream, a),) = MADE[0].launches
    assert stream == int(played.stream)
    assert (a.images, a.samples, a.noises, a.steps) == (3, 2, 1, 4)
    assert (a.condition, a.out) == (4096, 8192)
    assert a.slope == pytest.approx(0.01)
    coefficients, bias = pack_tables(tables().coefficients, tables().bias)
    array = played.driver.array
    np.testing.assert_array_equal(array(a.coefficients, coefficients.shape), coefficients)
    np.testing.assert_array_equal(array(a.bias, bias.shape), bias)
    sizes = loop.layout.buffers(3, 2, 1, 4)
    assert all(played.driver.holds(getattr(a, n), sizes[n]) for n in ("exchange", "counter"))


def test_enqueueing_again_allocates_and_copies_nothing(played):
    prepared = open_loop(played).prepare(1, 2, 4, played.allocate)
    prepared.set_tables(tables(), played.stream)
    played.driver.log.clear()
    for _ in range(3):
        prepared.enqueue(int(played.stream), q=4096, h3=8192)
    assert played.driver.log == []
    prepared.set_tables(tables(seed=1), played.stream)
    assert played.driver.log == ["cuMemcpyHtoDAsync"] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tables(5), r"coefficients: got shape \(5, 3\), expected \(4, 3\)"),
        (tables(samples=3), r"bias: got shape \(4, 1, 3, 20\), expected \(4, 1, 2, 20\)"),
    ],
)
def test_tables_of_another_shape_are_refused_before_they_are_copied(played, given, message):
    prepared = open_loop(played).prepare(1, 2, 4, played.allocate)
    played.driver.log.clear()
    with pytest.raises(InvalidInput, match=message):
        prepared.set_tables(given, played.stream)
    assert played.driver.log == []


def test_shapes_of_one_variant_share_a_kernel(played):
    loop = open_loop(played)
    first, second = (loop.prepare(1, 1, steps, played.allocate) for steps in (3, 9))
    assert first.variant == second.variant
    assert len(MADE) == 1


@pytest.mark.parametrize(
    ("device", "images", "message"),
    [
        (BIG, 65, "rows: got 65, expected at most 64"),
        (DeviceInfo((8, 6), 1, 99 << 10, True), 1, "multiprocessors: got 1, expected at least"),
        (DeviceInfo((8, 6), 46, 99 << 10, False), 1, "without cooperative launches"),
    ],
)
def test_what_the_kernel_cannot_run_is_an_error_before_anything_is_allocated(
    played, device, images, message
):
    loop = open_loop(played)
    played.device[0] = device
    with pytest.raises(ValueError, match=message):
        loop.prepare(images, 1, 3, played.allocate)
    assert len(played.held) == 1  # the weights
    assert MADE == []


def test_weights_of_another_form_are_refused(played):
    spoiled = weights()
    spoiled.matrices["carry"] = np.zeros((HIDDEN, HIDDEN + 1), np.float32)
    with pytest.raises(ValueError, match="carry: got shape"):
        open_loop(played, spoiled)


# --- a real one


@pytest.mark.gpu
@pytest.mark.parametrize("operand", ["fp16", "bf16"])
def test_the_real_kernel_in_two_graphs_at_once_gives_what_its_twin_gives(operand):
    """Again and again, the same bits; and blocks of one launch never wait for ones of the other."""
    gpu, held, hidden = real_gpu(), [], 1024
    given, table = weights(operand, hidden), tables(6, 2, hidden=hidden)
    images, samples, steps = 3, 2, 6

    def allocate(size: int) -> int:
        held.append(gpu.allocate(size))
        return held[-1].address

    with gpu.current():
        loop = PersistentLoop(given, gpu, allocate, gpu.make_stream())
    q = np.random.default_rng(3).standard_normal((images, hidden)).astype(np.float32)

    def lane() -> np.ndarray:
        with gpu.current():
            stream, h3 = gpu.make_stream(), gpu.pinned((images, samples, hidden))
            at, out = allocate(q.nbytes), allocate(h3.nbytes)
            prepared = loop.prepare(images, samples, steps, allocate)
            prepared.set_tables(table, stream)
            gpu.upload(at, q, stream)
            gpu.wait(stream)

            def work() -> None:
                prepared.enqueue(stream, at, out)
                gpu.download(h3, out, stream)

            graph = gpu.capture(stream, work)
            first = None
            for _ in range(500):
                gpu.launch(graph, stream)
                gpu.wait(stream)
                first = h3.copy() if first is None else first
                assert (h3 == first).all()
            assert first is not None
            return first

    with ThreadPoolExecutor(2) as pool:
        found = [lanes.result(120) for lanes in [pool.submit(lane) for _ in range(2)]]
    want = reverse_sampler_reference(
        given.pack(), q, *pack_tables(table.coefficients, table.bias), given.slope
    )
    for h3 in found:
        assert np.abs(h3 - want).max() <= TWIN_LOOP[operand] * np.abs(want).max()

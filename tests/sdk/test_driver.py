"""The calls of the CUDA driver, on one that is played, and plans of memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from played_gpu import BROKEN, CONTEXT, PlayedDriver, has_driver, played_array, real_gpu

import marnet_sdk.gpu.driver
from marnet_sdk.errors import BackendUnavailable, InferenceError, InvalidInput, MissingExtra
from marnet_sdk.gpu.driver import ALIGNMENT, Gpu, Graph, Memory, MemoryPlan, Stream, device_array

CUDA = (
    "cuInit cuDeviceGet cuDevicePrimaryCtxRetain cuCtxPushCurrent cuCtxPopCurrent cuStreamCreate "
    "cuStreamDestroy cuStreamSynchronize cuMemAlloc cuMemFree cuMemHostAlloc cuMemFreeHost "
    "cuMemGetInfo cuMemcpyHtoDAsync cuMemcpyDtoHAsync cuMemcpyDtoDAsync cuStreamBeginCapture "
    "cuStreamEndCapture cuGraphInstantiate cuGraphDestroy cuGraphUpload cuGraphLaunch "
    "cuGraphExecDestroy cuMemsetD8Async"
)


def test_cuda_bindings_has_every_name_that_only_a_gpu_calls():
    driver = import_module("cuda.bindings.driver")
    assert [name for name in CUDA.split() if not hasattr(driver, name)] == []
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert int(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED) == 2


def test_cuda_bindings_takes_the_arguments_that_it_is_given():
    """It converts them before it looks for the function, which is not there without a driver."""
    if has_driver():
        pytest.skip("this machine has a CUDA driver, which would be called")
    driver, array = import_module("cuda.bindings.driver"), np.zeros(4, np.float32)
    gpu = Gpu.__new__(Gpu)
    gpu.driver, gpu._context = driver, driver.CUcontext(9)
    stream, memory = Stream(gpu, driver.CUstream(5)), Memory(gpu, 256, 16)
    graph = Graph(gpu, driver.CUgraphExec(7))
    calls: list[Callable[[], Any]] = [
        partial(gpu.allocate, 16),
        partial(gpu.pinned, (2, 2)),
        gpu.make_stream,
        gpu.memory_info,
        gpu.current().__enter__,
        partial(gpu.wait, stream),
        partial(gpu.clear, memory, stream),
        partial(gpu.upload, 256, array, stream),
        partial(gpu.download, array, 256, int(stream)),
        partial(gpu.copy, 256, 512, 16, stream),
        partial(gpu.launch, graph, stream),
        partial(gpu.capture, stream, lambda: None),
        partial(gpu.call, "cuStreamEndCapture", int(stream)),
        partial(gpu.call, "cuGraphInstantiate", driver.CUgraph(3), 0),
        partial(gpu.call, "cuGraphUpload", graph.handle, int(stream)),
        partial(gpu.call, "cuStreamDestroy", stream.handle),
        partial(gpu.call, "cuMemFree", 256),
        partial(gpu.call, "cuMemFreeHost", 4096),
        partial(gpu.call, "cuGraphExecDestroy", graph.handle),
        partial(gpu.call, "cuGraphDestroy", driver.CUgraph(3)),
    ]
    for call in calls:
        with pytest.raises(InferenceError, match="the CUDA driver cannot be asked for cu"):
            call()


def test_cuda_core_has_what_reads_arrays_of_other_libraries():
    view = import_module("cuda.core.utils").StridedMemoryView
    found = view.from_any_interface(torch.ones(2, 3), stream_ptr=-1)
    assert (found.shape, found.strides, found.dtype) == ((2, 3), (3, 1), np.float32)
    assert (found.device_id, found.is_device_accessible) == (-1, False)
    assert found.ptr > 0


@pytest.fixture
def driver(monkeypatch) -> PlayedDriver:
    played = PlayedDriver()
    monkeypatch.setattr(import_module("cuda.bindings"), "driver", played, raising=False)
    return played


@pytest.fixture
def gpu(driver) -> Gpu:
    return Gpu("rtx")


# --- memory plans


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 5000), min_size=1, max_size=9))
def test_buffers_of_a_plan_are_aligned_and_do_not_overlap(sizes):
    plan = MemoryPlan(sizes)
    base = 7 * ALIGNMENT
    addresses = plan.addresses(base)
    assert list(addresses) == list(sizes)
    end = base
    for name, address in addresses.items():
        assert address % ALIGNMENT == 0
        assert end <= address < end + ALIGNMENT
        end = address + sizes[name]
    assert end <= base + plan.total < end + ALIGNMENT


def test_a_plan_refuses_buffers_of_nothing_and_memory_that_is_not_aligned():
    with pytest.raises(InferenceError, match="bias: got 0 bytes of GPU memory, expected at least"):
        MemoryPlan({"pixels": 4, "bias": 0})
    with pytest.raises(InferenceError, match="got GPU memory at 0x180, expected a multiple of 256"):
        MemoryPlan({"pixels": 4}).addresses(384)


# --- the driver


def test_what_the_driver_answers_is_an_error_with_its_name(driver, gpu):
    driver.largest = 10
    with gpu.current(), pytest.raises(InferenceError, match="cuMemAlloc with CUDA_ERROR_OUT_OF"):
        gpu.allocate(11)


def test_a_function_that_the_driver_does_not_have_is_an_error(gpu, monkeypatch):
    def missing(*_: Any) -> Any:
        raise RuntimeError("Function not found")

    monkeypatch.setattr(gpu.driver, "cuMemGetInfo", missing, raising=False)
    with pytest.raises(InferenceError, match="cannot be asked for cuMemGetInfo: Function not"):
        gpu.memory_info()


def test_no_driver_is_told_as_such(driver, monkeypatch):
    class Status:
        name = "CUDA_ERROR_NO_DEVICE"

        def __int__(self) -> int:
            return 100

    monkeypatch.setattr(driver, "cuInit", lambda flags: (Status(),), raising=False)
    with pytest.raises(BackendUnavailable, match="answers cuInit with CUDA_ERROR_NO_DEVICE"):
        Gpu("rtx")


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[torch-tensorrt\]"'):
        Gpu("torch-tensorrt")


def test_the_context_is_put_back_also_after_an_error(driver, gpu):
    def fail() -> None:
        with gpu.current():
            assert driver.current() == [CONTEXT]
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert driver.current() == []


def test_everything_is_given_back_when_it_is_collected(driver, gpu):
    with gpu.current():
        stream, memory = gpu.make_stream(), gpu.allocate(100)
        host = gpu.pinned((5, 2))
        graph = gpu.capture(stream, partial(gpu.upload, memory.address, host, stream))
    assert (len(driver.streams), len(driver.memory), len(driver.pinned)) == (1, 1, 1)
    assert len(driver.graphs) == 1  # the template is gone already
    view = host[1:]
    del stream, memory, host, graph
    gc.collect()
    assert (driver.streams, driver.memory, driver.graphs) == (set(), {}, {})
    assert len(driver.pinned) == 1  # a part of it is still in use
    del view
    gc.collect()
    assert driver.pinned == {}
    assert driver.current() == []


def test_pinned_memory_is_an_array_like_any_other(gpu):
    with gpu.current():
        array = gpu.pinned((3, 2))
    array[...] = np.arange(6).reshape(3, 2)
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.float32, (3, 2), True)
    assert array.sum() == 15


def test_a_graph_runs_what_was_captured_as_often_as_it_is_launched(driver, gpu):
    with gpu.current():
        stream, memory = gpu.make_stream(), gpu.allocate(3 * ALIGNMENT)
        source, result = gpu.pinned((4,)), gpu.pinned((4,))
        there, here = memory.address, memory.address + ALIGNMENT

        def work() -> None:
            gpu.upload(there, source, stream)
            gpu.copy(here, there, source.nbytes, stream)
            gpu.download(result, here, stream)

        result[...] = -1
        graph = gpu.capture(stream, work)
        assert (result == -1).all(), "capturing runs nothing"
        for value in (1, 2):
            source[...] = value
            gpu.launch(graph, stream)
            gpu.wait(stream)
            assert (result == value).all()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(driver, gpu):
    def work() -> None:
        raise InferenceError("refused")

    with gpu.current():
        stream = gpu.make_stream()
        with pytest.raises(InferenceError, match="refused"):
            gpu.capture(stream, work)
        assert (driver.recording, driver.graphs) == ({}, {})
        driver.broken.add(int(stream))
        with pytest.raises(InferenceError, match=BROKEN.name):
            gpu.capture(stream, lambda: None)
        with pytest.raises(InferenceError, match="refused"):  # and not the driver's complaint
            gpu.capture(stream, work)
    assert (driver.recording, driver.graphs) == ({}, {})


class Fatal(IntEnum):
    CUDA_ERROR_LAUNCH_FAILED = 719


def test_an_error_that_ends_a_process_s_work_on_the_gpu_says_so(driver, gpu):
    results = import_module("cuda.bindings.driver").CUresult
    assert int(results.CUDA_ERROR_LAUNCH_FAILED) == Fatal.CUDA_ERROR_LAUNCH_FAILED
    driver.cuStreamSynchronize = lambda stream: (Fatal.CUDA_ERROR_LAUNCH_FAILED,)
    with pytest.raises(InferenceError, match="FAILED; nothing runs on this GPU in this process"):
        gpu.wait(3)


# --- arrays of other libraries


class Viewed(SimpleNamespace):
    """What cuda-core tells of an array on the first GPU."""

    ptr, strides, dtype, device_id, is_device_accessible = 4096, None, np.float32, 0, True


@pytest.fixture
def viewed(monkeypatch) -> list[Any]:
    """Arrays that are looked at are taken for their own description."""
    found: list[Any] = []
    monkeypatch.setattr(
        marnet_sdk.gpu.driver, "_strided_view", lambda array, stream: found.append(stream) or array
    )
    return found


def test_an_array_on_the_gpu_is_its_address_and_is_kept_alive(gpu, viewed):
    array = Viewed(shape=(5, 3, 2, 2), strides=(12, 4, 2, 1))
    found = device_array(gpu, array, (3, 2, 2), 5)
    assert (found.address, found.shape, len(found), found.owner) == (4096, (5, 3, 2, 2), 5, array)
    assert (found.row_bytes, found.nbytes) == (48, 240)
    part = found[2:9]
    assert (part.address, part.shape, part.owner) == (4096 + 96, (3, 3, 2, 2), array)
    assert len(found[5:5]) == 0
    viewed.clear()
    found.order_before(9)
    assert viewed == [9]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"dtype": np.float16},
            "an array on the GPU of .*float16.*, expected float32 .B, 3, 2",
        ),
        ({"shape": (5, 3, 2, 3)}, r"\(5, 3, 2, 3\), expected float32 \[B, 3, 2, 2\]"),
        ({"shape": (3, 2, 2)}, r"\(3, 2, 2\), expected float32 \[B, 3, 2, 2\]"),
        ({"strides": (12, 1, 6, 3)}, r"strides \(12, 1, 6, 3\), expected .*pixels.contiguous"),
        ({"strides": (24, 4, 2, 1)}, r"strides \(24, 4, 2, 1\), expected its rows one after"),
        ({"device_id": 1}, "got an array on GPU 1, expected GPU 0, on which the bundle runs"),
        (
            {"is_device_accessible": False, "device_id": -1},
            "got an array on the host, expected GPU",
        ),
    ],
)
def test_arrays_that_cannot_be_read_as_they_are_are_refused(gpu, viewed, changed, message):
    array = Viewed(**({"shape": (5, 3, 2, 2)} | changed))
    with pytest.raises(InvalidInput, match=message):
        device_array(gpu, array, (3, 2, 2), 5)


def test_strides_of_axes_of_one_element_do_not_matter(gpu, viewed):
    array = Viewed(shape=(1, 3, 2, 2), strides=(99, 4, 2, 1))
    assert device_array(gpu, array, (3, 2, 2), 5).address == 4096


def test_what_is_no_array_is_refused_with_its_type(gpu):
    """By cuda-core itself."""
    with pytest.raises(InvalidInput, match="got object, which is no array on a GPU"):
        device_array(gpu, object(), (3, 2, 2), 5)
    needs_gradient = torch.ones(1, 3, 2, 2, requires_grad=True)
    with pytest.raises(InvalidInput, match=r"got Tensor, .*require gradient.*pixels.detach\(\)"):
        device_array(gpu, needs_gradient, (3, 2, 2), 5)


def test_without_cuda_core_the_extra_is_named(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[rtx\]"'):
        device_array(gpu, object(), (3, 2, 2), 5)


def test_an_array_on_the_gpu_can_be_copied_to_the_host(driver, gpu, viewed):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    lent = played_array(driver, values)
    array = Viewed(shape=values.shape, ptr=lent.__cuda_array_interface__["data"][0])
    found = device_array(gpu, array, (3, 2, 2), 5)
    np.testing.assert_array_equal(found.numpy(), values)
    np.testing.assert_array_equal(found[1:].numpy(), values[1:])
    assert driver.current() == []


# --- a real GPU


@pytest.mark.gpu
def test_a_real_graph_copies_what_it_was_captured_with_and_allocates_nothing():
    gpu = real_gpu()
    with gpu.current():
        stream, memory = gpu.make_stream(), gpu.allocate(1 << 20)
        source, result = gpu.pinned((1 << 10,)), gpu.pinned((1 << 10,))
        middle = memory.address + (1 << 19)

        def work() -> None:
            gpu.upload(memory.address, source, stream)
            gpu.copy(middle, memory.address, source.nbytes, stream)
            gpu.download(result, middle, stream)

        graph = gpu.capture(stream, work)
        gpu.launch(graph, stream)
        gpu.wait(stream)
        before, _ = gpu.memory_info()
        for value in range(1000):
            source[...] = value
            gpu.launch(graph, stream)
            gpu.wait(stream)
            assert (result == value).all()
        assert gpu.memory_info()[0] == before


@pytest.mark.gpu
def test_a_real_capture_can_be_broken_and_the_stream_used_again():
    gpu = real_gpu()
    with gpu.current():
        stream = gpu.make_stream()
        with pytest.raises(InferenceError, match="cuStreamSynchronize with CUDA_ERROR_STREAM"):
            gpu.capture(stream, lambda: gpu.wait(stream))  # waiting cannot be captured
        graph = gpu.capture(stream, lambda: None)
        gpu.launch(graph, stream)
        gpu.wait(stream)


@pytest.mark.gpu
def test_a_real_array_of_torch_is_read_in_place_and_in_order():
    gpu = real_gpu()
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with gpu.current():
        stream = gpu.make_stream()
        result = gpu.pinned((8, 3, 64, 64))
    side = torch.cuda.Stream()
    for value in range(50):
        with torch.cuda.stream(side):
            slow = torch.full((2048, 2048), 1e-3, device="cuda")
            for _ in range(20):
                slow = slow @ slow
            array = torch.full((8, 3, 64, 64), float(value), device="cuda") + 0 * slow[0, 0]
            rows = device_array(gpu, array, (3, 64, 64), stream)
            assert rows.address == array.data_ptr()
            with gpu.current():
                rows.order_before(stream)
                gpu.download(result, rows.address, stream)
                gpu.wait(stream)
        assert (result == value).all()
    with pytest.raises(InvalidInput, match="float16"):
        device_array(gpu, array.half(), (3, 64, 64), stream)
    with pytest.raises(InvalidInput, match="with strides"):
        device_array(gpu, array.transpose(2, 3), (3, 64, 64), stream)

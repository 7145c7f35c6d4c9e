"""The fused sampler update: its twin against the plain formula, and the kernel against its twin."""

import ctypes
from dataclasses import replace
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

from marnet_kernels import StepUpdate, StepUpdateArguments, step_update, step_update_reference

# The kernel against the float64 twin, one step from equal float32 inputs of order 1.
TOLERANCE = {
    "state": {"rtol": 1e-6, "atol": 2e-6},  # float32: four rounded terms of order 3
    "hidden": {"rtol": 2**-11, "atol": 4e-6},  # half a unit in the last place of float16, plus that
}


def inputs(batch, width, steps, seed=0):
    """Random float32 arrays of every argument of the twin."""
    rng = np.random.default_rng(seed)
    shapes = {
        "state": (batch, width),
        "update": (batch, width),
        "noise": (steps, width),
        "coefficients": (steps, 4),
        "previous": (batch, width),
        "image_bias": (batch, width),
        "time_bias": (steps, width),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def double(arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize(("batch", "width"), [(1, 4), (3, 20), (19, 36)])
@pytest.mark.parametrize("step", [0, 4])
def test_twin_is_the_plain_formula(batch, width, step):
    x = double(inputs(batch, width, 5))
    state, hidden = step_update_reference(**x, step=step, slope=0.2)
    a, b, c, s = x["coefficients"][step]
    for i in range(batch):
        for j in range(width):
            want = a * x["state"][i, j] + b * x["update"][i, j]
            want += c * x["previous"][i, j] + s * x["noise"][step, j]
            assert state[i, j] == pytest.approx(want, rel=1e-13, abs=1e-13)
            before = want + x["image_bias"][i, j] + x["time_bias"][step, j]
            want = before if before > 0 else 0.2 * before
            assert hidden[i, j] == pytest.approx(want, rel=1e-13, abs=1e-13)


def test_twin_keeps_its_precision_and_its_inputs():
    x = inputs(2, 8, 3)
    before = {name: array.copy() for name, array in x.items()}
    state, hidden = step_update_reference(**x, step=1)
    assert state.dtype == hidden.dtype == np.float32
    for name, array in x.items():
        np.testing.assert_array_equal(array, before[name])


def test_twin_leaves_out_terms_with_a_zero_coefficient():
    x = inputs(2, 8, 1)
    x["coefficients"][0] = 0, 2, 0, 0
    for name in ("state", "previous", "noise"):
        x[name][:] = np.nan
    state, _ = step_update_reference(**x, step=0)
    np.testing.assert_array_equal(state, 2 * x["update"])


def test_twin_gives_no_hidden_without_both_biases():
    x = inputs(2, 8, 1)
    del x["time_bias"]
    assert step_update_reference(**x, step=0)[1] is None


GOOD = StepUpdateArguments(
    batch=2, width=8, steps=3, step=4, coefficients=16, noise=16, update=16, state=16
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"steps": -1}, "steps: got -1, expected at least 1"),
        ({"width": 0}, "width: got 0, expected at least 1"),
        ({"width": 6}, "width: got 6, expected a multiple of 4; pad with zero columns"),
        ({"batch": 2**21, "width": 1024}, r"got 2147483648, expected less than 2\*\*31; split"),
        ({"state": 0}, "state: got address 0, expected device memory; only image_bias"),
        ({"step": 6}, "step: got address 0x6, expected a multiple of 4; pass the start"),
        ({"update": 24}, "update: got address 0x18, expected a multiple of 16; pass the start"),
        ({"previous": -16}, "previous: got address -0x10, expected a multiple of 16"),
        ({"hidden": 12}, "hidden: got address 0xc, expected a multiple of 8"),
        ({"hidden": 16}, "hidden: got it without both biases, expected image_bias and time_bias"),
        ({"hidden": 16, "time_bias": 16}, "hidden: got it without both biases"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change)


def test_parameters_have_the_size_that_the_kernel_asserts():
    assert ctypes.sizeof(step_update._Parameters) == 88
    assert "sizeof(Arguments) == 88" in step_update.step_update_source()


def test_without_a_context_the_error_says_how_to_make_one(monkeypatch):
    Status = IntEnum("Status", {"CUDA_ERROR_INVALID_CONTEXT": 201})
    driver = SimpleNamespace(cuCtxGetDevice=lambda: (Status.CUDA_ERROR_INVALID_CONTEXT, None))
    monkeypatch.setattr(step_update._cuda, "load", lambda _: driver)
    with pytest.raises(RuntimeError, match=r"INVALID_CONTEXT.*expected one; make one first"):
        StepUpdate()


class Gpu:
    """Device memory and a stream, through the driver alone; freed at the end of the test."""

    GUARD = 64  # bytes after every array, which no kernel may touch

    def __init__(self, driver):
        self.driver, self.memory = driver, {}
        self.stream = self.do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def do(self, function, *args):
        status, *values = getattr(self.driver, function)(*args)
        assert int(status) == 0, f"{function}: {status.name}"
        return values[0] if values else None

    def empty(self, nbytes):
        """Address of nbytes in which every float is NaN."""
        address = int(self.do("cuMemAlloc", nbytes + self.GUARD))
        self.do("cuMemsetD8", address, 0xFF, nbytes + self.GUARD)
        self.do("cuCtxSynchronize")  # the stream of the tests does not wait for the default stream
        self.memory[address] = nbytes
        return address

    def put(self, array):
        address = self.empty(array.nbytes)
        self.fill(address, array)
        return address

    def fill(self, address, array):
        self.do("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        self.do("cuCtxSynchronize")

    def get(self, address, shape, dtype=np.float32):
        array = np.empty(shape, dtype)
        self.do("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)
        return array

    def wait(self):
        self.do("cuStreamSynchronize", self.stream)

    def graph(self, enqueue):
        """What `enqueue` puts on the stream, captured; returns a function that replays it."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.do("cuStreamBeginCapture", self.stream, mode)
        enqueue()
        graph = self.do("cuStreamEndCapture", self.stream)
        executable = self.do("cuGraphInstantiate", graph, 0)
        return lambda: self.do("cuGraphLaunch", executable, self.stream)

    def check_guards_and_free(self):
        self.do("cuCtxSynchronize")
        for address, nbytes in self.memory.items():
            guard = self.get(address + nbytes, self.GUARD, np.uint8)
            assert (guard == 0xFF).all(), "a kernel wrote past the end of an array"
            self.do("cuMemFree", address)
        self.do("cuStreamDestroy", self.stream)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    driver = pytest.importorskip(
        "cuda.bindings.driver", reason='the CUDA extra is optional: pip install "marnet[cuda]"'
    )
    try:
        found = int(driver.cuInit(0)[0]) == 0 and driver.cuDeviceGetCount()[1] > 0
    except RuntimeError:  # no driver library
        found = False
    if not found:
        pytest.skip("no CUDA device")
    context = driver.cuDevicePrimaryCtxRetain(0)[1]
    driver.cuCtxPushCurrent(context)
    gpu = Gpu(driver)
    yield gpu
    gpu.check_guards_and_free()
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(0)


def place(gpu, arrays, step):
    """Arguments for these arrays, all on the device; with `hidden` where its biases are given."""
    batch, width = arrays["state"].shape
    hidden = gpu.empty(batch * width * 2) if "time_bias" in arrays else 0
    return StepUpdateArguments(
        batch=batch,
        width=width,
        steps=len(arrays["coefficients"]),
        step=gpu.put(np.array([step], np.int32)),
        hidden=hidden,
        **{name: gpu.put(array) for name, array in arrays.items()},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 19, 64, 99])
@pytest.mark.parametrize("width", [4, 256, 768, 1024])
def test_kernel_matches_its_twin(gpu, batch, width):
    x = inputs(batch, width, 5, seed=batch * width)
    arguments = place(gpu, x, step=3)
    StepUpdate().launch(int(gpu.stream), arguments)
    gpu.wait()
    state, hidden = step_update_reference(**double(x), step=3)
    shape = (batch, width)
    np.testing.assert_allclose(gpu.get(arguments.state, shape), state, **TOLERANCE["state"])
    np.testing.assert_allclose(
        gpu.get(arguments.hidden, shape, np.float16), hidden, **TOLERANCE["hidden"]
    )
    np.testing.assert_array_equal(gpu.get(arguments.previous, shape), x["update"])


@pytest.mark.gpu
def test_kernel_leaves_out_what_is_not_given_or_has_a_zero_coefficient(gpu):
    x = inputs(19, 36, 2)
    del x["previous"], x["image_bias"], x["time_bias"]
    x["coefficients"][1] = 0.5, 2, 1, 0
    x["noise"][1] = np.nan
    arguments = place(gpu, x, step=1)
    StepUpdate().launch(int(gpu.stream), arguments)
    gpu.wait()
    state, _ = step_update_reference(**double(x), step=1)
    np.testing.assert_allclose(gpu.get(arguments.state, (19, 36)), state, **TOLERANCE["state"])


@pytest.mark.gpu
@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_tables_gives_nan(gpu, step):
    x = inputs(19, 256, 5)
    arguments = place(gpu, x, step)
    StepUpdate().launch(int(gpu.stream), arguments)
    gpu.wait()
    assert np.isnan(gpu.get(arguments.state, (19, 256))).all()
    assert np.isnan(gpu.get(arguments.hidden, (19, 256), np.float16)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 99])
def test_graph_captured_once_serves_every_step(gpu, batch):
    """The update buffer is refilled and the step advanced between replays, as a sampler does."""
    steps, width = 12, 768
    x = inputs(batch, width, steps, seed=7)
    x["coefficients"] *= 0.5  # keeps the state of order 1 over all steps
    x["coefficients"][0, 2] = 0  # the first step has no previous update...
    x["previous"][:] = np.nan  # ...and its buffer holds nothing yet
    updates = np.random.default_rng(8).standard_normal((steps, batch, width), np.float32)
    arguments, kernel = place(gpu, x, step=0), StepUpdate()
    replay = gpu.graph(lambda: kernel.launch(int(gpu.stream), arguments))
    want, previous, hidden = double(x), x["previous"], None
    for step in range(steps):
        gpu.do("cuMemsetD32Async", arguments.step, step, 1, gpu.stream)
        source = np.ascontiguousarray(updates[step])
        gpu.do("cuMemcpyHtoDAsync", arguments.update, source.ctypes.data, source.nbytes, gpu.stream)
        replay()
        gpu.wait()
        want |= {"update": source.astype(np.float64), "previous": previous}
        want["state"], hidden = step_update_reference(**want, step=step)
        previous = want["update"]
        got = gpu.get(arguments.state, (batch, width))
        tolerance = {k: v * (step + 1) for k, v in TOLERANCE["state"].items()}
        np.testing.assert_allclose(got, want["state"], err_msg=f"step {step}", **tolerance)
    got = gpu.get(arguments.hidden, (batch, width), np.float16)
    np.testing.assert_allclose(got, hidden, rtol=2**-11, atol=2e-5)  # the state's error, times 12


@pytest.mark.gpu
def test_loop_captured_whole_equals_single_launches(gpu):
    """Every launch of the loop reads its own step; 20 replays from equal inputs agree bitwise."""
    steps, shape = 9, (19, 256)
    x = inputs(*shape, steps, seed=3)
    kernel, results = StepUpdate(), []
    arguments = place(gpu, x, step=0)
    numbers = gpu.put(np.arange(steps, dtype=np.int32))

    def restart():
        for name in ("state", "previous"):
            gpu.fill(getattr(arguments, name), x[name])

    def loop():
        for step in range(steps):
            kernel.launch(int(gpu.stream), replace(arguments, step=numbers + 4 * step))

    replay = gpu.graph(loop)
    for run in [loop] + [replay] * 20:
        restart()
        run()
        gpu.wait()
        results.append(gpu.get(arguments.state, shape))
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])

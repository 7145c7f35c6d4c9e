"""The fused sampler update: its twin against the plain formula, and the kernel against its twin."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from emulate import Cpu, emulate

from marnet_kernels import (
    TARGETS,
    StepUpdate,
    StepUpdateArguments,
    compile_cubin,
    step_update,
    step_update_reference,
)
from marnet_kernels.source import source

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
    assert "sizeof(Arguments) == 88" in source("step_update")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", TARGETS)
def test_it_compiles_for_every_target_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setattr("marnet_kernels.compile.SHIPPED", tmp_path)
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    cubin = compile_cubin(source("step_update"), arch)
    assert b"step_update" in cubin.code
    assert (cubin.arch, cubin.spill_bytes) == (arch, 0)
    assert 0 < cubin.registers <= 40
    assert "warning" not in cubin.log


def place(machine, arrays, step):
    """Arguments for these arrays, all on the device; with `hidden` where its biases are given."""
    batch, width = arrays["state"].shape
    hidden = machine.empty(batch * width * 2) if "time_bias" in arrays else 0
    return StepUpdateArguments(
        batch=batch,
        width=width,
        steps=len(arrays["coefficients"]),
        step=machine.put(np.array([step], np.int32)),
        hidden=hidden,
        **{name: machine.put(array) for name, array in arrays.items()},
    )


def run(machine, arguments, seed=0):
    """One launch, and its end."""
    if isinstance(machine, Cpu):
        emulate("step_update").launch(
            "step_update",
            arguments._parameters(),
            grid=arguments._blocks(),
            block=step_update._THREADS,
            seed=seed,
        )
    else:
        StepUpdate().launch(int(machine.stream), arguments)
        machine.wait()


@pytest.mark.parametrize("batch", [1, 19, 64, 99])
@pytest.mark.parametrize("width", [4, 36, 256, 1024])
def test_kernel_matches_its_twin(machine, batch, width):
    x = inputs(batch, width, 5, seed=batch * width)
    arguments = place(machine, x, step=3)
    run(machine, arguments)
    state, hidden = step_update_reference(**double(x), step=3)
    shape = (batch, width)
    np.testing.assert_allclose(machine.get(arguments.state, shape), state, **TOLERANCE["state"])
    np.testing.assert_allclose(
        machine.get(arguments.hidden, shape, np.float16), hidden, **TOLERANCE["hidden"]
    )
    np.testing.assert_array_equal(machine.get(arguments.previous, shape), x["update"])


def test_kernel_leaves_out_what_is_not_given_or_has_a_zero_coefficient(machine):
    x = inputs(19, 36, 2)
    del x["previous"], x["image_bias"], x["time_bias"]
    x["coefficients"][1] = 0.5, 2, 1, 0
    x["noise"][1] = np.nan
    arguments = place(machine, x, step=1)
    run(machine, arguments)
    state, _ = step_update_reference(**double(x), step=1)
    np.testing.assert_allclose(machine.get(arguments.state, (19, 36)), state, **TOLERANCE["state"])


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_tables_gives_nan(machine, step):
    x = inputs(19, 256, 5)
    arguments = place(machine, x, step)
    run(machine, arguments)
    assert np.isnan(machine.get(arguments.state, (19, 256))).all()
    assert np.isnan(machine.get(arguments.hidden, (19, 256), np.float16)).all()


def test_the_order_of_threads_does_not_matter(emulator):
    x = inputs(19, 36, 5)
    results = []
    for seed in range(4):
        arguments = place(emulator, x, step=3)
        run(emulator, arguments, seed)
        results.append(emulator.get(arguments.state, (19, 36)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


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

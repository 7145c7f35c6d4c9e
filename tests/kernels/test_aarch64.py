"""The native loop on ARM processors, with and without dot products, under an emulator of them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from native import _compiled, make_input, make_layers
from tolerances import FLOAT32_LOOP, NATIVE_LEVEL

from marnet_kernels.native import KINDS, LoopLayers, NativeLoop, loop_reference
from marnet_kernels.native.library import FLAGS, SHIPPED

__all__ = ["_compiled"]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# A processor that has them, and one that has not.
PROCESSORS = {"neoverse-n1": ("dotprod", "neon", "portable"), "cortex-a72": ("neon", "portable")}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loop as a program for ARM processors."""
    for name, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: sudo apt install {package}")
    program = tmp_path_factory.mktemp("aarch64") / "loop"
    source = Path(__file__).with_name("loop_driver.cpp")
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    words = [COMPILER, *flags, "-Werror", "-static", f"-I{SHIPPED}", source, "-o", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return program


def described(layers: LoopLayers, inputs: tuple[np.ndarray, ...]) -> Iterator[bytes]:
    """The file that `loop_driver.cpp` reads."""
    loop = NativeLoop(layers, 1)
    kept = iter(loop._kept)

    def array(values: np.ndarray) -> bytes:
        return struct.pack("<Q", values.nbytes) + values.tobytes()

    for name in ("condition", "input", "hidden2", "hidden3", "carry", "output"):
        if getattr(layers, name) is None:
            yield struct.pack("<i", 0)
            continue
        yield struct.pack("<i", 1)
        yield from (array(next(kept)) for _ in range(4))
        one = getattr(loop._loop, name)
        yield struct.pack("<3i", one.kind, one.into, one.out)
    yield struct.pack("<fi", layers.slope, layers.input is not None)
    x_v, coefficients, bias = inputs
    x = np.zeros((len(x_v), loop._loop.condition.into), np.float32)
    x[:, : x_v.shape[1]] = (x_v - layers.mean) / layers.std
    wide = np.zeros((*bias.shape[:3], loop._loop.hidden2.into), np.float32)
    wide[..., : bias.shape[3]] = bias
    yield from (array(values) for values in (x, coefficients, wide))
    yield struct.pack("<4i", len(x_v), bias.shape[2], bias.shape[1], len(bias))


def read(printed: bytes, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
    """The estimates of each set, of one thread and of three."""
    size, found = 4 * int(np.prod(shape)), {}
    while printed:
        name, _, printed = printed.partition(b"\n")
        parts = (printed[:size], printed[size : 2 * size])
        found[name.decode()] = [np.frombuffer(p, np.float32).reshape(shape) for p in parts]
        printed = printed[2 * size :]
    return found


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_twin_on_arm(driver, processor, carry, kind, tmp_path):
    layers = make_layers(kind, carry, hidden=200, dim=150)
    inputs = make_input(layers, images=9)
    (tmp_path / "loop").write_bytes(b"".join(described(layers, inputs)))
    words = [EMULATOR, "-cpu", processor, driver, tmp_path / "loop"]
    done = subprocess.run(words, capture_output=True, check=False, timeout=600)
    assert not done.returncode, done.stderr
    want = loop_reference(layers, *inputs)
    found = read(done.stdout, (*want.shape[:2], 192))
    assert tuple(found) == PROCESSORS[processor]
    tolerance = NATIVE_LEVEL if kind == "int8" else FLOAT32_LOOP
    for name, (one, three) in found.items():
        np.testing.assert_array_equal(one, three, err_msg=name)
        error = np.abs(one[..., :150] - want).max()
        assert error <= tolerance * np.abs(want).max(), name

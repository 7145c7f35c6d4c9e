"""The kernels' noise: published bits, and the normals of the float64 twin."""

import ctypes
from importlib.resources import files

import numpy as np
import pytest
from tolerances import FLOAT32_NORMAL

from marnet_kernels import TARGETS, compile_cubin
from marnet_kernels.philox import philox4x32, standard_normal

CSRC = files("marnet_kernels") / "csrc"
PHILOX = (CSRC / "philox.cuh").read_text()
KERNEL = (
    PHILOX
    + """
struct Arguments { const uint4* counters; uint4* bits; float4* normals; uint2 key; };
extern "C" __global__ void __launch_bounds__(32) draw(const Arguments a) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    a.bits[i] = philox4x32_10(a.counters[i], a.key);
    a.normals[i] = normal4(a.counters[i], a.key);
}
"""
)


class Parameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("counters", "bits", "normals")),
        *((name, ctypes.c_uint32) for name in ("low", "high")),
    )


def run(machine, counters, key):
    """(bits, normals) of the kernel for counters [n, 4], n a multiple of 32."""
    shape = counters.shape
    bits, normals = machine.empty(counters.nbytes), machine.empty(counters.nbytes)
    parameters = Parameters(machine.put(counters), bits, normals, *key)
    machine.launch(KERNEL, "draw", parameters, grid=len(counters) // 32, block=32)
    return machine.get(bits, shape, np.uint32), machine.get(normals, shape)


# Random123, file kat_vectors, philox4x32 with 10 rounds.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_kernel_gives_the_published_answers(machine, counter, key, expected):
    bits, _ = run(machine, np.tile(words(counter), (32, 1)), words(key).tolist())
    np.testing.assert_array_equal(bits, np.tile(words(expected), (32, 1)))


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_twin_gives_the_published_answers(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_kernel_and_twin_have_the_same_bits(machine):
    rng = np.random.default_rng(1)
    counters = rng.integers(0, 2**32, (1024, 4), np.uint32)
    for key in rng.integers(0, 2**32, (3, 2), np.uint32):
        bits, _ = run(machine, counters, key.tolist())
        np.testing.assert_array_equal(bits, philox4x32(counters, key))


@pytest.mark.parametrize(
    ("seed", "step", "trajectory"),
    [(0, 0, 0), (0x1234567890ABCDEF, 999, 7), (2**64 - 1, 2**32 - 1, 2**64 - 1)],
)
def test_kernel_draws_the_normals_of_the_twin(machine, seed, step, trajectory):
    counters = np.empty((2048, 4), np.uint32)
    counters[:, 0] = np.arange(2048)
    counters[:, 1:] = step, trajectory % 2**32, trajectory >> 32
    _, normals = run(machine, counters, (seed % 2**32, seed >> 32))
    expected = standard_normal(seed, step, 8192, trajectory).reshape(2048, 4)
    np.testing.assert_allclose(normals, expected, rtol=0, atol=FLOAT32_NORMAL)


def test_extreme_words_give_finite_normals(machine):
    """Counters whose first word is next to 0 and to 2^32: u1 at its ends, found by search."""
    counters = np.zeros((2**19, 4), np.uint32)
    counters[:, 0] = np.arange(2**19)
    first = philox4x32(counters, (0, 0))[:, 0] >> 8
    order = np.argsort(first)
    chosen = counters[np.concatenate([order[:16], order[-16:]])]
    _, normals = run(machine, chosen, (0, 0))
    expected = [standard_normal(0, 0, 4 * c + 4)[4 * c :] for c in chosen[:, 0].tolist()]
    assert abs(normals[:16, :2]).max() > 3.5
    np.testing.assert_allclose(normals, expected, rtol=0, atol=FLOAT32_NORMAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counter": [0, 0, 0]}, r"counter: got shape \(3,\); expected four words"),
        ({"counter": [0, 0, 0, -1]}, "counter: got -1; expected integers"),
        ({"key": (1, 2, 3)}, r"key: got shape \(3,\); expected two words"),
    ],
)
def test_twin_refuses_what_is_not_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        philox4x32(**{"counter": [0, 0, 0, 0], "key": (0, 0), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**64}, "seed: got 18446744073709551616; expected"),
        ({"trajectory": -1}, "trajectory: got -1; expected"),
        ({"width": 0.5}, r"width: got 0\.5 \(float\); expected an integer"),
        ({"step": [[1]]}, r"step: got shape \(1, 1\); expected one step or a row"),
    ],
)
def test_twin_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        standard_normal(**{"seed": 0, "step": 0, "width": 4, **arguments})


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", TARGETS)
def test_it_compiles_for_every_target_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path))
    cubin = compile_cubin((CSRC / "device.cuh").read_text() + KERNEL, arch)
    assert cubin.spill_bytes == 0
    assert "warning" not in cubin.log

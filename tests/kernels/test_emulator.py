"""The emulator of CUDA kernels: each primitive alone, and the mistakes that it finds.

What a kernel can rely on runs on a GPU, too: it shows that csrc/device.cuh and emulator.h agree.
"""

import ctypes
import platform
import subprocess
import sys

import numpy as np
import pytest
from emulate import emulate_text, guarded
from tolerances import MMA_SUM

from marnet_kernels.reverse_sampler import from_bits, to_bits

ALL = "0xffffffffu"


class Pointers(ctypes.Structure):
    """Up to four buffers and a number, as the kernels below take them."""

    _fields_ = (*((name, ctypes.c_uint64) for name in "abcd"), ("n", ctypes.c_int64))


def kernel(body, types="unsigned", helpers=""):
    """A kernel named `test` with buffers a.a .. a.d of these types, one for all or one for each."""
    each = [types] * 4 if isinstance(types, str) else [*types, *["char"] * (4 - len(types))]
    fields = " ".join(f"{kind}* {name};" for kind, name in zip(each, "abcd", strict=True))
    return (
        f"struct Arguments {{ {fields} long long n; }};\n{helpers}\n"
        f'extern "C" __global__ void __launch_bounds__(256, 1) test(const Arguments a) {{ {body} }}'
    )


def run(text, *arrays, n=0, grid=1, block=32, options=(), **how):
    addresses = [array.ctypes.data for array in arrays]
    pointers = Pointers(*addresses, *[0] * (4 - len(addresses)), n)
    emulate_text(text, options).launch("test", pointers, grid=grid, block=block, **how)


def run_on(machine, text, *arrays, n=0, grid=1, block=32, **how):
    """On a Cpu or a Gpu; what the kernel wrote is in the arrays afterwards."""
    addresses = [machine.put(array) for array in arrays]
    pointers = Pointers(*addresses, *[0] * (4 - len(addresses)), n)
    machine.launch(text, "test", pointers, grid=grid, block=block, **how)
    for array, address in zip(arrays, addresses, strict=True):
        array[...] = machine.get(address, array.shape, array.dtype)


def zeros(*shape, dtype=np.uint32):
    return guarded(np.zeros(shape, dtype))


def test_indices_cover_the_grid(machine):
    text = kernel(
        "int i = threadIdx.x + blockDim.x * (blockIdx.x + gridDim.x * blockIdx.y);"
        "a.a[i] += 1 + i; a.b[i] = gridDim.y;"
    )
    counts, height = zeros(5 * 3 * 37), zeros(5 * 3 * 37)
    run_on(machine, text, counts, height, grid=(5, 3), block=37)
    np.testing.assert_array_equal(counts, 1 + np.arange(5 * 3 * 37))
    np.testing.assert_array_equal(height, 3)


@pytest.mark.parametrize("options", [(), ("-DPORTABLE_SWITCH",)], ids=["assembly", "ucontext"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_barrier_orders_what_is_before_and_after_it(options, seed):
    text = kernel(
        "SHARED(unsigned, s); for (int round = 0; round < 3; round++) {"
        "  s[threadIdx.x] = threadIdx.x + round + blockIdx.x; __syncthreads();"
        "  a.a[blockIdx.x * 96 + threadIdx.x] += s[95 - threadIdx.x]; __syncthreads(); }"
    )
    found = zeros(4, 96)
    run(text, found, grid=4, block=96, shared=4 * 96, seed=seed, options=options)
    expected = 3 * (95 - np.arange(96)) + 3 + 3 * np.arange(4)[:, None]
    np.testing.assert_array_equal(found, expected)


def test_shared_memory_is_nan_at_first_and_each_blocks_own():
    text = kernel(
        "SHARED(float, s); a.a[blockIdx.x] = s[7] != s[7]; __syncthreads(); s[7] = 1.f;",
        ["float"],
    )
    found = zeros(3, dtype=np.float32)
    run(text, found, grid=3, shared=32)
    np.testing.assert_array_equal(found, 1)


def test_threads_may_exit_before_a_barrier(machine):
    text = kernel(
        "SHARED(unsigned, s); if (threadIdx.x >= a.n) return;"
        "s[threadIdx.x] = threadIdx.x; __syncthreads();"
        "a.a[threadIdx.x] = s[a.n - 1 - threadIdx.x];"
    )
    found = zeros(41)
    run_on(machine, text, found, n=41, block=100, shared=4 * 41)
    np.testing.assert_array_equal(found, np.arange(40, -1, -1))


@pytest.mark.parametrize("seed", [0, 3])
def test_shuffles_take_the_value_of_another_lane(machine, seed):
    text = kernel(
        "float v = 10.f + threadIdx.x; int i = threadIdx.x;"
        f"a.a[i] = __shfl_xor_sync({ALL}, v, 5); a.b[i] = __shfl_sync({ALL}, v, 31 - i % 32);"
        f"for (int k = 16; k; k /= 2) v += __shfl_xor_sync({ALL}, v, k); a.c[i] = v;",
        "float",
    )
    first, second, total = (zeros(64, dtype=np.float32) for _ in range(3))
    run_on(machine, text, first, second, total, block=64, seed=seed)
    lanes = np.arange(64)
    np.testing.assert_array_equal(first, 10 + (lanes ^ 5))
    np.testing.assert_array_equal(second, 10 + lanes // 32 * 32 + 31 - lanes % 32)
    np.testing.assert_array_equal(total, np.repeat([32 * 25.5, 32 * 57.5], 32))


def test_parts_of_a_warp_meet_apart(machine):
    text = kernel(
        "unsigned i = threadIdx.x, v = i; if (i < 8) { v = __shfl_sync(0xffu, v, 7 - i);"
        "  __syncwarp(0xffu); v += __shfl_xor_sync(0xffu, v, 1); }"
        "else v = __shfl_xor_sync(0xffffff00u, v, 16 * 0 + 4);"
        "a.a[i] = v;"
    )
    found = zeros(32)
    run_on(machine, text, found)
    lanes = np.arange(32)
    expected = np.where(lanes < 8, (7 - lanes) + (7 - (lanes ^ 1)), lanes ^ 4)
    np.testing.assert_array_equal(found, expected)


def fragments(a, b, c):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": each lane's values."""
    lanes_a, lanes_b = np.empty((32, 8), a.dtype), np.empty((32, 4), b.dtype)
    lanes_c = np.empty((32, 4), c.dtype)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            lanes_a[lane, i] = a[row, thread * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            lanes_b[lane, i] = b[thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
            lanes_c[lane, i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    return lanes_a, lanes_b, lanes_c


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("seed", [0, 1])
def test_mma_is_a_product_of_matrices(machine, kind, seed):
    text = kernel(
        "unsigned *x = a.a + 4 * threadIdx.x, *y = a.b + 2 * threadIdx.x; float d[4];"
        "for (int i = 0; i < 4; i++) d[i] = a.c[4 * threadIdx.x + i];"
        f"for (int k = 0; k < a.n; k++) mma_{kind}(d, x[0], x[1], x[2], x[3], y[0], y[1]);"
        "for (int i = 0; i < 4; i++) a.c[4 * threadIdx.x + i] = d[i];",
        ["unsigned", "unsigned", "float"],
    )
    rng = np.random.default_rng(5)
    a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = to_bits(a, kind), to_bits(b, kind)
    lanes_a, lanes_b, lanes_c = fragments(a, b, c)
    sums = guarded(lanes_c)
    run_on(machine, text, guarded(lanes_a), guarded(lanes_b), sums, n=3, seed=seed)
    expected = c
    for _ in range(3):
        exact = expected.astype(np.float64)
        for row in range(16):
            for column in range(8):
                for k in range(16):
                    factor = from_bits(a[row : row + 1, k], kind).astype(np.float64)
                    exact[row, column] += (factor * from_bits(b[k : k + 1, column], kind)).item()
        expected = exact.astype(np.float32)
    np.testing.assert_allclose(sums, fragments(a, b, expected)[2], rtol=0, atol=MMA_SUM)


def test_rounding_to_16_bits_is_that_of_numpy(machine):
    text = kernel(
        "int i = threadIdx.x + 256 * blockIdx.x; if (i >= a.n) return;"
        "a.b[i] = pack_fp16(a.a[i], 2.f); a.c[i] = pack_bf16(2.f, a.a[i]);",
        ["float", "unsigned", "unsigned"],
    )
    halves = np.arange(2**16, dtype=np.uint16)
    exact = np.concatenate([from_bits(halves, "fp16"), from_bits(halves, "bf16")])
    bits = exact.view(np.uint32)
    ties = [bits + np.uint32(step) for step in (0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001)]
    tiny = np.arange(-3000, 3000, dtype=np.float32) * np.float32(2**-26)  # between fp16 subnormals
    with np.errstate(invalid="ignore"):
        values = np.concatenate([bits, *ties, tiny.view(np.uint32)]).view(np.float32)
        values = np.where(np.isnan(values), np.float32(np.nan), values)
        fp16, bf16 = to_bits(values, "fp16"), to_bits(values, "bf16")
    fp16[np.isnan(values)] = 0x7FFF  # as cvt of PTX; NumPy keeps the sign
    found = [zeros(len(values), dtype=np.uint32) for _ in range(2)]
    run_on(
        machine,
        text,
        guarded(values),
        *found,
        n=len(values),
        grid=-(-len(values) // 256),
        block=256,
    )
    np.testing.assert_array_equal(found[0], fp16 | np.uint32(0x4000 << 16))
    np.testing.assert_array_equal(found[1], 0x4000 | bf16.astype(np.uint32) << 16)


GRID_BARRIER = """
__device__ inline void meet_grid(unsigned* counter, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
        add_release(counter);
        unsigned asked = 0;
        while (load_acquire(counter) < target) wait(asked);
    }
    __syncthreads();
}
"""


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_blocks_wait_for_each_other_at_a_counter(machine, seed):
    text = kernel(
        "const unsigned blocks = gridDim.x, t = threadIdx.x, b = blockIdx.x;"
        "for (unsigned round = 0; round < 4; round++) {"
        "  if (t == 0) store_relaxed(a.b + b, b + round);"
        "  meet_grid(a.a, blocks * (2 * round + 1));"
        "  if (t < blocks) a.c[b * blocks + t] += a.b[t];"
        "  meet_grid(a.a, blocks * (2 * round + 2)); }",
        helpers=GRID_BARRIER,
    )
    blocks = 33
    counter, seen, sums = zeros(1), zeros(blocks), zeros(blocks, blocks)
    run_on(machine, text, counter, seen, sums, grid=blocks, block=64, seed=seed, cooperative=True)
    assert counter[0] == 8 * blocks
    np.testing.assert_array_equal(sums, np.tile(4 * np.arange(blocks) + 6, (blocks, 1)))


def test_sixteen_bytes_are_loaded_and_stored(machine):
    text = kernel(
        "uint4 v = threadIdx.x % 2 ? load_relaxed(a.a + 4 * threadIdx.x)"
        "                          : load_constant(a.a + 4 * threadIdx.x);"
        "store_relaxed((uint4*)a.b + threadIdx.x, make_uint4(v.w, v.z, v.y, v.x));"
    )
    given, found = guarded(np.arange(128, dtype=np.uint32)), zeros(32, 4)
    run_on(machine, text, given, found)
    np.testing.assert_array_equal(found, given.reshape(32, 4)[:, ::-1])


def test_sixteen_bytes_are_loaded_where_they_are_asked_for_and_are_zero_elsewhere(machine):
    text = kernel(
        "const bool there = threadIdx.x % 3 == 0;"
        "store_relaxed((uint4*)a.b + threadIdx.x, load_relaxed_if(there, a.a + 4 * threadIdx.x));"
    )
    given, found = guarded(np.arange(1, 129, dtype=np.uint32)), zeros(32, 4)
    run_on(machine, text, given, found)
    there = np.arange(32)[:, None] % 3 == 0
    np.testing.assert_array_equal(found, np.where(there, given.reshape(32, 4), 0))


ORDER = kernel("if (threadIdx.x == 0) a.b[atomicAdd(a.a, 1u)] = blockIdx.x;")


def order_of_blocks(seed):
    ticket, order = zeros(1), zeros(40)
    run(ORDER, ticket, order, grid=40, seed=seed)
    return order.tolist()


def test_a_seed_changes_the_order_and_repeats_it():
    assert order_of_blocks(0) == list(range(40))
    assert sorted(order_of_blocks(7)) == list(range(40))
    assert order_of_blocks(7) == order_of_blocks(7)
    assert len({tuple(order_of_blocks(seed)) for seed in range(5)}) == 5


def test_a_seed_shows_a_race():
    """A read and a write that are not one operation lose counts when others come between."""
    text = kernel("unsigned old = load_acquire(a.a); store_relaxed(a.a, old + 1);")
    for seed in (0, 1):
        count = zeros(1)
        run(text, count, grid=8, block=64, seed=seed)
        assert (count[0] == 8 * 64) == (seed == 0)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("if (threadIdx.x) __syncthreads(); else while (load_acquire(a.a) == 5) wait(asked);",
         "block 0 has threads 1 in wait.., 31 at __syncthreads"),
        ("while (load_acquire(a.a) <= blockIdx.x) wait(asked);", "block 5 has threads 32 in wait"),
        ("if (threadIdx.x < 31) __syncwarp();", "31 at an operation of their warp, 1 exited"),
        ("if (threadIdx.x < 16) __syncwarp(); else __syncthreads();",
         "16 at __syncthreads.., 16 at an operation of their warp; .*6 of 6 blocks never finish"),
    ],
)  # fmt: skip
def test_a_deadlock_is_found(body, what):
    with pytest.raises(RuntimeError, match=f"test: deadlock: .*{what}"):
        run(kernel("unsigned asked = 0; " + body), guarded(np.array([5], np.uint32)), grid=6)


def test_a_launch_after_a_failed_one_is_whole():
    text = kernel(
        "if (a.n && threadIdx.x) __syncwarp(); else __syncthreads(); a.a[threadIdx.x] = 1;"
    )
    found = zeros(32)
    with pytest.raises(RuntimeError, match="deadlock"):
        run(text, found, n=1)
    run(text, found, n=0)
    np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize(("index", "byte"), [(8, 32), (-1, -4)])
def test_a_write_outside_of_an_array_is_found(index, byte):
    array = zeros(8)
    text = kernel("if (threadIdx.x == 3) a.a[a.n] = 9;")
    with pytest.raises(RuntimeError, match=rf"test: it wrote to byte {byte} of an array of 32 byt"):
        run(text, array, n=index)
    run(text, array, n=7)  # told once


@pytest.mark.parametrize("index", [16, -1])
def test_a_write_outside_of_shared_memory_is_found(index):
    text = kernel("SHARED(unsigned, s); if (threadIdx.x == 3) s[a.n] = 9;")
    run(text, n=15, shared=64)
    with pytest.raises(RuntimeError, match="wrote outside of the 64 bytes of shared memory"):
        run(text, n=index, shared=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("load_relaxed(a.a + 1);", r"misaligned address of a load or store \(block 0, thread 0\)"),
        ("if (threadIdx.x == 5) store_relaxed((uint4*)(a.a + 2), uint4());",
         r"misaligned address .*\(block 0, thread 5\)"),
        ("__syncwarp(2u);", "a lane's mask does not name the lane itself"),
        ("if (threadIdx.x < 4) __shfl_sync(15u, 1, 4);",
         "a shuffle reads from a lane that its mask does not name"),
    ],
)  # fmt: skip
def test_wrong_use_of_a_primitive_is_found(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(kernel(body), zeros(64))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="stacks are watched on x86-64 alone")
def test_a_stack_that_is_nearly_full_is_found():
    text = kernel(
        "volatile char large[32400]; large[threadIdx.x] = 1; __syncthreads();"
        "a.a[threadIdx.x] = large[threadIdx.x];"
    )
    with pytest.raises(RuntimeError, match="stack is too small for its local variables"):
        run(text, zeros(32))


def test_arguments_of_another_size_are_refused():
    class Wrong(ctypes.Structure):
        _fields_ = (("a", ctypes.c_uint64),)

    with pytest.raises(RuntimeError, match="does not have the size of the kernel's"):
        emulate_text(kernel("")).launch("test", Wrong(0), grid=1, block=32)


def test_what_the_compiler_says_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ refuses the kernel.*nonsense"):
        emulate_text(kernel("nonsense;"))


def test_options_define_macros_and_others_are_left_out():
    found = zeros(1)
    run(kernel("a.a[0] = N;"), found, block=1, options=("-DN=3", "--maxrregcount=64"))
    assert found[0] == 3


STUCK = '''
import ctypes
from importlib.resources import files
from cuda.bindings import driver
from marnet_kernels.compile import arch_for, compile_cubin
from marnet_kernels.loader import current_device, load_function

text = (files("marnet_kernels") / "csrc" / "device.cuh").read_text() + """
extern "C" __global__ void stuck(const unsigned* counter) {
    unsigned asked = 0;
    while (load_acquire(counter) == 0) wait(asked);
}
"""
driver.cuInit(0)
driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
function = load_function(compile_cubin(text, arch_for(current_device().capability)), "stuck")
address = driver.cuMemAlloc(256)[1]
driver.cuMemsetD8(address, 0, 256)
argument = ctypes.c_uint64(int(address))
table = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, 0, ctypes.addressof(table), 0)
print(driver.cuCtxSynchronize()[0].name)
'''


@pytest.mark.gpu
def test_a_wait_that_never_ends_is_an_error_and_no_hang(gpu):
    """In a process of its own, which has no use for CUDA afterwards."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CUDA_ERROR_LAUNCH_FAILED"

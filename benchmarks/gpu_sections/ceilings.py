"""Measure what this card reaches at its simplest: copies, matrix products, and blocks that wait for
blocks.

The last decides how fast a loop in one kernel can be: its blocks hand each other a layer's output
three times a step. `counter` separates the layers by a barrier over all blocks; in `epoch` the data
themselves carry the number of the exchange and readers wait for them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib.resources import files
from itertools import product

import torch

from gpu_sections.measure import NO_DEVICE, Call, Job, Machine, relative_error
from marnet_kernels import _cuda
from marnet_kernels.compile import arch_for, compile_cubin
from marnet_kernels.loader import load_function

BLOCKS, THREADS = (128, 64, 32), 256  # a layer of 1,024 features in tiles of 8, 16 and 32
COPIED = 2**30  # bytes, far more than any cache
SIDE = 8192  # of the square products
BROADCAST = 2**21  # bytes that every multiprocessor reads: one layer's weights
READS = 10  # of all of it in one launch
ROUNDS = 2000  # exchanges of one launch
ROWS = (1, 16)  # 16-byte words that a block publishes in one exchange: 16 are a tile of 16 rows


def run(job: Job) -> None:
    """Measure all of them."""
    if not job.was_measured(unit="TFLOP/s"):
        for name, measure in {"copy": _copy, "matrix": _matrix}.items():
            with job.attempt(name):
                measure(job)
    if not job.machine.is_cuda:
        job.miss("read of the same 2 MiB by every multiprocessor", NO_DEVICE)
        job.miss("exchanges between blocks", NO_DEVICE)
        return
    with job.attempt("kernels of blocks that read and wait"):
        _kernels(job)


def _copy(job: Job) -> None:
    size = 4096 if job.tiny else COPIED
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=job.machine.device)
    target = torch.empty_like(source)
    taken = job.measure({"copy": lambda: target.copy_(source)}, 1.0)["copy"]
    fidelity = {"equal": bool(torch.equal(source, target))}
    job.add("copy on the device, bytes read and written", 2 * size / taken / 1e9, "TB/s", fidelity)


def _matrix(job: Job) -> None:
    for precision, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        side = 64 if job.tiny else SIDE
        call, error = matrix_product(job.machine, dtype, side)
        rates = 2e-9 * side**3 / job.measure({"product": call}, 1.0)["product"]
        title = f"matrix product {side} x {side} x {side}, random data"
        job.add(title, rates, "TFLOP/s", {"relative_error": error}, precision=precision)


def matrix_product(machine: Machine, dtype: torch.dtype, side: int) -> tuple[Call, float]:
    """A square product, and its error against float64 on a few of its rows."""
    a, b = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    error = relative_error(out[:16], a[:16].double() @ b.double())
    return lambda: torch.mm(a, b, out=out), error


# Written with the functions of csrc/device.cuh, so that the tests can run it on a CPU, too.
SOURCE = """
struct Arguments { uint4* data; unsigned* counter; unsigned* wrong; int words, rounds; };

__device__ bool holds(uint4 v, unsigned n) { return v.x == n && v.y == n && v.z == n && v.w == n; }

__device__ void publish(uint4* data, int words, unsigned n) {
    const int i = threadIdx.x;
    if (i < words) store_relaxed(data + blockIdx.x * words + i, make_uint4(n, n, n, n));
}

// Every block reads all words again and again, which hold 1.
extern "C" __global__ void __launch_bounds__(256, 1) broadcast(const Arguments a) {
    unsigned sum = 0, count = 0;
    for (int round = 0; round < a.rounds; round++) {
        #pragma unroll 8
        for (int i = threadIdx.x; i < a.words; i += 256) {
            const uint4 v = load_relaxed(a.data + i);
            sum += v.x + v.y + v.z + v.w;
            count += 4;
        }
    }
    if (sum != count) store_relaxed(a.wrong, 1u);
}

// In each exchange, a block publishes `words` words and reads those of all blocks. There are two
// buffers: who writes one again has seen all of the other, so everybody has read the first.
extern "C" __global__ void __launch_bounds__(256, 1) counter(const Arguments a) {
    const int all = a.words * gridDim.x;
    for (unsigned n = 1; n <= (unsigned)a.rounds; n++) {
        uint4* data = a.data + (n & 1) * all;
        publish(data, a.words, n);
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned asked = 0;
            add_release(a.counter);
            while (load_acquire(a.counter) < n * gridDim.x) wait(asked);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < all; i += 256)
            if (!holds(load_relaxed(data + i), n)) store_relaxed(a.wrong, 1u);
    }
}

// The same without a counter: readers wait until the data are those of this exchange.
extern "C" __global__ void __launch_bounds__(256, 1) epoch(const Arguments a) {
    const int all = a.words * gridDim.x;
    for (unsigned n = 1; n <= (unsigned)a.rounds; n++) {
        uint4* data = a.data + (n & 1) * all;
        publish(data, a.words, n);
        for (int i = threadIdx.x; i < all; i += 256) {
            unsigned asked = 0;
            while (!holds(load_relaxed(data + i), n)) wait(asked);
        }
        __syncthreads();
    }
    if (threadIdx.x < a.words && !holds(load_relaxed(a.data + threadIdx.x), a.rounds & ~1u))
        store_relaxed(a.wrong, 1u);  // the last even exchange lies in the first buffer
}
"""


def whole_source() -> str:
    """Return the source as NVRTC compiles it."""
    return (files("marnet_kernels") / "csrc" / "device.cuh").read_text("utf-8") + SOURCE


class Arguments(ctypes.Structure):
    """This is `struct Arguments` of SOURCE."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("data", "counter", "wrong")),
        *((name, ctypes.c_int32) for name in ("words", "rounds")),
    )


class _Kernel:
    """A kernel of SOURCE on so many blocks, all of them on the card at once."""

    def __init__(
        self, machine: Machine, name: str, blocks: int, words: int, rounds: int, data: int
    ) -> None:
        """Take how many words of 16 bytes a block handles; `data` of them lie in memory."""
        cubin = compile_cubin(whole_source(), arch_for(torch.cuda.get_device_capability()))
        self._function = load_function(cubin, name)
        self._machine, self._blocks = machine, blocks
        self._clears = name == "epoch"  # those of the launch before would be taken for this one's
        self.data, self.counter, self.wrong = (
            torch.zeros(n, dtype=torch.int32, device=machine.device) for n in (4 * data, 32, 32)
        )
        addresses = (t.data_ptr() for t in (self.data, self.counter, self.wrong))
        self._arguments = Arguments(*addresses, words, rounds)

    @property
    def right(self) -> bool:
        """Tell whether every block of every launch so far read what it should."""
        return int(self.wrong[0]) == 0

    def __call__(self) -> None:
        self.counter.zero_()
        if self._clears:
            self.data.zero_()
        table = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        driver = _cuda.load("driver")
        shape = (self._blocks, 1, 1, THREADS, 1, 1, 0)
        result = driver.cuLaunchCooperativeKernel(
            self._function, *shape, self._machine.stream, ctypes.addressof(table)
        )
        _cuda.check(result, "launch of a kernel of the suite")


def _kernels(job: Job) -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    _broadcast(job, processors)
    calls = dict(_exchanges(job, processors))
    if not calls or job.was_lost("timing"):
        return
    with job.attempt("timing"):
        taken = job.measure(calls, 5.0)
        for title, kernel in calls.items():
            microseconds = 1e3 * taken[title] / ROUNDS
            job.add(title, microseconds, "us", {"right": kernel.right})


def _exchanges(job: Job, processors: int) -> Iterator[tuple[str, _Kernel]]:
    """Yield the exchanges whose blocks are all on the card at once, which one a
    multiprocessor always is.
    """
    ways = {"counter": "barrier on a counter", "epoch": "data that carry their epoch"}
    for blocks, (name, how), rows in product(BLOCKS, ways.items(), ROWS):
        title = f"one exchange of {blocks} blocks, {how}, {16 * rows} bytes a block"
        if blocks > processors:
            job.miss(title, f"there are {processors} multiprocessors")
            continue
        if job.was_lost(title):
            continue
        found: list[_Kernel] = []
        with job.attempt(title):
            kernel = _Kernel(job.machine, name, blocks, rows, ROUNDS, 2 * rows * blocks)
            kernel()
            found.append(kernel)
        yield from ((title, kernel) for kernel in found)


def _broadcast(job: Job, blocks: int) -> None:
    title = "read of the same 2 MiB by every multiprocessor"
    if job.was_lost(title) or job.was_measured(line=title):
        return
    with job.attempt(title):
        words = BROADCAST // 16
        kernel = _Kernel(job.machine, "broadcast", blocks, words, READS, words)
        kernel.data.fill_(1)
        taken = job.measure({title: kernel}, 1.0)[title]
        rates = READS * blocks * BROADCAST / taken / 1e9
        job.add(title, rates, "TB/s", {"right": kernel.right}, blocks=blocks)

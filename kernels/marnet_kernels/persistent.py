"""The reverse-sampling loop as one cooperative launch: variants of the kernel and launch wrapper.

`reverse_sampler.py` defines formulas and memory. Every variant gives the same numbers as its twin,
and all with the same exchange give the same bits: only time differs.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from marnet_kernels import _cuda
from marnet_kernels.compile import Cubin, arch_for, compile_cubin, source
from marnet_kernels.loader import DeviceInfo, current_device, load_function
from marnet_kernels.reverse_sampler import (
    COPIES,
    POINTERS,
    ROW_GROUPS,
    Exchange,
    Layout,
    layout,
)

MOST_ROWS = 64  # for which choose_variant takes this kernel
_ROWS = (8, 16, 32, 64)  # of one group of blocks
_FEATURES = 8  # of one CTA of the layout
_CHUNK = {1: 32, 2: 32, 4: 16}  # rows whose sums are in shared memory at a time, as in the kernel
_MOST_WEIGHTS = 144  # registers of a thread for weights; with more, the compiler spills...
_CROWDED = 192  # ...but for so many rows, on these targets
_CROWDED_ROWS, _CROWDED_TARGETS = 16, ("sm_80", "sm_90")
_MANY = 16  # rows above which four tiles a block are taken, where they can be


@dataclass(frozen=True)
class Variant:
    """One way to compile and launch the kernel."""

    rows: int  # that one group of blocks can hold: 8, 16, 32 or 64
    tiles: int  # CTAs of the layout that a block computes: 1, 2 or 4
    exchange: Exchange
    copies: int = 1  # of exchanged activations; a block reads one of them
    groups: int = 1  # of blocks, which divide the rows evenly

    def __post_init__(self) -> None:
        allowed = {
            "rows": _ROWS,
            "tiles": (1, 2, 4),
            "exchange": ("counter", "epoch"),
            "copies": tuple(range(1, COPIES + 1)),
            "groups": tuple(range(1, ROW_GROUPS + 1)),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {values}; "
                    "choose_variant chooses"
                )
        if self.tiles == 1 and self.rows > 16:
            raise ValueError(
                f"rows: got {self.rows} with one tile, expected at most 16; use two tiles, which "
                "read the activations half as often"
            )

    def options(self, layout: Layout) -> tuple[str, ...]:
        """Return the options for `compile_cubin`; ValueError where the kernel cannot be built like
        that.
        """
        self._check(layout)
        macros = {
            "HP": layout.padded,
            "TILES": self.tiles,
            "ROWS": self.rows,
            "OPERAND": layout.dtype,
            "EPOCH": int(self.exchange == "epoch"),
            "COPIES": self.copies,
        }
        # Fused additions would be other numbers than the twin's.
        return (*(f"-D{name}={value}" for name, value in macros.items()), "--fmad=false")

    def blocks(self, layout: Layout) -> int:
        """Count the blocks of one group."""
        return layout.ctas // self.tiles

    def grid(self, layout: Layout) -> tuple[int, int]:
        """Blocks of one group, groups."""
        return self.blocks(layout), self.groups

    @property
    def shared_bytes(self) -> int:
        """Count the shared memory of a block: two places for the partial sums of 8 warps, and what
        its threads keep.
        """
        chunk = min(self.rows, _CHUNK[self.tiles])
        partial = 2 * 8 * chunk * (_FEATURES * self.tiles + 4)  # rows padded against conflicts
        return 4 * partial + 8 * 256 * (2 + 4 * (self.rows // chunk))

    def _check(self, layout: Layout) -> None:
        refusal = self._refusal(layout)
        if refusal is not None:
            raise ValueError(refusal)

    def _refusal(self, layout: Layout) -> str | None:
        """Say why the kernel cannot be built like that, if it cannot."""
        if self.exchange == "epoch" and layout.dtype != "fp16":
            return f"exchange: got 'epoch' for {layout.dtype}, expected fp16; use 'counter'"
        weights = self._weight_registers(layout)
        crowded = self.tiles == 4 and self.rows == _CROWDED_ROWS
        most = _CROWDED if crowded else _MOST_WEIGHTS
        if weights <= most:
            return None
        return (
            f"width: got hidden width {layout.padded}, which needs {weights} registers a thread "
            f"for weights, expected at most {most}; use matrix products in a captured graph"
        )

    def _weight_registers(self, layout: Layout) -> int:
        """Count the weight registers of a thread: they hold operands of mma for 16 features,
        whether a block has 16 or 8.
        """
        return 8 * max(1, self.tiles // 2) * 3 * layout.padded // 256


def choose_variant(layout: Layout, rows: int, device: DeviceInfo) -> Variant:
    """The variant for R = B K rows on this device; ValueError, with the reason, where none runs.

    What it is chosen by was measured on an H100 with a prototype, Hp = 1024, 50 steps
    (benchmarks/results/2026-11-20-h100-prototype-loop.json), in microseconds a step:
      - Without any synchronisation 1.8 at one row, 3.3 at 16 and 8.8 at 64: each of the 128 blocks
        read all rows from the L2 cache. Two tiles a block halve what is read, four halve it again
        but take nearly all registers, and as many groups as fit divide the rows of a block. Groups
        of fewer than 8 rows save no arithmetic.
      - With a counter 5.0, 5.7, 6.2, 8.4 and 12.5 at 1, 8, 16, 32 and 64 rows; with the epoch in
        the data and copies 3.8, 5.9, 7.6, 6.9 and 10.3. Readers that ask for all rows again and
        again were in each other's way; this kernel asks for one row first.
    This kernel itself is not measured yet, on any GPU.
    """
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1; images times samples")
    if rows > MOST_ROWS:
        raise ValueError(
            f"rows: got {rows}, expected at most {MOST_ROWS}; a captured graph of matrix products "
            "is used there: it took 18.9 us a step at 256 rows on an H100, and this kernel would "
            "need more than four passes"
        )
    arch_for(device.capability)
    if not device.cooperative:
        raise ValueError(
            "device: got one without cooperative launches, expected one with them, as the blocks "
            "wait for each other; use matrix products in a captured graph"
        )
    two, four = (_variant(layout, rows, device, tiles) for tiles in (2, 4))
    chosen = (four or two) if rows > _MANY else (two or four)
    if chosen is None:
        Variant(_ROWS[0], 2, "counter")._check(layout)  # says so if the width is the reason
        raise ValueError(
            f"multiprocessors: got {device.multiprocessors}, expected at least {layout.ctas // 2} "
            f"for hidden width {layout.padded}, as all blocks must run at once; use matrix "
            "products in a captured graph"
        )
    return chosen


def _variant(layout: Layout, rows: int, device: DeviceInfo, tiles: int) -> Variant | None:
    """Return the variant with so many tiles, or None where that cannot be."""
    blocks = layout.ctas // tiles
    groups = min(device.multiprocessors // blocks, -(-rows // _ROWS[0]), ROW_GROUPS)
    if not groups:
        return None
    epoch = rows <= _ROWS[0] and layout.dtype == "fp16"
    most = _CROWDED if arch_for(device.capability) in _CROWDED_TARGETS else _MOST_WEIGHTS
    for size in _ROWS:
        variant = Variant(
            rows=size,
            tiles=tiles,
            exchange="epoch" if epoch else "counter",
            copies=COPIES if epoch else 1,
            groups=groups,
        )
        fits = size * groups >= rows and variant._weight_registers(layout) <= most
        if fits and variant._refusal(layout) is None:
            return variant
    return None


def shipped_options() -> list[tuple[str, ...]]:
    """Return the options of the variants that a wheel carries compiled: those chosen for fp16 and
    bf16 operands at the usual width.
    """
    kinds = [*((rows, 2) for rows in _ROWS), (_CROWDED_ROWS, 4)]
    epoch = [Variant(rows, tiles, "epoch", copies=COPIES) for rows, tiles in (kinds[0], kinds[-1])]
    counter = [Variant(rows, tiles, "counter") for rows, tiles in kinds]
    half, brain = layout(1024, "fp16"), layout(1024, "bf16")
    return [
        *(variant.options(half) for variant in (*epoch, *counter)),
        *(variant.options(brain) for variant in counter),
    ]


_SIZES = ("images", "samples", "noises", "steps")


class _Parameters(ctypes.Structure):
    """This is `struct Arguments` of csrc/reverse_sampler.cu, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int32) for name in _SIZES),
        ("slope", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class ReverseSamplerArguments:
    """Sizes and device addresses of one launch, checked when built.

    `reverse_sampler.py` has the shapes; `Layout.buffers` the bytes.
    """

    images: int  # B
    samples: int  # K
    noises: int  # N, 1 or B
    steps: int  # S
    weights: int
    biases: int
    coefficients: int
    bias: int
    condition: int
    exchange: int
    counter: int
    out: int
    slope: float = 0.01  # of leaky_relu below zero

    def __post_init__(self) -> None:
        for name in ("images", "samples", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.noises not in (1, self.images):
            raise ValueError(
                f"noises: got {self.noises} for {self.images} images, expected 1 or {self.images}"
            )
        for name, alignment in POINTERS.items():
            self._check_address(name, alignment)

    def _check_address(self, name: str, alignment: int) -> None:
        address = getattr(self, name)
        if address % alignment or address < 0:
            raise ValueError(
                f"{name}: got address {address:#x}, expected a multiple of {alignment}; "
                "pass the start of an allocation"
            )
        if not address:
            raise ValueError(
                f"{name}: got address 0, expected device memory; allocate what Layout.buffers says"
            )

    def _parameters(self) -> _Parameters:
        return _Parameters(*(getattr(self, name) for name in (*POINTERS, *_SIZES, "slope")))


def check_launch(layout: Layout, variant: Variant, arguments: ReverseSamplerArguments) -> None:
    """ValueError where this variant cannot take these sizes."""
    rows = arguments.images * arguments.samples
    if -(-rows // variant.groups) > variant.rows:
        raise ValueError(
            f"rows: got {rows} (images times samples), expected at most "
            f"{variant.rows * variant.groups}, as {variant} has; split the batch"
        )
    layout.buffers(arguments.images, arguments.samples, arguments.noises, arguments.steps)


def cleared(
    layout: Layout, variant: Variant, arguments: ReverseSamplerArguments
) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of what has to be zero when the kernel starts."""
    if variant.exchange == "counter":
        yield arguments.counter, 128 * variant.groups
        return
    rows = arguments.images * arguments.samples
    yield arguments.exchange, 2 * 3 * variant.copies * rows * layout.padded


@dataclass(frozen=True)
class Resources:
    """These are the resources of the device that the kernel takes."""

    registers: int  # a thread
    spill_bytes: int
    shared_bytes: int  # a block
    blocks: int  # in all groups


class ReverseSampler:
    """The kernel, loaded into the CUDA context that is current now, for as long as that lives.

    Raises:
        ValueError: the kernel cannot be built like that.
        RuntimeError: no context, or the device cannot run all blocks at once.
    """

    cubin: Cubin
    resources: Resources

    def __init__(self, layout: Layout, variant: Variant) -> None:
        device = current_device()
        self.layout, self.variant = layout, variant
        options = variant.options(layout)
        self.cubin = compile_cubin(source("reverse_sampler"), arch_for(device.capability), options)
        self._function = load_function(self.cubin, "reverse_sampler", variant.shared_bytes)
        self._driver = _cuda.load("driver")
        blocks = variant.blocks(layout) * variant.groups
        self.resources = Resources(
            self.cubin.registers, self.cubin.spill_bytes, variant.shared_bytes, blocks
        )
        self._check_residency(device)

    def launch(self, stream: int, arguments: ReverseSamplerArguments) -> None:
        """Enqueue the loop on the stream (a CUstream as int); can be captured.

        Allocates no device memory and waits for nothing. ValueError where the sizes do not fit.
        """
        check_launch(self.layout, self.variant, arguments)
        for address, nbytes in cleared(self.layout, self.variant, arguments):
            result = self._driver.cuMemsetD8Async(address, 0, nbytes, stream)
            _cuda.check(result, "clearing the exchange of reverse_sampler")
        parameters = arguments._parameters()
        # The driver copies the parameters before it returns: nothing has to outlive the call.
        table = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        result = self._driver.cuLaunchCooperativeKernel(
            self._function,
            *(*self.variant.grid(self.layout), 1),
            *(self.layout.threads, 1, 1),
            self.variant.shared_bytes,
            stream,
            ctypes.addressof(table),
        )
        _cuda.check(result, "launch of reverse_sampler")

    def _check_residency(self, device: DeviceInfo) -> None:
        """Blocks that wait for one that never starts would hang the device."""
        each = _cuda.check(
            self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                self._function, self.layout.threads, self.variant.shared_bytes
            ),
            "asking for the occupancy of reverse_sampler",
        )
        fit = each * device.multiprocessors
        if fit < self.resources.blocks:
            raise RuntimeError(
                f"reverse_sampler: got a device that runs {fit} of its blocks at once, expected "
                f"{self.resources.blocks}, as they wait for each other; let choose_variant choose, "
                "or use matrix products in a captured graph"
            )

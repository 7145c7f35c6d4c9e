"""Resize, centre crop and normalise a batch of photographs: plan, launch wrapper and NumPy twin.

The operations are those of marnet_sdk.preprocess.Preprocess, and the arithmetic is Pillow's
(src/libImaging/Resample.c): antialiased filters whose support grows with the downscale factor,
weights rounded to 22 fractional bits, one pass over columns and one over rows, each rounded to a
grey level. All of it is integers, so kernel, twin and Pillow give the same grey levels. Which pass
comes first depends on the version of Pillow, and moves some pixels by a grey level.

Axes: B image, H height and W width of the output; h, w of one image; channels are R, G, B.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from marnet_kernels import _cuda
from marnet_kernels.compile import Cubin, arch_for, compile_cubin
from marnet_kernels.loader import current_device, load_function
from marnet_kernels.reverse_sampler import from_bits, to_bits
from marnet_kernels.source import source

Output = Literal["fp32", "fp16", "bf16"]

BUFFERS = ("source", "tables", "scratch", "out")
"""Device memory of a launch, in the order of the kernel's arguments; each starts at 16 bytes."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a value of the output
_THREADS = 256  # of a block, as in csrc/preprocess.cu
_ROWS = 4  # that a thread resizes across, as there
_LOOKUP_BYTES = 3072  # 3 * 256 float32
_GAP = 16  # bytes after an image: the kernel reads whole words of four whole pixels
_BITS = 22  # fractional bits of a weight
_ONE = 1 << _BITS
# Of one filter: 224 pixels may be made of a million. Of more taps than this, every weight is 0.
_MOST_WEIGHTS = 2**22

Floats = NDArray[np.float64]


class _Kind(NamedTuple):
    """A filter of Pillow."""

    support: float  # half its width, in source pixels where nothing is scaled down
    function: Callable[[Floats], Floats]


def _box(x: Floats) -> Floats:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Floats) -> Floats:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _hamming(x: Floats) -> Floats:
    angle = np.abs(x) * math.pi
    # Pillow has these two constants in float32.
    window = float(np.float32(0.54)) + float(np.float32(0.46)) * np.cos(angle)
    ratio = np.divide(np.sin(angle), angle, out=np.ones_like(x), where=angle != 0)
    return np.where(np.abs(x) < 1, np.where(x == 0, 1.0, ratio * window), 0.0)


def _bicubic(x: Floats) -> Floats:
    a, x = -0.5, np.abs(x)
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _sinc(x: Floats) -> Floats:
    angle = x * math.pi
    return np.divide(np.sin(angle), angle, out=np.ones_like(x), where=angle != 0)


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


_NEAREST = 0
_KINDS = {
    1: _Kind(3.0, _lanczos),
    2: _Kind(1.0, _bilinear),
    3: _Kind(2.0, _bicubic),
    4: _Kind(0.5, _box),
    5: _Kind(1.0, _hamming),
}
_NAMES = "0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming"


@dataclass(frozen=True)
class PreprocessSpec:
    """What is done to every image: the fields of marnet_sdk.preprocess.Preprocess, as numbers.

    Exactly one of `size` and `shortest_edge` is set, the latter with `crop_size`.

    Raises:
        ValueError: a combination without a static output size, or a value out of range.
    """

    size: tuple[int, int] | None = None  # (height, width), aspect ratio not kept
    shortest_edge: int | None = None  # pixels, aspect ratio kept
    crop_size: tuple[int, int] | None = None  # (height, width), padded with black where smaller
    resample: int = 2  # code of PIL.Image.Resampling
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pillow: int = 13  # major version of Pillow whose grey levels are made

    def __post_init__(self) -> None:
        if (self.size is None) == (self.shortest_edge is None):
            raise ValueError(
                f"size, shortest_edge: got {self.size} and {self.shortest_edge}, expected one of "
                "them; leave the other out"
            )
        if self.size is None and self.crop_size is None:
            raise ValueError(
                f"crop_size: got none with shortest_edge={self.shortest_edge}, expected one; images"
                " of a batch need one size"
            )
        edges = [*(self.size or ()), *(self.crop_size or ()), self.shortest_edge or 1]
        if min(edges) < 1:
            raise ValueError(f"edges: got {edges}, expected at least 1 pixel; correct the sizes")
        if self.resample != _NEAREST and self.resample not in _KINDS:
            raise ValueError(
                f"resample: got {self.resample}, expected one of {_NAMES}; resize with Pillow"
            )
        numbers = (self.rescale_factor, *self.mean, *self.std)
        lengths = len(self.mean), len(self.std)
        if lengths != (3, 3) or not np.isfinite(numbers).all() or 0 in self.std:
            raise ValueError(
                f"rescale_factor, mean, std: got {self.rescale_factor}, {self.mean}, {self.std}, "
                "expected finite numbers, three for mean and three non-zero ones for std; "
                "correct them"
            )

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.crop_size or self.size or (0, 0)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image before it is cropped."""
        if self.size is not None:
            return self.size
        edge, short, long = self.shortest_edge or 1, min(height, width), max(height, width)
        scaled = int(edge * long / short)
        return (edge, scaled) if height <= width else (scaled, edge)

    def down_first(self, here: tuple[int, int], there: tuple[int, int]) -> bool:
        """Whether (height, width) `here` becomes `there` by resizing rows before columns.

        Up to version 12, Pillow resizes columns first; from 13 on, rows where they lose more than
        twice as many as columns (python-pillow/Pillow pull request 9549).
        """
        rows, columns = here[0] - there[0], here[1] - there[1]
        return self.pillow >= 13 and rows > max(0, 2 * columns)

    def lookup(self) -> NDArray[np.float32]:
        """float32 [3, 256]: (v * rescale_factor - mean) / std, rounded where transformers does."""
        rescaled = (np.arange(256.0) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return (rescaled - mean) / std


def preprocess_reference(image: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    """uint8 [h, w, 3] -> float32 [3, H, W], one image, the whole of it resized before the crop."""
    height, width, _ = image.shape
    size = spec.resized_size(height, width)
    down_first = spec.down_first((height, width), size)
    resized = resize_reference(image, size, spec.resample, down_first)
    cropped = np.zeros((*spec.output_size, 3), np.uint8)
    here, there = [], []
    for length, wanted in zip(resized.shape, spec.output_size, strict=False):
        cut, pad, covered = _centre(length, wanted)
        here.append(slice(cut, cut + covered))
        there.append(slice(pad, pad + covered))
    cropped[tuple(there)] = resized[tuple(here)]
    return np.stack([spec.lookup()[c][cropped[..., c]] for c in range(3)])


def resize_reference(
    image: NDArray[np.uint8], size: tuple[int, int], resample: int, down_first: bool = False
) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] -> [*size, 3], as Image.resize: over columns, then over rows, or reversed."""
    if down_first:
        turned = resize_reference(image.transpose(1, 0, 2), (size[1], size[0]), resample)
        return turned.transpose(1, 0, 2)
    across = _resize_rows(image.transpose(1, 0, 2), size[1], resample)  # [width, h, 3]
    return _resize_rows(across.transpose(1, 0, 2), size[0], resample)


def _resize_rows(image: NDArray[np.uint8], length: int, resample: int) -> NDArray[np.uint8]:
    """[h, w, 3] -> [length, w, 3]."""
    rows = np.empty((length, *image.shape[1:]), np.uint8)
    for position in range(length):
        starts, weights = filter_weights(len(image), length, resample, position, 1)
        total = np.full(image.shape[1:], _ONE // 2, np.int64)
        for tap, weight in enumerate(weights[0]):
            if weight:
                total += int(weight) * image[starts[0] + tap].astype(np.int64)
        rows[position] = (total >> _BITS).clip(0, 255)
    return rows


def filter_weights(
    length: int, resized: int, resample: int, first: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(first source pixel [count], weights [count, taps]) of positions first .. first + count - 1.

    For `length` source pixels resized to `resized`. Weights have 22 fractional bits; where a
    position has fewer taps than others, its last weights are 0. Source: precompute_coeffs and
    normalize_coeffs_8bpc of Pillow; the order of operations is theirs, too.
    """
    if length == resized:
        return np.arange(first, first + count, dtype=np.int32), np.full((count, 1), _ONE, np.int32)
    scale = length / resized
    if resample == _NEAREST:  # ImagingScaleAffine of Pillow adds up, and so collects the same error
        steps = np.full(first + count, scale)
        steps[0] = scale * 0.5
        starts = np.cumsum(steps)[first:].astype(np.int32).clip(max=length - 1)
        return starts, np.full((count, 1), _ONE, np.int32)
    kind, wider = _KINDS[resample], max(scale, 1.0)
    support, shrink = kind.support * wider, 1.0 / wider
    if 2 * support * count >= _MOST_WEIGHTS:
        raise ValueError(
            f"sizes: got {length} pixels in a row resized to {resized}, expected filters of less "
            f"than {_MOST_WEIGHTS} weights; crop the image or decode it smaller"
        )
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = (centres - support + 0.5).astype(np.int64).clip(min=0)
    ends = (centres + support + 0.5).astype(np.int64).clip(max=length)
    pixels = starts[:, None] + np.arange((ends - starts).max())
    values = kind.function((pixels - centres[:, None] + 0.5) * shrink)
    values[pixels >= ends[:, None]] = 0
    totals = np.cumsum(values, axis=1)[:, -1:]  # one after another: np.sum adds in another order
    values = np.divide(values, totals, out=values, where=totals != 0)
    weights = np.where(values < 0, -0.5, 0.5) + values * _ONE
    return starts.astype(np.int32), weights.astype(np.int32)  # towards zero


def _centre(length: int, wanted: int) -> tuple[int, int, int]:
    """(first pixel that is kept, black ones before it, pixels kept) of a centre crop.

    An odd pixel is cut below or right, and padded above or left.
    """
    cut, pad = max(0, (length - wanted) // 2), max(0, (wanted - length + 1) // 2)
    return cut, pad, min(length, wanted)


class _Axis(NamedTuple):
    """The filter over one axis, as the kernel reads it."""

    first: int  # source pixel that tap 0 counts from
    length: int  # source pixels that the crop needs
    quads: int  # taps / 4
    table: NDArray[np.int32]  # first tap [positions], weights [quads][positions][4]


@lru_cache(maxsize=512)
def _axis(length: int, resized: int, wanted: int, resample: int) -> _Axis:
    """`length` pixels resized to `resized` and cropped to `wanted`."""
    cut, pad, covered = _centre(resized, wanted)
    starts, weights = filter_weights(length, resized, resample, cut, covered)
    rows, taps_kept = np.nonzero(weights)
    pixels = starts[rows] + taps_kept  # of every weight that is not 0, position by position
    bounds = np.flatnonzero(np.diff(rows, prepend=-1))
    starts, ends = pixels[bounds], np.maximum.reduceat(pixels, bounds) + 1
    first, end = int(starts.min()), int(ends.max())
    taps, positions = _round_up(int((ends - starts).max()), 4), _round_up(wanted, 4)
    # Taps end with the pixels that are needed, or at most 3 behind them: earlier ones get weight 0.
    begin = np.minimum(starts - first, max(end - first - taps, 0))
    moved = np.zeros((positions, taps), np.int32)  # 0, which is black, where nothing is covered
    moved[rows + pad, pixels - first - begin[rows]] = weights[rows, taps_kept]
    table = np.zeros((1 + taps, positions), np.int32)
    table[0, pad : pad + covered] = begin
    table[1:] = moved.reshape(positions, -1, 4).swapaxes(0, 1).reshape(taps, positions)
    table.flags.writeable = False
    return _Axis(first, end - first, taps // 4, table.reshape(-1))


_IMAGE = np.dtype(  # `struct Image` of csrc/preprocess.cu
    [("source", "<i8"), ("scratch", "<i8")]
    + [(name, "<i4") for name in ("pitch", "rows", "columns", "across", "across_quads")]
    + [(name, "<i4") for name in ("down", "down_quads", "down_first")]
)


class PreprocessPlan:
    """Where everything of one batch is, known before any memory is touched.

    Attributes:
        shape: (B, 3, H, W) of the output.
        offsets: bytes before each image in the buffer "source".
        tables: uint8, what the buffer "tables" has to hold.
        buffers: bytes of each of BUFFERS.

    Raises:
        ValueError: no image, one without a pixel or too large to address, or normalised values
            that the output's type cannot hold.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], spec: PreprocessSpec, output: Output = "fp32"
    ) -> None:
        """sizes: (height, width) of each image."""
        if output not in _BYTES:
            raise ValueError(f"output: got {output!r}, expected 'fp32', 'fp16' or 'bf16'")
        self.sizes, self.spec = tuple(sizes), spec
        self.output: Output = output
        self._check_sizes()
        self.shape = (len(self.sizes), 3, *spec.output_size)
        self.stride = _round_up(self.shape[3], 4)
        steps = [0, *(_round_up(3 * h * w + _GAP, 16) for h, w in self.sizes)]
        self.offsets = np.cumsum(steps, dtype=np.int64)[:-1]
        self._images = np.zeros(len(self.sizes), _IMAGE)
        filters, scratch = self._place()
        self.tables = np.concatenate([self._lookup(), self._images.view(np.uint8), *filters])
        self.buffers = {
            "source": int(sum(steps)),
            "tables": self.tables.nbytes,
            "scratch": scratch,
            "out": math.prod(self.shape) * _BYTES[output],
        }

    def _check_sizes(self) -> None:
        if not 1 <= len(self.sizes) <= 65_535:
            raise ValueError(
                f"sizes: got {len(self.sizes)} images, expected 1 to 65535; split the batch"
            )
        for index, (height, width) in enumerate(self.sizes):
            if min(height, width) < 1 or 3 * height * width >= 2**31:
                raise ValueError(
                    f"sizes: got image {index} of {height} x {width} pixels, expected at least one "
                    "and less than 2**31 bytes; decode it smaller"
                )
        if 3 * math.prod(self.spec.output_size) >= 2**31:
            raise ValueError(
                f"spec: got an output of {self.spec.output_size}, expected less than 2**31 values "
                "an image; choose a smaller size"
            )

    def _lookup(self) -> NDArray[np.uint8]:
        """The normalised value of each byte, in the output's type."""
        values, bits = self.spec.lookup(), self.spec.lookup()
        if self.output != "fp32":
            bits = to_bits(values, self.output)
            if not np.isfinite(from_bits(bits, self.output)).all():
                raise ValueError(
                    f"output: got normalised values of size {np.abs(values).max():g}, expected "
                    f"what {self.output} can hold; use output='fp32'"
                )
        lookup = np.zeros(_LOOKUP_BYTES, np.uint8)
        lookup[: bits.nbytes] = bits.reshape(-1).view(np.uint8)
        return lookup

    def _place(self) -> tuple[list[NDArray[np.uint8]], int]:
        """Fill the descriptors; (every filter once, as bytes; bytes of scratch)."""
        spec, (height, width) = self.spec, self.spec.output_size
        filters, found, end, scratch = [], {}, 0, 0
        for index, (h, w) in enumerate(self.sizes):
            resized = spec.resized_size(h, w)
            across = _axis(w, resized[1], width, spec.resample)
            down = _axis(h, resized[0], height, spec.resample)
            for axis in (across, down):
                if id(axis.table) not in found:  # the list keeps it alive, so ids are not reused
                    found[id(axis.table)] = end
                    filters.append(axis.table)
                    end += axis.table.size
            down_first = spec.down_first((h, w), resized)
            first_pixel = self.offsets[index] + 3 * (down.first * w + across.first)
            places = (first_pixel, scratch, 3 * w, down.length, across.length)
            tables = (found[id(across.table)], across.quads, found[id(down.table)], down.quads)
            self._images[index] = (*places, *tables, down_first)
            row = _round_up(3 * across.length, 4)
            nbytes = height * row + _GAP if down_first else 3 * down.length * self.stride
            scratch += _round_up(nbytes, 16)
            if max(end, nbytes) >= 2**31:
                raise ValueError(
                    f"sizes: got {end} weights and {nbytes} bytes of scratch for an image of {h} x "
                    f"{w} pixels, expected less than 2**31; decode it smaller or split the batch"
                )
        return [table.view(np.uint8) for table in filters], scratch

    def pack(
        self, images: Sequence[NDArray[np.uint8]], out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Images [h, w, 3] -> what the buffer "source" has to hold, into `out` (pinned) if given.

        Raises:
            ValueError: images of other sizes than the plan's, or an `out` of another size.
        """
        found = [(str(image.dtype), *image.shape) for image in images]
        expected = [("uint8", h, w, 3) for h, w in self.sizes]
        if found != expected:
            raise ValueError(
                f"images: got {found}, expected {expected}, those of the plan; make one for them"
            )
        nbytes = self.buffers["source"]
        if out is None:
            out = np.zeros(nbytes, np.uint8)
        if out.dtype != np.uint8 or out.shape != (nbytes,):
            raise ValueError(
                f"out: got {out.dtype} {out.shape}, expected uint8 ({nbytes},); allocate that"
            )
        for image, offset in zip(images, self.offsets, strict=True):
            out[offset : offset + image.size] = image.reshape(-1)
        return out


class _Parameters(ctypes.Structure):
    """`struct Arguments` of csrc/preprocess.cu, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in BUFFERS),
        *((name, ctypes.c_int32) for name in ("images", "height", "width", "stride")),
    )


class Launch(NamedTuple):
    """One launch of a kernel: `grid` blocks of `block` threads."""

    function: str
    grid: tuple[int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments:
    """The plan and the device addresses of one batch, checked when built.

    `source` and `tables` are filled by the caller from plan.pack(images) and plan.tables.
    """

    plan: PreprocessPlan
    source: int  # address of plan.buffers["source"] bytes; so are the others
    tables: int
    scratch: int  # may hold anything
    out: int  # [B, 3, H, W]

    def __post_init__(self) -> None:
        for name in BUFFERS:
            address = getattr(self, name)
            if address <= 0 or address % 16:
                raise ValueError(
                    f"{name}: got address {address:#x}, expected a multiple of 16 that is not 0; "
                    f"pass the start of an allocation of {self.plan.buffers[name]} bytes"
                )

    def parameters(self) -> ctypes.Structure:
        """What both kernels take."""
        addresses = (getattr(self, name) for name in BUFFERS)
        images, _, height, width = self.plan.shape
        return _Parameters(*addresses, images, height, width, self.plan.stride)

    def launches(self) -> Iterator[Launch]:
        """The two kernels, in their order. Blocks are as many as the largest image needs."""
        plan, images = self.plan, self.plan._images
        height, words = plan.shape[2], plan.stride // 4
        by_rows = height * -(-3 * images["columns"].astype(np.int64) // 4)
        by_columns = plan.stride * -(-images["rows"].astype(np.int64) // _ROWS)
        threads = int(np.where(images["down_first"], by_rows, by_columns).max())
        yield Launch("first", (-(-threads // _THREADS), len(images)), _THREADS, 0)
        threads = max(3 * height * words, plan.stride * -(-height // _ROWS))
        nbytes = _BYTES[plan.output]
        grid = (-(-threads // _THREADS), len(images))
        yield Launch(f"second_{8 * nbytes}", grid, _THREADS, 3 * 256 * nbytes)


class PreprocessKernel:
    """The kernels, loaded into the CUDA context that is current now, for as long as that lives."""

    cubin: Cubin

    def __init__(self) -> None:
        arch = arch_for(current_device().capability)
        self.cubin = compile_cubin(source("preprocess"), arch)
        names = ("first", "second_32", "second_16")
        self._functions: dict[str, Any] = {n: load_function(self.cubin, n) for n in names}
        self._launch = _cuda.load("driver").cuLaunchKernel

    def launch(self, stream: int, arguments: PreprocessArguments) -> None:
        """Enqueue the batch on the stream (a CUstream as int): no allocation, no waiting."""
        parameters = arguments.parameters()
        # The driver copies the parameters before it returns: nothing has to outlive the call.
        table = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        for function, grid, block, shared_bytes in arguments.launches():
            shape = (*grid, 1, block, 1, 1, shared_bytes)
            result = self._launch(
                self._functions[function], *shape, stream, ctypes.addressof(table), 0
            )
            _cuda.check(result, f"launch of {function}")


def shipped_options() -> list[tuple[str, ...]]:
    """The compiler options that a wheel should hold machine code for: one variant serves all."""
    return [()]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""The reverse-sampling loop in one persistent kernel: packed memory layout and NumPy twin.

Axes: B image, K sample of an image, R = B K rows (row b K + k), H hidden width, Hp = H padded with
zeros, S step, N noise trajectory (1 for all images, or B). With a(v) = LeakyReLU(v), p = 0 and
g_previous = 0, both [B, K, H]:

    for i in 0 .. S-1:
        h1 = a(p + q + bias[i])                     q [B, H], bias [S, N, K, H]
        h2 = a(W2 h1 + b2)                          layer "hidden2"
        h3 = a(W3 h2 + b3)                          layer "hidden3"
        if i == S-1: return h3                      [B, K, H]
        g = M h3                                    layer "carry"
        p, g_previous = A[i] p + B[i] g + C[i] g_previous, g

The operands of the products (matrices, h1, h2, h3) are rounded to fp16 or bf16, to nearest
with ties to even. Everything else is float32: accumulation, biases, activations before they are
rounded, p, g, g_previous and the h3 that is returned.

Who owns what
-------------
CTA c stands for features 8c .. 8c+7 of every layer. A block computes one, two or four CTAs. Two are
the m = 16 rows of `mma.sync.m16n8k16` (n: 8 rows of activations; k: 16 input features); with one,
the upper half of m is zero. The 8 warps of a block split the input features in order, Hp / 8
each, and every warp takes its part in groups of 32, which is two mma. So Hp is a multiple of
8 warps * 32 = 256, and H is padded with zeros up to the next one. The blocks wait for each other,
so all must be on the GPU at once: whoever launches must check that. Each thread keeps its share of
all three matrices of a CTA in 12 (Hp / 256) registers: 48 at Hp = 1024.

Rows may be divided among several groups of blocks, each of them all Hp / 8 CTAs, with a counter of
its own. Groups know nothing of each other.

Weights
-------
uint16 bits [layer 3][CTA c][warp w][group s][lane 32][half j 8], little-endian, with G = Hp / 256
groups a warp. Layers in the order of LAYERS; matrices are [out, in], as torch.nn.Linear has them.

    packed[l, c, w, s, lane, j] = matrix_l[8 c + lane // 4, 32 (w G + s) + 8 (lane % 4) + j]

A thread reads its 8 halves with one 16-byte load, and the 32 loads of a warp are 512 contiguous
bytes. Halves (0, 1), (2, 3), (4, 5), (6, 7) are the load's 32-bit words x, y, z, w, the lower index
in the lower 16 bits.

Order of the input features. By PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
type", lane = 4 g + t holds of B the elements i = 0 .. 3 at column n = g and row
2 t + i % 2 + 8 (i // 2), and of A, in its registers 0 .. 3, two neighbouring elements each of
(row g, column 2 t), (row g + 8, column 2 t), (row g, column 2 t + 8), (row g + 8, column 2 t + 8).
Here element i of mma m of group s is input feature 32 (w G + s) + 8 t + 4 m + i, so one mma takes
its 16 features in another order than they have in memory. A sum has no order, so the product is
right as long as A and B have the same one. They have: a lane has the words x, y, z, w of CTA c and
X, Y, Z, W of CTA c + 1, and reads the 16 bytes x, y, z, w of row g of the activations at feature
32 (w G + s) + 8 t. mma 0 is A = (x, X, y, Y), B = (x, y); mma 1 is A = (z, Z, w, W), B = (z, w).

Order of additions. A warp has two float32 accumulators: mma 0 of its groups s = 0 .. G-1, and mma 1
of them. Their sum is the warp's, and the warps' are added in order 0 .. 7; then the bias.

Buffers
-------
All C-contiguous, in the order of the kernel's arguments; POINTERS has the alignments.

    weights        uint16  [3, Hp / 8, 8, G, 32, 8]  pack
    biases         float32 [2, Hp]                   pack: b2, b3
    coefficients   float32 [S, 4]                    pack_tables: A, B, C, 0; row S-1 is not used
    bias           float32 [S, N, K, Hp]             pack_tables
    condition      float32 [B, Hp]                   pack_condition: q
    exchange       16 bit  [3, copies, R, Hp]        h1, h2, h3, each at most COPIES times
    counter        uint32, one a group, 128 bytes apart
    out            float32 [B, K, Hp]                h3 of the last step

Padding columns of every buffer are zero, and then all that the kernel computes there is zero (but
where a row is not finite): a padded loop gives bit for bit what one of width Hp with zeros gives. A
row of a product depends on that row of activations alone.

Exchange "counter": every block adds 1 to the counter of its group after it has published its part
of h1, h2, h3, and reads the others' when the counter has reached blocks times the exchanges so far.
The last h3 is not exchanged, so it ends at blocks (3 S - 1), which has to fit. One version of h1,
h2, h3 is enough: who may write h1 again has seen all of h3, so all have read h1. The counter is 0
before every launch; `exchange` need not be cleared.

Exchange "epoch": there is no counter. Activations 2 j and 2 j + 1 of a row are one 32-bit word,
whose lowest bit is the parity of the step, 1 in step 0, and readers wait for it. They take it as 0,
so the activation 2 j is rounded to one bit less. `exchange` is zero before every launch. fp16 only:
bf16 would be left with 6 bits behind the point.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Operand = Literal["fp16", "bf16"]
Layer = Literal["hidden2", "hidden3", "carry"]
Exchange = Literal["counter", "epoch"]

LAYERS: tuple[Layer, ...] = ("hidden2", "hidden3", "carry")

POINTERS = {
    "weights": 16,
    "biases": 16,
    "coefficients": 16,
    "bias": 16,
    "condition": 16,
    "exchange": 16,
    "counter": 128,
    "out": 16,
}
"""The kernel's buffers in the order of its arguments, each with the alignment of its address."""

COPIES = 2  # of the exchange buffer, at most
ROW_GROUPS = 16  # that divide the rows among them, at most

_LARGEST = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
_WARPS = 8  # of a CTA
_LANES = 32  # of a warp
_FEATURES = 8  # of a CTA: n of the mma
_TILE = 16  # rows that the twin takes at once
_GROUP = 32  # input features of two mma, k = 16 each
_HALVES = 8  # 16-bit values in 16 bytes
_COUNTER_BYTES = 128  # of a group: one line of the L2 cache, so that polling it delays nothing else


@dataclass(frozen=True)
class Layout:
    """Sizes of the packed loop; the module's docstring defines what is where."""

    hidden: int  # H, as the model has it
    padded: int  # Hp, the next multiple of 256
    dtype: Operand
    warps: int  # of a CTA
    ctas: int

    @property
    def threads(self) -> int:
        """Count the threads of a CTA."""
        return self.warps * _LANES

    @property
    def groups(self) -> int:
        """Groups of 32 input features in the part of one warp: G."""
        return self.padded // (self.warps * _GROUP)

    @property
    def weight_shape(self) -> tuple[int, int, int, int, int, int]:
        """Return the sizes of the axes [layer, CTA, warp, group, lane, half]."""
        return len(LAYERS), self.ctas, self.warps, self.groups, _LANES, _HALVES

    @property
    def weight_registers(self) -> int:
        """Count the 32-bit registers of a thread for its share of the matrices of one CTA."""
        return len(LAYERS) * self.groups * _HALVES // 2

    def offset(self, layer: int, cta: int, warp: int, group: int, lane: int, half: int) -> int:
        """Byte in the packed weights at which this value starts."""
        index = (layer, cta, warp, group, lane, half)
        return 2 * int(np.ravel_multi_index(index, self.weight_shape))

    def element(self, cta: int, warp: int, group: int, lane: int, half: int) -> tuple[int, int]:
        """Return (output feature, input feature) of the padded matrix that is kept there."""
        column = _GROUP * (warp * self.groups + group) + _HALVES * (lane % 4) + half
        return _FEATURES * cta + lane // 4, column

    def buffers(self, images: int, samples: int, noises: int, steps: int) -> dict[str, int]:
        """Bytes of every buffer of one launch, in the order of the kernel's arguments.

        Enough for every variant of the kernel.
        """
        sizes = {"images": images, "samples": samples, "noises": noises, "steps": steps}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        _check_noises(noises, images)
        most = (2**32 - 1) // self.ctas // len(LAYERS)
        if steps > most:
            raise ValueError(
                f"steps: got {steps}, expected at most {most}; the counter of exchanges has 32 bits"
            )
        rows = images * samples
        return {
            "weights": 2 * prod(self.weight_shape),
            "biases": 4 * 2 * self.padded,
            "coefficients": 4 * 4 * steps,
            "bias": 4 * steps * noises * samples * self.padded,
            "condition": 4 * images * self.padded,
            "exchange": 2 * len(LAYERS) * COPIES * rows * self.padded,
            "counter": ROW_GROUPS * _COUNTER_BYTES,
            "out": 4 * rows * self.padded,
        }

    def total_bytes(self, images: int, samples: int, noises: int, steps: int) -> int:
        """Count the bytes of all buffers of one launch."""
        return sum(self.buffers(images, samples, noises, steps).values())


@dataclass(frozen=True, eq=False)
class PackedLoop:
    """The weights of one loop as the kernel reads them."""

    layout: Layout
    weights: NDArray[np.uint16]  # layout.weight_shape
    biases: NDArray[np.float32]  # [2, Hp]: b2, b3

    def __post_init__(self) -> None:
        _check("weights", self.weights, np.uint16, self.layout.weight_shape, "pack makes them")
        _check("biases", self.biases, np.float32, (2, self.layout.padded), "pack makes them")


def layout(hidden: int, dtype: Operand = "fp16") -> Layout:
    """Return the layout for a loop of this hidden width H, with operands of this type."""
    if hidden < 1:
        raise ValueError(f"hidden: got {hidden}, expected at least 1; it is the width of h1")
    if dtype not in _LARGEST:
        raise ValueError(f"dtype: got {dtype!r}, expected 'fp16' or 'bf16'; choose one of them")
    padded = _round_up(hidden, _WARPS * _GROUP)
    return Layout(hidden, padded, dtype, warps=_WARPS, ctas=padded // _FEATURES)


def pack(
    hidden2: tuple[ArrayLike, ArrayLike],
    hidden3: tuple[ArrayLike, ArrayLike],
    carry: ArrayLike,
    dtype: Operand = "fp16",
) -> PackedLoop:
    """Pack (W2, b2), (W3, b3) and M into what the kernel reads. W2, W3, M [H, H]; b2, b3 [H].

    float32 is expected, and other types are converted to it first.
    """
    given = dict(zip(LAYERS, (hidden2[0], hidden3[0], carry), strict=True))
    matrices = {name: _float32(name, matrix) for name, matrix in given.items()}
    width = len(matrices["hidden2"]) if matrices["hidden2"].ndim else 0
    plan = layout(width, dtype)
    weights = np.empty(plan.weight_shape, np.uint16)
    for index, (name, matrix) in enumerate(matrices.items()):
        _check_shape(name, matrix, (width, width), "the loop has three square matrices of one size")
        _check_range(name, matrix, dtype)
        weights[index] = _fragments(plan, to_bits(matrix, dtype))
    biases = np.zeros((2, plan.padded), np.float32)
    for index, (name, (_, bias)) in enumerate((("hidden2", hidden2), ("hidden3", hidden3))):
        values = _float32(f"{name} bias", bias)
        _check_shape(f"{name} bias", values, (width,), "its matrix has one row a value")
        biases[index, :width] = values
    return PackedLoop(plan, weights, biases)


def unpack(packed: PackedLoop) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (matrices [3, H, H] as rounded, in the order of LAYERS; biases [2, H])."""
    plan = packed.layout
    lanes = (3, plan.ctas, plan.warps, plan.groups, _FEATURES, 4, _HALVES)  # lane = 4 g + t
    rows = packed.weights.reshape(lanes).transpose(0, 1, 4, 2, 3, 5, 6)
    matrices = from_bits(rows.reshape(3, plan.padded, plan.padded), plan.dtype)
    width = plan.hidden
    return matrices[:, :width, :width].copy(), packed.biases[:, :width].copy()


def pack_tables(
    coefficients: ArrayLike, bias: ArrayLike
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coefficients (A, B, C) [S, 3] and bias [S, N, K, H] -> [S, 4] and [S, N, K, Hp]."""
    table, rows = _float32("coefficients", coefficients), _float32("bias", bias)
    if rows.ndim != 4 or not rows.size:
        raise ValueError(
            f"bias: got shape {rows.shape}, expected [steps, noises, samples, hidden], none of them"
            " 0; with one noise trajectory for all images, noises is 1"
        )
    _check_shape("coefficients", table, (len(rows), 3), "bias has one row for each of them")
    return _pad(table, 4), _pad(rows, layout(rows.shape[-1]).padded)


def pack_condition(q: ArrayLike) -> NDArray[np.float32]:
    """Pad q [B, H] to [B, Hp]."""
    rows = _float32("q", q)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"q: got shape {rows.shape}, expected [images, hidden], none of them 0; it has one row "
            "an image, not a sample"
        )
    return _pad(rows, layout(rows.shape[-1]).padded)


def reverse_sampler_reference(
    packed: PackedLoop,
    q: NDArray[np.float32],
    coefficients: NDArray[np.float32],
    bias: NDArray[np.float32],
    slope: float = 0.01,
    *,
    exchange: Exchange = "counter",
) -> NDArray[np.float32]:
    """Compute h3 of the last step [B, K, H], from the packed arrays: q [B, Hp], [S, 4],
    [S, N, K, Hp].

    Differs from the kernel where additions are not defined to the bit: see layer_reference.
    Activations beyond the type's range become inf.
    """
    _check_loop(packed.layout, q, coefficients, bias)
    state = np.zeros((len(q), bias.shape[2], packed.layout.padded), np.float32)
    previous = np.zeros_like(state)
    # As in the kernel, overflow is no error, but shows in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (a, b, c, _) in enumerate(coefficients[:-1]):
            h3 = _last_hidden(packed, state, q, bias[i], slope, exchange)
            update = layer_reference(packed, "carry", h3, exchange=exchange)
            state = a * state + b * update + c * previous
            previous = update
        h3 = _last_hidden(packed, state, q, bias[-1], slope, exchange)
    return h3[..., : packed.layout.hidden]


def layer_reference(
    packed: PackedLoop,
    layer: Layer,
    activations: NDArray[np.float32],
    slope: float = 0.01,
    *,
    exchange: Exchange = "counter",
) -> NDArray[np.float32]:
    """One layer's output [..., Hp], before it is rounded, from its input [..., Hp], which is.

    "hidden2" is a(W2 h1 + b2), "hidden3" a(W3 h2 + b3), and "carry" M h3. The order of additions is
    the kernel's, but one mma adds its 16 products and its accumulator without error and rounds
    once: PTX ISA leaves open how it does. No value depends on the number of rows.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer: got {layer!r}, expected one of {', '.join(LAYERS)}; choose one")
    plan = packed.layout
    index = LAYERS.index(layer)
    hint = "pad with zero columns, as pack_condition does"
    _check("activations", activations, np.float32, (*activations.shape[:-1], plan.padded), hint)
    with np.errstate(over="ignore", invalid="ignore"):
        result = _product(plan, packed.weights[index], activations, exchange)
        return result if layer == "carry" else _leaky(result + packed.biases[index], slope)


def to_bits(values: NDArray[np.float32], dtype: Operand) -> NDArray[np.uint16]:
    """Round float32 to bits of fp16 or bf16, ties to even; beyond the range is inf."""
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    # bfloat16 is the upper half of a float32. Adding just under half of its last place, and one
    # more where its last bit is set, carries into the upper half exactly when it rounds up.
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bits(bits: NDArray[np.uint16], dtype: Operand) -> NDArray[np.float32]:
    """Bits of fp16 or bf16 -> float32, exactly."""
    if dtype == "fp16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fragments(plan: Layout, bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Map a matrix [H, H] to [CTA, warp, group, lane, half], padded."""
    matrix = np.zeros((plan.padded, plan.padded), np.uint16)
    matrix[: len(bits), : bits.shape[1]] = bits
    # Row 8 c + g; column 32 (w G + s) + 8 t + j.
    parts = matrix.reshape(plan.ctas, _FEATURES, plan.warps, -1, 4, _HALVES)
    return parts.transpose(0, 2, 3, 1, 4, 5).reshape(plan.ctas, plan.warps, -1, _LANES, _HALVES)


def _weight_columns(plan: Layout, weights: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Packed weights of one layer -> [group, product 16, warp, mma 2, 1, feature Hp]."""
    # The axes of the packed array, with lane = 4 g + t and half = 4 mma + i.
    shape = (plan.ctas, plan.warps, -1, _FEATURES, 4, 2, 4)
    parts = from_bits(weights, plan.dtype).astype(np.float64).reshape(shape)
    order = parts.transpose(2, 6, 4, 1, 5, 0, 3)  # group, i, t, warp, mma, CTA, g
    return order.reshape(-1, 16, plan.warps, 2, 1, plan.padded)


def _row_columns(plan: Layout, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded activations [R, Hp] -> [group, product 16, warp, mma 2, R, 1]."""
    parts = rows.astype(np.float64).reshape(len(rows), plan.warps, -1, 4, 2, 4)
    order = parts.transpose(2, 5, 3, 1, 4, 0)  # group, i, t, warp, mma, row
    return order.reshape(-1, 16, plan.warps, 2, len(rows), 1)


def _product(
    plan: Layout,
    packed: NDArray[np.uint16],
    activations: NDArray[np.float32],
    exchange: Exchange,
) -> NDArray[np.float32]:
    """A packed matrix times activations [..., in] before they are rounded: [..., Hp]."""
    rows = _exchanged(activations, plan.dtype, exchange).reshape(-1, activations.shape[-1])
    weights = _weight_columns(plan, packed)
    tiles = [
        _tile_product(plan, rows[start : start + _TILE], weights)
        for start in range(0, len(rows), _TILE)
    ]
    return np.concatenate(tiles).reshape(*activations.shape[:-1], plan.padded)


def _tile_product(
    plan: Layout, rows: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Rounded activations [R, in] times _weight_columns -> [R, Hp], in the kernel's order."""
    columns = _row_columns(plan, rows)
    sums = np.zeros((plan.warps, 2, len(rows), plan.padded), np.float32)
    for group in range(len(weights)):
        exact = sums.astype(np.float64)
        # Not matmul: its order of additions, and so its last bits, depend on the number of rows.
        for product in range(16):
            exact += columns[group, product] * weights[group, product]
        sums = exact.astype(np.float32)
    total = np.zeros((len(rows), plan.padded), np.float32)
    for first, second in sums:  # of one warp
        total += first + second
    return total


def _last_hidden(
    packed: PackedLoop,
    state: NDArray[np.float32],
    q: NDArray[np.float32],
    bias: NDArray[np.float32],
    slope: float,
    exchange: Exchange,
) -> NDArray[np.float32]:
    """Compute h3 [B, K, Hp] of one step, from state [B, K, Hp], q [B, Hp] and bias [N, K, Hp]."""
    h1 = _leaky(state + q[:, None] + bias, slope)
    h2 = layer_reference(packed, "hidden2", h1, slope, exchange=exchange)
    return layer_reference(packed, "hidden3", h2, slope, exchange=exchange)


def _leaky(values: NDArray[np.float32], slope: float) -> NDArray[np.float32]:
    return np.where(values > 0, values, np.float32(slope) * values)


def _rounded(values: NDArray[np.float32], dtype: Operand) -> NDArray[np.float32]:
    return from_bits(to_bits(values, dtype), dtype)


def _exchanged(
    values: NDArray[np.float32], dtype: Operand, exchange: Exchange
) -> NDArray[np.float32]:
    """Return values [..., even] as other blocks read them: rounded, and the even columns once more
    for "epoch".
    """
    if exchange not in ("counter", "epoch"):
        raise ValueError(f"exchange: got {exchange!r}, expected 'counter' or 'epoch'")
    if exchange == "epoch" and dtype != "fp16":
        raise ValueError(f"exchange: got 'epoch' for {dtype}, expected fp16; use 'counter'")
    bits = to_bits(values, dtype)
    if exchange == "epoch":
        even = bits[..., ::2]
        number = (even & np.uint16(0x7FFF)) <= 0x7C00
        even += np.where(number, even & (even >> np.uint16(1)) & np.uint16(1), np.uint16(0))
        even &= np.uint16(0xFFFE)
    return from_bits(bits, dtype)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Zero columns up to this width; always a C-contiguous copy."""
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded


def _float32(name: str, values: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(values)
    if not np.isfinite(array).all():
        bad = array[~np.isfinite(array)][0]
        raise ValueError(f"{name}: got {bad}, expected finite values; check the checkpoint")
    with np.errstate(over="ignore"):
        converted = array.astype(np.float32)
    if not np.isfinite(converted).all():
        raise ValueError(
            f"{name}: got a value of size {np.abs(array).max():g}, expected at most "
            f"{np.finfo(np.float32).max:g}; scale it down, float32 cannot hold it"
        )
    return converted


def _check_range(name: str, matrix: NDArray[np.float32], dtype: Operand) -> None:
    if np.isfinite(_rounded(matrix, dtype)).all():
        return
    advice = "use dtype='bf16' or scale it down" if dtype == "fp16" else "scale it down"
    raise ValueError(
        f"{name}: got a weight of size {np.abs(matrix).max():g}, expected at most "
        f"{_LARGEST[dtype]:g}, the largest {dtype}; {advice}"
    )


def _check_loop(plan: Layout, q: Any, coefficients: Any, bias: Any) -> None:
    """The packed inputs of a loop: float32 [B, Hp], [S, 4] and [S, N, K, Hp]."""
    if q.ndim != 2 or bias.ndim != 4 or not q.size or not bias.size:
        raise ValueError(
            f"q and bias: got shapes {q.shape} and {bias.shape}, expected [images, padded] and "
            "[steps, noises, samples, padded], none of them 0; use pack_condition and pack_tables"
        )
    _check("q", q, np.float32, (len(q), plan.padded), "use pack_condition")
    _check("coefficients", coefficients, np.float32, (len(bias), 4), "use pack_tables")
    _check("bias", bias, np.float32, (*bias.shape[:3], plan.padded), "use pack_tables")
    _check_noises(bias.shape[1], len(q))


def _check_noises(noises: int, images: int) -> None:
    if noises not in (1, images):
        raise ValueError(
            f"noises: got {noises} for {images} images, expected 1 or {images}; give one noise "
            "trajectory for all images, or one for each"
        )


def _check(
    name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...], advice: str
) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{name}: got {array.dtype}, expected {np.dtype(dtype)}; {advice}")
    _check_shape(name, array, shape, advice)


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...], advice: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}; {advice}")

"""The head behind the persistent loop in one kernel, and the condition before it: packing and twin.

Axes: B image, K sample of an image, R = B K rows (row b K + k), D_v width of the image features,
D of the aligned ones, D_s of the semantic ones, H hidden width, Hp = H padded as in
reverse_sampler, D_f of the fused features, C classes.

    aligned = LeakyReLU(Wp x_v + bp)      [B, D]       x_v [B, D_v]
    x_CDR   = W4 h3 + b4                  [B, K, D_s]  h3 [B, K, Hp], what the loop returns
    fused   = FUSION(aligned, x_CDR)      [B, K, D_f]  FUSIONS; D_f = D + D_s for concat, else D
    logits  = Wc fused + bc               [B, K, C]
    q       = Wq ((x_v - mean) / std)     [B, Hp]      the loop's condition, a launch of its own

Matrices are rounded to fp16 or bf16. All else is float32: inputs, products, sums and outputs. So
nothing but the weights is rounded, and features beyond the range of fp16 stay what they are.

Both kernels are made for few rows, where launches cost and not bytes: they read each weight from
memory once and multiply without tensor cores. Beyond MOST_ROWS they are refused, because matrix
products on tensor cores are the better ones there. That number is an estimate, to be confirmed by
measurement.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marnet_kernels import _cuda
from marnet_kernels.compile import Cubin, arch_for, compile_cubin
from marnet_kernels.loader import DeviceInfo, current_device, load_function
from marnet_kernels.reverse_sampler import (
    Operand,
    _check_range,
    _check_shape,
    _float32,
    from_bits,
    layout,
    to_bits,
)
from marnet_kernels.source import source

FUSIONS = ("concat", "add", "mul", "sum", "hm")
"""In the order of their numbers in the kernel."""

MOST_ROWS = 16

POINTERS = ("weights", "biases", "vision", "hidden", "counter", "logits", "fused")
"""The buffers of fuse_head in the order of its arguments. Addresses are multiples of 16."""

CONDITION_POINTERS = ("weights", "biases", "vision", "condition")
"""The same for the condition."""

_ROWS = (1, 4)  # that a compiled variant takes at once
_THREADS = 256  # of a block, as in csrc/fuse_head.cu
_WARPS = _THREADS // 32
_COUNTER_BYTES = 128  # one line of the L2 cache


@dataclass(frozen=True)
class HeadLayout:
    """Sizes of a head. All rows of its matrices are padded with zeros to a multiple of 8 values.

    Raises:
        ValueError: a size below 1, an unknown fusion, or widths that it cannot combine.
    """

    vision: int  # D_v
    aligned: int  # D
    semantic: int  # D_s
    hidden: int  # H
    classes: int
    fusion: str
    dtype: Operand = "fp16"

    def __post_init__(self) -> None:
        for name in ("vision", "aligned", "semantic", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.fusion not in FUSIONS:
            raise ValueError(
                f"fusion: got {self.fusion!r}, expected one of {', '.join(FUSIONS)}; choose one"
            )
        if self.fusion != "concat" and self.aligned != self.semantic:
            raise ValueError(
                f"aligned, semantic: got {self.aligned} and {self.semantic}, expected equal widths "
                f"for fusion {self.fusion!r}; use concat"
            )
        layout(self.hidden, self.dtype)  # which checks both
        if max(columns * rows for rows, columns in self.shapes) >= 2**30:
            raise ValueError(
                f"sizes: got matrices of {self.shapes}, expected less than 2**30 values in each; "
                "use the operators"
            )

    @property
    def padded(self) -> int:
        """Hp."""
        return layout(self.hidden, self.dtype).padded

    @property
    def fused(self) -> int:
        """D_f."""
        return self.aligned + self.semantic if self.fusion == "concat" else self.aligned

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """[out, in] of Wp, W4 and Wc as they are packed."""
        return (
            (self.aligned, _round_up(self.vision)),
            (self.semantic, self.padded),
            (self.classes, _round_up(self.fused)),
        )

    def buffers(self, images: int, samples: int) -> dict[str, int]:
        """Bytes of each of POINTERS for one launch."""
        rows = images * samples
        return {
            "weights": 2 * sum(a * b for a, b in self.shapes),
            "biases": 4 * sum(a for a, _ in self.shapes),
            "vision": 4 * images * self.vision,
            "hidden": 4 * rows * self.padded,
            "counter": _COUNTER_BYTES,
            "logits": 4 * rows * self.classes,
            "fused": 4 * rows * self.fused,
        }


@dataclass(frozen=True)
class ConditionLayout:
    """Sizes of the layer that makes the loop's condition."""

    vision: int  # D_v
    hidden: int  # H
    dtype: Operand = "fp16"

    def __post_init__(self) -> None:
        if self.vision < 1:
            raise ValueError(f"vision: got {self.vision}, expected at least 1")
        layout(self.hidden, self.dtype)  # which checks both
        rows, columns = self.shape
        if rows * columns >= 2**30:
            raise ValueError(
                f"sizes: got a matrix of {self.shape}, expected less than 2**30 values; use the "
                "operators"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix as it is packed: [Hp, D_v up to a multiple of 8]."""
        return layout(self.hidden, self.dtype).padded, _round_up(self.vision)

    def buffers(self, images: int) -> dict[str, int]:
        """Bytes of each of CONDITION_POINTERS for one launch."""
        padded, columns = self.shape
        return {
            "weights": 2 * padded * columns,
            "biases": 4 * padded,
            "vision": 4 * images * self.vision,
            "condition": 4 * images * padded,
        }


@dataclass(frozen=True, eq=False)
class PackedHead:
    """The weights of one head as the kernel reads them; `pack_head` makes them."""

    layout: HeadLayout
    weights: NDArray[np.uint16]  # Wp, W4, Wc, one after another
    biases: NDArray[np.float32]  # bp, b4, bc, one after another


@dataclass(frozen=True, eq=False)
class PackedCondition:
    """The weights of the condition as the kernel reads them; `pack_condition_layer` makes them."""

    layout: ConditionLayout
    weights: NDArray[np.uint16]  # layout.shape
    biases: NDArray[np.float32]  # [Hp]


def pack_head(
    project: tuple[ArrayLike, ArrayLike],
    output: tuple[ArrayLike, ArrayLike],
    classifier: tuple[ArrayLike, ArrayLike],
    fusion: str,
    dtype: Operand = "fp16",
) -> PackedHead:
    """(Wp, bp), (W4, b4), (Wc, bc) -> what the kernel reads; matrices [out, in], as torch has them.

    Raises:
        ValueError: shapes that do not fit each other, or values that the type cannot hold.
    """
    given = {"project": project, "output": output, "classifier": classifier}
    matrices = {name: _matrix(name, pair[0]) for name, pair in given.items()}
    (aligned, vision), (semantic, hidden), (classes, fused) = (m.shape for m in matrices.values())
    plan = HeadLayout(vision, aligned, semantic, hidden, classes, fusion, dtype)
    if fused != plan.fused:
        raise ValueError(
            f"classifier: got {fused} inputs, expected {plan.fused} for fusion {fusion!r} of "
            f"{aligned} and {semantic} features; check which fusion the model has"
        )
    weights, biases = [], []
    for (name, matrix), shape in zip(matrices.items(), plan.shapes, strict=True):
        bias = _float32(f"{name} bias", given[name][1])
        _check_shape(f"{name} bias", bias, (shape[0],), "its matrix has one row a value")
        weights.append(_pad(name, matrix, shape, dtype).reshape(-1))
        biases.append(bias)
    return PackedHead(plan, np.concatenate(weights), np.concatenate(biases))


def pack_condition_layer(
    weight: ArrayLike, mean: ArrayLike, std: ArrayLike, dtype: Operand = "fp16"
) -> PackedCondition:
    """Wq [H, D_v] and the statistics of x_v [D_v] -> one layer, folded in float64.

    The bias is made of the rounded weights, so that at x_v = mean it cancels what they give: the
    error of a rounded weight is then multiplied with (x_v - mean), not with x_v.

    Raises:
        ValueError: other shapes, std not positive, or a weight / std that the type cannot hold.
    """
    matrix = np.asarray(_matrix("weight", weight), np.float64)
    hidden, vision = matrix.shape
    statistics = {"mean": np.asarray(mean, np.float64), "std": np.asarray(std, np.float64)}
    for name, values in statistics.items():
        _check_shape(name, values, (vision,), "it has one value for each column of weight")
    if not np.isfinite(statistics["mean"]).all() or not (statistics["std"] > 0).all():
        raise ValueError(
            "mean, std: got a value that is not finite, or a std that is not positive; expected the"
            " statistics of the training features; check the checkpoint"
        )
    folded = _float32("weight / std", matrix / statistics["std"])
    plan = ConditionLayout(vision, hidden, dtype)
    weights = _pad("weight / std", folded, plan.shape, dtype)
    rounded = from_bits(weights, dtype)[:, :vision].astype(np.float64)
    return PackedCondition(plan, weights, _float32("bias", -rounded @ statistics["mean"]))


def head_reference(
    packed: PackedHead, x_v: NDArray[Any], h3: NDArray[Any], slope: float = 0.01
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(logits [B, K, C], fused [B, K, D_f]) in float64, of x_v [B, D_v] and h3 [B, K, Hp]."""
    plan = packed.layout
    widths = (plan.vision, plan.padded, plan.fused)
    ends = np.cumsum([a * b for a, b in plan.shapes])[:-1]
    project, output, classifier = (
        from_bits(part, plan.dtype).astype(np.float64).reshape(shape)[:, :width]
        for part, shape, width in zip(
            np.split(packed.weights, ends), plan.shapes, widths, strict=True
        )
    )
    biases = np.split(packed.biases.astype(np.float64), np.cumsum([plan.aligned, plan.semantic]))
    with np.errstate(invalid="ignore"):
        aligned = x_v.astype(np.float64) @ project.T + biases[0]
        aligned = np.where(aligned > 0, aligned, slope * aligned)[:, None]
        refined = h3.astype(np.float64) @ output.T + biases[1]
        each = np.repeat(aligned, h3.shape[1], axis=1)
        fused = fuse_reference(plan.fusion, each, refined)
        return fused @ classifier.T + biases[2], fused


def fuse_reference(
    fusion: str, a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The operators of MARNet eq. (24), finite wherever their inputs are."""
    if fusion == "concat":
        return np.concatenate([a, b], axis=-1)
    if fusion == "add":
        return a + b
    if fusion == "mul":
        return a * b
    if fusion == "sum":
        return _log_sigmoid(a + b)
    log_h = _log_sigmoid(a) + _log_sigmoid(b)
    return log_h - np.log1p(np.exp(log_h))


def condition_reference(packed: PackedCondition, x_v: NDArray[Any]) -> NDArray[np.float64]:
    """q [B, Hp] in float64, of x_v [B, D_v]."""
    plan = packed.layout
    weights = from_bits(packed.weights, plan.dtype)[:, : plan.vision].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return x_v.astype(np.float64) @ weights.T + packed.biases


@dataclass(frozen=True)
class HeadVariant:
    """One compilation of csrc/fuse_head.cu."""

    rows: int  # that a warp takes at once, 1 or 4; a speed, no limit
    dtype: Operand

    def options(self) -> tuple[str, ...]:
        """For compile_cubin."""
        return f"-DROWS={self.rows}", f"-DOPERAND={self.dtype}"


def choose_head_variant(
    dtype: Operand, images: int, samples: int, device: DeviceInfo
) -> HeadVariant:
    """The variant for this batch on this GPU.

    Raises:
        ValueError: more rows than MOST_ROWS, or a GPU that cannot run it; the reason in words.
    """
    rows = images * samples
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(
            f"rows: got {images} images of {samples} samples, expected 1 to {MOST_ROWS} rows; for "
            "more, matrix products on tensor cores are made: use the engines or operators"
        )
    arch_for(device.capability)
    if not device.cooperative:
        raise ValueError(
            "device: got a GPU without cooperative launches, expected one with them; use the "
            "engines or operators"
        )
    return HeadVariant(_ROWS[0] if rows == 1 else _ROWS[1], dtype)


def shipped_options() -> list[tuple[str, ...]]:
    """The compiler options that a wheel should hold machine code for."""
    dtypes: tuple[Operand, Operand] = ("fp16", "bf16")
    return [HeadVariant(rows, dtype).options() for dtype in dtypes for rows in _ROWS]


@dataclass(frozen=True, kw_only=True)
class FuseHeadArguments:
    """Sizes and device addresses of one launch, checked when built; layout.buffers has the bytes.

    All arrays are C-contiguous. The launch sets the counter to 0 itself.
    """

    layout: HeadLayout
    images: int
    samples: int
    weights: int  # PackedHead.weights
    biases: int  # PackedHead.biases
    vision: int  # x_v [B, D_v] float32
    hidden: int  # h3 [B, K, Hp] float32, whose padding is finite
    counter: int
    logits: int  # [B, K, C] float32
    fused: int  # [B, K, D_f] float32
    slope: float = 0.01  # of LeakyReLU below zero

    def __post_init__(self) -> None:
        _check_rows(self.images, self.samples)
        for name in POINTERS:
            _check_address(name, getattr(self, name), 128 if name == "counter" else 16)

    def parameters(self) -> ctypes.Structure:
        """What the kernel takes."""
        plan = self.layout
        addresses = (getattr(self, name) for name in POINTERS)
        widths = plan.vision, plan.padded, plan.aligned, plan.semantic, plan.classes
        fusion = FUSIONS.index(plan.fusion)
        return _Parameters(*addresses, self.images, self.samples, *widths, fusion, self.slope)

    def blocks(self, multiprocessors: int) -> int:
        """One a multiprocessor at most, as they wait for each other; fewer where work runs out."""
        plan = self.layout
        logits = self.images * self.samples * plan.classes
        warps = max(plan.aligned, plan.semantic, logits)
        return min(multiprocessors, -(-warps // _WARPS))


@dataclass(frozen=True, kw_only=True)
class ConditionArguments:
    """The same for the condition."""

    layout: ConditionLayout
    images: int
    weights: int  # PackedCondition.weights
    biases: int  # PackedCondition.biases
    vision: int  # x_v [B, D_v] float32
    condition: int  # q [B, Hp] float32

    def __post_init__(self) -> None:
        _check_rows(self.images, 1)
        for name in CONDITION_POINTERS:
            _check_address(name, getattr(self, name), 16)

    def parameters(self) -> ctypes.Structure:
        """What the kernel takes."""
        addresses = (getattr(self, name) for name in CONDITION_POINTERS)
        return _ConditionParameters(
            *addresses, self.images, self.layout.vision, self.layout.shape[0]
        )

    def blocks(self) -> int:
        """A warp makes one value of q for all images."""
        return self.layout.shape[0] // _WARPS


class _Parameters(ctypes.Structure):
    """`struct Arguments` of csrc/fuse_head.cu, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int32) for name in ("images", "samples", "vision_width")),
        *((name, ctypes.c_int32) for name in ("hidden_width", "aligned_width", "semantic_width")),
        *((name, ctypes.c_int32) for name in ("classes", "fusion")),
        ("slope", ctypes.c_float),
    )


class _ConditionParameters(ctypes.Structure):
    """`struct ConditionArguments`, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in CONDITION_POINTERS),
        *((name, ctypes.c_int32) for name in ("images", "vision_width", "hidden_width")),
    )


class FuseHead:
    """Both kernels, loaded into the CUDA context that is current now, as long as that lives."""

    cubin: Cubin

    def __init__(self, variant: HeadVariant) -> None:
        device = current_device()
        self.variant, self._multiprocessors = variant, device.multiprocessors
        arch = arch_for(device.capability)
        self.cubin = compile_cubin(source("fuse_head"), arch, variant.options())
        self._fuse_head = load_function(self.cubin, "fuse_head")
        self._condition = load_function(self.cubin, "condition")
        self._driver: Any = _cuda.load("driver")

    def launch(self, stream: int, arguments: FuseHeadArguments) -> None:
        """Enqueue the head on the stream (a CUstream as int); can be captured."""
        self._check(arguments.layout.dtype)
        driver = self._driver
        cleared = driver.cuMemsetD32Async(arguments.counter, 0, 1, stream)
        _cuda.check(cleared, "clearing the counter of fuse_head")
        parameters = arguments.parameters()
        # The driver copies the parameters before it returns: nothing has to outlive the call.
        table = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        shape = (arguments.blocks(self._multiprocessors), 1, 1, _THREADS, 1, 1, 0)
        result = driver.cuLaunchCooperativeKernel(
            self._fuse_head, *shape, stream, ctypes.addressof(table)
        )
        _cuda.check(result, "launch of fuse_head")

    def launch_condition(self, stream: int, arguments: ConditionArguments) -> None:
        """Enqueue the condition on the stream; can be captured."""
        self._check(arguments.layout.dtype)
        parameters = arguments.parameters()
        table = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        shape = (arguments.blocks(), 1, 1, _THREADS, 1, 1, 0)
        result = self._driver.cuLaunchKernel(
            self._condition, *shape, stream, ctypes.addressof(table), 0
        )
        _cuda.check(result, "launch of condition")

    def _check(self, dtype: Operand) -> None:
        if dtype != self.variant.dtype:
            raise ValueError(
                f"arguments: got weights in {dtype}, expected {self.variant.dtype}, which this "
                "kernel was made for; choose_head_variant makes the variant for a layout's dtype"
            )


def _check_rows(images: int, samples: int) -> None:
    if images < 1 or samples < 1 or images * samples > MOST_ROWS:
        raise ValueError(
            f"images, samples: got {images} and {samples}, expected at least 1 each and at most "
            f"{MOST_ROWS} rows; use the engines or operators for more"
        )


def _check_address(name: str, address: int, alignment: int) -> None:
    if address <= 0 or address % alignment:
        raise ValueError(
            f"{name}: got address {address:#x}, expected a multiple of {alignment} that is not 0; "
            "pass the start of an allocation"
        )


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float32]:
    matrix = _float32(name, values)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(
            f"{name}: got shape {matrix.shape}, expected [out, in], none of them 0; it is the "
            "weight of a linear layer"
        )
    return matrix


def _pad(
    name: str, matrix: NDArray[np.float32], shape: tuple[int, int], dtype: Operand
) -> NDArray[np.uint16]:
    """Bits of the matrix with zeros up to this shape."""
    _check_range(name, matrix, dtype)
    padded = np.zeros(shape, np.uint16)
    padded[: matrix.shape[0], : matrix.shape[1]] = to_bits(matrix, dtype)
    return padded


def _log_sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def _round_up(value: int, multiple: int = 8) -> int:
    return -(-value // multiple) * multiple

"""The reverse-sampling loop on CPU cores in one call: layers, their packed layout, and the run.

Axes: B image, K sample of an image, R = B K rows (row b K + k), D_v width of the condition, H
hidden width, W width of the carried state p (H, or D), D width of the estimate, S step, N noise
trajectory (1 for all images, or B), O and I outputs and inputs of a layer. With
a(v) = LeakyReLU(v) and p and g_previous = 0, [R, W]:

    q = C ((x_v - mean) / std)                      layer "condition"
    for i in 0 .. S-1:
        h1 = a(p + q + bias[i])                     p carried as Wx p, or with p = V p
        h2 = a(W2 h1 + b2)                          layer "hidden2"    V: layer "input"
        h3 = a(W3 h2 + b3)                          layer "hidden3"
        if i == S-1: return W4 h3 + b4              layer "output"
        g = M h3                                    layer "carry"
        p, g_previous = (A[i] p + B[i] g) + C[i] g_previous, g

Every layer has weights of a type of its own. Those in int8 are multiplied in int8: each row of the
input is put on 256 levels between its own least and largest value, 0 among them, with step =
(largest - least) / 255: `round(x / step) + zero` between 0 and 255, with ties to even. The sums are
exact, and times `scale * step` they are the product; the rest is float32. Layers in fp16, bf16 and
fp32 are multiplied in float32, input by input in order, with one rounding for each where the
processor can. So a row has the same bits in every batch and with any number of threads; but not
with every instruction set, unless all is int8.

Widths are padded with zeros to multiples of 64, and weights are packed by 64 outputs, which are
what one thread computes at least: int8 [O / 64][I / 4][64][4], the others [O / 64][I][64].
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from marnet_kernels.crowd import Crowd
from marnet_kernels.native.library import library

Floats = NDArray[np.float32]
Kind = Literal["fp32", "fp16", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "fp16", "bf16", "int8")

UNIT = 64
LEVELS = 256
LEAST_SPAN = np.float32(1e-30)  # of a row that has levels; a smaller one is nothing
MOST_INPUTS = (2**31 - 1) // (127 * (LEVELS - 1))  # of an int8 layer, whose sums have 32 bits
_TYPES = {"fp32": np.float32, "fp16": np.uint16, "bf16": np.uint16, "int8": np.int8}
_WORK = 2**18  # bytes of weights times rows that make a thread worth its meetings
_open: set[int] = set()  # loops that may have a call
_numbers = count()


@dataclass(frozen=True, eq=False)
class LoopLayer:
    """One matrix of the loop, and what it is multiplied with."""

    kind: Kind
    weight: NDArray  # [O, I]: float32; the bits of fp16 or bf16 as uint16; int8
    bias: Floats | None = None  # [O]
    scale: Floats | None = None  # [O], of the weights, of int8

    def __post_init__(self) -> None:
        weight = self.weight
        if self.kind not in KINDS or weight.ndim != 2 or weight.dtype != _TYPES[self.kind]:
            raise ValueError(
                f"weight: got {weight.dtype} of shape {weight.shape} for {self.kind!r}, expected a "
                f"matrix [outputs, inputs] of one of {', '.join(KINDS)}; 16 bits come as uint16"
            )
        wanted = {"bias": self.bias, "scale": self.scale if self.kind == "int8" else None}
        for name, array in wanted.items():
            if array is not None and array.shape != (len(weight),):
                raise ValueError(f"{name}: got {array.shape}, expected ({len(weight)},)")
        if self.kind == "int8" and self.scale is None:
            raise ValueError("scale: got None for 'int8', expected a scale for each output")
        if self.kind == "int8" and weight.shape[1] > MOST_INPUTS:
            raise ValueError(
                f"int8 layer: got {weight.shape[1]} inputs, expected at most {MOST_INPUTS}, or "
                "sums overflow; use 16 bits"
            )


@dataclass(frozen=True, eq=False)
class LoopLayers:
    """A whole loop; the formulas are in the module's docstring."""

    mean: Floats  # [D_v]
    std: Floats
    condition: LoopLayer  # [H, D_v]
    hidden2: LoopLayer  # [H, H]
    hidden3: LoopLayer
    carry: LoopLayer  # [W, H]
    output: LoopLayer  # [D, H]
    input: LoopLayer | None = None  # [H, W], where the state is carried as it is
    slope: float = 0.01

    def __post_init__(self) -> None:
        for name in ("condition", "output"):
            if getattr(self, name).kind == "int8":
                raise ValueError(f"{name}: got int8, expected a float type, as it reads floats")
        hidden, given = self.condition.weight.shape
        carried = len(self.carry.weight)
        shapes = {"hidden2": (hidden, hidden), "hidden3": (hidden, hidden)}
        shapes |= {"carry": (carried, hidden), "output": (len(self.output.weight), hidden)}
        if self.input is not None:
            shapes["input"] = (hidden, carried)
        elif carried != hidden:
            raise ValueError(
                f"carry: got {carried} outputs for {hidden} hidden ones and no layer 'input', "
                "expected as many, or that layer"
            )
        found = {name: layer.weight.shape for name, layer in self.layers()}
        for name, shape in shapes.items():
            if found[name] != shape:
                raise ValueError(f"{name}: got a matrix {found[name]}, expected {shape}")
        for name, array in (("mean", self.mean), ("std", self.std)):
            if array.shape != (given,):
                raise ValueError(f"{name}: got {array.shape}, expected ({given},)")

    def layers(self) -> Iterator[tuple[str, LoopLayer]]:
        """Yield (name, layer) of every layer that there is."""
        for field in fields(self):
            if isinstance(layer := getattr(self, field.name), LoopLayer):
                yield field.name, layer

    @property
    def step_bytes(self) -> int:
        """Count the bytes of weights that one step reads."""
        once = ("condition", "output")
        return sum(layer.weight.nbytes for name, layer in self.layers() if name not in once)


class NativeLoop:
    """A loop that is ready to run. May be called from several threads, which then take turns.

    The workers belong to the process. They start with the first call that wants them and end with
    the last loop that is closed or collected.
    """

    def __init__(
        self,
        layers: LoopLayers,
        threads: int = 1,
        instructions: str | None = None,
        lib: ctypes.CDLL | None = None,
    ) -> None:
        """Pack the weights.

        Args:
            threads: cores to use at most.
            instructions: one of `instruction_sets()`; None: the best.
            lib: the library, where it is not the usual one.

        Raises:
            RuntimeError: the library is not there, or not for this machine.
            ValueError: this processor does not have these instructions.
        """
        self._lib = library() if lib is None else lib
        sets = instruction_sets(self._lib)
        if instructions not in (None, *sets):
            raise ValueError(
                f"instructions: got {instructions!r}, expected one of {', '.join(sets)}; others "
                "do not run on this processor"
            )
        self.instructions = instructions or next(iter(sets))
        self._set = sets[self.instructions]
        self._layers, self.most_threads = layers, threads
        self._kept: list[NDArray] = []  # what the structure points to
        self._loop = _Loop(
            *(self._packed(getattr(layers, name)) for name in _ORDER),
            layers.slope,
            layers.input is not None,
        )
        number = next(_numbers)
        _open.add(number)
        self.close: Callable[[], object] = weakref.finalize(self, _close, self._lib, number)

    def threads(self, rows: int = 1) -> int:
        """Cores that a call with so many rows uses now."""
        most = max(1, self._layers.step_bytes * min(rows, 16) // _WORK)
        return max(1, min(self.most_threads, most))

    def __call__(self, x_v: Floats, coefficients: Floats, bias: Floats) -> Floats:
        """Map x_v [B, D_v], coefficients [S, 3] (A, B, C) and bias [S, N, K, H] to estimates
        [B, K, D].

        Raises:
            ValueError: arrays that do not fit the loop or each other.
            MemoryError: there is none for the activations.
        """
        layers = self._layers
        self._check(x_v, coefficients, bias)
        x = _padded((x_v - layers.mean) / layers.std)
        bias, table = _padded(bias), np.ascontiguousarray(coefficients, np.float32)
        images, (steps, noises, samples) = len(x), bias.shape[:3]
        out = np.empty((images, samples, self._loop.output.out), np.float32)
        arrays = (array.ctypes.data for array in (x, table, bias, out))
        call = _Call(*arrays, images, samples, noises, steps)
        threads = _crowd.most(self.threads(images * samples))
        used = self._lib.marnet_loop_run(
            ctypes.byref(self._loop), ctypes.byref(call), self._set, threads
        )
        if not used:
            raise MemoryError("no memory for the activations of the native loop")
        _crowd.learn(used, call.asleep)
        width = len(layers.output.weight)
        return out if out.shape[-1] == width else np.ascontiguousarray(out[..., :width])

    def _check(self, x_v: Any, coefficients: Any, bias: Any) -> None:
        hidden, given = self._layers.condition.weight.shape
        fits = (
            (x_v.ndim, coefficients.ndim, bias.ndim) == (2, 2, 4)
            and (x_v.shape[1], coefficients.shape[1], bias.shape[3]) == (given, 3, hidden)
            and len(coefficients) == len(bias) >= 1
            and bias.shape[1] in (1, len(x_v))
        )
        if not fits or not x_v.size or not bias.size:
            raise ValueError(
                f"x_v, coefficients, bias: got shapes {x_v.shape}, {coefficients.shape}, "
                f"{bias.shape}, expected [images, {given}], [steps, 3], "
                f"[steps, 1 or images, samples, {hidden}], none of them 0"
            )

    def _packed(self, layer: LoopLayer | None) -> _Layer:
        if layer is None:
            return _Layer()
        out, into = (_round_up(size) for size in layer.weight.shape)
        scale, sums = np.zeros(out, np.float32), np.zeros(out, np.int32)
        bias = np.zeros(out, np.float32)
        size = len(layer.weight)
        bias[:size] = 0 if layer.bias is None else layer.bias
        if layer.kind == "int8":
            scale[:size] = layer.scale
            sums[:size] = layer.weight.sum(axis=1, dtype=np.int32)
        arrays = [_aligned(array) for array in (pack(layer), bias, scale, sums)]
        self._kept += arrays
        addresses = (array.ctypes.data for array in arrays)
        kind = KINDS.index(layer.kind)
        return _Layer(*addresses, kind, into, out)


def pack(layer: LoopLayer) -> NDArray:
    """The weights as the kernel reads them: int8 [O / 64, I / 4, 64, 4], others [O / 64, I, 64]."""
    size, given = layer.weight.shape
    padded = np.zeros((_round_up(size), _round_up(given)), layer.weight.dtype)
    padded[:size, :given] = layer.weight
    together = 4 if layer.kind == "int8" else 1
    blocks = padded.reshape(-1, UNIT, padded.shape[1] // together, together)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3))


def instruction_sets(lib: ctypes.CDLL | None = None) -> dict[str, int]:
    """The variants that this processor runs, best first, each with its number in the library.

    Raises:
        RuntimeError: the library is not there.
    """
    lib = library() if lib is None else lib
    found, number = {}, 0
    while name := lib.marnet_loop_set(number):
        if lib.marnet_loop_has(number):
            found[name.decode()] = number
        number += 1
    return found


_crowd = Crowd()  # the workers are the process's, and so are the cores


def _close(lib: ctypes.CDLL, number: int) -> None:
    """A loop is gone; with the last one go the workers."""
    _open.discard(number)
    if not _open:
        lib.marnet_loop_end()


def _round_up(size: int) -> int:
    return -(-size // UNIT) * UNIT


def _padded(array: NDArray) -> Floats:
    """Return the array in float32, with columns of zeros up to the next multiple of 64."""
    width = array.shape[-1]
    if width % UNIT == 0:
        return np.ascontiguousarray(array, np.float32)
    out = np.zeros((*array.shape[:-1], _round_up(width)), np.float32)
    out[..., :width] = array
    return out


def _aligned(array: NDArray) -> NDArray:
    """A copy that starts at a line of the cache."""
    memory = np.empty(array.nbytes + UNIT, np.uint8)
    start = -memory.ctypes.data % UNIT
    out = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "scale", "sums")),
        *((name, ctypes.c_int32) for name in ("kind", "into", "out")),
    )


_ORDER = ("condition", "input", "hidden2", "hidden3", "carry", "output")


class _Loop(ctypes.Structure):
    _fields_ = (
        *((name, _Layer) for name in _ORDER),
        ("slope", ctypes.c_float),
        ("feature", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "coefficients", "bias", "out")),
        *((name, ctypes.c_int32) for name in ("images", "samples", "noises", "steps")),
        ("asleep", ctypes.c_float),  # written by the call
    )

"""The reverse loop as one persistent kernel, from the weights in loop.safetensors to its launch.

For the backends that capture their work on a GPU. The graph before the loop, "condition", makes
x_v [B, D_v] to q [B, Hp], and pads q with zeros up to Hp; the graph behind it, "finish", takes x_v
and h3 [B, K, Hp] and drops the padding. The kernel in between knows no other width than Hp, and
between the three nothing is copied.
Axes: B batch, K noise samples, S steps, H hidden, Hp H padded (`marnet_kernels.reverse_sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from marnet_kernels.reverse_sampler import (
    LAYERS,
    Operand,
    PackedLoop,
    from_bits,
    layout,
    pack,
    pack_tables,
    to_bits,
)
from marnet_sdk.errors import BundleFormatError, InvalidInput
from marnet_sdk.gpu.driver import Gpu, MemoryPlan, Stream
from marnet_sdk.noise.tables import Floats, Tables

LOOP = "loop.safetensors"
# The graphs around the kernel, where a payload has it.
CONDITION, FINISH = "condition", "finish"
_OWN = ("coefficients", "bias", "exchange", "counter")  # buffers of one shape; others are shared

Allocate = Callable[
    [int], int
]  # bytes -> address, a multiple of 256, for as long as the loop lives


@dataclass(frozen=True, eq=False)
class LoopWeights:
    """The matrices [H, H] and biases [H] of a loop whose carried state is hidden."""

    matrices: dict[str, Floats]  # hidden2, hidden3, carry
    biases: dict[str, Floats]  # hidden2, hidden3
    slope: float
    operand: Operand  # type in which they are multiplied

    @property
    def padded(self) -> int:
        """Hp, the width of q and h3 around the kernel."""
        return layout(len(self.matrices["hidden2"]), self.operand).padded

    def pack(self) -> PackedLoop:
        """Pack them as the kernel reads them."""
        hidden2, hidden3 = ((self.matrices[n], self.biases[n]) for n in ("hidden2", "hidden3"))
        return pack(hidden2, hidden3, self.matrices["carry"], self.operand)

    def save(self, path: Path) -> None:
        """Write loop.safetensors: the matrices as bits of the operand's type."""
        arrays: dict[str, NDArray] = {
            f"{name}.weight": to_bits(matrix, self.operand)
            for name, matrix in self.matrices.items()
        }
        arrays |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        arrays["slope"] = np.array([self.slope], np.float32)
        save_file(arrays, path, {"operand": self.operand})

    @classmethod
    def load(cls, path: Path) -> LoopWeights:
        """Read loop.safetensors.

        Raises:
            BundleFormatError: it is not what `save` writes.
        """
        try:
            with safe_open(path, "numpy") as file:
                operand = cast(Operand, (file.metadata() or {})["operand"])
                bits = {name: file.get_tensor(f"{name}.weight") for name in LAYERS}
                biases = {name: file.get_tensor(f"{name}.bias") for name in LAYERS[:2]}
                slope = float(file.get_tensor("slope")[0])
            matrices = {name: from_bits(array, operand) for name, array in bits.items()}
            return cls(cast(dict[str, Floats], matrices), biases, slope, operand)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise BundleFormatError(
                f"{path} does not hold the weights of a loop ({type(error).__name__}: {error}); "
                "export the bundle again"
            ) from error


class PersistentLoop:
    """The weights of a loop on the GPU, for shapes of any size. One for a backend."""

    def __init__(
        self, weights: LoopWeights, gpu: Gpu, allocate: Allocate, stream: Stream | int
    ) -> None:
        """Pack the weights and copy them to the GPU, whose context must be current.

        Raises:
            ValueError: they are not of a form that the kernel has; says which.
        """
        self.packed, self.slope = weights.pack(), weights.slope
        self.layout = self.packed.layout
        self.gpu = gpu
        arrays = {"weights": self.packed.weights, "biases": self.packed.biases}
        plan = MemoryPlan({name: array.nbytes for name, array in arrays.items()})
        self.bytes = plan.total
        self._addresses = plan.addresses(allocate(plan.total))
        for name, array in arrays.items():
            gpu.upload(self._addresses[name], array, stream)
        gpu.wait(stream)  # the copies read the arrays
        self._samplers: dict[Any, Any] = {}

    def choose(self, images: int, samples: int) -> Any:
        """The kernel's variant for a shape, on the GPU that is current.

        Raises:
            ValueError, RuntimeError: there is none; says why.
        """
        from marnet_kernels.loader import current_device
        from marnet_kernels.persistent import choose_variant

        return choose_variant(self.layout, images * samples, current_device())

    def prepare(self, images: int, samples: int, steps: int, allocate: Allocate) -> PreparedLoop:
        """Choose, compile and load the kernel for a shape, and get its memory.

        Raises:
            ValueError, RuntimeError: the kernel cannot run it; says why.
        """
        from marnet_kernels.persistent import ReverseSampler

        variant = self.choose(images, samples)
        if variant not in self._samplers:
            self._samplers[variant] = ReverseSampler(self.layout, variant)
        sizes = self.layout.buffers(images, samples, 1, steps)
        plan = MemoryPlan({name: sizes[name] for name in _OWN})
        addresses = self._addresses | plan.addresses(allocate(plan.total))
        counts = {"images": images, "samples": samples, "noises": 1, "steps": steps}
        return PreparedLoop(self, self._samplers[variant], addresses, counts, plan.total)


class PreparedLoop:
    """The kernel for one shape, with memory of its own. For one stream at a time."""

    def __init__(
        self,
        loop: PersistentLoop,
        sampler: Any,
        addresses: Mapping[str, int],
        counts: Mapping[str, int],
        size: int,
    ) -> None:
        self.loop, self.bytes = loop, size
        self._sampler, self._addresses, self._counts = sampler, dict(addresses), dict(counts)
        self._uploaded: list[NDArray] = []

    @property
    def variant(self) -> Any:
        return self._sampler.variant

    def set_tables(self, tables: Tables, stream: Stream | int) -> None:
        """Enqueue the copies of tables of this shape, with noise that all images share.

        Raises:
            InvalidInput: they are not of the shape that there is memory for.
        """
        steps, samples = self._counts["steps"], self._counts["samples"]
        check_shape("coefficients", tables.coefficients, (steps, 3))
        check_shape("bias", tables.bias, (steps, 1, samples, self.loop.layout.hidden))
        packed = pack_tables(tables.coefficients, tables.bias)
        for name, array in zip(("coefficients", "bias"), packed, strict=True):
            self.loop.gpu.upload(self._addresses[name], array, stream)
        self._uploaded = list(packed)  # the copies read them

    def enqueue(self, stream: Stream | int, q: int, h3: int) -> None:
        """Enqueue the loop: q float32 [B, Hp] -> h3 [B, K, Hp], by their addresses. Capturable."""
        from marnet_kernels.persistent import ReverseSamplerArguments

        arguments = ReverseSamplerArguments(
            **self._addresses, **self._counts, condition=q, out=h3, slope=self.loop.slope
        )
        self._sampler.launch(int(stream), arguments)


def check_shape(name: str, array: NDArray, expected: tuple[int, ...]) -> None:
    """Refuse a table that would be written beyond its memory on the GPU.

    Raises:
        InvalidInput
    """
    if array.shape != expected:
        raise InvalidInput(
            f"{name}: got shape {array.shape}, expected {expected}; make_tables makes them of the "
            "bundle's own plan"
        )

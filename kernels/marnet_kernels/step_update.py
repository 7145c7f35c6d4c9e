"""The sampler's update, fused with the activation that follows it: launch wrapper and NumPy twin.

Axes: B image, W width of the carried state, T step. Every supported sampler is linear in (state,
update, previous update, noise): DDPM (eq. 7 of Ho et al. 2020), DDIM (eq. 12 of Song et al. 2021)
and DPM-Solver++(2M) (algorithm 2 of Lu et al. 2022) differ in the table (A, B, C, S) alone, and
only the last has C != 0.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marnet_kernels import _cuda
from marnet_kernels.compile import Cubin, arch_for, compile_cubin
from marnet_kernels.loader import current_device, load_function
from marnet_kernels.source import source

_THREADS = 128  # in a block, as in csrc/step_update.cu

# Pointers in the order of the C struct, each with the alignment that its widest access needs.
_POINTERS = {
    "step": 4,
    "coefficients": 16,
    "noise": 16,
    "update": 16,
    "image_bias": 16,
    "time_bias": 16,
    "state": 16,
    "previous": 16,
    "hidden": 8,
}
_OPTIONAL = ("image_bias", "time_bias", "previous", "hidden")


def step_update_reference(
    state: NDArray[Any],
    update: NDArray[Any],
    noise: NDArray[Any],
    coefficients: NDArray[Any],
    step: int,
    previous: NDArray[Any] | None = None,
    image_bias: NDArray[Any] | None = None,
    time_bias: NDArray[Any] | None = None,
    slope: float = 0.01,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """(state, hidden) after one step, in the precision of the inputs.

    Shapes as in StepUpdateArguments. `hidden` is not rounded to float16, and None without both
    biases.
    """
    a, b, c, s = coefficients[step]
    new = b * update  # [B, W]
    # As in the kernel, a term whose coefficient is zero is left out, whatever its buffer holds.
    new = new + a * state if a else new
    new = new + s * noise[step] if s else new  # [W] -> [B, W]
    new = new + c * previous if previous is not None and c else new
    if image_bias is None or time_bias is None:
        return new, None
    before = new + image_bias + time_bias[step]
    return new, np.where(before > 0, before, slope * before)


class _Parameters(ctypes.Structure):
    """`struct Arguments` of csrc/step_update.cu, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in ("rows", "width4", "steps")),
        ("slope", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class StepUpdateArguments:
    """Sizes and device addresses of one launch, checked when built.

    All arrays are C-contiguous, float32 unless said otherwise. A launch reads the step's number on
    the device: one captured launch serves every step if the caller advances that number, and a loop
    captured whole gives each launch the address of its own number in an array 0 .. T-1.
    """

    batch: int
    width: int  # a multiple of 4
    steps: int  # rows of the tables
    step: int  # one int32; outside 0 .. T-1 every result is NaN
    coefficients: int  # [T, 4]: A, B, C, S
    noise: int  # [T, W]: one trajectory, the same for every image
    update: int  # [B, W]
    state: int  # [B, W], updated in place
    previous: int = 0  # [B, W] or 0: the update of the step before; afterwards holds this step's
    image_bias: int = 0  # [B, W], with hidden only
    time_bias: int = 0  # [T, W], with hidden only: row `step` is that of the layer reading hidden
    hidden: int = 0  # [B, W] float16 or 0: leaky_relu(state + image_bias + time_bias[step])
    slope: float = 0.01  # of leaky_relu below zero

    def __post_init__(self) -> None:
        for name in ("batch", "width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.width % 4:
            raise ValueError(
                f"width: got {self.width}, expected a multiple of 4; pad with zero columns"
            )
        if self.batch * self.width >= 2**31:
            raise ValueError(
                f"batch * width: got {self.batch * self.width}, expected less than 2**31; "
                "split the batch"
            )
        for name, alignment in _POINTERS.items():
            self._check_address(name, alignment)
        if self.hidden and not (self.image_bias and self.time_bias):
            raise ValueError(
                "hidden: got it without both biases, expected image_bias and time_bias; "
                "pass zeros for the one that is not used"
            )

    def _blocks(self) -> int:
        return -(-self.batch * self.width // (4 * _THREADS))  # a thread has four floats

    def _parameters(self) -> _Parameters:
        addresses = (getattr(self, name) for name in _POINTERS)
        return _Parameters(*addresses, self.batch, self.width // 4, self.steps, self.slope)

    def _check_address(self, name: str, alignment: int) -> None:
        address = getattr(self, name)
        if address % alignment or address < 0:
            raise ValueError(
                f"{name}: got address {address:#x}, expected a multiple of {alignment}; "
                "pass the start of an allocation"
            )
        if not address and name not in _OPTIONAL:
            raise ValueError(
                f"{name}: got address 0, expected device memory; "
                f"only {', '.join(_OPTIONAL)} may be left out"
            )


class StepUpdate:
    """The kernel, loaded into the CUDA context that is current now, for as long as that lives."""

    cubin: Cubin

    def __init__(self) -> None:
        arch = arch_for(current_device().capability)
        self.cubin = compile_cubin(source("step_update"), arch)
        self._function = load_function(self.cubin, "step_update")
        self._launch = _cuda.load("driver").cuLaunchKernel

    def launch(self, stream: int, arguments: StepUpdateArguments) -> None:
        """Enqueue one step on the stream (a CUstream as int); can be captured.

        Allocates no device memory and waits for nothing.
        """
        parameters = arguments._parameters()
        # The driver copies the parameters before it returns: nothing has to outlive the call.
        table = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        grid, block, shared_bytes = (arguments._blocks(), 1, 1), (_THREADS, 1, 1), 0
        result = self._launch(
            self._function, *grid, *block, shared_bytes, stream, ctypes.addressof(table), 0
        )
        _cuda.check(result, "launch of step_update")

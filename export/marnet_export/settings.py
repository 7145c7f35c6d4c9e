"""The settings of an export, and what they come to for a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from marnet_export.build.builder import (
    BUILDERS,
    ROUTES,
    Order,
    builder,
    check_device,
    choose_types,
    device_of,
)
from marnet_export.build.types import PRECISIONS, Arithmetic, Calibration
from marnet_sdk.errors import InvalidInput, nearest
from marnet_train.diffusion import SAMPLERS

Say = Callable[[str], None]
AUTO = "auto"
NOISES = ("shared", "image")
FLOATS = ("fp32", "bf16", "fp16")  # what --precision auto tries
DEVICES = ("cpu", "cuda")
LOOPS = (AUTO, "native", "graph")


@dataclass(frozen=True)
class Settings:
    """These settings say what an export is asked for."""

    backend: str  # "auto", for `race.export_fastest`: whichever is fastest here
    precision: str = "fp32"  # "auto": the sweep's choice
    compute: str | None = None  # None: what the backend does best here
    loop_precision: str | None = None  # None: the same as `precision`
    sampler: str | None = None  # None: ddpm, or all of them where steps are swept
    steps: int | Literal["auto"] | None = None  # None: T; 0: the alignment branch answers
    eta: float = 0.0  # of ddim
    samples: int | None = None  # None: the checkpoint's, or several where steps are swept
    noise: str = "shared"
    seed: int = 0  # of the noise
    min_agreement: float | None = None  # None: by precision
    max_drop: float = 0.002  # share of accuracy that a swept point may lose
    latency_budget_ms: float | None = None
    target_risk: float | None = None  # share of the answers that may be wrong
    targets: tuple[str, ...] = ()  # GPUs to build for ahead of time; none: the one that is here
    route: str = "onnx"  # of tensorrt's encoder: or "torch-tensorrt"
    text: bool = True  # with the text encoder, for matching
    source: bool = True  # with the checkpoint, for verifying and rebuilding elsewhere
    device: str | None = None  # None: the one that the backend builds for when it is not told
    loop: str = AUTO  # what runs the reverse loop; auto: whichever is faster here

    def __post_init__(self) -> None:
        auto = ("auto",) if self.steps == "auto" else ()
        for name, value, choices in (
            ("backend", self.backend, (AUTO, *BUILDERS)),
            ("precision", self.precision, (*PRECISIONS, *auto)),
            ("loop_precision", self.loop_precision or "fp32", PRECISIONS),
            ("compute", self.compute or "fp32", FLOATS),
            ("sampler", self.sampler or "ddpm", SAMPLERS),
            ("noise", self.noise, NOISES),
            ("route", self.route, ROUTES),
            ("device", self.device or "cpu", DEVICES),
            ("loop", self.loop, LOOPS),
        ):
            if value not in choices:
                near = nearest(value, choices)
                raise InvalidInput(
                    f"{name}: got {value!r}, expected one of {', '.join(choices)}.{near}"
                )
        if self.latency_budget_ms is not None and self.steps != "auto":
            raise InvalidInput("a latency budget is for choosing steps: add --steps auto")
        if self.steps == 0 and (self.sampler or self.eta or (self.samples or 1) > 1):
            raise InvalidInput(
                f"steps: got 0, so nothing is sampled, with sampler {self.sampler}, eta {self.eta} "
                f"and samples {self.samples}; leave these out, or choose 1 or more steps"
            )
        if self.eta and self.sampler != "ddim" and (self.sampler or self.steps != "auto"):
            raise InvalidInput(f"eta: got {self.eta}, but it is for ddim: add --sampler ddim")
        if self.route != ROUTES[0] and self.backend != "tensorrt":
            raise InvalidInput(
                f"route: got {self.route!r} for {self.backend}; it is for --backend tensorrt"
            )
        for name, number, most in (
            ("max_drop", self.max_drop, 1),
            ("target_risk", self.target_risk, 1),
            ("latency_budget_ms", self.latency_budget_ms, math.inf),
        ):
            if number is not None and not 0 < number < most:
                raise InvalidInput(
                    f"{name}: got {number}, expected more than 0, less than {most:g}"
                )
        if not 0 <= self.seed < 2**64:
            raise InvalidInput(f"seed: got {self.seed}, expected 0 .. 2**64 - 1")


def check_types(settings: Settings) -> Arithmetic:
    """Choose the types in which encoder and loop are built.

    Raises:
        ExportError: the backend cannot, or not for that device. MissingExtra, BackendUnavailable:
            it cannot here.
    """
    backend, device = settings.backend, device_of(settings.backend, settings.device)
    check_device(backend, device)
    precision = FLOATS[0] if settings.precision == AUTO else settings.precision
    encoder = choose_types(backend, precision, settings.compute, device)
    loop = choose_types(backend, settings.loop_precision or precision, encoder.compute, device)
    if check_loop := builder(backend).check_loop:
        check_loop(loop)
    return Arithmetic(encoder, loop)


def order_for(settings: Settings, calibration: Calibration | None = None) -> Order:
    """Return what the builder is told beside model and types."""
    backend = settings.backend
    if settings.targets and builder(backend).stand_in is None:
        raise InvalidInput(
            f"targets: got {', '.join(settings.targets)} for {backend}, which builds for "
            "this machine; leave them out, or choose --backend tensorrt"
        )
    return Order(
        device=device_of(backend, settings.device),
        targets=settings.targets,
        route=settings.route,
        calibration=calibration,
    )

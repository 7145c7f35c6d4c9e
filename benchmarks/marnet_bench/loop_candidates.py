"""Every way to run the reverse loop, x_v to logits: ours, built here and opened, and the peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from marnet_bench.limits import PRECISIONS
from marnet_bench.plain_loop import TORCH_PEERS, Logits, Peer, Problem
from marnet_export.build.builder import BUILDERS, USUAL, Order, builder
from marnet_export.build.native import why_not, write_native
from marnet_export.build.types import Calibration, Types
from marnet_export.lower.methods import lower_marnet
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.backends import Backend, open_backend
from marnet_sdk.bundle import OperatingPoint, Sampling
from marnet_sdk.console import say, track
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_train.models.marnet import MARNet

OURS = "marnet"  # what the names of our candidates begin with
# Its weights are in the precision of its line; what is not int8 is multiplied in float32.
NATIVE = f"{OURS} native"
_AROUND_NATIVE = "onnxruntime"
CHECKED = 256  # random x_v that calibrate int8, and that every candidate answers before it is timed


@dataclass(frozen=True)
class Candidate:
    """One way to run the loop, opened."""

    model: str  # framework and form
    precision: str
    logits: Logits
    opening_s: float = 0.0

    @property
    def ours(self) -> bool:
        return self.model.startswith(OURS)

    @property
    def compute(self) -> str:
        """The type that it multiplies in."""
        widened = self.model == NATIVE and self.precision != "int8"
        return "fp32" if widened else self.precision


@dataclass(frozen=True)
class Missing:
    """A way that cannot be measured here, and why."""

    model: str
    precision: str
    reason: str


@dataclass(frozen=True)
class _Way:
    """One way to run the loop, not yet opened."""

    model: str
    precision: str
    open: Callable[[], Logits]  # raises whatever its framework does


def _ways(problem: Problem, plan: SamplingPlan, folder: Path, threads: int) -> Iterator[_Way]:
    """Ours, from graphs built here: every backend, and the native loop. Then the peers."""
    tables = _our_tables(problem, plan)
    for backend in BUILDERS:
        for precision in PRECISIONS:
            payload = folder / f"{backend}-{precision}"
            arguments = (problem, plan, tables, backend, precision, payload, threads)
            yield _Way(f"{OURS} {backend}", precision, partial(_open_backend, *arguments))
    for precision in PRECISIONS:
        payload = folder / f"native-{precision}"
        arguments = (problem, plan, tables, precision, payload, threads)
        yield _Way(NATIVE, precision, partial(_open_native, *arguments))
    for name, peer in all_peers().items():
        for precision in peer.precisions:
            yield _Way(name, precision, partial(peer.open, problem, precision, threads))


def open_candidates(
    problem: Problem, plan: SamplingPlan, folder: Path, threads: int
) -> Iterator[Candidate | Missing]:
    """Open every way, or tell why it cannot be measured here.

    Args:
        folder: where payloads of ours are built.
    """
    for way in track(list(_ways(problem, plan, folder, threads)), "open"):
        started = time.perf_counter()
        try:
            logits = way.open()
        except Exception as error:  # whatever a framework raises is why it is missing
            yield Missing(way.model, way.precision, why_missing(error))
        else:
            seconds = time.perf_counter() - started
            yield Candidate(way.model, way.precision, logits, seconds)


def _open_native(
    problem: Problem,
    plan: SamplingPlan,
    tables: Tables,
    precision: str,
    payload: Path,
    threads: int,
) -> Logits:
    """The native loop with weights of a type, before ONNX Runtime's graph of the head."""
    module = builder(_AROUND_NATIVE)
    lowered = replace(lower_marnet(problem.model, plan), encoder=_NoEncoder().eval())
    if reason := why_not(module, lowered):
        raise BackendUnavailable(reason)
    payload.mkdir()
    module.build_encoder(lowered, torch.zeros(2, 3, 8, 8), Types("fp32", "fp32"), payload)
    write_native(module, lowered, Types(precision, "fp32"), payload)
    leaf = open_backend(_AROUND_NATIVE, payload, "fp32", threads)
    return partial(_first_sample, leaf, tables)


def _first_sample(leaf: Backend, tables: Tables, x_v: Floats) -> Floats:
    return leaf.refine(x_v, tables)[0][:, 0]


def _open_backend(
    problem: Problem,
    plan: SamplingPlan,
    tables: Tables,
    backend: str,
    precision: str,
    payload: Path,
    threads: int,
) -> Logits:
    """Build the graph of the loop, open it as a deployed process does."""
    if not _multiplies(backend, precision):
        raise BackendUnavailable(f"the {backend} backend does not multiply in {precision}")
    payload.mkdir()
    module, compute = builder(backend), "fp32" if precision == "int8" else precision
    lowered = replace(lower_marnet(problem.model, plan), encoder=_NoEncoder().eval())
    pixels = torch.zeros(2, 3, 8, 8)
    module.build_encoder(lowered, pixels, Types(compute, compute), payload)
    order = USUAL
    if precision == "int8":
        x_v = random_features(problem.model, CHECKED)
        calibration = Calibration(pixels.numpy(), x_v, tables.coefficients, tables.bias)
        order = Order(calibration=calibration)
    module.build_refine(lowered, Types(precision, compute), payload, order)
    leaf = open_backend(backend, payload, compute, threads)
    return partial(_first_sample, leaf, tables)


def _multiplies(backend: str, precision: str) -> bool:
    """Tell whether a backend multiplies in a precision; matrices stored in int8 are."""
    module = builder(backend)
    return precision in (module.storage if precision == "int8" else module.compute)


class _NoEncoder(nn.Module):
    """Stands where a payload holds an encoder, which nothing here runs."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, H, W] to [B, 3]."""
        return pixels.mean(dim=(2, 3))


def _our_tables(problem: Problem, plan: SamplingPlan) -> Tables:
    """The tables of the problem's sampler and noise, made as the SDK makes them, once."""
    table = problem.table
    point = OperatingPoint(table.sampler, table.eta, table.timesteps, 1, None)
    width = problem.model.denoiser.dim
    sampling = Sampling({"loop": point}, "loop", table.train_steps, "shared", problem.seed, width)
    arrays = plan.tensors({"loop": table})
    return make_tables(arrays, sampling, "loop", seed=problem.seed, samples=1)


def all_peers() -> Mapping[str, Peer]:
    """Plain torch; from a checkout, which has them beside this package, other frameworks too."""
    if find_spec("loop_peers") is None:
        say("other frameworks than torch are measured from a checkout of marnet")
        return TORCH_PEERS
    return import_module("loop_peers").PEERS


def why_missing(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else "no message"
    return text if isinstance(error, BackendUnavailable) else f"{type(error).__name__}: {text}"


def random_features(model: MARNet, count: int) -> Floats:
    """Draw x_v [count, D_v] with the mean and the deviation that the model was trained with."""
    normal = np.random.default_rng(0).standard_normal((count, model.vision.dim))
    mean, std = model.vision_mean.numpy(), model.vision_std.numpy()
    return (normal * std + mean).astype(np.float32)

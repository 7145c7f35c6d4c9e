"""This module names the first layer or step that departs from the float32 reference, for the
message of an export or of a bundle that fails.

Nobody can look into a graph that was built. So the encoder is built once more, by the same builder
in the same types, with the outputs of its layers in place of its features. A loop that is cut short
answers with the estimate of its last step. Both work for every backend and method.
Axes: N images, B of them that are looked at closely, K noise samples, S steps, C classes, F flat.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_export.build.builder import Order, builder
from marnet_export.build.types import Arithmetic, Types
from marnet_export.lower.methods import Lowered, lower
from marnet_export.prove.reference import Reference
from marnet_export.prove.trial import Built, Trial
from marnet_sdk.backends import open_backend
from marnet_sdk.noise.tables import Floats

# Relative errors, in the norm, of one image, that rounding may explain, by the coarsest type in
# use: of a layer of the encoder, and of the logits that the head makes of a step's estimate. fp32:
# sums in another order, and a trained loop that amplifies the last bits. fp16 and bf16: 2^-11 and
# 2^-8 of rounding in each factor, some hundred layers long. int8: half of 1/127 of the largest
# value in each factor.
LAYER_BOUNDS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.3}
STEP_BOUNDS = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.2, "int8": 0.4}
LAYER_IMAGES, STEP_IMAGES = 3, 8  # the worst ones are looked at closely
STEPS = 100  # are looked at, at most
Found = tuple[str, Floats, Floats]  # a layer or step, as it was built, and the reference's, [B, F]
_FLOATS = 2**24  # outputs of layers that one build returns together, for an image: 64 MiB


@dataclass(frozen=True)
class Departure:
    """The first thing that is further from the reference than its types may explain."""

    part: str  # "encoder", "loop", which stands for the head behind it too, or "none"
    name: str  # the layer or step; "" where it was not found
    error: float  # relative, of the worst image; infinite where a value is not finite
    bound: float
    before: str = ""  # what is computed before it; "" if nothing is
    error_before: float = 0.0
    note: str = ""  # what else is known

    @property
    def sentence(self) -> str:
        """One line for an error message."""
        if self.part == "none":
            return self.note
        if self.part == "loop":
            start = f" from {self.name} on" if self.name else ""
            found = f"the encoder agrees; the reverse loop or the head behind it departs{start}"
        elif self.name:
            found = f"the first layer that departs is the encoder's {self.name}"
        else:
            found = "the encoder departs"
        error = f"{self.error:.2g}" if math.isfinite(self.error) else "infinite"
        facts = f"relative error {error}, bound {self.bound:g}"
        if self.before:
            facts += f"; {self.error_before:.2g} before it, at {self.before}"
        return f"{found} ({facts})" + (f"; {self.note}" if self.note else "")


def diagnose(
    trial: Trial,
    name: str,
    payload: Path,
    lowered: Lowered,
    backend: str,
    types: Arithmetic,
    order: Order,
) -> Departure:
    """Name the first layer or step that departs from the reference at an operating point.

    What cannot be built or opened again is told in the note and never raised: the failure that is
    being explained is the one to see.

    Args:
        payload: what `trial.built` was opened from; it is read only.
        lowered: what that was built from. order: what the builder was told besides.
    """
    reference, built, table = trial.reference, trial.built, trial.tables[name]
    errors = relative_errors(built.x_v, reference.x_v.numpy())
    encoder = Departure("encoder", "", float(errors.max()), _bound(LAYER_BOUNDS, types.encoder))
    why = f"features are off by up to {encoder.error:.2g} (bound {encoder.bound:g})"
    if encoder.error > encoder.bound:
        # The worst images; of few, some twice.
        pixels = built.pixels[np.resize(np.argsort(-errors)[:LAYER_IMAGES], LAYER_IMAGES)]
        layers = _layers(reference, pixels, payload, lowered, backend, types.encoder, order)
        return _first(encoder, layers, "built once more, it agrees with the reference")
    if not table.timesteps:
        why += "; what is left is the alignment branch's head behind them, in float32"
        note = f"no layer departs by more than its types explain: {why}"
        return replace(encoder, part="none", note=note)
    samples = built.sampling.points[name].samples
    exact = Built(built.backend, built.plan, built.sampling, built.pixels, built.batch)
    exact.x_v = reference.x_v.numpy()
    want = reference.logits(table, built.sampling.seed, samples)  # [N, K, C]
    errors = relative_errors(exact.samples(name, samples), want)
    loop = Departure("loop", "", float(errors.max()), _bound(STEP_BOUNDS, types.loop))
    if loop.error > loop.bound:
        steps = _steps(trial, name, np.argsort(-errors)[:STEP_IMAGES])
        return _first(loop, steps, "no step of the first noise sample departs")
    behind = f"logits behind the reference's features by up to {loop.error:.2g}"
    why += f", {behind} (bound {loop.bound:g})"
    note = f"no layer or step departs by more than its types explain: {why}"
    return replace(loop, part="none", note=note)


def _first(whole: Departure, found: Iterable[Found], otherwise: str) -> Departure:
    """Return the first of what is found that departs, or else the whole with a note."""
    before = "", 0.0
    try:
        for name, got, want in found:
            error = float(relative_errors(got, want).max())
            if error > whole.bound:
                return Departure(whole.part, name, error, whole.bound, *before)
            before = name, error
    except Exception as error:  # exporters and runtimes raise dozens of unrelated classes
        why = " ".join(str(error).split())
        otherwise = f"where could not be found: {type(error).__name__}: {why}"
    return replace(whole, note=otherwise)


def _layers(
    reference: Reference,
    pixels: Floats,
    payload: Path,
    lowered: Lowered,
    backend: str,
    types: Types,
    order: Order,
) -> Iterator[Found]:
    """Every layer of the encoder, built again, beside torch's."""
    with torch.inference_mode():
        outputs = _outputs(lower(reference.model).encoder, torch.from_numpy(pixels))
    # Of others, such as a table of positions, no part belongs to an image.
    want = {k: v.flatten(1).numpy() for k, v in outputs.items() if len(v) == len(pixels)}
    windows: dict[int, list[str]] = {}
    total = 0
    for layer, array in want.items():
        windows.setdefault(total // _FLOATS, []).append(layer)
        total += array.shape[1]
    for layers in windows.values():
        module = replace(lowered, encoder=_Layers(lowered.encoder, layers).eval())
        with tempfile.TemporaryDirectory() as folder:
            fresh = shutil.copytree(payload, Path(folder) / payload.name)  # it is opened as a whole
            example = torch.from_numpy(pixels[:2])
            builder(backend).build_encoder(module, example, types, fresh, order)
            opened = open_backend(backend, fresh, types.compute, None, order.device)
            got = opened.encode(pixels)  # [B, F]
        ends = np.cumsum([want[layer].shape[1] for layer in layers])
        for layer, part in zip(layers, np.split(got, ends[:-1], axis=1), strict=True):
            yield layer, part, want[layer]


class _Layers(nn.Module):
    """An encoder that returns the outputs of some of its layers, side by side: [B, F]."""

    def __init__(self, encoder: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, pixels: Tensor) -> Tensor:
        # Hooks that are there only now, since builders replace layers in copies of an encoder.
        found = _outputs(self.encoder, pixels)
        return torch.cat([found[layer].flatten(1) for layer in self.layers], dim=1)


def _outputs(encoder: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Run an encoder and keep the outputs of its layers, in the order in which they are done."""
    calls: Counter[str] = Counter()
    found: dict[str, Tensor] = {}
    originals: list[Tensor] = []

    def watch(name: str) -> Any:
        def see(module: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] += 1
            layer = name if calls[name] == 1 else f"{name} (call {calls[name]})"
            tensor = _tensor(output)
            # What a container hands on from its last layer is that layer's.
            if tensor is not None and not any(tensor is other for other in originals):
                originals.append(tensor)
                found[layer or "output"] = tensor.clone()  # it may be changed in place

        return see

    with ExitStack() as stack:
        for name, module in encoder.named_modules():
            if not isinstance(module, nn.Dropout | nn.Identity):  # they hand on what they get
                stack.callback(module.register_forward_hook(watch(name)).remove)
        encoder(pixels)
    return found


def _tensor(output: Any) -> Tensor | None:
    """Return the tensor that a layer hands on: in a tuple or a dictionary, the first entry."""
    several = tuple(output.values()) if isinstance(output, Mapping) else output
    first = several[0] if isinstance(several, tuple | list) and several else several
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _steps(trial: Trial, name: str, images: NDArray[np.intp]) -> Iterator[Found]:
    """The logits of each step of the first noise sample, behind the reference's features."""
    times, x_v = trial.tables[name].timesteps, trial.reference.x_v[images].numpy()
    for step, got, want in trial.steps(name, images, x_v, STEPS):
        yield f"step {step} of {len(times)} (t = {times[step - 1]})", got, want


@np.errstate(all="ignore")  # zero by zero, infinity minus itself
def relative_errors(got: Floats, want: Floats) -> NDArray[np.float64]:
    """Norm of each row's difference over the norm of what was wanted, [N, ...] -> [N].

    A row with a value that is not finite, on either side, is infinitely wrong.
    """
    rows = len(want)
    exact = want.astype(np.float64).reshape(rows, -1)
    difference = np.linalg.norm(got.astype(np.float64).reshape(rows, -1) - exact, axis=1)
    errors = difference / np.linalg.norm(exact, axis=1)
    errors[difference == 0] = 0
    errors[~np.isfinite(errors)] = np.inf
    return errors


def _bound(bounds: dict[str, float], types: Types) -> float:
    """Return the bound of the coarser of two types."""
    return max(bounds[types.storage], bounds[types.compute])

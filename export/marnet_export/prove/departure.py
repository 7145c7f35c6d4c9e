"""This module finds where what was built parts from the float32 reference, for the message of a
failed export.

Everything is looked at in the order in which it is computed: the layers of the encoder, the steps
of the reverse loop behind the reference's own features, the head behind the loop. A layer is seen
by building the encoder again with the outputs of its layers in place of x_v, a step by building the
loop again without the head: with the same builder in the same types, so that this works for every
backend and method.
Axes: N images, B of them that are looked at closely, K noise samples, S steps, D feature, F flat.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_export.build.builder import USUAL, Builder, Order, builder
from marnet_export.build.types import Types
from marnet_export.lower.class_token import for_class_token
from marnet_export.lower.methods import Lowered
from marnet_export.prove.built import Built
from marnet_export.prove.noise import CHAIN_STEPS
from marnet_export.prove.reference import Reference
from marnet_sdk.backends import Backend, open_backend
from marnet_sdk.noise.tables import Floats, Tables
from marnet_train.diffusion import SamplerTable
from marnet_train.models.backbones import VisionEncoder


class Bound(NamedTuple):
    """Relative errors, in the norm, of one image, that rounding may explain."""

    layer: float  # of a layer of the encoder
    step: float  # of the estimate after a step of the loop, and of what the head makes of it


# By the coarsest type in use, from fine to coarse. fp32: sums in another order, and a trained loop
# that amplifies the last bits. fp16 and bf16: 2^-11 and 2^-8 of rounding in each factor, some
# hundred layers long. int8: half of 1/127 of the largest value in each factor.
BOUNDS = {
    "fp32": Bound(1e-3, 0.02),
    "fp16": Bound(0.02, 0.05),
    "bf16": Bound(0.1, 0.2),
    "int8": Bound(0.3, 0.4),
}
LAYER_IMAGES, STEP_IMAGES = 4, 8  # the worst ones are looked at closely
_FLOATS = 2**26  # outputs of layers that one build returns together: a quarter of a gibibyte
_GRID = 12  # steps that are looked at first where there are too many to look at each
_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Departure:
    """The first thing that is further from the reference than its types may explain."""

    part: str  # "encoder", "loop", "head", or "none"
    name: str  # the layer or step; "" where it was not found
    error: float  # relative, of the worst image; infinite where a value is not finite
    median: float  # over the images
    bound: float
    images: int  # that this was measured on
    before: str = ""  # what is computed before it; "" if nothing is
    error_before: float = 0.0
    largest: float = 0.0  # absolute value that is finite there, in the float32 reference
    nan: int = 0  # values there that are NaN, or infinite
    infinite: int = 0
    step: int | None = None  # of the loop, 1-based
    t: int | None = None
    note: str = ""  # what else is known

    @property
    def departs(self) -> bool:
        return self.error > self.bound

    @property
    def sentence(self) -> str:
        """One line for an error message."""
        if self.part == "none":
            return self.note
        if not self.name:
            whole = "encoder" if self.part == "encoder" else "reverse loop or the head"
            found = f"the {whole} departs"
        elif self.part == "encoder":
            found = f"the first layer that departs is the encoder's {self.name}"
        elif self.part == "loop":
            found = f"the first step of the reverse loop that departs is {self.name}"
        else:
            found = f"encoder and reverse loop agree, the head departs, from its {self.name} on"
        facts = [f"relative error {'infinite' if math.isinf(self.error) else f'{self.error:.2g}'}"]
        if self.before:
            facts.append(f"{self.error_before:.2g} before it, at {self.before}")
        if self.nan or self.infinite:
            facts.append(f"{self.nan} values are NaN and {self.infinite} infinite")
        return f"{found} ({'; '.join(facts)})" + (f"; {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the content for a report file; an error that is not finite becomes None, which
        JSON has.
        """
        content = asdict(self) | {"sentence": self.sentence}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }


def diagnose(
    reference: Reference,
    built: Built,
    payload: Path,
    lowered: Lowered,
    backend: str,
    types: Types,
    table: SamplerTable,
    name: str,
    *,
    loop_types: Types | None = None,
    order: Order = USUAL,
) -> Departure:
    """Name the first layer or step that departs from the reference.

    What cannot be built or opened apart is told in the note and never raised: the failure that is
    being explained is the one to see.

    Args:
        reference, built: of the same images in the same order.
        payload: what `built` was opened from; it is read only.
        lowered: what that was built from. types: of its encoder.
        table, name: of the operating point.
        loop_types: of loop and head; None: as the encoder's.
        order: what the builder was told besides.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = _Again(
            *(lowered, backend, types, loop_types or types, order),
            *(built.pixels, payload, Path(folder)),
        )
        encoder = _Encoder(again, reference, built)
        if encoder.whole.departs:
            return _explained(encoder)
        if not table.timesteps:
            note = (
                "no layer departs by more than its types explain: features are off by up to "
                f"{encoder.whole.error:.2g} (bound {encoder.whole.bound:g}), and the alignment "
                "branch behind them is computed in float32"
            )
            return replace(encoder.whole, part="none", note=note)
        loop = _Loop(again, reference, built, table, name)
        if loop.whole.departs:
            return _explained(loop)
        why = (
            f"features are off by up to {encoder.whole.error:.2g} (bound {encoder.whole.bound:g}), "
            f"logits behind the reference's features by up to {loop.whole.error:.2g} (bound "
            f"{loop.whole.bound:g}), logits behind those that were built by up to "
            f"{loop.error_together:.2g}"
        )
        for part in (encoder, loop):  # what comes behind a layer may hide most of its error
            found = _explained(part)
            if found.name and found.departs:
                return replace(found, note=f"{found.note}; in the end, {why}".lstrip("; "))
    note = f"no layer or step departs by more than its types explain: {why}"
    return replace(loop.whole, part="none", note=note)


def _explained(part: _Encoder | _Loop) -> Departure:
    try:
        return part.first()
    except Exception as error:  # exporters and runtimes raise dozens of unrelated classes
        why = " ".join(str(error).split())
        return replace(part.whole, note=f"where could not be found: {type(error).__name__}: {why}")


# --- building parts again


@dataclass(frozen=True, eq=False)
class _Again:
    """Builds and opens parts of what failed."""

    lowered: Lowered
    backend: str
    types: Types
    loop_types: Types
    order: Order
    pixels: Floats  # [N, 3, H, W]
    payload: Path
    folder: Path  # to work in

    def encoder(self, module: nn.Module) -> Backend:
        """Another module [B, 3, H, W] -> [B, F] in the encoder's place."""
        payload = self._copy()
        lowered = replace(self.lowered, encoder=module)
        example = torch.from_numpy(np.resize(self.pixels[:2], (2, *self.pixels.shape[1:])))
        self._builder.build_encoder(lowered, example, self.types, payload, self.order)
        return self._open(payload)

    def loop(self) -> Backend:
        """The loop without a head: its logits are the estimates x_CDR [B, K, D]."""
        payload = self._copy()
        lowered = replace(self.lowered, head=_NoHead())
        self._builder.build_refine(lowered, self.loop_types, payload, self.order)
        return self._open(payload)

    @property
    def _builder(self) -> Builder:
        return builder(self.backend)

    def _copy(self) -> Path:
        """Copy the payload that failed, to replace a part of it: a payload is opened with all its
        parts.
        """
        fresh = Path(tempfile.mkdtemp(dir=self.folder)) / self.payload.name
        return shutil.copytree(self.payload, fresh)

    def _open(self, payload: Path) -> Backend:
        device = self.order.device
        return open_backend(self.backend, payload, self.types.compute, None, device)


class _NoHead(nn.Module):
    def forward(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate [B, K, D] itself; the features [B, K, D_v] are those of the image."""
        return x_cdr, x_v.unsqueeze(1).expand(-1, x_cdr.shape[1], -1)


# --- the encoder


class _Layer(NamedTuple):
    """A call of a module."""

    module: str
    call: int  # 1-based: a module may be called several times

    def __str__(self) -> str:
        name = self.module or "output, behind its last layer"
        return name if self.call == 1 else f"{name} (call {self.call})"


class _Layers(nn.Module):
    """An encoder that returns the outputs of some of its layers, side by side: [B, F]."""

    def __init__(self, encoder: nn.Module, layers: Collection[_Layer]) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, list(layers)

    def forward(self, pixels: Tensor) -> Tensor:
        # Hooks that are there only now, since builders replace layers in copies of an encoder.
        found = _outputs(self.encoder, pixels, {layer.module for layer in self.layers})
        return torch.cat([found[layer].flatten(1) for layer in self.layers], dim=1)


def _outputs(encoder: nn.Module, pixels: Tensor, modules: Collection[str]) -> dict[_Layer, Tensor]:
    """Run an encoder and keep the outputs of these modules, in the order in which they are done."""
    calls: Counter[str] = Counter()
    found: dict[_Layer, Tensor] = {}
    originals: list[Tensor] = []

    def watch(name: str) -> Any:
        def see(module: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] += 1
            tensor = _tensor(output)
            # What a container hands on from its last layer is that layer's.
            if tensor is not None and not any(tensor is other for other in originals):
                originals.append(tensor)
                found[_Layer(name, calls[name])] = tensor.clone()  # it may be changed in place

        return see

    handles = [encoder.get_submodule(m).register_forward_hook(watch(m)) for m in modules]
    try:
        encoder(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensor(output: Any) -> Tensor | None:
    """Return the tensor that a layer hands on: in a tuple or a dictionary, the first entry."""
    several = tuple(output.values()) if isinstance(output, Mapping) else output
    first = several[0] if isinstance(several, tuple | list) and several else several
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


class _Encoder:
    """Looks for the first layer that departs."""

    def __init__(self, again: _Again, reference: Reference, built: Built) -> None:
        self.again, self.module = again, again.lowered.encoder
        errors = relative_errors(built.x_v, reference.x_v.numpy())
        bound = BOUNDS[coarsest(again.types)].layer
        self.whole = Departure("encoder", "", *_summary(errors), bound, len(errors))
        self.pixels = np.ascontiguousarray(built.pixels[_largest(errors, LAYER_IMAGES)])
        self.exact = self.module
        vision = getattr(reference.model, "vision", None)  # a method may wrap it for deployment
        if isinstance(vision, nn.Module) and _names(self.module) <= _names(vision):
            self.exact = for_class_token(vision) if isinstance(vision, VisionEncoder) else vision

    def first(self) -> Departure:
        sizes = self._sizes()
        before: tuple[str, float] = ("", 0.0)
        for window in _windows(sizes, _FLOATS // len(self.pixels)):
            for layer, seen in self._look(window):
                if seen.error > self.whole.bound:
                    return self._departure(layer, seen, before)
                before = str(layer), seen.error
        return self._first_alone(list(sizes)) if self.whole.departs else self.whole

    def _first_alone(self, layers: list[_Layer]) -> Departure:
        """The first layer that departs if no other is looked at, by bisection."""
        seen: dict[int, _Seen] = {}

        def departs(number: int) -> bool:
            ((_, seen[number]),) = self._look([layers[number - 1]])
            return seen[number].error > self.whole.bound

        number = _first([len(layers)], departs)
        if number is None:
            return replace(self.whole, note="built once more, it agrees with the reference")
        before = (str(layers[number - 2]), seen[number - 1].error) if number > 1 else ("", 0.0)
        found = self._departure(layers[number - 1], seen[number], before)
        note = "only where layers are fused: it agrees where the outputs of all are kept"
        return replace(found, note=f"{found.note}; {note}" if found.note else note)

    def _sizes(self) -> dict[_Layer, int]:
        """The layers in the order in which they are done, with their floats for an image."""
        names = [
            name
            for name, module in self.exact.named_modules()
            if not isinstance(module, nn.Dropout | nn.Identity)  # they hand on what they get
        ]
        images = torch.from_numpy(np.resize(self.pixels, (3, *self.pixels.shape[1:])))
        with torch.inference_mode():
            three, two = (_outputs(self.exact, images[:count], names) for count in (3, 2))
        return {
            layer: output[0].numel()
            for layer, output in two.items()
            if output.shape[:1] == (2,) and layer in three and three[layer].shape[:1] == (3,)
        }

    def _look(self, layers: list[_Layer]) -> Iterator[tuple[_Layer, _Seen]]:
        with torch.inference_mode():
            modules = {layer.module for layer in layers}
            exact = _outputs(self.exact, torch.from_numpy(self.pixels), modules)
        got = self.again.encoder(_Layers(self.module, layers).eval()).encode(self.pixels)  # [B, F]
        start = 0
        for layer in layers:
            want = exact[layer].flatten(1).numpy()
            yield layer, _see(got[:, start : start + want.shape[1]], want)
            start += want.shape[1]

    def _departure(self, layer: _Layer, seen: _Seen, before: tuple[str, float]) -> Departure:
        parameters = self.module.get_submodule(layer.module).parameters(recurse=False)
        weights = [float(p.detach().abs().max()) for p in parameters if p.ndim > 1 and p.numel()]
        found = Departure(
            "encoder", str(layer), seen.error, seen.median, self.whole.bound, len(self.pixels)
        )
        return replace(
            found,
            before=before[0],
            error_before=before[1],
            largest=seen.largest,
            nan=seen.nan,
            infinite=seen.infinite,
            note=_range_note(self.again.types, seen.largest, max(weights, default=0.0)),
        )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_modules()}


def _windows(sizes: Mapping[_Layer, int], most: int) -> Iterator[list[_Layer]]:
    """Layers that follow one another, with outputs of up to `most` floats together, or one."""
    window, used = [], 0
    for layer, size in sizes.items():
        if window and used + size > most:
            yield window
            window, used = [], 0
        window.append(layer)
        used += size
    yield window


# --- the loop and the head


class _Chain(Reference):
    """The reference's estimates themselves, of one of the noise samples."""

    def __init__(self, model: Any, pixels: Floats, sample: int, *, by_image: bool) -> None:
        super().__init__(model, pixels, by_image=by_image)
        self.sample = sample

    def _chain(
        self,
        table: SamplerTable,
        seed: int,
        sample: int,
        rows: slice,
        watch: Callable[[int, Tensor], None],
    ) -> Tensor:
        return super()._chain(table, seed, self.sample, rows, watch)

    def _head(self, rows: slice, x_cdr: Tensor) -> Tensor:
        return x_cdr


class _Loop:
    """Looks for the first step that departs, given the reference's features; else, at the head."""

    def __init__(
        self, again: _Again, reference: Reference, built: Built, table: SamplerTable, name: str
    ) -> None:
        self.again, self.reference, self.built = again, reference, built
        self.table, self.name = table, name
        self.samples = built.sampling.points[name].samples
        # As in the measure of instability, more images would cost more than they tell.
        self.limit = max(16, CHAIN_STEPS // (self.samples * len(table.timesteps)))
        self.want = reference.logits(table, built.sampling.seed, self.samples, limit=self.limit)
        exact = Built(built.backend, built.plan, built.sampling, built.pixels)
        exact.x_v = reference.x_v.numpy()
        errors = self._errors(exact)  # [N, K]
        self.sample = int(errors.max(axis=0).argmax())
        self.errors = errors[:, self.sample]
        bound = BOUNDS[coarsest(again.loop_types)].step
        self.whole = Departure("loop", "", *_summary(self.errors), bound, len(self.errors))

    def _errors(self, built: Built) -> NDArray[np.float64]:
        got = built.samples(self.name, self.samples, self.limit)
        classes = self.want.shape[2]
        errors = relative_errors(got.reshape(-1, classes), self.want.reshape(-1, classes))
        return errors.reshape(len(got), -1)

    @property
    def error_together(self) -> float:
        """Return the error of the logits behind the features that were built."""
        return float(self._errors(self.built).max())

    def first(self) -> Departure:
        pixels = np.ascontiguousarray(self.built.pixels[_largest(self.errors, STEP_IMAGES)])
        by_image = self.built.sampling.noise == "image"
        chain = _Chain(self.reference.model, pixels, self.sample, by_image=by_image)
        want = chain.estimates(self.table, self.built.sampling.seed, len(pixels))  # [S, B, D]
        tables = self.built.tables(self.name, pixels, self.samples)
        tables = tables.samples(self.sample, self.sample + 1)
        loop, x_v = self.again.loop(), chain.x_v.numpy()
        seen: dict[int, _Seen] = {}

        def departs(step: int) -> bool:
            got = loop.refine(x_v, tables.first_steps(step))[0][:, 0]
            seen[step] = _see(got, want[step - 1])
            return seen[step].error > self.whole.bound

        step = _first(_looked_at(len(want), len(pixels)), departs)
        if step is None:
            return self._head(chain, want[-1], tables, seen)
        found = self._departure("loop", self._step_name(step), seen[step], len(pixels))
        found = replace(found, step=step, t=self.table.timesteps[step - 1])
        return self._after(found, step - 1, seen)

    def _head(
        self, chain: _Chain, x_cdr: Floats, tables: Tables, seen: Mapping[int, _Seen]
    ) -> Departure:
        with torch.inference_mode():
            exact = self.reference.model.head(chain.x_v, torch.from_numpy(x_cdr))
        built = self.built.backend.refine(chain.x_v.numpy(), tables)
        logits, features = (_see(b[:, 0], e.numpy()) for b, e in zip(built, exact, strict=True))
        if features.error > self.whole.bound:
            found = self._departure("head", "fused features", features, len(x_cdr))
            return self._after(found, len(self.table.timesteps), seen)
        found = self._departure("head", "logits", logits, len(x_cdr))
        return replace(found, before="fused features", error_before=features.error)

    def _departure(self, part: str, name: str, seen: _Seen, images: int) -> Departure:
        matrices = self.again.lowered.plan.matrices().values() if part == "loop" else ()
        weight = max((float(np.abs(matrix).max()) for matrix in matrices), default=0.0)
        return Departure(
            *(part, name, seen.error, seen.median, self.whole.bound, images),
            largest=seen.largest,
            nan=seen.nan,
            infinite=seen.infinite,
            note=_range_note(self.again.loop_types, seen.largest, weight),
        )

    def _after(self, found: Departure, step: int, seen: Mapping[int, _Seen]) -> Departure:
        if step < 1:
            return found
        return replace(found, before=self._step_name(step), error_before=seen[step].error)

    def _step_name(self, step: int) -> str:
        times = self.table.timesteps
        return f"step {step} of {len(times)} (t = {times[step - 1]})"


def _looked_at(steps: int, images: int) -> list[int]:
    """Every step where that is affordable: a chain is run up to each of them."""
    if steps * (steps + 1) // 2 * images <= CHAIN_STEPS:
        return list(range(1, steps + 1))
    return np.unique(np.linspace(1, steps, _GRID).round().astype(int)).tolist()


# --- measuring


def _first(looked_at: Iterable[int], departs: Callable[[int], bool]) -> int | None:
    """The first number from 1 on that departs while the one before does not.

    Args:
        looked_at: ascending; between the first of them that departs and the one before, the search
            is a bisection.
    """
    good = 0
    for bad in looked_at:
        if not departs(bad):
            good = bad
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if departs(middle) else (middle, bad)
        return bad
    return None


class _Seen(NamedTuple):
    error: float
    median: float
    largest: float
    nan: int
    infinite: int


def _see(got: Floats, want: Floats) -> _Seen:
    finite = np.abs(want[np.isfinite(want)])
    return _Seen(
        *_summary(relative_errors(got, want)),
        largest=float(finite.max(initial=0)),
        nan=int(np.isnan(got).sum()),
        infinite=int(np.isinf(got).sum()),
    )


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


def _summary(errors: NDArray[np.float64]) -> tuple[float, float]:
    return float(errors.max()), float(np.median(errors))


def _largest(errors: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The rows with the largest errors, worst first."""
    return np.argsort(-errors, kind="stable")[:count]


def coarsest(types: Types) -> str:
    order = list(BOUNDS)
    return max((types.storage, types.compute), key=order.index)


def _range_note(types: Types, largest: float, weight: float) -> str:
    if types.compute == "fp16" and largest > _FP16_MAX:
        what = f"values up to {largest:.4g} there"
    elif "fp16" in (types.storage, types.compute) and weight > _FP16_MAX:
        what = f"weights up to {weight:.4g} there"
    else:
        return ""
    return f"{what} are beyond the largest fp16 value ({_FP16_MAX:.0f}): use bf16 or fp32"

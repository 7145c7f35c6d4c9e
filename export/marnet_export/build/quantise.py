"""Quantise to int8 after training: what the backends share.

A product is int8 times int8: its weights have a scale for each output, its activations one scale
and zero point. These are static and come from calibration images, so no answer depends on the other
images of its batch. The range of an activation is the least and the largest value that it had. An
encoder's biases are corrected before any backend quantises it (`corrected`). What still hurts is
found by quantising one block at a time (`ranked`); the pipeline keeps the worst float. Ranges cut
at percentiles did harm; SmoothQuant of the loop and other ranges of encoders gave nothing.
Axes: B batch, K noise samples, S steps, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from marnet_export.build.types import Calibration, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Matrix, ScriptedLoop
from marnet_sdk.errors import ExportError
from marnet_sdk.noise.tables import Floats, Tables

IMAGES = 300  # calibrated on at most so many
LEVELS = 256
MOST_KEPT = 0.5  # of the encoder's multiply-adds: with more of them float, it is not int8
_CHUNK = 50
_CORRECTED_ON, _RANKED_ON, _BATCH = 64, 16, 16  # images
_BLOCKS = 12  # at least so many, where a model has them


@dataclass(frozen=True)
class Range:
    """The values of an activation, zero among them, on `LEVELS` equal steps of which one is 0."""

    least: float
    largest: float

    @property
    def scale(self) -> float:
        return (self.largest - self.least) / (LEVELS - 1) or 1.0

    @property
    def zero_point(self) -> int:
        return round(-self.least / self.scale)

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest step."""
        return -self.zero_point * self.scale, (LEVELS - 1 - self.zero_point) * self.scale


def quantised_rows(weight: NDArray, bits: int = 8) -> tuple[NDArray[np.int8], Floats]:
    """A weight [O, ...] as int8 of so many bits and a scale for each of its rows, [O, 1, ...]."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    scale = (np.where(largest == 0, 1, largest) / (2 ** (bits - 1) - 1)).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def require_calibration(calibration: Calibration | None, types: Types) -> Calibration | None:
    """The calibration of an int8 graph, at most `IMAGES` of its images; None for other types.

    Raises:
        ExportError: int8 without images, or with values that are not finite.
    """
    if types.storage != "int8":
        return None
    if calibration is None or not len(calibration.pixels):
        raise ExportError(
            "int8 needs images to calibrate on, got none; name some with --data, or export with "
            "--precision bf16 or fp32"
        )
    pixels, x_v, bias = calibration.pixels, calibration.x_v, calibration.bias
    for name, array in (("images", pixels), ("image features", x_v), ("tables", bias)):
        if not np.isfinite(array).all():
            raise ExportError(
                f"the {name} to calibrate int8 on hold NaN or infinite values; "
                "export with --precision fp32 to see which"
            )
    shared = bias.shape[1] == 1
    return replace(
        calibration,
        pixels=pixels[:IMAGES],
        x_v=x_v[:IMAGES],
        bias=bias if shared else bias[:, :IMAGES],
    )


def loop_ranges(lowered: Lowered, calibration: Calibration) -> dict[str, Range]:
    """The range of the input of each product in the loop, over all steps, images and samples.

    The products are those that every step makes, by the name of their `Matrix` in the step. What is
    multiplied once per image (the condition, the last estimate) stays float.
    """
    step = lowered.step(torch.float32)
    samples = calibration.bias.shape[2]
    images = min(len(calibration.x_v), max(1, IMAGES // samples))
    tables = Tables(calibration.coefficients, calibration.bias).at_least_two_steps()
    coefficients = torch.from_numpy(tables.coefficients)
    with torch.inference_mode():
        repeated = _used_by_gain(lowered)
        with _watched(step, Matrix) as (seen, _):
            for i in range(0, images, _CHUNK):
                rows = np.arange(i, min(i + _CHUNK, images))
                x_v = torch.from_numpy(np.ascontiguousarray(calibration.x_v[rows]))
                ScriptedLoop(step)(x_v, coefficients, torch.from_numpy(tables.rows(rows).bias))
    found = {name: values for name, values in seen.items() if name in repeated}
    for name, values in found.items():
        if not np.isfinite([values.least, values.largest]).all():
            raise ExportError(
                f"the reverse chain's {name} takes values that are not finite on the images that "
                "int8 is calibrated on: its denoiser does not contract; train it again, or use "
                "fewer steps"
            )
    return found


def _used_by_gain(lowered: Lowered) -> set[str]:
    """The names of the matrices that every step but the last multiplies with."""
    step, row = lowered.step(torch.float32), torch.zeros(1, 1, lowered.row_width)
    q = step.condition(torch.zeros(1, lowered.image_width))
    with _watched(step, Matrix) as (seen, _):
        step.gain(torch.zeros(1, 1, step.width), q, row)
    return set(seen)


@contextmanager
def _watched(module: nn.Module, kinds: Any) -> Iterator[tuple[dict[str, Range], dict[str, int]]]:
    """Record the range of the input and the multiply-adds of each layer that runs, in order."""
    ranges: dict[str, Range] = {}
    sizes: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            least, largest = (float(v) for v in torch.aminmax(inputs[0]))
            before = ranges.get(name, Range(0.0, 0.0))
            # NumPy's keep NaN, Python's do not.
            ranges[name] = Range(
                float(np.minimum(before.least, least)), float(np.maximum(before.largest, largest))
            )
            sizes[name] = sizes.get(name, 0) + output.numel() * layer.weight[0].numel()

        return see

    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, kinds):
                stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield ranges, sizes


# The encoder

Layer = nn.Conv2d | nn.Linear
# What a runtime does in int8 too, behind a convolution.
_HAND_ON = (
    nn.BatchNorm2d | nn.Identity | nn.Dropout | nn.ReLU | nn.Hardtanh | nn.MaxPool2d | nn.ZeroPad2d
)


@torch.no_grad()
def corrected(
    encoder: nn.Module, pixels: Floats, *, kept: Collection[str] = (), kinds: Any = Layer
) -> nn.Module:
    """Copy an encoder with biases that undo, on average, what rounding its weights will do.

    A layer's sums move by its mean input times the errors of its weights. Nothing averages that out
    where means are far from zero, behind a ReLU, and weights are few, as in a depthwise
    convolution.

    Args:
        pixels: [N, 3, H, W], real images. kept: names of layers that stay float.
        kinds: of the layers that are corrected.
    """
    encoder = copy.deepcopy(encoder)
    moved: dict[Layer, list[Tensor]] = {}

    def watch(layer: Layer, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        lost = _product(layer, inputs[0], layer.weight - _rounded(layer.weight))
        moved.setdefault(layer, []).append(lost.mean([0, 2, 3] if lost.ndim == 4 else [0]))

    with ExitStack() as stack:
        for name, layer in encoder.named_modules():
            if isinstance(layer, kinds) and not any(_is(name, other) for other in kept):
                stack.callback(layer.register_forward_hook(watch).remove)  # type: ignore[arg-type]
        _run(encoder, pixels[:_CORRECTED_ON])
    for layer, means in moved.items():
        bias = torch.stack(means).mean(0) + (0 if layer.bias is None else layer.bias)
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return encoder


def _is(name: str, layer: str) -> bool:
    """Tell whether `name` is the layer's, or ends in it because the encoder was wrapped."""
    return f".{name}".endswith(f".{layer}")


def _product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a layer to x without its bias, with another weight: [B, O, H, W] or [B, O]."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight).flatten(0, -2)
    more: Any = layer.stride, layer.padding, layer.dilation, layer.groups
    return F.conv2d(x, weight, None, *more)


def _rounded(weight: Tensor) -> Tensor:
    stored, scale = quantised_rows(weight.numpy())
    return torch.from_numpy(stored * scale)


def _run(encoder: nn.Module, pixels: Floats) -> Tensor:
    batches = torch.from_numpy(np.ascontiguousarray(pixels)).split(_BATCH)
    return torch.cat([encoder(batch) for batch in batches])


def _sources(encoder: nn.Module, pixels: Floats) -> dict[nn.Module, nn.Module]:
    """Find for each module without children the module whose output it reads, if there is one."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # a tensor that is kept keeps its id
    found: dict[nn.Module, nn.Module] = {}

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and id(inputs[0]) in made:
            found[module] = made[id(inputs[0])][0]
        if isinstance(output, Tensor):
            made[id(output)] = module, output

    with ExitStack() as stack:
        for module in encoder.modules():
            if not list(module.children()):
                stack.callback(module.register_forward_hook(see).remove)
        _run(encoder, pixels[:2])
    return found


@dataclass(frozen=True)
class Block:
    """Layers of an encoder that stay float together."""

    name: str
    layers: tuple[str, ...]
    share: float  # of the encoder's multiply-adds
    error: float  # relative, of the features, where this block alone is int8


@torch.no_grad()
def ranked(encoder: nn.Module, pixels: Floats) -> list[Block]:
    """The blocks of an encoder, the one that int8 hurts most first.

    Args:
        pixels: [N, 3, H, W], real images.
    """
    fixed, encoder = corrected(encoder, pixels), copy.deepcopy(encoder)
    pixels = pixels[:_RANKED_ON]
    with _watched(encoder, Layer) as (ranges, sizes):
        want = _run(encoder, pixels)
    before = _convolutions_before(encoder, pixels)
    found = []
    for name, layers in _blocks(list(ranges)).items():
        with ExitStack() as stack:
            for layer in layers:
                pair = encoder.get_submodule(layer), fixed.get_submodule(layer)
                stack.enter_context(_in_int8(*pair, ranges[layer]))
            error = float((_run(encoder, pixels) - want).norm() / want.norm())
        together = dict.fromkeys((*layers, *(before[n] for n in layers if n in before)))
        share = sum(sizes[n] for n in together) / sum(sizes.values())
        found.append(Block(name, tuple(together), share, error))
    return sorted(found, key=lambda block: -block.error)


def to_keep(blocks: Sequence[Block], ratio: float) -> list[Sequence[Block]]:
    """Choose which of the `ranked` blocks to keep float, in one or two tries.

    First as few as will likely bring the error down to `ratio` of what it is, as the errors of
    blocks add up like noise; then as many as may be.
    """
    errors, shares = (np.array([getattr(b, name) for b in blocks]) for name in ("error", "share"))
    most = int((np.cumsum(shares) <= MOST_KEPT).sum())
    rest = np.sqrt(np.cumsum(errors[::-1] ** 2)[::-1])  # of the blocks from each on
    enough = next((n for n in range(1, most) if rest[n] <= ratio * rest[0]), most)
    return [blocks[:count] for count in sorted({enough, most}) if count]


def _convolutions_before(encoder: nn.Module, pixels: Floats) -> dict[str, str]:
    """Find for each convolution the one that it reads, which rounds what it gives in int8."""
    names = {module: name for name, module in encoder.named_modules()}
    sources, found = _sources(encoder, pixels), {}
    for module, source in sources.items():
        while isinstance(source, _HAND_ON) and source in sources:
            source = sources[source]
        if isinstance(module, nn.Conv2d) and isinstance(source, nn.Conv2d):
            found[names[module]] = names[source]
    return found


def _blocks(layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layers by the first so many parts of their names: the fewest that tell `_BLOCKS` apart."""
    found: dict[str, list[str]] = {}
    for depth in range(1, max(name.count(".") for name in layers) + 2):
        found = {}
        for name in layers:
            found.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(found) >= _BLOCKS:
            break
    return {name: tuple(names) for name, names in found.items()}


@contextmanager
def _in_int8(layer: nn.Module, fixed: nn.Module, values: Range) -> Iterator[None]:
    """Inside, a layer has rounded weights, its corrected bias, and inputs on a range's steps."""
    assert isinstance(layer, Layer)
    assert isinstance(fixed, Layer)
    steps = values.scale, values.zero_point, 0, LEVELS - 1
    parameters = layer._parameters  # a bias may be None here, and a parameter there
    before = dict(parameters)
    parameters |= {"weight": nn.Parameter(_rounded(fixed.weight)), "bias": fixed.bias}
    handle = layer.register_forward_pre_hook(
        lambda _, inputs: (torch.fake_quantize_per_tensor_affine(inputs[0], *steps),)
    )
    try:
        yield
    finally:
        handle.remove()
        parameters |= before


def kept_nodes(
    factors: Mapping[str, NDArray], encoder: nn.Module, kept: Collection[str]
) -> list[str]:
    """The products of a graph that layers became, which are known by the directions of their rows.

    Names are lost where batch normalisation is folded, which only scales rows.

    Args:
        factors: of the graph's products, by name. kept: names of layers of the encoder.
    """
    layers = [(n, m) for n, m in encoder.named_modules() if any(_is(n, k) for k in kept)]
    found: list[str] = []
    for name, layer in layers:
        assert isinstance(layer, Layer)
        weight = layer.weight.detach().numpy()
        made = [node for node, factor in factors.items() if _same_rows(factor, weight)]
        if not made and name in kept:  # where a wrapped encoder ends early, it need not be there
            raise ExportError(
                f"{name} shall stay float, but no product of the graph is known to be its; "
                "export with --precision bf16 or fp32"
            )
        found += made
    return found


def _same_rows(factor: NDArray, weight: NDArray) -> bool:
    """Tell whether a graph's factor has the rows of a weight [O, ...], each times any number."""
    if factor.size != weight.size:
        return False
    want = weight.reshape(len(weight), -1)
    for rows in (factor.reshape(want.shape), factor.T.reshape(want.shape)):
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(want, axis=1)
        if (np.abs((rows * want).sum(1)) >= 0.9999 * lengths).all():
            return True
    return False

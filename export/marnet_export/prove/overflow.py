"""Will the numbers of a model fit the types it is to be built in? Asked before anything is built.

A matrix is stored in 16 bits; and where products are computed in fp16, so are their factors and
results, all the activations in between. fp16 ends at 65,504. bf16 reaches as far as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from marnet_export.build.types import TORCH_TYPES, Calibration
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import ScriptedLoop
from marnet_sdk.errors import ExportError

MARGIN = 4.0  # other images than those that were tried may need so many times their range
MOST_IMAGES = 64


def check_weights(lowered: Lowered, storage: str) -> None:
    """Refuse matrices that the storage type cannot hold."""
    if storage not in TORCH_TYPES:
        return  # int8 has a scale for each row
    largest = torch.finfo(TORCH_TYPES[storage]).max
    for name, value in _weights(lowered):
        if not value <= largest:  # NaN too
            raise ExportError(
                f"{name} holds {value:.4g}, beyond the largest {storage} value ({largest:.4g}); "
                "use --precision bf16 or fp32"
            )


def _weights(lowered: Lowered) -> Iterator[tuple[str, float]]:
    """The largest value of every matrix."""
    parts = {"encoder": lowered.encoder, "head": lowered.head, "text": lowered.text}
    for part, module in parts.items():
        for name, tensor in module.named_parameters() if module is not None else ():
            if tensor.ndim >= 2 and tensor.numel():  # DINOv3 without registers has an empty one
                yield f"{part}.{name}", float(tensor.detach().abs().max())
    for name, matrix in lowered.plan.matrices().items():
        yield f"loop.{name}", float(abs(matrix).max())


@dataclass(frozen=True)
class Headroom:
    """The largest number that a product read or gave on the images that were tried."""

    layer: str
    largest: float
    limit: float  # of the type
    images: int

    @property
    def is_tight(self) -> bool:
        """Tell whether images that were not tried might well go beyond the limit."""
        return self.largest * MARGIN > self.limit

    def sentence(self) -> str:
        """Say in one line how much headroom there is, for `marnet-export`."""
        found = (
            f"largest activation on {self.images} images: {self.largest:.4g} at {self.layer}; "
            f"fp16 holds up to {self.limit:,.0f}"
        )
        if not self.is_tight:
            return found
        return f"{found}, which other images may exceed; --precision bf16 has no such limit"


def check_activations(lowered: Lowered, calibration: Calibration, compute: str) -> Headroom | None:
    """Run the float32 graphs on real images, all steps of the loop, and refuse what overflows.

    It looks at the graphs as they are lowered, since a rewritten loop has other activations than
    the one that was trained: at both factors and the result of every product, before its bias.

    Returns:
        The headroom; None where products are not computed in fp16.

    Raises:
        ExportError: names the first layer that goes beyond the type.
    """
    if compute != "fp16":
        return None
    limit = torch.finfo(TORCH_TYPES[compute]).max
    found: dict[str, float] = {}
    count = min(MOST_IMAGES, len(calibration.pixels))
    with torch.inference_mode():
        for start in range(0, count, 16):
            rows = slice(start, min(start + 16, count))
            _run(lowered, calibration, rows, found)
    for layer, largest in found.items():
        if not largest <= limit:  # NaN too
            raise ExportError(
                f"{layer} reaches {largest:.4g} on {count} images, beyond the largest {compute} "
                f"value ({limit:.4g}): its products cannot be computed in {compute}; use "
                "--precision bf16 or fp32"
            )
    layer = max(found, key=lambda name: found[name])
    return Headroom(layer, found[layer], limit, count)


def _run(lowered: Lowered, calibration: Calibration, rows: slice, found: dict[str, float]) -> None:
    """Encoder, loop and head of some images; `found` collects the largest value by layer."""
    loop = ScriptedLoop(lowered.step(torch.float32))
    with watch_products({"encoder": lowered.encoder, "loop": loop, "head": lowered.head}, found):
        x_v = lowered.encoder(torch.from_numpy(calibration.pixels[rows]))
        bias = calibration.bias if calibration.bias.shape[1] == 1 else calibration.bias[:, rows]
        tables = (torch.from_numpy(table) for table in (calibration.coefficients, bias.copy()))
        lowered.head(x_v, loop(x_v, *tables))


@contextmanager
def watch_products(modules: Mapping[str, nn.Module], found: dict[str, float]) -> Iterator[None]:
    """Keep the largest factor and result of every product inside the modules, by layer."""
    inside: list[str] = []  # the modules that are at work, outermost first

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for part, module in modules.items():
            for name, child in module.named_modules(prefix=part):
                stack.callback(child.register_forward_pre_hook(enter(name)).remove)
                stack.callback(child.register_forward_hook(leave).remove)
        stack.enter_context(_Watch(inside, found))
        yield


class _Watch(TorchFunctionMode):
    def __init__(self, inside: list[str], found: dict[str, float]) -> None:
        super().__init__()
        self.inside, self.found = inside, found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.inside and (read := _READERS.get(func)):
            layer, numbers = self.inside[-1], read(result, *args, **kwargs)
            largest = torch.stack([tensor.detach().abs().max() for tensor in numbers])
            before = torch.tensor(self.found.get(layer, 0.0))
            self.found[layer] = float(torch.maximum(largest.max(), before))  # keeps NaN
        return result


Reader = Callable[..., list[Tensor]]


def _linear(
    result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    return [input, result if bias is None else result - bias]


def _convolution(
    result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> list[Tensor]:
    return [input, result if bias is None else result - bias[:, None, None]]


def _matmul(result: Tensor, *factors: Tensor, **named: Tensor) -> list[Tensor]:
    return [result, *factors, *named.values()]


def _attention(
    result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> list[Tensor]:
    heads = query.shape[-3] // key.shape[-3] if options.get("enable_gqa") else 1
    scale = options.get("scale") or query.shape[-1] ** -0.5
    scores = scale * query @ key.repeat_interleave(heads, dim=-3).transpose(-2, -1)
    return [query, key, value, scores, result]


_READERS: dict[Any, Reader] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    torch.conv2d: _convolution,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    F.scaled_dot_product_attention: _attention,
}

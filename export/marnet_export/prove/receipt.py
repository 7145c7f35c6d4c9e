"""The receipt: in which types the multiply-adds of a built bundle are stored and computed.

It is read from what was built (`products` of each builder), never from what was asked for, and an
export that did not deliver what was asked is refused. Where what was built cannot be read, it says
so; the multiply-adds are then those of the model, and its answers, which are compared with the
checkpoint's, are the proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from marnet_export.build.types import Product, Types
from marnet_export.lower.methods import Lowered
from marnet_export.lower.modules import Refine, ScriptedLoop
from marnet_sdk.alignment import read_head
from marnet_sdk.bundle import Share
from marnet_sdk.errors import VerificationFailed

# Share of a part's multiply-adds, of those that have weights, that must be in the types that were
# asked for. Not all: small products and the first convolution stay in higher types on purpose.
DELIVERED = 0.9
NOT_READ = "not read back"  # the type of products that nothing could read
ACTIVATION = "activation"  # the storage of a product of which no factor is a weight


def receipt(products: Sequence[Product], steps: int, samples: int) -> dict[str, Share]:
    """The share of multiply-adds of each type, of one image, by part and of "all".

    Args:
        steps, samples: S and K of the operating point that answers.
    """
    # The last step is behind the loop: its estimate is the answer, which the head reads.
    times = {"encoder": 1, "loop": max(steps - 1, 0) * samples, "head": samples}
    parts = {part: [p for p in products if p.part == part] for part, n in times.items() if n}
    found = {part: _share(mine, times) for part, mine in parts.items() if mine}
    return found | {"all": _share(products, times)}


def _share(products: Sequence[Product], times: Mapping[str, int]) -> Share:
    counts = [p.multiply_adds * times[p.part] for p in products]
    total = sum(counts)

    def by(kind: str) -> dict[str, float]:
        sums: dict[str, int] = {}
        for product, count in zip(products, counts, strict=True):
            name = getattr(product, kind)
            sums[name] = sums.get(name, 0) + count
        return {name: round(count / total, 6) for name, count in sorted(sums.items())}

    return Share(total, by("storage"), by("compute"))


@torch.no_grad()
def count_products(lowered: Lowered, shape: tuple[int, int, int]) -> list[Product]:
    """The multiply-adds of each part of a model, by torch's own counter; types are not read back.

    Args:
        shape: of an image, (3, H, W).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # only where something cannot be read
    from torch.utils.flop_counter import FlopCounterMode

    def multiply_adds(module: nn.Module, *given: Tensor) -> int:
        # The counter does not know the CPU's own kernel of attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*given)
        return counter.get_total_flops() // 2

    refine = Refine(ScriptedLoop(lowered.step(torch.float32)).eval(), lowered.head)
    x_v = torch.zeros(1, lowered.image_width)
    once, twice = (
        multiply_adds(refine, x_v, torch.zeros(n, 3), torch.zeros(n, 1, 1, lowered.row_width))
        for n in (1, 2)
    )
    counts = {
        "encoder": multiply_adds(lowered.encoder, torch.zeros(1, *shape)),
        "loop": twice - once,
        "head": once,
    }
    return [Product(part, part, count, NOT_READ, NOT_READ) for part, count in counts.items()]


def answering(products: Sequence[Product], payload: Path, steps: int) -> list[Product]:
    """The products of a payload that one answer takes: without a step, another head than the
    loop's, and no loop."""
    head = None if steps else read_head(payload)
    if head is None:
        return list(products)
    own = [
        Product("head", name, weight.size, "fp32", "fp32")
        for name, weight in (
            ("alignment.vision", head.vision_weight),
            ("alignment.classifier", head.classifier_weight),
        )
    ]
    return [product for product in products if product.part == "encoder"] + own


def check_delivered(
    products: Sequence[Product], asked: Mapping[str, Types], backend: str, *, kept: float = 0.0
) -> None:
    """Refuse a payload whose products are not in the types that were asked for.

    Args:
        asked: types of "encoder" and "loop". kept: share of the encoder's multiply-adds that stay
            float, because int8 would hurt them most.

    Raises:
        VerificationFailed: names the part, what was asked and what it has.
    """
    for part, types in asked.items():
        mine = [p for p in products if p.part == part and p.storage != ACTIVATION]
        if any(NOT_READ in (p.storage, p.compute) for p in mine):
            continue
        if not mine:
            raise VerificationFailed(
                f"{backend}: no product of the {part} was found in what was built, so nothing "
                "proves its precision; no bundle was written"
            )
        compute = "int8" if types.storage == "int8" else types.compute
        share, least = _share(mine, {part: 1}), DELIVERED - (kept if part == "encoder" else 0.0)
        if share.storage.get(types.storage, 0.0) < least or share.compute.get(compute, 0.0) < least:
            raise VerificationFailed(
                f"{backend}: the {part} was asked to be stored in {types.storage} and multiplied "
                f"in {compute}, but what was built stores {_percent(share.storage)} and multiplies "
                f"in {_percent(share.compute)}; no bundle was written. Try another --precision or "
                "--backend"
            )


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())

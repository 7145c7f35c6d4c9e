"""A method gives the builders what is defined here. Nothing behind this file knows how a model is
trained.

A method is registered by its name in config.json: its model class in `marnet_train.models.METHODS`,
and the function that lowers such a model in `LOWERINGS`. The model itself is the float32 reference
that every export is held to (`fidelity.Reference`); what that needs of it:
    config.labels, config.schedule, config.method
    vision(pixels [B, 3, H, W]) -> features; see(features) -> x_v [B, D_v];  latent_width, D
    refine(x_v, table, initial, noise, watch) -> x_CDR [B, D], the loop as the paper writes it
    head(x_v, x_CDR) -> logits [B, C], features [B, D_f]
and, if its `Lowered.alignment` has a classifier, what answers without the loop:
    align_vision(x_v) -> x_EMA [B, D];  alignment_classifier(x_EMA) -> logits [B, C]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from marnet_export.lower.branches import with_merged_branches
from marnet_export.lower.class_token import for_class_token
from marnet_export.lower.modules import Head, PlanStep, Step
from marnet_export.lower.plan import SamplingPlan, make_plan
from marnet_sdk.errors import ExportError
from marnet_train.diffusion import SamplerTable
from marnet_train.models.marnet import MARNet

Floats = NDArray[np.float32]


class Plan(Protocol):
    """This says how a method's reverse loop is run. See `SamplingPlan`, which is MARNet's."""

    def tensors(self, tables: dict[str, SamplerTable]) -> dict[str, NDArray]:
        """Return plan.safetensors, of which `marnet_sdk.noise.tables.make_tables` makes the loop's
        tables.
        """
        ...

    def matrices(self) -> dict[str, NDArray[np.float64]]:
        """The factors of the loop's products, by name."""
        ...

    def sentence(self, table: SamplerTable, samples: int = 1) -> str:
        """Say in one line what the loop costs."""
        ...

    def noise_cost(self, table: SamplerTable) -> str:
        """Say in one line what noise keyed by the image costs."""
        ...

    def explain(self, compute: str) -> list[tuple[str, str, str]]:
        """Rows (what, as the network is written, as it is run)."""
        ...


@dataclass(frozen=True, eq=False)
class Alignment:
    """The projections into the space in which images and texts are compared, eq. (7)-(8), and what
    classifies there."""

    vision: tuple[Floats, Floats]  # [D, D_v], [D]
    text: tuple[Floats, Floats]  # [D, D_s], [D]
    classifier: tuple[Floats, Floats] | None = None  # [C, D], [C]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A model, ready to be built."""

    encoder: nn.Module  # pixels [B, 3, H, W] -> x_v [B, D_v]
    plan: Plan
    step: Callable[[torch.dtype], Step]  # the loop's step, with products of this type
    head: nn.Module  # x_v [B, D_v], x_CDR [B, K, D] -> logits [B, K, C], features [B, K, D_f]
    image_width: int  # D_v
    latent_width: int  # D
    row_width: int  # R, of the loop's table
    text: nn.Module | None = None  # ids, mask int64 [B, L] -> x_s [B, D_s]
    alignment: Alignment | None = None


def lower_marnet(model: MARNet, plan: SamplingPlan | None = None) -> Lowered:
    """MARNet as it is deployed.

    Args:
        plan: a rewrite of the model's loop; None: the one that multiplies least.
    """
    plan = make_plan(model) if plan is None else plan
    return Lowered(
        encoder=for_class_token(with_merged_branches(model.vision.eval())),
        plan=plan,
        step=lambda compute: PlanStep(plan, compute).eval(),
        head=Head(model).eval(),
        image_width=model.vision.dim,
        latent_width=model.latent_width,
        row_width=len(plan.input_weight),
        text=model.text.eval(),
        alignment=Alignment(
            vision=_weights(model.project_vision),
            text=_weights(model.project_text),
            classifier=_weights(model.alignment_classifier),
        ),
    )


def _weights(layer: nn.Linear) -> tuple[Floats, Floats]:
    weight, bias = (p.detach().float().numpy().copy() for p in (layer.weight, layer.bias))
    return weight, bias


def _lower_seda(model: Any) -> Lowered:
    from marnet_export.lower.seda import lower_seda  # it is built of what is above

    return lower_seda(model)


LOWERINGS: dict[str, Callable[[Any], Lowered]] = {"marnet": lower_marnet, "seda": _lower_seda}


def lower(model: Any, lowerings: Mapping[str, Callable[[Any], Lowered]] = LOWERINGS) -> Lowered:
    """Lower a model by its method.

    Raises:
        ExportError: this version cannot export the method, or the model is broken.
    """
    method = model.config.method
    if method not in lowerings:
        raise ExportError(
            f"method {method!r} can be trained but not exported by this version, which exports "
            f"{', '.join(sorted(lowerings))}; upgrade marnet"
        )
    return lowerings[method](model)

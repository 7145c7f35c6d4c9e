"""The sampling plan: the reverse loop of MARNet, rewritten once, in float64, for every backend.

The denoiser as the paper writes it, with a = LeakyReLU and c the standardised image features:
    h1 = a(Wx x + Wc c + Wt tau(t) + b1),  h2 = a(W2 h1 + b2),  h3 = a(W3 h2 + b3),
    x0 = W4 h3 + b4,   x_next = A x + B x0 + C x0_previous + S z .
Three exact rewrites:
  hoisting      q = Wc c is computed once per image; Wt tau(t) + b1 is a table, a row per step.
  recurrence    between x0 and the next h1 everything is linear, so the loop can carry u = Wx x
                (width H) instead of x (width D): with M = Wx W4, m = Wx b4,
                u_next = A u + B (M h3 + m) + C (previous) + S (Wx z).  Three H x H products a step.
  trajectories  one noise trajectory for all images; Wx z is a table too.
Axes: S steps, D feature, H hidden, W carried state (H or D), N images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from marnet_sdk.errors import ExportError
from marnet_sdk.trajectory import NoiseTrajectory
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import MARNet

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingPlan:
    """One reverse loop. The carried state is u = Wx x ("hidden") or x itself ("feature")."""

    carry: str
    table: SamplerTable
    time_bias: Array  # [S, H]
    standardise: tuple[Array, Array]  # mean and standard deviation of x_v, [D_v] each
    condition_weight: Array  # [H, D_v]: Wc, from standardised x_v to q
    input_weight: Array  # [H, D]: Wx
    hidden2: tuple[Array, Array]  # [H, H], [H]
    hidden3: tuple[Array, Array]
    carry_weight: tuple[Array, Array]  # [W, H], [W]: from h3 to what the state gains
    output: tuple[Array, Array]  # [D, H], [D]

    time_dim: int  # E, of the network before the rewrite

    @property
    def sentence(self) -> str:
        """What `marnet-export` says about the plan, in one line."""
        return (
            f"reverse loop: {len(self.table.timesteps)} {self.table.sampler} steps, the "
            f"{self.carry} state carried, {self.multiply_adds / 1e6:.3g} M multiply-adds a step "
            f"instead of {self.plain_multiply_adds / 1e6:.3g} M"
        )

    @property
    def plain_multiply_adds(self) -> int:
        """Per image and step, for the network as the paper writes it (tau(t) given)."""
        hidden, dim = self.input_weight.shape
        condition = self.condition_weight.shape[1]
        return hidden * (dim + condition + self.time_dim + 2 * hidden + dim)

    @property
    def multiply_adds(self) -> int:
        """Per image and step, inside the loop."""
        hidden = self.input_weight.shape[0]
        into = 0 if self.carry == "hidden" else self.input_weight.size
        return into + 2 * hidden * hidden + self.carry_weight[0].size

    def matrices(self) -> dict[str, Array]:
        """The factors of the loop's products, which a bundle may store in 16 bits."""
        found = {
            "condition": self.condition_weight,
            "hidden2": self.hidden2[0],
            "hidden3": self.hidden3[0],
            "carry": self.carry_weight[0],
            "output": self.output[0],
        }
        return found if self.carry == "hidden" else found | {"input": self.input_weight}

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The content of plan.safetensors: the tables, and Wx where noise has to be folded."""
        out = {"coefficients": self.table.coefficients, "time_bias": self.time_bias}
        if self.carry == "hidden":
            out["input_weight"] = self.input_weight
        return {k: np.ascontiguousarray(v, np.float32) for k, v in out.items()}


def make_plan(
    model: MARNet, sampler: str = "ddpm", steps: int | None = None, carry: str | None = None
) -> SamplingPlan:
    """Rewrite a model's reverse loop for a sampler of `steps` steps.

    Args:
        carry: "hidden" or "feature"; None counts multiply-adds and takes the cheaper.

    Raises:
        InvalidInput: an unknown sampler, or steps outside 1..T.
        ExportError: a weight or a rewritten table is not finite.
    """
    table = sampler_table(model.config.schedule, sampler, steps)
    denoiser = model.denoiser
    w_x, w_c, w_t = (_float64(w) for w in denoiser.split_input_weight())
    with torch.no_grad():
        time = copy.deepcopy(denoiser.time).double()
        tau = time(torch.tensor(table.timesteps)).cpu().numpy()  # [S, E]
    w4, b4 = _linear(denoiser.layer4)
    hidden, dim = w_x.shape
    if carry is None:
        carry = "hidden" if hidden * hidden < 2 * hidden * dim else "feature"
    plan = SamplingPlan(
        carry=carry,
        table=table,
        time_bias=tau @ w_t.T + _float64(denoiser.layer1.bias),
        # Not folded into Wc: where the mean is large beside the deviation, a product in 16 bits
        # would then cancel. It costs D_v operations per image, once.
        standardise=(_float64(model.vision_mean), _float64(model.vision_std)),
        condition_weight=w_c,
        input_weight=w_x,
        hidden2=_linear(denoiser.layer2),
        hidden3=_linear(denoiser.layer3),
        carry_weight=(w_x @ w4, w_x @ b4) if carry == "hidden" else (w4, b4),
        output=(w4, b4),
        time_dim=w_t.shape[1],
    )
    _check_finite(plan)
    return plan


def run_plan(plan: SamplingPlan, x_v: Array, noise: NoiseTrajectory) -> Array:
    """The plan in NumPy float64: the twin that every lowered loop is held to.

    Args:
        x_v: [N, D_v].
    Returns:
        x_CDR, [N, D].
    """

    def into(x: Array) -> Array:
        return x @ plan.input_weight.T

    def layer(x: Array, weights: tuple[Array, Array]) -> Array:
        y = x @ weights[0].T + weights[1]
        return np.maximum(y, LEAKY_SLOPE * y)

    hidden_carry = plan.carry == "hidden"
    mean, std = plan.standardise
    q = (x_v - mean) / std @ plan.condition_weight.T  # [N, H]
    start = into(noise.initial) if hidden_carry else noise.initial
    state = np.tile(start, (len(x_v), 1))  # [N, W]
    steps = into(noise.steps) if hidden_carry else noise.steps
    previous = np.zeros_like(state)
    h3 = q
    for i, (a, b, c, s) in enumerate(plan.table.coefficients):
        y = (state if hidden_carry else into(state)) + q + plan.time_bias[i]
        h3 = layer(layer(np.maximum(y, LEAKY_SLOPE * y), plan.hidden2), plan.hidden3)
        gained = h3 @ plan.carry_weight[0].T + plan.carry_weight[1]
        state = a * state + b * gained + c * previous + s * steps[i]
        previous = gained
    return h3 @ plan.output[0].T + plan.output[1]


def _float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def _linear(layer: torch.nn.Linear) -> tuple[Array, Array]:
    return _float64(layer.weight), _float64(layer.bias)


def _check_finite(plan: SamplingPlan) -> None:
    arrays = {
        "coefficients": (plan.table.coefficients,),
        "time_bias": (plan.time_bias,),
        "standardise": plan.standardise,
        "condition_weight": (plan.condition_weight,),
        "input_weight": (plan.input_weight,),
        "hidden2": plan.hidden2,
        "hidden3": plan.hidden3,
        "carry_weight": plan.carry_weight,
        "output": plan.output,
    }
    for name, parts in arrays.items():
        if not all(np.isfinite(part).all() for part in parts):
            raise ExportError(
                f"the sampling plan's {name} holds NaN or infinite values, so the checkpoint's "
                "denoiser is broken; train it again"
            )

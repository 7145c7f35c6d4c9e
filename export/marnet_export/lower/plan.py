"""The sampling plan: the reverse loop of MARNet, rewritten once, in float64, for every backend.

The denoiser as the paper writes it, with a = LeakyReLU and c the standardised image features:
    h1 = a(Wx x + Wc c + Wt tau(t) + b1),  h2 = a(W2 h1 + b2),  h3 = a(W3 h2 + b3),
    x0 = W4 h3 + b4,   x_next = A x + B x0 + C x0_previous + S z .
As it is run, with q = Wc c, M = Wx W4, and bias_i of `trajectory.fold` in `marnet_sdk.noise`, which
holds time, noise and b4:
    h1 = a(p + q + bias_i),  h2 and h3 as above,  g = M h3,  p_next = A p + B g + C g_previous .
A progressive denoiser also has Wp r in its h1, with r = x0_previous. For it, the loop carries
f = Mp h3_previous + Wp b4 beside p, with Mp = Wp W4, and zero in the first step:
    h1 = a(p + f + q + bias_i) .
A chain may start from more than noise, x_T = n eps + c, where c depends on the image. Then p is
Wx c at first, and not zero. `fold` is given its arrays in units of n, so that its noise is eps.
docs/how-it-works.md derives it. A, B, C and bias are inputs: the plan knows no sampler or steps.
Axes: T train steps, S sampling steps, K noise samples, D feature, H hidden, W carried state (H or
D, and H more for f), N images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marnet_sdk.errors import ExportError
from marnet_train.diffusion import SamplerTable
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet

Array = NDArray[np.float64]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class SamplingPlan:
    """One reverse loop. The carried state is Wx p ("hidden") or p itself ("feature").

    In a progressive loop f follows it in the state.
    """

    carry: str
    time_bias: Array  # [T, H], Wt tau(t) + b1 of t = 1..T
    standardise: tuple[Array, Array]  # mean and standard deviation of x_v, [D_v] each
    condition_weight: Array  # [H, D_v]: Wc, from standardised x_v to q
    input_weight: Array  # [H, D]: Wx
    hidden2: tuple[Array, Array]  # [H, H], [H]
    hidden3: tuple[Array, Array]
    carry_weight: Array  # [W, H]: from h3 to what the state gains, M or W4; and Mp to f
    output: tuple[Array, Array]  # [D, H], [D]: W4, b4
    time_dim: int  # E, of the network before the rewrite
    carry_bias: Array | None = None  # [W] of a progressive loop: zeros, and Wp b4
    start_weight: Array | None = None  # [W, D]: from c, which follows x_v, to the first state
    start_noise: float = 1.0  # standard deviation of the noise that x_T has

    @property
    def fed(self) -> int:
        """Return the width of f, at the end of the state; 0 where the loop is not progressive."""
        return 0 if self.carry_bias is None else len(self.input_weight)

    @property
    def plain_multiply_adds(self) -> int:
        """Count the multiply-adds per image and step, for the network as the paper writes it
        (tau(t) given).
        """
        hidden, dim = self.input_weight.shape
        condition, estimate = self.condition_weight.shape[1], dim if self.fed else 0
        return hidden * (dim + estimate + condition + self.time_dim + 2 * hidden + dim)

    @property
    def multiply_adds(self) -> int:
        """Count the multiply-adds per image and step, inside the loop."""
        hidden = self.input_weight.shape[0]
        into = 0 if self.carry == "hidden" else self.input_weight.size
        return into + 2 * hidden * hidden + self.carry_weight.size

    @property
    def multiply_adds_before(self) -> int:
        """Count the multiply-adds per image before the loop: of the condition, and of the start."""
        start = 0 if self.start_weight is None else self.start_weight.size
        return self.condition_weight.size + start

    @property
    def products(self) -> int:
        """Matrix products of a step that wait for one another."""
        return 3 if self.carry == "hidden" else 4

    def sentence(self, table: SamplerTable, samples: int = 1) -> str:
        """Say in one line what the plan costs, for `marnet-export`."""
        steps = len(table.timesteps)
        chains = f", {samples} chains an image" if samples > 1 else ""
        before = " and the estimate before" if self.fed else ""
        return (
            f"reverse loop: {steps} {table.sampler} step{'s' if steps > 1 else ''}{chains}, the "
            f"{self.carry} state{before} carried, {self.multiply_adds / 1e6:.3g} M multiply-adds "
            f"a step instead of {self.plain_multiply_adds / 1e6:.3g} M"
        )

    def explain(self, compute: str) -> list[tuple[str, str, str]]:
        """Rows (what, as the network is written, as it is run) for `marnet-export --explain`.

        Args:
            compute: the type that matrices are multiplied in.
        """
        hidden, dim = self.input_weight.shape
        size = _BYTES[compute]
        before, after = self.plain_multiply_adds, self.multiply_adds
        before_loop = self.multiply_adds_before
        plain_state, state = 4 * 2 * dim, 4 * 2 * self.carry_weight.shape[0]
        return [
            ("multiply-adds, per image and step", f"{before:,}", f"{after:,}"),
            ("weights read, bytes per step", f"{before * size:,}", f"{after * size:,}"),
            # noise z and tau(t); now one row of the table, and the coefficients
            (
                "tables read, bytes per step",
                f"{4 * (dim + self.time_dim + 4):,}",
                f"{4 * (hidden + 3):,}",
            ),
            ("state kept, bytes per image", f"{plain_state:,}", f"{state:,}"),
            ("matrix products one after another, per step", "4", str(self.products)),
            ("multiply-adds before the loop, per image", "0", f"{before_loop:,}"),
        ]

    def noise_cost(self, table: SamplerTable) -> str:
        """Say in one line what noise keyed by the image costs over shared noise."""
        hidden, dim = self.input_weight.shape
        noisy = int((table.coefficients[:, 3] != 0).sum())
        rows = len(table.timesteps)
        return (
            f"noise keyed by image: {(noisy + 1) * dim:,} normals and {rows * hidden * dim:,} "
            "float64 multiply-adds for each image, on top of the "
            f"{rows * self.multiply_adds:,} of its loop; shared noise costs neither"
        )

    def matrices(self) -> dict[str, Array]:
        """The factors of the loop's products, which a bundle may store in 16 bits."""
        found = {
            "condition": self.condition_weight,
            "hidden2": self.hidden2[0],
            "hidden3": self.hidden3[0],
            "carry": self.carry_weight,
            "output": self.output[0],
        }
        if self.start_weight is not None:
            found["start"] = self.start_weight
        return found if self.carry == "hidden" else found | {"input": self.input_weight}

    def tensors(self, tables: dict[str, SamplerTable]) -> dict[str, NDArray]:
        """The content of plan.safetensors: what `marnet_sdk.noise.tables.make_tables` folds, whose
        unit is the deviation of the noise of x_T.

        Args:
            tables: the sampler of each operating point.
        """
        arrays: dict[str, NDArray] = {
            "time_bias": self.time_bias,
            "input_weight": self.start_noise * self.input_weight,
            "output_bias": self.output[1] / self.start_noise,
        }
        out: dict[str, NDArray] = {
            name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()
        }
        for name, table in tables.items():
            out[f"coefficients.{name}"] = table.coefficients / [1, 1, 1, self.start_noise]
        return out


def make_plan(model: MARNet, carry: str | None = None) -> SamplingPlan:
    """Rewrite a model's reverse loop.

    Args:
        carry: "hidden" or "feature"; None counts multiply-adds and takes the cheaper.
    """
    standardise = (model.vision_mean, model.vision_std)
    return rewrite(model.denoiser, model.config.schedule.steps, standardise, carry)


def rewrite(
    denoiser: Denoiser,
    train_steps: int,
    standardise: tuple[Tensor, Tensor],
    carry: str | None = None,
) -> SamplingPlan:
    """Rewrite the reverse loop of a denoiser.

    Args:
        train_steps: T. standardise: mean and standard deviation of its condition, [D_c] each.
        carry: as of `make_plan`.
    """
    w_x, w_c, w_t = (_float64(w) for w in denoiser.split_input_weight())
    with torch.no_grad():
        time = copy.deepcopy(denoiser.time).double()
        tau = time(torch.arange(1, train_steps + 1)).cpu().numpy()  # [T, E]
    w4, b4 = _linear(denoiser.layer4)
    w_x, w_r = np.split(w_x, [denoiser.dim], axis=1)  # w_r [H, 0] unless progressive
    hidden, dim = w_x.shape
    if carry is None:
        carry = "hidden" if hidden * hidden < 2 * hidden * dim else "feature"
    carry_weight, carry_bias = w_x @ w4 if carry == "hidden" else w4, None
    if denoiser.progressive:
        carry_bias = np.concatenate([np.zeros(len(carry_weight)), w_r @ b4])
        carry_weight = np.concatenate([carry_weight, w_r @ w4])
    plan = SamplingPlan(
        carry=carry,
        time_bias=tau @ w_t.T + _float64(denoiser.layer1.bias),
        # Not folded into Wc: where the mean is large beside the deviation, a product in 16 bits
        # would then cancel. It costs D_v operations per image, once.
        standardise=(_float64(standardise[0]), _float64(standardise[1])),
        condition_weight=w_c,
        input_weight=w_x,
        hidden2=_linear(denoiser.layer2),
        hidden3=_linear(denoiser.layer3),
        carry_weight=carry_weight,
        output=(w4, b4),
        time_dim=w_t.shape[1],
        carry_bias=carry_bias,
    )
    _check_finite(plan)
    return plan


def check_step(values: Array | torch.Tensor, table: SamplerTable, step: int) -> None:
    """Refuse a chain that has left the finite numbers, by the step at which it did."""
    if not bool(abs(values).max() < np.inf):  # False for NaN too
        raise ExportError(
            f"the reverse chain holds NaN or infinity from step {step + 1} of "
            f"{len(table.timesteps)} on (t = {table.timesteps[step]}, {table.sampler}): "
            + (
                "its denoiser does not contract; train it again, or use fewer steps"
                if step
                else "one pass through its denoiser is enough, so its weights or the statistics "
                "that standardise its condition are damaged; train it again"
            )
        )


def _float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def _linear(layer: torch.nn.Linear) -> tuple[Array, Array]:
    return _float64(layer.weight), _float64(layer.bias)


def _check_finite(plan: SamplingPlan) -> None:
    for name, value in vars(plan).items():
        if name == "carry" or value is None:
            continue
        arrays = value if isinstance(value, tuple) else (value,)
        if not all(np.isfinite(array).all() for array in arrays):
            raise ExportError(
                f"the sampling plan's {name} holds NaN or infinite values, so the checkpoint's "
                "denoiser is broken; train it again"
            )

"""The plain reverse loop, x_v to logits, and the forms in which torch runs it.

"Plain" is the loop as the paper writes it: every step multiplies the concatenated [x ; c ; tau(t)]
by the whole first layer, then the three others, then applies the sampler's row. What any port
would prepare once is prepared: tau(t) of every step and the scaled noise are constants, and a term
that the sampler never uses is left out. The head behind the loop is the model's own. Other
frameworks are peers too, from a checkout: see `loop_peers`.
Axes: B batch, S steps, D feature, D_v encoder features, E time embedding, H hidden, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marnet_export.build.tracing import quiet
from marnet_export.lower.modules import Head
from marnet_sdk.errors import BackendUnavailable
from marnet_sdk.noise.tables import Floats
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.diffusion import SamplerTable, sampler_table
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import MARNet

Logits = Callable[[Floats], Floats]  # x_v [B, D_v] -> logits [B, C]
PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a sampler and the noise of one trajectory: the same for every candidate."""

    model: MARNet
    table: SamplerTable
    seed: int = 0

    @cached_property
    def initial(self) -> Tensor:
        """Return x_T, [1, D]."""
        return self._noise[0]

    @cached_property
    def noise(self) -> Tensor:
        """Return z of every step, [S, 1, D]."""
        return self._noise[1]

    @cached_property
    def _noise(self) -> tuple[Tensor, Tensor]:
        table, dim = self.table, self.model.denoiser.dim
        drawn = draw_trajectory(self.seed, table.timesteps, table.train_steps, dim)
        initial = torch.from_numpy(drawn.initial).float()[None]
        return initial, torch.from_numpy(drawn.steps).float()[:, None]

    @cached_property
    def tau(self) -> Tensor:
        """The time embedding of every step, [S, E]."""
        with torch.no_grad():
            return self.model.denoiser.time(torch.tensor(self.table.timesteps))

    @property
    def second_order(self) -> bool:
        """Tell whether any step uses the estimate of the one before."""
        return bool(self.table.coefficients[:, 2].any())

    @property
    def scaled_noise(self) -> Tensor:
        """S_i z_i, [S, 1, D]."""
        scale = torch.from_numpy(self.table.coefficients[:, 3]).float()
        return self.noise * scale[:, None, None]


def make_problem(model: MARNet, sampler: str, steps: int, seed: int = 0) -> Problem:
    """The loop of a model with a sampler of so many steps."""
    return Problem(model.eval(), sampler_table(model.config.schedule, sampler, steps), seed)


def reference(problem: Problem) -> Logits:
    """The model itself in float32, eager: what every candidate is held to."""
    model = problem.model

    def logits(x_v: Floats) -> Floats:
        with torch.inference_mode():
            x = torch.from_numpy(x_v)
            initial = problem.initial.expand(len(x), -1)
            refined = model.refine(x, problem.table, initial, problem.noise)
            return model.classifier(model.fuse(x, refined)).numpy()

    return logits


class PlainLoop(nn.Module):
    """The plain loop as one scriptable module; its state is float32, its network in `compute`."""

    def __init__(self, problem: Problem, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        model, denoiser = problem.model, problem.model.denoiser
        layers = (denoiser.layer1, denoiser.layer2, denoiser.layer3, denoiser.layer4)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            copy.deepcopy(layer).to(compute) for layer in layers
        )
        self.mean, self.std = _constant(model.vision_mean), _constant(model.vision_std)
        self.tau = _constant(problem.tau.to(compute))  # [S, E]
        rows = torch.from_numpy(problem.table.coefficients[:, :3]).float()
        self.coefficients = _constant(rows)  # [S, 3]
        self.initial = _constant(problem.initial)  # [1, D]
        self.noise = _constant(problem.scaled_noise)  # [S, 1, D]
        self.head = _traced_head(model)
        self.second_order = problem.second_order
        self.slope = LEAKY_SLOPE
        self.requires_grad_(False)

    def estimate(self, x: Tensor, condition: Tensor, tau: Tensor) -> Tensor:
        """Estimate x0 [B, D] float32 from x [B, D] float32, and condition [B, D_v] and tau [E] in
        `compute`.
        """
        h = torch.cat([x.to(tau.dtype), condition, tau.expand(x.shape[0], -1)], dim=1)
        h = F.leaky_relu(self.layer1(h), self.slope)
        h = F.leaky_relu(self.layer2(h), self.slope)
        h = F.leaky_relu(self.layer3(h), self.slope)
        return self.layer4(h).float()

    def step(
        self, x: Tensor, previous: Tensor, condition: Tensor, tau: Tensor, row: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step: x, previous [B, D], row [3], z [1, D] -> next x and this step's estimate."""
        x0 = self.estimate(x, condition, tau)
        x = row[0] * x + row[1] * x0 + z
        if self.second_order:
            x = x + row[2] * previous
        return x, x0

    def forward(self, x_v: Tensor) -> Tensor:
        """Map x_v [B, D_v] to logits [B, C]."""
        condition = ((x_v - self.mean) / self.std).to(self.tau.dtype)
        x = self.initial.expand(x_v.shape[0], -1)
        previous = torch.zeros_like(x)
        for i in range(self.coefficients.shape[0]):
            row, z = self.coefficients[i], self.noise[i]
            x, previous = self.step(x, previous, condition, self.tau[i], row, z)
        return self.head(x_v, x.unsqueeze(1))[0][:, 0]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _traced_head(model: MARNet) -> torch.jit.ScriptModule:
    widths = (model.vision.dim, model.denoiser.dim)
    example = (torch.zeros(2, widths[0]), torch.zeros(2, 1, widths[1]))
    with torch.no_grad(), quiet():
        return torch.jit.trace_module(Head(model).eval(), {"forward": example}, check_trace=False)


# PyTorch


def torch_eager(problem: Problem, precision: str, threads: int) -> Logits:
    """Eager: the model as it is, its layers in bfloat16, or quantised dynamically."""
    if precision == "fp32":
        return reference(problem)
    return _through_torch(_plain_in(problem, precision))


def torchscript(problem: Problem, precision: str, threads: int) -> Logits:
    """Scripted, so that the loop is not interpreted by Python, and frozen."""
    with quiet():
        module = torch.jit.freeze(torch.jit.script(_plain_in(problem, precision)))
    return _through_torch(module)


def torch_compile(problem: Problem, precision: str, threads: int) -> Logits:
    """One step compiled by inductor with frozen, repacked weights; Python calls it S times.

    The whole loop would be unrolled: minutes of compilation for a hundred steps.
    """
    if precision == "int8":
        raise BackendUnavailable(
            "it cannot trace the packed weights of dynamically quantised layers"
        )
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = 64  # one for each batch size and precision
    inductor.compile_threads = 1  # worker processes would outlive the measurement
    plain = _plain_in(problem, precision)
    step = torch.compile(plain.step, dynamic=False, fullgraph=True, options={"freezing": True})
    rows = list(zip(plain.tau, plain.coefficients, plain.noise, strict=True))

    def forward(x_v: Tensor) -> Tensor:
        condition = ((x_v - plain.mean) / plain.std).to(plain.tau.dtype)
        x = plain.initial.repeat(len(x_v), 1)  # as dense as what a step returns: one compilation
        previous = torch.zeros_like(x)
        for tau, row, z in rows:
            x, previous = step(x, previous, condition, tau, row, z)
        return plain.head(x_v, x.unsqueeze(1))[0][:, 0]

    return _through_torch(forward)


def _plain_in(problem: Problem, precision: str) -> PlainLoop:
    if precision == "bf16":
        return PlainLoop(problem, torch.bfloat16).eval()
    plain = PlainLoop(problem).eval()
    if precision == "fp32":
        return plain
    with quiet():
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)


def _through_torch(module: Callable[[Tensor], Tensor]) -> Logits:
    def logits(x_v: Floats) -> Floats:
        with torch.inference_mode():
            return module(torch.from_numpy(x_v)).numpy()

    return logits


@dataclass(frozen=True)
class Peer:
    """One form of the plain loop in one framework."""

    open: Callable[[Problem, str, int], Logits]  # problem, precision, threads
    precisions: tuple[str, ...] = PRECISIONS  # that it is asked for; it may still lack some


TORCH_PEERS = {
    "torch eager": Peer(torch_eager),
    "TorchScript": Peer(torchscript),
    "torch.compile": Peer(torch_compile),
}

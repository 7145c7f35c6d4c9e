"""The products around the loop: one kernel of ours beside torch's operators in a CUDA graph.

"head" takes the loop's last hidden layer to logits; "condition" takes image features to what the
loop reads. Both are held to float64 with the model's own weights.
Axes: B image, D_v image features, H hidden, Hp H padded, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.measure import Job, Launch, Machine, Memory, equal_again, relative_error
from gpu_sections.models import make_model
from marnet_export.builders import TORCH_TYPES
from marnet_export.graph import Head, PlanStep, with_compute
from marnet_export.plan import SamplingPlan, make_plan
from marnet_kernels.fuse_head import (
    ConditionArguments,
    FuseHead,
    FuseHeadArguments,
    choose_head_variant,
    condition_reference,
    head_reference,
    pack_condition_layer,
    pack_head,
)
from marnet_kernels.loader import current_device
from marnet_kernels.reverse_sampler import layout, pack_condition
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import MARNet

BATCHES, TINY_BATCHES = (1, 8, 16), (1, 3)
REPEATS = 20  # in one graph
_SECONDS = 1.5  # for all lines of one batch

Way = tuple[str, Callable[[], Callable[[], Tensor]]]


def run(job: Job) -> None:
    """Both parts in both types at every batch."""
    model = make_model(None, 4, tiny=job.tiny)
    plan = make_plan(model)
    for precision in ("fp16", "bf16"):
        for batch in TINY_BATCHES if job.tiny else BATCHES:
            setup = Setup(job.machine, model, plan, batch, precision)
            for part, ways, wanted in (
                ("head", setup.heads(), setup.wanted_logits()),
                ("condition", setup.conditions(), setup.wanted_condition()),
            ):
                _measure(job, part, ways, wanted, {"batch": batch, "precision": precision})


def _measure(
    job: Job, part: str, ways: Iterator[Way], wanted: Tensor, keys: dict[str, Any]
) -> None:
    if job.was_measured(line=f"{part}: operators as exported", **keys):
        return
    calls: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    for way, prepare in ways:
        name = f"{part}: {way}"
        if job.was_lost(name, **keys):
            continue
        with job.attempt(name, **keys), torch.no_grad():
            call = job.machine.capture(partial(_again_and_again, prepare()))
            errors[name] = {
                "relative_error": relative_error(call(), wanted),
                "against": "float64",
                "replays_equal": equal_again(call),
            }
            calls[name] = call
    if job.was_lost(f"{part}: timing", **keys):
        return
    with job.attempt(f"{part}: timing", **keys), torch.no_grad():
        for name, taken in job.measure(calls, _SECONDS).items():
            job.add(name, 1e3 * taken / REPEATS, "us", errors[name], **keys)


def _again_and_again(call: Callable[[], Tensor]) -> Tensor:
    """As one graph: a launch of its own would cost more than the work, which is part of a whole."""
    for _ in range(REPEATS - 1):
        call()
    return call()


class Setup:
    """The weights and the inputs of one batch in one type."""

    def __init__(
        self, machine: Machine, model: MARNet, plan: SamplingPlan, batch: int, precision: str
    ) -> None:
        self.machine, self.model, self.plan, self.batch = machine, model, plan, batch
        self.dtype, self.operand = TORCH_TYPES[precision], "fp16" if precision == "fp16" else "bf16"
        self.hidden = len(plan.input_weight)
        rng = np.random.default_rng(0)
        x_v, h3 = (
            rng.standard_normal((batch, width)).astype(np.float32)
            for width in (model.vision.dim, self.hidden)
        )
        h3 = np.where(h3 > 0, h3, np.float32(LEAKY_SLOPE) * h3)
        self.x_v, self.h3 = (torch.from_numpy(a).to(machine.device) for a in (x_v, h3))
        self.padded_h3 = torch.from_numpy(pack_condition(h3)).to(machine.device)  # [B, Hp]

    def wanted_logits(self) -> Tensor:
        """[B, C], in float64."""
        exact = copy.deepcopy(self.model).double()
        x_cdr = exact.denoiser.layer4(self.h3.cpu().double())
        return exact.head(self.x_v.cpu().double(), x_cdr)[0]

    def wanted_condition(self) -> Tensor:
        """[B, H], in float64."""
        exact = copy.deepcopy(self.model).double()
        return F.linear(exact.condition(self.x_v.cpu().double()), self._w_c.double())

    @property
    def _w_c(self) -> Tensor:
        return torch.from_numpy(self.plan.condition_weight)

    def heads(self) -> Iterator[Way]:
        """The last hidden layer to logits [B, C], in each way."""
        step = PlanStep(self.plan, self.dtype).to(self.machine.device)
        as_exported = Head(self.model).eval().to(self.machine.device)
        low = with_compute(Head(self.model).eval(), self.dtype).to(self.machine.device)
        for name, head in {"as exported": as_exported, "all products in 16 bits": low}.items():
            yield f"operators {name}", lambda h=head: partial(self._operators, step, h)
        yield f"fuse_head kernel{self._twin}", self._head_kernel

    def _operators(self, step: PlanStep, head: Any) -> Tensor:
        return head(self.x_v, step.output(self.h3)[:, None])[0][:, 0]

    def conditions(self) -> Iterator[Way]:
        """Image features to q [B, H], in each way."""
        step = PlanStep(self.plan, self.dtype).to(self.machine.device)
        yield "operators as exported", lambda: lambda: step.condition(self.x_v)[:, 0]
        yield f"kernel{self._twin}", self._condition_kernel

    @property
    def _twin(self) -> str:
        return "" if self.machine.is_cuda else " (its NumPy twin)"

    @property
    def _kernel(self) -> FuseHead:
        operand: Any = self.operand
        return FuseHead(choose_head_variant(operand, self.batch, 1, current_device()))

    def _head_kernel(self) -> Callable[[], Tensor]:
        model, operand = self.model, self.operand
        layers = (model.project_vision, model.denoiser.layer4, model.classifier)
        pairs = [(layer.weight.numpy(), layer.bias.numpy()) for layer in layers]
        packed = pack_head(*pairs, model.config.fusion, operand)  # pyright: ignore
        if not self.machine.is_cuda:
            h3 = self.padded_h3.numpy()[:, None]
            return lambda: torch.from_numpy(head_reference(packed, self.x_v.numpy(), h3)[0][:, 0])
        memory = Memory(self.machine, packed.layout.buffers(self.batch, 1))
        memory.fill(weights=packed.weights, biases=packed.biases)
        memory |= {"vision": self.x_v, "hidden": self.padded_h3}
        arguments = FuseHeadArguments(
            layout=packed.layout, images=self.batch, samples=1, **memory.addresses
        )
        kernel = self._kernel
        out = memory["logits"].view(torch.float32).view(self.batch, -1)
        return Launch(self.machine, partial(kernel.launch, arguments=arguments), out, memory)

    def _condition_kernel(self) -> Callable[[], Tensor]:
        statistics = (self.model.vision_mean.numpy(), self.model.vision_std.numpy())
        operand: Any = self.operand
        packed = pack_condition_layer(self.plan.condition_weight, *statistics, operand)
        if not self.machine.is_cuda:
            found = partial(condition_reference, packed, self.x_v.numpy())
            return lambda: torch.from_numpy(found())[:, : self.hidden]
        memory = Memory(self.machine, packed.layout.buffers(self.batch))
        memory.fill(weights=packed.weights, biases=packed.biases)
        memory["vision"] = self.x_v
        arguments = ConditionArguments(layout=packed.layout, images=self.batch, **memory.addresses)
        kernel, padded = self._kernel, layout(self.hidden, operand).padded
        out = memory["condition"].view(torch.float32).view(self.batch, padded)[:, : self.hidden]
        launch = partial(kernel.launch_condition, arguments=arguments)
        return Launch(self.machine, launch, out, memory)

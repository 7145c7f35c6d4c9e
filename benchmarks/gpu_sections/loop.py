"""The reverse loop, x_v to x_CDR: as the paper writes it and as the plan rewrites it, in each form.

Every line is held to the loop as the paper writes it in float64, and run twice to see whether its
answers are the same bits.
Axes: B batch, S steps, D feature, D_v encoder features, H hidden, Hp H padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.measure import Job, Machine, Memory, compiled, equal_again, relative_error
from gpu_sections.models import PlainSteps, make_model
from marnet_bench.plain_loop import PlainLoop, make_problem
from marnet_export.build.types import TORCH_TYPES
from marnet_export.lower.modules import PlanStep, ScriptedLoop
from marnet_export.lower.plan import SamplingPlan, make_plan
from marnet_kernels.loader import DeviceInfo, current_device
from marnet_kernels.persistent import (
    MOST_ROWS,
    ReverseSampler,
    ReverseSamplerArguments,
    Variant,
    choose_variant,
)
from marnet_kernels.reverse_sampler import (
    COPIES,
    Layout,
    PackedLoop,
    pack,
    pack_tables,
    reverse_sampler_reference,
)
from marnet_sdk.bundle import OperatingPoint, Sampling
from marnet_sdk.noise.tables import make_tables
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.marnet import MARNet

BATCHES, STEPS = (1, 8, 16, 64, 256), (100, 10, 50, 1000)
TINY_BATCHES, TINY_STEPS = (1, 3), (4,)
BF16_STEPS = (100,)  # loop lengths that are measured in bf16, too
ALL_VARIANTS = (100,)  # loop lengths for which every variant of the persistent kernel is measured
TILES = (1, 2, 4)  # of a block of the persistent kernel
GROUP_ROWS = (8, 16, 32, 64)  # that a group of its blocks may be compiled for
_SECONDS = 1.5  # for all lines of one batch and length

Refine = Callable[[], Tensor]  # -> x_CDR [B, D]
# Name, what makes it ready to be called, and what else its line says.
Form = tuple[str, Callable[[], Refine], dict[str, Any]]


def run(job: Job) -> None:
    """Measure every form for every batch and length, the lengths that matter most first."""
    train_steps = TINY_STEPS[0] if job.tiny else max(STEPS)
    model = make_model(None, train_steps, tiny=job.tiny)
    forms = Forms(job.machine, model)
    batches, lengths = (TINY_BATCHES, TINY_STEPS) if job.tiny else (BATCHES, STEPS)
    for steps in lengths:
        for precision in ("fp16", "bf16"):
            if precision == "bf16" and steps not in BF16_STEPS and not job.tiny:
                continue
            chain = Chain(forms, steps, precision)
            wanted = chain.reference(chain.features(max(batches)))
            for batch in batches:
                keys = {"batch": batch, "steps": steps, "precision": precision}
                if job.was_measured(**keys) or job.was_lost("timing", **keys):
                    continue
                job.say(f"  loop: T = {steps}, {precision}, batch {batch}")
                _measure(job, chain, batch, wanted[:batch])


def _measure(job: Job, chain: Chain, batch: int, wanted: Tensor) -> None:
    """All forms at one batch and length, in turn."""
    keys = {"batch": batch, "steps": chain.steps, "precision": chain.precision}
    calls: dict[str, Refine] = {}
    errors: dict[str, dict[str, Any]] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, prepare, more in chain.forms(batch):
        if job.left() < 3 and not job.tiny:
            job.miss(name, "no time is left", **keys, **more)
            continue
        if job.was_lost(name, **keys, **more):
            continue
        with job.attempt(name, **keys, **more), torch.no_grad():
            call = prepare()
            found = {
                "relative_error": relative_error(call(), wanted),
                "against": "float64",
                "replays_equal": equal_again(call),
            }
            calls[name], errors[name], rest[name] = call, found, more
    if not calls:
        return
    with job.attempt("timing", **keys), torch.no_grad():
        for name, taken in job.measure(calls, _SECONDS).items():
            per_step = 1e3 * taken / chain.steps
            job.add(name, per_step, "us a step", errors[name], **keys, **rest[name])


class Forms:
    """The loops of all lengths share these: the model, its rewrite, and what was compiled."""

    def __init__(self, machine: Machine, model: MARNet) -> None:
        self.machine, self.model = machine, model
        self.plan: SamplingPlan = make_plan(model)
        self.exact = copy.deepcopy(model).double().to(machine.device)
        self._compiled: dict[tuple[str, str], Any] = {}
        self._packed: dict[str, PackedLoop] = {}
        self._samplers: dict[tuple[str, Variant], ReverseSampler] = {}

    def compiled(self, plain: PlainLoop, precision: str, mode: str) -> Any:
        """One step of the plain loop, which does not depend on the number of steps."""
        if (precision, mode) not in self._compiled:
            self._compiled[precision, mode] = compiled(self.machine, plain.step, mode=mode)
        return self._compiled[precision, mode]

    def packed(self, precision: str) -> PackedLoop:
        if precision not in self._packed:
            plan = self.plan
            operand = "fp16" if precision == "fp16" else "bf16"
            self._packed[precision] = pack(plan.hidden2, plan.hidden3, plan.carry_weight, operand)
        return self._packed[precision]

    def sampler(self, packed: PackedLoop, variant: Variant) -> ReverseSampler:
        key = (packed.layout.dtype, variant)
        if key not in self._samplers:
            self._samplers[key] = ReverseSampler(packed.layout, variant)
        return self._samplers[key]


class Chain:
    """The loop of one length and precision, and its forms."""

    def __init__(self, shared: Forms, steps: int, precision: str) -> None:
        self.shared, self.steps, self.precision = shared, steps, precision
        self.machine, self.device = shared.machine, shared.machine.device
        self.dtype = TORCH_TYPES[precision]
        self.problem = make_problem(shared.model, "ddpm", steps)

    def forms(self, batch: int) -> Iterator[Form]:
        """Every way to run it for a batch."""
        x_v, capture = self.features(batch), self.machine.capture
        plain, rewritten = partial(self.plain, x_v), partial(self.rewritten, x_v)
        yield "eager, plain", lambda: plain, {}
        yield "eager, rewritten", lambda: rewritten, {}
        yield "torch.compile of a step (reduce-overhead), plain", lambda: self.stepwise(x_v), {}
        yield "CUDA graph, plain", lambda: capture(plain), {}
        yield (
            "CUDA graph of torch.compile's step, plain",
            lambda: capture(partial(self.plain, x_v, self.compiled("default"))),
            {},
        )
        yield "CUDA graph, rewritten", lambda: capture(rewritten), {}
        yield from self.persistent_forms(x_v)

    def features(self, batch: int) -> Tensor:
        """Return x_v [B, D_v], the first rows of the same random ones."""
        width = self.shared.model.vision.dim
        rows = np.random.default_rng(0).standard_normal((batch, width)).astype(np.float32)
        return torch.from_numpy(rows).to(self.device)

    @torch.no_grad()
    def reference(self, x_v: Tensor) -> Tensor:
        """Compute x_CDR [B, D] by the loop as the paper writes it, in float64."""
        problem = self.problem
        initial = problem.initial.double().to(self.device).expand(len(x_v), -1)
        noise = problem.noise.double().to(self.device)
        return self.shared.exact.refine(x_v.double(), problem.table, initial, noise)

    # --- with torch's operators

    @cached_property
    def plain(self) -> PlainSteps:
        """The loop of the paper."""
        return PlainSteps(PlainLoop(self.problem, self.dtype).eval().to(self.device))

    def compiled(self, mode: str) -> Any:
        return self.shared.compiled(self.plain.plain, self.precision, mode)

    def stepwise(self, x_v: Tensor) -> Refine:
        """A compiled step with graphs of its own, called S times from Python."""
        compiled = self.compiled("reduce-overhead")

        def step(*arguments: Tensor) -> list[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            return [t.clone() for t in compiled(*arguments)]  # the next step overwrites them

        return partial(self.plain, x_v, step)

    @cached_property
    def plan_loop(self) -> ScriptedLoop:
        return ScriptedLoop(PlanStep(self.shared.plan, self.dtype)).eval().to(self.device)

    @cached_property
    def host_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients [S, 3] and bias [S, 1, 1, H], as the SDK makes them."""
        table, problem = self.problem.table, self.problem
        point = OperatingPoint(table.sampler, table.eta, table.timesteps, 1, None)
        width = self.shared.model.denoiser.dim
        sampling = Sampling(
            {"loop": point}, "loop", table.train_steps, "shared", problem.seed, width
        )
        arrays = self.shared.plan.tensors({"loop": table})
        tables = make_tables(arrays, sampling, "loop", seed=problem.seed, samples=1)
        return tables.coefficients, tables.bias

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        coefficients, bias = (torch.from_numpy(a).to(self.device) for a in self.host_tables)
        return coefficients, bias

    def rewritten(self, x_v: Tensor) -> Tensor:
        """The plan: x_v [B, D_v] -> x_CDR [B, D]."""
        return self.plan_loop(x_v, *self.tables)[:, 0]

    def finish(self, h3: Tensor) -> Tensor:
        """The last product of the loop: h3 [B, H] -> x_CDR [B, D]."""
        step = self.plan_loop.step
        assert isinstance(step, PlanStep)
        return step.output(h3)

    # --- with the kernel

    def persistent_forms(self, x_v: Tensor) -> Iterator[Form]:
        """The variants of the persistent kernel; where others are measured, too, all of them."""
        packed, capture = self.shared.packed(self.precision), self.machine.capture
        if not self.machine.is_cuda:
            name = "persistent kernel (its NumPy twin)"
            yield name, lambda: self.persistent(x_v, packed, None), {}
            return
        rows, every = min(len(x_v), MOST_ROWS), self.steps in ALL_VARIANTS
        try:
            found = list(variants(packed.layout, rows, current_device(), every=every))
        except ValueError as error:
            yield "persistent kernel", partial(_refuse, error), {}
            return
        for variant in found:
            more = {"launches": -(-len(x_v) // MOST_ROWS), "chosen": variant == found[0]}
            name = f"persistent kernel, {variant.exchange}, tiles {variant.tiles}, "
            name += f"groups {variant.groups}, copies {variant.copies}"
            yield name, lambda v=variant: capture(self.persistent(x_v, packed, v)), more

    def persistent(self, x_v: Tensor, packed: PackedLoop, variant: Variant | None) -> Refine:
        """The kernel between the products before and behind the loop, in parts of MOST_ROWS."""
        parts = [self._launch(len(part), packed, variant) for part in x_v.split(MOST_ROWS)]
        hidden = packed.layout.hidden

        def call() -> Tensor:
            step = self.plan_loop.step
            assert isinstance(step, PlanStep)
            q = step.condition(x_v)[:, 0]  # [B, H]
            if hidden < packed.layout.padded:
                q = F.pad(q, (0, packed.layout.padded - hidden))  # [B, Hp]
            found = [part(rows) for part, rows in zip(parts, q.split(MOST_ROWS), strict=True)]
            h3 = found[0] if len(found) == 1 else torch.cat(found)
            return self.finish(h3[:, :hidden])

        return call

    def _launch(
        self, rows: int, packed: PackedLoop, variant: Variant | None
    ) -> Callable[[Tensor], Tensor]:
        """Return a function q [rows, Hp] -> h3 [rows, Hp], with memory of its own."""
        tables = pack_tables(*self.host_tables)
        if variant is None:
            twin = partial(reverse_sampler_reference, packed, slope=LEAKY_SLOPE)
            pad = (0, packed.layout.padded - packed.layout.hidden)

            def emulate(q: Tensor) -> Tensor:
                found = twin(q.numpy(), coefficients=tables[0], bias=tables[1])[:, 0]
                return F.pad(torch.from_numpy(found), pad)

            return emulate
        sampler = self.shared.sampler(packed, variant)
        memory = Memory(self.machine, packed.layout.buffers(rows, 1, 1, self.steps))
        memory.fill(weights=packed.weights, biases=packed.biases)
        memory.fill(coefficients=tables[0], bias=tables[1])
        out = memory["out"].view(torch.float32).view(rows, packed.layout.padded)

        def launch(q: Tensor) -> Tensor:
            addresses = memory.addresses | {"condition": q.data_ptr()}
            counts = {"images": rows, "samples": 1, "noises": 1, "steps": self.steps}
            arguments = ReverseSamplerArguments(**addresses, **counts, slope=LEAKY_SLOPE)
            sampler.launch(self.machine.stream, arguments)
            return out

        return launch


def variants(plan: Layout, rows: int, device: DeviceInfo, *, every: bool) -> Iterator[Variant]:
    """The variant that is chosen for so many rows, then others that run them on the device.

    Args:
        every: all others; else the one with the other exchange.

    Raises:
        ValueError: the kernel does not run them.
    """
    chosen = choose_variant(plan, rows, device)
    yield chosen
    for exchange, tiles, copies in product(("counter", "epoch"), TILES, (1, COPIES)):
        most = min(device.multiprocessors // (plan.ctas // tiles), -(-rows // GROUP_ROWS[0]))
        for groups in sorted({1, most} - {0}):
            fitting = min(size for size in GROUP_ROWS if size * groups >= rows)
            same = (tiles, groups) == (chosen.tiles, chosen.groups)
            usual = same and copies == (COPIES if exchange == "epoch" else 1)
            with suppress(ValueError):  # the kernel is not built like that
                variant = Variant(fitting, tiles, exchange, copies=copies, groups=groups)
                variant.options(plan)
                if variant != chosen and (every or usual):
                    yield variant


def _refuse(error: Exception) -> Refine:
    raise error

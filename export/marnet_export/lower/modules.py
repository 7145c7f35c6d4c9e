"""The deployed model as torch modules: what the builders trace, script or export.

Two graphs: pixels -> encoder -> x_v, and x_v -> reverse loop -> x_CDR -> head -> logits, fused
features. The tables of the loop are inputs, so that one graph serves every sampler, number of
steps, number of noise samples and seed. A method gives its `Step`; the forms in which a step is
repeated are the same for all of them.
Axes: B batch, K noise samples, S steps, W carried state, H hidden, R row of the table, D feature,
C classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.overrides import TorchFunctionMode

from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.errors import MarnetWarning, one_line
from marnet_sdk.gpu.persistent_loop import LoopWeights, Operand
from marnet_train.models.denoiser import LEAKY_SLOPE
from marnet_train.models.fusion import FUSIONS
from marnet_train.models.marnet import MARNet


class Matrix(nn.Module):
    """A linear layer whose product runs in the type of its weight; the sum stays in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(weight.detach().to(compute), requires_grad=False)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().float(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Return the matrix, for models that ask a layer for its type, as the ViT does."""
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        if self.matrix.dtype == torch.float32:
            return F.linear(x, self.matrix, self.bias)
        y = F.linear(x.to(self.matrix.dtype), self.matrix).float()
        return y if self.bias is None else y + self.bias


class Convolution(nn.Module):
    """A convolution whose product runs in the type of its weight; the sum stays in float32."""

    def __init__(self, layer: nn.Conv2d, compute: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(layer.weight.detach().to(compute), requires_grad=False)
        bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
        self.bias = nn.Parameter(bias[:, None, None].clone(), requires_grad=False)
        self.layer = [layer.stride, layer.padding, layer.dilation, layer.groups]

    @property
    def weight(self) -> Tensor:
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.layer
        y = F.conv2d(x.to(self.matrix.dtype), self.matrix, None, stride, padding, dilation, groups)
        return y.float() + self.bias


class RoundedMatrix(Matrix):
    """A linear layer whose result stays in its type; inside, the product adds up in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__(weight, bias, compute)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(compute)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.matrix.dtype), self.matrix, self.bias)


class _Float32LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in float32, whatever type its input has."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class OneType(TorchFunctionMode):
    """Products of activations whose types differ are taken in `compute`.

    (A mask or a bias is float32 where queries are not.)
    """

    PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
    PRODUCTS += (torch.baddbmm, Tensor.baddbmm, F.scaled_dot_product_attention)

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.compute = compute

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.PRODUCTS:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if len({x.dtype for x in tensors if x.is_floating_point()}) > 1:
                args = [self.cast(x) for x in args]
                kwargs = {name: self.cast(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)

    def cast(self, x: Any) -> Any:
        return x.to(self.compute) if isinstance(x, Tensor) and x.is_floating_point() else x


class _Rounded(nn.Module):
    """Gives float32, whatever is inside."""

    def __init__(self, module: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self.module, self.compute = module, compute

    def forward(self, *inputs: Tensor) -> Tensor:
        with OneType(self.compute):
            return self.module(*inputs).float()


def with_rounded_results(module: nn.Module, compute: torch.dtype) -> nn.Module:
    """Do the same as `with_compute`, but keep the results of linear layers in `compute`.

    On a GPU, writing and reading it in float32 takes longer than multiplying, and attention has its
    fast kernels in 16 bits. Norms are float32, and so are sums with what is, as residuals are.
    """
    if compute == torch.float32:
        return copy.deepcopy(module)
    module = with_compute(module, compute, RoundedMatrix)
    for child in module.modules():
        if type(child) is nn.LayerNorm:
            child.__class__ = _Float32LayerNorm
    return _Rounded(module, compute)


def with_compute(
    module: nn.Module, compute: torch.dtype, linear: type[Matrix] = Matrix
) -> nn.Module:
    """A copy whose linear layers, which become `linear`, and convolutions multiply in `compute`.

    Everything else (normalisation, softmax, residual sums) stays in float32.
    """
    module = copy.deepcopy(module)
    if compute == torch.float32:
        return module
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, linear(child.weight, child.bias, compute))
            elif type(child) is nn.Conv2d and child.padding_mode == "zeros":
                setattr(parent, name, Convolution(child, compute))
    return module


def on_device(module: nn.Module, compute: torch.dtype, device: str, *example: Tensor) -> nn.Module:
    """An encoder as torch runs it on "cpu" or "cuda": a copy, there."""
    if device == "cuda":
        rounded = with_rounded_results(module, compute).eval().to(device)
        try:
            with torch.no_grad():
                rounded(*(x.to(device) for x in example))
            return rounded
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # layers of its own may want float32 where they get 16 bits
            warnings.warn(
                "this encoder cannot keep its results in 16 bits, so they stay in float32, which "
                f"is slower: {one_line(error)}",
                MarnetWarning,
                stacklevel=2,
            )
    return with_compute(module, compute).eval().to(device)


class Step(nn.Module):
    """A method defines one step here; `ScriptedLoop` and `ScanLoop` repeat it.

    Between the steps, a loop carries a state [B, K, W], which is zero at first, or what `begin`
    gives if the method `starts` it. It is linear in what the steps gain:
    state = A state + B gained + C gained_before. But its last `fed` elements are those that the
    last step gained, for a network that sees its last estimate. A step with B = 0 makes no
    estimate, and feeds nothing.
    """

    def __init__(self, width: int, fed: int = 0, *, starts: bool = False) -> None:
        """Take the width W of the state, how much of it is fed back as it is gained, and whether
        `begin` gives the first one.
        """
        super().__init__()
        self.width, self.fed, self.starts = width, fed, starts

    def condition(self, x_v: Tensor) -> Tensor:
        """Once per image: x_v [B, D_v] -> q [B, 1, H]."""
        raise NotImplementedError

    def begin(self, x_v: Tensor) -> Tensor:
        """Once per image, where the method starts the state: x_v [B, D_v] -> [B, 1, W]."""
        raise NotImplementedError

    def gain(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        """Map state [B, K, W], q [B, 1, H], row [1 or B, K, R] of the table to gained [B, K, W]."""
        raise NotImplementedError

    def finish(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        """The estimate of the last step: the same -> x_CDR [B, K, D]."""
        raise NotImplementedError

    def estimate(self, h3: Tensor) -> Tensor:
        """Return the tensor that `finish` makes of the last h3 [B, K, H], where there are
        `kernel_weights`.
        """
        raise NotImplementedError

    def kernel_weights(self) -> LoopWeights | None:
        """The loop's weights for the persistent kernel; None: it is not of the form that it runs,
        or not in 16 bits."""
        return None


class PlanStep(Step):
    """A step of MARNet's sampling plan; everything but its products is float32."""

    def __init__(self, plan: SamplingPlan, compute: torch.dtype = torch.float32) -> None:
        start = plan.start_weight
        super().__init__(len(plan.carry_weight), plan.fed, starts=start is not None)

        def matrix(weight: NDArray, bias: NDArray | None = None) -> Matrix:
            return Matrix(
                torch.from_numpy(weight).float(),
                None if bias is None else torch.from_numpy(bias).float(),
                compute,
            )

        mean, std = (torch.from_numpy(a).float() for a in plan.standardise)
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.std = nn.Parameter(std, requires_grad=False)
        self.into_condition = matrix(plan.condition_weight)
        self.into_start = nn.Identity() if start is None else matrix(start)
        self.input = nn.Identity() if plan.carry == "hidden" else matrix(plan.input_weight)
        self.hidden2 = matrix(*plan.hidden2)
        self.hidden3 = matrix(*plan.hidden3)
        self.carry = matrix(plan.carry_weight, plan.carry_bias)
        self.output = matrix(*plan.output)
        self.slope = LEAKY_SLOPE

    def condition(self, x_v: Tensor) -> Tensor:
        if self.starts:
            x_v = x_v[:, : self.mean.shape[0]]
        return self.into_condition((x_v - self.mean) / self.std).unsqueeze(1)

    def begin(self, x_v: Tensor) -> Tensor:
        return self.into_start(x_v[:, self.mean.shape[0] :]).unsqueeze(1)

    def hidden(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        """Compute h3 of one step, [B, K, H]."""
        if self.fed == 0:
            h = self.input(state)
        else:
            h = self.input(state[..., : -self.fed]) + state[..., -self.fed :]
        h = F.leaky_relu(h + q + row, self.slope)
        h = F.leaky_relu(self.hidden2(h), self.slope)
        return F.leaky_relu(self.hidden3(h), self.slope)

    def gain(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        return self.carry(self.hidden(state, q, row))

    def finish(self, state: Tensor, q: Tensor, row: Tensor) -> Tensor:
        return self.estimate(self.hidden(state, q, row))

    def estimate(self, h3: Tensor) -> Tensor:
        return self.output(h3)

    def kernel_weights(self) -> LoopWeights | None:
        operands: dict[torch.dtype, Operand] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        layers = {"hidden2": self.hidden2, "hidden3": self.hidden3, "carry": self.carry}
        operand = operands.get(self.carry.matrix.dtype)
        if operand is None or self.fed or self.starts or not isinstance(self.input, nn.Identity):
            return None
        return LoopWeights(
            {name: layer.matrix.float().numpy() for name, layer in layers.items()},
            {name: b.numpy() for name, layer in layers.items() if (b := layer.bias) is not None},
            self.slope,
            operand,
        )


def with_fed(state: Tensor, gained: Tensor, of_gained: Tensor, fed: int) -> Tensor:
    """Put the last `fed` elements of what a step gained, [B, K, W], in the place of the state's.

    Args:
        of_gained: B of the step.
    """
    if fed == 0:
        return state
    return torch.cat([state[..., :-fed], gained[..., -fed:] * of_gained.sign()], dim=-1)


class ScriptedLoop(nn.Module):
    """All steps in a scriptable loop: x_v, tables -> x_CDR."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.width = step, step.width

    def start(self, x_v: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return q [B, 1, H] and the state before the first step [B, K, W]: zeros, or `begin`.

        row: [1 or B, K, R], any of the table.
        """
        q = self.step.condition(x_v)
        # Computed of both, so that exporters see where its shape comes from.
        zero = (q[:, :, :1] + row[:, :, :1]) * 0.0  # [B, K, 1]
        state = zero + torch.zeros(self.width, device=x_v.device)
        if self.step.starts:
            state = state + self.step.begin(x_v)
        return q, state

    def forward(self, x_v: Tensor, coefficients: Tensor, bias: Tensor) -> Tensor:
        """Map x_v [B, D_v], coefficients [S, 3] and bias [S, 1 or B, K, R] to x_CDR [B, K, D]."""
        q, state = self.start(x_v, bias[0])
        previous = torch.zeros_like(state)
        last = coefficients.shape[0] - 1
        for i in range(last):
            gained = self.step.gain(state, q, bias[i])  # [B, K, W]
            c = coefficients[i]
            state = torch.addcmul(state * c[0], gained, c[1])
            state = torch.addcmul(state, previous, c[2])
            state = with_fed(state, gained, c[1], self.step.fed)
            previous = gained
        return self.step.finish(state, q, bias[last])


class ScanLoop(ScriptedLoop):
    """The loop of `ScriptedLoop` through torch's `scan`, which ONNX has as one `Scan` node of any
    length.
    """

    def forward(self, x_v: Tensor, coefficients: Tensor, bias: Tensor) -> Tensor:
        q, state = self.start(x_v, bias[0])
        state = self.repeated(state, q, coefficients[:-1], bias[:-1], lambda row: row)
        return self.step.finish(state, q, bias[-1])

    def repeated(
        self,
        state: Tensor,
        q: Tensor,
        coefficients: Tensor,
        bias: Tensor,
        look_up: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """All steps of the tables; `look_up` gives a row of the table to each image."""

        def step(
            carried: tuple[Tensor, Tensor], row: tuple[Tensor, Tensor]
        ) -> tuple[tuple[Tensor, Tensor], Tensor]:
            state, previous = carried
            c, b = row
            gained = self.step.gain(state, q, look_up(b))
            of_state, of_gained, of_previous = c.split(1)
            state = of_state * state + of_gained * gained + of_previous * previous
            state = with_fed(state, gained, of_gained, self.step.fed)
            return (state, gained.clone()), c.clone()  # scan must emit something

        (state, _), _ = scan(step, (state, torch.zeros_like(state)), (coefficients, bias))
        return state


class Head(nn.Module):
    """Alignment projector, fusion and final classifier: x_v, x_CDR -> logits, fused features.

    It standardises x_v first, as the loop does. Where a mean is large beside its deviation, the
    projection of raw features would cancel, and weights in 16 bits would leave noise.
    """

    def __init__(self, model: MARNet) -> None:
        super().__init__()
        self.register_buffer("vision_mean", model.vision_mean.clone())
        self.register_buffer("vision_std", model.vision_std.clone())
        self.project_vision = _on_standardised(
            model.project_vision, model.vision_mean, model.vision_std
        )
        self.classifier = copy.deepcopy(model.classifier)
        self.of_logits = model.config.fusion_level == "logit"
        if self.of_logits:
            self.alignment_classifier = copy.deepcopy(model.alignment_classifier)
            self.semantic_classifier = copy.deepcopy(model.semantic_classifier)
        self.fusion = FUSIONS[model.config.fusion]
        self.standardises = model.config.fusion != "concat"
        if self.standardises:
            for name in ("aligned_mean", "aligned_std", "refined_mean", "refined_std"):
                self.register_buffer(name, getattr(model, name).clone())

    vision_mean: Tensor
    vision_std: Tensor
    aligned_mean: Tensor
    aligned_std: Tensor
    refined_mean: Tensor
    refined_std: Tensor

    def forward(self, x_v: Tensor, x_cdr: Tensor) -> tuple[Tensor, Tensor]:
        """Map x_v [B, D_v] and x_CDR [B, K, D_s] to logits [B, K, C] and fused features
        [B, K, D_f].
        """
        x_v = (x_v - self.vision_mean) / self.vision_std
        aligned = F.leaky_relu(self.project_vision(x_v), LEAKY_SLOPE).unsqueeze(1)
        if self.of_logits:
            aligned, x_cdr = self.alignment_classifier(aligned), self.semantic_classifier(x_cdr)
        if self.standardises:
            aligned = (aligned - self.aligned_mean) / self.aligned_std
            x_cdr = (x_cdr - self.refined_mean) / self.refined_std
        fused = self.fusion(aligned.expand(-1, x_cdr.shape[1], -1), x_cdr)
        return self.classifier(fused), fused


@torch.no_grad()
def _on_standardised(layer: nn.Linear, mean: Tensor, std: Tensor) -> nn.Linear:
    """Return a layer that gives of standardised inputs what this one gives of raw ones."""
    found, weight = copy.deepcopy(layer), layer.weight.double()
    found.weight.copy_(weight * std)
    found.bias.copy_(layer.bias + weight @ mean.double())
    return found


class Refine(nn.Module):
    """Everything behind the encoder: reverse loop and head."""

    def __init__(self, loop: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.loop, self.head = loop, head

    def forward(self, x_v: Tensor, coefficients: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logits, fused = self.head(x_v, self.loop(x_v, coefficients, bias))
        return logits, fused

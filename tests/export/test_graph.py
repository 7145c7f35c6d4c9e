"""The torch modules that are exported do in float32 what the plan does in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plan_twin import run_plan
from quick import kept
from tiny import make_model
from tolerances import BF16_LAYER, BUILT, FLOAT32_LAYER, FLOAT32_LOOP
from torch import nn

from marnet_export.build.tracing import quiet
from marnet_export.build.types import TORCH_TYPES
from marnet_export.lower import modules
from marnet_export.lower.modules import (
    Head,
    PlanStep,
    RoundedMatrix,
    ScanLoop,
    ScriptedLoop,
    with_compute,
    with_rounded_results,
)
from marnet_export.lower.plan import SamplingPlan
from marnet_sdk.bundle import OperatingPoint, Sampling
from marnet_sdk.errors import MarnetWarning
from marnet_sdk.noise.tables import make_tables
from marnet_sdk.noise.trajectory import NoiseTrajectory, draw_trajectory
from marnet_train.diffusion import SAMPLERS, SamplerTable, ScheduleConfig, sampler_table
from marnet_train.models.backbones import (
    TextEncoder,
    VisionEncoder,
    backbone_config,
    build_backbone,
)
from marnet_train.models.fusion import FUSION_LEVELS, FUSIONS
from marnet_train.models.marnet import MARNet

FEATURES, HIDDEN, CONDITION = 20, 24, 16  # D, H, D_v


def random_plan(carry: str) -> SamplingPlan:
    """Weights of half the size that would keep a signal's variance, so the loop contracts."""
    rng = np.random.default_rng(3)

    def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(0, 0.5 / columns**0.5, (rows, columns)), rng.normal(0, 0.3, rows)

    into, (weight, bias) = layer(HIDDEN, FEATURES)[0], layer(FEATURES, HIDDEN)
    return SamplingPlan(
        carry=carry,
        time_bias=rng.normal(0, 0.5, (100, HIDDEN)),
        condition_weight=layer(HIDDEN, CONDITION)[0],
        input_weight=into,
        hidden2=layer(HIDDEN, HIDDEN),
        hidden3=layer(HIDDEN, HIDDEN),
        carry_weight=into @ weight if carry == "hidden" else weight,
        output=(weight, bias),
        standardise=(rng.normal(0, 3, CONDITION), rng.uniform(0.5, 2, CONDITION)),
        time_dim=8,
    )


def draw(table: SamplerTable, samples: int) -> list[NoiseTrajectory]:
    return [
        draw_trajectory(5, table.timesteps, table.train_steps, FEATURES, trajectory=k)
        for k in range(samples)
    ]


def run_loop(
    loop: nn.Module, plan: SamplingPlan, table: SamplerTable, x_v: np.ndarray, samples: int
) -> np.ndarray:
    """Through float32 tables, as the SDK makes them from plan.safetensors."""
    point = OperatingPoint(table.sampler, table.eta, table.timesteps, samples, None)
    sampling = Sampling({"p": point}, "p", table.train_steps, "shared", 5, FEATURES)
    tables = make_tables(plan.tensors({"p": table}), sampling, "p", seed=5, samples=samples)
    arrays = (x_v.astype(np.float32), tables.coefficients, tables.bias)
    with torch.inference_mode():
        return loop(*map(torch.from_numpy, arrays)).numpy()


def scripted(plan: SamplingPlan) -> nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        return torch.jit.script(ScriptedLoop(PlanStep(plan)))


FORMS = {
    "eager": lambda plan: ScriptedLoop(PlanStep(plan)),
    "scripted": scripted,
    "scan": lambda plan: ScanLoop(PlanStep(plan)),
}


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("form", "steps"),
    # scan takes no sequence of length 0, so its shortest loop has two steps
    kept(
        [*((f, s) for f in ("eager", "scripted") for s in (1, 2, 100)), ("scan", 2), ("scan", 100)],
        {("eager", 1), ("eager", 100), ("scripted", 2), ("scan", 2)},
        many=True,
    ),
)
def test_every_form_of_the_loop_gives_what_the_plan_gives(form, steps, sampler, samples, carry):
    plan = random_plan(carry)
    table = sampler_table(ScheduleConfig(), sampler, steps)
    x_v = np.random.default_rng(4).standard_normal((7, CONDITION))
    want = run_plan(plan, table, x_v, draw(table, samples))
    got = run_loop(FORMS[form](plan), plan, table, x_v, samples)
    assert got.shape == (7, samples, FEATURES)
    assert np.abs(got - want).max() <= FLOAT32_LOOP * np.abs(want).max()


@pytest.mark.parametrize("form", ["eager", "scan"])
def test_the_previous_estimate_is_used_by_samplers_of_second_order(form):
    """dpmpp without its C is another sampler: were C lost, the loops could still agree."""
    plan, table = random_plan("hidden"), sampler_table(ScheduleConfig(), "dpmpp", 10)
    coefficients = table.coefficients.copy()
    coefficients[:, 2] = 0
    first_order = replace(table, coefficients=coefficients)
    x_v = np.random.default_rng(4).standard_normal((3, CONDITION))
    loop = FORMS[form](plan)
    got = run_loop(loop, plan, table, x_v, 1)
    assert np.abs(got - run_loop(loop, plan, first_order, x_v, 1)).max() > 1e-4


@pytest.mark.parametrize("level", FUSION_LEVELS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_head_gives_what_the_model_gives_with_every_fusion(fusion, level):
    """Its statistics are far from doing nothing, and those of the copy are its own."""
    config = replace(make_model().config, fusion=fusion, fusion_level=level, dim=8)
    model = MARNet(config).eval()
    for name, buffer in model.named_buffers():
        if name.startswith(("aligned_", "refined_")):
            buffer.copy_(torch.randn(len(buffer)).exp())
    x_v, x_cdr = torch.randn(5, 10), torch.randn(5, 3, 8)
    head = Head(model).eval()
    with torch.inference_mode():
        expected = [model.head(x_v, x_cdr[:, k]) for k in range(3)]
        logits, fused = head(x_v, x_cdr)
    assert logits.shape == (5, 3, 3)
    for k, (want_logits, want_fused) in enumerate(expected):
        torch.testing.assert_close(
            logits[:, k], want_logits, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER
        )
        torch.testing.assert_close(fused[:, k], want_fused, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)
    for buffer in model.buffers():
        buffer.zero_()
    with torch.inference_mode():
        assert torch.equal(head(x_v, x_cdr)[0], logits)


def test_a_head_in_16_bits_tells_features_apart_whose_mean_is_large():
    """An encoder may give nearly the same vector for every image."""
    model = make_model().eval()
    model.vision_mean.copy_(torch.randn(10) * 100)
    model.vision_std.copy_(torch.rand(10) * 0.1 + 0.05)
    model.project_vision.weight.data.div_(model.vision_std)  # it learned on standardised features
    model.project_vision.bias.data.sub_(model.project_vision.weight @ model.vision_mean)
    x_v = model.vision_mean + model.vision_std * torch.randn(20, 10)
    x_cdr = torch.zeros(20, 1, model.latent_width)
    head = Head(model).eval()
    with torch.inference_mode():
        _, expected = head(x_v, x_cdr)
        head.project_vision.weight.copy_(head.project_vision.weight.half())
        _, got = head(x_v, x_cdr)
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


def run_in_bf16(plan: SamplingPlan, x_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the loop gives with bf16 products, and what it should give."""
    table = sampler_table(ScheduleConfig(), "ddpm", 100)
    got = run_loop(ScriptedLoop(PlanStep(plan, torch.bfloat16)), plan, table, x_v, 1)
    return got, run_plan(plan, table, x_v, draw(table, 1))


def test_products_in_bf16_leave_the_loop_s_tables_and_answer_in_float32():
    x_v = np.random.default_rng(4).standard_normal((7, CONDITION))
    got, want = run_in_bf16(random_plan("hidden"), x_v)
    assert got.dtype == np.float32
    assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() <= BF16_LAYER


def test_features_with_a_large_mean_lose_nothing_in_bf16():
    """Were the mean folded into the bf16 product, its rounding would drown the features."""
    plan = random_plan("hidden")
    mean, std = plan.standardise
    x_v = np.random.default_rng(4).standard_normal((7, CONDITION))
    got, want = run_in_bf16(replace(plan, standardise=(mean + 1000, std)), x_v + 1000)
    assert np.abs(got - want).max() / np.abs(want).max() <= BF16_LAYER


ENCODERS = {
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 24],
        "depths": [1, 1],
        "layer_type": "basic",
    },
}


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return VisionEncoder(build_backbone(backbone_config(ENCODERS[request.param]))).eval()


@torch.inference_mode()
def test_bf16_products_change_the_answer_by_little(encoder):
    pixels = torch.randn(3, 3, 16, 16)
    want, got = encoder(pixels), with_compute(encoder, torch.bfloat16)(pixels)
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() / want.abs().max() <= BF16_LAYER


def test_bf16_is_for_linear_layers_and_convolutions_alone(encoder):
    low = with_compute(encoder, torch.bfloat16)
    matrices = {
        f"{name}.matrix"
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    types = {name: tensor.dtype for name, tensor in low.state_dict().items()}
    assert {name for name, dtype in types.items() if dtype == torch.bfloat16} == matrices
    rest = {dtype for name, dtype in types.items() if name not in matrices}
    assert rest <= {torch.float32, torch.int64}  # int64: BatchNorm counts its batches


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@torch.inference_mode()
def test_rounded_results_change_the_answer_by_little(encoder, kind):
    pixels = torch.randn(3, 3, 16, 16)
    want, got = encoder(pixels), with_rounded_results(encoder, TORCH_TYPES[kind])(pixels)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= BUILT[kind] * want.abs().max()


@torch.inference_mode()
def test_on_a_gpu_layers_hand_on_16_bits_and_norms_see_float32(encoder):
    low = with_rounded_results(encoder, torch.float16)
    seen: dict[type, set[torch.dtype]] = {}

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        kind = nn.LayerNorm if isinstance(module, nn.LayerNorm) else type(module)
        seen.setdefault(kind, set()).add(output.dtype)

    for module in low.modules():
        if isinstance(module, RoundedMatrix | nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_hook(watch)
    low(torch.randn(2, 3, 16, 16))
    linear = {type(m) for m in encoder.modules()} & {nn.Linear}
    assert seen.pop(RoundedMatrix, set()) == ({torch.float16} if linear else set())
    assert set().union(*seen.values()) == {torch.float32}


def test_what_a_gpu_runs_has_its_casts_of_weights_folded():
    """As the loader freezes it: no cast but those of activations is left."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    low, x = with_rounded_results(layers, torch.float16).eval(), torch.randn(2, 8)
    with quiet():
        frozen = torch.jit.freeze(torch.jit.trace(low, x))
    casts = [node for node in frozen.graph.nodes() if node.kind() == "aten::to"]
    assert len(casts) == 2 + 1  # the input of each product, which may be no cast, and the result
    assert torch.allclose(frozen(x), layers(x), atol=BUILT["fp16"])


@pytest.mark.parametrize("cast", [with_compute, with_rounded_results])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_encoder_itself_is_left_alone(encoder, compute, cast):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    copy = cast(encoder, compute)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


MIXED: dict[str, dict[str, Any]] = {
    # float32 masks, biases of positions and scales meet what layers hand on in 16 bits.
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2], "num_heads": [2],
             "window_size": 4},
    "swinv2": {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2],
               "num_heads": [2], "window_size": 4},
    "beit": {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 32,
             "use_relative_position_bias": True, "attn_implementation": "eager"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MIXED)
@torch.inference_mode()
def test_types_that_meet_in_attention_are_made_one(name, kind):
    torch.manual_seed(0)
    vision = VisionEncoder(build_backbone(backbone_config({"model_type": name, **MIXED[name]})))
    pixels = torch.randn(3, 3, 32, 32)
    want, got = (
        module.eval()(pixels)
        for module in (vision, with_rounded_results(vision, TORCH_TYPES[kind]))
    )
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 2 * BUILT[kind] * want.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert", "roberta"])
@torch.inference_mode()
def test_padded_texts_are_encoded_in_16_bits_too(name, attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": 40}
    if name == "distilbert":
        sizes = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40}
    if name == "mpnet" and attention == "sdpa":
        pytest.skip("transformers has one attention for it")
    description = {"model_type": name, **sizes, "attn_implementation": attention}
    text = TextEncoder(build_backbone(backbone_config(description))).eval()
    ids, mask = torch.arange(4, 16).view(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    want, got = text(ids, mask), with_rounded_results(text, torch.float16)(ids, mask)
    assert (got - want).abs().max() <= BUILT["fp16"] * want.abs().max()


class Picky(nn.Module):
    """An encoder that wants float32 everywhere, wherever it is said to be."""

    def to(self, *_: object) -> Picky:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("expected Float,\nbut found Half")
        return x


def test_an_encoder_that_cannot_keep_16_bits_is_warned_of(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_: x.half())
    message = r"cannot keep its results in 16 bits, .*slower: expected Float, but found Half"
    with pytest.warns(MarnetWarning, match=message):
        modules.on_device(Picky(), torch.float16, "cuda", torch.ones(1))


def test_a_gpu_without_memory_is_no_reason_for_a_slower_encoder(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_: x)
    monkeypatch.setattr(Picky, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        modules.on_device(Picky(), torch.float16, "cuda", torch.ones(1))

"""The rewritten reverse loop is the loop as the paper writes it: same numbers, fewer products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import FLOAT64

from marnet_export.plan import make_plan, run_plan
from marnet_sdk.errors import ExportError, InvalidInput
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.diffusion import ScheduleConfig, sampler_table, trajectory_tensors
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet, MarnetConfig

RESNET = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", "depths": [1]}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}


def make_model(
    *, steps: int = 100, dim: int = 8, hidden: int = 12, condition: int = 10, time_dim: int = 6
) -> MARNet:
    """float64, with fresh weights, whose loop contracts, and statistics far from 0 and 1."""
    torch.manual_seed(0)
    config = MarnetConfig(
        vision={**RESNET, "hidden_sizes": [condition]},
        text={**BERT, "hidden_size": dim, "num_attention_heads": 2},
        labels=("a", "b"),
        hidden=hidden,
        time_dim=time_dim,
        schedule=ScheduleConfig(steps=steps),
    )
    model = MARNet(config).double().eval()
    model.vision_mean.copy_(3 * torch.randn(condition))
    model.vision_std.copy_(0.2 + 3 * torch.rand(condition))
    return model


def noise_of(model: MARNet, steps: int | None):
    """The sampler's table and its noise trajectory at one seed."""
    table = sampler_table(model.config.schedule, "ddpm", steps)
    noise = draw_trajectory(7, table.timesteps, table.train_steps, model.denoiser.dim)
    return table, noise


@torch.no_grad()
def plain_loop(model: MARNet, x_v: np.ndarray, steps: int | None) -> np.ndarray:
    table, trajectory = noise_of(model, steps)
    features = torch.from_numpy(x_v)
    initial, noise = trajectory_tensors(trajectory, len(features), features)
    return model.refine(features, table, initial, noise).numpy()


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize(
    ("train_steps", "steps"),
    [(1, None), (2, None), (10, None), (100, None), (100, 1), (100, 2), (100, 33), (100, 50)],
)
def test_the_plan_gives_what_the_plain_loop_gives(carry, train_steps, steps):
    model = make_model(steps=train_steps)
    x_v = 2 + 3 * np.random.default_rng(1).standard_normal((5, 10))
    plan = make_plan(model, steps=steps, carry=carry)
    got = run_plan(plan, x_v, noise_of(model, steps)[1])
    want = plain_loop(model, x_v, steps)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT64 * np.abs(want).max())


@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_image_noise_and_steps_all_matter_to_the_answer(carry):
    """A plan that ignored one of its inputs could agree with a loop that ignored it too."""
    model = make_model(steps=10)
    x_v = np.random.default_rng(1).standard_normal((2, 10))
    _, noise = noise_of(model, None)
    other = draw_trajectory(8, range(10, 0, -1), 10, 8)
    answer = run_plan(make_plan(model, carry=carry), x_v, noise)
    assert np.abs(answer[0] - answer[1]).max() > 1e-3
    assert np.abs(run_plan(make_plan(model, carry=carry), x_v, other) - answer).max() > 1e-6
    fewer = run_plan(make_plan(model, steps=5, carry=carry), x_v, noise_of(model, 5)[1])
    assert np.abs(fewer - answer).max() > 1e-6


@pytest.mark.parametrize(
    ("dim", "hidden", "carry"), [(8, 4, "hidden"), (8, 15, "hidden"), (8, 17, "feature")]
)
def test_the_cheaper_carry_is_chosen(dim, hidden, carry):
    model = make_model(dim=dim, hidden=hidden, steps=2)
    chosen = make_plan(model)
    assert chosen.carry == carry
    alternatives = [make_plan(model, carry=c).multiply_adds for c in ("hidden", "feature")]
    assert chosen.multiply_adds == min(alternatives)


def test_the_paper_s_denoiser_costs_three_square_products_a_step_instead_of_four_and_more():
    model = make_model(steps=1)
    model.denoiser = Denoiser(dim=768, condition_dim=768, hidden=1024, time_dim=64).double()
    model.vision_mean, model.vision_std = torch.zeros(768), torch.ones(768)
    plan = make_plan(model)
    assert plan.carry == "hidden"
    assert plan.multiply_adds == 3 * 1024 * 1024 == 3_145_728
    # [x ; condition] to 1024, twice 1024 to 1024, 1024 to 768
    assert plan.plain_multiply_adds == 1_600 * 1_024 + 2 * 1_048_576 + 786_432 == 4_521_984


def test_carrying_the_feature_costs_both_outer_layers():
    plan = make_plan(make_model(dim=8, hidden=12), carry="feature")
    assert plan.multiply_adds == 8 * 12 + 2 * 12 * 12 + 12 * 8


def test_noise_is_folded_with_the_input_weight_only_where_the_hidden_state_is_carried():
    model = make_model(dim=8, hidden=12, steps=4)
    hidden, feature = (make_plan(model, carry=c).tensors() for c in ("hidden", "feature"))
    assert {k: v.shape for k, v in hidden.items()} == {
        "coefficients": (4, 4),
        "time_bias": (4, 12),
        "input_weight": (12, 8),
    }
    assert feature.keys() == {"coefficients", "time_bias"}
    assert {v.dtype for v in hidden.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ("layer1.weight", "input_weight|condition_weight|carry_weight"),
        ("layer1.bias", "time_bias"),
        ("layer2.weight", "hidden2"),
        ("layer3.bias", "hidden3"),
        ("layer4.weight", "carry_weight"),
        ("layer4.bias", "carry_weight"),
        ("time.outer.bias", "time_bias"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(layer, named, bad):
    model = make_model(steps=2)
    with torch.no_grad():
        model.denoiser.get_parameter(layer).view(-1)[0] = bad
    message = f"plan's ({named}) holds NaN or infinite values.*train it again"
    with np.errstate(invalid="ignore"), pytest.raises(ExportError, match=message):
        make_plan(model)


def test_a_product_of_weights_that_overflows_is_refused():
    model = make_model(steps=2)
    with torch.no_grad():
        model.denoiser.layer1.weight[0, 0] = 1e200
        model.denoiser.layer4.weight[0, 0] = 1e200
    with np.errstate(over="ignore"), pytest.raises(ExportError, match="carry_weight"):
        make_plan(model, carry="hidden")


@pytest.mark.parametrize("steps", [0, 5])
def test_steps_outside_the_schedule_are_refused(steps):
    with pytest.raises(InvalidInput, match=f"got {steps} sampling steps.*choose 1 to 4"):
        make_plan(make_model(steps=4), steps=steps)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(InvalidInput, match="sampler 'euler' is unknown"):
        make_plan(make_model(steps=4), "euler")

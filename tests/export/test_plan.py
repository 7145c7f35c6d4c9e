"""The rewritten reverse loop is the loop as the paper writes it: same numbers, fewer products."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_twin import run_plan
from quick import kept
from tiny import make_model, make_seda, tables_of
from tolerances import FLOAT32_LOOP, FLOAT64

from marnet_export.lower.modules import PlanStep, ScanLoop, ScriptedLoop
from marnet_export.lower.plan import check_step, make_plan
from marnet_export.lower.seda import seeing_plan
from marnet_sdk.errors import ExportError
from marnet_sdk.noise.trajectory import NoiseTrajectory, draw_trajectory
from marnet_train.checkpoint import load_checkpoint
from marnet_train.diffusion import SAMPLERS, SamplerTable, sampler_table
from marnet_train.models.denoiser import Denoiser
from marnet_train.models.marnet import MARNet

Floats = np.ndarray


def draw(model: MARNet, table: SamplerTable, samples: int = 1, seed: int = 7):
    width = model.denoiser.dim
    return [
        draw_trajectory(seed, table.timesteps, table.train_steps, width, trajectory=k)
        for k in range(samples)
    ]


@torch.no_grad()
def plain_loop(model: MARNet, table: SamplerTable, x_v: Floats, drawn: list[NoiseTrajectory]):
    """x_CDR [N, K, D], in the model's own type."""
    features = torch.from_numpy(x_v).to(model.vision_mean)
    chains = []
    for trajectory in drawn:
        initial = torch.as_tensor(trajectory.initial).to(features).expand(len(features), -1)
        noise = torch.as_tensor(trajectory.steps).to(features)[:, None]
        chains.append(model.refine(features, table, initial, noise))
    return torch.stack(chains, dim=1).numpy()


def features_of(model: MARNet, count: int = 5) -> Floats:
    width = len(model.vision_mean)
    return 2 + 3 * np.random.default_rng(1).standard_normal((count, width))


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("train_steps", "steps"),
    kept(
        [(1, 1), (2, 2), (10, 10), (100, 1), (100, 33), (100, 100)],
        {(1, 1), (10, 10), (100, 33)},
        many=True,
    ),
)
def test_the_plan_gives_what_the_plain_loop_gives(carry, samples, sampler, train_steps, steps):
    model = make_model(steps=train_steps).double()
    table = sampler_table(model.config.schedule, sampler, steps)
    drawn, x_v = draw(model, table, samples), features_of(model)
    got = run_plan(make_plan(model, carry), table, x_v, drawn)
    want = plain_loop(model, table, x_v, drawn)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT64 * np.abs(want).max())


@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_stochastic_ddim_is_no_exception(carry):
    model = make_model().double()
    table = sampler_table(model.config.schedule, "ddim", 20, eta=0.7)
    drawn, x_v = draw(model, table, 2), features_of(model)
    got = run_plan(make_plan(model, carry), table, x_v, drawn)
    want = plain_loop(model, table, x_v, drawn)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT64 * np.abs(want).max())


PROGRESSIVE = [("ddpm", 1), ("ddpm", 10), ("ddim", 3), ("dpmpp", 7)]


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize(("sampler", "steps"), PROGRESSIVE)
def test_a_progressive_plan_gives_what_the_plain_loop_gives(carry, sampler, steps):
    model = make_model(steps=10, progressive=True).double()
    table = sampler_table(model.config.schedule, sampler, steps)
    drawn, x_v = draw(model, table, 2), features_of(model)
    got = run_plan(make_plan(model, carry), table, x_v, drawn)
    want = plain_loop(model, table, x_v, drawn)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT64 * np.abs(want).max())
    with torch.no_grad():
        model.denoiser.layer1.weight[:, 8:16] = 0  # of the estimate before
    blind = plain_loop(model, table, x_v, drawn)
    assert (np.abs(blind - want).max() > 1e-6) == (steps > 1)


@pytest.mark.parametrize("carry", ["hidden", "feature"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("sampler", "steps"), PROGRESSIVE)
def test_the_plan_of_a_chain_that_carries_another_on_starts_where_that_ended(
    carry, progressive, sampler, steps
):
    model = make_seda(latent=10, steps=10, handover="carry", progressive=progressive).double()
    table = sampler_table(model.config.schedule, sampler, steps)
    with torch.no_grad():
        seen = model.see(torch.from_numpy(features_of(model))).numpy()
    seen[:, 20:] += features_of(model)  # fresh weights leave little
    drawn, plan = draw(model, table, 2), seeing_plan(model, carry)
    got, want = run_plan(plan, table, seen, drawn), plain_loop(model, table, seen, drawn)
    np.testing.assert_allclose(got, want, rtol=0, atol=FLOAT64 * np.abs(want).max())
    seen[:, 20:] = 0
    assert np.abs(run_plan(plan, table, seen, drawn) - want).max() > 1e-6
    assert plan.multiply_adds_before == plan.condition_weight.size + plan.matrices()["start"].size


@torch.inference_mode()
def float32_loop(
    form: type[ScriptedLoop], model: MARNet, table: SamplerTable, x_v: Floats, samples: int
) -> Floats:
    """As it is deployed: float32 tables folded from the bundle's plan, seed 7."""
    plan = make_plan(model)
    tables = tables_of(model, plan, table, seed=7, samples=samples)
    if form is ScanLoop:
        tables = tables.at_least_two_steps()
    arrays = (x_v.astype(np.float32), tables.coefficients, tables.bias)
    return form(PlanStep(plan))(*map(torch.from_numpy, arrays)).numpy()


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("form", "steps"),
    # The eager scan of a thousand steps takes minutes; built, it is held to this in test_builders.
    kept(
        [
            *((ScriptedLoop, s) for s in (1, 2, 10, 100, 1000)),
            *((ScanLoop, s) for s in (1, 2, 10, 100)),
        ],
        {(ScriptedLoop, 1), (ScriptedLoop, 10), (ScriptedLoop, 100), (ScanLoop, 10)},
        many=True,
    ),
)
def test_in_float32_it_is_the_float64_loop_to_the_last_bits(form, samples, sampler, steps):
    """On weights whose chain contracts, so that its error is its own."""
    model = make_model(steps=steps, dim=24, hidden=32)
    table = sampler_table(model.config.schedule, sampler)
    x_v = features_of(model).astype(np.float32)
    got = float32_loop(form, model, table, x_v, samples)
    want = plain_loop(model.double(), table, x_v, draw(model, table, samples))
    assert np.abs(got - want).max() <= FLOAT32_LOOP * np.abs(want).max()


@pytest.mark.parametrize("hidden", [32, 64], ids=["carries hidden", "carries feature"])
@pytest.mark.parametrize("form", [ScriptedLoop, ScanLoop])
@pytest.mark.parametrize(("sampler", "steps"), PROGRESSIVE[::3])
def test_a_progressive_loop_in_float32_is_the_float64_loop_to_the_last_bits(
    form, hidden, sampler, steps
):
    """A scan of one step has a step before it that must not be fed back."""
    model = make_model(steps=10, dim=24, hidden=hidden, progressive=True)
    table = sampler_table(model.config.schedule, sampler, steps)
    x_v = features_of(model).astype(np.float32)
    got = float32_loop(form, model, table, x_v, 2)
    want = plain_loop(model.double(), table, x_v, draw(model, table, 2))
    assert np.abs(got - want).max() <= FLOAT32_LOOP * np.abs(want).max()


def trained(checkpoint: Path) -> MARNet:
    return load_checkpoint(checkpoint).model


def large_norms(checkpoint: Path) -> MARNet:
    """Sums of terms thirty times their result."""
    model = trained(checkpoint)
    with torch.no_grad():
        for layer in (model.denoiser.layer2, model.denoiser.layer3):
            rank_one = torch.outer(
                torch.randn(len(layer.weight)), torch.ones(layer.weight.shape[1])
            )
            layer.weight += 2 * layer.weight.abs().mean() * rank_one
    return model


def near_singular_input(checkpoint: Path) -> MARNet:
    """W_x with singular values over six decades."""
    model = trained(checkpoint)
    dim = model.denoiser.dim
    with torch.no_grad():
        weight = model.denoiser.layer1.weight
        u, s, v = torch.linalg.svd(weight[:, :dim], full_matrices=False)
        weight[:, :dim] = u @ torch.diag(s[0] * torch.logspace(0, -6, len(s))) @ v
    return model


def large_outputs(checkpoint: Path) -> MARNet:
    """Estimates three times too long, so that the chain amplifies what it should damp."""
    model = trained(checkpoint)
    with torch.no_grad():
        model.denoiser.layer4.weight *= 3
        model.denoiser.layer4.bias *= 3
    return model


def quantiles(got: Floats, want: Floats) -> Floats:
    """Median, 99th percentile and maximum of the relative error of the rows."""
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return np.quantile(error, [0.5, 0.99, 1])


@pytest.mark.parametrize(
    ("weights", "sampler"),
    kept(
        product((trained, large_norms, near_singular_input, large_outputs), SAMPLERS),
        {
            (trained, "ddpm"),
            (large_norms, "dpmpp"),
        },
        many=True,
    ),
)
def test_on_hard_weights_it_errs_no_more_than_twice_as_much_as_the_plain_float32_loop(
    weights, sampler, checkpoint
):
    """Where the chain amplifies roundings, both amplify theirs: compare over 2,000 chains."""
    torch.manual_seed(0)
    model = weights(checkpoint)
    table = sampler_table(model.config.schedule, sampler)
    x_v = hard_features(model)
    drawn = draw(model, table, 4)
    plain = plain_loop(model, table, x_v, drawn)
    got = float32_loop(ScriptedLoop, model, table, x_v, 4)
    want = plain_loop(model.double(), table, x_v, drawn)
    ours, theirs = quantiles(got, want), quantiles(plain, want)
    assert (ours <= 2 * theirs).all(), (ours, theirs)


def hard_features(model: MARNet) -> Floats:
    rng = np.random.default_rng(2)
    mean, std = model.vision_mean.numpy(), model.vision_std.numpy()
    return (mean + std * rng.standard_normal((500, len(mean)))).astype(np.float32)


@pytest.mark.parametrize("carry", ["hidden", "feature"])
def test_image_noise_and_steps_all_matter_to_the_answer(carry):
    """A plan that ignored one of its inputs could agree with a loop that ignored it too."""
    model = make_model(steps=10).double()
    plan, x_v = make_plan(model, carry), features_of(model, 2)
    table, few = (sampler_table(model.config.schedule, "ddpm", steps) for steps in (10, 5))
    answer = run_plan(plan, table, x_v, draw(model, table, 2))
    assert np.abs(answer[0] - answer[1]).max() > 1e-3
    assert np.abs(answer[:, 0] - answer[:, 1]).max() > 1e-6
    other = run_plan(plan, table, x_v, draw(model, table, 2, seed=8))
    assert np.abs(other - answer).max() > 1e-6
    fewer = run_plan(plan, few, x_v, draw(model, few, 2))
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


@pytest.fixture(scope="module")
def paper_plan():
    """With the denoiser of the paper."""
    model = make_model(steps=2)
    model.denoiser = Denoiser(dim=768, condition_dim=768, hidden=1024, time_dim=64)
    model.vision_mean, model.vision_std = torch.zeros(768), torch.ones(768)
    return make_plan(model)


def test_the_paper_s_denoiser_costs_three_square_products_a_step_instead_of_four_and_more(
    paper_plan,
):
    assert (paper_plan.carry, paper_plan.products) == ("hidden", 3)
    assert paper_plan.multiply_adds == 3 * 1024 * 1024 == 3_145_728
    # [x ; condition ; time] to 1024, twice 1024 to 1024, 1024 to 768
    assert paper_plan.plain_multiply_adds == 1_600 * 1_024 + 2 * 1_048_576 + 786_432 == 4_521_984


def test_a_progressive_denoiser_costs_one_square_product_more_and_waits_for_no_more():
    model = make_model(dim=8, hidden=12, condition=10, progressive=True)
    plan = make_plan(model)
    assert (plan.carry, plan.products, plan.multiply_adds) == ("hidden", 3, 4 * 12 * 12)
    assert plan.plain_multiply_adds == (8 + 8 + 10 + 6 + 12 + 12 + 8) * 12
    table = sampler_table(model.config.schedule, "ddpm", 10)
    assert "the hidden state and the estimate before carried" in plan.sentence(table)


def test_carrying_the_feature_costs_both_outer_layers():
    plan = make_plan(make_model(dim=8, hidden=12), carry="feature")
    assert plan.multiply_adds == 8 * 12 + 2 * 12 * 12 + 12 * 8
    assert plan.products == 4


def test_what_is_saved_is_explained_in_numbers(paper_plan):
    rows = {what: (before, after) for what, before, after in paper_plan.explain("bf16")}
    assert rows["multiply-adds, per image and step"] == ("4,521,984", "3,145,728")
    assert rows["weights read, bytes per step"] == ("9,043,968", "6,291,456")
    assert rows["matrix products one after another, per step"] == ("4", "3")
    assert rows["multiply-adds before the loop, per image"] == ("0", f"{768 * 1024:,}")
    wide = {what: after for what, _, after in paper_plan.explain("fp32")}
    assert wide["weights read, bytes per step"] == f"{4 * 3_145_728:,}"


def test_the_cost_of_noise_keyed_by_image_is_counted():
    model = make_model(dim=8, hidden=12)
    plan = make_plan(model)
    ddpm, ddim = (sampler_table(model.config.schedule, s, 10) for s in ("ddpm", "ddim"))
    # ddpm's last step adds none: x_T and nine more vectors of eight; ddim needs x_T alone.
    assert "keyed by image: 80 normals and 960 float64" in plan.noise_cost(ddpm)
    assert "keyed by image: 8 normals and 960 float64" in plan.noise_cost(ddim)


def test_a_bundle_s_arrays_do_not_depend_on_the_number_of_steps_but_for_the_coefficients():
    model = make_model(dim=8, hidden=12, steps=4)
    tables = {f"s{n}": sampler_table(model.config.schedule, "ddpm", n) for n in (2, 4)}
    for carry in ("hidden", "feature"):
        arrays = make_plan(model, carry).tensors(tables)
        assert {k: v.shape for k, v in arrays.items()} == {
            "time_bias": (4, 12),
            "input_weight": (12, 8),
            "output_bias": (8,),
            "coefficients.s2": (2, 4),
            "coefficients.s4": (4, 4),
        }
    # Folding continues in float64, so the coefficients are not rounded before.
    assert {k: v.dtype.name for k, v in arrays.items() if k.startswith("c")} == {
        "coefficients.s2": "float64",
        "coefficients.s4": "float64",
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ("layer1.weight", "input_weight|condition_weight|carry_weight"),
        ("layer1.bias", "time_bias"),
        ("layer2.weight", "hidden2"),
        ("layer3.bias", "hidden3"),
        ("layer4.weight", "carry_weight"),
        ("layer4.bias", "output"),
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
    model = make_model(steps=2).double()
    with torch.no_grad():
        model.denoiser.layer1.weight[0, 0] = 1e200
        model.denoiser.layer4.weight[0, 0] = 1e200
    with np.errstate(over="ignore"), pytest.raises(ExportError, match="carry_weight"):
        make_plan(model, carry="hidden")


def exploding() -> MARNet:
    """Every step multiplies the state by about 1e30."""
    model = make_model(steps=50).double()
    with torch.no_grad():
        model.denoiser.layer4.weight *= 1e30
    return model


def test_a_chain_that_leaves_the_finite_numbers_is_refused_with_the_step_named():
    model = exploding()
    table = sampler_table(model.config.schedule, "ddim", 50)
    message = r"NaN or infinity from step (\d+) of 50 on \(t = (\d+), ddim\).*does not contract"
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(ExportError, match=message) as caught,
    ):
        run_plan(make_plan(model), table, features_of(model), draw(model, table))
    step = int(str(caught.value).split("step ")[1].split()[0])
    # Cut before the step that is named, the chain is finite; cut behind it, it is not.
    watched: list[bool] = []
    x_v, drawn = features_of(model), draw(model, table)[0]
    with torch.no_grad():
        features = torch.from_numpy(x_v)
        model.refine(
            features,
            table,
            torch.from_numpy(drawn.initial).expand(5, -1),
            torch.from_numpy(drawn.steps)[:, None],
            lambda i, x0: watched.append(bool(torch.isfinite(x0).all())),
        )
    assert 3 < step < 45
    assert watched.index(False) == step - 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_one_value_that_is_not_finite_is_enough(bad, kind):
    table = sampler_table(make_model(steps=4).config.schedule, "ddpm")
    check_step(kind([[0.0, 1e30]]), table, 2)
    with pytest.raises(ExportError, match=r"from step 3 of 4 on \(t = 2, ddpm\)"):
        check_step(kind([[0.0, bad]]), table, 2)

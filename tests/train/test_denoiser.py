"""The denoiser: its size, its time embedding, and the blocks of its first layer.

Axes: B batch, D feature, D_c condition, E time, H hidden.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOAT32_LAYER, FLOAT64

from marnet_train.models.denoiser import Denoiser, TimeEmbedding, sinusoidal_embedding


@pytest.fixture
def small() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(dim=6, condition_dim=5, hidden=12, time_dim=4).double()


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, dtype=torch.float64, generator=generator)
    condition = torch.randn(batch, 5, dtype=torch.float64, generator=generator)
    return x, torch.tensor([1, 40, 100][:batch]), condition


def test_the_papers_size_has_4_53_million_parameters() -> None:
    model = Denoiser(dim=768, condition_dim=768, hidden=1024, time_dim=64)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 4.53


def test_it_is_four_linear_layers_with_leaky_relu_between(small: Denoiser) -> None:
    """Section 1.3, M5: [z ; x_v ; tau(t)], slope 0.01 after each but the last."""
    x, t, condition = inputs()
    h = torch.cat([x, condition, small.time(t)], dim=1)
    for i in (1, 2, 3, 4):
        layer = getattr(small, f"layer{i}")
        h = h @ layer.weight.T + layer.bias
        h = torch.where((h < 0) & torch.tensor(i < 4), 0.01 * h, h)
    torch.testing.assert_close(small(x, t, condition), h, rtol=FLOAT64, atol=FLOAT64)


def test_the_blocks_of_the_first_layer_reassemble_it(small: Denoiser) -> None:
    w_x, w_c, w_t = small.split_input_weight()
    assert (w_x.shape, w_c.shape, w_t.shape) == ((12, 6), (12, 5), (12, 4))
    assert torch.equal(torch.cat([w_x, w_c, w_t], dim=1), small.layer1.weight)


def test_the_blocks_give_the_first_layer_in_parts(small: Denoiser) -> None:
    """What every exported loop does: the parts of condition and time are computed once."""
    x, t, condition = inputs()
    w_x, w_c, w_t = small.split_input_weight()
    parts = x @ w_x.T + condition @ w_c.T + small.time(t) @ w_t.T + small.layer1.bias
    whole = small.layer1(torch.cat([x, condition, small.time(t)], dim=1))
    torch.testing.assert_close(parts, whole, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("t", [1, 40, 100])
def test_the_steps_of_one_condition_are_those_of_the_whole_network(t: int, small: Denoiser) -> None:
    x, _, condition = inputs()
    steps = torch.full((3,), t)
    found = small.given(condition)(x, steps)
    torch.testing.assert_close(found, small(x, steps, condition), rtol=FLOAT64, atol=FLOAT64)


def test_every_input_matters(small: Denoiser) -> None:
    x, t, condition = inputs()
    out = small(x, t, condition)
    assert not torch.allclose(out, small(x + 1, t, condition))
    assert not torch.allclose(out, small(x, t + 1, condition))
    assert not torch.allclose(out, small(x, t, condition + 1))


def test_rows_do_not_influence_each_other(small: Denoiser) -> None:
    x, t, condition = inputs()
    alone = torch.cat([small(x[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(small(x, t, condition), alone, rtol=FLOAT64, atol=FLOAT64)


def test_the_sinusoidal_table_is_the_published_one() -> None:
    """cos, then sin, of t / 10000^(2 i / E)."""
    found = sinusoidal_embedding(torch.tensor([0, 3, 100]), 8)
    angles = [[t / 10_000 ** (i / 4) for i in range(4)] for t in (0, 3, 100)]
    by_hand = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(found, torch.tensor(by_hand), rtol=0, atol=FLOAT32_LAYER)


def test_all_timesteps_of_a_long_schedule_are_told_apart() -> None:
    table = sinusoidal_embedding(torch.arange(1, 1001), 64)
    nearest = torch.cdist(table, table) + 10 * torch.eye(1000)
    assert float(nearest.min()) > 0.1


def test_the_time_embedding_is_linear_silu_linear_of_the_table() -> None:
    torch.manual_seed(0)
    embed, t = TimeEmbedding(6), torch.tensor([1, 7])
    h = embed.inner(sinusoidal_embedding(t, 6))
    torch.testing.assert_close(embed(t), embed.outer(h * F.sigmoid(h)))


@pytest.fixture
def progressive() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(dim=6, condition_dim=5, hidden=12, time_dim=4, progressive=True).double()


def test_in_half_of_the_calls_training_shows_a_progressive_denoiser_its_own_estimate(
    progressive: Denoiser,
) -> None:
    """Analog Bits, algorithm 1: the same x_t once more, without a gradient through the first."""
    x, t, condition = inputs()
    zero = torch.zeros_like(x)
    blind = progressive(torch.cat([x, zero], dim=1), t, condition)
    told = progressive(torch.cat([x, blind.detach()], dim=1), t, condition)
    gradient = torch.autograd.grad(told.sum(), progressive.layer4.weight)[0]
    generator = torch.Generator().manual_seed(3)
    found = [progressive.estimate(x, t, condition, generator) for _ in range(200)]
    second = [estimate for estimate in found if not torch.equal(estimate, blind)]
    assert 70 <= len(second) <= 130
    assert all(torch.equal(estimate, told) for estimate in second)
    again = torch.autograd.grad(second[0].sum(), progressive.layer4.weight)[0]
    torch.testing.assert_close(again, gradient, rtol=FLOAT64, atol=FLOAT64)


def test_others_are_trained_on_what_they_see_and_draw_nothing(small: Denoiser) -> None:
    x, t, condition = inputs()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert torch.equal(small.estimate(x, t, condition, generator), small(x, t, condition))
    assert torch.equal(generator.get_state(), before)


def test_the_steps_of_a_progressive_denoiser_are_those_of_the_whole(progressive: Denoiser) -> None:
    x, _, condition = inputs()
    seen, steps = torch.cat([x, x + 1], dim=1), torch.full((3,), 7)
    found = progressive.given(condition)(seen, steps)
    torch.testing.assert_close(
        found, progressive(seen, steps, condition), rtol=FLOAT64, atol=FLOAT64
    )
    blind = torch.cat([x, torch.zeros_like(x)], dim=1)
    assert not torch.allclose(found, progressive(blind, steps, condition))

"""The five fusion operators: oracle values, the naive formula, inputs that would overflow it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT32_LAYER, FLOAT64, PRINTED

from marnet_train.models.fusion import FUSIONS

ELEMENTWISE = ("add", "mul", "sum", "hm")


def fused(name: str, a: float, b: float) -> float:
    vectors = (torch.tensor([[value]], dtype=torch.float64) for value in (a, b))
    return float(FUSIONS[name](*vectors))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("a", "b", "log_sum", "harmonic"),
    [
        (1, 2, -0.048587, -0.937270),
        (0, 0, -0.693147, -1.609438),
        (-3, 4, -0.313262, -3.112258),
        (30, 30, 0.0, -0.693147),
        (-30, -30, -60.0, -60.0),
    ],
)
def test_sum_and_hm_have_the_oracle_values(
    a: float, b: float, log_sum: float, harmonic: float
) -> None:
    assert fused("sum", a, b) == pytest.approx(log_sum, abs=PRINTED)
    assert fused("hm", a, b) == pytest.approx(harmonic, abs=PRINTED)


@given(a=st.floats(-12, 12), b=st.floats(-12, 12))
def test_every_operator_is_its_naive_formula_where_that_is_safe(a: float, b: float) -> None:
    h = logistic(a) * logistic(b)
    naive = {
        "add": a + b,
        "mul": a * b,
        "sum": math.log(logistic(a + b)),
        "hm": math.log(h / (1 + h)),
    }
    for name, value in naive.items():
        assert fused(name, a, b) == pytest.approx(value, rel=FLOAT64, abs=FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
def test_large_inputs_stay_finite_and_right(size: float, dtype: torch.dtype) -> None:
    a = torch.tensor([[size, -size, size, -size]], dtype=dtype, requires_grad=True)
    b = torch.tensor([[size, -size, -size, size]], dtype=dtype)
    log_sum, harmonic = FUSIONS["sum"](a, b), FUSIONS["hm"](a, b)
    ln2 = math.log(2)
    expected_sum = torch.tensor([[0, -2 * size, -ln2, -ln2]], dtype=dtype)
    expected_hm = torch.tensor([[-ln2, -2 * size, -size, -size]], dtype=dtype)
    torch.testing.assert_close(log_sum, expected_sum, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)
    torch.testing.assert_close(harmonic, expected_hm, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)
    (log_sum.sum() + harmonic.sum()).backward()
    assert torch.isfinite(a.grad).all()


@given(a=st.floats(-1e6, 1e6), b=st.floats(-1e6, 1e6))
def test_sum_and_hm_stay_below_their_bounds_and_treat_both_branches_alike(
    a: float, b: float
) -> None:
    assert fused("sum", a, b) <= 0
    assert fused("hm", a, b) <= -math.log(2) + FLOAT64
    for name in ELEMENTWISE:
        assert fused(name, a, b) == fused(name, b, a)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operators_keep_the_shape_and_mix_no_elements(name: str) -> None:
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)
    out = FUSIONS[name](a, b)
    assert out.shape == (3, 5)
    assert float(out[1, 2]) == pytest.approx(fused(name, float(a[1, 2]), float(b[1, 2])))


def test_concat_puts_the_aligned_features_before_the_refined_ones() -> None:
    a, b = torch.zeros(3, 2), torch.ones(3, 4)
    assert torch.equal(FUSIONS["concat"](a, b), torch.tensor([[0.0, 0, 1, 1, 1, 1]] * 3))

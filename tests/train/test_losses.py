"""Losses against their formulas, written out row by row.

Axes: B batch, D feature, K classes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import BF16_LAYER, FLOAT32_LAYER, FLOAT64, PRINTED
from torch import Tensor

from marnet_train.losses import (
    classification_loss,
    cosine_similarity_matrix,
    ita_loss,
    reconstruction_loss,
    refinement_loss,
)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    visual, semantic = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    return visual, semantic


@pytest.fixture
def classified() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, dtype=torch.float64, generator=generator), torch.tensor(
        [0, 2, 1, 1, 0]
    )


def similarity(a: Tensor, b: Tensor) -> float:
    """Equation (5)."""
    return float(sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)))


def one_direction(queries: Tensor, keys: Tensor, tau: float) -> float:
    """Mean over rows of equation (9)."""
    total = 0.0
    for i in range(len(queries)):
        scores = [math.exp(similarity(queries[i], key) / tau) for key in keys]
        total -= math.log(scores[i] / sum(scores))
    return total / len(queries)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over rows of equation (12)."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total -= math.log(math.exp(row[label]) / sum(math.exp(x) for x in row))
    return total / len(labels)


def test_alignment_of_equal_similarities_is_twice_the_logarithm_of_the_batch() -> None:
    same = torch.ones(4, 6, dtype=torch.float64)
    assert float(ita_loss(same, same)) == pytest.approx(2.772589, abs=PRINTED)


def test_alignment_of_an_orthonormal_perfect_match_is_nearly_zero() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    assert float(ita_loss(eye, eye, temperature=0.07)) == pytest.approx(3.749e-6, abs=1e-9)


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_alignment_is_equations_9_to_11_row_by_row(pair: tuple, tau: float) -> None:
    visual, semantic = pair
    by_hand = one_direction(visual, semantic, tau) + one_direction(semantic, visual, tau)
    assert float(ita_loss(visual, semantic, tau)) == pytest.approx(by_hand, rel=FLOAT64)


def test_alignment_does_not_depend_on_the_lengths_of_the_vectors(pair: tuple) -> None:
    visual, semantic = pair
    scale = torch.tensor([0.01, 1, 5, 70, 1000], dtype=torch.float64)[:, None]
    torch.testing.assert_close(ita_loss(visual * scale, semantic / scale), ita_loss(*pair))


def test_alignment_of_the_true_pairs_is_lower_than_of_shifted_ones(pair: tuple) -> None:
    visual, _ = pair
    assert ita_loss(visual, visual) < ita_loss(visual, visual.roll(1, dims=0))


def test_a_step_against_the_gradient_brings_pairs_together(pair: tuple) -> None:
    visual, semantic = pair
    visual.requires_grad_()
    loss = ita_loss(visual, semantic)
    (gradient,) = torch.autograd.grad(loss, visual)
    moved = (visual - 0.01 * gradient).detach()
    assert ita_loss(moved, semantic) < loss
    before, after = (cosine_similarity_matrix(x, semantic).diagonal() for x in (visual, moved))
    assert after.mean() > before.mean()


def test_pairs_with_the_same_text_are_no_negatives_of_each_other(pair: tuple) -> None:
    """Rows 0, 2 and 3 share a text, 1 and 4 have their own: each pair stays its own positive."""
    visual, semantic = pair
    negatives = {0: (1, 4), 1: (0, 2, 3, 4), 2: (1, 4), 3: (1, 4), 4: (0, 1, 2, 3)}
    by_hand = 0.0
    for queries, keys in ((visual, semantic), (semantic, visual)):
        for i, others in negatives.items():
            scores = {j: math.exp(similarity(queries[i], keys[j]) / 0.5) for j in (i, *others)}
            by_hand -= math.log(scores[i] / sum(scores.values())) / 5
    found = ita_loss(visual, semantic, 0.5, torch.tensor([7, 1, 7, 7, 3]))
    assert float(found) == pytest.approx(by_hand, rel=FLOAT64)


def test_texts_that_all_differ_leave_every_negative(pair: tuple) -> None:
    assert torch.equal(ita_loss(*pair, groups=torch.arange(5)), ita_loss(*pair))


def test_without_any_negative_there_is_nothing_to_align_and_no_nan(pair: tuple) -> None:
    visual, semantic = pair[0].requires_grad_(), pair[1]
    loss = ita_loss(visual, semantic, groups=torch.zeros(5))
    loss.backward()
    assert loss.item() == 0
    assert not visual.grad.any()


def test_a_temperature_may_be_learned(pair: tuple) -> None:
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ita_loss(*pair, tau), tau)
    step = 1e-6
    higher, lower = (ita_loss(*pair, 0.5 + d).item() for d in (step, -step))
    assert slope.item() == pytest.approx((higher - lower) / (2 * step), rel=PRINTED)


def test_alignment_is_float32_under_bf16_autocast() -> None:
    """In bf16, a similarity of 1 is known to 2^-8, and divided by 0.07 to 0.05."""
    visual, semantic = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = ita_loss(visual, semantic)
    with torch.autocast("cpu", torch.bfloat16):
        found = ita_loss(visual, semantic)
        rounded = ita_loss(visual.bfloat16(), semantic.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=FLOAT32_LAYER, atol=FLOAT32_LAYER)
    assert float(rounded) == pytest.approx(float(expected), rel=BF16_LAYER)


def test_a_vector_of_zeros_leaves_the_loss_and_its_gradient_finite() -> None:
    visual = torch.zeros(3, 4, requires_grad=True)
    loss = ita_loss(visual, torch.eye(3, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(visual.grad).all()


def test_the_similarity_matrix_is_equation_5_for_every_pair(pair: tuple) -> None:
    visual, semantic = pair
    by_hand = [[similarity(a, b) for b in semantic] for a in visual]
    found = cosine_similarity_matrix(visual, semantic)
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float64))


def test_classification_is_equation_12_averaged_over_rows(classified: tuple) -> None:
    assert float(classification_loss(*classified)) == pytest.approx(
        cross_entropy(*classified), rel=FLOAT64
    )


def squared_norms(estimate: Tensor, target: Tensor) -> float:
    """Mean over rows of equation (19)."""
    rows = zip(estimate.tolist(), target.tolist(), strict=True)
    return sum((a - b) ** 2 for e, t in rows for a, b in zip(e, t, strict=True)) / len(target)


def test_reconstruction_is_equation_19_the_sum_over_dimensions(pair: tuple) -> None:
    found = float(reconstruction_loss(*pair))
    assert found == pytest.approx(squared_norms(*pair), rel=FLOAT64)
    assert found == pytest.approx(7 * float(F.mse_loss(*pair)), rel=FLOAT64)


def test_an_error_of_one_in_every_dimension_has_the_squared_norm_d() -> None:
    assert float(reconstruction_loss(torch.ones(3, 768), torch.zeros(3, 768))) == 768


def test_equation_20_weighs_classification_and_reconstruction(
    pair: tuple, classified: tuple
) -> None:
    found = refinement_loss(*classified, *pair, ce_weight=2.0, norm_weight=0.3)
    by_hand = 2.0 * cross_entropy(*classified) + 0.3 * squared_norms(*pair)
    assert float(found) == pytest.approx(by_hand, rel=FLOAT64)

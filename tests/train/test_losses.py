"""Losses against their formulas, written out row by row.

Axes: B batch, D feature, K classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import FLOAT64, PRINTED
from torch import Tensor

from marnet_train.losses import (
    alignment_loss,
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


def test_reconstruction_is_the_mean_over_rows_and_dimensions(pair: tuple) -> None:
    estimate, target = pair
    by_hand = sum((float(estimate[i, j] - target[i, j])) ** 2 for i in range(5) for j in range(7))
    assert float(reconstruction_loss(estimate, target)) == pytest.approx(by_hand / 35, rel=FLOAT64)


def test_equation_13_weighs_classification_and_alignment(pair: tuple, classified: tuple) -> None:
    found = alignment_loss(*classified, *pair, ce_weight=2.0, ita_weight=0.3, temperature=0.5)
    ita = one_direction(*pair, 0.5) + one_direction(*reversed(pair), 0.5)
    by_hand = 2.0 * cross_entropy(*classified) + 0.3 * ita
    assert float(found) == pytest.approx(by_hand, rel=FLOAT64)


def test_equation_20_weighs_classification_and_reconstruction(
    pair: tuple, classified: tuple
) -> None:
    found = refinement_loss(*classified, *pair, ce_weight=2.0, mse_weight=0.3)
    by_hand = 2.0 * cross_entropy(*classified) + 0.3 * float((pair[0] - pair[1]).pow(2).sum()) / 35
    assert float(found) == pytest.approx(by_hand, rel=FLOAT64)

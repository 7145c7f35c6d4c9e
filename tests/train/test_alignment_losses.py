"""Alignment losses have the values worked out by hand, or those of a slow twin in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import TINY, change, make_ready
from tolerances import FLOAT64
from torch import Tensor

from marnet_sdk.errors import RecipeError
from marnet_train.losses.alignment import (
    Alignment,
    Pairs,
    centroid_alignment,
    contrastive_discrepancy,
    similarity_distribution,
    sliced_wasserstein,
    soft_label_alignment,
)
from marnet_train.optimise import balanced_batches
from marnet_train.phases import Training, make_target, train_alignment
from marnet_train.progress import Progress
from marnet_train.recipe import ALIGNMENTS, Recipe
from marnet_train.stages import encoded

SEEDS = st.integers(0, 2**32 - 1)


def make_pairs(seed: int = 0, count: int = 7, classes: int = 3, width: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Pairs(
        visual=normal(count, width),
        semantic=normal(count, width),
        visual_logits=normal(count, classes),
        semantic_logits=normal(count, classes),
        labels=torch.randint(classes, (count,), generator=generator),
        groups=None,
        temperature=torch.tensor(0.5, dtype=torch.float64),
        progress=0.25,
    )


def shuffled(pairs: Pairs, order: Tensor) -> Pairs:
    names = ("visual", "semantic", "visual_logits", "semantic_logits", "labels")
    return replace(pairs, **{name: getattr(pairs, name)[order] for name in names})


# --- by hand


def test_the_sliced_distance_compares_sorted_projections() -> None:
    p, q = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert sliced_wasserstein(p, q, torch.eye(2)).item() == 0.25
    assert sliced_wasserstein(p, p.flip(0), torch.eye(2)).item() == 0  # it knows of no pairs
    slanted = torch.full((2, 1), math.sqrt(0.5))
    assert sliced_wasserstein(p, q, slanted).item() == pytest.approx(0, abs=1e-12)


def test_similarities_are_compared_with_the_classes() -> None:
    """Two orthonormal pairs of two classes at tau = 1: p is (e, 1) / (e + 1) in every row."""
    two = torch.eye(2, dtype=torch.float64)
    pairs = replace(
        make_pairs(count=2, classes=2, width=2),
        visual=two,
        semantic=two,
        labels=torch.tensor([0, 1]),
        temperature=torch.tensor(1.0, dtype=torch.float64),
    )
    hit, miss = math.e / (math.e + 1), 1 / (math.e + 1)
    row = hit * math.log(hit / (1 + 1e-8)) + miss * math.log(miss / 1e-8)
    assert similarity_distribution(pairs).item() == pytest.approx(2 * row, abs=FLOAT64)
    same = replace(pairs, labels=torch.tensor([1, 1]))
    row = hit * math.log(hit / 0.5) + miss * math.log(miss / 0.5)
    assert similarity_distribution(same).item() == pytest.approx(2 * row, abs=1e-7)  # of the 1e-8


def test_class_discrepancies_by_hand() -> None:
    """One class: texts at 0 and 1, images at 0 and 1, so the mean squared distance is 8 / 12."""
    x, labels = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([4, 4])
    assert contrastive_discrepancy(x, x, labels).item() == pytest.approx(0, abs=FLOAT64)
    # Texts at 0 twice, images at 1 twice: again 8 / 12, and k(1) between them.
    zero, one = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    k = sum(math.exp(-1 / (8 / 12 * 2.0**j)) for j in range(-2, 3))
    expected = 5 + 5 - 2 * k
    assert contrastive_discrepancy(zero, one, labels).item() == pytest.approx(expected)


def slow_discrepancy(source: Tensor, target: Tensor, labels: Tensor) -> float:
    """The same with loops over single vectors."""
    s, t, y = source.numpy(), target.numpy(), labels.numpy()
    within, between = [], []
    for c in np.unique(y):
        for d in np.unique(y):
            one, other = s[y == c], t[y == d]
            both = np.concatenate([one, other])
            squared = [[((a - b) ** 2).sum() for b in both] for a in both]
            scale = max(np.sum(squared) / (len(both) * (len(both) - 1)), 1e-5)

            def mean(xs, ys, scale=scale) -> float:
                return np.mean(
                    [
                        sum(
                            math.exp(-((a - b) ** 2).sum() / (scale * w))
                            for w in (0.25, 0.5, 1, 2, 4)
                        )
                        for a in xs
                        for b in ys
                    ]
                )

            found = mean(one, one) + mean(other, other) - 2 * mean(one, other)
            (within if c == d else between).append(found)
    return float(np.mean(within) - (np.mean(between) if between else 0))


@given(SEEDS)
def test_class_discrepancies_are_those_of_loops(seed: int) -> None:
    pairs = make_pairs(seed)
    found = contrastive_discrepancy(pairs.semantic, pairs.visual, pairs.labels).item()
    expected = slow_discrepancy(pairs.semantic, pairs.visual, pairs.labels)
    assert found == pytest.approx(expected, abs=FLOAT64)


def test_texts_that_all_coincide_have_a_gradient_and_no_division_by_zero() -> None:
    x = torch.zeros(4, 2, requires_grad=True)
    loss = contrastive_discrepancy(x, torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(x.grad).all() if x.grad is not None else False


def test_soft_labels_by_hand() -> None:
    """Class 0 has two texts, of soft labels (1/2, 1/2) and (3/4, 1/4), and images of p = (1/2, 1/2)
    and (1/4, 3/4)."""
    pairs = replace(
        make_pairs(count=2, classes=2),
        labels=torch.tensor([0, 0]),
        semantic_logits=torch.tensor([[0.0, 0.0], [5 * math.log(3), 0.0]]).double(),
        visual_logits=torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]).double(),
    )
    logs = [[math.log(p + 1e-5) for p in row] for row in ((0.5, 0.5), (0.25, 0.75))]
    q = (5 / 8, 3 / 8)
    expected = -sum(q[c] * (logs[0][c] + logs[1][c]) / 2 for c in range(2))
    assert soft_label_alignment(pairs, 5.0).item() == pytest.approx(expected, abs=1e-7)  # float32


def test_centroids_by_hand() -> None:
    """Class 0: texts at 0 and 2, images at 4 and 6; class 2: one of each, at the same place."""
    semantic = torch.tensor([[0.0], [2.0], [7.0]])
    visual = torch.tensor([[4.0], [6.0], [7.0]])
    found = centroid_alignment(visual, semantic, torch.tensor([0, 0, 2]), 3)
    assert found.item() == 4**2 + 2**2 + 2**2  # centroids 1, 5, and 3 of both


def test_the_gradient_of_the_discriminator_is_reversed_for_the_features() -> None:
    loss = Alignment("ssan", 4).double()
    assert loss.discriminator is not None
    pairs = make_pairs()
    gradients = []
    for progress in (0.0, 1.0):
        visual = pairs.visual.clone().requires_grad_()
        loss(replace(pairs, visual=visual, progress=progress)).backward()
        gradients.append(visual.grad)
    without = pairs.visual.clone().requires_grad_()
    with torch.no_grad():
        loss.discriminator.weight.zero_()
    loss(replace(pairs, visual=without, progress=1.0)).backward()
    torch.testing.assert_close(gradients[0], without.grad)  # strength 0: no part of it
    assert not torch.allclose(gradients[1], gradients[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in ALIGNMENTS if name != "team"])
@given(seed=SEEDS)
def test_the_order_of_the_batch_does_not_matter_to_losses_of_vectors(name: str, seed: int) -> None:
    pairs = make_pairs(seed % 1000)
    torch.manual_seed(0)
    loss = Alignment(name, 4).double()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    found = []
    for batch in (pairs, shuffled(pairs, order)):
        torch.manual_seed(1)  # directions
        found.append(loss(batch).item())
    assert math.isfinite(found[0])
    assert found[1] == pytest.approx(found[0], abs=FLOAT64)


# --- batches


@given(SEEDS, st.integers(1, 5), st.integers(4, 20))
def test_balanced_batches_have_several_images_of_a_few_classes(seed, per_class, size) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (40,), generator=generator)
    found = list(balanced_batches(labels, size, per_class, generator))
    assert len(found) == math.ceil(40 / size)
    for rows in found:
        assert len(rows.unique()) == len(rows) <= max(size, per_class)
        classes, counts = labels[rows].unique(return_counts=True)
        present = labels.bincount(minlength=6)[classes]
        assert torch.equal(counts, present.clamp(max=per_class))
        assert len(classes) == min(max(1, size // per_class), len(labels.unique()))


# --- in a training


def aligned(digits: Path, recipe: Recipe) -> Tensor:
    ready = make_ready(digits, recipe)
    target = make_target(ready.model, ready.data, recipe, 0)
    source = encoded(ready.model.vision, ready.data, recipe)
    train_alignment(ready.model, ready.data, source, target, Training(recipe, 0, Progress()))
    return torch.cat([p.flatten() for p in ready.model.project_vision.parameters()])


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_every_loss_trains_and_repeats_itself(name: str, digits: Path) -> None:
    rate = 1e-2 if name == "team" else 0.0  # tokens of a frozen encoder are not kept
    settings = {"loss": name, "per_class": 3, "epochs": 1, "lr_backbone": rate}
    recipe = change(TINY, alignment=settings)
    first = aligned(digits, recipe)
    torch.manual_seed(99)
    assert torch.equal(aligned(digits, recipe), first)
    without = change(recipe, alignment={"ita_weight": 0.0})
    assert not torch.equal(aligned(digits, without), first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "itta"},
            r"alignment loss 'itta' is unknown. Did you mean 'ita'\? Choose from ita",
        ),
        ({"loss": "cdd"}, "several of each: set per_class = 6"),
        ({"per_class": 9}, "a batch of 16 must hold two classes or more; set it to at most 8"),
    ],
)
def test_what_cannot_be_aligned_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        change(TINY, alignment=settings)

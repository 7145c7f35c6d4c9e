"""What plays the text: the text itself, or a control that answers what the text is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marnet_sdk.errors import RecipeError
from marnet_train.recipe import SEMANTICS
from marnet_train.semantics import semantic_vectors

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 3])
CLASSES = 4


@pytest.fixture
def texts() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def vectors(kind: str, texts: Tensor, seed: int = 0) -> Tensor:
    return semantic_vectors(kind, texts, LABELS, CLASSES, seed)


def test_the_text_plays_itself(texts: Tensor) -> None:
    assert torch.equal(vectors("text", texts), texts)


def test_labels_are_one_hot_and_hold_no_text(texts: Tensor) -> None:
    found = vectors("labels", texts)
    assert found.shape == (8, 6)
    assert torch.equal(found.argmax(dim=1), LABELS)
    assert torch.equal(found.sort(dim=1).values, torch.eye(6)[[5]].repeat(8, 1))
    assert torch.equal(found, vectors("labels", texts + 7))


def test_more_classes_than_dimensions_have_no_one_hot_vectors(texts: Tensor) -> None:
    with pytest.raises(RecipeError, match=r'text width of at least 7, .* got 6; use "random"'):
        semantic_vectors("labels", texts, LABELS, 7, seed=0)
    assert semantic_vectors("random", texts, LABELS, 7, seed=0).shape == (8, 6)


def test_random_vectors_are_one_for_each_class_and_follow_the_seed(texts: Tensor) -> None:
    found = vectors("random", texts)
    same = (found[:, None] == found).all(dim=2)
    assert torch.equal(same, LABELS[:, None] == LABELS)
    assert torch.equal(found, vectors("random", texts + 7))
    assert not torch.equal(found, vectors("random", texts, seed=1))


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_texts_are_those_of_one_other_class_for_each_class(
    seed: int, texts: Tensor
) -> None:
    found = vectors("shuffled", texts, seed)
    rows = (found[:, None] == texts).all(dim=2)
    assert (rows.sum(dim=1) == 1).all()
    theirs = LABELS[rows.int().argmax(dim=1)]
    pairs = {(int(own), int(other)) for own, other in zip(LABELS, theirs, strict=True)}
    assert all(own != other for own, other in pairs)
    assert len(pairs) == len({other for _, other in pairs}) == CLASSES


def test_another_seed_shuffles_otherwise(texts: Tensor) -> None:
    assert len({vectors("shuffled", texts, s).numpy().tobytes() for s in range(8)}) > 4


@pytest.mark.parametrize("kind", SEMANTICS)
def test_every_kind_repeats_itself_and_keeps_type_and_shape(kind: str, texts: Tensor) -> None:
    found = vectors(kind, texts, seed=3)
    assert torch.equal(found, vectors(kind, texts, seed=3))
    assert (found.shape, found.dtype) == (texts.shape, texts.dtype)

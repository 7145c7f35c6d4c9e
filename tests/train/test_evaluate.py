"""Accuracy, and the features and branches it is measured on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE

from marnet_sdk.errors import RecipeError
from marnet_sdk.trajectory import draw_trajectory
from marnet_train.checkpoint import Checkpoint, load_checkpoint
from marnet_train.data.examples import Example
from marnet_train.data.imagefolder import read_split
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import sampler_table, trajectory_tensors
from marnet_train.evaluate import (
    accuracy,
    evaluate_branches,
    label_tensor,
    refined_features,
    visual_features,
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def store(loaded: Checkpoint, digits: Path) -> PixelStore:
    examples = read_split(digits / "test", needs_text=False)
    return PixelStore(examples[:7], loaded.preprocess, "test")


def test_top1_and_top5_count_the_rank_of_the_label() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(7, 1)
    found = accuracy(logits, torch.arange(7))  # label i has rank i + 1
    assert found.top1 == pytest.approx(1 / 7)
    assert found.top5 == pytest.approx(5 / 7)
    assert found.images == 7


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_at_most_five_classes_top5_is_always_right(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, classes, generator=generator)
    found = accuracy(logits, torch.arange(20) % classes)
    assert found.top5 == 1.0
    assert found.top1 < 1.0


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9))
@settings(max_examples=40)
def test_ties_are_broken_for_one_label_not_for_all_of_them(row: list[float]) -> None:
    """Of all labels that a row could have, one is right, and five are among the best five."""
    classes = len(row)
    found = accuracy(torch.tensor([row]).repeat(classes, 1), torch.arange(classes))
    assert found.top1 == pytest.approx(1 / classes)
    assert found.top5 == pytest.approx(min(5, classes) / classes)


@given(
    st.lists(
        st.lists(st.integers(-2, 2).map(float), min_size=12, max_size=12), min_size=1, max_size=5
    )
)
@settings(max_examples=60)
def test_the_answer_to_a_row_is_the_first_of_its_largest_logits(rows: list[list[float]]) -> None:
    """What NumPy's and ONNX's arg-max give; topk may take any of equal logits."""
    answers = torch.tensor([row.index(max(row)) for row in rows])
    assert accuracy(torch.tensor(rows), answers).top1 == 1.0


def test_a_thousand_equal_logits_are_answered_with_the_first_class() -> None:
    equal = torch.zeros(1000, 1000)
    assert accuracy(equal, torch.zeros(1000, dtype=torch.int64)).top1 == 1.0
    assert accuracy(equal, torch.full((1000,), 4)).top5 == 1.0
    assert accuracy(equal, torch.full((1000,), 5)).top5 == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_not_counted(value: float) -> None:
    logits = torch.zeros(5, 3)
    logits[1, 0] = logits[3, 1] = logits[3, 2] = value
    with pytest.raises(RecipeError, match=r"2 of 5 images got NaN .* training diverged; lower"):
        accuracy(logits, torch.zeros(5, dtype=torch.int64))


def test_labels_are_numbered_in_the_order_of_the_model() -> None:
    examples = [Example(Path(f"{name}.png"), name, None) for name in ("b", "c", "a", "b")]
    assert label_tensor(examples, ("c", "b", "a")).tolist() == [1, 0, 2, 1]


def test_features_do_not_depend_on_how_images_are_batched(
    loaded: Checkpoint, store: PixelStore
) -> None:
    """A batch norm left in training mode would show here."""
    whole, pieces = visual_features(loaded.model, store), visual_features(loaded.model, store, 3)
    torch.testing.assert_close(whole, pieces, rtol=0, atol=FLOAT32_LAYER)
    assert whole.shape == (7, loaded.model.vision.dim)


def test_every_row_is_refined_on_the_shared_trajectory_of_the_seed(
    loaded: Checkpoint, store: PixelStore
) -> None:
    model = loaded.model
    table = sampler_table(model.config.schedule, "ddpm", 10)
    x_v = visual_features(model, store)
    refined = refined_features(model, x_v, table, seed=3)
    noise = draw_trajectory(3, table.timesteps, 100, model.denoiser.dim)
    with torch.no_grad():
        alone = model.refine(x_v[4:5], table, *trajectory_tensors(noise, 1, x_v))
    torch.testing.assert_close(refined[4:5], alone, rtol=FLOAT32_TWICE, atol=FLOAT32_TWICE)
    assert not torch.equal(refined, refined_features(model, x_v, table, seed=4))


def test_branches_are_measured_once_per_seed_where_noise_is_involved(
    loaded: Checkpoint, store: PixelStore, digits: Path
) -> None:
    examples = read_split(digits / "test", needs_text=False)[:7]
    labels = label_tensor(examples, loaded.labels)
    found = evaluate_branches(loaded.model, visual_features(loaded.model, store), labels, (0, 1, 2))
    assert {branch: len(rows) for branch, rows in found.items()} == {
        "alignment": 1,
        "refined": 3,
        "marnet": 3,
    }


def test_a_trained_checkpoint_recognises_most_digits(checkpoint: Path, digits: Path) -> None:
    """Chance is 10 %; the recipe of this fixture reaches about 90 %."""
    from marnet_train.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(checkpoint, digits, "test", device="cpu")
    assert found["alignment"]["top1"] > 0.75
    assert found["refined"]["top1"] > 0.5
    assert found["marnet"]["top1"] > 0.75
    assert found["marnet"]["images"] == 270

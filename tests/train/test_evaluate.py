"""Accuracy, and the features and branches it is measured on."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT32_TWICE

from marnet_sdk.errors import RecipeError
from marnet_sdk.noise.trajectory import draw_trajectory
from marnet_train.checkpoint import Checkpoint, load_checkpoint
from marnet_train.data.examples import Example
from marnet_train.data.imagefolder import read_split
from marnet_train.data.pixels import PixelStore
from marnet_train.diffusion import sampler_table, trajectory_tensors
from marnet_train.evaluate import (
    NOISE_SEEDS,
    Labelled,
    evaluate_checkpoint,
    label_tensor,
    measure,
    measure_branches,
    measure_sampled,
    refined_features,
    sample_probabilities,
)
from marnet_train.features import compute_views
from marnet_train.models.marnet import MARNet
from marnet_train.recipe import Augment


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def seen(loaded: Checkpoint, digits: Path) -> Labelled:
    """Seven test images as the encoder sees them."""
    examples = read_split(digits / "test", needs_text=False)[:7]
    store = PixelStore(examples, loaded.preprocess, "test")
    x_v = compute_views(loaded.model.vision, store, Augment(), 1)[0]
    return Labelled(x_v, label_tensor(examples, loaded.labels))


def with_samples(model: MARNet, samples: int) -> MARNet:
    other = copy.copy(model)
    other.config = replace(model.config, samples=samples)
    return other


def test_top1_and_top5_count_the_rank_of_the_label() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(7, 1)
    found = measure(logits, torch.arange(7))  # label i has rank i + 1
    assert found.top1 == pytest.approx(1 / 7)
    assert found.top5 == pytest.approx(5 / 7)
    assert found.images == 7


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_at_most_five_classes_top5_is_always_right(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, classes, generator=generator)
    found = measure(logits, torch.arange(20) % classes)
    assert found.top5 == 1.0
    assert found.top1 < 1.0


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9))
def test_ties_are_broken_for_one_label_not_for_all_of_them(row: list[float]) -> None:
    """Of all labels that a row could have, one is right, and five are among the best five."""
    classes = len(row)
    found = measure(torch.tensor([row]).repeat(classes, 1), torch.arange(classes))
    assert found.top1 == pytest.approx(1 / classes)
    assert found.top5 == pytest.approx(min(5, classes) / classes)


@given(
    st.lists(
        st.lists(st.integers(-2, 2).map(float), min_size=12, max_size=12), min_size=1, max_size=5
    )
)
def test_the_answer_to_a_row_is_the_first_of_its_largest_logits(rows: list[list[float]]) -> None:
    """What NumPy's and ONNX's arg-max give; topk may take any of equal logits."""
    answers = torch.tensor([row.index(max(row)) for row in rows])
    assert measure(torch.tensor(rows), answers).top1 == 1.0


def test_a_thousand_equal_logits_are_answered_with_the_first_class() -> None:
    equal = torch.zeros(1000, 1000)
    assert measure(equal, torch.zeros(1000, dtype=torch.int64)).top1 == 1.0
    assert measure(equal, torch.full((1000,), 4)).top5 == 1.0
    assert measure(equal, torch.full((1000,), 5)).top5 == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_not_counted(value: float) -> None:
    logits = torch.zeros(5, 3)
    logits[1, 0] = logits[3, 1] = logits[3, 2] = value
    with pytest.raises(RecipeError, match=r"2 of 5 images got NaN .* training diverged; lower"):
        measure(logits, torch.zeros(5, dtype=torch.int64))


def test_labels_are_numbered_in_the_order_of_the_model() -> None:
    examples = [Example(Path(f"{name}.png"), name, None) for name in ("b", "c", "a", "b")]
    assert label_tensor(examples, ("c", "b", "a")).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("sample", [0, 2])
def test_every_row_is_refined_on_the_shared_trajectory_of_seed_and_sample(
    sample: int, loaded: Checkpoint, seen: Labelled
) -> None:
    model, x_v = loaded.model, seen.x_v
    table = sampler_table(model.config.schedule, "ddpm", 10)
    refined = refined_features(model, x_v, table, seed=3, sample=sample)
    noise = draw_trajectory(3, table.timesteps, 100, model.denoiser.dim, trajectory=sample)
    with torch.no_grad():
        alone = model.refine(x_v[4:5], table, *trajectory_tensors(noise, 1, x_v))
    torch.testing.assert_close(refined[4:5], alone, rtol=FLOAT32_TWICE, atol=FLOAT32_TWICE)
    assert not torch.equal(refined, refined_features(model, x_v, table, seed=4, sample=sample))


def test_the_probabilities_of_a_sample_are_those_of_its_own_chain(
    loaded: Checkpoint, seen: Labelled
) -> None:
    model, table = loaded.model, sampler_table(loaded.model.config.schedule, "ddpm", 5)
    refined, whole = sample_probabilities(model, seen.x_v, table, seed=1, samples=2)
    assert refined.shape == whole.shape == (2, 7, 10)
    with torch.no_grad():
        x_cdr = refined_features(model, seen.x_v, table, seed=1, sample=1)
        expected = model.head(seen.x_v, x_cdr)[0].softmax(dim=1)
    assert torch.equal(whole[1], expected)
    assert not torch.equal(whole[0], whole[1])


def test_a_branch_without_noise_is_measured_once() -> None:
    found = measure(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), torch.tensor([0, 1, 1]))
    assert found.to_dict() == {
        "top1": pytest.approx(2 / 3),
        "top5": 1.0,
        "images": 3,
        "samples": 0,
        "top1_over_noise_seeds": [pytest.approx(2 / 3)],
        "top1_one_sample": pytest.approx(2 / 3),
    }
    assert found.correct.tolist() == [1, 1, 0]


def test_samples_are_averaged_and_noise_seeds_are_not() -> None:
    """Image 0 of class 0: seed a is sure of it once, doubts it twice; seed b is wrong throughout.

    Image 1 of class 1 is always right."""
    a = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    b = torch.tensor([[0.1, 0.9]] * 3)
    sure = torch.tensor([[0.2, 0.8]] * 3)
    by_seed = [torch.stack([first, sure], dim=1) for first in (a, b)]  # [K = 3, N = 2, C = 2]
    found = measure_sampled(by_seed, torch.tensor([0, 1]))
    assert found.samples == 3
    assert found.top1_over_noise_seeds == [1.0, 0.5]
    assert found.top1 == 0.75
    assert found.top1_one_sample == pytest.approx((1 + 0.5 * 5) / 6)
    assert found.correct.tolist() == [0.5, 1.0]


def test_branches_are_measured_once_per_seed_where_noise_is_involved(
    loaded: Checkpoint, seen: Labelled
) -> None:
    found = measure_branches(with_samples(loaded.model, 2), seen)
    rows = {branch: (len(m.top1_over_noise_seeds), m.samples) for branch, m in found.items()}
    assert rows == {"alignment": (1, 0), "refined": (3, 2), "marnet": (3, 2)}
    table = sampler_table(loaded.model.config.schedule, "ddpm")
    for seed, top1 in zip(NOISE_SEEDS, found["marnet"].top1_over_noise_seeds, strict=True):
        whole = sample_probabilities(loaded.model, seen.x_v, table, seed, 2)[1].mean(dim=0)
        assert top1 == measure(whole, seen.labels).top1


def test_a_checkpoint_is_measured_with_its_own_number_of_samples(
    checkpoint: Path, digits: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"samples": 2}))
    found = evaluate_checkpoint(tmp_path, digits, "val", device="cpu")
    assert {branch: m["samples"] for branch, m in found.items()} == {
        "alignment": 0,
        "refined": 2,
        "marnet": 2,
    }
    seeds = found["marnet"]["top1_over_noise_seeds"]
    assert found["marnet"]["top1"] == pytest.approx(sum(seeds) / 3)


def test_a_trained_checkpoint_recognises_most_digits(checkpoint: Path, digits: Path) -> None:
    """Chance is 10 %; the recipe of this fixture reaches about 90 %."""
    found = evaluate_checkpoint(checkpoint, digits, "test", device="cpu")
    assert found["alignment"]["top1"] > 0.75
    assert found["refined"]["top1"] > 0.5
    assert found["marnet"]["top1"] > 0.75
    assert found["marnet"]["images"] == 270

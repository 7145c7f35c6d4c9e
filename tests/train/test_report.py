"""What a training says at its end and in its model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from marnet_train import report
from marnet_train.card import model_card
from marnet_train.evaluate import Measured
from marnet_train.measures import paired_interval
from marnet_train.report import (
    accuracy_table,
    difference_rows,
    differences,
    verdicts,
)

LABELS = tuple(f"dish {i}" for i in range(14))


def branch(top1: float, samples: int, one: float) -> dict[str, Any]:
    return {
        "top1": top1,
        "top5": 0.99,
        "images": 200,
        "samples": samples,
        "top1_over_noise_seeds": [top1 - 0.01, top1, top1 + 0.01] if samples else [top1],
        "top1_one_sample": one,
    }


def difference(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def make_training() -> dict[str, Any]:
    metrics = {
        "baseline": branch(0.80, 0, 0.80),
        "alignment": branch(0.84, 0, 0.84),
        "mlp": branch(0.83, 0, 0.83),
        "refined": branch(0.82, 4, 0.79),
        "marnet": branch(0.85, 4, 0.81),
    }
    found = {
        "alignment - baseline": difference(0.04, 0.012, 0.068),
        "mlp - alignment": difference(-0.01, -0.03, 0.01),
        "refined - mlp": difference(-0.01, -0.0249, 0.0051),
        "marnet - alignment": difference(0.01, -0.011, 0.031),
        "marnet - baseline": difference(0.05, 0.02, 0.08),
    }
    splits = ("val", "test")
    return {
        "recipe": "tiny",
        "seed": 7,
        "seconds": 12.5,
        "settings": {"method": "marnet", "semantics": "text"},
        "metrics": {
            name: {split: copy.deepcopy(seen) for split in splits} for name, seen in metrics.items()
        },
        "differences": {split: copy.deepcopy(found) for split in splits},
        "chosen": {"samples": 4, "refinement.norm_weight": 0.0883883},
        "data": {"sha256": "ab" * 32, "images": {"train": 900, "val": 200, "test": 150}},
        "versions": {"python": "3.11", "torch": "2.9"},
    }


@pytest.fixture
def training() -> dict[str, Any]:
    return make_training()


def without_test(training: dict[str, Any]) -> dict[str, Any]:
    for table in (*training["metrics"].values(), training["differences"]):
        del table["test"]
    del training["data"]["images"]["test"]
    return training


# --- differences


def measured(right: list[float]) -> Measured:
    correct = torch.tensor(right, dtype=torch.float32)
    top1 = float(correct.mean())
    return Measured(top1, 1.0, len(right), 1, [top1], top1, correct)


def test_branches_are_compared_image_by_image() -> None:
    """Both have two of four right, but not the same ones, which widens the interval."""
    found = differences(
        {
            "baseline": measured([1, 1, 0, 0]),
            "alignment": measured([1, 0, 1, 0]),
            "mlp": measured([1, 0, 1, 0]),
            "refined": measured([1, 1, 1, 0]),
            "marnet": measured([1 / 3, 1, 1, 0]),
        }
    )
    _, low, high = paired_interval(1, 1, 4)
    assert found["alignment - baseline"] == pytest.approx(difference(0, low, high))
    _, low, high = paired_interval(0, 0, 4)
    assert found["mlp - alignment"] == pytest.approx(difference(0, low, high))
    assert found["refined - mlp"]["mean"] == 0.25
    assert found["marnet - alignment"]["mean"] == pytest.approx((-2 / 3 + 1) / 4)


# --- tables and sentences


def test_every_branch_has_a_row_and_those_with_noise_say_what_one_sample_gives(training) -> None:
    columns, rows = accuracy_table(training, "val")
    assert columns == ("model", "top-1, K = 1", "top-1, K = 4", "top-5")
    assert rows == [
        ("image-only baseline", "", "80.00%", "99.00%"),
        ("alignment branch", "", "84.00%", "99.00%"),
        ("+MLP, one pass", "", "83.00%", "99.00%"),
        ("refined branch", "79.00%", "82.00%", "99.00%"),
        ("MARNet", "81.00%", "85.00%", "99.00%"),
    ]


def test_differences_are_points_with_their_interval(training) -> None:
    assert difference_rows(training, "test") == [
        ("alignment branch - image-only baseline", "+4.0", "+1.2 to +6.8"),
        ("+MLP, one pass - alignment branch", "-1.0", "-3.0 to +1.0"),
        ("refined branch - +MLP, one pass", "-1.0", "-2.5 to +0.5"),
        ("MARNet - alignment branch", "+1.0", "-1.1 to +3.1"),
        ("MARNet - image-only baseline", "+5.0", "+2.0 to +8.0"),
    ]


def test_two_sentences_say_what_text_and_diffusion_bought(training) -> None:
    text, diffusion = verdicts(training, "val")
    assert text == (
        "What text bought on 200 val images: the alignment branch has +4.0 points against the "
        "image-only baseline (95 % interval +1.2 to +6.8), so it is shown to help."
    )
    assert diffusion == (
        "What the diffusion bought on 200 val images: MARNet has +1.0 points against its "
        "alignment branch alone (95 % interval -1.1 to +3.1), so no difference is shown; its "
        "refined branch against one pass of the same network: -1.0 points (-2.5 to +0.5)."
    )


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.001, 0.02, "so it is shown to help"),
        (-0.02, -0.001, "so it is shown to harm"),
        (-0.02, 0.02, "so no difference is shown"),
        (0.0, 0.02, "so no difference is shown"),
        (-0.02, 0.0, "so no difference is shown"),
    ],
)
def test_only_an_interval_on_one_side_of_nothing_shows_help_or_harm(
    low, high, shown, training
) -> None:
    seen = difference((low + high) / 2, low, high)
    training["differences"]["test"] |= {"alignment - baseline": seen, "marnet - alignment": seen}
    text, diffusion = verdicts(training, "test")
    assert text.endswith(f"{shown}.")
    assert f"{shown}; its refined branch" in diffusion
    assert "on 150 test images" in text


def test_a_control_is_called_a_control(training) -> None:
    training["settings"]["semantics"] = "shuffled"
    text, _ = verdicts(training, "val")
    assert text.startswith('What the control "shuffled" in place of text bought on 200 val images')


def test_test_images_have_a_line_of_their_own(training) -> None:
    assert report.test_line(training) == (
        "On 150 test images, which chose nothing: image-only baseline 80.00%, MARNet 85.00%; "
        "difference +5.0 points (+2.0 to +8.0)."
    )


# --- the model card


def test_the_card_says_what_the_model_is_and_how_good(training, tmp_path: Path) -> None:
    card = model_card(tmp_path / "my run", training, LABELS)
    plain = " ".join(card.split())
    assert card.startswith("---\nlibrary_name: marnet\n")
    assert "# my run\n" in card
    assert "- classes: 14 (dish 0, dish 1," in card
    assert "dish 11, ...)" in card
    assert "- recipe: `tiny`, seed 7, 12.5 s\n" in card
    assert "- images: 900 train, 200 val, 150 test\n" in card
    assert "| MARNet | 81.00% | 85.00% | 99.00% |" in card
    assert "| MARNet - image-only baseline | +5.0 | +2.0 to +8.0 |" in card
    assert card.index("validation: 200 images") < card.index("test: 150 images")
    for sentence in verdicts(training, "val"):
        assert sentence in plain
    assert "Validation also chose samples = 4, refinement.norm_weight = 0.08839, so its" in plain
    assert "averages the probabilities of K runs of the reverse process, here 4." in plain
    assert "test top-1 at 3 noise seeds is 84.00%, 85.00%, 86.00%." in plain
    assert f"marnet-export --checkpoint '{tmp_path}/my run' --precision fp16" in card
    assert "Versions: python 3.11, torch 2.9." in card


def test_without_test_images_the_card_speaks_of_validation_alone(training, tmp_path: Path) -> None:
    training["chosen"] = {}
    card = " ".join(model_card(tmp_path / "run", without_test(training), LABELS[:3]).split())
    assert "val top-1 at 3 noise seeds is 84.00%" in card
    assert "test: " not in card
    assert "classes: 3 (dish 0, dish 1, dish 2)" in card
    assert "Validation also chose the epochs, so its figures are a little optimistic" in card

"""Random geometry of training images: what it keeps, how far it goes, and that it repeats."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE
from torch import Tensor

from marnet_train.data.pixels import augment
from marnet_train.recipe import Augment


def pictures(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_augmentation_leaves_images_alone() -> None:
    assert torch.equal(augment(pictures(), Augment(), seeded()), pictures())


@pytest.mark.parametrize(
    "settings", [Augment(rotate=20), Augment(shift=0.2), Augment(scale=0.3), Augment(flip=True)]
)
def test_augmentation_keeps_shape_and_range_and_follows_its_generator(settings: Augment) -> None:
    images = pictures()
    out = augment(images, settings, seeded())
    assert out.shape == images.shape
    assert images.min() <= out.min()
    assert out.max() <= images.max() + FLOAT32_LAYER
    assert torch.equal(out, augment(images, settings, seeded()))
    assert not torch.allclose(out, augment(images, settings, seeded(2)))
    assert not torch.allclose(out, images)


def test_flipping_mirrors_about_half_of_the_images_and_changes_nothing_else() -> None:
    images = pictures(200)
    out = augment(images, Augment(flip=True), seeded())
    mirrored = images.flip(-1)
    is_same = (out - images).abs().amax(dim=(1, 2, 3)) < FLOAT32_LAYER
    is_mirrored = (out - mirrored).abs().amax(dim=(1, 2, 3)) < FLOAT32_LAYER
    assert torch.equal(is_same, ~is_mirrored)
    assert 60 < int(is_mirrored.sum()) < 140


def test_a_shift_moves_at_most_its_fraction_of_the_side() -> None:
    """The picture is its own x coordinate, 0 to 1 over the side: a shift subtracts from it."""
    x = (torch.arange(100) + 0.5) / 100
    images = x.expand(50, 3, 100, 100).contiguous()
    out = augment(images, Augment(shift=0.1), seeded())
    moved = (out - images)[:, 0, 20:80, 20:80]
    assert float(moved.abs().max()) <= 0.1 + FLOAT32_TWICE
    assert float(moved.abs().max()) > 0.08
    torch.testing.assert_close(
        moved.amax(dim=(1, 2)), moved.amin(dim=(1, 2)), rtol=0, atol=FLOAT32_TWICE
    )

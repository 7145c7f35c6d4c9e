"""Corruptions damage an image the more the stronger they are, at any size alike, and repeatably."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling
from tolerances import PIXEL_EDGES, SIGMAS, SIZES_ALIKE

from marnet_sdk.errors import InvalidInput
from marnet_train.tables import corruptions
from marnet_train.tables.corruptions import corrupt

KINDS = ("blur", "noise", "jpeg", "darkness", "occlusion")
RANDOM = ("noise", "occlusion")
STRENGTHS = (1, 2, 3)


@pytest.fixture(scope="module")
def pictures(photographs) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in photographs]


def distance(image: Image.Image, other: Image.Image) -> float:
    """Root of the mean squared difference, grey levels."""
    difference = np.asarray(image, float) - np.asarray(other, float)
    return float(np.sqrt(np.mean(difference**2)))


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio, dB."""
    error = distance(image, other)
    return 20 * math.log10(255 / error) if error else math.inf


def small(image: Image.Image, side: int = 80) -> Image.Image:
    """The whole image at side x side pixels."""
    return image.resize((side, side), Resampling.BOX)


def grey(size: tuple[int, int] = (300, 200), value: int = 128) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_there_are_these_kinds():
    assert corruptions.KINDS == KINDS
    assert corruptions.STRENGTHS == STRENGTHS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_same_arguments_give_the_same_image_and_leave_the_first_as_it_was(
    pictures, kind, strength
):
    before = pictures[0].tobytes()
    once, again, other = (corrupt(pictures[0], kind, strength, s) for s in (3, 3, 4))
    assert once.tobytes() == again.tobytes()
    assert (once.tobytes() != other.tobytes()) == (kind in RANDOM)
    assert pictures[0].tobytes() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_stronger_the_more_damage(pictures, kind, seed):
    for picture in (*pictures, *map(small, pictures)):
        found = [psnr(picture, corrupt(picture, kind, s, seed)) for s in STRENGTHS]
        assert math.inf > found[0] > found[1] > found[2], found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 300), (300, 7), (80, 80), (641, 427)])
def test_size_and_mode_are_kept(pictures, kind, size):
    picture = pictures[1].resize(size)
    for strength in STRENGTHS:
        got = corrupt(picture, kind, strength, 0)
        assert (got.size, got.mode) == (size, "RGB")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_large_and_small_copies_are_damaged_alike(pictures, kind, strength):
    """The damage to a copy of 80 pixels is that to one of 2,000, seen at 80 pixels."""
    for picture in pictures:
        large = picture.resize((2000, 2000), Resampling.BICUBIC)
        of_small = distance(small(picture), corrupt(small(picture), kind, strength, 0))
        of_large = distance(small(large), small(corrupt(large, kind, strength, 0)))
        assert of_large == pytest.approx(of_small, abs=SIZES_ALIKE)


def test_darkness_by_hand():
    # 255 * gain * (128 / 255) ** gamma
    found = [corrupt(grey(), "darkness", s, 0).getpixel((5, 5)) for s in STRENGTHS]
    assert found == [(78, 78, 78), (45, 45, 45), (19, 19, 19)]


@pytest.mark.parametrize(("strength", "share"), [(1, 0.10), (2, 0.25), (3, 0.45)])
def test_occlusion_covers_its_share_and_what_a_weaker_one_covers(strength, share):
    hidden = []
    for s in (strength, max(1, strength - 1)):
        got = np.asarray(corrupt(grey(value=0), "occlusion", s, 5))
        assert set(np.unique(got)) == {0, 128}
        hidden.append(got[..., 0] == 128)
    assert hidden[0].mean() == pytest.approx(share, abs=PIXEL_EDGES)
    assert not (hidden[1] & ~hidden[0]).any()


def test_occlusion_comes_to_every_quarter_and_lies_inside():
    corners = []
    for seed in range(50):
        rows, columns = np.nonzero(np.asarray(corrupt(grey(value=0), "occlusion", 1, seed))[..., 0])
        corners.append((rows.min(), columns.min()))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == pytest.approx((63, 95), abs=1)
    halves = np.array(corners) > ((200 - 63) / 2, (300 - 95) / 2)
    assert len({tuple(row) for row in halves.tolist()}) == 4


@pytest.mark.parametrize("size", [(224, 224), (2000, 1500), (1120, 56)])
def test_noise_has_its_deviation_and_no_mean_at_any_size(size):
    got = np.asarray(corrupt(grey(size), "noise", 1, 0)) / 255
    cells = 3 * 224**2
    assert got.mean() == pytest.approx(128 / 255, abs=SIGMAS * 0.08 / math.sqrt(cells))
    assert got.std() == pytest.approx(0.08, abs=SIGMAS * 0.08 / math.sqrt(2 * cells))


def test_each_cell_of_the_noise_covers_several_pixels_of_a_large_image():
    got = np.asarray(corrupt(grey((896, 896)), "noise", 1, 0)).reshape(224, 4, 224, 4, 3)
    assert (got == got[:, :1, :, :1]).all()
    assert len(np.unique(got[:, 0, :, 0].reshape(-1, 3), axis=0)) > 224


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "blurr"}, r"kind: got 'blurr'; expected one of .* Did you mean 'blur'\?"),
        ({"strength": 0}, "strength: got 0; expected 1, 2 or 3"),
        ({"strength": 4}, "strength: got 4; expected 1, 2 or 3"),
        ({"seed": -1}, "seed: got -1; expected 0 or more"),
        ({"image": Image.new("L", (4, 4))}, "image: got mode L; expected RGB"),
    ],
)
def test_what_is_unknown_is_refused(change, message):
    arguments = {"image": grey(), "kind": "blur", "strength": 1, "seed": 0}
    with pytest.raises(InvalidInput, match=message):
        corrupt(**arguments | change)

"""Training images as arrays: which are kept, and their random geometry."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from PIL import Image
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE
from torch import Tensor

from marnet_sdk.errors import DataError
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train.data import pixels
from marnet_train.data.examples import Example
from marnet_train.data.pixels import PixelStore, augment, random_crops
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


def test_crops_are_squares_of_the_image_from_everywhere_in_it() -> None:
    """Each pixel says its place."""
    place = torch.arange(5 * 8).reshape(1, 1, 5, 8).expand(400, 3, 5, 8)
    crops = random_crops(place, 4, seeded())
    assert crops.shape == (400, 3, 4, 4)
    corners = crops[:, 0, 0, 0]
    assert set(corners.tolist()) == {8 * y + x for y in range(2) for x in range(5)}
    square = torch.arange(4)[:, None] * 8 + torch.arange(4)
    assert torch.equal(crops, (corners[:, None, None, None] + square).expand(400, 3, 4, 4))
    share = random_crops(place[100:200], 4, seeded(), batch=400, own=slice(100, 200))
    assert torch.equal(share, crops[100:200])  # as several processes divide a batch


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


# --- images that are kept, and images that are decoded for every batch


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Forty pictures, each with a grey of its own."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for grey in range(40):
        path = folder / f"{grey}.png"
        Image.new("RGB", (20, 16), (grey, 2 * grey, 255 - grey)).save(path)
        found.append(Example(path, "a", None, f"list:{grey}"))
    return found


PREPROCESS = Preprocess(size=(64, 64))  # 12 KB an image
ORDER = torch.randperm(40, generator=seeded()).split(7)


def larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "KEPT_LIMIT", 40 * 64 * 64 * 3 - 1)


def test_images_are_the_same_whether_they_are_kept_or_not(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = PixelStore(examples, PREPROCESS, "train")
    assert capsys.readouterr().err == ""
    larger_than_allowed(monkeypatch)
    store = PixelStore(examples, PREPROCESS, "train")
    assert "train: 0.0 GiB of pixels; images are decoded for every batch" in capsys.readouterr().err
    assert (kept.keeps, store.keeps) == (True, False)
    seen = [(rows, store.batch(rows)) for rows in store.ahead(iter(ORDER))]
    assert [rows.tolist() for rows, _ in seen] == [rows.tolist() for rows in ORDER]
    assert all(torch.equal(batch, kept.batch(rows)) for rows, batch in seen)
    assert torch.equal(store.batch(slice(3, 9)), kept.batch(slice(3, 9)))
    twice = torch.tensor([5, 5, 0])
    assert torch.equal(store.batch(twice), kept.batch(twice))


def test_each_image_is_decoded_once_an_epoch_and_the_next_batch_is_begun(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger_than_allowed(monkeypatch)
    store = PixelStore(examples, PREPROCESS, "train")
    begun: list[str] = []
    usual = pixels.decode_example

    def count(example: Example) -> Image.Image:
        begun.append(example.origin)
        return usual(example)

    monkeypatch.setattr(pixels, "decode_example", count)
    for number, rows in enumerate(store.ahead(ORDER), start=1):
        store.batch(rows)
        assert number * 7 <= len(begun) + 2 <= (number + 1) * 7 + 2
    assert sorted(begun) == sorted(example.origin for example in examples)


def test_memory_does_not_grow_with_the_number_of_images_that_are_not_kept(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 images of 12 KB are 4.9 MB; two batches of 8 as bytes and one as float32 are 0.6 MB."""
    larger_than_allowed(monkeypatch)
    tracemalloc.start()
    try:
        store = PixelStore(examples * 10, PREPROCESS, "train")
        for rows in store.ahead(torch.arange(400).split(8)):
            store.batch(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5e6


@pytest.mark.parametrize("limit", [0, pixels.KEPT_LIMIT])
def test_images_that_cannot_be_decoded_are_told_before_training(
    limit: int, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "KEPT_LIMIT", limit)
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Example(tmp_path / "broken.png", "a", None, "list:41")
    with pytest.raises(DataError, match=r"2 problems in the images of train:\s.*list:41"):
        PixelStore([broken, *examples, broken], PREPROCESS, "train")

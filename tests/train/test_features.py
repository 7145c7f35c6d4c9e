"""Where x_v comes from: an encoder that learns, or views that are computed once and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import TINY, make_ready
from torch import Tensor

from marnet_sdk.inputs.preprocess import Preprocess
from marnet_train import features
from marnet_train.data.examples import Example
from marnet_train.data.pixels import PixelStore
from marnet_train.features import (
    FrozenFeatures,
    Images,
    LearningEncoder,
    cache_dir,
    cached_views,
    compute_views,
)
from marnet_train.models.backbones import VisionEncoder
from marnet_train.recipe import Augment

SHIFT = Augment(shift=0.2)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of one test."""
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def fresh(digits: Path) -> tuple[VisionEncoder, Images]:
    ready = make_ready(digits, train=20)
    return ready.model.vision.eval(), ready.data.images


@pytest.fixture
def vision(fresh: tuple[VisionEncoder, Images]) -> VisionEncoder:
    return copy.deepcopy(fresh[0])


@pytest.fixture
def images(fresh: tuple[VisionEncoder, Images]) -> Images:
    return fresh[1]


def of(examples: list[Example], preprocess: Preprocess) -> Images:
    return Images(examples, preprocess, "train")


def files(root: Path) -> list[Path]:
    return sorted((root / "features").glob("*"))


# --- computing


def test_the_first_view_is_the_picture_itself_and_the_others_are_augmented(
    vision: VisionEncoder, images: Images
) -> None:
    views = compute_views(vision, images.store, SHIFT, 3, batch=64)
    assert views.shape == (3, 20, 8)
    with torch.no_grad():
        assert torch.equal(views[0], vision(images.store.batch(slice(None))))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])


def test_views_do_not_depend_on_the_seed_of_the_training(
    vision: VisionEncoder, images: Images
) -> None:
    torch.manual_seed(1)
    first = compute_views(vision, images.store, SHIFT, 2)
    torch.manual_seed(2)
    assert torch.equal(first, compute_views(vision, images.store, SHIFT, 2))


def test_views_are_of_an_encoder_in_evaluation_mode(vision: VisionEncoder, images: Images) -> None:
    expected = compute_views(vision, images.store, Augment(), 1)
    before = {name: value.clone() for name, value in vision.state_dict().items()}
    assert torch.equal(compute_views(vision.train(), images.store, Augment(), 1), expected)
    assert all(torch.equal(before[name], value) for name, value in vision.state_dict().items())


# --- the cache


def test_the_second_time_no_image_is_decoded_and_no_encoder_runs(
    vision: VisionEncoder, images: Images, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_views(vision, images, SHIFT, 2)
    assert torch.equal(first, compute_views(vision, images.store, SHIFT, 2))
    assert len(files(root)) == 1

    def never(*_: object) -> PixelStore:
        raise AssertionError("computed again")

    monkeypatch.setattr(vision, "forward", never)
    monkeypatch.setattr(features, "PixelStore", never)
    again = cached_views(vision, replace(images), SHIFT, 2)
    assert torch.equal(again, first)
    assert len(files(root)) == 1


def other_weight(vision: VisionEncoder, images: Images) -> Images:
    with torch.no_grad():
        next(vision.parameters()).flatten()[0].add_(1e-3)
    return images


def other_statistics(vision: VisionEncoder, images: Images) -> Images:
    next(b for name, b in vision.named_buffers() if name.endswith("running_mean")).add_(1e-3)
    return images


def other_preprocessing(vision: VisionEncoder, images: Images) -> Images:
    assert TINY.image is not None
    preprocess = Preprocess.from_dict({**TINY.image, "image_mean": [0.3, 0.3, 0.31]})
    return of(list(images.examples), preprocess)


def other_image(vision: VisionEncoder, images: Images) -> Images:
    """The same name and size, another byte, which does not even change a pixel."""
    examples = list(images.examples)
    changed = Path.cwd() / examples[3].image.name
    changed.write_bytes(examples[3].image.read_bytes() + b"\0")
    return of(
        [*examples[:3], replace(examples[3], image=changed), *examples[4:]], images.preprocess
    )


def other_order(vision: VisionEncoder, images: Images) -> Images:
    return of([*images.examples[1:], images.examples[0]], images.preprocess)


@pytest.mark.parametrize(
    "change", [other_weight, other_statistics, other_preprocessing, other_image, other_order]
)
def test_whatever_decides_the_features_decides_the_file(
    change: Callable[[VisionEncoder, Images], Images],
    vision: VisionEncoder,
    images: Images,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cached_views(vision, images, SHIFT, 2)
    changed = change(vision, images)
    found = cached_views(vision, changed, SHIFT, 2)
    assert torch.equal(found, compute_views(vision, changed.store, SHIFT, 2))
    assert len(files(root)) == 2


def test_augmentation_and_the_number_of_views_decide_the_file_too(
    vision: VisionEncoder, images: Images, root: Path
) -> None:
    for count, (settings, views) in enumerate(
        [(SHIFT, 2), (Augment(shift=0.21), 2), (SHIFT, 3)], start=1
    ):
        assert len(cached_views(vision, images, settings, views)) == views
        assert len(files(root)) == count


def test_a_single_view_is_not_augmented_so_its_file_serves_every_augmentation(
    vision: VisionEncoder, images: Images, root: Path
) -> None:
    first = cached_views(vision, images, SHIFT, 1)
    assert torch.equal(first, cached_views(vision, images, Augment(), 1))
    assert len(files(root)) == 1


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_a_damaged_file_is_said_and_computed_again(
    content: bytes | None,
    vision: VisionEncoder,
    images: Images,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = cached_views(vision, images, SHIFT, 2)
    (path,) = files(root)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if content is None else content)
    assert torch.equal(cached_views(vision, images, SHIFT, 2), first)
    said = " ".join(capsys.readouterr().err.split())
    assert "is damaged (" in said
    assert "its features are computed again" in said
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(
    vision: VisionEncoder,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MARNET_CACHE", str(tmp_path / "file"))
    found = cached_views(vision, images, SHIFT, 2)
    assert torch.equal(found, compute_views(vision, images.store, SHIFT, 2))
    said = " ".join(capsys.readouterr().err.split())
    assert "features cannot be kept there (" in said
    assert "set MARNET_CACHE elsewhere" in said


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_dir() == tmp_path / "cache" / "features"
    monkeypatch.delenv("MARNET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "marnet" / "features"


# --- sources


def rows_of(source: LearningEncoder | FrozenFeatures, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return source(torch.tensor([4, 0, 7]), generator, torch.device("cpu"))


def test_an_encoder_that_learns_sees_fresh_augmentations_and_has_a_gradient(
    vision: VisionEncoder, images: Images
) -> None:
    source = LearningEncoder(vision, images.store, SHIFT)
    assert len(source) == 20
    first = rows_of(source)
    assert first.requires_grad
    assert torch.equal(first, rows_of(source))
    assert not torch.equal(first, rows_of(source, seed=1))
    plain = rows_of(LearningEncoder(vision, images.store, Augment()))
    with torch.no_grad():
        expected = vision(images.store.batch(slice(None)))[[4, 0, 7]]
    torch.testing.assert_close(plain.detach(), expected)


def test_a_frozen_encoder_gives_each_image_one_of_its_views() -> None:
    views = torch.arange(3)[:, None, None] * 100 + torch.arange(20)[None, :, None]  # [3, 20, 1]
    source = FrozenFeatures(views.float())
    assert len(source) == 20
    drawn = torch.cat([rows_of(source, seed) for seed in range(30)], dim=1)  # [3, 30]
    assert torch.equal(drawn % 100, torch.tensor([[4.0], [0], [7]]).expand(3, 30))
    assert all(set(row.tolist()) == {0, 1, 2} for row in drawn // 100)

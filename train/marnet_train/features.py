"""This module is where x_v comes from: an encoder that learns, or features that were computed once
and kept.

Axes: V views, N images, B batch, D_v width of x_v.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marnet_sdk.console import say, track
from marnet_sdk.environment import versions
from marnet_sdk.errors import MarnetError
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.outputs import atomic_file
from marnet_train.data.examples import Example, read_image
from marnet_train.data.pixels import PixelStore, augment, random_crops
from marnet_train.models.backbones import VisionEncoder
from marnet_train.parallel import gathered, own_rows
from marnet_train.recipe import Augment

_VERSION = 1  # of what a cached file holds
_PACKAGES = ("torch", "transformers", "pillow", "numpy")  # their versions may move the last bits


@dataclass(frozen=True, eq=False)
class Images:
    """These are the images of one split; they are decoded when `store` is first looked at."""

    examples: Sequence[Example]
    preprocess: Preprocess
    split: str

    @cached_property
    def store(self) -> PixelStore:
        """Decode the images, or look at each once where they do not fit into memory."""
        return PixelStore(self.examples, self.preprocess, self.split)

    @cached_property
    def sha256(self) -> bytes:
        """Hash the bytes of every image file, in order; they are read once."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(hashlib.sha256(read_image(example)).digest())
        return digest.digest()


class LearningEncoder:
    """This gives x_v of freshly augmented images, with a gradient.

    With `crop` it sees a random square of so many pixels of each. That costs less, and things are
    as large in it as at test, where they should not be larger or smaller: Touvron et al., "Fixing
    the train-test resolution discrepancy", NeurIPS 2019 (arXiv 1906.06423).
    """

    def __init__(
        self, vision: VisionEncoder, store: PixelStore, settings: Augment, crop: int | None = None
    ) -> None:
        self.vision, self.store, self.settings, self.crop = vision, store, settings, crop

    def __len__(self) -> int:
        return len(self.store)

    def ahead(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the rows of each batch while the images of the one after it are decoded."""
        return self.store.ahead(order, own_rows)

    def __call__(self, rows: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Compute x_v of some images, [B] -> [B, D_v]; other processes compute their share."""
        count, own = len(rows), own_rows(len(rows))
        pixels = self.store.batch(rows[own])
        pixels = augment(pixels, self.settings, generator, batch=count, own=own)
        if self.crop is not None:
            pixels = random_crops(pixels, self.crop, generator, batch=count, own=own)
        return gathered(self.vision(_for_convolutions(pixels).to(device)), count)


class FrozenFeatures:
    """This gives x_v of a random one of the views of each image that were computed beforehand."""

    def __init__(self, views: Tensor) -> None:
        self.views = views  # [V, N, D_v]

    def __len__(self) -> int:
        return self.views.shape[1]

    def ahead(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the rows of each batch."""
        return iter(order)

    def __call__(self, rows: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Look up x_v of some images, [B] -> [B, D_v]."""
        view = torch.randint(len(self.views), (len(rows),), generator=generator)
        return self.views[view.to(self.views.device), rows.to(self.views.device)].to(device)


Source = LearningEncoder | FrozenFeatures


@torch.no_grad()
def compute_views(
    vision: VisionEncoder, store: PixelStore, settings: Augment, views: int, batch: int = 16
) -> Tensor:
    """Compute x_v of every image, as it is and then augmented `views - 1` times, [V, N, D_v].

    The augmentation is the same in every training, so that the features can be kept.
    """
    vision.eval()
    device = next(vision.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found = []
    for view in range(views):
        chosen = settings if view else Augment()
        rows = []
        order = torch.arange(len(store)).split(batch)
        title = f"features, view {view + 1} of {views}"
        for part in track(store.ahead(order), title, len(order)):
            pixels = augment(store.batch(part), chosen, generator)
            rows.append(vision(_for_convolutions(pixels).to(device)))
        found.append(torch.cat(rows))
    return torch.stack(found)


def _for_convolutions(pixels: Tensor) -> Tensor:
    """Put channels last in memory: with small batches, EfficientNet-Lite0 on a CPU takes half of
    the time. [B, 3, H, W]."""
    return pixels.contiguous(memory_format=torch.channels_last)


def cached_views(vision: VisionEncoder, images: Images, settings: Augment, views: int) -> Tensor:
    """Return `compute_views` of a frozen encoder, read from the cache if it was computed before.

    The file's name is a hash of all that decides its content: weights, configuration, image
    bytes, preprocessing and augmentation; and, for the last bits, versions and threads. On a hit
    no image is decoded.
    """
    path = cache_dir() / f"{_key(vision, images, settings, views)}.safetensors"
    device = next(vision.parameters()).device
    if path.is_file():
        try:
            return load_file(path)["x_v"].to(device)
        except (SafetensorError, KeyError) as error:
            say(f"{path} is damaged ({error}): its features are computed again")
    found = compute_views(vision, images.store, settings, views)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as fresh:
            save_file({"x_v": found.cpu().contiguous()}, fresh)
    except (OSError, SafetensorError, MarnetError) as error:
        say(f"{path.parent}: features cannot be kept there ({error}); set MARNET_CACHE elsewhere")
    return found


def cache_dir() -> Path:
    """Say where features are kept: $MARNET_CACHE/features, or ~/.cache/marnet/features."""
    root = os.environ.get("MARNET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "marnet") / "features"


def _key(vision: VisionEncoder, images: Images, settings: Augment, views: int) -> str:
    digest = hashlib.sha256()
    said = {
        "version": _VERSION,
        "packages": versions(_PACKAGES),
        "machine": [next(vision.parameters()).device.type, torch.get_num_threads()],
        "encoder": json.loads(vision.backbone.config.to_json_string(use_diff=False)),  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        "preprocess": images.preprocess.to_dict(),
        "augment": asdict(settings) if views > 1 else None,
        "views": views,
    }
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(images.sha256)
    return digest.hexdigest()

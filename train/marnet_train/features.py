"""Where x_v comes from: an encoder that learns, or what was computed once and kept.

Axes: V views, N images, B batch, D_v width of x_v.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marnet_sdk.console import say, track
from marnet_sdk.environment import versions
from marnet_sdk.errors import MarnetError, RecipeError
from marnet_sdk.files import atomic_file
from marnet_sdk.preprocess import Preprocess
from marnet_train.data.examples import Example, read_image
from marnet_train.data.pixels import PixelStore, augment
from marnet_train.models.backbones import VisionEncoder
from marnet_train.recipe import Augment

_VERSION = 1  # of what a cached file holds
_PACKAGES = ("torch", "transformers", "pillow", "numpy")  # their versions may move the last bits


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split; they are decoded when `store` is first called."""

    examples: Sequence[Example]
    preprocess: Preprocess
    store: Callable[[], PixelStore]

    @cached_property
    def sha256(self) -> bytes:
        """Of the bytes of every image file, in order; read once."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(hashlib.sha256(read_image(example)).digest())
        return digest.digest()


class LearningEncoder:
    """x_v of freshly augmented images, with a gradient."""

    def __init__(
        self, vision: VisionEncoder, store: PixelStore, settings: Augment, views: int
    ) -> None:
        self.vision, self.store, self.settings, self.views = vision, store, settings, views

    def __len__(self) -> int:
        return len(self.store)

    def __call__(self, rows: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """x_v of some images, [B] -> [B, D_v]."""
        pixels = augment(self.store.batch(rows.numpy()), self.settings, generator)
        return self.vision(_for_convolutions(pixels).to(device))

    def features(self) -> Tensor:
        """x_v of all views as the encoder is now, [V, N, D_v]."""
        return compute_views(self.vision, self.store, self.settings, self.views)


class FrozenFeatures:
    """x_v of a random one of the views of each image that were computed beforehand."""

    def __init__(self, views: Tensor) -> None:
        self.views = views  # [V, N, D_v]

    def __len__(self) -> int:
        return self.views.shape[1]

    def __call__(self, rows: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """x_v of some images, [B] -> [B, D_v]."""
        return _random_views(self.views, rows, generator).to(device)

    def features(self) -> Tensor:
        """x_v of all views, [V, N, D_v]."""
        return self.views


class LowerLayers(nn.Module):
    """The layers of an image encoder that stand still while those after them learn."""

    def __init__(self, vision: VisionEncoder, pattern: str, shape: tuple[int, int, int]) -> None:
        """Find the layers whose whole name matches `pattern`, and try them on one image of `shape`.

        Raises:
            RecipeError: there are none, or those after them need more than the output of the last.
        """
        super().__init__()
        modules = dict(vision.backbone.named_modules())
        self.names = [name for name in modules if name and re.fullmatch(pattern, name)]
        if not self.names:
            some = ", ".join([n for n in modules if n and n.count(".") < 3][:12])
            raise RecipeError(
                f"frozen_layers = '{pattern}' is the whole name of no layer of the image encoder; "
                f"its first layers are {some}"
            )
        self.layers = nn.ModuleList(modules[name] for name in self.names)
        self._vision = [vision]  # in a list: only the layers are this module's own
        self._last = self._try(shape)

    @property
    def vision(self) -> VisionEncoder:
        """The whole encoder."""
        return self._vision[0]

    @property
    def backbone(self) -> nn.Module:
        """Where the configuration is."""
        return self.vision.backbone

    @torch.no_grad()
    def _try(self, shape: tuple[int, int, int]) -> nn.Module:
        """The layer that runs last."""
        ran: list[tuple[nn.Module, Any]] = []
        hooks = [
            layer.register_forward_hook(lambda layer, _, output: ran.append((layer, output)))
            for layer in self.layers
        ]
        device = next(self.vision.parameters()).device
        pixels = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        was_training = self.vision.training
        self.vision.eval()
        try:
            expected = self.vision(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        last, output = ran[-1]
        try:
            suffices = torch.allclose(self.upper(output), expected, rtol=1e-4, atol=1e-5)
        except Exception:  # whatever an encoder's code raises
            suffices = False
        self.vision.train(was_training)
        if not suffices:
            name = self.names[list(self.layers).index(last)]
            raise RecipeError(
                f"frozen_layers: the layers of the image encoder after {name!r} need more than its "
                f"output (the layers that stand still are {', '.join(self.names[:12])}); name all "
                "from the first to the last of them"
            )
        return last

    def forward(self, pixels: Tensor) -> Tensor:
        """Activations after the last of the layers, [B, 3, H, W] -> [B, ...]; no others run."""

        def stop(*args: Any) -> None:
            raise _Reached(args[-1])

        hook = self._last.register_forward_hook(stop)
        try:
            self.vision(pixels)
        except _Reached as reached:
            return reached.activations
        finally:
            hook.remove()
        raise AssertionError("the last layer did not run")

    def upper(self, activations: Tensor) -> Tensor:
        """x_v by the layers after these, [B, ...] -> [B, D_v]."""
        for layer in self.layers:
            layer.forward = _first  # they hand on what they get
        try:
            return self.vision(_for_convolutions(activations))
        finally:
            for layer in self.layers:
                del layer.forward


class _Reached(Exception):
    """The last layer that has to run has run."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations


def _first(*args: Any, **named: Any) -> Any:
    return args[0] if args else next(iter(named.values()))


class UpperLayers:
    """x_v with a gradient, through the layers that learn alone."""

    def __init__(self, lower: LowerLayers, views: Tensor) -> None:
        self.lower, self.views = lower, views  # activations [V, N, ...]

    def __len__(self) -> int:
        return self.views.shape[1]

    def __call__(self, rows: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """x_v of some images, [B] -> [B, D_v]."""
        return self.lower.upper(_random_views(self.views, rows, generator).to(device))

    @torch.no_grad()
    def features(self) -> Tensor:
        """x_v of all views as the encoder is now, [V, N, D_v]."""
        self.lower.vision.eval()
        device = next(self.lower.parameters()).device
        found = [self.lower.upper(x.to(device)) for x in self.views.flatten(0, 1).split(16)]
        return torch.cat(found).unflatten(0, self.views.shape[:2])


Source = LearningEncoder | FrozenFeatures | UpperLayers


def _random_views(views: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """One of the views [V, N, ...] of each of some images, [B, ...]."""
    view = torch.randint(len(views), (len(rows),), generator=generator)
    return views[view.to(views.device), rows.to(views.device)]


@torch.no_grad()
def compute_views(
    encoder: VisionEncoder | LowerLayers,
    store: PixelStore,
    settings: Augment,
    views: int,
    batch: int = 16,
) -> Tensor:
    """x_v or activations of every image, as it is and augmented `views - 1` times, [V, N, ...].

    The augmentation is the same in every training, so that the features can be kept.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found = []
    for view in range(views):
        chosen = settings if view else Augment()
        rows = []
        for i in track(range(0, len(store), batch), f"features, view {view + 1} of {views}"):
            pixels = augment(store.batch(slice(i, i + batch)), chosen, generator)
            rows.append(encoder(_for_convolutions(pixels).to(device)))
        found.append(torch.cat(rows))
    return torch.stack(found)


def _for_convolutions(x: Tensor) -> Tensor:
    """The same pixels or maps [B, C, H, W] with channels last in memory: with small batches,
    EfficientNet-Lite0 on a CPU takes half of the time. Tokens [B, N, D] stay as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def cached_views(
    encoder: VisionEncoder | LowerLayers, images: Images, settings: Augment, views: int
) -> Tensor:
    """`compute_views` of what does not learn, read from the cache if it was computed before.

    The file's name is a hash of all that decides its content: weights, configuration, image
    bytes, preprocessing and augmentation; and, for the last bits, versions and threads. On a hit
    no image is decoded.
    """
    path = cache_dir() / f"{_key(encoder, images, settings, views)}.safetensors"
    device = next(encoder.parameters()).device
    if path.is_file():
        try:
            return load_file(path)["x_v"].to(device)
        except (SafetensorError, KeyError) as error:
            say(f"{path} is damaged ({error}): its features are computed again")
    found = compute_views(encoder, images.store(), settings, views)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as fresh:
            save_file({"x_v": found.cpu().contiguous()}, fresh)
    except (OSError, SafetensorError, MarnetError) as error:
        say(f"{path.parent}: features cannot be kept there ({error}); set MARNET_CACHE elsewhere")
    return found


def cache_dir() -> Path:
    """Where features are kept: $MARNET_CACHE/features, or ~/.cache/marnet/features."""
    root = os.environ.get("MARNET_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "marnet") / "features"


def _key(
    encoder: VisionEncoder | LowerLayers, images: Images, settings: Augment, views: int
) -> str:
    digest = hashlib.sha256()
    said = {
        "version": _VERSION,
        "packages": versions(_PACKAGES),
        "machine": [next(encoder.parameters()).device.type, torch.get_num_threads()],
        "encoder": json.loads(encoder.backbone.config.to_json_string(use_diff=False)),  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        "preprocess": images.preprocess.to_dict(),
        "augment": asdict(settings) if views > 1 else None,
        "views": views,
    }
    if isinstance(encoder, LowerLayers):
        said["layers"] = encoder.names
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(images.sha256)
    return digest.hexdigest()

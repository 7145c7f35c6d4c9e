"""One input or many, and many as batches of pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marnet_sdk.errors import ImageError, InvalidInput, brief
from marnet_sdk.inputs.images import Buffer, ImageInput, Limits, shown
from marnet_sdk.inputs.preprocess import Preprocess

T = TypeVar("T")
_HOST_MEMORY = (1, 3, 11)  # kDLCPU, and pinned for a GPU: kDLCUDAHost, kDLROCMHost


def is_single(images: ImageInput | Iterable[ImageInput]) -> TypeGuard[ImageInput]:
    """Tell whether it is one image and not many. What is neither is left for decoding to refuse."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return False  # [B, H, W, 3] is many
    one = isinstance(images, str | os.PathLike | Buffer | Image.Image | np.ndarray | Mapping)
    # An open file is an iterable too, of lines, and a tensor one of rows.
    alike = hasattr(images, "read") or hasattr(images, "__dlpack__")
    return one or alike or not isinstance(images, Iterable)


def in_chunks(
    images: ImageInput | Iterable[ImageInput], size: int
) -> Iterator[tuple[list[ImageInput], list[str]]]:
    """Yield many images, `size` at a time, with what errors call them: their position, and their
    path if they have one.
    """
    iterator, start = iter(cast(Iterable[ImageInput], images)), 0
    while chunk := list(islice(iterator, size)):
        yield chunk, [name_of(image, start + i) for i, image in enumerate(chunk)]
        start += len(chunk)


def name_of(image: ImageInput, position: int) -> str:
    """Name an image in errors: by its position, and its path if it has one."""
    path = f" ({shown(image)})" if isinstance(image, str | os.PathLike) else ""
    return f"image {position}{path}"


class Usable(NamedTuple):
    """The images of a batch that can be classified, and why the others cannot."""

    pixels: NDArray[np.float32]  # [those that can, 3, H, W]
    names: list[str]  # what errors call them
    errors: dict[int, ImageError]  # by position in the batch


def usable(
    images: ImageInput | Iterable[ImageInput], size: int, preprocess: Preprocess, limits: Limits
) -> Iterator[Usable]:
    """Decode and preprocess many images, `size` at a time; one that is refused loses no other."""
    for chunk, names in in_chunks(images, size):
        pixels = np.empty((len(chunk), *preprocess.output_shape), np.float32)
        good: list[str] = []
        errors: dict[int, ImageError] = {}
        for i, (image, name) in enumerate(zip(chunk, names, strict=True)):
            try:
                decoded = preprocess.decode(image, name=name, limits=limits)
                preprocess(decoded, out=pixels[len(good)], name=name, limits=limits)
                good.append(name)
            except ImageError as error:
                errors[i] = error
        yield Usable(pixels[: len(good)], good, errors)


def in_place(answers: Sequence[T], errors: Mapping[int, ImageError]) -> list[T | ImageError]:
    """Merge the answers to what was usable with the errors of the others, in order."""
    left = iter(answers)
    return [errors.get(i) or next(left) for i in range(len(answers) + len(errors))]


def is_on_device(pixels: Any) -> bool:
    """Tell whether it is an array of another library that lies on a GPU, as DLPack tells."""
    if isinstance(pixels, np.ndarray) or not hasattr(pixels, "__dlpack_device__"):
        return hasattr(pixels, "__cuda_array_interface__")
    kind, _ = pixels.__dlpack_device__()
    return int(kind) not in _HOST_MEMORY


def preprocessed(pixels: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Pixels that a caller made, one after another in memory.

    Args:
        shape: of one image, as the model takes it.

    Raises:
        InvalidInput: they are no float32 array of such images.
    """
    is_array = isinstance(pixels, np.ndarray)
    if not is_array or pixels.dtype != np.float32 or pixels.shape[1:] != shape:
        got = f"{pixels.dtype} {pixels.shape}" if is_array else brief(pixels)
        raise InvalidInput(
            f"expected preprocessed pixels, float32 [B, {', '.join(map(str, shape))}], got "
            f"{got}; for images use predict(), or preprocess.pixels(images)"
        )
    return np.ascontiguousarray(pixels)

"""Images as they come, answered in order and in bounded memory: decoded beside the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np

from marnet_sdk.cpus import cpus
from marnet_sdk.errors import ImageError
from marnet_sdk.inputs.batches import in_place, name_of
from marnet_sdk.inputs.images import ImageInput
from marnet_sdk.noise.tables import Floats
from marnet_sdk.prediction import Prediction

Prepare = Callable[[ImageInput, str], Floats]  # an image and its name to pixels [3, H, W]
Answer = Callable[[Floats, Sequence[str]], list[Prediction]]  # pixels [B, 3, H, W] and their names
_Ahead = deque[tuple[str, Future[Floats]]]


def stream(
    keeps: object,
    images: Iterable[ImageInput],
    prepare: Prepare,
    answer: Answer,
    batch_size: int,
) -> Iterator[Prediction | ImageError]:
    """Answer images in their order; while the model has one batch, the next one is decoded.

    Where the caller's iterator raises, the images before that are answered, and then it is raised.

    Args:
        keeps: an object that lives as long as the stream.
    """
    source, positions = iter(images), count()
    ahead: _Ahead = deque()
    pool = ThreadPoolExecutor(decoders := cpus().threads, "marnet-stream")
    most, ended, problem = batch_size + max(batch_size, decoders), False, None
    try:
        while True:
            while not ended and len(ahead) < most:
                try:
                    image = next(source)
                except Exception as error:
                    ended, problem = True, None if isinstance(error, StopIteration) else error
                    break
                name = name_of(image, next(positions))
                ahead.append((name, pool.submit(prepare, image, name)))
                del image  # of which many may be large
            if not ahead:
                break
            yield from _answered(ahead, answer, batch_size)
    finally:
        pool.shutdown(cancel_futures=True)
    if problem is not None:
        raise problem


def _answered(ahead: _Ahead, answer: Answer, batch_size: int) -> list[Prediction | ImageError]:
    """Answer the first images of those that are decoded ahead."""
    pixels: list[Floats] = []
    names: list[str] = []
    errors: dict[int, ImageError] = {}
    for i in range(min(batch_size, len(ahead))):
        name, decoded = ahead.popleft()
        try:
            pixels.append(decoded.result())
            names.append(name)
        except ImageError as error:
            errors[i] = error
    return in_place(answer(np.stack(pixels), names) if pixels else [], errors)

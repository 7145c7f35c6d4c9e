"""Many callers of one classifier: `ManyCallers`, whose methods `Classifier` has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np

from marnet_sdk.arguments import integer, positive, seconds
from marnet_sdk.backends.guarded import Guarded
from marnet_sdk.errors import ImageError, InferenceError, InvalidInput, brief
from marnet_sdk.inputs.batches import is_single
from marnet_sdk.inputs.images import ImageInput, Limits
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.noise.tables import Floats
from marnet_sdk.prediction import Prediction
from marnet_sdk.run import Runner
from marnet_sdk.serve.batcher import Batcher
from marnet_sdk.serve.policy import Batching
from marnet_sdk.serve.queue import BatchingStats
from marnet_sdk.serve.stream import stream


class Kind(NamedTuple):
    """A way to answer, which all of a batch have in common."""

    operating_point: str
    samples: int  # noise samples for each image


class ManyCallers:
    """Answers the images of many callers in batches, and streams of images."""

    preprocess: Preprocess
    limits: Limits
    labels: tuple[str, ...]
    _guard: Guarded
    _run: Runner  # at the own operating point
    _samples: int

    def submit(
        self,
        image: ImageInput,
        *,
        top_k: int = 5,
        samples: int | None = None,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Future[Prediction]:
        """Classify one image in a batch with those of other callers, without waiting for it.

        Any number of threads may call it. The answer is that of `predict`. Threads of the
        classifier, which start with the first call, decode the image and call the model. The
        `Batching` that the classifier was opened with bounds the queue. A future that is cancelled
        before its batch begins costs nothing more. A callback of a future runs in the thread that
        calls the model, so it should be short.

        Args:
            image: as `predict` takes it. A file must stay open until the answer is there.
            top_k, samples: as those of `predict`. Requests with other samples run in other batches,
                and never at another operating point (`Batching.brown_out`).
            deadline: seconds from now after which an answer is of no use.
            priority: a higher one goes first; among equals, who came first.

        Returns:
            A future of the `Prediction`. It fails with `ImageError` if the image is not usable,
            `DeadlineExceeded` if its deadline passes in the queue, `InferenceError` if the model
            gives NaN or infinity, and with the error of the backend if that fails.

        Raises:
            QueueFull: as many requests wait as are allowed.
            DeadlineExceeded: it cannot be answered in time, by the learned service times.
            InvalidInput: an argument of the wrong type or range.
            ClassifierClosed, WrongProcess: after `close`, or in another process.
        """
        self._guard.check()
        draws = self._draws(samples)
        own = Kind(self._run.operating_point, draws)
        return self._batcher.submit(
            image,
            positive("top_k", top_k),
            (own, *self._instead) if samples is None else (own,),
            deadline=None if deadline is None else seconds("deadline", deadline),
            priority=integer("priority", priority),
            keeps=self,
        )

    async def apredict(
        self,
        image: ImageInput,
        *,
        top_k: int = 5,
        samples: int | None = None,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Prediction:
        """Classify one image in a batch with those of other tasks, of any event loop.

        The loop runs other tasks meanwhile. Arguments and errors are those of `submit`. A task that
        is cancelled cancels its request.
        """
        import asyncio  # which the caller has imported; others need not

        future = self.submit(
            image, top_k=top_k, samples=samples, deadline=deadline, priority=priority
        )
        return await asyncio.wrap_future(future)

    def predict_stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 64,
        top_k: int = 5,
        samples: int | None = None,
    ) -> Iterator[Prediction | ImageError]:
        """Classify images as they come, as many as there are, in bounded memory.

        The images of the next batch are decoded beside the model. At most a few batches are read
        ahead. Whoever stops early closes the iterator, as the end of a `for` loop in a function
        does by itself.

        Args:
            images: as `predict` takes many.
            batch_size: images that go through the model together.
            top_k, samples: as those of `predict`.

        Yields:
            The `Prediction` of each image in their order, or the `ImageError` in its place.

        Raises:
            InvalidInput: at once, for an argument of the wrong type or range.
            InferenceError: the model gives NaN or infinity; names the images.
            ClassifierClosed, WrongProcess: after `close`, or in another process.
        """
        self._guard.check()
        batch_size, top_k = positive("batch_size", batch_size), positive("top_k", top_k)
        if is_single(images):
            raise InvalidInput(
                f"predict_stream takes many images, got {brief(images)}; use predict for one"
            )
        run, labels = partial(self._run, samples=self._draws(samples)), self.labels

        def answer(pixels: Floats, names: Sequence[str]) -> list[Prediction]:
            return run(pixels, names).predictions(labels, top_k)

        return stream(self, images, self._prepare, answer, batch_size)

    def batching_stats(self) -> BatchingStats:
        """Describe the queue of `submit` and `apredict`, and what happened in it until now."""
        return self._batcher.stats()

    def _serve(
        self,
        runners: Sequence[Runner],
        batching: Batching,
        seconds: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Get ready for callers; nothing that is made here holds the classifier.

        Args:
            runners: at the own operating point, and at each of `Batching.brown_out`.
            seconds: what is known of batches at the own operating point: sizes and their seconds.
        """
        own, *self._instead = [Kind(run.operating_point, run.point.samples) for run in runners]
        self._prepare = partial(_prepared, self.preprocess, self.limits)
        answered = partial(_answered, {run.operating_point: run for run in runners}, self.labels)
        known = [(own, size, each) for size, each in seconds]
        self._batcher = Batcher(self._prepare, answered, batching, known)

    def _draws(self, samples: int | None, stop: str | None = None) -> int:
        """The noise samples of each image of a call, checked."""
        samples = self._samples if samples is None else positive("samples", samples)
        self._run.check_draws(samples, stop)
        return samples


def _prepared(
    preprocess: Preprocess, limits: Limits, image: ImageInput, name: str | None = None
) -> Floats:
    """Decode and preprocess one image, to pixels [3, H, W]."""
    return preprocess.pixels([image], names=None if name is None else [name], limits=limits)[0]


def _answered(
    runners: Mapping[str, Runner],
    labels: tuple[str, ...],
    kind: Kind,
    rows: Sequence[Floats],
    top_k: Sequence[int],
) -> Sequence[Prediction | InferenceError]:
    """Answer the requests of a batch. One whose logits are no numbers fails alone."""
    names = ["the image"] * len(rows)
    run = runners[kind.operating_point]
    try:
        return run(np.stack(rows), names, samples=kind.samples).predictions(labels, top_k)
    except InferenceError as error:
        if len(rows) == 1:
            return [error]
    halves = slice(len(rows) // 2), slice(len(rows) // 2, None)
    parts = [_answered(runners, labels, kind, rows[half], top_k[half]) for half in halves]
    return [each for part in parts for each in part]

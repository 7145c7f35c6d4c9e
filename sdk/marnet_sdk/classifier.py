"""The classifier that a deployed process uses.

Axes: B batch, K noise samples, C classes, D_v encoder features, D_f fused features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NoReturn, Self, cast, overload

import numpy as np
from safetensors.numpy import load_file

from marnet_sdk.arguments import positive
from marnet_sdk.backends import RuntimeReport, open_backend
from marnet_sdk.backends.guarded import Guarded
from marnet_sdk.bundle import PLAN, read_bundle
from marnet_sdk.cpus import check_threads
from marnet_sdk.environment import processor
from marnet_sdk.errors import ImageError, InvalidImages, InvalidInput, brief
from marnet_sdk.inputs.batches import (
    Usable,
    in_chunks,
    in_place,
    is_on_device,
    is_single,
    preprocessed,
    usable,
)
from marnet_sdk.inputs.images import DEFAULT_LIMITS, ImageInput, Limits
from marnet_sdk.matching import Matching
from marnet_sdk.noise.tables import Floats
from marnet_sdk.prediction import Prediction
from marnet_sdk.process import left_to_the_parent, native
from marnet_sdk.run import Runner
from marnet_sdk.self_test import self_test
from marnet_sdk.serve.many_callers import ManyCallers
from marnet_sdk.serve.policy import DEFAULT_BATCHING, Batching


class Classifier(ManyCallers, Matching):
    """Classifies images with a bundle.

    When the constructor returns, the files that classify have been checked byte by byte, of those
    of texts and of the checkpoint their sizes, and the golden answers were reproduced on this
    machine. May be used from several threads at once, in the process that opened it. What it holds
    goes with its last reference, or with `close`.

        clf = Classifier("bundles/digits-torchscript-fp16.marnet")
        clf.predict("digit.png").label

        with Classifier("bundles/digits-torchscript-fp16.marnet") as clf:
            clf.predict("digit.png").label
    """

    def __init__(
        self,
        path: str | Path,
        *,
        operating_point: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        fast_decode: bool = False,
        batching: Batching = DEFAULT_BATCHING,
    ) -> None:
        """Open a bundle.

        Args:
            operating_point: which of the bundle's trades of accuracy for speed answers
                (`bundle.manifest.sampling.points`); default: the one that its export picked.
                "zero", where a bundle has it, is the alignment branch alone: no loop, no noise.
            samples: noise samples per image, whose probabilities are averaged; default: the
                operating point's. More than one needs a point with the loop.
            seed: the seed of the noise; default: the one that the bundle was verified with.
            threads: cores to use; default: as many as this process has, by affinity and the
                quota of its control groups (`runtime.cpus`).
            device: "cpu" or "cuda"; default: the one that the bundle was built for.
            limits: larger images are refused before they are decoded.
            fast_decode: decode JPEG files at a smaller scale where they stay twice as large as what
                the model takes (`Preprocess.decode`). That is faster, and the pixels are others
                than those that the bundle was verified with. Golden images are decoded as ever.
            batching: how `submit` and `apredict` collect images into batches.

        Raises:
            InvalidInput: an argument of the wrong type or range; more threads than the machine has.
            NotFound, BundleError: it is not a sound bundle.
            MissingExtra, BackendUnavailable: its backend cannot run here.
            SelfTestFailed: it does not reproduce its golden answers.
        """
        threads = check_threads(threads)
        if device not in (None, "cpu", "cuda"):
            raise InvalidInput(
                f"device: got {brief(device)}, expected cpu or cuda; leave it out for the device "
                "that the bundle was built for"
            )
        if not isinstance(fast_decode, bool):
            raise InvalidInput(f"fast_decode: got {brief(fast_decode)}, expected True or False")
        bundle = read_bundle(path, lazily=True)
        manifest, sampling = bundle.manifest, bundle.manifest.sampling
        name = sampling.default if operating_point is None else operating_point
        for point in (name, *batching.brown_out):
            bundle.check_point(point)
        # Files are opened later, too, perhaps from another working directory; and a symbolic link
        # may point elsewhere by then.
        self.bundle = bundle = replace(bundle, path=bundle.path.resolve())
        self.limits, self.labels = limits, manifest.labels
        exact = manifest.preprocessing
        self.preprocess = replace(exact, fast_decode=fast_decode)
        plan = bundle.file(PLAN)
        bundle.check_listed(plan.parent)  # the backend opens them by name
        self._threads = threads
        self._text, self._text_lock = None, Lock()  # opened by the first text
        self._device = device or manifest.built_for.device
        with native():
            backend = open_backend(
                manifest.backend, plan.parent, manifest.precision.compute, threads, self._device
            )
        self._guard = Guarded(left_to_the_parent(backend), bundle.path)
        runner = partial(Runner, self._guard, load_file(plan), sampling)
        golden = {
            point: self_test(bundle, exact, runner(point, sampling.seed))
            for point in dict.fromkeys([sampling.default, name, *batching.brown_out])
        }
        bundle.check_in_place()
        self._feature_width = golden[name].features.shape[1]
        seed = sampling.seed if seed is None else seed
        runners = [runner(point, seed) for point in (name, *batching.brown_out)]
        self._run = runners[0]
        self._serve(runners, batching, self._batch_times())
        self._samples = self._run.point.samples
        self._samples = self._draws(samples)

    def _batch_times(self) -> Sequence[tuple[int, float]]:
        """Sizes and seconds of batches that the export measured, if it did so on such a machine."""
        times = self.bundle.manifest.batch_times
        if times is None or self.operating_point != self.bundle.manifest.sampling.default:
            return ()
        here = (processor(), self._guard.report().threads)
        return times.seconds if (times.processor, times.threads) == here else ()

    def close(self) -> None:
        """Let go of the backend and its threads, once running calls and accepted requests are done.

        Another call raises `ClassifierClosed`. Closing twice does nothing.
        """
        self._batcher.close()
        self._guard.close()
        self._text = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(
            f"a Classifier cannot be copied or sent to another process; open {self.bundle.path} "
            "there, as in the initializer of a process pool"
        )

    @property
    def operating_point(self) -> str:
        """The name of the bundle's operating point that answers."""
        return self._run.operating_point

    @property
    def samples(self) -> int:
        """Noise samples per image where a call asks for no other number."""
        return self._samples

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._run.seed

    @property
    def runtime(self) -> RuntimeReport:
        """The way the backend runs.

        On a CPU, how many threads a call computes with and which CPUs the process may use; on a
        GPU, what is captured and how much memory it takes, how often it was replayed, and what had
        to run otherwise, and why.
        """
        return self._guard.report()

    def __repr__(self) -> str:
        manifest, point = self.bundle.manifest, self._run.point
        steps = f"{len(point.timesteps)} {point.sampler} steps" if point.timesteps else "no loop"
        return (
            f"Classifier({str(self.bundle.path)!r}: {len(self.labels)} classes, "
            f"{manifest.backend} {manifest.precision.asked}, {steps}"
            + (f", {self.samples} samples)" if self.samples > 1 else ")")
        )

    @overload
    def predict(
        self,
        images: ImageInput,
        *,
        batch_size: int = ...,
        top_k: int = ...,
        samples: int | None = ...,
        stop: str | None = ...,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = ...,
        top_k: int = ...,
        samples: int | None = ...,
        stop: str | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = ...,
        top_k: int = ...,
        samples: int | None = ...,
        stop: str | None = ...,
        on_error: Literal["return"],
    ) -> list[Prediction | ImageError]: ...
    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 64,
        top_k: int = 5,
        samples: int | None = None,
        stop: str | None = None,
        on_error: str = "raise",
    ) -> Prediction | list[Prediction] | list[Prediction | ImageError]:
        """Classify one image, or a list or iterator of them.

        Args:
            images: path, bytes of a file, PIL image, uint8 array [H, W, 3]; or many of these.
            batch_size: images that go through the model together.
            top_k: how many classes `Prediction.top` holds.
            samples: noise samples per image, whose probabilities are averaged; default: the
                classifier's. The encoder runs once for all of them.
            stop: "settled" draws no more samples for an image once its best class is predicted to
                stay the best (with 99 % confidence at each look, against each other class).
            on_error: for many images: "raise" one `InvalidImages` at the end, which holds the
                other answers, or "return" the `ImageError` in the place of the answer.

        Returns:
            A `Prediction`, or a list of them in the order of the images.

        Raises:
            ImageError: the one image is not usable. InvalidImages: some of many are not.
            InvalidInput: a batch_size, top_k or samples that is no integer or below 1, a `stop`
                that does not exist or has nothing to stop, or `stop` or several samples at an
                operating point without the loop.
            InferenceError: the model gives NaN or infinity.
            ClassifierClosed, WrongProcess: after `close`, or in another process.
        """
        self._guard.check()
        batch_size, top_k = positive("batch_size", batch_size), positive("top_k", top_k)
        samples = self._draws(samples, stop)
        if on_error not in ("raise", "return"):
            raise InvalidInput(f'on_error must be "raise" or "return", got {brief(on_error)}')
        if one := is_single(images):
            batches = iter([Usable(self._pixels([images]), [], {})])
        else:
            batches = usable(images, batch_size, self.preprocess, self.limits)
        answers: list[Prediction | ImageError] = []
        for pixels, names, refused in batches:
            found: list[Prediction] = []
            if len(pixels):
                batch = self._run(pixels, names, samples=samples, stop=stop)
                found = batch.predictions(self.labels, top_k)
            answers += in_place(found, refused)
        if one:
            return cast(Prediction, answers[0])
        errors = {i: a for i, a in enumerate(answers) if isinstance(a, ImageError)}
        if on_error == "return":
            return answers
        if errors:
            kept = [None if isinstance(a, ImageError) else a for a in answers]
            raise InvalidImages(errors, kept)
        return cast(list[Prediction], answers)

    def predict_pixels(
        self,
        pixels: Floats,
        *,
        names: Sequence[str] = (),
        top_k: int = 5,
        samples: int | None = None,
        stop: str | None = None,
    ) -> list[Prediction]:
        """Classify images that are preprocessed already, as one batch; otherwise as `predict`.

        Args:
            pixels: float32 [B, 3, H, W].
            names: what errors call the images; by default their rows.

        Raises:
            InvalidInput: another shape or type, and as `predict`.
            InferenceError, ClassifierClosed, WrongProcess: as `predict`.
        """
        self._guard.check()
        draws, top_k = self._draws(samples, stop), positive("top_k", top_k)
        rows = preprocessed(pixels, self.preprocess.output_shape)
        if not len(rows):
            return []
        batch = self._run(rows, names, samples=draws, stop=stop)
        return batch.predictions(self.labels, top_k)

    def embed(self, images: ImageInput | Iterable[ImageInput], *, batch_size: int = 64) -> Floats:
        """The fused representation that the final classifier sees, the mean over noise samples.

        At an operating point without the loop, x_EMA of eq. (7), which its classifier sees.

        Returns:
            [D_f] for one image, [B, D_f] for many.

        Raises:
            ImageError: names the first input that is not a usable image.
            InferenceError: the model gives NaN or infinity.
        """
        self._guard.check()
        batch_size = positive("batch_size", batch_size)
        if is_single(images):
            return self._run(self._pixels([images]), samples=self._samples).features[0]
        parts = [np.empty((0, self._feature_width), np.float32)]
        for chunk, names in in_chunks(images, batch_size):
            batch = self._run(self._pixels(chunk, names), names, samples=self._samples)
            parts.append(batch.features)
        return np.concatenate(parts)

    def _pixels(self, images: Sequence[ImageInput], names: Sequence[str] | None = None) -> Floats:
        return self.preprocess.pixels(images, names=names, limits=self.limits)

    def logits(self, pixels: Floats | Any) -> Floats:
        """Logits of images that are preprocessed already: float32 [B, 3, H, W] -> [B, C].

        With several noise samples, the logarithm of their mean probabilities.

        Args:
            pixels: a NumPy array; or, where the backend runs on a GPU, an array there of a library
                that speaks DLPack (torch, cupy, jax), which is read where it lies if its rows are
                exactly one of `runtime.buckets`.

        Raises:
            InvalidInput: another shape or type, or an array on a device that cannot be read.
            InferenceError: the model gives NaN or infinity; names the rows.
        """
        self._guard.check()
        if is_on_device(pixels):
            rows = self._run.device_rows(pixels)
        else:
            rows = preprocessed(pixels, self.preprocess.output_shape)
        if not len(rows):
            return np.empty((0, len(self.labels)), np.float32)
        return self._run(rows, samples=self._samples).logits

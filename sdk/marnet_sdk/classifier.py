"""The classifier that a deployed process uses.

Axes: B batch, K noise samples, C classes, D_v encoder features, D_f fused features.
"""

from __future__ import annotations

import hashlib
import operator
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, cast, overload

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from marnet_sdk.backends import Backend, open_backend
from marnet_sdk.backends.guarded import Guarded
from marnet_sdk.bundle import (
    GOLDEN_ANSWERS,
    GOLDEN_IMAGES,
    PLAN,
    ZERO,
    Bundle,
    OperatingPoint,
    read_bundle,
)
from marnet_sdk.cpus import check_threads
from marnet_sdk.environment import versions
from marnet_sdk.errors import (
    BundleFormatError,
    ImageError,
    InferenceError,
    InvalidImages,
    InvalidInput,
    SelfTestFailed,
    brief,
)
from marnet_sdk.gpu.captured import DeviceRows, RuntimeReport
from marnet_sdk.inputs.images import DEFAULT_LIMITS, Buffer, ImageInput, Limits, decode, shown
from marnet_sdk.noise.tables import Floats, Tables, make_tables
from marnet_sdk.prediction import Prediction, Score
from marnet_sdk.process import left_to_the_parent, native
from marnet_sdk.text import TextEmbedder, check_texts, open_text_part
from marnet_sdk.uncertainty import (
    Answers,
    mean_logits,
    schedule,
    settled,
    softmax,
    summarise,
)

# Two decoders may round a pixel to neighbouring grey levels; more is another image.
_GREY_LEVELS = 1.5
_DEVICES = ("cpu", "cuda")
_HOST_MEMORY = (1, 3, 11)  # kDLCPU, and pinned for a GPU: kDLCUDAHost, kDLROCMHost


class Classifier:
    """Classifies images with a bundle.

    When the constructor returns, the bundle's bytes have been checked and its golden answers have
    been reproduced on this machine. May be used from several threads at once, in the process that
    opened it. What it holds goes with its last reference, or with `close`.

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
    ) -> None:
        """Open a bundle.

        Args:
            operating_point: which of the bundle's trades of accuracy for speed answers
                (`bundle.manifest.sampling.points`); default: the one that its export picked.
                "zero", where a bundle has it, is the alignment branch alone: no loop, no noise.
            samples: noise samples per image, whose probabilities are averaged; default: the
                operating point's. More than one needs a point with the loop.
            seed: of the noise; default: the one that the bundle was verified with.
            threads: cores to use; default: as many as this process has, by affinity and the
                quota of its control groups (`runtime.cpus`).
            device: "cpu" or "cuda"; default: the one that the bundle was built for.
            limits: larger images are refused before they are decoded.

        Raises:
            InvalidInput: an argument of the wrong type or range; more threads than the machine has.
            NotFound, BundleError: it is not a sound bundle.
            MissingExtra, BackendUnavailable: its backend cannot run here.
            SelfTestFailed: it does not reproduce its golden answers.
        """
        if threads is not None:
            threads = check_threads(_positive("threads", threads))
        if device not in (None, *_DEVICES):
            raise InvalidInput(
                f"device: got {brief(device)}, expected {' or '.join(_DEVICES)}; leave it out for "
                "the device that the bundle was built for"
            )
        bundle = read_bundle(path, lazily=True)
        manifest = bundle.manifest
        sampling = manifest.sampling
        if operating_point is not None and operating_point not in sampling.points:
            raise InvalidInput(_no_such_point(bundle, operating_point))
        # Files are opened later, too, perhaps from another working directory.
        bundle = replace(bundle, path=bundle.path.absolute())
        self.bundle = bundle
        self.limits = limits
        self.labels = manifest.labels
        self.preprocess = manifest.preprocessing
        plan = bundle.file(PLAN)
        for file in plan.parent.rglob("*"):  # the backend opens them by name
            if not file.is_dir():
                bundle.file(file.relative_to(bundle.path).as_posix())
        self._plan = load_file(plan)
        self._threads = threads
        self._text: TextEmbedder | None = None  # opened by the first text
        self._text_lock = Lock()
        self._device = device or manifest.built_for.device
        with native():
            backend = open_backend(
                manifest.backend, plan.parent, manifest.precision.compute, threads, self._device
            )
        self._guard = Guarded(left_to_the_parent(backend), bundle.path)
        self._backend: Backend = self._guard
        name = operating_point or sampling.default
        for tested in dict.fromkeys([sampling.default, name]):
            self._use(tested, sampling.points[tested].samples, sampling.seed)
            self._self_test()
        self._use(name, sampling.points[name].samples, sampling.seed if seed is None else seed)
        self._samples = self._number_of_samples(samples)

    def _use(self, operating_point: str, samples: int, seed: int) -> None:
        """Answer like this from now on."""
        self._operating_point, self._samples, self._seed = operating_point, samples, seed
        # Of one number of samples each; they are large.
        sampling = self.bundle.manifest.sampling
        self._make_tables = partial(make_tables, self._plan, sampling, operating_point, seed=seed)
        self._shared = lru_cache(maxsize=4)(self._make_tables)
        self._make_tables(samples=1)  # refuses a bad seed

    def close(self) -> None:
        """Let go of the backend and its threads; calls that are running finish first.

        Another call raises `ClassifierClosed`. Closing twice does nothing.
        """
        self._guard.close()
        self._text = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(
            f"a Classifier cannot be copied or sent to another process; open {self.bundle.path} "
            "there, as in the initializer of a process pool"
        )

    @property
    def _point(self) -> OperatingPoint:
        return self.bundle.manifest.sampling.points[self._operating_point]

    @property
    def _by_image(self) -> bool:
        """Whether each image meets noise of its own; without the loop none meets any."""
        return self.bundle.manifest.sampling.noise == "image" and bool(self._point.timesteps)

    def _number_of_samples(self, samples: int | None) -> int:
        """
        Raises:
            InvalidInput: no integer, below 1, or several where there is no loop.
        """
        if samples is None:
            return self._samples
        count = _positive("samples", samples)
        if count > 1:
            self._check_loop(f"samples: got {count}")
        return count

    def _check_loop(self, got: str) -> None:
        """
        Raises:
            InvalidInput: there is no loop; `got` is what asks for one.
        """
        if not self._point.timesteps:
            other = self.bundle.manifest.sampling.with_loop
            raise InvalidInput(
                f"{got}, but operating point {self._operating_point!r} has no reverse loop, and so "
                f"no noise to draw; leave it out, or choose operating_point={other!r}"
            )

    @property
    def operating_point(self) -> str:
        """The name of the bundle's operating point that answers."""
        return self._operating_point

    @property
    def samples(self) -> int:
        """Noise samples per image where a call asks for no other number."""
        return self._samples

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self._seed

    @property
    def runtime(self) -> RuntimeReport:
        """How the backend runs: on a CPU, how many threads a call computes with and which CPUs the
        process may use; on a GPU, what is captured and how much memory it takes, how often it was
        replayed, and what had to run otherwise, and why.
        """
        return self._backend.report()

    def __repr__(self) -> str:
        manifest, point = self.bundle.manifest, self._point
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
        batch_size, top_k = _positive("batch_size", batch_size), _positive("top_k", top_k)
        samples = self._number_of_samples(samples)
        if on_error not in ("raise", "return"):
            raise InvalidInput(f'on_error must be "raise" or "return", got {brief(on_error)}')
        if stop not in (None, "settled"):
            raise InvalidInput(f'stop must be "settled" or None, got {brief(stop)}')
        if stop:
            self._check_loop(f"stop: got {stop!r}")
        if stop and len(schedule(samples)) == 1:
            raise InvalidInput(
                f"stop={stop!r} looks after {schedule(99)[0]} samples for the first time, so it "
                f"needs more than that, got samples={samples}; ask for more, or leave stop out"
            )
        how = _How(top_k, samples, stop)
        if _is_single(images):
            pixels = self._pixels([cast(ImageInput, images)])
            return self._predictions(self._run(pixels, samples=samples, stop=stop), how)[0]
        answers: list[Prediction | ImageError] = []
        for chunk in _chunks(images, batch_size):
            answers += self._predict_chunk(chunk, len(answers), how)
        errors = {i: a for i, a in enumerate(answers) if isinstance(a, ImageError)}
        if on_error == "return":
            return answers
        predictions = [None if isinstance(a, ImageError) else a for a in answers]
        if errors:
            raise InvalidImages(errors, predictions)
        return cast(list[Prediction], predictions)

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
        batch_size = _positive("batch_size", batch_size)
        if _is_single(images):
            return self._run(self._pixels([cast(ImageInput, images)])).features[0]
        parts: list[Floats] = []
        start = 0
        for chunk in _chunks(images, batch_size):
            names = _names(chunk, start)
            parts.append(self._run(self._pixels(chunk, names), names).features)
            start += len(chunk)
        return np.concatenate(parts or [np.empty((0, self._feature_width), np.float32)])

    def match(
        self,
        images: ImageInput | Iterable[ImageInput],
        texts: str | Iterable[str],
        *,
        batch_size: int = 64,
    ) -> Floats:
        """How well texts fit images: Sim(x_v', x_s') of eq. (5), the cosine of the angle between
        the aligned embeddings of image and text.

        1 is the best there is and -1 the worst. Only scores of one bundle can be compared. The
        first text that a classifier meets loads the text encoder, which is checked and tested then.
        A `MarnetWarning` says of how many texts most words are unknown to the model.

        Args:
            images: as of `predict`. texts: one, or many.
            batch_size: images, and texts, that go through their encoder together.

        Returns:
            [images, texts], without the first axis for one image (not in a list), without the last
            for one text; for one image and one text a number.

        Raises:
            ImageError: names the first input that is not a usable image.
            InvalidInput: a text that is no str, or has no word that the model knows; names it.
            InferenceError: an encoder gives NaN or infinity.
            BundleFormatError: the bundle has no text encoder; names the command that makes one.
            BundleCorrupt, MissingExtra, BackendUnavailable, SelfTestFailed: its text encoder
                cannot be used here.
        """
        self._guard.check()
        batch_size = _positive("batch_size", batch_size)
        checked, one_text = check_texts(texts)
        embedder = self._embedder()
        with native():
            semantic = embedder(checked, batch_size)  # [M, D]
        one_image = _is_single(images)
        many = [cast(ImageInput, images)] if one_image else images
        parts = [np.empty((0, len(checked)), np.float32)]
        start = 0
        for chunk in _chunks(many, batch_size):
            names = None if one_image else _names(chunk, start)
            visual = embedder.alignment.images(self._image_features(chunk, names))
            parts.append(visual @ semantic.T)
            start += len(chunk)
        scores = np.concatenate(parts)
        if one_text:
            scores = scores[:, 0]
        return scores[0] if one_image else scores

    def embed_text(self, texts: str | Iterable[str], *, batch_size: int = 64) -> Floats:
        """Aligned text embeddings x_s' = g(E_s(x_s)), eq. (8), scaled to length 1, so that the dot
        product of two is their cosine similarity.

        Longer texts than the model was trained with are cut, as in training. Behind 1,024
        characters for each token that it takes, no text is looked at.

        Returns:
            [D] for one text, [texts, D] for many.

        Raises:
            As of `match`.
        """
        self._guard.check()
        batch_size = _positive("batch_size", batch_size)
        checked, one = check_texts(texts)
        embedder = self._embedder()
        with native():
            embedded = embedder(checked, batch_size)
        return embedded[0] if one else embedded

    def _embedder(self) -> TextEmbedder:
        """The text encoder, opened at the first call."""
        with native(), self._text_lock:
            if self._text is None:
                self._text = left_to_the_parent(
                    open_text_part(self.bundle, self._threads, self._mismatch, self._device)
                )
            return self._text

    def _pixels(self, images: Sequence[ImageInput], names: Sequence[str] | None = None) -> Floats:
        return self.preprocess.pixels(images, names=names, limits=self.limits)

    def _image_features(self, images: Sequence[ImageInput], names: Sequence[str] | None) -> Floats:
        """x_v [B, D_v] of one batch."""
        x_v = self._backend.encode(self._pixels(images, names))
        if len(bad := np.flatnonzero(~np.isfinite(x_v).all(axis=1))):
            shown = [names[i] for i in bad.tolist()] if names else ["the image"]
            raise InferenceError(_not_finite(shown, "from the encoder on", "features"))
        return x_v

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
        if _is_on_device(pixels):
            return self._device_logits(pixels)
        expected = self.preprocess.output_shape
        good = isinstance(pixels, np.ndarray) and pixels.dtype == np.float32
        if not good or pixels.ndim != 4 or pixels.shape[1:] != expected:
            is_array = isinstance(pixels, np.ndarray)
            got = f"{pixels.dtype} {pixels.shape}" if is_array else brief(pixels)
            raise InvalidInput(
                f"logits() takes preprocessed pixels, float32 [B, {', '.join(map(str, expected))}],"
                f" got {got}; for images use predict(), or preprocess.pixels(images)"
            )
        if not len(pixels):
            return np.empty((0, len(self.labels)), np.float32)
        return self._run(np.ascontiguousarray(pixels)).logits

    def _device_logits(self, pixels: Any) -> Floats:
        rows = self._backend.device_rows(pixels)
        if self._by_image:
            raise InvalidInput(
                "this bundle keys its noise by the bytes of an image, which must be in the host's "
                "memory for that; pass a NumPy array"
            )
        if not len(rows):
            return np.empty((0, len(self.labels)), np.float32)
        return self._run(rows).logits

    def _run(
        self,
        pixels: Floats | DeviceRows,
        names: Sequence[str] = (),
        *,
        samples: int | None = None,
        stop: str | None = None,
    ) -> _Run:
        """Everything about a batch. `names` are what an error calls the rows."""
        count = self.samples if samples is None else samples
        if stop is None and not self._by_image:
            return self._run_at_once(pixels, names, count)
        assert isinstance(pixels, np.ndarray)
        x_v = self._backend.encode(pixels)
        looks = schedule(count) if stop else [count]
        active = np.arange(len(pixels))  # images that still draw
        logits = np.full((len(pixels), count, len(self.labels)), np.nan, np.float32)
        drawn = np.zeros(len(pixels), np.int64)
        features = np.zeros((len(pixels), 0), np.float32)
        for start, end in zip([0, *looks], looks, strict=False):
            tables = self._tables(pixels[active], start, end, count)
            got, fused = self._backend.refine(x_v[active], tables)
            given = x_v[active]
            self._check_finite(got, lambda i, x=given: x[i : i + 1], tables, active, names)
            logits[active, start:end] = got
            features = features if features.size else np.zeros((len(pixels), fused.shape[-1]))
            features[active] += fused.sum(axis=1)
            drawn[active] = end
            if end < count:
                active = active[~settled(softmax(logits[active, :end]), count)]
            if not len(active):
                break
        return _Run(logits, drawn, (features / drawn[:, None]).astype(np.float32))

    def _run_at_once(self, pixels: Floats | DeviceRows, names: Sequence[str], count: int) -> _Run:
        """The same where all images draw all samples of shared noise: one call of the backend."""
        tables = self._shared(samples=count)
        logits, fused = self._backend.run(pixels, tables)

        def encode(row: int) -> Floats:
            return self._backend.encode(cast(Any, pixels)[row : row + 1])

        self._check_finite(logits, encode, tables, np.arange(len(pixels)), names)
        features = fused.mean(axis=1, dtype=np.float64).astype(np.float32)
        return _Run(logits, np.full(len(pixels), count), features)

    def _tables(self, pixels: Floats, start: int, end: int, total: int) -> Tables:
        """The loop's tables for samples start .. end of a batch: the same for all of its images, or
        keyed by what the model sees."""
        if self._by_image:
            keys = [pixel_key(row) for row in pixels]
            return self._make_tables(samples=end - start, first=start, keys=keys)
        whole = self._shared(samples=total)
        return whole if (start, end) == (0, total) else whole.samples(start, end)

    def _check_finite(
        self,
        logits: Floats,
        features: Callable[[int], Floats],
        tables: Tables,
        active: np.ndarray,
        names: Sequence[str],
    ) -> None:
        """Refuse rows that are no numbers; `features` gives x_v [1, D_v] of one."""
        if np.isfinite(logits).all():
            return
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=(1, 2)))
        rows, steps = active[bad], len(tables.coefficients)
        x_v = features(int(bad[0]))
        if not np.isfinite(x_v).all():
            where = "from the encoder on"
        elif not steps:
            where = "in the alignment branch behind the encoder"
        else:
            step = self._first_bad_step(x_v, tables.rows(bad[:1]))
            where = f"from step {step} of {steps} of the reverse loop on"
        shown = [str(names[i]) if names else f"row {i}" for i in rows.tolist()]
        raise InferenceError(_not_finite(shown, where))

    def _first_bad_step(self, x_v: Floats, tables: Tables) -> int:
        """1-based, by bisection: a chain that has left the finite numbers does not return."""
        good, bad = 0, len(tables.coefficients)
        while bad - good > 1:
            middle = (good + bad) // 2
            logits, _ = self._backend.refine(x_v, tables.first_steps(middle))
            good, bad = (middle, bad) if np.isfinite(logits).all() else (good, middle)
        return bad

    def _predict_chunk(
        self, chunk: Sequence[ImageInput], start: int, how: _How
    ) -> list[Prediction | ImageError]:
        """Answers of one batch; an image that is refused loses no other answer."""
        answers: list[Prediction | ImageError | None] = [None] * len(chunk)
        pixels = np.empty((len(chunk), *self.preprocess.output_shape), np.float32)
        good: list[int] = []
        names = _names(chunk, start)
        for i, (image, name) in enumerate(zip(chunk, names, strict=True)):
            try:
                decoded = decode(image, name=name, limits=self.limits)
                out = pixels[len(good)]
                self.preprocess(decoded, out=out, name=name, limits=self.limits)
                good.append(i)
            except ImageError as error:
                answers[i] = error
        if good:
            used = [names[i] for i in good]
            run = self._run(pixels[: len(good)], used, samples=how.samples, stop=how.stop)
            for i, prediction in zip(good, self._predictions(run, how), strict=True):
                answers[i] = prediction
        return [a for a in answers if a is not None]

    def _predictions(self, run: _Run, how: _How) -> list[Prediction]:
        answers = run.answers
        order = np.argsort(-answers.probabilities, axis=1, kind="stable")[:, : how.top_k]
        threshold = self._abstain_below(how)
        out = []
        for i, (row, best) in enumerate(zip(answers.probabilities, order, strict=True)):
            top = tuple(Score(self.labels[k], int(k), float(row[k])) for k in best)
            error = float(answers.standard_error[i])
            out.append(
                Prediction(
                    *(top[0].label, top[0].index, top[0].score, top),
                    samples=int(run.drawn[i]),
                    vote_share=float(answers.vote_share[i]),
                    standard_error=None if np.isnan(error) else error,
                    abstain=None if threshold is None else top[0].score < threshold,
                )
            )
        return out

    def _abstain_below(self, how: _How) -> float | None:
        """The threshold that export found, if it was found for this very way of answering."""
        point, seed = self._point, self.bundle.manifest.sampling.seed
        same = (how.samples, how.stop) == (point.samples, None)
        same = same and (self._seed == seed or not point.timesteps)
        return point.abstain_below if same else None

    def _self_test(self) -> None:
        """Run the golden images; refuse the bundle if it does not give its golden answers."""
        bundle = self.bundle
        golden = load_file(bundle.file(GOLDEN_ANSWERS))
        names = sorted(
            (name for name in bundle.manifest.files if name.startswith(GOLDEN_IMAGES)),
            key=lambda name: int(Path(name).stem),
        )
        pixels = self.preprocess.pixels([bundle.path / name for name in names])
        default = bundle.manifest.sampling.default
        key = "logits" if self._operating_point == default else f"logits.{self._operating_point}"
        expected = (pixels.shape, (len(names), len(self.labels)))
        if key not in golden or (golden["pixels"].shape, golden[key].shape) != expected:
            raise BundleFormatError(
                f"{bundle.path}: its golden answers do not fit the labels and the preprocessing of "
                "its manifest; export it again"
            )
        level = _GREY_LEVELS * self.preprocess.rescale_factor / min(self.preprocess.std)
        if (error := float(np.abs(pixels - golden["pixels"]).max())) > level:
            raise SelfTestFailed(
                self._mismatch(f"decoded golden images differ by {error:.3g} (bound {level:.3g})")
            )
        try:
            run = self._run(golden["pixels"])
        except InferenceError as error:
            raise SelfTestFailed(self._mismatch(str(error))) from error
        self._feature_width = run.features.shape[1]
        logits = run.logits
        bound = bundle.manifest.golden_tolerance * float(np.abs(golden[key]).max())
        error = float(np.abs(logits - golden[key]).max())
        labels_differ = logits.argmax(axis=1) != golden[key].argmax(axis=1)
        # Written so that NaN fails too.
        if not error <= bound or labels_differ.any():
            raise SelfTestFailed(
                self._mismatch(
                    f"golden logits differ by {error:.3g} (bound {bound:.3g}), "
                    f"{int(labels_differ.sum())} of {len(logits)} labels differ"
                )
            )

    def _mismatch(self, what: str) -> str:
        built = self.bundle.manifest.built_for
        here = versions(built.packages)
        different = [
            f"{name} {version} (here {here[name]})"
            for name, version in built.packages.items()
            if here.get(name, version) != version
        ]
        device = f" --device {built.device}" if built.device != "cpu" else ""
        return (
            f"{self.bundle.path} does not reproduce its golden answers on this machine: {what}. "
            f"Built for {built.device} {built.machine}; running on {platform.machine()}; "
            f"versions that differ: {', '.join(different) or 'none'}. Export it again on this "
            f"machine: marnet-export --backend {self.bundle.manifest.backend} "
            f"--precision {self.bundle.manifest.precision.asked}{device}"
        )


@dataclass(frozen=True)
class _How:
    """What one call of `predict` asks for."""

    top_k: int
    samples: int
    stop: str | None


@dataclass(frozen=True, eq=False)
class _Run:
    """What came out for a batch."""

    samples: Floats  # logits [B, K, C]; NaN where an image stopped before
    drawn: np.ndarray  # [B] samples of each image
    features: Floats  # [B, D_f] mean over its samples

    @property
    def answers(self) -> Answers:
        return summarise(softmax(self.samples), self.drawn)

    @property
    def logits(self) -> Floats:
        """[B, C]: of the one sample, or the logarithm of the mean probabilities."""
        return mean_logits(self.samples)


def pixel_key(pixels: Floats) -> int:
    """What noise keyed by image is keyed by: 64 bits of the BLAKE2b hash of the model's input."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels, "<f4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _positive(name: str, value: int) -> int:
    """The value as an integer of at least 1; NumPy's integers are integers too."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InvalidInput(
            f"{name} must be an integer, got {brief(value)} ({type(value).__name__}); pass 1 or "
            "more"
        ) from error
    if number < 1:
        raise InvalidInput(f"{name} must be at least 1, got {number}")
    return number


def _no_such_point(bundle: Bundle, name: str) -> str:
    points = bundle.manifest.sampling.points
    zero = f" or --steps 0, which add {ZERO!r}" if ZERO not in points else ""
    return (
        f"operating_point: got {brief(name)}; {bundle.path} has {', '.join(points)}. More are made "
        f"by exporting it again with marnet-export --steps auto{zero}"
    )


def _not_finite(names: Sequence[str], where: str, what: str = "logits") -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"the {what} of {shown} hold NaN or infinity, {where}; expected finite numbers: check the "
        "pixels for NaN if they were made elsewhere, else export the bundle again with "
        "--precision fp32"
    )


def _is_single(images: ImageInput | Iterable[ImageInput]) -> bool:
    """Whether it is one image and not many. What is neither is left for decoding to refuse."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return False  # [B, H, W, 3] is many
    one = isinstance(images, str | os.PathLike | Buffer | Image.Image | np.ndarray | Mapping)
    # An open file is an iterable too, of lines, and a tensor one of rows.
    alike = hasattr(images, "read") or hasattr(images, "__dlpack__")
    return one or alike or not isinstance(images, Iterable)


def _chunks(images: ImageInput | Iterable[ImageInput], size: int) -> Iterator[list[ImageInput]]:
    iterator = iter(cast(Iterable[ImageInput], images))
    while chunk := list(islice(iterator, size)):
        yield chunk


def _is_on_device(pixels: Any) -> bool:
    """Whether it is an array of another library that lies on a GPU, as DLPack tells."""
    if isinstance(pixels, np.ndarray) or not hasattr(pixels, "__dlpack_device__"):
        return hasattr(pixels, "__cuda_array_interface__")
    kind, _ = pixels.__dlpack_device__()
    return int(kind) not in _HOST_MEMORY


def _names(chunk: Sequence[ImageInput], start: int) -> list[str]:
    """How errors call the inputs: their position, and their path if they have one."""
    return [
        f"image {start + i} ({shown(image)})"
        if isinstance(image, str | os.PathLike)
        else f"image {start + i}"
        for i, image in enumerate(chunk)
    ]

"""The classifier that a deployed process uses.

Axes: B batch, K classes, D_f fused features.
"""

from __future__ import annotations

import operator
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, cast, overload

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from marnet_sdk.backends import Floats, make_tables, open_backend
from marnet_sdk.bundle import GOLDEN_ANSWERS, GOLDEN_IMAGES, PLAN, read_bundle
from marnet_sdk.environment import versions
from marnet_sdk.errors import (
    BundleFormatError,
    ImageError,
    InferenceError,
    InvalidImages,
    InvalidInput,
    SelfTestFailed,
)
from marnet_sdk.images import Buffer, ImageInput, decode
from marnet_sdk.prediction import Prediction, Score

# Two decoders may round a pixel to neighbouring grey levels; more is another image.
_GREY_LEVELS = 1.5


class Classifier:
    """Classifies images with a bundle.

    When the constructor returns, the bundle's bytes have been checked and its golden answers have
    been reproduced on this machine. May be used from several threads at once.

        clf = Classifier("bundles/digits-torchscript-fp16.marnet")
        clf.predict("digit.png").label
    """

    def __init__(
        self, path: str | Path, *, seed: int | None = None, threads: int | None = None
    ) -> None:
        """Open a bundle.

        Args:
            seed: of the noise trajectory; default: the one that the bundle was verified with.
            threads: cores to use; default: the backend's own choice.

        Raises:
            InvalidInput: an argument of the wrong type or range.
            NotFound, BundleError: it is not a sound bundle.
            MissingExtra, BackendUnavailable: its backend cannot run here.
            SelfTestFailed: it does not reproduce its golden answers.
        """
        if threads is not None:
            threads = _positive("threads", threads)
        bundle = read_bundle(path)
        manifest = bundle.manifest
        self.bundle = bundle
        self.labels = manifest.labels
        self.preprocess = manifest.preprocessing
        plan = bundle.file(PLAN)
        self._backend = open_backend(
            manifest.backend, plan.parent, manifest.precision.compute, threads
        )
        self._tables = self._make_tables(manifest.sampling.seed)
        self._self_test()
        if seed is not None and seed != manifest.sampling.seed:
            self._tables = self._make_tables(seed)

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        return (
            f"Classifier({str(self.bundle.path)!r}: {len(self.labels)} classes, "
            f"{manifest.backend} {manifest.precision.asked}, "
            f"{len(manifest.sampling.timesteps)} {manifest.sampling.sampler} steps)"
        )

    @overload
    def predict(
        self, images: ImageInput, *, batch_size: int = ..., top_k: int = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = ...,
        top_k: int = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = ...,
        top_k: int = ...,
        on_error: Literal["return"],
    ) -> list[Prediction | ImageError]: ...
    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 64,
        top_k: int = 5,
        on_error: str = "raise",
    ) -> Prediction | list[Prediction] | list[Prediction | ImageError]:
        """Classify one image, or a list or iterator of them.

        Args:
            images: path, bytes of a file, PIL image, uint8 array [H, W, 3]; or many of these.
            batch_size: images that go through the model together.
            top_k: how many classes `Prediction.top` holds.
            on_error: for many images: "raise" one `InvalidImages` at the end, which holds the
                other answers, or "return" the `ImageError` in the place of the answer.

        Returns:
            A `Prediction`, or a list of them in the order of the images.

        Raises:
            ImageError: the one image is not usable. InvalidImages: some of many are not.
            InvalidInput: a batch_size or top_k that is no integer or below 1.
            InferenceError: the model gives NaN or infinity.
        """
        batch_size, top_k = _positive("batch_size", batch_size), _positive("top_k", top_k)
        if on_error not in ("raise", "return"):
            raise InvalidInput(f'on_error must be "raise" or "return", got {on_error!r}')
        if _is_single(images):
            logits, _ = self._run(self.preprocess.pixels([cast(ImageInput, images)]))
            return self._predictions(logits, top_k)[0]
        answers: list[Prediction | ImageError] = []
        for chunk in _chunks(images, batch_size):
            answers += self._predict_chunk(chunk, len(answers), top_k)
        errors = {i: a for i, a in enumerate(answers) if isinstance(a, ImageError)}
        if on_error == "return":
            return answers
        predictions = [None if isinstance(a, ImageError) else a for a in answers]
        if errors:
            raise InvalidImages(errors, predictions)
        return cast(list[Prediction], predictions)

    def embed(self, images: ImageInput | Iterable[ImageInput], *, batch_size: int = 64) -> Floats:
        """The fused representation that the final classifier sees.

        Returns:
            [D_f] for one image, [B, D_f] for many.

        Raises:
            ImageError: names the first input that is not a usable image.
            InferenceError: the model gives NaN or infinity.
        """
        batch_size = _positive("batch_size", batch_size)
        if _is_single(images):
            return self._run(self.preprocess.pixels([cast(ImageInput, images)]))[1][0]
        parts: list[Floats] = []
        start = 0
        for chunk in _chunks(images, batch_size):
            names = _names(chunk, start)
            parts.append(self._run(self.preprocess.pixels(chunk, names=names), names)[1])
            start += len(chunk)
        return np.concatenate(parts or [np.empty((0, self._feature_width), np.float32)])

    def logits(self, pixels: Floats) -> Floats:
        """Logits of images that are preprocessed already: float32 [B, 3, H, W] -> [B, K].

        Raises:
            InvalidInput: another shape or type.
            InferenceError: the model gives NaN or infinity; names the rows.
        """
        expected = self.preprocess.output_shape
        good = isinstance(pixels, np.ndarray) and pixels.dtype == np.float32
        if not good or pixels.ndim != 4 or pixels.shape[1:] != expected:
            got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else pixels
            raise InvalidInput(
                f"logits() takes preprocessed pixels, float32 [B, {', '.join(map(str, expected))}],"
                f" got {got}; for images use predict(), or preprocess.pixels(images)"
            )
        if not len(pixels):
            return np.empty((0, len(self.labels)), np.float32)
        return self._run(np.ascontiguousarray(pixels))[0]

    def _run(self, pixels: Floats, names: Sequence[str] = ()) -> tuple[Floats, Floats]:
        """Logits and features. `names` are what an error calls the rows."""
        logits, features = self._backend.run(pixels, self._tables)
        if not np.isfinite(logits).all():
            rows = np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist()
            raise InferenceError(_not_finite([names[i] if names else f"row {i}" for i in rows]))
        return logits, features

    def _predict_chunk(
        self, chunk: Sequence[ImageInput], start: int, top_k: int
    ) -> list[Prediction | ImageError]:
        """Answers of one batch; an image that is refused loses no other answer."""
        answers: list[Prediction | ImageError | None] = [None] * len(chunk)
        pixels = np.empty((len(chunk), *self.preprocess.output_shape), np.float32)
        good: list[int] = []
        names = _names(chunk, start)
        for i, (image, name) in enumerate(zip(chunk, names, strict=True)):
            try:
                self.preprocess(decode(image, name=name), out=pixels[len(good)], name=name)
                good.append(i)
            except ImageError as error:
                answers[i] = error
        if good:
            logits, _ = self._run(pixels[: len(good)], [names[i] for i in good])
            for i, prediction in zip(good, self._predictions(logits, top_k), strict=True):
                answers[i] = prediction
        return [a for a in answers if a is not None]

    def _predictions(self, logits: Floats, top_k: int) -> list[Prediction]:
        probabilities = softmax(logits)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        out = []
        for row, best in zip(probabilities, order, strict=True):
            top = tuple(Score(self.labels[k], int(k), float(row[k])) for k in best)
            out.append(Prediction(top[0].label, top[0].index, top[0].score, top))
        return out

    def _make_tables(self, seed: int):
        sampling = self.bundle.manifest.sampling
        return make_tables(
            self.bundle.file(PLAN),
            seed=seed,
            timesteps=sampling.timesteps,
            train_steps=sampling.train_steps,
            width=sampling.width,
        )

    def _self_test(self) -> None:
        """Run the golden images; refuse the bundle if it does not give its golden answers."""
        bundle = self.bundle
        golden = load_file(bundle.file(GOLDEN_ANSWERS))
        names = sorted(
            (name for name in bundle.manifest.files if name.startswith(GOLDEN_IMAGES)),
            key=lambda name: int(Path(name).stem),
        )
        pixels = self.preprocess.pixels([bundle.path / name for name in names])
        expected = (pixels.shape, (len(names), len(self.labels)))
        if (golden["pixels"].shape, golden["logits"].shape) != expected:
            raise BundleFormatError(
                f"{bundle.path}: its golden answers do not fit the labels and the preprocessing of "
                "its manifest; export it again"
            )
        level = _GREY_LEVELS * self.preprocess.rescale_factor / min(self.preprocess.std)
        if (error := float(np.abs(pixels - golden["pixels"]).max())) > level:
            raise SelfTestFailed(
                self._mismatch(f"decoded golden images differ by {error:.3g} (bound {level:.3g})")
            )
        logits, features = self._backend.run(golden["pixels"], self._tables)
        self._feature_width = features.shape[1]
        bound = bundle.manifest.golden_tolerance * float(np.abs(golden["logits"]).max())
        error = float(np.abs(logits - golden["logits"]).max())
        labels_differ = logits.argmax(axis=1) != golden["logits"].argmax(axis=1)
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
        return (
            f"{self.bundle.path} does not reproduce its golden answers on this machine: {what}. "
            f"Built for {built.device} {built.machine}; running on {platform.machine()}; "
            f"versions that differ: {', '.join(different) or 'none'}. Export it again on this "
            f"machine: marnet-export --backend {self.bundle.manifest.backend} "
            f"--precision {self.bundle.manifest.precision.asked}"
        )


def softmax(logits: Floats) -> np.ndarray:
    """Probabilities in float64, [B, K] -> [B, K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _positive(name: str, value: int) -> int:
    """The value as an integer of at least 1; NumPy's integers are integers too."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InvalidInput(
            f"{name} must be an integer, got {value!r} ({type(value).__name__}); pass 1 or more"
        ) from error
    if number < 1:
        raise InvalidInput(f"{name} must be at least 1, got {number}")
    return number


def _not_finite(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"the logits of {shown} hold NaN or infinity; expected finite numbers: check the pixels "
        "for NaN if they were made elsewhere, else export the bundle again with --precision fp32"
    )


def _is_single(images: ImageInput | Iterable[ImageInput]) -> bool:
    """Whether it is one image and not many. What is neither is left for decoding to refuse."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return False  # [B, H, W, 3] is many
    one = isinstance(images, str | os.PathLike | Buffer | Image.Image | np.ndarray)
    # An open file is an iterable too, of lines.
    return one or hasattr(images, "read") or not isinstance(images, Iterable)


def _chunks(images: ImageInput | Iterable[ImageInput], size: int) -> Iterator[list[ImageInput]]:
    iterator = iter(cast(Iterable[ImageInput], images))
    while chunk := list(islice(iterator, size)):
        yield chunk


def _names(chunk: Sequence[ImageInput], start: int) -> list[str]:
    """How errors call the inputs: their position, and their path if they have one."""
    return [
        f"image {start + i} ({os.fsdecode(image)})"
        if isinstance(image, str | os.PathLike)
        else f"image {start + i}"
        for i, image in enumerate(chunk)
    ]

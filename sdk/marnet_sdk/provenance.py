"""Answers that carry what made them, and the same answers derived again.

Sums are rounded by how many images go through a model together, and by the place of a row among
them, but not by what the other images show. So an answer is derived again, to the bit, from its
own image alone, which takes all rows of a batch of that size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from marnet_sdk.arguments import positive
from marnet_sdk.backends import PACKAGES
from marnet_sdk.backends.torch_cpu import keeping_threads
from marnet_sdk.bundle import GOLDEN_ANSWERS, Bundle, read_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.cpus import cpus
from marnet_sdk.environment import processor, versions
from marnet_sdk.errors import DataError, ImageError, InvalidInput, brief
from marnet_sdk.inputs.batches import in_chunks, in_place
from marnet_sdk.inputs.images import Buffer, ImageInput, file_bytes
from marnet_sdk.noise.tables import Floats
from marnet_sdk.prediction import Prediction, Provenance, Score
from marnet_sdk.self_test import golden_key

# What decides about the last bits of an answer beside the bundle, the image and the settings.
_SURROUNDINGS = ("device", "loop", "threads", "processor", "packages")


def predict_with_provenance(
    classifier: Classifier,
    images: Iterable[ImageInput],
    *,
    batch_size: int = 64,
    top_k: int = 5,
    samples: int | None = None,
    stop: str | None = None,
) -> Iterator[Prediction | ImageError]:
    """Classify images as `Classifier.predict` does; each answer has its `provenance`.

    The images are taken from the iterator a batch at a time, and so are the answers given.

    Yields:
        A `Prediction` for each image, or the `ImageError` of one that is not usable.

    Raises:
        InvalidInput: as `predict`, and `stop` with a batch_size other than 1: when the others of a
            batch stop, it becomes smaller, so that an answer could not be derived from its image.
        InferenceError, ClassifierClosed, WrongProcess: as `predict`.
    """
    batch_size = positive("batch_size", batch_size)
    if stop is not None and batch_size != 1:
        raise InvalidInput(
            f"stop: got {brief(stop)} with batches of {batch_size}; answers that carry their "
            "provenance and stop early are derived one by one: pass a batch size of 1, or leave "
            "stop out"
        )
    drawn = classifier.samples if samples is None else positive("samples", samples)
    way: dict[str, Any] = {"top_k": top_k, "samples": drawn, "stop": stop}
    return _batches(classifier, images, batch_size, way)


def _batches(
    classifier: Classifier, images: Iterable[ImageInput], size: int, way: Mapping[str, Any]
) -> Iterator[Prediction | ImageError]:
    common = _common(classifier, way["samples"], way["stop"])
    for chunk, names in in_chunks(images, size):
        pixels = np.empty((len(chunk), *classifier.preprocess.output_shape), np.float32)
        files: list[str | None] = []  # of the usable images
        good: list[str] = []
        errors: dict[int, ImageError] = {}
        for i, (image, name) in enumerate(zip(chunk, names, strict=True)):
            try:
                file = _into(pixels[len(good)], classifier, image, name)
            except ImageError as error:
                errors[i] = error
            else:
                files.append(file)
                good.append(name)
        rows = pixels[: len(good)]
        with keeping_threads():
            found = classifier.predict_pixels(rows, names=good, **way)
        for row, file in enumerate(files):
            made = replace(common, image=file, pixels=_digest(rows[row]), batch=len(rows), row=row)
            found[row] = replace(found[row], provenance=made)
        yield from in_place(found, errors)


def _into(out: Floats, classifier: Classifier, image: ImageInput, name: str) -> str | None:
    """Decode and preprocess one image into `out` [3, H, W]; returns the digest of its file."""
    digest, limits = None, classifier.limits
    if isinstance(image, (str, os.PathLike, Buffer)):
        image = file_bytes(image, name, limits)
        digest = hashlib.sha256(image).hexdigest()
    decoded = classifier.preprocess.decode(image, name=name, limits=limits)
    classifier.preprocess(decoded, out=out, name=name, limits=limits)
    return digest


def _digest(pixels: Floats) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels, "<f4").tobytes()).hexdigest()


def _common(classifier: Classifier, samples: int, stop: str | None) -> Provenance:
    """State what is the same for all answers of a classifier."""
    bundle, runtime = classifier.bundle, classifier.runtime
    manifest = bundle.manifest
    preprocessing = json.dumps(manifest.preprocess, sort_keys=True).encode()
    return Provenance(
        image=None,
        pixels="",
        bundle=bundle.digest,
        preprocessing=hashlib.sha256(preprocessing).hexdigest(),
        backend=manifest.backend,
        precision=manifest.precision.asked,
        compute=manifest.precision.compute,
        device=runtime.device,
        loop=runtime.loop,
        operating_point=classifier.operating_point,
        samples=samples,
        stop=stop,
        seed=classifier.seed,
        threads=runtime.threads,
        batch=1,
        row=0,
        processor=processor(),
        packages=versions(("marnet", "numpy", "pillow", *PACKAGES[manifest.backend])),
        fast_decode=classifier.preprocess.fast_decode,
    )


# --- again


@dataclass(frozen=True)
class Replay:
    """The result of deriving an answer again."""

    differences: tuple[str, ...]  # in which the answers are not equal; none: they are
    surroundings: tuple[str, ...]  # what is not as it was, and may move the last bits
    tolerance: float | None  # of the logarithm of a probability; None: compared to the bit
    answer: Prediction | None  # None where it was not derived again, as something else was given

    @property
    def equal(self) -> bool:
        """Tell whether the answer is the recorded one."""
        return not self.differences


def read_answers(path: Path) -> Iterator[Prediction]:
    """Read answers that carry their provenance, as `marnet-classify --provenance` wrote them: one
    object of JSON, a list of them, or one a line, which are read one by one. Rows of unusable
    images are left out.

    Raises:
        DataError: it is no such file, or an answer has no provenance.
    """
    try:
        for number, row in enumerate(_rows(path), 1):
            if not (isinstance(row, Mapping) and "error" in row):
                yield _read_answer(row, f"{path}: answer {number}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no file of answers ({error}); expected JSON or JSON lines of "
            "marnet-classify --provenance"
        ) from error


def _rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:  # its first line is not all of it
            file.seek(0)
            first = json.load(file)
        yield from first if isinstance(first, list) else [first]
        yield from (json.loads(line) for line in file if line.strip())


def _read_answer(row: Any, name: str) -> Prediction:
    try:
        if row.get("provenance") is None:
            raise DataError(
                f"{name} does not say what made it; answers do that which "
                "marnet-classify --provenance gives"
            )
        given = {f.name: row[f.name] for f in fields(Prediction)}
        made = Provenance(**given["provenance"])
        top = tuple(Score(**score) for score in given["top"])
        _check_types(made, top)
        return Prediction(**{**given, "top": top, "provenance": made})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} is not an answer of this version of marnet ({type(error).__name__}: {error}); "
            "get the file again, or upgrade marnet"
        ) from error


def _check_types(made: Provenance, top: Sequence[Score]) -> None:
    """Refuse values that the replay would not compute with.

    Raises:
        TypeError, ValueError: says which.
    """
    for name in ("samples", "seed", "batch", "row"):
        if type(getattr(made, name)) is not int:
            raise TypeError(f"{name} is {brief(getattr(made, name))}, expected an integer")
    if type(made.fast_decode) is not bool:
        raise TypeError(f"fast_decode is {brief(made.fast_decode)}, expected true or false")
    if not 0 <= made.row < made.batch:
        raise ValueError(f"row {made.row} of a batch of {made.batch}")
    if not top or not all(isinstance(s.score, float) and type(s.index) is int for s in top):
        raise ValueError("its top classes have no index and score each")


def provenance_of(answer: Prediction) -> Provenance:
    """Tell what made an answer.

    Raises:
        InvalidInput: the answer does not carry it.
    """
    if answer.provenance is None:
        raise InvalidInput(
            "this answer does not say what made it; get one from predict_with_provenance, or with "
            "marnet-classify --provenance"
        )
    return answer.provenance


def replay(answer: Prediction, image: ImageInput, bundle: str | Path) -> Replay:
    """Derive an answer again from its image, and compare.

    With the processor, the packages and the number of threads of then, the answers must be equal to
    the bit. Elsewhere the label, the classes' probabilities and the number of samples are compared:
    logits may differ by what the bundle's self-test allows, d, and so the logarithm of a
    probability by 2 d.

    Args:
        answer: with its `provenance`.

    Raises:
        ImageError: the image cannot be used.
        InvalidInput: the answer has no provenance, or asks for what the bundle does not have.
        NotFound, BundleError, MissingExtra, BackendUnavailable, SelfTestFailed: the bundle cannot
            be used here.
    """
    made = provenance_of(answer)
    given = read_bundle(bundle, lazily=True)
    if given.digest != made.bundle:
        return _other(f"the bundle: it was {made.bundle}, {bundle} is {given.digest}")
    known = made.threads is not None and made.threads <= cpus().machine
    with Classifier(
        given.path,
        operating_point=made.operating_point,
        samples=made.samples,
        seed=made.seed,
        threads=made.threads if known else None,
        fast_decode=made.fast_decode,
    ) as classifier:
        pixels = np.empty((1, *classifier.preprocess.output_shape), np.float32)
        file = _into(pixels[0], classifier, image, "the image")
        if made.image is not None and file != made.image:
            return _other(f"the image: its file was {made.image}, this is {file}")
        if _digest(pixels[0]) != made.pixels:
            return _other(
                "what the model sees: the image was decoded or resized otherwise, to "
                f"{made.pixels}, here {_digest(pixels[0])}"
            )
        here = replace(
            _common(classifier, made.samples, made.stop),
            **{name: getattr(made, name) for name in ("image", "pixels", "batch", "row")},
        )
        again = classifier.predict_pixels(
            np.repeat(pixels, made.batch, axis=0), top_k=len(classifier.labels), stop=made.stop
        )[made.row]
    return _compared(answer, again, made, here, given)


def _other(difference: str) -> Replay:
    """The replay of what is something else, which nothing is derived from."""
    return Replay((difference,), (), None, None)


def _compared(
    answer: Prediction, again: Prediction, made: Provenance, here: Provenance, bundle: Bundle
) -> Replay:
    was, now = asdict(made), asdict(here)
    differences = [
        f"{name}: it was {was[name]}, the bundle says {now[name]}"
        for name in was
        if was[name] != now[name] and name not in _SURROUNDINGS
    ]
    surroundings = tuple(
        f"{name}: {was[name]}, here {now[name]}" for name in _SURROUNDINGS if was[name] != now[name]
    )
    tolerance = 2 * _logit_bound(bundle, made.operating_point) if surroundings else None
    short = replace(again, top=again.top[: len(answer.top)], provenance=here)
    if tolerance is None:
        differences += _to_the_bit(answer, short)
    else:
        differences += _within(tolerance, answer, again, stops=made.stop is not None)
    return Replay(tuple(differences), surroundings, tolerance, short)


def _to_the_bit(answer: Prediction, again: Prediction) -> list[str]:
    was, now = (asdict(replace(x, provenance=None)) for x in (answer, again))
    return [f"{name}: {was[name]}, again {now[name]}" for name in was if was[name] != now[name]]


def _within(tolerance: float, answer: Prediction, again: Prediction, *, stops: bool) -> list[str]:
    found = [
        f"{name}: {getattr(answer, name)}, again {getattr(again, name)}"
        for name in ("label", "index", *(() if stops else ("samples",)))
        if getattr(answer, name) != getattr(again, name)
    ]
    scores = {score.index: score.score for score in again.top}
    for one in answer.top:
        now = scores.get(one.index, math.nan)
        if not abs(_log(now) - _log(one.score)) <= tolerance:  # written so that NaN fails too
            found.append(f"score of {one.label!r}: {one.score}, again {now}")
    return found


def _log(probability: float) -> float:
    """The logarithm, that of the least float for 0, which is what small ones are rounded to."""
    return math.log(max(probability, np.finfo(np.float64).tiny)) if probability >= 0 else math.nan


def _logit_bound(bundle: Bundle, operating_point: str) -> float:
    """The largest difference of logits that the self-test allows."""
    golden = load_file(bundle.file(GOLDEN_ANSWERS))
    largest = float(np.abs(golden[golden_key(bundle.manifest, operating_point)]).max())
    return bundle.manifest.golden_tolerance * largest

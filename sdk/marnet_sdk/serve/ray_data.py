"""Classifies the images of a Ray Data set, on as many workers as there are.

`Predictor` is for `Dataset.map_batches`; `write_answers` does the whole job and goes on after an
interruption.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from marnet_sdk.bundle import read_bundle
from marnet_sdk.classifier import Classifier
from marnet_sdk.commands.parts import Parts, open_parts
from marnet_sdk.commands.rows import arrow_table, encodable, make_row
from marnet_sdk.console import say
from marnet_sdk.errors import ImageError, InferenceError, InvalidInput, requires_extra
from marnet_sdk.inputs.images import ImageInput
from marnet_sdk.inputs.listing import image_paths
from marnet_sdk.prediction import Prediction
from marnet_sdk.serve.ray_worker import reserved_threads

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

PATH, BYTES = "path", "bytes"  # the columns of `ray.data.read_binary_files`
_RETRIES = 3  # of a block whose worker died: more often, and the block itself may be what kills it
_NOT_OF_ROWS = ("model", "batch_size", "threads")  # rows do not depend on these


class Written(NamedTuple):
    """The rows of a folder of answers."""

    kept: int  # of earlier runs
    added: int
    failed: int  # of those that were added, with an error


class Predictor:
    """Classifies batches of rows, in a worker of Ray that opens the bundle once.

        images = ray.data.read_binary_files("/data/photos", include_paths=True)
        answers = images.map_batches(
            Predictor,
            fn_constructor_kwargs={"model": "/models/digits-fp16.marnet"},
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
        )

    Every row becomes one row, with the columns of the Parquet files of `marnet-classify`. An image
    that is not usable, or that the model has no number for, is a row with an error.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        image: str = BYTES,
        name: str = PATH,
        top_k: int = 5,
        batch_size: int = 64,
        operating_point: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Open the bundle, which tests itself.

        Args:
            model: its path, as the worker finds it.
            image: the column of the images: bytes of files, or their paths.
            name: the column of what the images are called in `image` of the answers.
            top_k, batch_size: as `Classifier.predict_stream` takes them.
            operating_point, samples, seed: as `Classifier` takes them.
            threads: cores to use; default: as many as Ray reserved CPUs for the worker.

        Raises:
            MarnetError: as `Classifier` raises them.
        """
        self._image, self._name = image, name
        self._way: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size}
        self._classifier = Classifier(
            model,
            operating_point=operating_point,
            samples=samples,
            seed=seed,
            threads=reserved_threads() if threads is None else threads,
        )

    def __call__(self, batch: Mapping[str, Iterable[Any]]) -> pa.Table:
        """Classify the rows of a batch.

        Args:
            batch: columns by name, as `map_batches` passes them with its default format.

        Raises:
            InvalidInput: a column is not there.
        """
        names = list(column_of(batch, "name", self._name))
        answers = self._answers(list(column_of(batch, "image", self._image)))
        return arrow_table(map(make_row, map(str, names), answers))

    def _answers(self, images: list[ImageInput]) -> list[Prediction | ImageError | InferenceError]:
        try:
            return [*self._classifier.predict_stream(images, **self._way)]
        except InferenceError:  # of one of them: the others have answers
            return [self._alone(image) for image in images]

    def _alone(self, image: ImageInput) -> Prediction | ImageError | InferenceError:
        try:
            (answer,) = self._classifier.predict([image], on_error="return", **self._way)
        except InferenceError as error:
            return error
        return answer


class Unanswered:
    """Leaves out the rows of images that have an answer, for `Dataset.map_batches`."""

    def __init__(self, done: Any, name: str) -> None:
        """Take the names that are done.

        Args:
            done: a reference of Ray to an array of them.
            name: the column of the names.
        """
        import ray

        names: Any = ray.get(done)
        self._done, self._name = set(names.to_pylist()), name

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Leave out rows of a batch."""
        names = column_of(batch, "name", self._name).to_pylist()
        return batch.filter([encodable(str(name)) not in self._done for name in names])


def column_of(batch: Any, argument: str, column: str) -> Any:
    """A column of a batch.

    Raises:
        InvalidInput: it is not there.
    """
    try:
        return batch[column]
    except KeyError as error:
        there = batch.column_names if hasattr(batch, "column_names") else batch
        raise _no_column(argument, column, there) from error


def _no_column(argument: str, column: str, there: Iterable[str]) -> InvalidInput:
    return InvalidInput(
        f"{argument}: there is no column {column!r} in the data set, which has {', '.join(there)}"
    )


def find_images(*sources: str | Path) -> Dataset:
    """A data set of the paths of image files, in the column `path`: workers open them.

    Args:
        sources: files, folders and patterns, as `marnet-classify` takes them.

    Raises:
        NotFound: there is no image file.
        MissingExtra: the extra `ray` is not installed.
    """
    with requires_extra("ray", "ray", "pyarrow"):
        import pyarrow as pa
        import ray.data

    found = image_paths([Path(source).absolute() for source in sources], BytesIO())
    return ray.data.from_arrow(pa.table({PATH: [encodable(str(path)) for path in found]}))


def write_answers(
    dataset: Dataset,
    output: str | Path,
    *,
    model: str | Path,
    workers: int = 1,
    cpus: int = 1,
    block: int = 1000,
    resume: bool = False,
    **settings: Any,
) -> Written:
    """Classify the rows of a data set into a folder of Parquet files, on workers of Ray.

    The files are written by this process, each when a block is answered; the folder need not be
    seen by the workers. With `resume`, images that have a row there, also one with an error, are
    not classified again. A worker that dies is replaced, and its block is done again: each image
    has one row.

    Args:
        dataset: with a column of names, which must differ from each other.
        model: the path of a bundle, as this process and every worker find it.
        workers: how many, each with a classifier of its own.
        cpus: of each worker.
        block: rows that are done together: what is lost where something ends in the middle.
        settings: the other arguments of `Predictor`.

    Raises:
        InvalidInput: no such setting, operating point or column; other settings than those of the
            rows that are there.
        OutputExists, OutputBusy, OutputError, DataError: as `open_parts`.
        NotFound, BundleError: it is no sound bundle.
        MissingExtra: the extra `ray` is not installed.
    """
    with requires_extra("ray", "ray", "pyarrow"):
        import ray
        from ray.data import ActorPoolStrategy

    settings = _checked(settings | {"model": str(Path(model).absolute())})
    there = dataset.columns(fetch_if_missing=False)  # None: known when the first block is there
    for argument in ("image", "name"):
        if there is not None and settings[argument] not in there:
            raise _no_column(argument, settings[argument], there)
    with open_parts(Path(output).absolute(), _made_by(settings), resume=resume) as parts:
        done = parts.names()
        if len(done):
            say(f"{len(done):,} rows of earlier runs are kept")
            dataset = dataset.map_batches(
                Unanswered,
                fn_constructor_args=(ray.put(done), settings["name"]),
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=1),
            )
        answers = dataset.repartition(target_num_rows_per_block=block).map_batches(
            Predictor,
            fn_constructor_kwargs=settings,
            compute=ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            max_task_retries=_RETRIES,
        )
        return _write(answers, parts, len(done))


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a `Predictor`."""
    try:
        bound = inspect.signature(Predictor).bind(**settings)
    except TypeError as error:
        raise InvalidInput(f"{error}; the settings are the arguments of Predictor") from error
    bound.apply_defaults()
    return bound.arguments


def _made_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the rows depend on, beside the images."""
    bundle = read_bundle(settings["model"], lazily=True)
    if settings["operating_point"] is not None:
        bundle.check_point(settings["operating_point"])
    kept = {name: value for name, value in settings.items() if name not in _NOT_OF_ROWS}
    return {"bundle": bundle.digest, **kept}


def _write(answers: Dataset, parts: Parts, kept: int) -> Written:
    added = failed = 0
    tables: Iterable[Any] = answers.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        if table.num_rows:
            parts.write(table)
            added += table.num_rows
            failed += table.num_rows - table["error"].null_count
    return Written(kept, added, failed)

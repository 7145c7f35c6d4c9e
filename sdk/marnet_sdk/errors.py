"""Every error that a user of marnet meets. All derive from `MarnetError`, warnings from
`MarnetWarning`.

A message says what was got, what was expected and what to do next. `exit_code` is what the
command line ends with: 1 other error, 2 usage, 3 verification failed, 4 measurement unstable,
5 environment mismatch, 6 regression against a baseline.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from marnet_sdk.prediction import Prediction


class MarnetError(Exception):
    """Base of every error raised on purpose by marnet.

    Copies and pickles keep its type, message and fields, so it arrives whole from another process.
    """

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[MarnetError], args: tuple[Any, ...], fields: dict[str, Any]) -> MarnetError:
    """An error as it was. Its constructor, whose arguments are not the message, is not called."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class MarnetWarning(RuntimeWarning):
    """Something that works, but worse than its user may think; said once, where it happens."""


class ImageError(MarnetError):
    """One input that is not a usable image. `source` names it: a path, or "image 3"."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class ImageTooLarge(ImageError):
    """More bytes or pixels than the limits allow; refused before decoding."""


class InvalidImages(MarnetError):
    """Some inputs of a list were refused; the answers to all the others are kept here.

    errors: index of the input -> its `ImageError`.
    predictions: one entry per input, in order; None where the input was refused.
    """

    def __init__(
        self,
        errors: Mapping[int, ImageError],
        predictions: Sequence[Prediction | None],
    ) -> None:
        first = "; ".join(str(error) for error in list(errors.values())[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        super().__init__(
            f"{len(errors)} of {len(predictions)} inputs are not usable images: {first}{more}. "
            'The other answers are in `.predictions`; predict(..., on_error="return") '
            "puts the errors in the list instead of raising"
        )
        self.errors = dict(errors)
        self.predictions = list(predictions)


class InvalidInput(MarnetError):
    """An argument of the wrong type, shape or range."""

    exit_code = 2


class OutputExists(MarnetError):
    """The place to write to is taken."""

    exit_code = 2


class OutputBusy(MarnetError):
    """Another process is writing to the same place."""


class OutputError(MarnetError):
    """The place to write to has no space left, or must not be written to."""


class NotFound(MarnetError):
    """A bundle, checkpoint or data set is not where it was looked for."""

    exit_code = 2


class DataError(MarnetError):
    """A data set that cannot be read as it stands; names file and line.

    lines: of several problems, one each.
    """

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *lines]))
        self.lines = tuple(lines)


class RecipeError(MarnetError):
    """A training recipe with an unknown, missing or impossible setting."""

    exit_code = 2


class CheckpointError(MarnetError):
    """A checkpoint that is incomplete, damaged or of another method."""


class ExportError(MarnetError):
    """A bundle that cannot be built as asked."""


class BundleError(MarnetError):
    """A bundle that must not be used."""


class BundleCorrupt(BundleError):
    """A file is missing, or its bytes are not the ones that were written."""


class BundleFormatError(BundleError):
    """A manifest of a newer format, or without something that inference needs."""


class SelfTestFailed(BundleError):
    """The bundle does not reproduce its own golden answers on this machine."""

    exit_code = 5


class InferenceError(MarnetError):
    """The model gave something that is no answer, for example NaN."""


class ClassifierClosed(MarnetError):
    """A classifier that is used after its `close()`, or after its `with` block."""


class WrongProcess(MarnetError):
    """A classifier in a process that it was not opened in, where its threads do not exist."""


class QueueFull(MarnetError):
    """More requests wait than the queue of a classifier takes; nothing was begun for this one.

    waiting: requests in the queue.
    retry_after: seconds until all of them should be answered; None: not known yet.
    """

    def __init__(self, message: str, *, waiting: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.waiting = waiting
        self.retry_after = retry_after


class DeadlineExceeded(MarnetError):
    """A request that cannot be answered before its deadline, or was not; the model did not run.

    deadline: seconds from the request to its deadline.
    expected: seconds that its answer was expected to take; None: it waited until the deadline.
    """

    def __init__(
        self, message: str, *, deadline: float = 0.0, expected: float | None = None
    ) -> None:
        super().__init__(message)
        self.deadline = deadline
        self.expected = expected


class ServerFailed(MarnetError):
    """A server whose processes end again and again."""


class EnvironmentMismatch(MarnetError):
    """The machine or its packages lack what is asked for."""

    exit_code = 5


class MissingExtra(EnvironmentMismatch):
    """An optional package is not installed; the message holds the pip line."""


class BackendUnavailable(EnvironmentMismatch):
    """The bundle's backend cannot run here."""


class NativeLoopMissing(MarnetWarning):
    """A bundle runs its loop as a graph, because the native loop's library is not here."""


class VerificationFailed(MarnetError):
    """The built bundle does not agree with the float32 checkpoint; no bundle was written."""

    exit_code = 3


class UnstableMeasurement(MarnetError):
    """Timings that vary more than was allowed."""

    exit_code = 4


class Regression(MarnetError):
    """A measurement that is slower than its baseline by more than was allowed."""

    exit_code = 6


@contextmanager
def requires_extra(extra: str, *modules: str) -> Iterator[None]:
    """Turn the absence of one of `modules` inside the block into the pip line that installs it.

    Any other missing module is somebody's bug and passes through unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in modules:
            raise
        raise MissingExtra(
            f'the package "{error.name}" is not installed; run: pip install "marnet[{extra}]"'
        ) from error


def one_line(error: BaseException) -> str:
    """An error of another library in one line of up to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript puts a traceback of its own before what happened.
    scripted = lines and lines[0].startswith("The following operation failed in the TorchScript")
    said = lines[-1] if scripted else " ".join(lines)
    return said[:300] or type(error).__name__


def brief(value: object) -> str:
    """A value as messages repeat it: what was passed for it may be a whole file's text."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def nearest(word: str, choices: Sequence[str]) -> str:
    """Ask " Did you mean 'x'?" for the closest of `choices`, or nothing if none is close."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""

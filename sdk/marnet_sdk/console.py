"""The parts that the command lines share: errors to exit codes, nearest matches, progress, tables.

Answers go to standard output; everything about the work goes to standard error, and progress bars
appear only on a terminal. Names and labels may hold anything: people see control characters, and
what the encoding of the output lacks, as escapes like \\n and \\xfc.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from marnet_sdk.errors import MarnetError, nearest

T = TypeVar("T")
_WIDE = 1_000_000  # columns of what is no terminal: nothing is folded there
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}
_unsaid: list[OSError] = []  # why messages of the command that runs could not be written
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROLS}


class CommandError(click.ClickException):
    """A `MarnetError` on its way out of a command."""

    def __init__(self, error: MarnetError) -> None:
        lines = getattr(error, "lines", ())
        head = str(error).removesuffix("".join(f"\n  {line}" for line in lines))
        super().__init__("\n  ".join(printable(text, sys.stderr) for text in (head, *lines)))
        self.exit_code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]


class Command(click.Command):
    """A command whose `MarnetError`s become one line and the right exit code.

    SIGTERM ends it as Ctrl-C does, so that half-written output is removed. Output that cannot be
    written, to a full disk or a closed pipe, ends it with an exit code that is not 0.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        with _checked_streams():
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            shown = printable(error.message, sys.stderr)
            error.message = shown  # pyright: ignore[reportAttributeAccessIssue]
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _exit_on_sigterm():
                return super().invoke(ctx)
        except MarnetError as error:
            raise CommandError(error) from error


@contextmanager
def _checked_streams() -> Iterator[None]:
    """End with an exit code that is not 0 where what was printed could not be written."""
    streams = _open_streams()
    _unsaid.clear()
    code: Any = 0
    ended = False
    problems: list[OSError] = []
    try:
        yield
    except SystemExit as error:
        code, ended = error.code, True
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        problems.append(error)
    problems += _unsaid
    for stream in streams:
        if problem := _unwritten(stream):
            _abandon(stream)
            problems.append(problem)
    for problem in problems[:1]:
        code, ended = code or 1, True
        if problem.errno != errno.EPIPE:  # who closed a pipe has read enough
            _last_words(f"the output cannot be written: {problem.strerror}; send it elsewhere")
    if ended:
        raise SystemExit(code)


def _open_streams() -> tuple[TextIO, TextIO]:
    """Standard error and output, which write what their encoding lacks as escapes.

    The number of a closed one would be given to the next file, and other libraries print there.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115, open until the process ends
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        _last_words("standard output is closed; send it to /dev/null if nobody is to read it")
        raise SystemExit(1)
    for stream in (sys.stderr, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    return sys.stderr, sys.stdout


def _unwritten(stream: TextIO) -> OSError | None:
    """Tell why what was printed there cannot be written."""
    try:
        stream.flush()
    except OSError as error:
        return error
    return None


def _abandon(stream: TextIO) -> None:
    """Let what is left, which Python tries to write at the end, go nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _last_words(text: str) -> None:
    with suppress(OSError):
        _print(f"Error: {text}", sys.stderr)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit where the process would die, unless the host handles the signal itself."""
    in_main = threading.current_thread() is threading.main_thread()  # only there it may be set
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)  # 143 for SIGTERM, as shells report it


class Group(Command, click.Group):
    """A group of such commands, which suggests the nearest name for a wrong one."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = nearest(args[0], self.list_commands(ctx))
            ctx.fail(f"No such command {args[0]!r}.{near}")
        return super().resolve_command(ctx, args)


class Choice(click.Choice[str]):
    """A choice that suggests the nearest of its values for a wrong one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = nearest(str(value), [str(choice) for choice in self.choices])
            raise click.BadParameter(error.message + near, ctx=ctx, param=param) from error


FAST_DECODE = click.option(
    "--fast-decode",
    is_flag=True,
    help="Decode JPEG files at a smaller scale where they stay twice as large as what the model "
    "takes: faster, and a little different.",
)


def printable(text: str, stream: TextIO | None = None) -> str:
    """The text as a person may see it: no control character moves the cursor or starts a line, and
    what the stream's encoding lacks is an escape. The same text where there is nothing of that."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.translate(_ESCAPES).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Print one line about the work on standard error.

    Where it cannot be written, the work goes on; the command ends with an exit code that tells.
    """
    try:
        _print(printable(text, sys.stderr), sys.stderr)
    except OSError as error:
        _unsaid.append(error)


def answer(text: str) -> None:
    """Print one line on standard output."""
    _print(printable(text, sys.stdout))


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print a line as it is: click's own `echo` writes UTF-8 where ASCII is asked for."""
    print(text, file=stream, flush=True)


def next_commands(*lines: str) -> None:
    """Print what to run next, at the end of a command."""
    say("")
    say("Next:")
    for line in lines:
        say(f"  {line}")


def has_progress() -> bool:
    """Tell whether `track` shows a bar, which needs a terminal."""
    return Console(stderr=True).is_terminal


class _RateColumn(ProgressColumn):
    """The number of things that were done in a second, since the start."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        if not (task.completed and task.elapsed):
            return Text("")
        return Text(f"{task.completed / task.elapsed:,.1f} {self._unit}/s")


def track(
    items: Iterable[T], description: str, total: int | None = None, unit: str | None = None
) -> Iterable[T]:
    """Iterate with a progress bar on a terminal, silently elsewhere.

    Args:
        total: how many there are, where `items` does not tell; None: the time left is not shown.
        unit: what they are, to show how many of them are done in a second.
    """
    messages = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(() if unit is None else (_RateColumn(unit),)),
        TimeRemainingColumn(),
    )
    bar = Progress(
        *columns,
        console=messages,
        disable=not messages.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # answers in a pipe stay there
    )
    with bar:
        yield from bar.track(items, total=total, description=printable(description, sys.stderr))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; every column after the first is right-aligned."""
    console = Console()
    if not console.is_terminal:  # piped output keeps its natural width
        console = Console(width=_WIDE)

    def cell(text: str, style: str = "") -> Text:  # rich looks for markup and emoji in a str
        return Text(printable(text, sys.stdout), style)

    table = Table(title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title = cell(title, "table.title") if title else None
    for i, column in enumerate(columns):
        table.add_column(cell(column), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    with console.capture() as drawn:
        console.print(table)
    _print(drawn.get().removesuffix("\n"))


def print_json(content: Any) -> None:
    """JSON on standard output, in ASCII."""
    _print(json.dumps(content, indent=2))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines for programs on standard output, as they are and as they come."""
    for line in lines:
        _print(line)


def csv_line(row: Sequence[Any]) -> str:
    """A line of CSV, without its end, which a reader of CSV reads as it was."""
    line = io.StringIO()  # only the characters of the line's end are quoted, and \r is none
    csv.writer(line, lineterminator="\r\n").writerow(row)
    return line.getvalue().removesuffix("\r\n")

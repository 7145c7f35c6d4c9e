"""What the command lines share: typed errors to exit codes, nearest matches, progress, tables.

Answers go to standard output; everything about the work goes to standard error, and progress bars
appear only on a terminal.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from marnet_sdk.errors import MarnetError, nearest

T = TypeVar("T")
messages = Console(stderr=True, highlight=False, soft_wrap=True)


class CommandError(click.ClickException):
    """A `MarnetError` on its way out of a command."""

    def __init__(self, error: MarnetError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]


class Command(click.Command):
    """A command whose `MarnetError`s become one line and the right exit code.

    SIGTERM ends it as Ctrl-C does, so that half-written output is removed.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _exit_on_sigterm():
                return super().invoke(ctx)
        except MarnetError as error:
            raise CommandError(error) from error


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


class Group(click.Group):
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


def say(text: str) -> None:
    """One line about the work, on standard error."""
    messages.print(text, markup=False)


def next_commands(*lines: str) -> None:
    """What to run next, at the end of a command."""
    say("\nNext:")
    for line in lines:
        say(f"  {line}")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar on a terminal, silently elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=messages, disable=not messages.is_terminal, transient=True)
    with bar:
        yield from bar.track(items, total=total, description=description)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; every column after the first is right-aligned."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # piped output keeps its natural width
        console = Console(highlight=False, markup=False, width=240)
    console.print(table)


def print_json(content: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(content, indent=2))

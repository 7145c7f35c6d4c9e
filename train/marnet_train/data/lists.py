"""This module holds what the readers of published data sets share: lists of pictures and of names
in text files.

A folder that somebody got from the authors of a data set may be incomplete or damaged, so
everything is checked and all faults are told at once, with file and line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import whitespace

from marnet_train.data.examples import Example, Problems, check_classes, check_regular
from marnet_train.data.image_names import name_fault, quoted

UNKNOWN = "unknown"  # the text of a picture without any ingredient

Splits = dict[str, list[Example]]


@dataclass(frozen=True)
class Lists:
    """This reads text files of a copy; what is wrong with them goes to `problems`."""

    problems: Problems
    restore: str  # what to do about a file that is missing or damaged, for messages

    def every_line(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield ("FILE:LINE", text) of every line, blank ones too."""
        try:
            check_regular(path)
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    origin = f"{path}:{number}"
                    try:
                        yield origin, line.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        value = f"0x{error.object[error.start]:02x}"
                        self.problems.add(f"{origin}: not UTF-8 (byte {value}); save it as UTF-8")
        except FileNotFoundError:
            self.problems.add(f"{path}: missing; {self.restore}")
        except OSError as error:
            self.problems.add(f"{path}: cannot be read ({error.strerror}); {self.restore}")

    def lines(self, path: Path, like: str) -> list[tuple[str, str]]:
        """Read ("FILE:LINE", text) of every line that is not blank.

        Args:
            like: a line as it should be, for the message about a file without any.
        """
        before = self.problems.count
        lines = [(origin, text) for origin, text in self.every_line(path) if text.strip()]
        if not lines and self.problems.count == before:
            self.problems.add(f"{path}: no lines, expected some like {like!r}; {self.restore}")
        return lines

    def names(self, path: Path, count: int, kind: str, *, blank: bool = False) -> list[str]:
        """Read a name from each line; blanks and semicolons around it are taken off.

        Args:
            count: how many lines there must be; blank ones after them are ignored.
            kind: what they name, for messages: "dish".
            blank: a line may hold no name.

        Returns:
            The names in order, or none if something is wrong.
        """
        before = self.problems.count
        lines = [(origin, text.strip(f"{whitespace};")) for origin, text in self.every_line(path)]
        while len(lines) > count and not lines[-1][1]:
            lines.pop()
        if self.problems.count == before and len(lines) != count:
            self.problems.add(
                f"{path}: {len(lines)} lines, expected {count}, one for each {kind}; {self.restore}"
            )
        elif not blank:
            for origin in (origin for origin, name in lines if not name):
                told = f"{origin}: blank, expected one {kind} on each line"
                self.problems.add(f"{told}; {self.restore}")
        return [name for _, name in lines] if self.problems.count == before else []

    def path_fault(self, root: Path, path: str) -> str | None:
        """Say what is wrong with a path that anybody may have written; None: a file in `root`.

        Symbolic links are followed.
        """
        base = os.path.realpath(root)
        target = None if name_fault(path) else Path(os.path.realpath(os.path.join(base, path)))
        if target is None or not target.is_relative_to(base):
            where = f"leads out of {root} or is no plain path"
            return f"{quoted(path)} {where}; keep it below that folder"
        try:
            present = target.is_file()
        except OSError:  # a name that is too long
            present = False
        return None if present else f"no file {quoted(path)} in {root}; {self.restore}"


@dataclass(frozen=True)
class Pictures:
    """These are the pictures in all lists of a copy: each is a file in `root` and listed once."""

    root: Path
    lists: Lists
    seen: dict[str, str] = field(default_factory=dict)  # `flat` path -> line on which it was

    def check(self, path: str, origin: str) -> None:
        """Tell what is wrong with a picture that is listed at `origin`."""
        first = self.seen.setdefault(flat(path), origin)
        fault = self.lists.path_fault(self.root, path)
        if first != origin:
            fault = f"{quoted(path)} was already on {first}; keep one of them"
        if fault and self.root.is_dir():  # that it is missing is told once
            self.lists.problems.add(f"{origin}: {fault}")


def checked(splits: Splits, problems: Problems, where: Path) -> Splits:
    """Return splits that have no problems.

    Raises:
        DataError: all that is wrong in the folder `where`, each with file and line.
    """
    check_classes(splits, problems)
    problems.raise_if_any(where)
    return splits


def flat(path: str) -> str:
    """Write a path as one file name, which keeps where the picture comes from."""
    return path.replace("/", "__")


def is_number(text: str) -> bool:
    """Tell whether a text is a whole number from 0, and not endless."""
    return re.fullmatch("[0-9]{1,9}", text) is not None

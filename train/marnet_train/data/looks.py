"""Names that look alike and are not."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def look(name: str) -> str:
    """Return the same for names that a reader would take for each other.

    They differ in case, in blanks of any kind, in characters without width, or in how letters are
    composed (Unicode's NFKC and case folding, applied until nothing changes).
    """
    while True:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold())
        visible = "".join(" " if c.isspace() else c for c in folded if not _has_no_width(c))
        shown = " ".join(visible.split())
        if shown == name:
            return name
        name = shown


def _has_no_width(character: str) -> bool:
    """Tell whether it is a format or control character that is no blank, or selects a variant."""
    hidden = unicodedata.category(character) in ("Cf", "Cc") and not character.isspace()
    return hidden or "\ufe00" <= character <= "\ufe0f"


class Looks:
    """These are names by their look."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {look(name): name for name in names}

    def like(self, name: str) -> str | None:
        """Find a name that looks like `name`, perhaps itself."""
        return self._names.get(look(name))

    def hint(self, name: str) -> str:
        """Name the one that looks like `name`, which is none of them; nothing if there is none."""
        return spelt_otherwise(self.like(name))


def spelt_otherwise(name: str | None) -> str:
    """Write the part of a message that names what may be meant.

    It is in ASCII, so that all of it is seen.
    """
    if name is None:
        return ""
    return f"; there is {name!a}, which differs in case, blanks or how letters are composed"

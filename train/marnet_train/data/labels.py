"""This module tells what is odd about the labels of a data set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from marnet_train.data.examples import Example
from marnet_train.data.looks import look

_MISSING = {"", "nan", "none", "null", "nil", "n/a", "na", "#n/a", "<na>", "nat", "undefined"}
_NAMED = 3  # lines of a label that a warning names


def label_warnings(splits: Mapping[str, Sequence[Example]]) -> Iterator[str]:
    """Say what is odd about labels, with their lines."""
    examples = [example for found in splits.values() for example in found]
    padded, labels = defaultdict(list), defaultdict(list)
    for example in examples:
        labels[example.label].append(example)
        if example.written not in ("", example.label):
            padded[example.written].append(example)
    for written, found in padded.items():
        yield f"label {_where(written, found)} is read as {written.strip()!a}, without blanks"
    looks = defaultdict(list)
    for label in labels:
        looks[look(label)].append(label)
    for twins in looks.values():
        if len(twins) > 1:
            named = " and ".join(_where(twin, labels[twin]) for twin in sorted(twins))
            yield f"labels {named} look alike; if they are one class, spell them the same"
    for key in sorted(_MISSING & looks.keys()):
        for label in looks[key]:
            yield (
                f"label {_where(label, labels[label])} looks like a value that is missing; correct "
                "it unless a class is called so"
            )


def _where(label: str, examples: Sequence[Example]) -> str:
    """Name a label with its lines. It is in ASCII, so that what cannot be seen can be read."""
    shown = ascii(label[:200])
    lines = ", ".join(example.origin or str(example.image) for example in examples[:_NAMED])
    more = f" and {len(examples) - _NAMED} more" if len(examples) > _NAMED else ""
    return f"{shown} ({lines}{more})"

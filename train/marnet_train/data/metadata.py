"""One line of metadata: parsed from bytes that anybody may have written, and judged.

Nothing here raises on bad input: what is wrong with a line is returned as a sentence that says
what was got, what was expected and what to do, and the caller adds file and line.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from typing import Any

from marnet_train.data.image_names import is_encodable, quoted

METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
LINE_EXAMPLE = '{"file_name": "0001.png", "text": "what the image shows", "label": "cat"}'


def parse_line(line: bytes) -> dict[str, Any] | str:
    """Return the JSON object on the line, or say what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        value = line[error.start]
        return f"not UTF-8 (byte {error.start + 1} of the line is 0x{value:02x}); save it as UTF-8"
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        return f"not JSON ({error}); expected one object per line, like {LINE_EXAMPLE}"
    if not isinstance(record, dict):
        return f"got {reprlib.repr(record)}, expected an object like {LINE_EXAMPLE}"
    return record


def line_faults(
    record: dict[str, Any],
    *,
    needs_text: bool,
    first: dict[str, int],
    name_check: Callable[[str], str | None],
) -> list[str]:
    """List what is wrong with a line: at most one fault for each of its three fields."""
    faults = (
        _name_fault(record.get("file_name"), first, name_check),
        field_fault(record.get("text"), "text", needed=needs_text),
        _label_fault(record.get("label")),
    )
    return [fault for fault in faults if fault]


def _name_fault(
    name: Any, first: dict[str, int], name_check: Callable[[str], str | None]
) -> str | None:
    """Say what is wrong with a name; `first` maps every name seen so far to its line."""
    if fault := field_fault(name, "file_name"):
        return fault
    if name in (METADATA, METADATA_CSV):
        return f'"file_name" is {name} itself, expected an image; correct it'
    if name in first:
        where = f"line {first[name]}"
        return (
            f'"file_name" {quoted(name)} was already on {where}, and an image has one label; keep '
            "one of them"
        )
    return name_check(name)


def _label_fault(label: object) -> str | None:
    """Say what is wrong with a label; several of them are named as such."""
    if isinstance(label, list):
        return (
            f'"label" is {reprlib.repr(label)}, expected one string, because an image with several '
            "labels is not supported; keep one"
        )
    return field_fault(label, "label")


def field_fault(value: object, key: str, *, needed: bool = True) -> str | None:
    """Say what is wrong with one field, which must be text, or None if it is not needed."""
    if value is None:
        return f'no "{key}", expected a string; add it' if needed else None
    if not isinstance(value, str):
        return f'"{key}" is {reprlib.repr(value)}, expected a string; put it in quotes'
    if not value.strip():
        way_out = "fill it in" if needed else "fill it in, or leave the key out"
        return f'"{key}" is empty, expected some text; {way_out}'
    if not is_encodable(value):
        return f'"{key}" holds half a surrogate pair, expected Unicode text; remove it'
    return None

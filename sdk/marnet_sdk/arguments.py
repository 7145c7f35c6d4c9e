"""Arguments of calls, checked."""

from __future__ import annotations

import operator

from marnet_sdk.errors import InvalidInput, brief


def positive(name: str, value: int) -> int:
    """The value as an integer of at least 1; NumPy's integers are integers too.

    Raises:
        InvalidInput: no integer, or below 1.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InvalidInput(
            f"{name} must be an integer, got {brief(value)} ({type(value).__name__}); pass 1 or "
            "more"
        ) from error
    if number < 1:
        raise InvalidInput(f"{name} must be at least 1, got {number}")
    return number

"""Arguments of calls, checked."""

from __future__ import annotations

import math
import operator
from numbers import Real

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


def seconds(name: str, value: float, least: float = -math.inf) -> float:
    """The value as a finite number of seconds, of at least `least`.

    Raises:
        InvalidInput: no number, not finite, or below.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidInput(
            f"{name} must be a finite number of seconds, got {brief(value)} "
            f"({type(value).__name__})"
        )
    if value < least:
        raise InvalidInput(f"{name} must be at least {least:g} seconds, got {value:g}")
    return float(value)


def integer(name: str, value: int) -> int:
    """The value as an integer, of any sign.

    Raises:
        InvalidInput: no integer.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise InvalidInput(
            f"{name} must be an integer, got {brief(value)} ({type(value).__name__})"
        ) from error

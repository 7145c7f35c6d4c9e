"""Which cases of a parametrised test are in the quick suite, which is what `make test` runs."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def kept(cases: Iterable[Any], quick: Container[Any], *, many: bool = False) -> list[Any]:
    """For `parametrize`: all cases, those that are not in `quick` marked slow.

    many: each case is a tuple of values for several names.
    """
    return [
        pytest.param(
            *(case if many else (case,)), marks=() if case in quick else (pytest.mark.slow,)
        )
        for case in cases
    ]

"""The fixtures that the tests of exports share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from exports import in_one_process


@pytest.fixture(autouse=True, scope="module")
def _in_one_process() -> Iterator[None]:
    with in_one_process():
        yield

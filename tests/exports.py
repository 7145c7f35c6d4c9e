"""How an export ends in most tests: without opening the bundle in a second process.

That takes seconds. `in_two_processes` is for a test of just that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from marnet_export import seal

_CHECK = seal._check_in_second_process


@contextmanager
def in_one_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "_check_in_second_process", lambda *_: None)
        yield


@contextmanager
def in_two_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "_check_in_second_process", _CHECK)
        yield

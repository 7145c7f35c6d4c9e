"""The compiler of C++ that some tests need: aotinductor and torch.compile call it."""

from __future__ import annotations

import os
import shutil

import pytest


def need_compiler() -> None:
    """Skip a test where there is none."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"needs a compiler of C++, and {name} is not installed")

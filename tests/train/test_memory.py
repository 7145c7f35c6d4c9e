"""Freed memory stays with the process where the C library is glibc; others are left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from marnet_train.memory import keep_freed_memory

PROGRAM = """
import resource
import torch
from marnet_train.memory import keep_freed_memory

def page_faults():
    for _ in range(16):  # 64 MiB each; the first few are put beside each other
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
assert keep_freed_memory()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_that_is_freed_is_used_again_without_a_page_fault() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    as_it_is, kept = map(int, done.stdout.split())
    assert kept < 100 < as_it_is


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert not keep_freed_memory()

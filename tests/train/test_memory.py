"""Freed memory stays with the process where the C library is glibc; others are left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from marnet_train.memory import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
from marnet_train.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(16):  # 64 MiB each; the first few are put beside each other
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kept],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_that_is_freed_is_used_again_without_a_page_fault() -> None:
    assert page_faults("kept") < 100 < page_faults("as it is")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert not keep_freed_memory()

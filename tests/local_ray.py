"""A Ray of one machine for a test: in processes of its own, of which none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

MARK = "MARNET_TEST_RAY"  # in the environment of all processes of one run
_PROGRAMS = Path(__file__).with_name("ray_programs.py")
_SECONDS = 900.0  # until a run is given up; none takes so long
_END = 30.0  # seconds that its processes have to end


def run_with_ray(program: str, *arguments: str | Path, cwd: Path) -> dict[str, Any]:
    """Run a program of `ray_programs.py`; what it found."""
    found = cwd / f"{program}.json"
    run_python(_PROGRAMS, program, found, *arguments, cwd=cwd)
    return json.loads(found.read_text("utf-8"))


def run_python(*words: str | Path, cwd: Path) -> str:
    """Run Python, which starts Ray and ends it; what it printed.

    No usage statistics are sent. The test is skipped without Ray.
    """
    if find_spec("ray") is None:
        pytest.skip('ray is not installed; run: pip install "marnet[ray]"')
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # names of sockets
        more = {MARK: mark, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": short}
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=cwd, env=os.environ | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=_SECONDS)
        finally:
            left = still_running(mark)
    assert process.returncode == 0, said[-5000:]
    assert left == []
    return said


def processes(mark: str) -> Iterator[psutil.Process]:
    """The processes of a run."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                yield process
        except psutil.Error:
            pass


def still_running(mark: str) -> list[str]:
    """The processes of a run that do not end by themselves; they are killed."""
    _, left = psutil.wait_procs(list(processes(mark)), timeout=_END)
    names = [str(process) for process in left]
    for process in left:
        process.send_signal(signal.SIGKILL)
    return names

"""The blocks of the README: run them, and write what the main job prints back into the page.

`make readme` runs this file. `test_readme.py` runs the same blocks and compares what they print.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"(<!-- written by make readme -->\n```text\n)(.*?)(^```)", re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """(bash or python, text) of every block that is meant to be run, in order."""
    return _BLOCK.findall(README.read_text("utf-8"))


def run(kind: str, text: str, folder: Path) -> str:
    """Run a block in `folder`; returns its standard output.

    Raises:
        AssertionError: it failed; the message holds what it wrote.
    """
    return _run(kind, text, folder).stdout


def run_each(text: str, folder: Path) -> str:
    """Run a block of commands one by one; returns a transcript, without the hints at their ends."""
    transcript = []
    for line in text.splitlines():
        done = _run("bash", line, folder)
        work = done.stderr.partition("\nNext:")[0]
        transcript.append(f"$ {line}\n{work}{done.stdout}")
    return "\n".join(transcript)


def _run(kind: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", text]
    if kind == "python":
        command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done


def written_output() -> str:
    """What the page says that the main job prints."""
    found = _OUTPUT.search(README.read_text("utf-8"))
    assert found, "the README has no block that make readme writes"
    return found[2]


def words(output: str) -> list[str]:
    """The words of an output, without figures and frames: what does not change from run to run.

    Which backend is the fastest may change, and with it what is said of its arithmetic.
    """
    steady = re.sub(r"(?m)^unsteady: .*$", "", output)
    steady = re.sub(r"onnxruntime|openvino|torchscript|aotinductor", "BACKEND", steady)
    return re.findall(r"[A-Za-z_]{2,}", re.sub(r"[0-9.,]+", " ", steady))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        transcript = run_each(blocks()[0][1], Path(folder))
    lines = (line.rstrip() for line in transcript.splitlines())
    text = re.sub("\n{2,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
    page = _OUTPUT.sub(lambda m: m[1] + text + m[3], README.read_text("utf-8"))
    README.write_text(page, "utf-8")


if __name__ == "__main__":
    main()

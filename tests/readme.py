"""The blocks of the README and the walkthrough: run them, and write what the main job prints.

`make readme` runs this file, which writes into the walkthrough. `test_readme.py` runs the same
blocks and compares what they print.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from marnet_sdk.backends import BACKENDS

ROOT = Path(__file__).parent.parent
README, WALKTHROUGH = ROOT / "README.md", ROOT / "docs/walkthrough.md"
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"(<!-- written by make readme -->\n```text\n)(.*?)(^```)", re.M | re.S)
_BACKEND = "|".join(BACKENDS)
_OF_THE_MACHINE = [
    (re.compile(pattern, re.MULTILINE), instead)
    for pattern, instead in [
        (r"^unsteady: .*\n", ""),
        (rf"^({_BACKEND}): (unavailable|refused): .*\n", ""),
        # The title of a table is as wide as the table: a long name breaks it into lines.
        (r"(\d+\s+steps),(?s:.*?),\s+\d+\s+threads", r"\1, PROCESSOR, threads"),
        (r"^reverse loop: .*", "LOOP"),
        (r"^python \d.*; load", "VERSIONS; load"),
        (r"[\d.]+ times the speed of plain PyTorch", "COMPARED"),
        (r"no difference from plain PyTorch can be told", "COMPARED"),
        (r"so (it is shown to (help|harm)|no difference is shown)", "VERDICT"),
        (_BACKEND, "BACKEND"),
        (r"[0-9.,]+(e[-+][0-9]+)?", " "),
        (r"^(BACKEND: .*\n)\1+", r"\1"),  # one line for each backend: as many as there are
    ]
]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(bash or python, text) of every block of a page that is meant to be run, in order."""
    return _BLOCK.findall(page.read_text("utf-8"))


def main_job() -> str:
    """The commands of the README, which make the bundle that its program opens."""
    (commands,) = (text for kind, text in blocks(README) if kind == "bash")
    return commands


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
    found = _OUTPUT.search(WALKTHROUGH.read_text("utf-8"))
    assert found, "the walkthrough has no block that make readme writes"
    return found[2]


def words(output: str) -> list[str]:
    """The words of an output, without what depends on the machine that printed it.

    Left out are figures and frames, the processor, the versions, how a measurement came out, and
    which backends there are, which of them is the fastest, and why others are not there. A backend
    that crashed is left in.
    """
    steady = output
    for pattern, instead in _OF_THE_MACHINE:
        steady = pattern.sub(instead, steady)
    return re.findall(r"[A-Za-z_]{2,}", steady)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        transcript = run_each(main_job(), Path(folder))
    lines = (line.rstrip() for line in transcript.splitlines())
    text = re.sub("\n{2,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
    page = _OUTPUT.sub(lambda m: m[1] + text + m[3], WALKTHROUGH.read_text("utf-8"))
    WALKTHROUGH.write_text(page, "utf-8")


if __name__ == "__main__":
    main()

"""The README is executed: its commands, in order, are the life cycle from data to measurement."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def _run(kind: str, text: str, folder: Path) -> str:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", text]
    if kind == "python":
        command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_of_the_readme_runs_in_order(tmp_path: Path) -> None:
    blocks = _BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    outputs = [_run(kind, text, tmp_path) for kind, text in blocks]
    main_job, program, portable = outputs
    assert "data/digits/test/0010.png  0 " in re.sub(r" {2,}", "  ", main_job)
    assert "digits-torchscript-fp16.marnet: batch 64" in main_job
    assert "MARNet, PyTorch" in main_job
    assert program.startswith("0 0.9")
    assert "digits-onnxruntime-fp16.marnet: batch 1," in portable
    written = {path.name for path in (tmp_path / "bundles").iterdir()}
    assert written == {"digits-torchscript-fp16.marnet", "digits-onnxruntime-fp16.marnet"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []

"""The README is executed: its commands, in order, are the life cycle from data to measurement."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme import blocks, run, run_each, words, written_output

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def test_every_block_of_the_readme_runs_in_order(tmp_path: Path) -> None:
    (_, commands), *others = blocks()
    main_job = run_each(commands, tmp_path)
    program, portable, looked, _, sure, checked = (run(k, text, tmp_path) for k, text in others)
    assert words(main_job) == words(written_output()), "run make readme"
    assert "data/digits/test/0010.png  0 " in re.sub(r" {2,}", "  ", main_job)
    assert "digits-fp16.marnet: batch 64" in main_job
    assert "MARNet, PyTorch" in main_job
    assert program.startswith("0 0.9")
    assert "digits-onnxruntime-fp16.marnet: batch 1," in portable
    label, score, error, votes, samples, abstain = sure.split()
    assert (label, float(votes), abstain) == ("0", 1.0, "False")
    assert 0.9 < float(score) <= 1
    assert 0 <= float(error) < 0.05
    assert samples == "4"  # unanimous
    assert "1,257" in checked
    written = {path.name for path in (tmp_path / "bundles").iterdir()}
    assert "same label" in looked or "labels" in looked
    names = ("fp16", "onnxruntime-fp16", "openvino-fp32")
    assert written == {f"digits-{name}.marnet" for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []

"""The README is executed: its commands, in order, are the life cycle from data to measurement."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kills import write_quick_recipe
from readme import blocks, run, run_each, words, written_output

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


# Options of a training of seconds, of one backend instead of all, and of few timings.
QUICKLY = {
    "--recipe digits": "--recipe quick.toml",
    "marnet-export --precision fp16": "marnet-export --backend onnxruntime --precision fp16 "
    "--output bundles/digits-fp16.marnet",
    "marnet-export": "marnet-export --min-agreement 0.95",
    "--steps auto --max-drop 2 --target-risk 0.05": "--steps auto --sampler ddim --max-drop 5 "
    "--target-risk 0.2",
    "marnet-bench --batch 64": "marnet-bench --batch 64 --duration 1",
}


def quickly(commands: str) -> str:
    for written, instead in QUICKLY.items():
        commands = commands.replace(written, instead)
    return commands


def test_what_is_shortened_is_on_the_page() -> None:
    commands = "".join(text for kind, text in blocks() if kind == "bash")
    assert [written for written in QUICKLY if written not in commands] == []


def test_every_block_of_the_readme_runs_in_order_on_a_quick_training(tmp_path: Path) -> None:
    write_quick_recipe(tmp_path / "quick.toml")
    (_, commands), *others = blocks()
    main_job = run_each(quickly(commands), tmp_path)
    for command in ("train data", "train fit", "export", "classify", "bench"):
        assert f"$ marnet-{command} " in main_job
    assert "digits-fp16.marnet: batch 64" in main_job
    for kind, text in others:
        run(kind, quickly(text) if kind == "bash" else text, tmp_path)


@pytest.mark.slow
def test_every_block_of_the_readme_runs_in_order_and_prints_what_the_page_shows(
    tmp_path: Path,
) -> None:
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

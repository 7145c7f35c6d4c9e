"""The README is executed: its commands, in order, are the life cycle from data to measurement."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner
from readme import blocks, run, run_each, words, written_output

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


COMMANDS = [line for kind, text in blocks() if kind == "bash" for line in text.splitlines()]
LONG = ("marnet-train data digits", "marnet-train fit", "marnet-export", "marnet-bench")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_has_these_options(command: str) -> None:
    name, *words = shlex.split(command)
    (script,) = entry_points(group="console_scripts", name=name)
    result = CliRunner().invoke(script.load(), [*words, "--help"])
    assert result.exit_code == 0, result.stderr


@pytest.fixture
def finished(tmp_path: Path, digits, checkpoint, bundle_of, swept_bundle) -> Path:
    """A folder in which the long commands of the README have run, on a quick training."""
    made = {
        "data/digits": digits,
        "runs/digits": checkpoint,
        "bundles/digits-fp16.marnet": bundle_of("torchscript", "fp16"),
        "bundles/digits-onnxruntime-fp16.marnet": bundle_of("onnxruntime", "fp16"),
        "bundles/digits-openvino-fp32.marnet": swept_bundle,  # of another backend
    }
    for name, source in made.items():
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def test_what_is_not_long_in_the_readme_runs_in_order(finished: Path) -> None:
    for kind, text in blocks():
        if kind == "bash":
            lines = text.splitlines()
            text = "\n".join(line for line in lines if not line.startswith(LONG))
        run(kind, text, finished)


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

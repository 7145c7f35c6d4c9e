"""The README and the walkthrough are executed: in order, from data to measurement."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner
from readme import README, ROOT, WALKTHROUGH, blocks, main_job, run, run_each, words, written_output

PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


COMMANDS = [
    line
    for kind, text in [*blocks(README), *blocks(WALKTHROUGH)]
    if kind == "bash"
    for line in text.splitlines()
]
LONG = (
    "marnet-train data digits",
    "marnet-train fit",
    "marnet-export",
    "marnet-bench",
    "marnet-bundle verify",
)


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
        "bundles/digits-fp16.marnet": bundle_of("onnxruntime", "fp32"),
        "bundles/digits-onnxruntime-fp16.marnet": bundle_of("onnxruntime", "fp16"),
        "bundles/digits-openvino-fp32.marnet": swept_bundle,  # of another backend
    }
    for name, source in made.items():
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def test_what_is_not_long_in_the_readme_runs_in_order(finished: Path) -> None:
    for kind, text in [*blocks(README), *blocks(WALKTHROUGH)]:
        if kind == "bash":
            lines = text.splitlines()
            text = "\n".join(line for line in lines if not line.startswith(LONG))
        run(kind, text, finished)


@pytest.mark.slow
def test_every_block_of_readme_and_walkthrough_runs_in_order(tmp_path: Path) -> None:
    printed = run_each(main_job(), tmp_path)
    (program,) = (run(k, text, tmp_path) for k, text in blocks(README) if k == "python")
    matched, portable, looked, _, sure, checked = (
        run(k, text, tmp_path) for k, text in blocks(WALKTHROUGH)
    )
    assert words(printed) == words(written_output()), "run make readme"
    assert "data/digits/test/0010.png  0 " in re.sub(r" {2,}", "  ", printed)
    assert "digits-fp16.marnet: batch 64" in printed
    assert "MARNet, PyTorch" in printed
    assert program.startswith("0 0.9")
    assert re.search(r"\(2, \d+\)", matched)
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
    missing = [
        f"{path}#{anchor}"
        for path, anchor in _LINK.findall(page.read_text("utf-8"))
        if not leads_somewhere(page.parent / path if path else page, anchor)
    ]
    assert missing == []


def leads_somewhere(target: Path, anchor: str) -> bool:
    if not anchor:
        return target.exists()
    titles = _HEADING.findall(target.read_text("utf-8")) if target.is_file() else []
    return anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_map_has_a_line_for_every_file_of_the_packages() -> None:
    page = (ROOT / "docs/contributing-map.md").read_text("utf-8")
    (tree,) = re.findall(r"^## The tree\n.*?^```text\n(.*?)^```", page, re.M | re.S)
    folders: list[str] = []
    named = set()
    for line in filter(None, tree.splitlines()):
        path, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], path]
        named.add("".join(folders))
    roots = ("sdk", "kernels", "train", "export", "benchmarks")
    ends = ("py", "cu", "cuh", "cpp", "h")
    files = {p for root in roots for end in ends for p in (ROOT / root).rglob(f"*.{end}")}
    kept = {p.relative_to(ROOT).as_posix() for p in files if p.name != "__init__.py"}
    assert {path for path in named if not path.endswith("/")} == kept
    assert [path for path in named if not (ROOT / path).exists()] == []

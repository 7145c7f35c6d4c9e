"""marnet-train as a user types it: help, near misses, the three commands, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_training import TINY, change, write_recipe, write_small

from marnet_train.cli import main
from marnet_train.data.dataset import read_data_set

RECIPE = change(
    TINY,
    schedule=replace(TINY.schedule, steps=5),
    alignment={"epochs": 1},
    refinement={"epochs": 1, "views": 1},
    fusion_phase={"epochs": 1, "draws": 1},
)
# What a machine without the train extra looks like.
WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from marnet_train.cli import main
main()
"""


def marnet_train(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    return write_small(digits, folder, train=60, test=40)


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[Path, Result]:
    """The checkpoint and what the command that made it said."""
    recipe = write_recipe(RECIPE, data.parent / "tiny.toml")
    out = data.parent / "runs" / "tiny"
    return out, marnet_train("fit", "--data", data, "--recipe", recipe, "--out", out)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag: str) -> None:
    result = marnet_train(flag)
    assert result.exit_code == 0
    for command in ("data", "fit", "evaluate"):
        assert f"\n  {command} " in result.stdout
    assert "marnet-train fit --data data/digits --recipe digits" in result.stdout


def test_every_command_explains_its_options() -> None:
    assert "--recipe" in (fit := marnet_train("fit", "-h").stdout)
    assert "Same seed, threads and versions: same weights." in " ".join(fit.split())
    assert "--split" in marnet_train("evaluate", "-h").stdout
    assert "digits" in marnet_train("data", "-h").stdout


def test_a_data_set_is_written_and_the_next_command_named(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "my digits"
    result = marnet_train("data", "digits", "--out", out, "--seed", "1")
    assert result.exit_code == 0, result.output
    written, usual = (read_data_set(root).splits["test"] for root in (out, digits))
    assert len(written) == 270
    assert {e.image.name for e in written} != {e.image.name for e in usual}  # seed 0
    assert f"marnet-train fit --data '{out}' --recipe digits" in result.stderr
    assert result.stdout == ""
    again = marnet_train("data", "digits", "--out", out)
    assert again.exit_code == 2
    assert "already exists; choose another output or pass --force" in again.stderr


def test_fit_writes_a_checkpoint_and_says_how_good_it_is(trained: tuple[Path, Result]) -> None:
    out, result = trained
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").is_file()
    assert f"marnet-export --checkpoint {out}" in result.stderr
    assert (out / "samples").is_dir()
    training = json.loads((out / "training.json").read_text())
    # Where the recipe lay is nobody's business who gets the checkpoint.
    assert (training["seed"], training["recipe"]) == (0, "tiny.toml")
    assert "recipe: `tiny.toml`" in (out / "README.md").read_text("utf-8")


def test_fit_prints_accuracies_differences_and_what_they_bought(
    trained: tuple[Path, Result],
) -> None:
    out, result = trained
    training = json.loads((out / "training.json").read_text())
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "validation: 30 images" in lines
    assert "model top-1 top-5" in lines
    rows = {
        "image-only baseline": "baseline",
        "alignment branch": "alignment",
        "+MLP, one pass": "mlp",
        "refined branch": "refined",
        "MARNet": "marnet",
    }
    for title, branch in rows.items():
        seen = training["metrics"][branch]["val"]
        assert f"{title} {seen['top1']:.2%} {seen['top5']:.2%}" in lines
    assert "the same images points 95 % interval" in lines
    for pair, seen in training["differences"]["val"].items():
        one, other = (t for name in pair.split(" - ") for t, b in rows.items() if b == name)
        points = [f"{100 * seen[key]:+.1f}" for key in ("mean", "low", "high")]
        assert "{} - {} {} {} to {}".format(one, other, *points) in lines
    verdict = r"What (text|the diffusion) bought on 30 val images: .* points against"
    assert len([line for line in lines if re.match(verdict, line)]) == 2
    assert lines[-1].startswith("On 40 test images, which chose nothing: image-only baseline ")


def test_fit_replaces_a_checkpoint_only_when_forced_to(
    trained: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    words = ("fit", "--data", data, "--recipe", data.parent / "tiny.toml", "--out", out)
    refused = marnet_train(*words, "--seed", "3")
    assert refused.exit_code == 2
    assert "already exists; choose another output or pass --force" in refused.stderr
    assert json.loads((out / "training.json").read_text())["seed"] == 0
    forced = marnet_train(*words, "--seed", "3", "--no-samples", "--force")
    assert forced.exit_code == 0, forced.output
    assert json.loads((out / "training.json").read_text())["seed"] == 3
    assert not (out / "samples").exists()


def test_evaluate_takes_the_newest_checkpoint_and_prints_a_table(
    trained: tuple[Path, Result], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = trained
    monkeypatch.chdir(out.parent.parent)
    result = marnet_train("evaluate", "--data", data, "--split", "val")
    assert result.exit_code == 0, result.output
    assert "checkpoint runs/tiny" in result.stderr
    assert "val: 30 images" in result.stdout
    assert "marnet-export --checkpoint runs/tiny --precision fp16" in result.stderr
    for branch in ("alignment", "refined", "marnet"):
        assert f"\n {branch} " in result.stdout or f"\n{branch} " in result.stdout


def test_evaluate_joins_checkpoints_of_several_seeds(
    trained: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "evaluation", tmp_path / "other"
    shutil.copytree(trained[0], other)
    words = ("evaluate", "--data", data, "--checkpoint", trained[0], "--checkpoint", other)
    twice = marnet_train(*words)
    assert twice.exit_code == 2
    assert "trained with the seeds [0, 0]; expected different ones" in twice.stderr
    training = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(training | {"seed": 1}))
    result = marnet_train(*words, "--out", out)
    assert result.exit_code == 0, result.output
    assert "+Fusion: the whole" in result.stdout
    assert "MARNet - alignment" in result.stdout
    joined = json.loads((out / "evaluation.json").read_text())
    assert set(joined["summary"]) == {"baseline", "alignment", "refined", "MARNet"}
    seen = training["metrics"]["baseline"]["test"]["top1"]
    assert joined["summary"]["baseline"]["top1_by_seed"] == pytest.approx([seen, seen])
    names = ["evaluation.csv", "evaluation.json", "evaluation.md", "evaluation.png"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_split_or_folder_that_is_not_there_ends_with_2(
    trained: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    words = ("evaluate", "--checkpoint", trained[0], "--data")
    misspelt = marnet_train(*words, data, "--split", "tset")
    assert misspelt.exit_code == 2
    assert "choose --split from: test, train, val. Did you mean 'test'?" in misspelt.stderr
    absent = marnet_train(*words, tmp_path / "no")
    assert absent.exit_code == 2
    assert "no: no such folder" in absent.stderr


def test_next_commands_can_be_pasted_where_paths_have_spaces(
    trained: tuple[Path, Result], data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "my run"
    words = ("--data", data, "--recipe", data.parent / "tiny.toml", "--out", copy)
    for result in (
        marnet_train("fit", *words, "--threads", "1", "--device", "cpu"),
        marnet_train("evaluate", "--checkpoint", copy, "--data", data),
    ):
        assert result.exit_code == 0, result.output
        assert f"marnet-export --checkpoint '{copy}' --precision fp16" in result.stderr
    machine = json.loads((copy / "training.json").read_text())["machine"]
    assert (machine["threads"], machine["device"]) == (1, "cpu")


def test_evaluate_without_any_checkpoint_names_the_command_that_makes_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = marnet_train("evaluate", "--data", data)
    assert result.exit_code == 2
    assert "marnet-train fit --data DATA" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "digts"), "No such command 'digts'. Did you mean 'digits'?"),
        (("evalute",), "No such command 'evalute'. Did you mean 'evaluate'?"),
        (("zzzz",), "No such command 'zzzz'."),
        (("fit", "--data", "x", "--out", "y"), "Missing option '--recipe'"),
        (("data", "digits"), "Missing option '--out'"),
        (("data", "digits", "--out", "x", "--seed", "one"), "'one' is not a valid integer"),
        (("fit", "--dat", "x"), "No such option"),
        (("data", "digits", "--out", "x", "--seed", "-1"), "-1 is not in the range"),
        (
            ("fit", "--data", "x", "--recipe", "digits", "--out", "y", "--seed", "-1"),
            "-1 is not in",
        ),
        (
            ("fit", "--data", "x", "--recipe", "digits", "--out", "y", "--threads", "0"),
            "0 is not in the range",
        ),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_what_was_wrong(
    words: tuple[str, ...], said: str
) -> None:
    result = marnet_train(*words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_errors_of_ours_are_one_line_and_no_traceback(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unknown = marnet_train("fit", "--data", data, "--recipe", "digts", "--out", out)
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("Error: no recipe 'digts'. Did you mean 'digits'?")
    absent = marnet_train("fit", "--data", tmp_path / "no", "--recipe", "digits", "--out", out)
    assert absent.exit_code == 2
    assert "no: no such folder; expected one that holds train/ and val/" in absent.stderr
    (tmp_path / "empty").mkdir()
    empty = marnet_train("fit", "--data", tmp_path / "empty", "--recipe", "digits", "--out", out)
    assert empty.exit_code == 1  # the data is at fault, not the command line
    assert "no train/ folder" in empty.stderr
    assert not out.exists()


def test_a_device_that_is_not_there_ends_with_5(data: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    recipe = write_recipe(RECIPE, tmp_path / "tiny.toml")
    words = ("fit", "--data", data, "--recipe", recipe, "--out", tmp_path / "out")
    assert marnet_train(*words, "--device", "cuda").exit_code == 5


@pytest.mark.parametrize("device", ["gpu", "mps", "meta"])
def test_a_device_of_another_kind_ends_with_2(device: str, data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--recipe", "digits", "--out", tmp_path / "out")
    result = marnet_train("fit", *words, "--device", device)
    assert result.exit_code == 2
    assert "choose auto, cpu, cuda or cuda:N" in result.stderr


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_missing_extra_ends_with_5_and_the_pip_line(command: str, tmp_path: Path) -> None:
    more = ["--recipe", "digits", "--out", str(tmp_path / "out")] if command == "fit" else []
    result = without_torch(command, "--data", str(tmp_path), *more)
    assert result.returncode == 5
    assert 'the package "torch" is not installed; run: pip install "marnet[train]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_help_needs_no_extra() -> None:
    result = without_torch("fit", "--help")
    assert result.returncode == 0
    assert "--recipe" in result.stdout

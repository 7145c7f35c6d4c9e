"""Killed, interrupted, out of space: what was there before stays, and the same command goes on."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from kills import (
    SCRIPTS,
    Target,
    answers,
    export_command,
    fit_command,
    torment,
    weights,
    write_quick_recipe,
)
from quick import kept

from marnet_export.cli import main as export_main
from marnet_train.cli import main as train_main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quick_recipe(tmp_path_factory.mktemp("recipe") / "quick.toml")


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(digits, recipe, tmp_path):
    out = tmp_path / "runs/quick"
    target = Target(fit_command(digits, recipe, out), out, weights, tmp_path / "log")
    torment(target, kills=3, rng=random.Random(0))
    assert target.log.read_text().count("going on from") >= 1
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []


@pytest.mark.slow
def test_a_killed_export_leaves_the_previous_bundle(checkpoint, tmp_path):
    out = tmp_path / "bundles/quick.marnet"
    target = Target(export_command(checkpoint, out), out, answers, tmp_path / "log")
    torment(target, kills=2, rng=random.Random(1))


_AT_A_ROW = """
import os, signal, sys
from marnet_sdk.commands import unfinished
from marnet_sdk.commands.classify import main

write, left = unfinished._line, int(sys.argv.pop(1))

def dying(content):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(content)

unfinished._line = dying
main()
"""


@pytest.mark.slow
def test_a_killed_classification_goes_on_and_loses_no_row(digits, bundle_of, tmp_path):
    out, model = tmp_path / "out.jsonl", bundle_of("onnxruntime", "fp32")
    for rows, code in ((30, -9), (1, -9), (100, -9), (10_000, 0)):
        command = [sys.executable, "-c", _AT_A_ROW, rows, digits / "test", "-m", model, "-b", "8"]
        done = subprocess.run([*map(str, command), "-o", str(out), "--resume"])
        assert done.returncode == code
    images = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert images == [str(path) for path in sorted((digits / "test").glob("*.png"))]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


_EVERY_EVENT = """
import os, signal, sys
from pathlib import Path
from marnet_sdk.outputs import atomic_directory

target = Path(sys.argv[1])

def write(content):
    with atomic_directory(target, overwrite=True) as fresh:
        (fresh / "one").write_text(content)
        (fresh / "two").write_text(content)

write("old")
seen, kill_at = 0, 0

def hook(event, arguments):
    global seen
    seen += 1
    if seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

for moment in range(1, 10_000):
    child = os.fork()
    if child == 0:
        kill_at = moment
        sys.addaudithook(hook)
        write("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    content = {path.name: path.read_text() for path in target.iterdir()}
    print(content.get("one"), content.get("two"), len(content), sep=",")
    if status == 0:
        break
    write("old")
"""


def test_a_folder_replaced_is_old_or_new_whenever_the_process_is_killed(tmp_path):
    """The process kills itself at each of the events that Python audits: open, rename, remove."""
    command = [sys.executable, "-c", _EVERY_EVENT, str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    states = done.stdout.split()
    assert len(states) > 20
    assert set(states) == {"old,old,2", "new,new,2"}
    assert states[0] == "old,old,2"
    assert states[-1] == "new,new,2"


def in_small_filesystem(folder: Path, kilobytes: int, script: str) -> str:
    """Run a shell script while `folder` is a file system of its own; its output, both streams."""
    folder.mkdir(parents=True)
    small = f"mount -t tmpfs -o size={kilobytes}k none '{folder}'"
    command = ["unshare", "--map-root-user", "--mount", "bash", "-uc"]
    probe = subprocess.run([*command, small], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*command, f"{small} && cd '{folder}'\n{script}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
def test_a_training_on_a_full_disk_says_so_and_goes_on_once_there_is_space(
    digits, recipe, tmp_path
):
    folder = tmp_path / "disk"
    fit = " ".join(fit_command(digits, recipe, folder / "quick"))
    # Room for one saved epoch of 4 MB, not for a second beside it.
    output = in_small_filesystem(
        folder,
        6_000,
        f"{fit}; echo code $?; ls -A\nmount -o remount,size=100m . && {fit}; echo code $?; ls -A",
    )
    first, second = output.split("code 1\n")
    assert "no space left on its file system" in first
    assert "run the same command" in first
    assert second.startswith("quick.partial\n")
    assert "going on from" in second
    assert second.endswith("code 0\nquick\n")
    assert "Traceback" not in output


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
@pytest.mark.parametrize(
    "backend", kept(["onnxruntime", "openvino", "torchscript"], {"torchscript"})
)
def test_an_export_on_a_full_disk_leaves_the_previous_bundle(
    backend, bundle_of, checkpoint, tmp_path
):
    folder = tmp_path / "disk"
    previous = bundle_of(backend, "fp16")
    export = " ".join(export_command(checkpoint, folder / "quick.marnet"))
    export = export.replace("--backend onnxruntime", f"--backend {backend}")
    image = checkpoint / "samples/000000.png"
    output = in_small_filesystem(
        folder,
        20_000,
        f"cp -r '{previous}' quick.marnet\n"
        # Fill the disk but for 40 kB.
        "head -c $(( $(df --output=avail -B1 . | tail -1) - 40000 )) /dev/zero > filler\n"
        f"{export}; echo code $?; ls -A\n"
        f"{SCRIPTS}/marnet-classify {image} --model quick.marnet; echo code $?",
    )
    assert "no space left on its file system" in output
    assert "code 1\nfiller\nquick.marnet\n" in output
    assert output.endswith("code 0\n")
    assert "Traceback" not in output


def test_a_folder_that_must_not_be_written_to_is_one_line(digits, recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for main, command in (
        (train_main, fit_command(digits, recipe, tmp_path / "file/quick")),
        (export_main, export_command(tmp_path, tmp_path / "file/quick.marnet")),
    ):
        done = CliRunner().invoke(main, command[1:])
        assert done.exit_code in (1, 2)
        assert isinstance(done.exception, SystemExit)  # else a traceback
        assert done.stderr.splitlines()[-1].startswith("Error: ")

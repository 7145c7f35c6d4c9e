"""Interrupted trainings: what is saved, what goes on, what is refused."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch
from quick import kept
from tiny_training import TINY, Stop, change, interrupt_after
from torch import nn

from marnet_sdk.errors import CheckpointError, OutputBusy, OutputExists
from marnet_sdk.files import sha256_file
from marnet_train import progress
from marnet_train.optimise import Learner
from marnet_train.progress import EPOCH, METRICS, PHASE, Progress, saved_progress
from marnet_train.recipe import TextPhase
from marnet_train.trainer import fit

RECIPE = change(
    TINY,
    text_phase=TextPhase(epochs=2),
    alignment={"epochs": 3, "batch": 64},
    refinement={"epochs": 6, "batch": 512},
    fusion_phase={"epochs": 10, "batch": 512},
)
SETTINGS = {"seed": 0, "data": {"sha256": "ab"}}


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each epoch, however short it was."""
    monkeypatch.setattr(progress, "SAVING_SHARE", float("inf"))


MOMENTS = [("text", 1), ("baseline", 1), ("alignment", 2), ("+MLP", 3), ("refinement", 5)]
MOMENTS += [("refined head", 4), ("fusion", 9)]


@pytest.mark.parametrize(
    "moments", kept([MOMENTS, MOMENTS[4:5]], [MOMENTS[4:5]]), ids=["each phase", "refinement"]
)
def test_a_training_that_was_interrupted_gives_the_same_checkpoint(
    moments, few_digits, tmp_path, every_epoch, monkeypatch, capsys
):
    undisturbed = tmp_path / "undisturbed"
    expected = fit(few_digits, RECIPE, undisturbed, name="digits", threads=1)
    capsys.readouterr()
    out = tmp_path / "runs/quick"
    partial = tmp_path / "runs/quick.partial"
    for phase, epoch in moments:
        with monkeypatch.context() as patch:
            interrupt_after(patch, phase, epoch)
            with pytest.raises(Stop):
                fit(few_digits, RECIPE, out, name="digits", threads=1)
        assert not out.exists()
        assert "run the same command again" in capsys.readouterr().err
    training = fit(few_digits, RECIPE, out, name="digits", threads=1)
    told = capsys.readouterr().err
    assert f"going on from {partial}" in told
    assert "{} epoch {}".format(*moments[-1]) in told
    assert not partial.exists()
    for name in ("model.safetensors", "baseline.safetensors", METRICS, "config.json"):
        assert sha256_file(out / name) == sha256_file(undisturbed / name), name
    assert training["metrics"] == expected["metrics"]
    assert training["seconds"] > 0


def test_other_settings_are_refused_and_restart_discards(
    few_digits, tmp_path, every_epoch, monkeypatch
):
    out = tmp_path / "quick"
    one = {"epochs": 1}
    short = change(RECIPE, text_phase=None, alignment=one, refinement=one, fusion_phase=one)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "alignment", 0)
        with pytest.raises(Stop):
            fit(few_digits, short, out)
    saved = sha256_file(tmp_path / "quick.partial" / PHASE)
    with pytest.raises(OutputExists, match=r"seed: 0 then, 1 now.*--restart"):
        fit(few_digits, short, out, seed=1)
    assert sha256_file(tmp_path / "quick.partial" / PHASE) == saved
    assert fit(few_digits, short, out, seed=1, restart=True)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]


def stop() -> None:
    raise Stop


def begin(out: Path) -> None:
    """One run whose first phase is done and which then stops."""

    def work() -> None:
        with saved_progress(out, SETTINGS, restart=False) as run:
            assert run.once("baseline", None, lambda: {"top1": 0.5}) == {"top1": 0.5}
            run.once("alignment", None, stop)

    with pytest.raises(Stop):
        work()


def test_what_a_phase_returned_is_kept_and_the_phase_not_repeated(tmp_path):
    begin(tmp_path / "out")
    with saved_progress(tmp_path / "out", SETTINGS, restart=False) as run:
        assert run.once("baseline", None, lambda: pytest.fail("done already")) == {"top1": 0.5}


def test_nothing_is_left_of_a_run_that_saved_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="bad recipe"),
        saved_progress(tmp_path / "out", SETTINGS, restart=False),
    ):
        raise ValueError("bad recipe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_state_is_refused_by_name(content, tmp_path):
    begin(tmp_path / "out")
    path = tmp_path / "out.partial" / PHASE
    path.write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=r"phase\.safetensors: damaged.*--restart"),
        saved_progress(tmp_path / "out", SETTINGS, restart=False),
    ):
        pytest.fail("must not begin")
    with saved_progress(tmp_path / "out", SETTINGS, restart=True) as run:
        assert run.record.results == {}


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    with saved_progress(tmp_path / "out", SETTINGS, restart=False):
        descriptor = os.open(tmp_path / "out.partial/lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        with (
            pytest.raises(OutputBusy, match=rf"process {os.getpid()} on .* is at work there"),
            saved_progress(tmp_path / "out", SETTINGS, restart=True),
        ):
            pytest.fail("must not begin")
    assert list(tmp_path.iterdir()) == []


def test_an_epoch_of_a_finished_phase_is_not_gone_back_to(tmp_path):
    """A kill between the end of a phase and the first epoch of the next."""
    out, model = tmp_path / "out", nn.Linear(2, 2)
    learner = Learner([(model, 0.1)], weight_decay=0.01, total=4)
    generator = torch.Generator().manual_seed(0)

    def align(run: Progress) -> None:
        for _ in run.epochs("alignment", 2, learner, generator):
            learner.step(model(torch.ones(1, 2)).square().sum())

    def work() -> None:
        with saved_progress(out, SETTINGS, restart=False) as run:
            run.once("alignment", model, lambda: align(run))
            run.once("refinement", model, stop)

    with pytest.raises(Stop):
        work()
    assert (tmp_path / "out.partial" / EPOCH).exists()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight.zero_()
    with saved_progress(out, SETTINGS, restart=False) as run:
        run.once("alignment", model, lambda: pytest.fail("done already"))
        assert list(run.epochs("refinement", 2, learner, generator)) == [1, 2]
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Progress()
    run.log(phase="x", epoch=1, loss=1.0)
    assert run.once("x", nn.Linear(1, 1), lambda: 3) == 3
    assert run.log_lines() == '{"phase": "x", "epoch": 1, "loss": 1.0}\n'
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)

"""Metrics in TensorBoard, and what is said where it is missing."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TINY

from marnet_sdk.errors import InvalidInput, MissingExtra, OutputError
from marnet_train.board import Board
from marnet_train.progress import Progress
from marnet_train.trainer import fit


def test_every_number_of_an_epoch_is_a_scalar_of_its_phase(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs marnet[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path / "runs/board")
    run = Progress(board=board)
    run.log(phase="alignment", epoch=1, loss=2.5)
    run.log(phase="alignment", epoch=2, loss=1.5, score=0.25)
    run.log(phase="gamma of +MLP 0.1", epoch=1, loss=3.0)
    board.close()
    events = EventAccumulator(str(tmp_path / "runs/board"))
    events.Reload()
    assert {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    } == {
        "alignment/loss": [(1, 2.5), (2, 1.5)],
        "alignment/score": [(2, 0.25)],
        "gamma-of-MLP-0.1/loss": [(1, 3.0)],
    }


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs marnet[tensorboard]")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/board: cannot be written"):
        Board(tmp_path / "file/board")


def test_without_the_package_the_pip_line_comes_before_any_training(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r'pip install "marnet\[tensorboard\]"'):
        fit(digits, TINY, tmp_path / "out", tensorboard=tmp_path / "board")
    assert list(tmp_path.iterdir()) == []


def test_a_board_inside_of_the_checkpoint_is_refused(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidInput, match="appears whole at the end; expected another folder"):
        fit(digits, TINY, out, tensorboard=out / "board")

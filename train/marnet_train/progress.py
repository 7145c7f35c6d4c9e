"""This module lets an interrupted training run go on, by the folder `OUT.partial`, until OUT is
written.

    phase.safetensors   the model after the last finished phase
    epoch.safetensors   inside a phase: what learns, its optimizer, the random generators
    metrics.jsonl       one line per epoch, to look at meanwhile
    lock                held by the process at work

Each .safetensors file carries the record of the run (settings, results, log) in its header and is
replaced whole, so a kill at any moment leaves the previous one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marnet_sdk.console import say, track
from marnet_sdk.errors import CheckpointError, OutputExists
from marnet_sdk.outputs import atomic_file, enough_space, exclusive
from marnet_train.board import Board
from marnet_train.optimise import Learner

PHASE, EPOCH, METRICS = "phase.safetensors", "epoch.safetensors", "metrics.jsonl"
SAVING_SHARE = 0.05  # of the time at most is spent on saving epochs, so some may not be saved


@dataclass
class Record:
    """This is the story of a run so far."""

    settings: dict[str, Any]  # all that decides the weights
    results: dict[str, Any] = field(default_factory=dict)  # finished phase -> what it returned
    log: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch
    seconds: float = 0.0  # spent up to the last save
    phase: str | None = None  # an epoch's: in which phase,
    epochs: int = 0  # and how many are done


class Progress:
    """This is one training run: what it has logged and done, saved if there is a folder for it."""

    def __init__(
        self,
        folder: Path | None = None,
        record: Record | None = None,
        board: Board | None = None,
    ) -> None:
        self.folder = folder
        self.record = record or Record({})
        self.board = board
        self._before = self.record.seconds
        self._started = time.perf_counter()
        self._saved_at, self._save_seconds = float("-inf"), 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds spent on this run, over all the processes that worked on it."""
        return self._before + time.perf_counter() - self._started

    def log(self, **line: Any) -> None:
        """Remember one line about an epoch, and show it on the board if there is one."""
        self.record.log.append(line)
        if self.board is not None:
            self.board.show(line)
        if self.folder is not None:
            with (
                enough_space(self.folder),
                (self.folder / METRICS).open("a", encoding="utf-8") as file,
            ):
                print(json.dumps(line), file=file)

    def log_lines(self) -> str:
        """Return the content of metrics.jsonl."""
        return "".join(json.dumps(line) + "\n" for line in self.record.log)

    def once(self, phase: str, model: nn.Module | None, work: Callable[[], Any]) -> Any:
        """Do `work`, unless this run has done it before.

        Args:
            model: what the phase leaves behind: saved with it, or loaded instead of it.

        Returns:
            What `work` returned: JSON data.
        """
        if phase not in self.record.results:
            result = work()
            self.record.results[phase] = result
            self.record.phase, self.record.epochs = None, 0
            self._save(PHASE, {} if model is None else model.state_dict())
        elif self.folder is not None and model is not None:
            model.load_state_dict(_tensors_of(self.folder / PHASE))
        return self.record.results[phase]

    def epochs(
        self, phase: str, count: int, learner: Learner, generator: torch.Generator
    ) -> Iterator[int]:
        """Yield epoch numbers from 1 to `count`, or from the one after the last that was saved."""
        done = 0
        if self.folder is not None and self.record.phase == phase:
            done = self.record.epochs
            state = _tensors_of(self.folder / EPOCH)
            _set_random_state(state, generator)
            learner.load_state(state)
        for epoch in track(range(done + 1, count + 1), phase):
            yield epoch
            self.record.phase, self.record.epochs = phase, epoch
            if self.folder is not None and self._is_due():
                self._save(EPOCH, learner.state() | _random_state(generator))

    def _is_due(self) -> bool:
        since = time.perf_counter() - self._saved_at
        return self._save_seconds <= SAVING_SHARE * since

    def _save(self, name: str, state: Mapping[str, Tensor]) -> None:
        if self.folder is None:
            return
        started = time.perf_counter()
        self.record.seconds = self.seconds
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        with atomic_file(self.folder / name) as fresh:
            save_file(tensors, fresh, metadata={"record": json.dumps(asdict(self.record))})
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started


@contextmanager
def saved_progress(
    out: Path, settings: dict[str, Any], *, restart: bool, board: Board | None = None
) -> Iterator[Progress]:
    """Open the run that writes `out`: a new one, or the interrupted one with the same settings.

    The folder `OUT.partial` is removed if the block succeeds, and kept otherwise.

    Args:
        settings: all that decides the weights, as JSON data.
        restart: discard what an interrupted run has saved.
        board: shows every epoch.

    Raises:
        OutputExists: the interrupted run had other settings.
        OutputBusy: another process is at work on it.
        CheckpointError: what it saved is damaged.
    """
    folder = partial_folder(out)
    with exclusive(folder / "lock"):
        try:
            if restart:
                _clear(folder)
            yield _begin(folder, settings, board)
        except BaseException:
            if any((folder / name).is_file() for name in (PHASE, EPOCH)):
                say(f"{out} is not finished: run the same command again, and it goes on")
            else:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def partial_folder(out: Path) -> Path:
    """Name the folder that keeps what an interrupted training to `out` has done."""
    return out.with_name(f"{out.name}.partial")


def threads_of(folders: Iterable[Path]) -> int | None:
    """Read how many threads the first interrupted training that is found has; None: there is none.

    Raises:
        CheckpointError: what it saved is damaged.
    """
    for folder in folders:
        if (record := _read_record(folder)) is not None:
            return record.settings["machine"]["threads"]
    return None


def _begin(folder: Path, settings: dict[str, Any], board: Board | None) -> Progress:
    record = _read_record(folder)
    if record is None:
        record = Record(settings)
    else:
        _check_same(folder, record.settings, settings)
        say(f"going on from {folder}: {_position(record)}")
    run = Progress(folder, record, board)
    with enough_space(folder):
        (folder / METRICS).write_text(run.log_lines(), "utf-8")
    return run


def _clear(folder: Path) -> None:
    for name in (EPOCH, PHASE, METRICS):
        (folder / name).unlink(missing_ok=True)


def _read_record(folder: Path) -> Record | None:
    """Read the record of the further of the two saved states; None if there is neither."""
    saved = [_record_of(folder / name) for name in (PHASE, EPOCH) if (folder / name).is_file()]
    return max(saved, key=lambda record: (len(record.results), record.epochs), default=None)


def _record_of(path: Path) -> Record:
    with _readable(path), safe_open(path, framework="pt") as file:
        return Record(**json.loads((file.metadata() or {})["record"]))


def _tensors_of(path: Path) -> dict[str, Tensor]:
    with _readable(path):
        return load_file(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged, or not of this version ({error}); start anew with --restart"
        ) from error


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(
            f"{key}: {_short(before.get(key))} then, {_short(now.get(key))} now" for key in changed
        )
        raise OutputExists(
            f"{folder} holds an interrupted run with other settings ({shown}). Give it its own "
            "settings to finish it, choose another --out, or discard it with --restart"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _position(record: Record) -> str:
    done = ", ".join(record.results)
    inside = f"{record.phase} epoch {record.epochs}" if record.phase else ""
    return " and ".join(part for part in (done and f"{done} done", inside) if part)


def _random_state(generator: torch.Generator) -> dict[str, Tensor]:
    state = {"random.generator": generator.get_state(), "random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor], generator: torch.Generator) -> None:
    generator.set_state(state["random.generator"])
    torch.set_rng_state(state["random.torch"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])

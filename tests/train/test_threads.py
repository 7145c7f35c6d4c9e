"""The number of CPU threads of a training: what is asked for, what is free, what it had before."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_training import TINY, Stop, change, interrupt_after

from marnet_train import threads
from marnet_train.threads import training_threads
from marnet_train.trainer import fit

RECIPE = change(TINY, alignment={"epochs": 2})


@pytest.fixture(autouse=True)
def _four_cpus(monkeypatch):
    """A machine of four CPUs, for which nobody has set a number of threads."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("marnet_sdk.cpus.os.cpu_count", lambda: 4)
    monkeypatch.setattr("marnet_sdk.cpus.os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("marnet_sdk.cpus.count_cores", lambda *_: 4)
    monkeypatch.setattr("marnet_sdk.cpus.quota", lambda *_: None)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def used_by_others(monkeypatch):
    """Sets the percentage of each CPU that other programs take."""

    def set_it(*percent: float) -> None:
        monkeypatch.setattr(threads.psutil, "cpu_percent", lambda *_, **__: [*percent])

    return set_it


def inside(asked: int | None = None, unfinished: int | None = None) -> int:
    with training_threads(asked, unfinished):
        return torch.get_num_threads()


@pytest.mark.parametrize(
    ("percent", "expected"),
    [((100, 100, 100, 100), 1), ((100, 99, 3, 0), 2), ((40, 40, 40, 40), 2), ((5, 9, 2, 8), 4)],
    ids=["all", "two", "a part of each", "none"],
)
def test_a_thread_for_each_cpu_that_others_leave(used_by_others, capsys, percent, expected):
    used_by_others(*percent)
    assert inside() == expected
    assert torch.get_num_threads() == 4
    told = capsys.readouterr().err
    assert told == "" if expected == 4 else f"computing with {expected} of 4 threads" in told
    assert expected == 4 or "--threads 4 takes them all" in " ".join(told.split())


def test_cpus_that_this_process_must_not_use_do_not_count(used_by_others, monkeypatch):
    used_by_others(0, 100, 0, 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert threads.free_cpus() == 1.0


def test_what_somebody_asks_for_stands_on_busy_cpus(used_by_others, monkeypatch, capsys):
    used_by_others(100, 100, 100, 100)
    assert inside(asked=3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert inside() == 4
    assert capsys.readouterr().err == ""


def test_a_training_that_goes_on_has_its_number(few_digits, tmp_path, monkeypatch, used_by_others):
    """Otherwise it would be refused, because the number decides the last bits of the weights."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, "alignment", 0)
        used_by_others(100, 100, 0, 0)
        with pytest.raises(Stop):
            fit(few_digits, RECIPE, tmp_path / "run")
    used_by_others(0, 0, 0, 0)
    assert fit(few_digits, RECIPE, tmp_path / "run")["machine"]["threads"] == 2


def test_a_number_of_another_machine_is_not_taken(used_by_others):
    used_by_others(0, 0, 0, 0)
    assert inside(unfinished=2) == 2
    assert inside(unfinished=5) == 4

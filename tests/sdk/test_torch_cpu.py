"""Torch computes with fewer threads where they mostly wait, and its own number stays."""

from __future__ import annotations

from itertools import count
from threading import Thread

import pytest
import torch

from marnet_sdk.backends import torch_cpu
from marnet_sdk.backends.torch_cpu import computing


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch_cpu, "_calls", torch_cpu._Calls())
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def used(calls: int) -> list[int]:
    """How many threads torch has in each of some calls; behind each it has four."""
    found = []
    for _ in range(calls):
        with computing(adapts=True):
            found.append(torch.get_num_threads())
        assert torch.get_num_threads() == 4
    return found


def test_threads_that_mostly_wait_become_fewer(monkeypatch):
    monkeypatch.setattr(torch_cpu, "thread_time", lambda: 0.0)  # the processor's, of this thread
    found = used(30)
    assert found[0] == 4
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1


def test_a_number_that_was_asked_for_stays(monkeypatch):
    monkeypatch.setattr(torch_cpu._calls.crowd, "most", lambda wanted: 1)
    with computing(adapts=False):
        assert torch.get_num_threads() == 4


def test_threads_that_work_stay(monkeypatch):
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(torch_cpu, clock, count().__next__)
    assert used(30) == [4] * 30


def test_a_thread_that_begins_meanwhile_keeps_all_threads(monkeypatch):
    """A new thread's OpenMP begins with torch's number, which a call has lowered then."""
    monkeypatch.setattr(torch_cpu._calls.crowd, "most", lambda wanted: 1)
    found = []

    def call():
        with computing(adapts=True):
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    with computing(adapts=True):
        thread = Thread(target=call)
        thread.start()
        thread.join()
    assert found == [1, 4]
    assert torch.get_num_threads() == 4


def test_a_call_that_fails_leaves_the_number_as_it_was(monkeypatch):
    monkeypatch.setattr(torch_cpu._calls.crowd, "most", lambda wanted: 2)
    with pytest.raises(ValueError, match="no such"), computing(adapts=True):
        raise ValueError("no such")
    assert used(1) == [2]

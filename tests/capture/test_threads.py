"""Runs that several threads begin, share and end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.capture import active, tracer
from tensortrace.capture.active import slot
from tensortrace.records import Action, Call
from tests.capture.lifecycle import X, make_net, of, process_state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def often() -> Iterator[None]:
    """Have threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What some jobs return, each in a thread of its own; the first exception of any is raised."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result(20) for future in [threads.submit(job) for job in jobs]]


# ---- beginning and ending


def test_block_entered_while_another_thread_puts_the_hooks_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = process_state()
    begun, other_is_in = threading.Event(), threading.Event()
    hooks = tracer.ModuleHooks

    def slowly() -> Any:
        begun.set()
        other_is_in.wait(0.3)  # it cannot be while this one holds it up
        return hooks()

    monkeypatch.setattr(tracer, "ModuleHooks", slowly)

    def first() -> None:
        with trace("first.jsonl"):
            make_net()(X)

    def second() -> None:
        begun.wait(10)
        with trace("second.jsonl"):
            other_is_in.set()
            make_net()(X)

    together(first, second)
    assert process_state() == before
    assert (slot.users, slot.hooks, slot.running) == (0, [], None)


def test_blocks_that_threads_enter_and_leave_all_the_time_leave_nothing(often: None) -> None:
    before = process_state()
    net, barrier = make_net(), threading.Barrier(4)

    def job() -> None:
        barrier.wait(10)
        for _ in range(15):
            with trace(out=lambda record: None, narrow=False):
                net(X)

    together(job, job, job, job)
    assert process_state() == before
    assert (slot.users, slot.hooks, slot.running) == (0, [], None)
    assert together(lambda: process_state()["modes"]) == [[]]


@pytest.mark.parametrize("name", ["ModuleHooks", "OptimizerHooks", "Patches"])
def test_block_that_cannot_begin_leaves_no_hook(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = process_state()
    t = trace()
    with monkeypatch.context() as broken:
        broken.setattr(tracer, name, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError), t:
            pass
    assert process_state() == before
    assert (slot.users, slot.hooks, slot.running) == (0, [], None)
    with t:
        make_net()(X)
    assert process_state() == before


def test_child_forked_while_a_run_begins_can_begin_its_own() -> None:
    lock = slot.lock
    holding, over = threading.Event(), threading.Event()

    def hold() -> None:
        with active.Alone():
            holding.set()
            over.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(10)
    active._forget()  # what a forked child calls first
    try:
        assert slot.lock is not lock
        with trace(out=lambda record: None):
            make_net()(X)
    finally:
        over.set()
        thread.join()


def test_thread_that_a_replay_waits_for_is_not_held_up_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(active, "_PATIENCE_S", 0.01)
    before = process_state()

    def other() -> None:
        with trace(out=lambda record: None):
            pass

    def out(record: Any) -> None:
        if slot.running is None:  # the run ends
            together(other)

    with trace(out=out):
        make_net()(X)
    assert process_state() == before


# ---- calls that outlive the run that they were entered in


class Waits(nn.Module):
    """Two layers; between them it lets others go on until they say so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.begun.set()
        self.go_on.wait(10)
        return self.second(x)


@pytest.mark.parametrize("level", ["module", "op"])
def test_call_that_another_run_has_seen_begin_is_not_in_the_next_one(level: str) -> None:
    waits = Waits()
    net, x = nn.Sequential(waits), torch.ones(2, 4)
    old: list[Any] = []
    new: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        with trace(out=old.append, level=level, every=1):
            make_net()(X)
            future = pool.submit(net, x)
            assert waits.begun.wait(10)
        with trace(out=new.append, level=level, every=1):
            make_net()(X)
            waits.go_on.set()
            future.result(10)
    for records in (old, new):
        assert not [a for a in of(Action, records) if a.action == "tracer_error"]
        seqs = [record.seq for record in records if isinstance(record, (Call, Action))]
        assert len(seqs) == len(set(seqs))
    assert {call.module for call in of(Call, old) if call.thread} == {"Sequential.0.first"}
    # What is entered in the new run is outside all others there.
    entered = [call for call in of(Call, new) if call.thread and call.op is None]
    assert [(call.module, call.parent) for call in entered] == [("Linear", None)]


def test_call_goes_on_while_another_thread_replays_one() -> None:
    waits = Waits()
    other, x = nn.Sequential(waits), torch.ones(2, 4)
    records: list[Any] = []

    class Fails(nn.Module):
        """Makes NaN; when it is run again, the call of the other thread comes to its end."""

        def forward(self, x: Tensor) -> Tensor:
            if slot.recorder.replaying:
                waits.go_on.set()
                future.result(10)
            return torch.log(x - 2)

    with ThreadPoolExecutor(1) as pool, trace(out=records.append, every=1) as t:
        future = pool.submit(other, x)
        assert waits.begun.wait(10)
        Fails()(X)
        t.step()
    assert [finding.code for finding in t.findings] == ["TT101"]
    calls = {call.module: call for call in of(Call, records) if call.thread and call.op is None}
    assert calls.keys() == {"", "0", "0.first", "0.second"}
    assert calls["0.second"].parent == calls["0"].seq
    assert not any(call.replay for call in calls.values())

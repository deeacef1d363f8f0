"""Runs that several threads begin, share and end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tensortrace import trace
from tensortrace.capture import active, tracer
from tensortrace.capture.active import slot
from tests.capture.lifecycle import X, make_net, process_state


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

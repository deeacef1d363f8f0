"""Runs that several threads begin, share and end."""

from __future__ import annotations

import sys
import textwrap
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
from tensortrace.capture.drafts import ActionDraft, CallDraft, ParamDraft
from tensortrace.capture.tensors import draft_of_head
from tensortrace.records import Action, Call, End, Param, Step
from tests.capture.lifecycle import X, make_net, of, process_state, read, run_script, train


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


# ---- two runs at the same time


class Meeting:
    """Two threads that take turns: each waits for its number."""

    def __init__(self) -> None:
        self._turn, self._changed = 0, threading.Condition()

    def at(self, turn: int) -> None:
        """Wait until it is this turn; what was done at the one before is over."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn >= turn - 1, 10)
            self._turn = max(self._turn, turn)
            self._changed.notify_all()


def test_block_of_another_thread_joins_the_run_in_flight_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, meeting = process_state(), Meeting()
    net, other = make_net(), nn.Linear(4, 4)
    inner = trace("second.jsonl", every=1)

    def first() -> None:
        with trace("first.jsonl", every=1) as t:
            meeting.at(1)
            net(X)
            meeting.at(4)  # what the other is doing while a step ends is passed over
            t.step()
            net(X)
            t.step()
            meeting.at(5)

    def second() -> None:
        meeting.at(2)
        with inner:
            for _ in range(3):
                other(X).sum()
                inner.step()
            meeting.at(3)
            meeting.at(6)

    together(first, second)
    assert process_state() == before
    assert together(lambda: process_state()["modes"]) == [[]]
    assert [path.name for path in folder.iterdir()] == ["first.jsonl"]
    assert inner.path == Path("first.jsonl")
    records = read(folder / "first.jsonl")
    assert len(of(End, records)) == 1
    calls = [call for call in of(Call, records) if call.module == "Linear"]
    assert len(calls) == 3
    assert all(call.thread for call in calls)
    assert {call.thread for call in of(Call, records) if call.module == ""} == {0}
    # Neither its calls nor its step() ended any of the other's steps.
    assert len(of(Step, records)) <= 3
    assert len([call for call in of(Call, records) if call.op == "sum" and call.thread]) == 3
    assert capsys.readouterr().err.count("another thread entered a trace of its own") == 1


def test_steps_go_on_in_the_thread_that_is_still_in_the_run() -> None:
    meeting, records = Meeting(), []
    net = make_net()

    def first() -> None:
        with trace(out=records.append, every=1):
            meeting.at(1)
            meeting.at(3)

    def second() -> None:
        meeting.at(2)
        with trace(out=records.append, every=1):
            meeting.at(4)
            done.wait(10)
            train(net, 4)

    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(first), pool.submit(second)]
        jobs[0].result(10)
        done.set()
        jobs[1].result(10)
    assert len(of(Step, records)) == 4
    assert of(End, records)[-1].updates == 4


def test_decorated_functions_that_meet_share_one_log(folder: Path) -> None:
    script = """
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from torch import nn
    from tensortrace import trace

    x = torch.ones(2, 4)

    @trace("first.jsonl", every=1)
    def first(within=bool):
        one(x)
        within()

    @trace("second.jsonl", every=1)
    def second(within=bool):
        two(x)
        within()

    one, two = nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1))
    with ThreadPoolExecutor(1) as pool:
        second()
        for i in range(10):
            first(lambda: pool.submit(second).result())
            first()
            pool.submit(second).result()
            pool.submit(second, lambda: first()).result()
    """
    done = run_script(textwrap.dedent(script), folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("another thread entered") == 1
    alone, shared = read(folder / "second.jsonl"), read(folder / "first.jsonl")
    # What it had before they met is all of its own log.
    assert [call.module for call in of(Call, alone)] == ["", "0"]
    assert len(of(Step, alone)) == 1
    calls = of(Call, shared)
    ones = [call for call in calls if call.module == ""]
    twos = [call for call in calls if call.module == "Sequential"]
    assert (len(ones), len(twos)) == (30, 30)
    # A call of another thread inside one is no step.
    assert len(of(Step, shared)) == 40


def test_a_decorated_function_called_in_several_threads_has_a_step_of_each_owner(
    often: None,
) -> None:
    before = process_state()
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    net, barrier = make_net(), threading.Barrier(3)

    @t
    def turn() -> None:
        net(X)

    def job() -> None:
        barrier.wait(10)
        for _ in range(20):
            turn()

    turn()
    together(job, job, job)
    t.close()
    assert process_state() == before
    steps = of(Step, records)
    # A call that another thread's step ends in is passed over, and counted.
    calls = [call for call in of(Call, records) if call.op is None]
    assert len(calls) + sum(step.dropped for step in steps) == 61 * len(list(net.modules()))
    assert 3 <= len(steps) <= 61
    assert [step.step for step in steps] == list(range(len(steps)))


def test_what_a_thread_reports_while_another_ends_the_step_is_of_the_next_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record said what an optimizer holds, came after the step's line, and no check saw it."""
    net = make_net()

    def report() -> None:
        slot.training.add(threading.current_thread())
        recorder.action("sync", of="late")
        recorder.pend(CallDraft(0, 99, {"update": 0, "op": "late"}))
        value, fields = draft_of_head(X), {"update": 0, "name": "late", "optimizer": 0}
        recorder.pend(ParamDraft(0, 98, fields, value, value))
        recorder.pend(ActionDraft(0, 97, {"action": "loss", "of": "late", "tensor": 5}))
        ended.wait()

    with trace("log.jsonl") as t:
        train(net, 1)
        recorder = t._recorder
        assert recorder is not None
        thread, ended = threading.Thread(target=report), threading.Event()
        close_step = recorder.journal.close_step

        def slowly(**closing: Any) -> None:
            if not thread.ident:
                thread.start()
                thread.join(0.3)  # it cannot go on while this one holds it up
            close_step(**closing)

        monkeypatch.setattr(recorder.journal, "close_step", slowly)
        t.step()
        ended.set()
        thread.join()
        train(net, 1)
        t.step()
    records = read(folder / "log.jsonl")
    assert [r.step for r in records] == sorted(r.step for r in records)
    # What names a tensor names one of the step before.
    late = [(a.action, a.step, a.tensor) for a in of(Action, records) if a.of == "late"]
    assert late == [("sync", 1, None), ("loss", 1, None)]
    assert not [call for call in of(Call, records) if call.op == "late"]
    assert not [param for param in of(Param, records) if param.name == "late"]
    assert [step.dropped for step in of(Step, records)] == [0, 2]


@pytest.mark.parametrize("what", ["predicts", "predicts without grad", "steps", "evaluates"])
def test_no_record_comes_after_the_line_of_its_step_whatever_another_thread_does(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader looks for what a step has before that step's line."""
    net, other = make_net(), nn.Sequential(nn.Linear(4, 4))
    other(X).sum().backward()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)

    def report() -> None:
        if what == "steps":
            sgd.step()
        elif what == "evaluates":
            other.eval()
        else:
            with torch.set_grad_enabled(what == "predicts"):
                other(X)

    records: list[Any] = []
    with trace(out=records.append, every=1) as t:
        other(X)  # its modules are described
        train(net, 1)
        recorder = t._recorder
        assert recorder is not None
        close_step, thread = recorder.journal.close_step, threading.Thread(target=report)

        def slowly(**closing: Any) -> None:
            close_step(**closing)
            if not thread.ident:
                thread.start()
                thread.join(0.3)  # it cannot go on while this one holds it up

        monkeypatch.setattr(recorder.journal, "close_step", slowly)
        t.step()
        thread.join()
        train(net, 1)
        t.step()
    over = -1
    for record in records[:-1]:  # the last is the end of the run
        assert record.step > over
        if isinstance(record, Step):
            over = record.step
    # The layer: its tensors have the ids of the other step. What calls it ends in the next one.
    dropped = [step.dropped for step in of(Step, records)]
    assert dropped == [0, 1 if what.startswith("predicts") else 0]


# ---- several threads that train


def learner(seed: int, **options: Any) -> Callable[[], None]:
    """One turn of training of a small network of its own; `options` are those of the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = options.pop("optimizer", torch.optim.SGD)(net.parameters(), lr=0.01, **options)

    def turn(before_step: Callable[[], object] = int, steps: bool = True) -> None:
        x = torch.randn(8, 3, generator=generator)
        nn.functional.cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before_step()
        if steps:
            optimizer.step()
            optimizer.zero_grad()

    return turn


def test_a_thread_that_trains_while_another_steps_leaves_the_function_modes_alone() -> None:
    begun, done, over = (threading.Event() for _ in range(3))
    first = threading.current_thread()
    depth = torch._C._len_torch_function_stack
    seen: list[int] = []
    met: list[bool] = []

    class Slow(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if threading.current_thread() is first and not begun.is_set():
                begun.set()
                met.append(done.wait(10))
            return super().step(closure)

    def work() -> None:
        met.append(begun.wait(10))
        turn = learner(1, optimizer=Slow)
        turn()
        turn()
        done.set()
        over.wait(10)
        seen.append(depth())

    records: list[Any] = []
    thread = threading.Thread(target=work)
    with trace(out=records.append):
        thread.start()
        turn = learner(0, optimizer=Slow)
        for _ in range(4):
            turn()
            seen.append(depth())
    over.set()
    thread.join()
    assert met == [True, True]
    assert seen == [1, 1, 1, 1, 0]
    losses = [a.step for a in of(Action, records) if a.action == "loss"]
    assert losses == [0, 1, 2, 3]
    assert [a.detail["threads"] for a in of(Action, records) if a.action == "threads"] == [2]


@pytest.mark.parametrize("apart", ["clips", "steps"])
def test_threads_that_train_in_turns_are_no_loop_in_the_wrong_order(apart: str) -> None:
    """One clips while the other steps; one steps while the other accumulates."""
    barrier, count = threading.Barrier(2), 24

    def second() -> None:
        turn = learner(1)
        for k in range(count):
            if apart == "clips":
                turn(lambda: (barrier.wait(10), barrier.wait(10)))
            else:
                barrier.wait(10)
                turn(steps=k % 8 == 7)

    thread = threading.Thread(target=second)
    with trace(out=lambda record: None) as t:
        thread.start()
        turn = learner(0)
        for _ in range(count):
            barrier.wait(10)
            turn()
            if apart == "clips":
                barrier.wait(10)
        thread.join()
    assert [f.code for f in t.findings if f.severity != "note"] == []


def test_a_thread_that_only_predicts_silences_no_check() -> None:
    net, dropout = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    records: list[Any] = []
    with trace(out=records.append) as t, ThreadPoolExecutor(1) as thread:
        for _ in range(6):
            x = thread.submit(dropout, torch.ones(4, 3)).result(10).detach()
            nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 1, 0])).backward()
            optimizer.step()  # and no zero_grad
    assert "TT206" in [f.code for f in t.findings]
    assert not [a for a in of(Action, records) if a.action == "threads"]


def test_a_thread_that_has_trained_and_ended_is_told_of_before_the_next_optimizer_step() -> None:
    net, lone = nn.Linear(3, 2), nn.Linear(3, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    target = torch.tensor([0, 1, 1, 0])

    def turn(model: nn.Module) -> None:
        nn.functional.cross_entropy(model(torch.randn(4, 3)), target).backward()

    records: list[Any] = []
    with trace(out=records.append) as t:
        for _ in range(8):
            thread = threading.Thread(target=turn, args=(lone,))
            turn(net)
            thread.start()
            thread.join()
            sgd.step()
            sgd.zero_grad()
    assert len([a for a in of(Action, records) if a.action == "threads"]) == 1
    assert [f.code for f in t.findings if f.severity != "note"] == []

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import json
import pickle
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import UsageError, trace
from tensortrace.capture.active import slot
from tensortrace.log import encode
from tensortrace.records import Call, End, Header, Step
from tests.builders import make_header
from tests.capture.lifecycle import (
    Raises,
    X,
    called,
    make_net,
    of,
    process_state,
    read,
    run_script,
    train,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- forms


def test_block_writes_a_log_with_header_steps_and_end(folder: Path) -> None:
    with trace():
        train(make_net(), 2)
    records = read(folder / "log.jsonl")
    assert [type(records[0]), type(records[-1])] == [Header, End]
    assert [step.step for step in of(Step, records)] == [0, 1]
    assert records[-1].why == "exit"
    assert records[-1].steps == 2


def test_block_gives_findings_path_and_report(folder: Path) -> None:
    t = trace("run.jsonl")
    assert (t.findings, t.ok, t.path) == ([], True, None)
    with pytest.raises(UsageError, match="not begun"):
        t.report()
    with t:
        train(make_net(poison=[0]), 1)
        assert "TT101" in t.report()
    assert t.path == Path("run.jsonl")
    assert [f.code for f in t.findings] == ["TT101"]
    assert not t.ok
    assert "TT101" in t.report()
    assert "\x1b" not in t.report()


def test_log_is_found_again_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "elsewhere").mkdir()
    with trace("run.jsonl") as t:
        train(make_net(poison=[0]), 1)
        here = t.report()
        monkeypatch.chdir("elsewhere")
        Path("run.jsonl").write_text("another file of that name")
        assert t.report().count("TT101") == here.count("TT101") > 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"open with: tensortrace view {folder / 'run.jsonl'}")
    assert "TT101" in t.report()
    assert "no page" not in t._repr_html_()
    monkeypatch.chdir(folder)
    assert t.report().splitlines()[:3] == here.splitlines()[:3]  # named as it was given


def test_log_is_found_again_where_its_folder_is_renamed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "before").mkdir()
    monkeypatch.chdir("before")
    with trace("run.jsonl") as t:
        train(make_net(poison=[0]), 1)
        (folder / "before").rename(folder / "after")
    assert "TT101" in t.report()


@pytest.mark.parametrize("fate", ["moved", "deleted"])
def test_a_log_that_is_gone_stops_no_program_that_asks_for_its_report(
    fate: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace("run.jsonl") as t:
        train(make_net(), 1)
        if fate == "moved":
            (folder / "run.jsonl").rename(folder / "elsewhere.jsonl")
        else:
            (folder / "run.jsonl").unlink()
        report = f"trace: no report: there is no file {folder / 'run.jsonl'}\n"
        assert t.report() == report
    assert t.report() == report
    assert t.findings == []
    line = capsys.readouterr().err.splitlines()[-1]
    gone = "; its log is no longer at run.jsonl: tensortrace view opens it where it is now"
    assert line == f"tensortrace: 1 step, nothing found{gone if fate == 'moved' else ''}"


def test_a_run_begins_where_the_working_folder_was_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with trace(folder / "run.jsonl"):
        make_net()(X)
    records = read(folder / "run.jsonl")
    assert [header.cwd for header in of(Header, records)] == [""]
    assert of(Call, records)


def test_report_of_a_run_without_a_file_is_a_usage_error() -> None:
    with trace(out=lambda record: None) as t:
        pass
    with pytest.raises(UsageError, match="out= is no path"):
        t.report()


@pytest.mark.parametrize("form", ["bare", "empty", "options"])
def test_each_call_of_a_decorated_function_is_a_step(form: str, folder: Path) -> None:
    decorator = {"bare": trace, "empty": trace(), "options": trace("log.jsonl", every=1)}[form]
    net = make_net()

    @decorator  # type: ignore[operator, untyped-decorator]
    def turn(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Say something."""
        result: torch.Tensor = net(x * scale) + net(x)
        return result

    assert (turn.__name__, turn.__doc__) == ("turn", "Say something.")
    assert list(inspect.signature(turn).parameters) == ["x", "scale"]
    for _ in range(3):
        assert turn(X, scale=2.0).equal(net(X * 2.0) + net(X))
    assert slot.recorder is None
    close(turn)
    records = read(folder / "log.jsonl")
    assert [step.step for step in of(Step, records)] == [0, 1, 2]
    assert [step for step, path in called(records) if path == ""] == [0, 0, 1, 1, 2, 2]
    assert records[-1].why == "exit"


def close(function: Any) -> None:
    """Close the trace of a decorated function, which nothing else names."""
    gc.collect()
    cells = inspect.getclosurevars(function).nonlocals
    cells["turns"].block.close()


def test_methods_of_every_kind_can_be_decorated() -> None:
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    net = make_net()

    class Decorated:
        @t
        def method(self, x: torch.Tensor) -> Any:
            assert isinstance(self, Decorated)
            return net(x)

        @t
        @staticmethod
        def inner_static(x: torch.Tensor) -> Any:
            return net(x)

        @staticmethod
        @t
        def outer_static(x: torch.Tensor) -> Any:
            return net(x)

        @t  # type: ignore[arg-type]
        @classmethod
        def inner_class(cls, x: torch.Tensor) -> Any:
            assert cls is Decorated
            return net(x)

        @classmethod
        @t
        def outer_class(cls, x: torch.Tensor) -> Any:
            assert cls is Decorated
            return net(x)

    it = Decorated()
    wanted = net(X)
    for function in (it.method, it.inner_static, it.outer_static, it.inner_class, it.outer_class,
                     Decorated.inner_static, Decorated.inner_class):  # fmt: skip
        assert function(X).equal(wanted)
    t.close()
    assert [step.step for step in of(Step, records)] == list(range(7))


@pytest.mark.parametrize("form", [trace, trace()])
def test_class_cannot_be_decorated(form: Any) -> None:
    with pytest.raises(UsageError, match="decorate its method") as caught:

        @form
        class Net(nn.Module):
            pass

    assert "Net" in str(caught.value)


def test_generator_is_traced_while_it_runs_and_each_item_is_a_step() -> None:
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    net = make_net()

    @t
    def turns(n: int) -> Generator[int, str, str]:
        got = []
        for i in range(n):
            net(X)
            got.append((yield i))
        return ",".join(got)

    assert inspect.isgeneratorfunction(turns)
    items = turns(3)
    assert next(items) == 0
    assert slot.recorder is None
    net(X)  # suspended: not traced
    assert items.send("a") == 1
    assert items.send("b") == 2
    with pytest.raises(StopIteration) as stop:
        items.send("c")
    assert stop.value.value == "a,b,c"
    t.close()
    assert [step for step, path in called(records) if path == ""] == [0, 1, 2]
    assert records[-1].why == "exit"


def test_generator_gets_what_is_thrown_into_it_and_is_closed() -> None:
    done: list[str] = []

    @trace(out=lambda record: None)
    def turns() -> Generator[int, None, None]:
        try:
            try:
                yield 1
            except ValueError as error:
                done.append(str(error))
                yield 2
            yield 3
        finally:
            done.append("closed")

    items = turns()
    assert next(items) == 1
    assert items.throw(ValueError("thrown")) == 2
    assert next(items) == 3
    items.close()
    assert done == ["thrown", "closed"]
    with pytest.raises(StopIteration):
        next(items)
    with pytest.raises(KeyError, match="from outside"):
        turns().throw(KeyError("from outside"))
    close(turns)


def test_async_functions_interleave() -> None:
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    nets = {"a": nn.Linear(4, 1), "b": nn.Sequential(nn.Linear(4, 1))}

    @t
    async def turn(name: str) -> str:
        for _ in range(2):
            nets[name](X)
            assert slot.recorder is not None
            await asyncio.sleep(0)
        return name

    async def main() -> list[str]:
        both = asyncio.gather(turn("a"), turn("b"))
        await asyncio.sleep(0)
        assert slot.recorder is None
        return await both

    assert inspect.iscoroutinefunction(turn)
    assert asyncio.run(main()) == ["a", "b"]
    t.close()
    assert len([path for _, path in called(records) if not path.endswith("0")]) == 4
    assert records[-1].why == "exit"


def test_async_generator_gives_the_same_items_and_ends_without_failure() -> None:
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    net = make_net()
    seen: list[Any] = []

    @t
    async def turns(n: int) -> AsyncGenerator[int, str]:
        try:
            for i in range(n):
                await asyncio.sleep(0)
                net(X)
                seen.append((yield i))
        finally:
            seen.append("closed")

    async def main() -> None:
        items = turns(2)
        assert await anext(items) == 0
        assert slot.recorder is None
        assert await items.asend("sent") == 1
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        early = turns(5)
        async for _ in early:
            break
        await early.aclose()

    assert inspect.isasyncgenfunction(turns)
    asyncio.run(main())
    t.close()
    assert seen == ["sent", None, "closed", "closed"]
    assert records[-1].why == "exit"
    assert [step for step, path in called(records) if path == ""] == [0, 1, 2]


@pytest.mark.parametrize("cancels", [True, False])
def test_a_cancelled_task_is_interrupted(folder: Path, cancels: bool) -> None:
    async def training() -> None:
        with trace():
            train(make_net(), 1)
            await asyncio.sleep(0)
            if not cancels:
                raise TimeoutError

    async def main() -> None:
        task = asyncio.create_task(training())
        await asyncio.sleep(0)
        if cancels:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancels else TimeoutError):
            await task

    asyncio.run(main())
    end = read(folder / "log.jsonl")[-1]
    assert end.why == ("interrupt" if cancels else "exception")


def test_cancelled_task_leaves_nothing_behind() -> None:
    before = process_state()
    t = trace(out=lambda record: None)

    @t
    async def forever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    t.close()
    assert process_state() == before


def test_recursion_is_one_step() -> None:
    records: list[Any] = []
    t = trace(out=records.append, every=1)
    net = make_net()

    @t
    def descend(n: int) -> int:
        net(X)
        return descend(n - 1) + 1 if n else 0

    assert descend(3) == 3
    assert descend(0) == 0
    t.close()
    assert [step for step, path in called(records) if path == ""] == [0, 0, 0, 0, 1]


def test_decorated_function_joins_the_block_that_it_is_called_in(folder: Path) -> None:
    net = make_net(poison=[1])

    @trace("inner.jsonl")
    def turn() -> None:
        train(net, 1)

    with trace("outer.jsonl") as outer:
        for _ in range(3):
            turn()
    assert logs(folder) == ["outer.jsonl"]
    assert len(outer.findings) == 1
    assert len(of(Step, read(folder / "outer.jsonl"))) == 3


# ---- one object is one run


def test_nested_block_joins_the_outer_run(folder: Path) -> None:
    with trace("outer.jsonl", every=1) as outer:
        train(make_net(), 1)
        with trace("inner.jsonl", every=1) as inner:
            train(make_net(poison=[0]), 1)
            inner.step()
        assert slot.recorder is not None
        assert inner.findings == outer.findings
        train(make_net(), 1)
    assert logs(folder) == ["outer.jsonl"]
    assert [f.code for f in inner.findings] == ["TT101"]
    assert inner.findings == outer.findings
    assert inner.ok is outer.ok is False
    assert inner.path == outer.path == Path("outer.jsonl")
    assert inner.report() == outer.report()
    records = read(folder / "outer.jsonl")
    assert len(of(End, records)) == 1
    assert len([1 for _, path in called(records) if path.endswith("0")]) == 3


def test_error_caught_around_a_nested_block_does_not_end_the_run(folder: Path) -> None:
    with trace():
        try:
            with trace():
                raise ValueError("caught")
        except ValueError:
            pass
        train(make_net(), 1)
    end = read(folder / "log.jsonl")[-1]
    assert (end.why, end.failure, end.steps) == ("exit", None, 1)


def test_block_entered_again_goes_on_in_the_same_log(folder: Path) -> None:
    t = trace(every=1)
    net = make_net()
    for times in range(1, 4):
        with t:
            train(net, 2)
        records = read(folder / "log.jsonl")
        assert [step.step for step in of(Step, records)] == list(range(2 * times))
        assert len(of(End, records)) == len(of(Header, records)) == 1
        assert records[-1].steps == records[-1].updates == 2 * times
        assert records[-1].records == len(records) - 1
    assert logs(folder) == ["log.jsonl"]


def test_decorator_and_block_of_one_object_are_one_run(folder: Path) -> None:
    t = trace(every=1)
    net = make_net()

    @t
    def turn() -> None:
        net(X)

    turn()
    with t:
        turn()
        turn()
    turn()
    t.close()
    records = read(folder / "log.jsonl")
    assert len(of(End, records)) == 1
    assert len([1 for _, path in called(records) if path == ""]) == 4


def test_device_that_cannot_be_cut_does_not_break_a_second_block() -> None:
    t = trace("/dev/null")
    for _ in range(2):
        with t:
            train(make_net(), 1)


def test_close_ends_the_run_for_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = process_state()
    t = trace()
    with t:
        train(make_net(), 1)
        t.close()
        assert slot.recorder is None
        train(make_net(), 1)
    t.close()
    with t:
        train(make_net(), 1)
    assert process_state() == before
    records = read(folder / "log.jsonl")
    assert len(of(Step, records)) == 1
    assert records[-1].why == "exit"
    err = capsys.readouterr().err
    assert err.count("tensortrace: 1 step") == err.count("tensortrace:") == 1


def test_interleaved_blocks_of_two_generators_are_one_run(folder: Path) -> None:
    def traced() -> Generator[None, None, None]:
        with trace(every=1):
            make_net()(X)
            yield
            make_net()(X)

    before = process_state()
    first, second = traced(), traced()
    next(first)
    next(second)
    assert list(first) == []  # leaves before the other, which it began before
    assert slot.recorder is not None
    assert list(second) == []
    assert process_state() == before
    records = read(folder / "log.jsonl")
    assert len([1 for _, path in called(records) if path.endswith("0")]) == 4
    assert len(of(End, records)) == 1


def test_two_runs_report_every_call_once(folder: Path) -> None:
    records: list[Any] = []
    net = make_net()
    first = trace(out=lambda record: None)
    first(lambda: net(X))()  # its hooks stay
    with trace(out=records.append, every=1):
        train(net, 2)
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler.scale(net(X).sum() * float("inf")).backward()
        scaler.step(optimizer)
    first.close()
    calls = [call for call in of(Call, records) if call.op is None and call.phase == "forward"]
    assert len(calls) == 3 * 4
    assert len({(call.step, call.seq) for call in of(Call, records)}) == len(of(Call, records))
    from tensortrace.records import Optimizer

    assert [o.skipped for o in of(Optimizer, records)] == [False, False, True]


def test_run_closed_after_one_that_began_later_leaves_nothing() -> None:
    before = process_state()
    first, second = (trace(out=lambda record: None) for _ in range(2))
    first(lambda: make_net()(X))()
    second(lambda: make_net()(X))()
    first.close()
    assert process_state() != before
    second.close()
    assert process_state() == before


# ---- files


def test_second_object_writes_a_second_log_and_leaves_the_first(folder: Path) -> None:
    for _ in range(3):
        with trace():
            train(make_net(), 1)
        gc.collect()  # the lock of the one before is gone
    assert logs(folder) == ["log-2.jsonl", "log-3.jsonl", "log.jsonl"]


def test_log_of_an_earlier_process_is_kept_as_prev(folder: Path) -> None:
    import os
    import socket

    for header in (
        make_header(pid=os.getpid() + 1, hostname=socket.gethostname(), time_ns=2**62),
        make_header(pid=os.getpid(), hostname="elsewhere", time_ns=2**62),
        # A process of the same number, before this one.
        make_header(pid=os.getpid(), hostname=socket.gethostname(), time_ns=1),
    ):
        (folder / "log.jsonl").write_bytes(encode(header))
        with trace():
            pass
        assert (folder / "log.prev.jsonl").read_bytes() == encode(header)
        assert logs(folder) == ["log.jsonl", "log.prev.jsonl"]
        (folder / "log.jsonl").unlink()


@pytest.mark.parametrize("text", ["my notes\n", '{"kind":"other"}\n', "\x00\x01"])
def test_file_that_is_no_log_is_never_overwritten(text: str, folder: Path) -> None:
    (folder / "log.jsonl").write_text(text)
    before = process_state()
    with pytest.raises(UsageError, match="not a tensortrace log"), trace():
        raise AssertionError("the block must not run")
    assert (folder / "log.jsonl").read_text() == text
    assert process_state() == before


def test_each_rank_writes_its_own_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with trace():
            pass
    assert logs(folder) == ["log.rank0.jsonl", "log.rank3.jsonl"]
    header = read(folder / "log.rank3.jsonl")[0]
    assert (header.rank, header.world_size) == (3, 4)


def test_place_that_cannot_be_written_is_one_clear_error_at_entry(folder: Path) -> None:
    (folder / "file").write_text("")
    before = process_state()
    t = trace(folder / "file" / "log.jsonl")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"cannot write a log to .*file/log.jsonl"), t:
            raise AssertionError("the block must not run")
    with pytest.raises(UsageError, match="folder"), trace(str(folder)):
        raise AssertionError("the block must not run")
    assert process_state() == before


def test_text_file_is_refused(folder: Path) -> None:
    with (
        (folder / "log.jsonl").open("w") as file,
        pytest.raises(UsageError, match="'wb'"),
        trace(file),  # type: ignore[call-overload]
    ):
        raise AssertionError("the block must not run")


def test_thousand_traces_grow_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net()
    before = process_state()
    hooks = [p._backward_hooks for p in net.parameters()]
    assert hooks == [None] * 4
    for i in range(1000):
        with trace(out=lambda record: None):
            if i % 100 == 0:
                net(X).sum().backward()
    assert process_state() == before
    assert all(not p._backward_hooks for p in net.parameters())


# ---- exceptions


@pytest.mark.parametrize(
    ("error", "why", "failure"),
    [
        (ValueError("wrong shape"), "exception", ("ValueError", "wrong shape", "1")),
        (KeyboardInterrupt(), "interrupt", ("KeyboardInterrupt", "", "1")),
        (asyncio.CancelledError(), "interrupt", ("CancelledError", "", "1")),
        (SystemExit(3), "exit", None),
        (GeneratorExit(), "exit", None),
    ],
)
def test_end_says_why_and_nothing_is_left(
    error: BaseException, why: str, failure: Any, folder: Path
) -> None:
    before = process_state()
    net = nn.Sequential(nn.Linear(4, 4), Raises(error))
    net.requires_grad_(False)
    with pytest.raises(type(error)) as caught, trace():
        net(X)
    assert caught.value is error
    assert process_state() == before
    assert all(p._backward_hooks is None for p in net.parameters())
    end = read(folder / "log.jsonl")[-1]
    assert end.why == why
    if failure is None:
        assert end.failure is None
        return
    assert (end.failure.type, end.failure.message, end.failure.module) == failure
    location = end.failure.location
    assert (location.function, location.code) == ("Raises.forward", "raise self.error")
    assert location.file.endswith("lifecycle.py")


def test_error_outside_modules_names_no_module(folder: Path) -> None:
    for _ in range(3):  # an error of the same address was met inside a module before
        with pytest.raises(ValueError, match="outside"), trace("log.jsonl"):
            for path in ("caught", "again"):
                with contextlib.suppress(ValueError):
                    Raises(ValueError(path))(X)
            with contextlib.suppress(KeyboardInterrupt):
                Raises(KeyboardInterrupt())(X)
            raise ValueError("outside")
    for path in folder.iterdir():
        failure = read(path)[-1].failure
        assert (failure.message, failure.module) == ("outside", None)
        assert failure.location.code == 'raise ValueError("outside")'


def test_error_caught_inside_is_not_the_end(folder: Path) -> None:
    with trace(every=1):
        for error in (ValueError(), KeyboardInterrupt()):
            with contextlib.suppress(ValueError, KeyboardInterrupt):
                nn.Sequential(Raises(error))(X)
            (X * 2).sum()
        train(make_net(), 1)
        (X * 3).sum()
    records = read(folder / "log.jsonl")
    assert (records[-1].why, records[-1].failure) == ("exit", None)
    raised = [call for call in of(Call, records) if call.exception]
    assert {call.exception for call in raised} == {"ValueError"}
    # Torch runs no hook for the interrupt: ops outside modules are seen from the next call on.
    assert [call.op for call in of(Call, records)].count("mul") == 2
    # The module after the interrupt is outermost again.
    assert [call.parent for call in of(Call, records) if call.module == "0"][-1] is not None


def test_failed_call_of_a_decorated_function_can_be_followed_by_others(folder: Path) -> None:
    @trace
    def turn(fail: bool) -> None:
        make_net()(X)
        if fail:
            raise ValueError("once")

    turn(False)
    with pytest.raises(ValueError, match="once"):
        turn(True)
    assert read(folder / "log.jsonl")[-1].failure.message == "once"
    turn(False)
    close(turn)
    records = read(folder / "log.jsonl")
    assert len(of(End, records)) == 1
    assert records[-1].why == "exit"
    assert len(of(Step, records)) == 3


def test_error_whose_text_cannot_be_read_is_still_the_users(folder: Path) -> None:
    class BadError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(BadError), trace():
        raise BadError
    failure = read(folder / "log.jsonl")[-1].failure
    assert (failure.type, failure.message) == ("BadError", "(its message cannot be read)")


def test_generator_that_is_dropped_ends_its_block(folder: Path) -> None:
    def traced() -> Generator[None, None, None]:
        with trace():
            make_net()(X)
            yield

    before = process_state()
    items = traced()
    next(items)
    del items
    gc.collect()
    assert process_state() == before
    assert read(folder / "log.jsonl")[-1].why == "exit"


# ---- switching off


def test_environment_turns_everything_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTRACE", "OFF")
    before = process_state()

    def function() -> int:
        return 3

    assert trace(function) is function
    assert trace("x.jsonl")(function) is function
    with trace() as t:
        assert process_state() == before
        t.step()
        train(make_net(poison=[0]), 1)
    assert (t.findings, t.ok, t.path) == ([], True, None)
    assert t.report() == "trace: Tracing is switched off (TENSORTRACE).\n"
    t.close()
    assert logs(folder) == []


# ---- words on stderr


def test_findings_are_printed_once_and_the_run_ends_with_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace() as t:
        train(make_net(poison=[1, 2]), 4)
        during = capsys.readouterr().err
    after = capsys.readouterr().err
    assert during.count("TT101") == 1
    assert during.count("tensortrace:") == 0
    assert after == "tensortrace: 4 steps, 1 error; open with: tensortrace view log.jsonl\n"
    assert len(t.findings) == 1


def test_notes_are_only_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with trace() as t:
        net = nn.Linear(4, 4)
        for _ in range(2):
            scores = net(X).masked_fill(torch.eye(2, 4).bool(), -torch.inf)
            scores.softmax(-1).square().sum().backward()
    assert {f.severity for f in t.findings} <= {"note"}
    err = capsys.readouterr().err
    assert "TT1" not in err
    notes = len(t.findings)
    wanted = f"{notes} note{'s' * (notes != 1)}" if notes else "nothing found"
    assert err == f"tensortrace: 2 steps, {wanted}; open with: tensortrace view log.jsonl\n"


@pytest.mark.parametrize("stream", [None, "closed"])
def test_stderr_may_be_missing_or_closed(
    stream: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    closed = (folder / "stderr").open("w")
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream else None)
    with trace() as t:
        train(make_net(poison=[0]), 1)
    assert not t.ok
    assert capsys.readouterr().out == ""


# ---- processes


FORK = """
import os, json
from torch import nn
from torch.utils.data import DataLoader
from tensortrace import trace
from tensortrace.capture.active import slot

net = nn.Linear(4, 1)
x = torch.ones(2, 4)

@trace("decorated.jsonl", every=1)
def turn(fail=False):
    net(x)
    if fail:
        raise ValueError

class Data:
    def __len__(self): return 4
    def __getitem__(self, i):
        turn()
        with trace("worker.jsonl" if i < 0 else os.devnull): pass
        return torch.full((4,), float(i))

def child(act):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0

turn()
try:
    turn(fail=True)
except ValueError:
    pass
size = os.path.getsize("decorated.jsonl")
child(turn)
assert os.path.getsize("decorated.jsonl") == size

t = trace("log.jsonl", every=1)
block = t.__enter__()
net(x)

def leave():
    assert slot.recorder is None
    net(x)
    t.step()
    t.__exit__(None, None, None)
    with t:
        net(x)
    t.close()
    assert torch._C._len_torch_function_stack() == 0

child(leave)
batches = list(DataLoader(Data(), batch_size=2, num_workers=2))
assert torch.cat(batches)[:, 0].tolist() == [0, 1, 2, 3]
net(x)
t.__exit__(None, None, None)
"""


def test_forked_child_is_not_traced_and_writes_nothing(folder: Path) -> None:
    done = run_script(FORK, folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    records = read(folder / "log.jsonl")
    assert len([1 for _, path in called(records) if path == ""]) == 2
    assert len(of(End, records)) == 1
    assert done.stderr.count("log.jsonl") == 1
    decorated = read(folder / "decorated.jsonl")
    assert len([1 for _, path in called(decorated) if path == ""]) == 2


def test_interpreter_exit_closes_the_log_of_a_decorated_function(folder: Path) -> None:
    done = run_script(
        "from tensortrace import trace\n"
        "net = torch.nn.Linear(4, 1)\n"
        "@trace\n"
        "def turn():\n"
        "    net(torch.ones(2, 4)).sum().backward()\n"
        "for _ in range(3): turn()\n"
        "import sys; sys.exit(5)\n",
        folder,
    )
    assert done.returncode == 5
    assert done.stderr == (
        "tensortrace: 3 steps, nothing found; open with: tensortrace view log.jsonl\n"
    )
    records = read(folder / "log.jsonl")
    assert (records[-1].why, records[-1].steps) == ("exit", 3)
    assert len(of(End, records)) == 1


def test_every_line_is_strict_json(folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with trace(every=1):
        train(make_net(poison=[1]), 3)
    for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line, parse_constant=refuse)
        assert next(iter(record)) == "kind"
        assert isinstance(record["step"], int)


# ---- copies


class Holder(nn.Module):
    """A model that holds the trace of its own training."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.trace = make_net(), trace("held.jsonl", **options)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_model_that_holds_its_trace_is_copied_while_that_runs(folder: Path, copied: Any) -> None:
    model = Holder()
    with model.trace:
        train(model.inner, 1)
        average = copied(model)
        assert average.trace is model.trace
        assert copied(model.trace) is model.trace
        del average
        gc.collect()
        train(model.inner, 1)
    records = read(folder / "held.jsonl")
    assert [step.step for step in of(Step, records)] == [0, 1]
    assert records[-1].why == "exit"
    assert logs(folder) == ["held.jsonl"]


def test_a_pickled_trace_is_one_with_the_same_options_that_has_not_begun(folder: Path) -> None:
    model = Holder(every=3, modules=iter(["inner*"]), checks={"TT201.ratio": 50}, stop_on="error")
    with model.trace:
        loaded = pickle.loads(pickle.dumps(model))
        train(model, 1)
    assert loaded.trace is not model.trace
    assert (loaded.trace.path, loaded.trace.findings) == (None, [])
    (folder / "held.jsonl").unlink()
    with loaded.trace:
        train(loaded, 1)
    header = read(folder / "held.jsonl")[0]
    assert header.options.keys() == {"every", "modules", "checks", "stop_on"}
    assert {c.module for c in of(Call, read(folder / "held.jsonl")) if c.module} > {"inner"}


def test_a_trace_that_was_given_a_model_is_pickled_with_it(folder: Path) -> None:
    net = make_net()
    pair = {"trace": trace(model=net, source=False), "net": net, "other": make_net()}
    loaded = pickle.loads(pickle.dumps(pair))
    with loaded["trace"]:
        train(loaded["other"], 1)
        train(loaded["net"], 1)
    records = read(folder / "log.jsonl")
    assert records[0].options == {"source": False}
    assert {c.module for c in of(Call, records) if c.module} > {"Sequential", "Sequential.0", "0"}

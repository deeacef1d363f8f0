"""Python's trace function: chained and put back, at rest in our own code; results stay the same."""

from __future__ import annotations

import bdb
import ctypes
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import Lines, trace
from tensortrace.capture.active import here, slot
from tests.capture.lines.lines_of import Seen

pytestmark = pytest.mark.usefixtures("closing_folder")

HERE = __file__


class Coverage:
    """A trace function that counts lines, and that takes the first place again at each call.

    As coverage does, it counts a line to the function that began last and has not ended.
    """

    def __init__(self, again: bool) -> None:
        self.lines: list[int] = []
        self.again = again
        self.me = self.trace
        self.open: list[FrameType] = []

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "call":
            self.open.append(frame)
            if self.again:
                sys.settrace(self.me)  # as coverage's tracer in C does
        elif event == "return":
            assert self.open.pop() is frame
        if event == "line" and self.open[-1].f_code.co_filename == HERE:
            self.lines.append(frame.f_lineno)
        return self.me


def program(n: int) -> int:
    total = 0
    for i in range(n):
        total += inner(i)
    return total


def inner(i: int) -> int:
    doubled = i * 2
    return doubled


def measured(function: Any, again: bool) -> list[int]:
    before = sys.gettrace()
    coverage = Coverage(again)
    sys.settrace(coverage.me)
    try:
        function(5)
        assert sys.gettrace() is coverage.me
    finally:
        sys.settrace(before)
    assert coverage.open == []
    return coverage.lines


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_trace_function_that_was_there_sees_every_line_that_it_saw_before(
    again: bool, depth: int
) -> None:
    seen = Seen()
    traced = trace(out=seen.take, lines=Lines(depth=depth), every=1)(program)
    assert measured(traced, again) == measured(program, again)
    assert not seen.faults
    assert seen.changes("total")[-1] == "20"


def test_a_trace_function_sees_the_rest_of_the_function_around_a_block() -> None:
    def function(n: int) -> int:
        before = inner(n)
        with trace(out=seen.take, lines=True, every=1):
            within = before + 1
        after = within + 1
        return inner(after)

    def plain(n: int) -> int:
        return n

    seen = Seen()
    first = function.__code__.co_firstlineno
    lines = measured(function, True)
    assert [line - first for line in lines if line > first] == [1, 2, 3, 2, 4, 5]
    assert seen.changes("within") == ["11"]
    assert plain(1) == 1


@pytest.fixture(params=["resting", "taken off"])
def resting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which the trace function rests in our own code."""
    if request.param == "taken off":
        monkeypatch.setattr(ctypes, "pythonapi", object())  # as in Python 3.10


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_a_trace_function_sees_a_loop_end_in_which_each_op_is_recorded(
    again: bool, every: int
) -> None:
    def function(n: int) -> None:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with trace(out=seen.take, lines=True, every=every):
            for _ in range(n):
                optimizer.zero_grad()
                net(torch.ones(1, 2)).exp().sum().backward()
                optimizer.step()

    def generate() -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield torch.ones(2) * 2

    def both(n: int) -> None:
        function(n)
        for _ in trace(out=seen.take, lines=True, every=every)(generate)():
            inner(n)
        trace(out=seen.take, lines=True, every=every)(fail)()

    def fail() -> None:
        with pytest.raises(RuntimeError):
            torch.ones(2) @ torch.ones(3)

    seen = Seen()
    lines = measured(both, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORTRACE", "off")
        assert lines == measured(both, again)
    assert not seen.faults
    assert seen.changes("_")


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_trace_function_is_what_it_was(fails: bool) -> None:
    def function() -> None:
        if fails:
            raise ValueError

    before = sys.gettrace()
    frame_before = sys._getframe().f_trace
    seen = Seen()
    if fails:
        with pytest.raises(ValueError):
            trace(out=seen.take, lines=True)(function)()
    else:
        trace(out=seen.take, lines=True)(function)()
    assert sys.gettrace() is before
    with trace(out=Seen().take, lines=True):
        assert sys.gettrace() is not before
    assert sys.gettrace() is before
    assert sys._getframe().f_trace is frame_before


def test_a_step_that_is_not_traced_keeps_no_tensor_alive() -> None:
    def function() -> list[bool]:
        net = nn.Linear(2, 1)
        alive: list[bool] = []
        losses: list[weakref.ref[torch.Tensor]] = []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with trace(out=seen.take, lines=True, every=1000):
            for _ in range(6):
                loss = net(torch.ones(1, 2)).sum()
                losses.append(weakref.ref(loss))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                alive.append(losses[0]() is not None)
        return alive

    seen = Seen()
    assert function() == [True, False, False, False, False, False]
    assert not seen.faults


def test_what_fails_of_ours_in_a_block_inside_another_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensortrace.capture.lines.tracer import LineTracer

    def fail(*given: Any) -> None:
        raise RuntimeError("ours")

    seen = Seen()
    monkeypatch.setattr(LineTracer, "enter", fail)
    with trace(out=seen.take), trace(lines=True):
        pass
    assert len(seen.faults) == 1


@pytest.mark.parametrize("fails", ["enter", "_uninstall", "_install"])
def test_what_fails_of_ours_hides_no_exception_of_the_users(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensortrace.capture.lines.frames import FrameTrace
    from tensortrace.capture.lines.tracer import LineTracer

    def fail(*given: Any) -> None:
        raise RuntimeError("ours")

    before = sys.gettrace()
    cls = FrameTrace if fails == "enter" else LineTracer
    seen = Seen()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cls, fails, fail)
            with pytest.raises(ValueError, match="theirs"):  # noqa: SIM117 ours is the inner one
                with trace(out=seen.take, lines=True):
                    raise ValueError("theirs")
    finally:
        sys.settrace(before)
    assert len(seen.faults) == 1
    assert slot.recorder is None


def test_blocks_of_generators_end_in_any_order() -> None:
    def generate(start: int) -> Iterator[int]:
        with trace(out=seen.take, lines=True, every=1):
            with trace(lines=True):
                value = start
            yield value
            value += 1
            yield value
        frames.append(sys._getframe().f_trace)
        value += 100
        yield value

    seen = Seen()
    frames: list[Any] = []
    before = sys.gettrace()
    first, second = generate(1), generate(11)
    assert [next(first), next(second), next(first), next(first)] == [1, 11, 2, 102]
    assert sys.gettrace() is not before
    assert [next(second), next(second)] == [12, 112]
    assert sys.gettrace() is before
    assert frames == [None, None]
    assert not seen.faults
    assert sorted(seen.changes("value")) == ["1", "11", "12", "2"]


def test_a_trace_function_before_ours_is_alone_in_steps_that_are_not_traced() -> None:
    def function() -> list[bool]:
        with trace(out=Seen().take, lines=True, every=2):
            net, found = nn.Linear(1, 1), []
            for _ in torch.utils.data.DataLoader([1, 2, 3, 4], batch_size=1):  # type: ignore[arg-type]
                net(torch.ones(1))
                found.append(sys.gettrace() is coverage.me)
            return found

    coverage = Coverage(True)
    before = sys.gettrace()
    sys.settrace(coverage.me)
    try:
        found = function()
    finally:
        sys.settrace(before)
    assert found == [False, True, False, True]


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize("every", [1, 2])
def test_however_ours_rests_the_one_before_is_put_back(every: int) -> None:
    def watch(frame: FrameType, event: str, arg: Any) -> None:
        pass

    def function() -> list[bool]:
        net = nn.Linear(2, 1)
        on = []
        with trace(out=seen.take, lines=True, every=every):
            for _ in torch.utils.data.DataLoader([1, 2, 3, 4], batch_size=1):  # type: ignore[arg-type]
                net(torch.ones(1, 2))
                on.append(sys.gettrace() not in (before, None))
        return on

    seen = Seen()
    real = sys.gettrace()
    for before in (real, watch):
        sys.settrace(before)
        try:
            on = function()
            after = sys.gettrace()
        finally:
            sys.settrace(real)
        assert after is before
        assert on == [i % every == 0 for i in range(4)]
    assert not seen.faults
    assert here.rest is here.go_on is bool


@pytest.mark.usefixtures("resting")
def test_a_trace_function_set_inside_stays() -> None:
    def watch(frame: FrameType, event: str, arg: Any) -> None:
        pass

    before = sys.gettrace()
    try:
        with trace(out=Seen().take, lines=True):
            sys.settrace(watch)
            torch.ones(2)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is watch


@pytest.mark.usefixtures("resting")
def test_after_an_interrupt_in_our_own_code_the_one_before_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensortrace.capture.lines.frames import FrameTrace

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        pass

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    def function() -> None:
        with trace(out=Seen().take, lines=True):
            monkeypatch.setattr(FrameTrace, "_look", interrupt)
            torch.ones(2)

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        with pytest.raises(KeyboardInterrupt):
            function()
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is watch
    assert here.busy == 0


class Debugger(bdb.Bdb):
    """Steps through everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[tuple[str, int]] = []

    def user_line(self, frame: FrameType) -> None:
        if frame.f_code.co_filename == HERE:
            self.stops.append((frame.f_code.co_name, frame.f_lineno))
        self.set_step()


def test_a_debugger_steps_through_as_without_lines() -> None:
    def stops(function: Any) -> list[tuple[str, int]]:
        debugger = Debugger()
        debugger.runcall(function, 2)
        return [stop for stop in debugger.stops if stop[0] in ("program", "inner")]

    seen = Seen()
    traced = trace(out=seen.take, lines=True, every=1)(program)
    assert stops(traced) == stops(program)
    assert seen.changes("i") == ["0", "1"]


def test_a_debugger_that_is_started_inside_stays_when_the_block_ends() -> None:
    before = sys.gettrace()
    debugger = Debugger()
    debugger.reset()
    debugger.set_step()
    seen = Seen()
    try:
        with trace(out=seen.take, lines=True):
            sys.settrace(debugger.trace_dispatch)
        assert sys.gettrace() == debugger.trace_dispatch
    finally:
        sys.settrace(before)
    assert not seen.faults


def test_our_own_code_is_not_told_to_the_trace_function() -> None:
    told: list[str] = []

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        told.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    net = nn.Linear(2, 1)

    def function() -> None:
        y = net(torch.ones(1, 2)) + 1
        y.sum().backward()

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        trace(out=Seen().take, lines=True, every=1)(function)()
    finally:
        sys.settrace(before)
    assert "tensors.py:identify" not in told
    assert "module.py:_call_impl" in told


def test_other_threads_are_left_alone() -> None:
    found: list[Any] = []
    seen = Seen()

    def work() -> None:
        found.append(sys.gettrace())
        inner(1)

    with trace(out=seen.take, lines=Lines(depth=3)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [threading.gettrace()]
    assert {line.thread for line in seen.lines} == {0}


def test_a_decorated_function_is_followed_in_whichever_thread_it_runs() -> None:
    seen = Seen()
    traced = trace(out=seen.take, lines=True, every=1)(program)
    threads = [threading.Thread(target=traced, args=(3,)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not seen.faults
    assert [line.what for line in seen.lines].count("return") == 2


# ---- neutral


def train(steps: int) -> tuple[list[float], list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 4)
        noise = torch.rand(6, 1)
        loss = (net(x) - noise).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in net.parameters()], torch.get_rng_state()


def test_training_is_the_same_to_the_bit() -> None:
    plain = train(4)
    options = Lines(depth=4, watch=("net[0].weight.mean()",), watch_explode=("net",), thin=False)
    seen = Seen()
    traced = trace(out=seen.take, lines=options, every=1)(train)(4)
    assert not seen.faults
    assert traced[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(traced[1], plain[1], strict=True))
    assert torch.equal(traced[2], plain[2])


def test_no_function_mode_of_the_users_sees_us() -> None:
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    def function() -> torch.Tensor:
        x = torch.ones(3)
        y = [x + 1]
        return y[0] * 2

    def names(run: Any) -> list[str]:
        with Mode() as mode:
            run()
        return mode.names

    seen = Seen()
    assert names(trace(out=seen.take, lines=True, every=1)(function)) == names(function)


# ---- TorchSnooper and setuptools

PROGRAM = """
import sys
{before}
had = sys.modules.get("pkg_resources")
import torch
from tensortrace import trace
records = []
def function():
    x = torch.ones(3)
    return x
trace(out=records.append, lines=True)(function)()
texts = [v.text for r in records if type(r).__name__ == "Line" for v in r.changed]
assert texts == ["tensor<(3,), float32, cpu>"], texts
assert sys.modules.get("pkg_resources") is had
assert "torchsnooper" in sys.modules
"""
BLOCKED = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pkg_resources", "setuptools"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
"""
OLD = """
import types
module = types.ModuleType("pkg_resources")
class DistributionNotFound(Exception): pass
def get_distribution(name): raise DistributionNotFound
module.get_distribution, module.DistributionNotFound = get_distribution, DistributionNotFound
sys.modules["pkg_resources"] = module
"""


@pytest.mark.parametrize("before", [BLOCKED, OLD, ""], ids=["absent", "old", "installed"])
def test_torchsnooper_imports_whatever_setuptools_is_and_nothing_is_left_behind(
    before: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(before=before)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr

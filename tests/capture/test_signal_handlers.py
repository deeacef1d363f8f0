"""Exceptions that a signal handler of the program's raises while our own code runs."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import DisableTorchFunction
from torch._C import _set_grad_enabled as set_grad_enabled
from torch.utils.data import DataLoader, Dataset

from tensortrace import trace
from tensortrace.capture.active import Ours, here
from tensortrace.capture.exceptions import _message
from tensortrace.capture.journal import Journal
from tensortrace.capture.lines.events import exception_text
from tensortrace.capture.lines.reader import Reader
from tensortrace.capture.lines.watched import Watched
from tensortrace.capture.loop.orders import Orders
from tensortrace.capture.recorder import Recorder
from tensortrace.capture.replay.aside import Stage
from tensortrace.capture.summary import StepSummary
from tensortrace.capture.tensors import TensorTable
from tensortrace.capture.unwrap import quiet
from tensortrace.log import LogWriter
from tensortrace.records import Action, Call, Step
from tensortrace.signal_handlers import is_of_handler
from tensortrace.step_view import StepView
from tests.capture.lifecycle import make_net, of, process_state, read, train


class LimitError(Exception):
    """A time limit is over."""


class Limit:
    """Handlers of every kind."""

    def __call__(self, number: int, frame: object) -> None:
        raise LimitError

    def over(self, number: int, frame: object) -> None:
        raise LimitError


def over(number: int, frame: object) -> None:
    raise LimitError


@pytest.fixture(autouse=True)
def former() -> Iterator[None]:
    """Put back whatever handler there was."""
    handler = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, handler)


def test_what_an_enum_says_that_is_asked_for_another_value_is_no_handler_s() -> None:
    with pytest.raises(ValueError) as raised:
        signal.Signals(0)
    assert raised.value.__traceback__.tb_next is not None
    assert not is_of_handler(raised.value)


def test_a_sink_that_fails_in_an_enum_ends_the_tracing_and_no_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with trace(out=lambda record: signal.Signals(0)):
        train(make_net(), 2)
    assert "tracing stops, training goes on" in capsys.readouterr().err


HANDLERS = [over, functools.partial(over), Limit(), Limit().over]


@pytest.mark.parametrize("handler", HANDLERS)
def test_an_exception_of_a_handler_is_known(handler: Any) -> None:
    signal.signal(signal.SIGALRM, handler)
    with pytest.raises(LimitError) as raised:
        signal.raise_signal(signal.SIGALRM)
    assert is_of_handler(raised.value)


def test_another_exception_is_none_of_a_handler() -> None:
    signal.signal(signal.SIGALRM, lambda *args: None)
    for fails in (lambda: 1 / 0, lambda: over(0, None)):
        with pytest.raises((LimitError, ZeroDivisionError)) as raised:
            fails()
        assert not is_of_handler(raised.value)


class Rings:
    """Is asked for something while the handler raises."""

    def ring(self, *args: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)

    __repr__ = __len__ = __iter__ = __deepcopy__ = __getitem__ = ring


class RingingError(Exception):
    __str__ = Rings.ring


def order_of_a_loader() -> None:
    data: Any = range(4)
    loader = DataLoader(data, 2, shuffle=True)
    sampler: Any = loader.sampler
    sampler.data_source = Rings()
    Orders().order_of(loader)


def watch_an_expression() -> None:
    rings = Rings()
    Watched(["rings.ring()"], []).values({}, {"rings": rings})
    del rings


def no_draft(value: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("ask", [
    order_of_a_loader, watch_an_expression,
    lambda: Reader(None).words(Rings(), no_draft), lambda: Reader(None).words([Rings()], no_draft),
    lambda: exception_text(RingingError, RingingError()),
    lambda: _message(RingingError()),
    lambda: Stage().isolate(Rings(), "it"),
])  # fmt: skip
def test_it_is_not_taken_for_something_of_the_user_s_that_fails(ask: Callable[[], Any]) -> None:
    signal.signal(signal.SIGALRM, over)
    with pytest.raises(LimitError):
        ask()


class RingingGuard:
    """That of torch, with a signal after it is entered."""

    def __init__(self) -> None:
        self.guard = DisableTorchFunction()

    def __enter__(self) -> None:
        self.guard.__enter__()
        signal.raise_signal(signal.SIGALRM)

    def __exit__(self, *given: object) -> None:
        self.guard.__exit__(None, None, None)


def ring_after(enabled: bool) -> None:
    set_grad_enabled(enabled)
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("block", [quiet, lambda: Ours(None, "loop")])
@pytest.mark.parametrize(("name", "ringing"), [
    ("DisableTorchFunction", RingingGuard), ("_set_grad_enabled", ring_after),
])  # fmt: skip
def test_what_a_block_of_ours_has_turned_off_is_on_again(
    block: Callable[[], Any], name: str, ringing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGALRM, over)
    monkeypatch.setattr(torch._C, name, ringing)
    with contextlib.suppress(LimitError), block():
        pass
    monkeypatch.undo()
    assert torch.is_grad_enabled()
    assert torch._C._is_torch_function_enabled()
    assert not here.busy


def test_a_time_limit_is_not_lost_where_an_epoch_begins() -> None:
    armed: list[bool] = []

    class Data(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            if armed and here.busy:
                armed.clear()
                signal.raise_signal(signal.SIGALRM)
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.ones(3)

    signal.signal(signal.SIGALRM, over)
    loader = DataLoader(Data(), 2, shuffle=True)
    with trace(out=[].append):
        armed.append(True)
        with pytest.raises(LimitError):
            list(loader)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Recorder, "next_seq"),
        (Recorder, "_begin_step"),
        (TensorTable, "identify"),
        (TensorTable, "gradient"),
        (Journal, "take"),
        (Journal, "close_step"),
        (Journal, "begin_step"),
        (StepSummary, "__init__"),
        (StepView, "forward"),  # asked by checks
        (LogWriter, "_hand_on"),
    ],
)
def test_it_reaches_the_program_and_turns_nothing_off(
    owner: type,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, original = process_state(), getattr(owner, name)
    armed: list[bool] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGALRM)
        return original(*args, **kwargs)

    signal.signal(signal.SIGALRM, over)
    monkeypatch.setattr(owner, name, interrupted)
    net = make_net()
    with trace(tmp_path / "log.jsonl", every=1):
        train(net, 2)
        armed.append(True)
        with pytest.raises(LimitError):
            train(net, 3)
        train(net, 3)
    assert process_state() == before
    records = read(tmp_path / "log.jsonl")
    assert [record.step for record in records] == sorted(record.step for record in records)
    assert not [action for action in of(Action, records) if action.action == "tracer_error"]
    lines = [line.step for line in of(Step, records)]
    assert lines == list(range(lines[-1] + 1))
    # The last three steps are whole: each module forward and backward.
    calls = [(c.step, c.phase) for c in of(Call, records) if c.module == "" and c.op is None]
    for step in lines[-3:]:
        assert {"forward", "backward"} <= {phase for at, phase in calls if at == step}
    assert capsys.readouterr().err.count("\n") == 1

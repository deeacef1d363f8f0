"""Device time of module calls, by events that somebody else makes up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture import cuda_time, recorder
from tensortrace.capture.cuda_time import DeviceTimes
from tensortrace.records import Call
from tests.capture import Recorded


class Stream:
    """A device that has done one piece of work more each time an event is recorded: 1 ms each."""

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.made: list[Event] = []
        self.waits_for = 10**9

    def event(self) -> Event:
        self.made.append(Event(self))
        return self.made[-1]


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at = -1

    def record(self, stream: Any) -> None:
        self.at = next(self.stream.clock)

    def query(self) -> bool:
        return self.at < self.stream.waits_for

    def elapsed_time(self, other: Event) -> float:
        return float(other.at - self.at)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Make the tracer believe in a device."""
    found = Stream()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.empty(0))
    monkeypatch.setattr(recorder, "DeviceTimes", lambda: DeviceTimes(found.event))
    return found


def train(steps: int, every: Any = 1) -> list[Call]:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = Recorded()
    with trace(out=records.append, every=every, narrow=False):
        for _ in range(steps):
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [call for call in records.of(Call) if call.phase == "forward" and call.op is None]


def test_the_calls_of_a_full_step_have_the_time_between_two_events(stream: Stream) -> None:
    calls = train(3)
    # Three calls inside the outermost one, of two events each: it spans seven pieces of work.
    assert [(c.module, c.device_ns) for c in calls[:4]] == [
        ("", 7_000_000), ("0", 1_000_000), ("1", 1_000_000), ("2", 1_000_000),
    ]  # fmt: skip
    assert [c.device_ns for c in calls[4:8]] == [c.device_ns for c in calls[:4]]


def test_events_are_used_again(stream: Stream) -> None:
    train(20)
    assert len(stream.made) <= 2 * 4 * 2


def test_what_the_device_still_works_on_has_no_time(stream: Stream) -> None:
    stream.waits_for = 5
    assert [c.device_ns for c in train(1)] == [None, 1_000_000, 1_000_000, None]


def test_thin_steps_are_not_timed(stream: Stream) -> None:
    calls = train(6, every=5)
    assert {c.step for c in calls} == {0, 5}
    assert len(stream.made) <= 8
    assert next(stream.clock) == 8 * 2


def test_more_calls_than_there_are_events_for_have_none(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_time, "MOST", 2)
    assert [c.device_ns is None for c in train(1)] == [False, False, False, True]


@pytest.mark.parametrize("what", ["begin", "end"])
def test_nothing_is_recorded_into_a_graph_that_is_captured(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    answers = itertools.repeat(True) if what == "begin" else _then(False, True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(answers))
    times = DeviceTimes(stream.event)
    begun = times.begin([("input", torch.ones(1))])
    assert (begun is None) == (what == "begin")
    if begun is not None:
        times.end(begun, {})
    assert len(stream.made) == (what == "end")


def _then(first: bool, rest: bool) -> Iterator[bool]:
    yield first
    yield from itertools.repeat(rest)


def test_a_device_that_refuses_costs_the_times_and_nothing_else(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Event, stream: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Event, "record", refuse)
    calls = train(2)
    assert len(calls) == 8
    assert {c.device_ns for c in calls} == {None}
    assert len(stream.made) == 1

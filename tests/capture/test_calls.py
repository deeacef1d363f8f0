"""What a module call says: order, parents, inputs and outputs in any container, failures."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict, UserDict, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.records import Call, End
from tests.capture import Net, Recorded, record

Pair = namedtuple("Pair", "first second")  # noqa: PYI024 what users still write


class Typed(NamedTuple):
    first: torch.Tensor
    rest: Any


class MyTuple(tuple):
    pass


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As in transformers: a dataclass that is an ordered dict of the fields that are set."""

    logits: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        if self.logits is not None:
            self["logits"] = self.logits


class Plain:
    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.name = x, "plain"


class Give(nn.Module):
    """Returns what a function makes of a tensor and of its triple."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x + 1, x * 3)


class Take(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(1)


CONTAINERS = {
    "tensor": (lambda a, b: a, ["output[0]"]),
    "none": (lambda a, b: None, []),
    "number": (lambda a, b: 3, []),
    "tuple": (lambda a, b: (a, b), ["output[0]", "output[1]"]),
    "list": (lambda a, b: [a, b], ["output[0]", "output[1]"]),
    "dict": (lambda a, b: {"a": a, "b": b}, ["output[0]['a']", "output[0]['b']"]),
    "dict of int": (lambda a, b: {0: a, 7: b}, ["output[0][0]", "output[0][7]"]),
    "namedtuple": (Pair, ["output[0]", "output[1]"]),
    "typed tuple": (lambda a, b: Typed(a, [b]), ["output[0]", "output[1][0]"]),
    "tuple subclass": (lambda a, b: MyTuple((a, b)), ["output[0]", "output[1]"]),
    "structseq": (lambda a, b: torch.max(torch.stack([a, b]), 0), ["output[0]", "output[1]"]),
    "dataclass": (lambda a, b: Answer(a, (b,)), ["output[0].logits", "output[0].hidden[0]"]),
    "model output": (lambda a, b: ModelOutput(logits=a), ["output[0]['logits']"]),
    "mapping": (lambda a, b: UserDict(a=a, b=b), ["output[0]['a']", "output[0]['b']"]),
    "object": (lambda a, b: Plain(a), ["output[0].x"]),
    "nested": (
        lambda a, b: {"x": [a, (None, {"y": b})], "n": 3},
        ["output[0]['x'][0]", "output[0]['x'][1][1]['y']"],
    ),
    "empty": (lambda a, b: [], []),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_are_found_in_what_a_module_returns(kind: str) -> None:
    make, names = CONTAINERS[kind]
    records = record(lambda t: Give(make)(torch.ones(2)))
    call = records.module("")
    assert [name for name, _ in call.outputs] == names
    first = [2.0, 3.0][kind == "structseq"]
    if names:
        assert records.output(call).max == first


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_are_found_in_what_a_module_is_given(kind: str) -> None:
    make, names = CONTAINERS[kind]
    value = make(torch.full((2,), 2.0), torch.full((2,), 3.0))
    records = record(lambda t: Take()(0, value))
    inside = {"tuple", "list", "namedtuple", "typed tuple", "tuple subclass", "structseq"}
    # What a module returns as a sequence are its outputs; what it is given is one argument.
    prefix = "output" if kind in inside else "output[0]"
    expected = [name.replace(prefix, "input[1]", 1) for name in names]
    assert [name for name, _ in records.module("").inputs] == expected


def test_keyword_arguments_are_measured_under_their_names() -> None:
    x, mask = torch.ones(2), torch.zeros(3)
    records = record(lambda t: Take()(x, mask=mask, extra={"deep": [x]}, none=None))
    call = records.module("")
    assert [name for name, _ in call.inputs] == ["input[0]", "mask", "extra['deep'][0]"]
    assert records.input(call, 1).zeros == 3
    assert call.inputs[0][1] == call.inputs[2][1]


def test_call_without_tensors_is_recorded() -> None:
    records = record(lambda t: Take()())
    assert records.module("").inputs == []


def test_calls_are_ordered_by_entry_and_linked_to_what_they_ran_inside() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)))
    calls = records.modules()
    assert [call.module for call in calls] == ["", "net", "net.0", "net.1", "head"]
    seq = {call.module: call.seq for call in calls}
    assert {call.module: call.parent for call in calls} == {
        "": None, "net": seq[""], "net.0": seq["net"], "net.1": seq["net"], "head": seq[""],
    }  # fmt: skip


def test_parent_that_is_not_recorded_is_no_parent() -> None:
    records = record(lambda t: Net()(torch.rand(2, 4)), modules=["net.0", ""])
    assert [(c.module, c.parent) for c in records.modules()] == [("", None), ("net.0", None)]


def test_reused_module_counts_its_calls_anew_in_each_step() -> None:
    layer = nn.Linear(4, 4)

    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(self.layer(x)))

    model = Reuses()

    def program(t: Any) -> None:
        for _ in range(2):
            model(torch.rand(2, 4))
            t.step()

    records = record(program)
    assert [(c.step, c.nth) for c in records.modules(module="layer")] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


def test_module_that_calls_itself_has_each_call_inside_the_other() -> None:
    class Recurses(nn.Module):
        def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
            return x if depth == 0 else self(x + 1, depth - 1)

    records = record(lambda t: Recurses()(torch.zeros(2), 2))
    calls = records.modules()
    assert [call.nth for call in calls] == [0, 1, 2]
    assert [call.parent for call in calls] == [None, calls[0].seq, calls[1].seq]


def test_time_on_the_host_includes_the_children() -> None:
    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            until = time.perf_counter_ns() + 1_000_000
            while time.perf_counter_ns() < until:
                pass
            return x

    records = record(lambda t: nn.Sequential(Waits(), Waits())(torch.zeros(1)))
    times = {call.module: call.host_ns for call in records.modules()}
    assert min(times["0"], times["1"]) >= 1_000_000
    assert times[""] >= times["0"] + times["1"]


def test_op_outside_modules_has_a_time_too() -> None:
    records = record(lambda t: torch.ones(3).exp())
    assert all(call.host_ns > 0 for call in records.ops())


def test_call_says_whether_it_trains_and_has_grad_and_autocast_on() -> None:
    model = nn.Linear(4, 2)
    model_eval = nn.Linear(4, 2).eval()

    def program(t: Any) -> None:
        x = torch.rand(2, 4)
        model(x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model_eval(x)

    records = record(program)
    first, second = records.modules()
    assert (first.training, first.grad_enabled, first.autocast) == (True, True, None)
    assert (second.training, second.grad_enabled, second.autocast) == (False, False, "cpu:bfloat16")
    assert records.output(second).dtype == "bfloat16"


def test_op_under_autocast_says_so() -> None:
    def program(t: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            torch.ones(2, 2) @ torch.ones(2, 2)

    records = record(program)
    assert records.op("matmul").autocast == "cpu:bfloat16"
    assert records.output(records.op("matmul")).dtype == "bfloat16"


def test_forward_that_raises_is_closed_with_its_exception() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    model = nn.Sequential(nn.Identity(), nn.Sequential(Fails()))
    records = Recorded()
    with pytest.raises(ValueError, match="no"), trace(out=records.append, every=1):
        model(torch.ones(2))
    assert {c.module: c.exception for c in records.modules()} == {
        "": "ValueError", "0": None, "1": "ValueError", "1.0": "ValueError",
    }  # fmt: skip
    assert records.module("1.0").inputs != []
    assert records.module("1.0").outputs == []
    (end,) = records.of(End)
    assert end.failure is not None
    assert (end.failure.type, end.failure.module) == ("ValueError", "1.0")


def test_exception_caught_by_the_program_leaves_later_calls_in_place() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    class Copes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = Fails(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.fails(x)
            except ValueError:
                return self.works(x)

    records = record(lambda t: Copes()(torch.ones(2)))
    assert records.module("works").parent == records.module("").seq
    assert records.module("").exception is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_caught_by_the_program_leaves_later_calls_in_place(error: Any) -> None:
    class Stops(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    model = nn.Sequential(nn.Sequential(Stops()))
    other = Net()

    def program(t: Any) -> None:
        with pytest.raises(error):
            model(torch.ones(2))
        other(torch.rand(2, 4))

    records = record(program)
    assert records.module("Net").parent is None
    assert records.module("Net.net").parent == records.module("Net").seq


def test_every_tensor_that_a_call_names_is_described_in_its_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss = (model(torch.rand(2, 4)) - 1).square().mean()
            loss.backward()
            optimizer.step()

    records = record(program)
    for call in records.of(Call):
        described = records.tensors(call.step)
        assert {number for _, number in [*call.inputs, *call.outputs]} <= described.keys()


def test_statistics_of_a_call_still_open_at_a_gate_are_its_own() -> None:
    inner = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)

    class TrainsInside(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner(x).sum().backward()
            optimizer.step()
            return inner(x)

    records = record(lambda t: TrainsInside()(torch.full((3, 4), 7.0)))
    call = records.module("")
    assert records.input(call).mean == 7.0
    assert records.input(call).numel == 12


def test_module_that_returns_its_input_has_one_tensor_on_both_sides() -> None:
    records = record(lambda t: nn.Identity()(torch.ones(2)))
    call = records.module("")
    assert call.inputs[0][1] == call.outputs[0][1]

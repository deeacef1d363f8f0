"""Source lines as records: their order, what they changed, how they go with calls and steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace import Lines, TraceStoppedError, trace
from tensortrace.capture.active import slot
from tensortrace.records import Call, Line, Step
from tests.capture.lines.lines_of import Seen, all_of, lines_of

pytestmark = pytest.mark.usefixtures("closing_folder")

HERE = __file__


def text_of(line: Line) -> str:
    assert line.location.file == HERE
    return Path(HERE).read_text("utf-8").splitlines()[line.location.line - 1].strip()


def head(net: nn.Module, x: Tensor) -> Tensor:
    logits = net(x)
    return logits.sum()


# ---- order and links


def test_each_line_says_what_it_changed() -> None:
    def function(n: int) -> int:
        total = n
        total += 2
        other = [total]
        return sum(other)

    seen = lines_of(function, 1)
    said = [(line.what, text_of(line), [(v.name, v.text, v.was) for v in line.changed])
            for line in seen.lines]  # fmt: skip
    assert said == [
        ("call", "def function(n: int) -> int:", [("n", "1", None)]),
        ("line", "total = n", [("total", "1", None)]),
        ("line", "total += 2", [("total", "3", "1")]),
        ("line", "other = [total]", [("other", "[3]", None)]),
        ("line", "return sum(other)", []),
        ("return", "return sum(other)", []),
    ]
    value = seen.lines[-1].value
    assert value is not None
    assert (value.name, value.text) == ("return", "3")


def test_a_line_stands_before_the_calls_that_it_makes() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    seen = lines_of(head, net, torch.ones(2, 4))
    by_text = {text_of(line): line for line in seen.lines if line.what == "line"}
    first, second = by_text["logits = net(x)"], by_text["return logits.sum()"]
    modules = [call.seq for call in seen.calls if call.op is None]
    (op,) = [call.seq for call in seen.calls if call.op == "sum"]
    assert first.seq < min(modules) <= max(modules) < second.seq < op


def test_a_variable_has_the_id_of_what_the_call_returned() -> None:
    net = nn.Linear(4, 3)
    seen = lines_of(head, net, torch.ones(2, 4))
    (logits,) = [v for line in seen.lines for v in line.changed if v.name == "logits"]
    (call,) = [call for call in seen.calls if call.op is None]
    assert logits.tensors == [("", call.outputs[0][1])]
    tensors = seen.tensors  # nothing is described twice
    for line in seen.lines:
        for variable in line.changed:
            for _, number in variable.tensors:
                assert (line.step, number) in tensors


def test_arguments_that_a_line_meets_first_are_described_there_with_statistics() -> None:
    seen = lines_of(head, nn.Linear(4, 3), torch.full((2, 4), 2.0))
    entry = seen.lines[0]
    (x,) = [v for v in entry.changed if v.name == "x"]
    assert [tensor.mean for tensor in entry.tensors if tensor.id == x.tensors[0][1]] == [2.0]
    (call,) = [call for call in seen.calls if call.op is None]
    assert call.inputs == [("input[0]", x.tensors[0][1])]


def test_statistics_of_what_calls_made_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensortrace.capture.stats.queue import StatsQueue

    added: list[int] = []
    real, real_look, real_gather = StatsQueue.add_other, StatsQueue.look, StatsQueue.gather

    def add_other(self: StatsQueue, tensor: Tensor) -> Any:
        added.append(tensor.numel())
        return real(self, tensor)

    def look(self: StatsQueue, tensor: Tensor, number: int) -> Any:
        found = real_look(self, tensor, number)  # at once, or None for a tensor to be added
        added.extend([] if found is None else [tensor.numel()])
        return found

    def gather(self: StatsQueue, tensor: Tensor, head: Any) -> Any:
        found = real_gather(self, tensor, head)  # without the kernel, copied at once, or None
        added.extend([] if found is None else [tensor.numel()])
        return found

    monkeypatch.setattr(StatsQueue, "add_other", add_other)
    monkeypatch.setattr(StatsQueue, "look", look)
    monkeypatch.setattr(StatsQueue, "gather", gather)

    def function(x: Tensor) -> Tensor:
        y = x + 1
        z = y
        w = [y, z]
        return w[0]

    with torch.no_grad():
        lines_of(function, torch.ones(64))
    assert added == [64, 64]  # x and y


def test_lines_inside_a_module_name_its_call_as_parent() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            half = x / 2
            return half

    seen = lines_of(head, Net(), torch.ones(2, 4), lines=Lines(depth=2))
    (call,) = [call for call in seen.calls if call.op is None]
    inside = [line for line in seen.lines if line.depth == 1]
    assert [line.what for line in inside] == ["call", "line", "line", "return"]
    assert {line.parent for line in inside} == {call.seq}
    assert {line.frame for line in inside} == {inside[0].seq}
    assert {line.parent for line in seen.lines if line.depth == 0} == {None}


def test_depth_counts_only_the_users_own_frames() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    seen = lines_of(head, Net(), torch.ones(2, 4), lines=Lines(depth=8))
    assert {line.location.file for line in seen.lines} == {HERE}
    assert {line.depth for line in seen.lines} == {0, 1}


def test_comprehensions_and_generated_code_are_no_frames_of_their_own() -> None:
    from dataclasses import dataclass

    @dataclass
    class Pair:
        a: int
        b: int

    def function() -> int:
        pairs = [Pair(i, i) for i in range(3)]
        return sum(pair.a for pair in pairs)

    seen = lines_of(function, lines=Lines(depth=3))
    assert {line.depth for line in seen.lines} == {0}


# ---- blocks and steps


def test_a_block_has_the_lines_of_its_own_frame_and_not_the_with_line_at_its_end() -> None:
    seen = Seen()
    before = 5
    with trace(out=seen.take, lines=True, every=1):
        after = before + 1
        after += 1
    assert not seen.faults
    assert seen.whats() == ["call", "line", "line"]
    entry = seen.lines[0]
    assert ("before", "5") in [(v.name, v.text) for v in entry.changed]
    assert {line.frame for line in seen.lines} == {entry.seq}
    assert seen.changes("after") == ["6", "7"]


def test_each_step_of_a_block_says_again_what_its_variables_are() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(6.0).view(6, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    net = nn.Linear(1, 1)
    seen = Seen()
    with trace(out=seen.take, lines=True, every=1):
        constant = 7
        for (x,) in loader:
            out = net(x)
    assert not seen.faults
    assert constant == 7
    assert out.shape == (2, 1)
    later = [line for line in seen.lines if line.step == 1]
    assert later[0].what == "call"
    carried = {v.name: (v.text, v.was, v.tensors) for v in later[0].changed}
    assert carried["constant"] == ("7", "7", [])
    assert "x" not in carried
    assert text_of(later[1]) == "for (x,) in loader:"
    assert [v.name for v in later[1].changed] == ["x"]
    (call,) = [call for call in seen.calls if call.step == 1]
    assert later[1].changed[0].tensors == [("", call.inputs[0][1])]
    assert [line.frame for line in later] == [later[0].seq] * len(later)


def test_thin_steps_have_no_lines_and_no_trace_function() -> None:
    import sys

    data = torch.utils.data.DataLoader(list(torch.arange(12.0).view(6, 2)), batch_size=1)
    net = nn.Linear(2, 1)
    seen, traced = Seen(), []
    with trace(out=seen.take, lines=True, every=3):
        for x in data:
            net(x)
            traced.append(sys.gettrace() is not None)
    assert not seen.faults
    assert traced == [True, False, False, True, False, False]
    assert {line.step for line in seen.lines} == {0, 3}
    again = [line for line in seen.lines if line.step == 3 and line.what == "line"]
    assert text_of(again[0]) == "for x in data:"
    assert [v.name for v in again[0].changed] == ["x"]


def test_each_call_of_a_decorated_function_is_a_step_even_without_tensors() -> None:
    seen = Seen()

    @trace(out=seen.take, lines=True, every=1)
    def function(n: int) -> int:
        return n + 1

    for n in range(3):
        function(n)
    assert [r.step for r in seen.records if isinstance(r, Step)] == [0, 1, 2]
    assert seen.changes("n") == ["0", "1", "2"]


def test_a_nested_block_with_lines_writes_them_into_the_outer_run() -> None:
    seen, inner = Seen(), Seen()
    with trace(out=seen.take, every=1):
        before = 1
        with trace(out=inner.take, lines=True):
            within = before + 1
        after = within + 1
    assert after == 3
    assert not inner.records
    assert [v.name for line in seen.lines if line.what == "line" for v in line.changed] == [
        "within"
    ]


# ---- loops


def test_of_a_loop_three_executions_then_powers_of_two_and_the_last_are_recorded() -> None:
    def function() -> int:
        total = 0
        for i in range(100):
            total += i
        return total

    seen = lines_of(function)
    body = [line for line in seen.lines if line.what == "line" and text_of(line) == "total += i"]
    assert [line.nth for line in body] == [0, 1, 2, 3, 7, 15, 31, 63, 99]
    assert sum(1 + line.passed_over for line in body) == 100
    assert body[-1].changed[0].text == "4950"
    assert [line.seq for line in body] == sorted(line.seq for line in body)


def test_an_execution_that_changes_a_shape_is_recorded_whenever_it_comes() -> None:
    def function() -> Tensor:
        for i in range(30):
            x = torch.ones(3 if i < 20 else 4)
        return x

    seen = lines_of(function)
    shapes = [v.text for line in seen.lines for v in line.changed if v.name == "x"]
    assert len([text for text in shapes if "(4,)" in text]) >= 2
    (changed,) = [line for line in seen.lines
                  for v in line.changed if v.name == "x" and "(3,)" in (v.was or "")
                  and "(4,)" in v.text]  # fmt: skip
    assert changed.nth == 20


def test_thin_false_records_every_execution() -> None:
    def function() -> int:
        total = 0
        for i in range(20):
            total += i
        return total

    assert len(all_of(function).changes("i")) == 20


def test_functions_called_by_a_line_that_is_passed_over_are_not_followed() -> None:
    def inner(i: int) -> int:
        return i + 1

    def function() -> int:
        total = 0
        for i in range(16):
            total = inner(i)
        return total

    seen = lines_of(function, lines=Lines(depth=2))
    entered = [line for line in seen.lines if line.what == "call" and line.depth == 1]
    assert [line.changed[0].text for line in entered] == ["0", "1", "2", "3", "7", "15"]


# ---- flags


def test_the_line_that_makes_the_first_nan_of_a_step_is_flagged() -> None:
    def function(x: Tensor) -> Tensor:
        y = x - 1
        z = y.log()
        return z * 2

    seen = lines_of(function, torch.zeros(3))
    assert [(text_of(line), line.flags) for line in seen.lines if line.flags] == [
        ("z = y.log()", ["nonfinite"])
    ]
    assert "has_nan" in seen.changes("z")[0]


def test_a_nan_that_came_in_is_not_made_by_the_lines_that_use_it() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        return y

    seen = lines_of(function, torch.tensor([1.0, float("nan")]))
    assert not [line.flags for line in seen.lines if line.flags]


def test_the_line_inside_a_module_is_flagged_and_not_the_one_that_called_it() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            root = (x - 1).sqrt()
            return root + 1

    seen = lines_of(head, Net(), torch.zeros(2, 4), lines=Lines(depth=2))
    assert [text_of(line) for line in seen.lines if line.flags] == ["root = (x - 1).sqrt()"]


def test_memory_that_is_not_written_yet_and_masks_are_not_the_first_nan() -> None:
    def fill() -> torch.Tensor:
        held = torch.full((4,), torch.nan)
        masked = torch.zeros(4).masked_fill(torch.ones(4, dtype=torch.bool), -torch.inf)
        made = torch.zeros(4) / torch.zeros(4)
        return held + masked + made

    seen = lines_of(fill)
    (flagged,) = [line for line in seen.lines if line.flags]
    assert text_of(flagged) == "made = torch.zeros(4) / torch.zeros(4)"


def test_a_nan_in_the_gradient_flags_the_line_of_backward() -> None:
    def function(x: Tensor) -> None:
        loss = (x * 0).sqrt().sum()
        loss.backward()

    seen = lines_of(function, torch.ones(3, requires_grad=True))
    assert [text_of(line) for line in seen.lines if line.flags] == ["loss.backward()"]


def test_an_execution_whose_op_makes_a_nan_is_recorded_and_flagged() -> None:
    def function() -> Tensor:
        x = torch.ones(2)
        for i in range(20):
            y = (x - i / 10 * (i > 10)).log()
        return y

    seen = lines_of(function)
    (flagged,) = [line for line in seen.lines if line.flags]
    assert text_of(flagged).startswith("y = (x - i")
    assert flagged.nth == 11  # and not only the next of its powers of two


@pytest.mark.parametrize(
    ("target", "flagged"),
    [(torch.ones(4), True), (torch.ones(4, 1), False), (torch.ones(1), False)],
)
def test_a_line_where_n_by_1_meets_n_is_flagged(target: Tensor, flagged: bool) -> None:
    def function(prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        return (error**2).mean()

    seen = lines_of(function, torch.zeros(4, 1, requires_grad=True), target)
    found = [text_of(line) for line in seen.lines if "broadcast" in line.flags]
    assert found == (["error = prediction - target"] if flagged else [])


def test_a_shape_that_was_made_to_broadcast_is_no_accident() -> None:
    def function(x: Tensor) -> Tensor:
        column = x.unsqueeze(-1)
        return column - x

    seen = lines_of(function, torch.arange(4.0))
    assert not [line for line in seen.lines if line.flags]


# ---- exceptions, generators, coroutines


def test_an_exception_has_a_record_and_the_frame_no_return() -> None:
    def inner() -> None:
        raise ValueError("no such thing")

    def function() -> int:
        try:
            inner()
        except ValueError:
            caught = 1
        return caught

    seen = lines_of(function, lines=Lines(depth=2))
    raised = [line for line in seen.lines if line.what == "exception"]
    assert [line.depth for line in raised] == [1, 0]
    assert all(line.value and line.value.text == "ValueError: no such thing" for line in raised)
    assert [line.what for line in seen.lines if line.depth == 1][-1] == "exception"
    assert seen.changes("caught") == ["1"]
    assert seen.whats()[-1] == "return"


def test_an_exception_that_leaves_the_function_goes_on_unchanged() -> None:
    error = KeyError("x")

    def function() -> None:
        raise error

    seen = Seen()
    with pytest.raises(KeyError) as info:
        trace(out=seen.take, lines=True)(function)()
    assert info.value is error
    assert seen.whats() == ["call", "line", "exception"]


def test_the_end_of_a_for_loop_is_no_exception() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    def function() -> int:
        total = 0
        for n in numbers():
            total += n
        return total

    assert "exception" not in lines_of(function).whats()


def test_a_generator_has_a_return_for_each_yield_and_a_call_for_each_resumption() -> None:
    seen = Seen()

    @trace(out=seen.take, lines=True, every=1)
    def numbers(n: int) -> Iterator[int]:
        for i in range(n):
            yield i * 10

    assert list(numbers(2)) == [0, 10]
    assert not seen.faults
    values = [(line.step, line.value.name, line.value.text) for line in seen.lines if line.value]
    assert values == [(0, "yield", "0"), (1, "yield", "10"), (2, "return", "None")]
    assert next(line.what for line in seen.lines if line.step == 1) == "call"


async def test_a_coroutine_is_one_frame_however_often_it_waits() -> None:
    import asyncio

    seen = Seen()

    @trace(out=seen.take, lines=True, every=1)
    async def function(x: Tensor) -> Tensor:
        y = x + 1
        waited = await asyncio.sleep(0, 5)
        z = y + waited - 4
        return z

    result = await function(torch.ones(2))
    assert result.tolist() == [3.0, 3.0]
    assert not seen.faults
    assert seen.whats() == ["call", "line", "line", "line", "line", "return"]
    assert len({line.frame for line in seen.lines}) == 1
    assert seen.changes("z") == ["tensor<(2,), float32, cpu>"]
    assert seen.changes("waited") == ["5"]


async def test_an_async_generator_is_followed_too() -> None:
    import asyncio

    seen = Seen()

    @trace(out=seen.take, lines=True, every=1)
    async def numbers() -> Any:
        for i in range(2):
            await asyncio.sleep(0)
            yield i

    assert [i async for i in numbers()] == [0, 1]
    assert not seen.faults
    assert [line.value.name for line in seen.lines if line.value] == ["yield", "yield", "return"]
    changed = [v.text for r in seen.lines if r.what == "line" for v in r.changed if v.name == "i"]
    assert changed == ["0", "1"]


def test_an_abandoned_generator_is_closed_as_without_tracing() -> None:
    import gc

    closed: list[int] = []

    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(1)

    def function() -> int:
        return next(numbers())

    lines_of(function, lines=Lines(depth=2))
    gc.collect()
    assert closed == [1]


def test_recursion_is_followed_frame_by_frame() -> None:
    seen = Seen()

    @trace(out=seen.take, lines=True, every=1)
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert factorial(3) == 6
    assert not seen.faults
    assert [(line.depth, line.changed[0].text) for line in seen.lines if line.what == "call"] == [
        (0, "3"), (1, "2"), (2, "1"),
    ]  # fmt: skip


# ---- switches and failures


def test_turned_off_by_the_environment_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTRACE", "off")
    seen = Seen()
    with trace(out=seen.take, lines=True):
        pass
    assert not seen.records


def test_stop_on_stops_with_lines_as_without() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.clone() for p in net.parameters()]
    seen = Seen()
    with (
        pytest.raises(TraceStoppedError),
        trace(out=seen.take, lines=True, stop_on="error", every=1),
    ):
        loss = (net(torch.ones(1, 2)) * float("inf")).sum()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_failure_of_the_line_tracer_is_one_warning_and_the_program_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensortrace.capture.lines import variables

    def broken(self: Any, found: Any) -> Any:
        raise RuntimeError("broken inside")

    monkeypatch.setattr(variables.Variables, "look", broken)

    def function() -> int:
        total = 0
        for i in range(5):
            total += i
        return total

    seen = Seen()
    assert trace(out=seen.take, lines=True)(function)() == 10
    assert len(seen.faults) == 1
    assert "broken inside" in seen.faults[0]
    assert capsys.readouterr().err.count("tracing of lines stopped") == 1
    assert slot.recorder is None


def test_calls_are_recorded_with_lines_as_they_are_without() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def step(x: Tensor) -> None:
        loss = net(x).pow(2).mean()
        loss.backward()

    def told(lines: Any) -> list[Any]:
        seen = Seen()
        trace(out=seen.take, lines=lines, every=1)(step)(torch.ones(2, 4))
        calls = [r for r in seen.records if isinstance(r, Call)]
        return [(c.phase, c.module, c.op, len(c.inputs), len(c.outputs)) for c in calls]

    assert told(Lines(depth=3)) == told(False)


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("clears_last", [True, False])
def test_a_line_in_which_a_step_begins_is_flagged_for_what_it_made(
    level: str, clears_last: bool
) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = Seen()
    with trace(out=seen.take, lines=True, every=1, level=level):
        for turn in range(5):
            if turn == 3:
                model.weight.data.fill_(1e38)
            if not clears_last:
                optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            if clears_last:
                optimizer.zero_grad()
    assert not seen.faults
    flagged = [(line.step, text_of(line)) for line in seen.lines if line.flags]
    assert flagged[0] == (3, "loss = model(torch.ones(2, 4)).square().mean()")
    assert not any("backward" in text for _, text in flagged)

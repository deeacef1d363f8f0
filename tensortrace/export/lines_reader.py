"""Folds the records of a run into what flowed through each source line of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tensortrace.export.contents import shown_path
from tensortrace.export.flows import Flow, FunctionFlow, LineFlow
from tensortrace.records import (
    Action,
    Call,
    Finding,
    Line,
    Location,
    Module,
    Optimizer,
    Record,
    Tensor,
    Variable,
    from_scalar,
)
from tensortrace.text import LONGEST_NAME, number_text, shorten, without_address

# Names at one line, lines of one run, tensors of one step: a log may hold any number.
MOST_NAMES, MOST_LINES, MOST_TENSORS = 64, 20_000, 100_000
# Records of a step that are put in order at once.
MOST_HELD = 20_000
_LAST = 1 << 62


@dataclass(frozen=True, slots=True)
class FirstBad:
    """Where the first NaN or infinity was made."""

    step: int
    location: Location


class Reader:
    """Takes records in log order.

    Args:
        modules: those of the run, for the names that people know them by.

    Attributes:
        recorded: whether line records were among them. Without, the executions of a line are the
            calls of modules and ops that it made.
        whole: how many steps had lines or calls.
        first_bad: the first line that made a NaN or infinity.
    """

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        self.recorded = False
        self.whole = 0
        self.first_bad: FirstBad | None = None
        self._functions: dict[tuple[str, str], FunctionFlow] = {}
        self._count = 0
        self._step = -1
        self._seen = False
        self._tensors: dict[int, Tensor] = {}
        # Where each forward call of the step stands: what ran inside it at the same line is no
        # call of that line.
        self._places: dict[int, tuple[str, int]] = {}
        # Flows that wait for a tensor which a later record of the step describes.
        self._waiting: list[tuple[Flow, int]] = []
        # Records of the step that are not in order yet: a line is written when it has ended.
        self._held: list[Record] = []
        # By thread, frame and line its last execution; by thread and frame where it was entered.
        self._ran: dict[tuple[int, int, int], int] = {}
        self._entered: dict[tuple[int, int], LineFlow | None] = {}

    def feed(self, record: Record) -> None:
        """Take in one record."""
        if record.step != self._step:
            self._begin(record.step)
        elif len(self._held) >= MOST_HELD:
            self._take_held()
        self._held.append(record)

    def _take_held(self) -> None:
        held, self._held = self._held, []
        described = [r.tensors for r in held if isinstance(r, (Call, Line))]
        if sum(map(len, described)) <= MOST_TENSORS:  # else as they come
            for tensors in described:
                self._describe(tensors)
        for record in sorted(held, key=_place):
            self._take(record)

    def _take(self, record: Record) -> None:
        """Take in the next record of the step. Hot."""
        match record:
            case Call():
                self._call(record)
            case Line():
                self._line(record)
            case Finding(location=Location() as location):
                self._finding(record, location)
            case Action(location=Location() as location):
                self._action(record, location)
            case Optimizer(location=Location() as location):
                self._say(location, "grad norm", record.grad_norm)

    def finish(self) -> Iterable[FunctionFlow]:
        """Settle the last step; returns the functions in order of their first line here."""
        self._begin(-1)
        return self._functions.values()

    def _begin(self, step: int) -> None:
        self._take_held()
        for flow, id in self._waiting:
            tensor = self._tensors.get(id)
            if tensor is not None:
                flow.add(tensor, self._step)
        self.whole += self._seen
        self._step, self._seen = step, False
        self._tensors, self._places, self._waiting = {}, {}, []
        self._ran, self._entered = {}, {}

    def _function(self, location: Location) -> FunctionFlow:
        key = location.file, location.function
        function = self._functions.get(key)
        if function is None:
            function = FunctionFlow(*key)
            if self._count < MOST_LINES:
                self._functions[key] = function
        return function

    def _at(self, location: Location) -> LineFlow:
        function = self._function(location)
        line = function.lines.get(location.line)
        if line is None:
            line = LineFlow(location.line)
            if self._count < MOST_LINES:
                function.lines[location.line] = line
                self._count += 1
        if line.code is None and location.code is not None:
            line.code = location.code
        return line

    def _describe(self, tensors: Sequence[Tensor]) -> None:
        if len(self._tensors) > MOST_TENSORS:
            self._tensors = dict(list(self._tensors.items())[MOST_TENSORS // 2 :])
            self._places = {}
        for tensor in tensors:
            self._tensors[tensor.id] = tensor

    def _flow(self, line: LineFlow, flows: dict[str, Flow], name: str) -> Flow:
        flow = flows.get(name)
        if flow is None:
            flow = Flow(shorten(name, LONGEST_NAME))
            if len(flows) < MOST_NAMES:
                flows[name] = flow
            else:
                line.unnamed += 1
        return flow

    def _add(self, flow: Flow, id: int) -> None:
        tensor = self._tensors.get(id)
        if tensor is not None:
            flow.add(tensor, self._step)
        elif len(self._waiting) < MOST_TENSORS:
            self._waiting.append((flow, id))

    def _call(self, call: Call) -> None:
        self._seen = True
        self._describe(call.tensors)
        location = call.location
        if location is None:
            return
        if call.phase == "backward":
            self._gradient(call, location)
            return
        place = location.file, location.line
        self._places[call.seq] = place
        if call.parent is not None and self._places.get(call.parent) == place:
            return
        line = self._at(location)
        again = call.recompute or call.replay
        if not self.recorded and not again:
            line.executions += 1
            line.recorded += 1
            line.host_ns += call.host_ns
        name = shown_path(self._modules, call.module or "") if call.op is None else call.op
        flow = self._flow(line, line.calls, name)
        for _, id in call.outputs[:MOST_NAMES]:
            self._add(flow, id)

    def _gradient(self, call: Call, location: Location) -> None:
        for _, id in (*call.inputs, *call.outputs):
            tensor = self._tensors.get(id)
            if tensor is not None and tensor.nonfinite:
                name = "nan" if tensor.nan else "inf"
                self._at(location).gradient.setdefault(name, self._step)

    def _line(self, record: Line) -> None:
        self._seen = True
        self._describe(record.tensors)
        if not self.recorded:
            self._count_anew()
        line = self._at(record.location)
        self._count_line(line, record)
        if record.what == "exception" and record.value is not None:
            text = shorten(record.value.text, LONGEST_NAME)
            if text in line.raised or len(line.raised) < MOST_NAMES:
                line.raised[text] = line.raised.get(text, 0) + 1
        for flag in record.flags:
            line.flags.setdefault(flag, self._step)
            if flag == "nonfinite" and self.first_bad is None:
                self.first_bad = FirstBad(self._step, record.location)
        for variable in record.changed:
            # Where a step begins within a frame, what it holds already is told once more.
            if variable.tensors or record.what != "call" or variable.was != variable.text:
                self._variable(line, variable, variable.name)
        value = record.value if record.what == "return" else None
        if value is not None and (value.tensors or value.text != "None"):
            self._variable(line, value, value.name)

    def _count_line(self, line: LineFlow, record: Line) -> None:
        """Count a call of a function, or an execution of a line and those before it."""
        frame = record.thread, record.frame
        if record.what == "call":
            line.entered += 1 + record.passed_over
            if len(self._entered) < MOST_TENSORS:
                self._entered.setdefault(frame, line)
            return
        entered = self._entered.get(frame)
        if entered is not None:
            entered.followed += 1
            self._entered[frame] = None  # once
        if record.what != "line":
            return
        line.host_ns += record.host_ns
        key = (*frame, record.location.line)
        before = self._ran.get(key, -1)
        if record.nth > before:  # a statement over several lines may have a line twice
            line.executions += record.nth - before
            line.recorded += 1
            if len(self._ran) < MOST_TENSORS or key in self._ran:
                self._ran[key] = record.nth

    def _count_anew(self) -> None:
        """Count executions from now on: what was counted before were calls."""
        self.recorded = True
        for function in self._functions.values():
            for line in function.lines.values():
                line.executions = line.recorded = line.host_ns = 0

    def _variable(self, line: LineFlow, variable: Variable, name: str) -> None:
        if not variable.tensors:
            text = without_address(variable.text[:LONGEST_NAME])
            self._flow(line, line.variables, name).say(text, self._step)
        for place, id in variable.tensors:
            self._add(self._flow(line, line.variables, f"{name}{place}"), id)
        for place, text in variable.others:
            told = without_address(text[:LONGEST_NAME])
            self._flow(line, line.variables, f"{name}{place}").say(told, self._step)

    def _say(self, location: Location, name: str, value: object) -> None:
        number = from_scalar(value)
        if number is not None:
            line = self._at(location)
            self._flow(line, line.calls, name).say(number_text(number), self._step, number)

    def _action(self, action: Action, location: Location) -> None:
        if action.action == "loss" and action.tensor is not None:
            line = self._at(location)
            self._add(self._flow(line, line.calls, "loss"), action.tensor)
        elif action.action == "loss":
            self._say(location, "loss", action.detail.get("value"))
        elif action.action == "clip":
            self._say(location, "grad norm", action.detail.get("total_norm"))

    def _finding(self, finding: Finding, location: Location) -> None:
        findings = self._at(location).findings
        first, count = findings.get(finding.code, (finding, 0))
        if count or len(findings) < MOST_NAMES:
            findings[finding.code] = first, count + 1


def _place(record: Record) -> int:
    """Where a record stands in its step; findings and the step's own line come last."""
    return record.seq if isinstance(record, (Action, Call, Line, Optimizer)) else _LAST

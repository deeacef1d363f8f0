"""Programs are traced into a list: what the tests of recording look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tensortrace import trace
from tensortrace.capture.tracer import Trace
from tensortrace.records import Action, Call, Module, Record, Step, Tensor

R = TypeVar("R", bound=Record)


class Recorded(list[Record]):
    """The records of one run in log order; a sink that can be asked."""

    def of(self, kind: type[R], **fields: Any) -> list[R]:
        """Records of one kind whose fields have these values."""
        return [
            record
            for record in self
            if isinstance(record, kind)
            and all(getattr(record, name) == value for name, value in fields.items())
        ]

    def modules(self, **fields: Any) -> list[Call]:
        """Forward calls of modules, in order of entry."""
        fields = {"phase": "forward", **fields}
        calls = [call for call in self.of(Call, **fields) if call.op is None]
        return sorted(calls, key=lambda call: (call.step, call.seq))

    def module(self, path: str, **fields: Any) -> Call:
        """The one forward call of a module."""
        (call,) = self.modules(module=path, **fields)
        return call

    def ops(self, **fields: Any) -> list[Call]:
        """Forward calls of ops."""
        return [call for call in self.of(Call, phase="forward", **fields) if call.op is not None]

    def op(self, name: str, **fields: Any) -> Call:
        """The one forward call of an op."""
        (call,) = self.ops(op=name, **fields)
        return call

    def actions(self, name: str, **fields: Any) -> list[Action]:
        """Actions of one name."""
        return self.of(Action, action=name, **fields)

    def tensors(self, step: int = 0) -> dict[int, Tensor]:
        """Every tensor that a call of the step described, by id."""
        return {t.id: t for call in self.of(Call, step=step) for t in call.tensors}

    def input(self, call: Call, index: int = 0) -> Tensor:
        """The description of one input of a call."""
        return self.tensors(call.step)[call.inputs[index][1]]

    def output(self, call: Call, index: int = 0) -> Tensor:
        """The description of one output of a call."""
        return self.tensors(call.step)[call.outputs[index][1]]

    def steps(self) -> list[Step]:
        """The step lines."""
        return self.of(Step)

    def described(self) -> list[str]:
        """The module paths in the order in which they were first described."""
        return list(dict.fromkeys(record.path for record in self.of(Module) if record.cls))


def record(program: Callable[[Trace], Any], **options: Any) -> Recorded:
    """Run a program inside ``trace(every=1)``; the tracer itself must not fail."""
    records = Recorded()
    with trace(out=records.append, **{"every": 1, **options}) as t:
        program(t)
    assert records.actions("tracer_error") == []
    return records


class Net(nn.Module):
    """Two linear layers of which one is nested: paths "", "net", "net.0", "net.1", "head"."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.net(x))

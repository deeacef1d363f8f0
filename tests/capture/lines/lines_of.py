"""Run a function with its source lines traced, and read what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensortrace import Lines, trace
from tensortrace.records import Action, AnyRecord, Call, Line, Tensor


class Seen:
    """The records of a run; lines in the order of their seq."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    @property
    def lines(self) -> list[Line]:
        return sorted(
            (r for r in self.records if isinstance(r, Line)), key=lambda r: (r.step, r.seq)
        )

    @property
    def calls(self) -> list[Call]:
        return sorted(
            (r for r in self.records if isinstance(r, Call)), key=lambda r: (r.step, r.seq)
        )

    @property
    def tensors(self) -> dict[tuple[int, int], Tensor]:
        """Every tensor described, by step and id; described twice is an error."""
        found: dict[tuple[int, int], Tensor] = {}
        for record in self.records:
            for tensor in getattr(record, "tensors", ()):
                assert (record.step, tensor.id) not in found
                found[record.step, tensor.id] = tensor
        return found

    @property
    def faults(self) -> list[str]:
        return [
            r.detail["traceback"]
            for r in self.records
            if isinstance(r, Action) and r.action == "tracer_error"
        ]

    def changes(self, name: str) -> list[str]:
        """The texts that a variable had, one for each time that a line changed it."""
        return [v.text for line in self.lines for v in line.changed if v.name == name]

    def whats(self) -> list[str]:
        return [line.what for line in self.lines]

    def take(self, record: AnyRecord) -> None:
        self.records.append(record)


def lines_of(
    function: Callable[..., Any], *args: Any, lines: Any = True, every: Any = 1, **options: Any
) -> Seen:
    """Call a function under ``@trace(lines=...)``."""
    seen = Seen()
    trace(out=seen.take, lines=lines, every=every, **options)(function)(*args)
    assert not seen.faults, seen.faults[0]
    return seen


def all_of(function: Callable[..., Any], *args: Any, **options: Any) -> Seen:
    """The same with every execution of every line."""
    return lines_of(function, *args, lines=Lines(thin=False, **options))

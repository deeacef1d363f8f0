"""A row of the table: one record of a step and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensortrace.records import (
    SEVERITIES,
    Action,
    Call,
    Finding,
    Line,
    Optimizer,
    Param,
    Record,
    Severity,
    Step,
    Tensor,
)

Lookup = Callable[[int | None], Tensor | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the step, where it stands: `section` is its phase word, `depth` its nesting."""

    record: Record | None
    section: str
    depth: int = 0
    inside: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def seq(self) -> int | None:
        """The number of the record within its step; None for a finding."""
        return getattr(self.record, "seq", None)

    @property
    def severity(self) -> Severity | None:
        """The worst severity among the findings here."""
        return worst(self.findings)


def site_of(record: Record | None) -> tuple[object, ...]:
    """What stays the same from step to step, so that the cursor can stay on it."""
    match record:
        case Call():
            place = ("call", record.phase, record.module, record.op, record.nth)
            return (*place, record.node, record.replay)
        case Param():
            return ("param", record.name)
        case Optimizer():
            return ("optimizer", record.index)
        case Action():
            return ("action", record.action, record.of)
        case Line():
            return ("line", record.location)
    return (type(record).__name__,)


def worst(findings: Sequence[Finding]) -> Severity | None:
    """The worst severity among findings."""
    found = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), None)


def section_of(record: Record | None) -> str | None:
    """The phase word of a record, None if it belongs to whatever it stands in."""
    match record:
        case Call(phase=phase):
            return phase
        case Param() | Optimizer():
            return "optimizer"
        case Action(action="loss"):
            return "loss"
        case Action(action="clip" | "unscale"):
            return "optimizer"
        case Step():
            return "step"
    return None

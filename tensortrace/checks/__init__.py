"""What a check is, how checks are found, and the engine that runs them over records.

A check is a pure function over a `StepView`; the file it lives in is its documentation. The same
engine runs live and over a saved log: it is fed the records in log order and decides at gates
(`optimizer` lines, `action` lines named "gate") and when a `step` line closes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tensortrace.records import (
    Action,
    Call,
    ChainLink,
    Finding,
    Location,
    Module,
    Optimizer,
    Param,
    Phase,
    Record,
    Scalar,
    Severity,
    Step,
    Tensor,
)


@dataclass(slots=True)
class StepView:
    """A step as far as it has come: what a check may look at.

    `fresh` indexes the first call that no earlier gate of this step has shown. `tensors` are those
    of this step by id; `modules` and `findings` are of the whole run so far. `summary` is the step
    line, None until the step closes.
    """

    number: int
    update: int = 0
    calls: list[Call] = field(default_factory=list)
    fresh: int = 0
    params: list[Param] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    summary: Step | None = None
    modules: Mapping[str, Module] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a check saw, before the engine makes a finding of it.

    `cause` tells two findings of one check apart: the same cause is reported once and counted
    after that. `follows` is the id of the finding that this is a mere consequence of: it is then
    only counted. Left out, `severity`, `explanation` and `fix` are the check's own.
    """

    message: str
    cause: str = ""
    follows: str | None = None
    severity: Severity | None = None
    phase: Phase | None = None
    module: str | None = None
    op: str | None = None
    param: str | None = None
    seq: int | None = None
    tensor: int | None = None
    value: Scalar | None = None
    limit: Scalar | None = None
    location: Location | None = None
    explanation: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    chain: tuple[ChainLink, ...] = ()
    fix: str | None = None


When = Literal["gate", "step"]
# A check gets the step, a dict of its own that lives as long as the run, and its thresholds.
Rule = Callable[..., Iterator[Draft]]


@dataclass(frozen=True, slots=True)
class Check:
    """A rule with its code, name, moment and the severity of what it finds."""

    code: str
    name: str
    severity: Severity
    when: When
    rule: Rule

    @property
    def thresholds(self) -> dict[str, Any]:
        """The keyword-only parameters of the rule with their defaults."""
        raise NotImplementedError


def check(
    code: str, name: str, *, severity: Severity = "warning", when: When = "step"
) -> Callable[[Rule], Check]:
    """Make a check of a rule ``(step: StepView, memory: dict, *, thresholds) -> Iterator[Draft]``."""

    def wrap(rule: Rule) -> Check:
        return Check(code, name, severity, when, rule)

    return wrap


class Engine:
    """Run checks over records, live or from a saved log, and find the same in both.

    Args:
        checks: those to run; `all_checks()` by default.
        settings: ``{"TT202.ratio": 100.0}``; an unknown name is a `UsageError`.
    """

    def __init__(
        self, checks: Iterable[Check] | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        raise NotImplementedError

    def feed(self, record: Record) -> list[Finding]:
        """Take the next record in log order; returns what became certain with it."""
        raise NotImplementedError

    def take_repeats(self) -> dict[str, int]:
        """Hand over, by finding id, what was only counted since the last call."""
        raise NotImplementedError


def all_checks() -> list[Check]:
    """List every check in this folder, by code."""
    raise NotImplementedError


def select(choice: Iterable[str] | None, ignore: Iterable[str] = ()) -> list[Check]:
    """Choose checks by code, name or code prefix ("TT1"); an unknown one is a `UsageError`."""
    raise NotImplementedError

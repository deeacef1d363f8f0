"""Which executions of the lines of a frame are recorded, and what the others left behind."""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.compiled import base_of

if TYPE_CHECKING:
    from tensortrace.capture.lines.statements import Statements
    from tensortrace.capture.lines.variables import Change

_NONE = object()

_OF_PASSED, _OWN_OF_PASSED = ("count", "first", "host_ns", "nth", "seq"), ()
_OF_THINNING = (
    "_again", "_counts", "_leaving", "_shapes", "_special", "_statement", "owed", "passed",
)  # fmt: skip
_OWN_OF_THINNING = ("_entries", "_met", "_statements")


class Passed(base_of("Passed", _OF_PASSED)):  # type: ignore[misc] # compiled where it can be
    """The executions of a line that were passed over since its last record."""

    __slots__ = tuple(_OWN_OF_PASSED)

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = self.seq = self.nth = self.host_ns = 0


class Thinning(base_of("Thinning", _OF_THINNING)):  # type: ignore[misc] # as above
    """Counts the executions of the lines of one frame in the step in flight.

    Of a statement over several lines Python tells some lines more than once: that is one execution.

    Args:
        statements: of the frame's code.
    """

    __slots__ = tuple(_OWN_OF_THINNING)

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        # Other lines are a statement each, and no `with`.
        self._special = statements.special
        self._counts: dict[int, int] = {}
        self._shapes: dict[tuple[int, str], Any] = {}
        # The statement over several lines that runs, or the `with` that is left; its lines so far.
        self._statement = self._leaving = 0
        # By line of a `with` the instruction that it began at.
        self._entries: dict[int, int] = {}
        self._met: set[int] = set()
        self._again = False
        # By line.
        self.passed: dict[int, Passed] = {}
        # What lines changed that were passed over: by name, which line, and what was there before.
        self.owed: dict[str, tuple[int, Any]] = {}

    def begin_step(self, line: int = 0) -> None:
        """Count anew; a line that runs already is in its first execution, or the rest of one."""
        self._counts.clear()
        self.passed.clear()
        self.owed.clear()
        self._shapes.clear()
        if line:
            self._counts[line] = 1 - self._again

    def begin(self, line: int, last: int, frame: FrameType) -> int:
        """Count a line that begins after another; returns which execution it is, from 0. Hot.

        By its instruction a `with` that begins is told from one that is left. The rest of an
        execution that was counted in the step before is -1.
        """
        if line not in self._special:
            self._statement = self._leaving = 0
            self._again = False
        else:
            self._begin_statement(line, last, frame.f_lasti)
        nth = self._counts.get(line, 0) - self._again
        self._counts[line] = nth + 1
        return nth

    def _begin_statement(self, line: int, last: int, at: int) -> None:
        statement = self._statements.begun_by(line)
        if self._statements.leaves(last, line):
            self._statement, self._leaving = 0, statement
            self._again = True
            self._met.clear()
        elif statement and statement == self._leaving and at != self._entries.get(line):
            self._again = True  # the next part of a `with` that is left
        else:
            if not statement or statement != self._statement:
                self._met.clear()
            self._again = line in self._met
            self._statement, self._leaving = statement, 0
            self._met.add(line)
            if not self._again and line in self._statements.withs:
                self._entries[line] = at

    @property
    def nth_in_flight(self) -> int:
        """Which execution the line that runs while a step begins is."""
        return -self._again

    def is_first(self, nth: int) -> bool:
        """Whether the line that began last has not run before in this frame and step."""
        return nth == 0 and not self._again

    def reshapes(self, line: int, changes: list[Change]) -> bool:
        """Whether something that a line changed has another shape than the last time it did. Hot.

        A number that is not finite any more, or is again, has another shape, too.
        """
        found, shapes = False, self._shapes
        for name, value, _ in changes:
            kind = type(value)
            shape: Any
            first: Any = _NONE
            if kind is torch.Tensor:
                try:
                    shape = value.shape
                except RuntimeError:
                    shape = None  # nested
            elif kind is float:
                shape, first = value - value == 0, True
            elif issubclass(kind, torch.Tensor):
                shape = _shape(value)
            else:
                continue
            key = line, name
            before = shapes.get(key, first)
            if before is not shape:
                found |= before is not _NONE and before != shape
                shapes[key] = shape
        return found

    def pass_over(
        self, line: int, changes: list[Change], execution: tuple[int, int, int, bool]
    ) -> None:
        """Count an execution, and keep what the next record of the line must make up for. Hot.

        Args:
            line: that it is of.
            changes: what it changed.
            execution: its seq, which one it is, its time, and whether it is quiet: nothing was
                recorded in it. If it changed nothing either, as at the end of a loop, it has no
                place of its own: the record stands where something was changed last.
        """
        seq, nth, host_ns, quiet = execution
        passed = self.passed.get(line)
        if passed is None:
            passed = self.passed[line] = Passed(seq)
        if nth != passed.nth or not passed.count:
            passed.count += 1
        if changes or not quiet or not passed.seq:
            passed.seq = seq
        passed.nth, passed.host_ns = nth, host_ns
        for name, _, old in changes:
            owed = self.owed.get(name)
            self.owed[name] = (line, old if owed is None else owed[1])

    def pay(self, line: int, variables: Any, changes: list[Change]) -> None:
        """Add what a line had changed when it was passed over, as it is now."""
        names = [name for name, (by, _) in self.owed.items() if by == line]
        for name in names:
            _, old = self.owed.pop(name)
            if name in variables:
                changes.append((name, variables[name], old))


def _shape(tensor: torch.Tensor) -> Any:
    try:
        # A jagged dim is no number, and one to a batch.
        return tensor.shape if tensor.layout is not torch.jagged else None
    except RuntimeError:
        return None

"""Columns of steps on the screen: the line of findings over them, the line of step numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensortrace.records import Severity
from tensortrace.text import SEVERITY_SIGN
from tensortrace.tui.span import Span
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, fit


@dataclass(frozen=True, slots=True)
class Columns:
    """`shown` columns of a span, each `wide` cells, after a `gutter` of cells."""

    span: Span
    shown: int
    wide: int
    gutter: int
    glyphs: Glyphs = UNICODE

    def marks_line(self, marks: Mapping[int, Severity]) -> Styled:
        """Mark the columns that have a finding by its worst severity; notes are left out."""
        worst: dict[int, Severity] = {}
        for step, severity in marks.items():
            at = self.span.column(step)
            if worst.get(at) != "error" and severity != "note":
                worst[at] = severity
        line: Styled = [(fit(" findings", self.gutter, self.glyphs), "faint")]
        for at in range(self.shown):
            held = worst.get(at)
            line.append(((SEVERITY_SIGN[held] if held else " ").ljust(self.wide), held or ""))
        return line

    def steps_line(self, column: int, width: int) -> Styled:
        """Name the first step, and the steps of the column that the cursor is in.

        The sign stands on that column; the steps are left of it if there is no room to the right.
        """
        span = self.span
        steps = span.steps(column)
        told = f"{steps.start}" if span.per == 1 else f"{steps.start}-{steps.stop - 1}"
        room = max(0, width - self.gutter)
        axis = [" "] * room
        at, label = column * self.wide, f"{self.glyphs.here} {told}"
        if at + len(label) > room:
            at, label = at - len(told) - 1, f"{told} {self.glyphs.here}"
        at = max(0, min(at, room - len(label)))
        axis[at : at + len(label)] = label
        if at > len(str(span.start)):
            axis[: len(str(span.start))] = str(span.start)
        return [(fit(" step", self.gutter, self.glyphs), "faint"), ("".join(axis)[:room], "ok")]

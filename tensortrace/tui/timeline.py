"""The step timeline: one cell a step around the current one, height = gradient norm or loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.strip import Strip

from tensortrace.records import Severity, Step, from_scalar
from tensortrace.text import SEVERITY_SIGN, number_text
from tensortrace.tui.terminal.looks import look_of
from tensortrace.tui.terminal.strips import Drawn, filled
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled

# Columns between the label of the step and what the cells mean.
GAP = 3


def window(current: int, first: int, last: int, width: int) -> range:
    """Choose the steps that are shown: at most `width`, the current one near the middle."""
    width = max(1, width)
    start = max(first, min(current - width // 2, last - width + 1))
    return range(start, min(last, start + width - 1) + 1)


def cell_width(steps: int, width: int) -> int:
    """How many columns a cell has: a short run gets wider cells, easier to see and to click."""
    return max(1, min(4, width // max(1, steps)))


def heights(values: Sequence[float | None], levels: int) -> list[int | None]:
    """Scale numbers to ``0 .. levels - 1``, None for what is unknown or not finite.

    The scale is logarithmic where the largest is over 100 times the smallest and all are positive.
    """
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return [None] * len(values)
    low, high = min(finite), max(finite)
    log = low > 0 and high / low > 100
    if log:
        low, high = math.log(low), math.log(high)
    scaled: list[int | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            scaled.append(None)
        elif high == low:
            scaled.append(levels // 2)
        else:
            share = ((math.log(value) if log else value) - low) / (high - low)
            scaled.append(min(levels - 1, int(share * levels)))
    return scaled


def quantity(steps: Mapping[int, Step], shown: range) -> tuple[str, list[float | None]]:
    """Choose what the heights mean: the gradient norm if any shown step has one, else the loss."""
    known = [steps.get(number) for number in shown]
    norms = [from_scalar(step.grad_norm) if step else None for step in known]
    if any(norm is not None for norm in norms):
        return "grad norm", norms
    return "loss", [from_scalar(step.loss) if step else None for step in known]


def timeline_lines(
    steps: Mapping[int, Step],
    marks: Mapping[int, Severity],
    current: int,
    shown: range,
    glyphs: Glyphs = UNICODE,
    *,
    wide: int = 1,
    rank: str = "",
    columns: int | None = None,
) -> list[Styled]:
    """Draw the cells and, below them, what they mean: two lines.

    Args:
        steps: the step lines that are known; others are drawn as unknown.
        marks: the worst severity of the findings of a step; errors and warnings replace the bar.
        wide: columns of a cell.
        rank: whose steps they are, "" where there is one alone.
        columns: for so many what the cells mean is shortened; None: any number.
    """
    what, values = quantity(steps, shown)
    cells: Styled = [(" ", "")]
    for number, value, height in zip(shown, values, heights(values, len(glyphs.bars)), strict=True):
        text, style = glyphs.unknown, "faint"
        if height is not None:
            text, style = glyphs.bars[height], "ok"
        elif value is not None:
            text, style = "x", "error"
        severity = marks.get(number)
        if severity in ("error", "warning"):
            text, style = SEVERITY_SIGN[severity], severity
        gap = text if height is not None and severity is None else " "
        cells.append((text + gap * (wide - 1), "here" if number == current else style))
    at = (current - shown.start) * wide
    what = f"{rank} {what}" if rank else what
    finite = [v for v in values if v is not None and math.isfinite(v)]
    extent = "not finite" if any(v is not None for v in values) else "unknown"
    if finite:
        extent = f"{number_text(min(finite))} to {number_text(max(finite))}"
    part = f"{shown.start}-{shown.stop - 1}"
    told = [f"{what} {extent}, steps {part}", f"{what} {extent}, {part}", f"{what} {extent}"]
    label = f"{glyphs.here} {current}"
    if columns is not None and 1 + at + len(label) > columns:
        # At the right edge the number stands before its sign.
        label = f"{current} {glyphs.here}"
        at = max(0, at + 1 - len(label))
    return [cells, _axis(told, label, at, columns)]


def _axis(told: Sequence[str], label: str, at: int, columns: int | None) -> Styled:
    """Put a label at a column, and the longest text that there is room for before or behind it."""
    left = at - GAP
    right = math.inf if columns is None else columns - (1 + at + len(label) + GAP)
    for text in told:
        if len(text) <= left:
            return [(f" {text.ljust(at)}", "faint"), (label, "ok")]
        if len(text) <= right:
            return [(" " * (1 + at), ""), (label, "ok"), (f"{'':{GAP}}{text}", "faint")]
    return [(" " * (1 + at), ""), (label, "ok")]


class Timeline(Drawn):
    """The timeline on the screen; a click on a cell asks for its step."""

    DEFAULT_CSS = "Timeline { height: 2; }"

    class Picked(Message):
        """A step was clicked."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    def __init__(self, glyphs: Glyphs) -> None:
        super().__init__(id="timeline")
        self.glyphs = glyphs
        self.shown, self.wide = range(0), 1
        self._lines: list[Styled] = []

    def show(
        self,
        steps: Mapping[int, Step],
        marks: Mapping[int, Severity],
        current: int,
        shown: range,
        width: int,
        *,
        rank: str = "",
    ) -> None:
        """Draw the steps of a range, for so many columns: our own are known later than those."""
        self.shown = shown
        self.wide = cell_width(len(shown), width - 2)
        lines = timeline_lines(
            steps, marks, current, shown, self.glyphs,
            wide=self.wide, rank=rank, columns=width,
        )  # fmt: skip
        if lines != self._lines:
            self._lines = lines
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw one of the two lines."""
        width = self.size.width
        if y >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        base, styles = self.rich_style, look_of(self.app.theme).styles
        pieces = [Segment(text, base + styles[style]) for text, style in self._lines[y]]
        return filled(pieces, width, base)

    def on_click(self, event: events.Click) -> None:
        """Ask for the step under the pointer."""
        at = (event.x - 1) // self.wide
        if 0 <= at < len(self.shown):
            self.post_message(self.Picked(self.shown[at]))

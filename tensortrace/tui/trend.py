"""How a row of a step went over the run: a few bars from a few step lines."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tensortrace.records import Call, Param, Record
from tensortrace.run import looked_at
from tensortrace.tui.grid import Grid
from tensortrace.tui.span import Span, fitting, span_of
from tensortrace.tui.terminal.styled import UNICODE, Glyphs
from tensortrace.tui.timeline import heights

COLUMNS = 8


def trend_span(first: int, last: int) -> Span:
    """The whole run in a few columns."""
    return span_of(first, last, COLUMNS, fitting(first, last, COLUMNS), first)


def sample(span: Span, first: int, last: int) -> Iterator[range]:
    """Two steps of each column, enough for a trend: the first and the middle one.

    Of inner modules most steps of a long run know nothing: it is the next ones that do.
    """
    for column in range(span.columns):
        steps = span.steps(column)
        middle = range(steps.start + len(steps) // 2, steps.stop)
        for step in sorted({looked_at(steps), looked_at(middle)}):
            if first <= step <= last:
                yield range(step, step + 1)


def quantity_of(record: Record | None) -> tuple[str, str] | None:
    """The module of a row and what of it is followed: outputs, their gradients, its weights'."""
    match record:
        case Call(module=str(path), op=None, phase="backward"):
            return path, "grad_rms"
        case Call(module=str(path), op=None):
            return path, "output_rms"
        case Param(module=str(path)):
            return path, "param_grad_rms"
    return None


def trend_text(grid: Grid | None, record: Record | None, glyphs: Glyphs = UNICODE) -> str:
    """Draw the trend of a row, ``""`` where there is none; x where something was not finite."""
    asked = quantity_of(record)
    row = grid.row(asked[0]) if grid is not None and asked is not None else None
    if grid is None or asked is None or row is None:
        return ""
    values = grid.numbers(asked[1], row).tolist()
    bad = [bool(grid.nonfinite(row, at, asked[1])) for at in range(grid.span.columns)]
    # From half of the largest on at least: what hardly moves is drawn as what hardly moves.
    known = [value for value in values if math.isfinite(value)]
    bars = heights([*values, max(known, default=0.0) / 2], len(glyphs.bars))[:-1]
    cells = [
        "x" if x else " " if at is None else glyphs.bars[at]
        for at, x in zip(bars, bad, strict=True)
    ]
    return "".join(cells).rstrip()

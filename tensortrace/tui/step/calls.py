"""The table of a step's calls: which columns fit, and a row as one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from rich.cells import cell_len

from tensortrace.records import Call, Module, Param
from tensortrace.text import SEVERITY_SIGN
from tensortrace.tui.grid import Grid
from tensortrace.tui.step.cells import Cells, cells
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import (
    UNICODE,
    Glyphs,
    Styled,
    clip,
    clip_path,
    clip_words,
    fit,
)
from tensortrace.tui.trend import trend_text

SHORT_SECTIONS = {
    "forward": "fwd", "backward": "bwd", "optimizer": "opt", "loss": "loss", "step": "step",
}  # fmt: skip


# Every column but the name, left to right: its meaning, and its width where there is room.
MEANINGS = {
    "seq": "number of the record within its step",
    "phase": "forward, loss, backward, optimizer",
    "shape": "shape of the output, or of the gradient that arrived",
    "type": "dtype",
    "mean": "mean of the finite elements",
    "std": "their standard deviation",
    "norm": "their L2 norm",
    "min": "the smallest",
    "max": "the largest",
    "zeros": "share of exact zeros",
    "time": "on the host, children included",
    "device": "on the GPU, of full steps",
    "trend": "rms of output or gradient over the run",
    "where": "your line",
    "health": "NaN, infinity, findings",
}
WIDTHS = dict(zip(MEANINGS, (5, 10, 20, 5, 9, 9, 9, 9, 9, 7, 9, 9, 10, 24, 10), strict=True))
NARROW = {"phase": 6, "shape": 14, "mean": 8, "std": 8}
NUMBERS = ("mean", "std", "norm", "min", "max", "zeros", "time", "device")
# From which width of the table on a column is shown, if nobody chose.
SHOWN_FROM = {
    "seq": 0, "phase": 50, "shape": 56, "type": 64, "mean": 72, "std": 72, "norm": 88, "time": 96,
    "trend": 106, "where": 140, "health": 0,
}  # fmt: skip
# What gives way first where the chosen columns leave no room for the name.
GIVES_WAY = (
    "where",
    "device",
    "time",
    "trend",
    "zeros",
    "norm",
    "max",
    "min",
    "std",
    "mean",
    "type",
    "shape",
)
# Cells of the name: at least, if the user chose the columns; if nobody did; from which on the other
# columns are wide.
NAME_FROM, NAME_SHOWN, NAME_WIDE = 12, 20, 28


@dataclass(frozen=True, slots=True)
class Columns:
    """Column widths in cells for a pane's width; 0 leaves a column out."""

    name: int
    widths: Mapping[str, int]

    def __getitem__(self, column: str) -> int:
        return self.widths.get(column, 0)


def columns(width: int, chosen: frozenset[str] | None = None) -> Columns:
    """Choose the columns for a width; the name takes what the others leave.

    Args:
        chosen: what the user wants to see; None leaves it to the width.
    """
    held = [name for name, low in SHOWN_FROM.items() if width >= low]
    if chosen is not None:
        held = [name for name in MEANINGS if name in chosen]
    widths = {name: WIDTHS[name] for name in held}
    if width < 96 or width - 2 - sum(widths.values()) < NAME_WIDE:
        widths |= {name: cells for name, cells in NARROW.items() if name in widths}
    if "seq" in widths and width < 60:
        widths["seq"] = 4
    # The name says most: what nobody asked for gives way before it is cut.
    low = NAME_FROM if chosen is not None else NAME_SHOWN if width >= 72 else 0
    # What the width alone would show was not asked for: it goes first.
    asked = [name for name in GIVES_WAY if SHOWN_FROM.get(name, width + 1) > width]
    for name in [name for name in GIVES_WAY if name not in asked] + asked:
        if width - 2 - sum(widths.values()) < low:
            widths.pop(name, None)
    return Columns(max(8, width - 2 - sum(widths.values())), widths)


def head_line(width: int, glyphs: Glyphs = UNICODE, chosen: frozenset[str] | None = None) -> Styled:
    """The titles of the columns."""
    at = columns(width, chosen)
    text = fit(" seq" if at["seq"] else "", at["seq"] + 1, glyphs, right=True) + " "
    text += fit("phase", at["phase"], glyphs) + fit("module or op", at.name, glyphs)
    text += fit(" shape", at["shape"], glyphs) + fit(" type", at["type"], glyphs)
    for title in NUMBERS:
        text += fit(title, at[title], glyphs, right=True)
    text += fit("  trend", at["trend"], glyphs) + fit("  where", at["where"], glyphs)
    return [(text + fit("  health", at["health"], glyphs), "faint")]


def row_line(
    rows: StepRows,
    at: int,
    modules: Mapping[str, Module],
    width: int,
    *,
    here: bool = False,
    first: bool = False,
    glyphs: Glyphs = UNICODE,
    chosen: frozenset[str] | None = None,
    trends: Grid | None = None,
) -> Styled:
    """Write a row as a line of a width.

    The phase word stands where its section begins and, with `first`, on the topmost visible line,
    so that one always sees where in the step one is.
    """
    row = rows[at]
    held = cells(row, partial(rows.tensor_near, rows.slot(at)), modules)
    layout = columns(width, chosen)
    opens = first or at == 0 or rows[at - 1].section != row.section
    section = row.section if layout["phase"] >= 10 else SHORT_SECTIONS.get(row.section, row.section)
    line: Styled = [
        (glyphs.cursor if here else " ", ""),
        (fit(held.seq, layout["seq"], glyphs, right=True) + " ", "faint"),
        (fit(section if opens else "", layout["phase"]), "section"),
    ]
    room, numbers = layout.name, _numbers(held, layout, glyphs)
    if not held.shape:
        times = ((held.time, layout["time"]), (held.device, layout["device"]))
        time = "".join(fit(text, width, glyphs, right=True) for text, width in times if width)
        room, numbers = room + cell_len(numbers) - cell_len(time), time
    indent = " " * min(2 * row.depth, layout.name // 3)
    before = indent + _marker(rows, at, glyphs)
    named = clip_path if isinstance(row.record, Call | Param) else clip
    name = clip(before + named(held.name, max(1, room - cell_len(before)), glyphs), room, glyphs)
    kind, word, tone = held.kind, held.health, held.style
    inside, calls = rows.inside(at), rows.holds(at) if rows.closed(at) else 0
    if inside or calls:
        ops = "" if not inside else f"{inside} ops" if inside > 1 else "1 op"
        within = "" if not calls else f"{calls} calls" if calls > 1 else "1 call"
        told = ", ".join(filter(None, [within, ops]))
        fits = cell_len(name) + cell_len(kind) + cell_len(told) + 4 <= room
        kind = ", ".join(filter(None, [kind, told])) if fits else told
    under = rows.under(at)
    if under is not None:
        word, tone = f"{SEVERITY_SIGN[under]} in it", under
    style = "op" if getattr(row.record, "op", None) else "strong" if opens else "name"
    left = room - cell_len(name)
    where = held.where[-max(0, layout["where"] - 2) :]  # of a long one the line number stays
    return [
        *line,
        (name, style),
        (fit(clip_words(f"  {kind}", left, glyphs) if kind and left > 5 else "", left), "faint"),
        (numbers, ""),
        (fit(f"  {trend_text(trends, row.record, glyphs)}", layout["trend"], glyphs), "ok"),
        (fit(f"  {where}", layout["where"], glyphs), "faint"),
        (fit(f"  {word}", layout["health"], glyphs), tone),
    ]


def _marker(rows: StepRows, at: int, glyphs: Glyphs) -> str:
    """Say whether a call has calls inside that show; as wide where it has none."""
    if not rows.folding:
        return ""
    if not rows.inside(at) and not rows.holds(at):
        return "  "
    shut = rows.closed(at) or (rows.inside(at) and not rows.opens(at))
    return (glyphs.folded if shut else glyphs.unfolded) + " "


def _numbers(held: Cells, at: Columns, glyphs: Glyphs) -> str:
    shape = held.shape if cell_len(held.shape) < at["shape"] else held.shape.replace(", ", ",")
    text = fit(" " + shape, at["shape"], glyphs) + fit(" " + held.dtype, at["type"], glyphs)
    return text + "".join(
        fit(clip_words(getattr(held, name), at[name], glyphs), at[name], right=True)
        for name in NUMBERS
    )

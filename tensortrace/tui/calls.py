"""The table of a step's calls: which columns fit, and a row as one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from rich.cells import cell_len

from tensortrace.records import Module
from tensortrace.tui.cells import Cells, cells
from tensortrace.tui.rows import StepRows
from tensortrace.tui.theme import SEVERITY_GLYPH, UNICODE, Glyphs, Styled, clip, fit

SHORT_SECTIONS = {
    "forward": "fwd", "backward": "bwd", "optimizer": "opt", "loss": "loss", "step": "step",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Columns:
    """Column widths in cells for a pane's width; 0 leaves a column out."""

    seq: int
    section: int
    name: int
    shape: int
    dtype: int
    mean: int
    std: int
    norm: int
    time: int
    where: int
    health: int


def columns(width: int) -> Columns:
    """Choose the columns for a width; the name takes what the others leave."""
    number = 8 if width >= 72 else 0
    wide = width >= 96
    fixed = {
        "seq": 5 if width >= 60 else 4,
        "section": (10 if wide else 6) if width >= 50 else 0,
        "shape": (20 if wide else 14) if width >= 56 else 0,
        "dtype": 5 if width >= 64 else 0,
        "mean": 9 if wide else number,
        "std": 9 if wide else number,
        "norm": 9 if width >= 88 else 0,
        "time": 9 if wide else 0,
        "where": 24 if width >= 136 else 0,
        "health": 10,
    }
    return Columns(name=max(8, width - 2 - sum(fixed.values())), **fixed)


def head_line(width: int, glyphs: Glyphs = UNICODE) -> Styled:
    """The titles of the columns."""
    at = columns(width)
    text = fit(" seq", at.seq + 1, glyphs, right=True) + " " + fit("phase", at.section, glyphs)
    text += fit("module or op", at.name, glyphs)
    text += fit(" shape", at.shape, glyphs) + fit(" type", at.dtype, glyphs)
    for title in ("mean", "std", "norm", "time"):
        text += fit(title, getattr(at, title), glyphs, right=True)
    text += fit("  where", at.where, glyphs)
    return [(text + fit("  health", at.health, glyphs), "faint")]


def row_line(
    rows: StepRows,
    at: int,
    modules: Mapping[str, Module],
    width: int,
    *,
    here: bool = False,
    first: bool = False,
    glyphs: Glyphs = UNICODE,
) -> Styled:
    """Write a row as a line of a width.

    The phase word stands where its section begins and, with `first`, on the topmost visible line,
    so that one always sees where in the step one is.
    """
    row = rows[at]
    held = cells(row, partial(rows.tensor_near, rows.slot(at)), modules)
    layout = columns(width)
    opens = first or at == 0 or rows[at - 1].section != row.section
    section = row.section if layout.section >= 10 else SHORT_SECTIONS.get(row.section, row.section)
    line: Styled = [
        (glyphs.cursor if here else " ", ""),
        (fit(held.seq, layout.seq, glyphs, right=True) + " ", "faint"),
        (fit(section if opens else "", layout.section), "section"),
    ]
    room, numbers = layout.name, _numbers(held, layout, glyphs)
    if not held.shape:
        time = fit(held.time, layout.time, glyphs, right=True) if layout.time else ""
        room, numbers = room + cell_len(numbers) - cell_len(time), time
    indent = " " * min(2 * row.depth, layout.name // 3)
    name = clip(indent + _marker(rows, at, glyphs) + held.name, room, glyphs)
    kind, word, tone = held.kind, held.health, held.style
    if inside := rows.inside(at):
        told = f"{inside} ops" if inside > 1 else "1 op"
        fits = cell_len(name) + cell_len(kind) + cell_len(told) + 4 <= room
        kind = ", ".join(filter(None, [kind, told])) if fits else told
    under = rows.under(at)
    if under is not None:
        word, tone = f"{SEVERITY_GLYPH[under]} inside", under
    style = "op" if getattr(row.record, "op", None) else "strong" if opens else "name"
    left = room - cell_len(name)
    where = held.where[-max(0, layout.where - 2) :]  # of a long one the line number stays
    return [
        *line,
        (name, style),
        (fit(f"  {kind}" if kind and left > 5 else "", left, glyphs), "faint"),
        (numbers, ""),
        (fit(f"  {where}", layout.where, glyphs), "faint"),
        (fit(f"  {word}", layout.health, glyphs), tone),
    ]


def _marker(rows: StepRows, at: int, glyphs: Glyphs) -> str:
    """Say whether a call has ops inside that show; as wide where it has none."""
    if not rows.folding:
        return ""
    if not rows.inside(at):
        return "  "
    return (glyphs.unfolded if rows.opens(at) else glyphs.folded) + " "


def _numbers(held: Cells, at: Columns, glyphs: Glyphs) -> str:
    shape = held.shape if cell_len(held.shape) < at.shape else held.shape.replace(", ", ",")
    text = fit(" " + shape, at.shape, glyphs) if at.shape else ""
    text += fit(" " + held.dtype, at.dtype, glyphs) if at.dtype else ""
    for number, width in (
        (held.mean, at.mean),
        (held.std, at.std),
        (held.norm, at.norm),
        (held.time, at.time),
    ):
        text += fit(number, width, glyphs, right=True) if width else ""
    return text

"""The heat map of layers by steps as lines: a colour and a glyph for each power of ten.

The colours are steps of viridis, which every kind of colour vision and a grey screen read in the
same order; the glyphs grow denser with them, so that the picture is there without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.cells import cell_len

from tensortrace.records import Module, Severity
from tensortrace.run import nonfinite_letter
from tensortrace.text import escape, module_text, number_text
from tensortrace.tui.grid import FLAGS, QUANTITIES, Grid, letters_of
from tensortrace.tui.terminal.looks import HEAT
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, clip_path, cut, fit
from tensortrace.tui.views.columns import Columns

LEVELS = len(HEAT)
WORDS = {"n": "NaN", "i": "infinite", "o": "in an output", "g": "in a gradient", "f": "finding"}


@dataclass(frozen=True, slots=True)
class Scale:
    """From a number to a level: logarithmic from `low` to `high`, or of shares from 0 to 1."""

    low: float
    high: float
    log: bool = True

    def level(self, value: float) -> int:
        """The level of a number, ``0 .. LEVELS - 1``."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (0.0, 1.0)
        at = math.log10(value) if self.log else value
        return max(0, min(LEVELS - 1, int((at - low) / (high - low) * LEVELS)))


def scale_of(grid: Grid, name: str) -> Scale:
    """Choose the scale of a quantity: whole powers of ten around what is shown."""
    if name == "zero_frac":
        return Scale(0.0, 1.0, log=False)
    low, high = grid.range_of(name) or (0.1, 1.0)
    # Powers of ten that are ordinary floats.
    bottom = max(-307, min(307, math.floor(math.log10(low))))
    top = max(bottom + 1, min(308, math.ceil(math.log10(high))))
    return Scale(10.0**bottom, 10.0**top)


def name_width(width: int, longest: int = 0) -> int:
    """Cells for the names of the modules, of which the longest takes so many."""
    return max(8, min(max(36, longest + 2), width // 4))


@dataclass(frozen=True, slots=True)
class HeatMap:
    """One quantity of a grid as lines: `shown` columns, each `wide` cells."""

    grid: Grid
    name: str
    scale: Scale
    shown: int
    wide: int
    glyphs: Glyphs = UNICODE
    longest: int = 0

    def gutter(self, width: int) -> int:
        """Cells for the names of the modules: what the columns and a scrollbar leave, if more."""
        held = name_width(width, self.longest)
        return max(held, min(self.longest + 2, width - self.shown * self.wide - 1))

    def cell(self, row: int, column: int) -> tuple[str, str]:
        """The glyph and style of a cell: a flag, else the level; ``0`` for exactly nothing."""
        return self._cell(
            float(self.grid.numbers(self.name, row)[column]), int(self.grid.flags[row, column])
        )

    def _cell(self, value: float, flags: int) -> tuple[str, str]:
        if flags:
            letter = nonfinite_letter(letters_of(flags), self.name)
            if letter:
                return letter, "flag"
            if flags & FLAGS["f"]:
                return "f", "flagged"
        if not math.isfinite(value):
            return " ", ""
        if value <= 0 and self.scale.log:
            return "0", "zero"
        return self._level(self.scale.level(value))

    def _level(self, level: int) -> tuple[str, str]:
        heat = self.glyphs.heat
        return heat[level * len(heat) // LEVELS], HEAT[level]

    def row_line(
        self, row: int, column: int, modules: Mapping[str, Module], width: int, *, here: bool
    ) -> Styled:
        """Write a module as a line: its name, then a cell for each column of steps."""
        path = self.grid.paths[row]
        module = modules.get(path)
        told = module_text(path, module.cls if module else None)
        room = self.gutter(width) - 1
        line: Styled = [
            (self.glyphs.cursor if here else " ", ""),
            (fit(clip_path(told, room - 1, self.glyphs), room), "name"),
        ]
        values = self.grid.numbers(self.name, row)[: self.shown].tolist()
        flags = self.grid.flags[row, : self.shown].tolist()
        for at, (value, bits) in enumerate(zip(values, flags, strict=True)):
            glyph, style = self._cell(value, bits)
            # Where a cell is several columns wide a letter stands once.
            text = glyph * self.wide if style in HEAT else glyph.ljust(self.wide)
            line.append((text, "here" if here and at == column else style))
        return line

    def head_lines(self, marks: Mapping[int, Severity], column: int, width: int) -> list[Styled]:
        """Three lines over the map: what it means, the findings, which steps there are."""
        held = Columns(self.grid.span, self.shown, self.wide, self.gutter(width), self.glyphs)
        return [self.legend(), held.marks_line(marks), held.steps_line(column, width)]

    def legend(self) -> Styled:
        """Say what the colours and the letters mean."""
        low, high = number_text(self.scale.low), number_text(self.scale.high)
        if self.name == "zero_frac":
            low, high = "0 %", "100 %"
        line: Styled = [(f" {QUANTITIES[self.name]}  {low} ", "")]
        line += [self._level(level) for level in range(LEVELS)]
        line += [(f" {high}", "")]
        for letter, style, word in (
            ("n", "flag", "NaN"), ("i", "flag", "inf"), ("f", "flagged", "finding"),
            ("0", "zero", "all zero"),
        ):  # fmt: skip
            line += [("  ", ""), (letter, style), (f" {word}", "faint")]
        return line


def told_lines(
    grid: Grid,
    row: int,
    column: int,
    modules: Mapping[str, Module],
    width: int,
    *,
    glyphs: Glyphs = UNICODE,
) -> list[Styled]:
    """Tell the numbers of a cell, all quantities."""
    if not 0 <= row < len(grid.paths):
        return []
    path, span = grid.paths[row], grid.span
    module = modules.get(path)
    cls = escape(module.cls) if module is not None else ""
    steps = span.steps(column)
    when = f"step {steps.start}" if span.per == 1 else f"steps {steps.start} to {steps.stop - 1}"
    flags = int(grid.flags[row, column])
    words = [word for letter, word in WORDS.items() if flags & FLAGS[letter]]
    told = "  x " + ", ".join(words) if words else ""
    name, kind = module_text(path, cls), f"  {cls}" if path else ""
    room = width - len(when) - 2 - cell_len(told)
    if cell_len(name + kind) > room:  # the map says the name too, and nothing else the flags
        kind = ""
    name = clip_path(name, max(1, room), glyphs)
    head: Styled = [(name, "strong"), (kind, "op"), (f"  {when}", ""), (told, "error")]
    most = "" if span.per == 1 else "the largest of each: "
    numbers = []
    for quantity, called in QUANTITIES.items():
        value = float(grid.numbers(quantity, row)[column])
        before = math.isnan(grid.values[quantity][row, column]) and not math.isnan(value)
        text = (
            "-"
            if math.isnan(value)
            else f"{value:.0%}"
            if quantity == "zero_frac"
            else number_text(value)
        )
        numbers.append(f"{called} {text}" + " (before)" * before)
    lines, text = [head], most
    for number in numbers:
        if len(text) + len(number) + 2 > width and text:
            lines.append([(text, "")])
            text = ""
        text += ("" if not text or text == most else "  ") + number
    return [cut(line, width, glyphs) for line in [*lines, [(text, "")]]]

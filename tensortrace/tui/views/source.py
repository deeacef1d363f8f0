"""The view of the source: walk the executed lines of a step, back and forth, with their variables.

The place in the run goes along: every other key and view finds the record of the line one is at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.worker import get_current_worker

from tensortrace.export.lines import source_of, spans_of
from tensortrace.records import Finding, Record
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.panes import Pane
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import Styled, clip
from tensortrace.tui.views.executed import Executed, as_json, read_executed
from tensortrace.tui.views.source_lines import (
    Beside,
    Function,
    beside_lines,
    function_at,
    source_line,
    title_of,
    whole_lines,
)
from tensortrace.tui.views.variables import Item, item_line, items_at, name_width, whole_item
from tensortrace.tui.views.view import View

KINDS = ("line", "call", "action", "optimizer")
NO_LINES = "Calls; trace(lines=True) records lines and variables"
# How the header writes the options of lines: as a dict, or a call.
DEPTH = re.compile(r"\bdepth['\"]?\s*[:=]\s*(\d{1,9})\b")
THINNED = "Calls; this step is not kept in full, so without lines: every=1 keeps all"


def depth_of(options: object) -> int:
    """How many frames deep lines were recorded, by the options of a run."""
    found = DEPTH.search(str(options))
    return int(found[1]) if found is not None else 1


class SourceView(View):
    """Two panes: the function that one is in, and its variables at the line one is at."""

    NAME = "source"
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("source")
    DEFAULT_CSS = "#source-code { height: 3fr; } #source-variables { height: 2fr; }"

    def __init__(self) -> None:
        super().__init__()
        # What is walked, of which rows, and where: an index into its lines.
        self.executed = Executed([], {})
        self.rows: StepRows | None = None
        self.at = 0
        # The seq of the row that the screen was at when one came to the line.
        self.seq: int | None = None
        self.function: Function | None = None
        self.told: dict[int, Beside] = {}
        self.items: list[Item] = []
        # What the lines of the screen are: a row of the function, and which part of it.
        self.parts: list[tuple[int, int]] = []
        # The row that the cursor is on, which is broken so that all of it can be read.
        self.under = 0
        # The same of the variables: of what the lines are parts, and which is under the cursor.
        self.item_parts: list[tuple[int, int]] = []
        self.item = 0

    def compose(self) -> ComposeResult:
        """The source and the variables."""
        yield Pane("source-code", "Source")
        yield Pane("source-variables", "Variables")

    @property
    def variables(self) -> Pane:
        """The pane of variables."""
        return self.query_one("#source-variables", Pane)

    # ---- reading

    def draw(self) -> None:
        """Read the lines of the step in a thread, unless they are here; go to the row's."""
        rows, row = self.viewer.rows, self.viewer.row
        seq = row.seq if row is not None else None
        if self.rows is not rows:
            self.rows, self.seq = rows, seq
            self.main.set_title(f"Source, step {self.viewer.number}: reading")
            self.work(lambda: self.read(rows))
        elif seq != self.seq:
            self.seq = seq
            self.go(self.executed.at_seq(seq), sync=False)
        else:
            self.show()

    def read(self, rows: StepRows) -> None:
        """Decode what the walk is made of; runs in a thread."""
        worker, modules = get_current_worker(), self.viewer.modules

        def records() -> Iterator[Record]:
            step = rows.step
            kinds = KINDS if not len(step.indices("line")) else ("line", "call")
            for i in step.indices(*kinds):
                if worker.is_cancelled:
                    return
                record = step.record(int(i))
                if record is not None:
                    yield record

        executed = read_executed(records(), modules)
        if not worker.is_cancelled:
            self.viewer.from_thread(self.took, rows, executed)

    def took(self, rows: StepRows, executed: Executed) -> None:
        """Begin to walk, unless the user has gone on."""
        if self.rows is rows:
            self.executed = executed
            self.go(executed.at_seq(self.seq), sync=False)

    # ---- drawing

    def go(self, at: int | None, why: str = "", *, sync: bool = True) -> None:
        """Go to a line, or say why there is none; with `sync` the place in the run goes along."""
        if at is None or not 0 <= at < len(self.executed):
            if why:
                self.viewer.tell(why)
            if len(self.executed):
                return
        else:
            self.at = at
            if sync:
                self.take_place_along()
        self.show(follow=True)

    def take_place_along(self) -> None:
        """Put the cursor of the table on the record of the line."""
        viewer = self.viewer
        slot = viewer.rows.at_seq(self.executed.lines[self.at].seq)
        if slot is not None:
            viewer.stand.following = False
            viewer.pane("calls").place(viewer.rows.reveal(slot))
            viewer.stand.anchor = viewer.row
            self.seq = viewer.row.seq if viewer.row is not None else None

    def show(self, *, follow: bool = False) -> None:
        """Draw both panes; with `follow` the cursor goes to the line, and to the first variable."""
        if not len(self.executed):
            self.show_nothing()
            return
        executed, at, viewer = self.executed, self.at, self.viewer
        line = executed.lines[at]
        place = line.location
        stored = [source for source in viewer.log_.sources if source.file == place.file]
        source = source_of(place.function, place.line, spans_of(stored))
        self.function = function = function_at(executed, at, source)
        found = [f for f in viewer.found if f.step == viewer.number]
        self.told = told = beside_lines(executed, at, found)
        here, glyphs = function.row_of(line.location.line), viewer.glyphs
        longest = max(
            (cell_len(code) for number, code in function.rows if number in told), default=0
        )

        if follow:
            self.under = here
        pane, width = self.main, self.main.size.width or viewer.size.width - 2
        broken = {
            row: whole_lines(
                function.rows[row], told.get(function.rows[row][0]), executed, width,
                current=row == here, longest=longest, glyphs=glyphs,
            )
            for row in {here, self.under} if row < len(function.rows)
        }  # fmt: skip
        kept = (here, 0) if follow else self.part_at(pane.cursor or 0)
        self.parts = parts = [
            (row, part) for row in range(len(function.rows))
            for part in range(len(broken[row]) if row in broken else 1)
        ]  # fmt: skip

        def draw_code(at: int, _: int, width: int, cursor: bool) -> Styled:
            row, part = parts[at]
            if part:
                return broken[row][part]
            number = function.rows[row][0]
            line = source_line(
                function.rows[row], told.get(number), executed, width, current=row == here,
                here=cursor, longest=longest, glyphs=glyphs,
            )  # fmt: skip
            # Of a broken row the signs are those of a whole one.
            return line if len(broken.get(row, [])) < 2 else [*line[:4], *broken[row][0][1:]]

        self.main.set_title(title_of(executed, at, self.main.size.width - 2, glyphs))
        cursor = parts.index(kept if kept in parts else (kept[0], 0))
        pane.show(len(parts), draw_code, cursor)
        self.show_variables(found, follow=follow)

    def item_at(self, at: int) -> tuple[int, int]:
        """The variable at a line of the lower pane, and which part of it."""
        return self.item_parts[at] if at < len(self.item_parts) else (0, 0)

    def part_at(self, at: int) -> tuple[int, int]:
        """The row of the function at a line of the screen, and which part of it."""
        return self.parts[at] if at < len(self.parts) else (0, 0)

    def moved(self, pane: Pane, at: int) -> None:
        """Break the row that the cursor is on, and only that beside the one of the walk."""
        row = self.part_at(at)[0]
        if pane is self.main and self.function is not None and row != self.under:
            self.under = row
            self.show()
        elif pane is self.variables and self.item_at(at)[0] != self.item:
            found = [f for f in self.viewer.found if f.step == self.viewer.number]
            self.show_variables(found, follow=False)

    def show_variables(self, found: list[Finding], *, follow: bool) -> None:
        """Draw the pane of variables."""
        executed, glyphs, pane = self.executed, self.viewer.glyphs, self.variables
        place = executed.lines[self.at].location
        places = [(f, f.location) for f in found if f.location is not None]
        here = [f for f, at in places if (at.file, at.line) == (place.file, place.line)]
        width = max(20, pane.size.width or self.viewer.size.width - 2)
        self.items = items = items_at(executed, self.at, here, width - 2)
        names = name_width(items, width)

        first = next((i for i, item in enumerate(items) if item.value is not None), 0)
        kept = (first, 0) if follow else self.item_at(pane.cursor or 0)
        self.item = kept[0]
        # Of the one under the cursor all can be read; a scrollbar may lie over the last cell.
        whole = [
            whole_item(item, executed, names, width - 2, glyphs) if at == kept[0] else []
            for at, item in enumerate(items)
        ]
        self.item_parts = parts = [
            (at, part) for at in range(len(items)) for part in range(max(1, len(whole[at])))
        ]

        def draw(at: int, _: int, width: int, cursor: bool) -> Styled:
            sign = glyphs.cursor if cursor else " "
            row, part = parts[at]
            if len(whole[row]) > 1:
                return [(sign, ""), *whole[row][part]]
            return [(sign, ""), *item_line(items[row], executed, names, width - 1, glyphs)]

        changed = sum(item.value is not None and item.value.changed for item in items)
        told = f"Variables, {changed} changed here" if changed else "Variables"
        without = THINNED if self.viewer.log_.header.options.get("lines") else NO_LINES
        pane.set_title(told if executed.recorded else without)
        pane.show(len(parts), draw, parts.index(kept) if kept in parts else 0)

    def show_nothing(self) -> None:
        """Say that nothing of the step can be walked."""
        told = [
            "No line of yours is in this step of the log.",
            "Steps that are not kept in full have none: ] and [ go to another step.",
            "trace(lines=True, every=1) records every line and its variables in every step.",
        ]
        self.function, self.told, self.items = None, {}, []
        self.parts, self.item_parts = [], []
        glyphs = self.viewer.glyphs
        self.main.set_title(f"Source, step {self.viewer.number}")
        self.main.show(
            len(told), lambda row, part, width, here: [(clip(told[row], width, glyphs), "")]
        )
        self.variables.set_title("Variables")
        self.variables.show(0, lambda *_: [])

    # ---- keys

    def action_line(self, by: int) -> None:
        """Go to the next or previous executed line of the step, into and out of functions."""
        self.go(self.at + by, "this is the last line of the step" if by > 0 else
                "this is the first line of the step")  # fmt: skip

    def action_line_over(self, by: int) -> None:
        """Go to the next or previous line of the same call of the function."""
        self.walk(lambda: self.executed.over(self.at, by),
                  "the function ends here" if by > 0 else "the function begins here")  # fmt: skip

    def action_line_into(self) -> None:
        """Go into what the line called."""
        self.walk(lambda: self.executed.into(self.at), self.why_not_into())

    def why_not_into(self) -> str:
        """Say why one cannot go into what the line called, as far as the log tells."""
        told = "no line of what this one calls was recorded"
        if not self.executed.recorded or not len(self.executed):
            return told
        depth = depth_of(self.viewer.log_.header.options.get("lines"))
        if self.executed.lines[self.at].depth + 1 < depth:
            return f"{told}: no function of yours, or this call of it was passed over"
        return f"{told}: trace(lines={{'depth': {depth + 1}}}) has those of your functions"

    def action_line_out(self) -> None:
        """Go to the line that called this function."""
        self.walk(lambda: self.executed.out(self.at), "what called this function was not recorded")

    def walk(self, where: Callable[[], int | None], why: str) -> None:
        """Go somewhere, if there is any line at all."""
        self.go(where() if len(self.executed) else None, why)

    def open(self, pane: Pane, at: int) -> None:
        """On a variable go to the call that made it; on a line of code to its next execution."""
        if pane is self.variables:
            item = self.items[self.item_at(at)[0]] if at < len(self.item_parts) else None
            if item is not None and item.value is not None:
                self.go_to_maker(item.value.tensor, item.value.name)
        elif self.function is not None and at < len(self.parts):
            number = self.function.rows[self.parts[at][0]][0]
            ahead = self.executed.same_line(self.at, number)
            found = ahead if ahead is not None else self.executed.same_line(self.at, number, -1)
            if self.executed.lines[self.at].location.line != number or found is not None:
                self.go(found, f"line {number} did not run in this step")

    def go_to_maker(self, tensor: int | None, name: str) -> None:
        """Look in a thread for the call that made a tensor, and go there."""
        if tensor is None:
            self.viewer.tell(f"{name} is no tensor")
            return
        rows = self.viewer.rows

        def look() -> None:
            call = rows.step.producer(tensor)
            if call is not None and any(number == tensor for _, number in call.inputs):
                call = None  # it gave back what it was given
            self.viewer.from_thread(self.took_maker, rows, None if call is None else call.seq, name)

        self.work(look)

    def took_maker(self, rows: StepRows, seq: int | None, name: str) -> None:
        """Show the call in the view of the step, unless the user has gone on."""
        viewer = self.viewer
        if rows is not viewer.rows:
            return
        if seq is None:
            viewer.tell(f"no call of this step made {name}")
            return
        viewer.stand.remember()
        viewer.show_view("step")
        viewer.stand.go_to_seq(viewer.number, seq)

    def copied(self) -> tuple[str, str] | None:
        """The record of the line, as JSON."""
        if not len(self.executed) or not self.executed.recorded:
            return None
        return as_json(self.executed.lines[self.at]), "the line as JSON"

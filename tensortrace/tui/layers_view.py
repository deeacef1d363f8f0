"""The view of the layers: a heat map of modules by steps, drawn from the step lines alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.worker import get_current_worker

from tensortrace.records import Step
from tensortrace.text import escape
from tensortrace.tui import heat
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.grid import QUANTITIES, Grid
from tensortrace.tui.heat import HeatMap
from tensortrace.tui.panes import Pane
from tensortrace.tui.span import (
    AT_ONCE,
    WIDEST,
    Span,
    fitting,
    read_blocks,
    reading_order,
    shifted,
    span_of,
    used,
    zoomed,
)
from tensortrace.tui.theme import Styled
from tensortrace.tui.view import View

# As in `background`: told ten times a second, and the lock is free between two reads.
TELL_EVERY_S, BREATHE_S = 0.1, 0.0002
NAMES = tuple(name for name in QUANTITIES if name != "param_grad_rms")


class LayersView(View):
    """Where a signal vanishes, explodes or dies, layer by layer and step by step."""

    NAME = "layers"
    STRIP = False
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("layers")

    def __init__(self) -> None:
        super().__init__()
        self.quantity = NAMES[0]
        # Steps in a column; None shows the whole run.
        self.per: int | None = None
        self.grid: Grid | None = None
        # How much of the asked steps was read, and up to which step.
        self.part, self.read_to = 1.0, -1
        # The place that was shown last; the step and the module that the cursor is on.
        self.place: tuple[int, int | None] | None = None
        self.here = 0
        self.path: str | None = None
        self.wide = 1

    def compose(self) -> ComposeResult:
        """The map, and below it what its cell says."""
        yield Pane("layers-map", "Layers", sticky=3)
        yield Pane("layers-told", "Here", cursor=False)

    @property
    def width(self) -> int:
        """Cells for the columns of the map."""
        inside = self.main.size.width or self.viewer.size.width - 2
        return max(1, inside - heat.name_width(inside))

    def draw(self) -> None:
        """Go to the column of the step; read what is missing."""
        viewer = self.viewer
        first, last = viewer.log_.first_step(), viewer.log_.last_step()
        row = viewer.row
        place = (viewer.number, row.seq if row is not None else None)
        if place != self.place:
            # Somebody went elsewhere: the cursor goes along, to the module of the row too.
            self.place, self.here = place, viewer.number
            self.path = getattr(row.record, "module", None) if row is not None else None
        whole = fitting(first, last, self.width)
        per = whole if self.per is None else min(self.per, whole)
        if self.grid is None or self.grid.span.per != per:
            span = span_of(first, last, self.width, per, self.here)
        else:
            span = shifted(self.grid.span, first, last, self.here, self.width)
        self.read(span, last)
        self.draw_map()

    # ---- reading

    def read(self, span: Span, last: int) -> None:
        """Read the step lines of a span in a thread, or those that came since it was read."""
        first = self.viewer.log_.first_step()
        if self.grid is None or self.grid.span != span:
            self.grid = Grid(span)
            blocks = reading_order(span, first, last, self.here)
            total = min(last + 1, span.stop) - max(first, span.start)
        elif self.part < 1 or last <= self.read_to:
            return
        else:
            starts = range(max(span.start, self.read_to), last + 1, AT_ONCE)
            blocks = iter([range(n, min(n + AT_ONCE, last + 1)) for n in starts])
            total = last + 1 - starts.start
        self.part = 0.0
        grid = self.grid
        self.work(lambda: self.read_grid(grid, blocks, max(1, total), last))

    def read_grid(self, grid: Grid, blocks: Iterator[range], total: int, last: int) -> None:
        """Read step lines and tell the screen ten times a second; runs in a thread."""
        worker, told, done = get_current_worker(), time.monotonic(), 0

        def take(steps: list[Step]) -> None:
            nonlocal told, done
            grid.add(steps)
            done += len(steps)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.viewer.from_thread(self.took, grid, min(0.99, done / total), last)
            time.sleep(BREATHE_S)

        read_blocks(self.viewer.log_, blocks, take, lambda: worker.is_cancelled)
        if not worker.is_cancelled:
            self.viewer.from_thread(self.took, grid, 1.0, last)

    def took(self, grid: Grid, part: float, last: int) -> None:
        """Draw what was read so far."""
        if grid is self.grid:
            self.part, self.read_to = part, last
            if self.display:
                self.draw_map()

    # ---- drawing

    @property
    def column(self) -> int:
        """The column that the cursor is in."""
        return 0 if self.grid is None else self.grid.span.column(self.here)

    def draw_map(self) -> None:
        """Draw the map and what its cell says."""
        grid, viewer = self.grid, self.viewer
        if grid is None:
            return
        modules, column = viewer.modules, self.column
        shown = used(grid.span, viewer.log_.last_step())
        self.wide = max(1, min(WIDEST, self.width // shown))
        scale = heat.scale_of(grid, self.quantity)
        held = HeatMap(grid, self.quantity, scale, shown, self.wide, viewer.glyphs)

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            if at < 0:
                return held.head_lines(viewer.marks, column, width)[part]
            return held.row_line(at, column, modules, width, here=here)

        reading = "" if self.part >= 1 else f", {self.part:.0%} read"
        self.main.set_title(f"Layers: {QUANTITIES[self.quantity]}{reading}")
        at = self.main.cursor or 0
        if self.path is not None and self.path in grid.paths:
            at = grid.paths.index(self.path)
        self.main.show(len(grid.paths), draw, at)
        self.draw_told()

    def draw_told(self) -> None:
        """Tell the numbers of the cell under the cursor."""
        pane = self.query_one("#layers-told", Pane)
        if self.grid is not None:
            width = max(20, pane.size.width or self.viewer.size.width - 2)
            lines = heat.told_lines(
                self.grid, self.main.cursor or 0, self.column, self.viewer.modules, width
            )
            pane.show(len(lines), lambda at, part, width, here: lines[at])

    # ---- keys

    def moved(self, pane: Pane, at: int) -> None:
        """Tell of another module."""
        if self.grid is not None and pane is self.main and at < len(self.grid.paths):
            self.path = self.grid.paths[at]
            self.draw_told()

    def action_column(self, columns: int) -> None:
        """Go to the next or previous column of steps."""
        if self.grid is not None:
            log, span = self.viewer.log_, self.grid.span
            at = span.start + (self.column + columns) * span.per
            self.here = max(log.first_step(), min(log.last_step(), at))
            self.draw()

    def action_zoom_steps(self, closer: bool) -> None:
        """Let a column hold fewer or more steps."""
        if self.grid is not None:
            self.per = zoomed(self.grid.span.per, closer)
            self.draw()

    def action_quantity(self) -> None:
        """Show the next quantity."""
        self.quantity = NAMES[(NAMES.index(self.quantity) + 1) % len(NAMES)]
        self.draw_map()

    def open(self, pane: Pane, at: int) -> None:
        """Go to the call of the module in a step of the column: one that is flagged, if any is."""
        grid, viewer = self.grid, self.viewer
        if grid is None or not at < len(grid.paths):
            return
        path, column = grid.paths[at], self.column
        flagged, full = int(grid.at[at, column]), int(grid.full[column])
        number = flagged if flagged >= 0 else full if full >= 0 else self.here
        viewer.remember()
        viewer.following = False
        viewer.go_to(number, lambda rows: rows.find_module(path))
        viewer.show_view("step")
        if full < 0:
            viewer.tell(f"step {number} keeps its step line only: no calls to go to")

    def clicked(self, pane: Pane, at: int, x: int) -> None:
        """Go to the column under the pointer."""
        if pane is self.main and self.grid is not None:
            self.path = self.grid.paths[at] if at >= 0 else self.path
            left = x - heat.name_width(pane.size.width)
            if left >= 0:
                self.action_column(left // self.wide - self.column)

    def copied(self) -> tuple[str, str] | None:
        """The numbers of the module under the cursor, over the steps, as tab-separated text."""
        grid, at = self.grid, self.main.cursor or 0
        if grid is None or at >= len(grid.paths):
            return None
        shown = range(used(grid.span, self.viewer.log_.last_step()))
        values = grid.values[self.quantity][at]
        lines = [f"{grid.span.steps(i).start}\t{float(values[i])!r}" for i in shown]
        head = f"step\t{escape(grid.paths[at])} {QUANTITIES[self.quantity]}"
        return "\n".join([head, *lines]), "the row of the map"

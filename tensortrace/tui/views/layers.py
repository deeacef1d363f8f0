"""The view of the layers: a heat map of modules by steps, drawn from the step lines alone."""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import BindingType

from tensortrace.records import Module
from tensortrace.text import escape, module_text
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.grid import QUANTITIES, Grid
from tensortrace.tui.panes import Pane
from tensortrace.tui.span import Span
from tensortrace.tui.terminal.styled import Styled
from tensortrace.tui.views.heat import HeatMap, name_width, scale_of, told_lines
from tensortrace.tui.views.span_view import SpanView

NO_LAYERS = "no layers to show: no step of this log has numbers of modules"
NAMES = tuple(name for name in QUANTITIES if name != "param_grad_rms")


class LayersView(SpanView):
    """Where a signal vanishes, explodes or dies, layer by layer and step by step."""

    NAME = "layers"
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("layers")

    def __init__(self) -> None:
        super().__init__()
        self.quantity = NAMES[0]
        # The module that the cursor is on.
        self.path: str | None = None
        # The rows of the grid as they stand on the screen.
        self.order: list[int] = []
        self.map: HeatMap | None = None
        # The modules that the longest name is known of.
        self.named: dict[str, Module] | None = None
        self.longest_ = 0

    def compose(self) -> ComposeResult:
        """The map, and below it what its cell says."""
        yield Pane("layers-map", "Layers", sticky=3)
        yield Pane("layers-told", "Here", cursor=False)

    @property
    def grid(self) -> Grid | None:
        """What was gathered."""
        return self.held if isinstance(self.held, Grid) else None

    def gather(self, span: Span) -> Grid:
        """Begin a grid."""
        return Grid(span)

    def left_of(self, width: int) -> int:
        """The names of the modules."""
        return name_width(width, self.longest)

    @property
    def longest(self) -> int:
        """Cells of the longest name of a module."""
        modules = self.viewer.modules
        if self.named is not modules:
            self.named = modules
            told = (module_text(path, module.cls) for path, module in modules.items())
            self.longest_ = max(map(cell_len, told), default=0)
        return self.longest_

    def arrived(self) -> None:
        """Go to the module of the row."""
        row = self.viewer.row
        self.path = getattr(row.record, "module", None) if row is not None else None

    # ---- drawing

    def draw_columns(self) -> None:
        """Draw the map and what its cell says."""
        grid, viewer = self.grid, self.viewer
        if grid is None:
            return
        modules, column = viewer.modules, self.column
        scale = scale_of(grid, self.quantity)
        self.map = held = HeatMap(
            grid, self.quantity, scale, self.shown, self.wide, viewer.glyphs, self.longest
        )

        self.order = order = grid.in_order(modules)

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            if at < 0:
                return held.head_lines(viewer.marks, column, width)[part]
            return held.row_line(order[at], column, modules, width, here=here)

        self.main.set_title(f"Layers: {QUANTITIES[self.quantity]}, {self.each}{self.reading}")
        at = self.main.cursor or 0
        row = grid.row(self.path) if self.path is not None else None
        if row is not None:
            at = order.index(row)
        self.main.show(len(order), draw, at)
        self.draw_told()

    def row_at(self, at: int) -> int | None:
        """The row of the grid that stands at a line of the map."""
        return self.order[at] if self.grid is not None and 0 <= at < len(self.order) else None

    def draw_told(self) -> None:
        """Tell the numbers of the cell under the cursor."""
        pane = self.query_one("#layers-told", Pane)
        if self.grid is not None:
            width = max(20, pane.size.width or self.viewer.size.width - 2)
            row = self.row_at(self.main.cursor or 0)
            lines = [] if row is None else told_lines(
                self.grid, row, self.column, self.viewer.modules, width, glyphs=self.viewer.glyphs
            )  # fmt: skip
            if not self.grid.paths and self.part >= 1:
                lines = [[(f" {NO_LAYERS}", "faint")]]
            pane.show(len(lines), lambda at, part, width, here: lines[at])

    # ---- keys

    def moved(self, pane: Pane, at: int) -> None:
        """Tell of another module."""
        row = self.row_at(at) if pane is self.main else None
        if self.grid is not None and row is not None:
            self.path = self.grid.paths[row]
            self.draw_told()

    def action_quantity(self) -> None:
        """Show the next quantity."""
        self.quantity = NAMES[(NAMES.index(self.quantity) + 1) % len(NAMES)]
        self.draw_columns()

    def open(self, pane: Pane, at: int) -> None:
        """Go to the call of the module in a step of the column: one that is flagged, if any is."""
        grid, viewer, row = self.grid, self.viewer, self.row_at(at)
        if grid is None or row is None:
            return
        path, column = grid.paths[row], self.column
        flagged, full = int(grid.at[row, column]), int(grid.full[column])
        number = flagged if flagged >= 0 else full if full >= 0 else self.here
        viewer.stand.remember()
        viewer.stand.following = False
        viewer.stand.go_to(number, lambda rows: rows.find_module(path))
        viewer.show_view("step")
        if not len(viewer.log_.step(number).indices("call")):
            viewer.tell(f"step {number} keeps its step line only: no calls to go to")

    def clicked(self, pane: Pane, at: int, x: int) -> None:
        """Go to the column under the pointer."""
        if pane is self.main and self.grid is not None:
            row = self.row_at(at)
            self.path = self.path if row is None else self.grid.paths[row]
            left = x - self.map.gutter(pane.size.width) if self.map is not None else -1
            if left >= 0:
                self.action_column(left // self.wide - self.column)

    def copied(self) -> tuple[str, str] | None:
        """The numbers of the module under the cursor, over the steps, as tab-separated text."""
        grid, row = self.grid, self.row_at(self.main.cursor or 0)
        if grid is None or row is None:
            return None
        shown = range(self.shown)
        values = grid.values[self.quantity][row]
        lines = [f"{grid.span.steps(i).start}\t{float(values[i])!r}" for i in shown]
        head = f"step\t{escape(grid.paths[row])} {QUANTITIES[self.quantity]}"
        return "\n".join([head, *lines]), "the row of the map"

"""Drawing what belongs to the row under the cursor, its detail and source; or the whole view."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from textual.timer import Timer
from textual.worker import get_current_worker

from tensortrace.tui.panes import Pane
from tensortrace.tui.step import detail
from tensortrace.tui.step.cells import full_name
from tensortrace.tui.terminal.styled import clip_path

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

# Source lines above and below the marked one in the source pane.
AROUND = 200
AFTER_S, SOON_S = 0.03, 0.001


class DetailPanes:
    """Draws them a moment after the table, for the room that they have."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.stand = frame, frame.stand
        # What will draw them, if they are wanted.
        self.timer: Timer | None = None
        # When they were drawn, and for what width.
        self.drawn_at, self.width, self.source_width = 0.0, 0, 0

    def want(self) -> None:
        """Draw them soon: after the table, so that a key that is held down stays quick.

        A view has no table before it: it is drawn at once, if it was not a moment ago.
        """
        if self.timer is None:
            after = AFTER_S
            if self.frame.view is not None:
                after = max(SOON_S, self.drawn_at + AFTER_S - time.monotonic())
            self.timer = self.frame.set_timer(after, self._draw_wanted)

    def _draw_wanted(self) -> None:
        self.timer, self.drawn_at = None, time.monotonic()
        if not self.frame.drawable:
            return
        self.draw()
        if self.stand.rows.large:
            self.frame.in_thread("detail", self.gather)

    def gather(self) -> None:
        """Look for what belongs to the row in a large step, then draw; runs in a thread."""
        worker, held, row = get_current_worker(), self.stand.rows, self.stand.row
        if row is not None:
            held.gather(row, lambda: worker.is_cancelled)
        if not worker.is_cancelled:
            self.frame.from_thread(self.draw)

    @property
    def room(self) -> int:
        """Cells of a line of the detail, with one free beside its scrollbar.

        A pane that was hidden has no width yet; it is drawn again when it has.
        """
        return max(20, (self.frame.pane("detail").size.width or self.frame.size.width - 2) - 2)

    def fits(self, pane: Pane) -> bool:
        """Whether one of the two was drawn for the room that it has."""
        if pane.id == "detail":
            return self.width == self.room
        return self.source_width == pane.size.width

    def draw(self) -> None:
        """Draw the detail and the source of the row under the cursor, or the view that is shown."""
        frame, stand = self.frame, self.stand
        if frame.view is not None:
            if frame.view.ready:
                frame.view.draw()
            return
        row, pane, source_pane = stand.row, frame.pane("detail"), frame.pane("source")
        if row is None:
            pane.show(0, lambda *_: [])
            source_pane.show(0, lambda *_: [])
            return
        location = detail.location_of(row)
        source = stand.log.source(location.file, location.line) if location else None
        self.width = width = self.room
        lines = detail.detail_lines(
            row, stand.rows, stand.modules, source, width, glyphs=frame.glyphs
        )
        name = full_name(row.record, stand.modules)
        pane.set_title(f"Detail: {clip_path(name, max(8, width - 12), frame.glyphs)}")
        pane.show(len(lines), lambda at, part, width, here: lines[at])
        self.source_width = source_pane.size.width
        room = max(20, self.source_width - 2) if self.source_width else None
        code = detail.snippet(location, source, AROUND, frame.glyphs, room) if location else []
        source_pane.set_title(detail.source_title(location))
        source_pane.show(len(code), lambda at, part, width, here: code[at])
        if location is not None and source is not None:
            above = location.line - max(source.first_line, location.line - AROUND)
            source_pane.move_to(max(0, above - source_pane.size.height // 2))

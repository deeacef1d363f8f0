"""Showing and hiding what is inside the calls of a step: the modules first, then the ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame


class Folding:
    """Goes into a call and out of it: what it hides shows first, then the cursor moves."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.stand = frame, frame.stand

    def unfold(self) -> None:
        """Show the modules inside the call, then its ops; if all show, go to the first."""
        at, rows = self.stand.cursor(), self.stand.rows
        if rows.closed(at):
            self.close_tree(at, False)
        elif not rows.inside(at) and rows.holds(at):
            self.frame.pane("calls").move_to(at + 1)
        elif not rows.inside(at):
            self.frame.tell("no ops were recorded inside this row")
        elif rows.opens(at):
            self.frame.pane("calls").move_to(rows.first_inside(at))
        else:
            self.put(at, True)

    def fold(self) -> None:
        """Hide the ops inside the call, then its modules; then go to the call around."""
        at, rows = self.stand.cursor(), self.stand.rows
        closed = rows.closed(at)
        if not closed and rows.inside(at) and rows.opens(at):
            self.put(at, False)
            return
        if not closed and rows.holds(at):
            self.close_tree(at, True)
            return
        owner = rows.owner(at)
        if owner is not None:
            self.frame.pane("calls").move_to(owner)

    def open(self, at: int) -> bool:
        """Show what the call of a row hides; False if it hides nothing."""
        rows = self.stand.rows
        if rows.closed(at):
            self.close_tree(at, False)
        elif rows.inside(at) and not rows.opens(at):
            self.put(at, True)
        else:
            return False
        return True

    def fold_all(self, shown: bool) -> None:
        """Show all modules, then all ops; hide all ops, then all modules but the outermost."""
        slot, rows, opened = self.stand.slot, self.stand.rows, self.stand.opened
        if rows.folds is not None and slot < len(rows.folds.owner) and not shown:
            slot = [slot, *rows.folds.around(slot)][-1]
        ops, before = opened.every or bool(opened.sites), len(rows)
        # One level at a time, or the next one where this step has nothing of the first.
        if shown and opened.closed:
            opened.closed.clear()
            rows.fold()
        if (ops and not shown) or (shown and len(rows) == before):
            opened.every = shown
            opened.sites.clear()
            rows.fold()
        if not shown and len(rows) == before:
            rows.close_all()
        self.redraw(self.seen(slot))
        if len(rows) == before and rows.folds is not None:
            self.frame.tell("all calls and ops of this step are shown" if shown else
                            "no call inside another has anything to hide")  # fmt: skip

    def seen(self, slot: int) -> int:
        """The slot itself if it has a row, else the call around it that has one."""
        rows, folds = self.stand.rows, self.stand.rows.folds
        around = [] if folds is None or slot >= len(folds.owner) else folds.above(slot)
        return next((at for at in (slot, *around) if rows.position(at) is not None), slot)

    def close_tree(self, at: int, closed: bool) -> None:
        """Hide or show the modules inside a call."""
        slot = self.stand.rows.slot(at)
        self.stand.rows.close(at, closed)
        self.redraw(slot)

    def put(self, at: int, shown: bool) -> None:
        """Show or hide the ops of one call."""
        slot = self.stand.rows.slot(at)
        self.stand.rows.put(at, shown)
        self.redraw(slot)

    def redraw(self, slot: int) -> None:
        """Draw the table again with the cursor on the row of a slot."""
        self.frame.draw_calls(self.stand.rows.position(slot) or 0)
        self.stand.anchor = self.stand.row
        self.frame.details.want()

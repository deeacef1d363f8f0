"""A view whose columns are steps: cursor, zoom, and reading of the step lines in a thread."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from textual.worker import get_current_worker

from tensortrace.records import Step
from tensortrace.run import Run
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
from tensortrace.tui.views.view import View

# Drawn four times a second while it is read.
TELL_EVERY_S = 0.25


class Gathered(Protocol):
    """What is kept of the step lines of a span: of every column, whatever comes in any order."""

    span: Span

    @property
    def modules(self) -> bool:
        """Whether it needs the numbers of modules, which take most of the reading."""

    def add(self, steps: list[Step]) -> None:
        """Take in step lines."""

    def read_on(self, run: Run, cancelled: Callable[[], bool]) -> Iterator[float]:
        """Read what step lines do not say; yields the share done."""


class SpanView(View):
    """Columns of steps from the first to the last, or closer around the cursor.

    Attributes:
        here: the step that the cursor is on.
        per: steps in a column; None shows the whole run.
        wide: cells of a column.
    """

    STRIP = False
    # Cells of a step in a short run, at most.
    WIDEST: ClassVar[int] = WIDEST

    def __init__(self) -> None:
        super().__init__()
        self.per: int | None = None
        self.here, self.wide = 0, 1
        self.held: Gathered | None = None
        # How much of the asked steps was read, up to which step, and of which run.
        self.part, self.read_to, self.run = 1.0, -1, ("", 0)
        # Whether the calls of full steps are being read, which may take long.
        self.beyond = False
        # The place in the run that was shown last.
        self.place: tuple[int, int | None] | None = None

    @abstractmethod
    def gather(self, span: Span) -> Gathered:
        """Begin to gather the step lines of a span."""

    @abstractmethod
    def draw_columns(self) -> None:
        """Draw what was gathered so far."""

    @abstractmethod
    def left_of(self, width: int) -> int:
        """Cells left of the columns, of so many inside the main pane."""

    def arrived(self) -> None:
        """The viewer is at another place; the cursor went there too."""

    def leave(self) -> None:
        """Where one looked and did not go is no place: the cursor begins at that of the run."""
        self.place = None

    @property
    def width(self) -> int:
        """Cells for the columns."""
        inside = self.main.size.width or self.viewer.size.width - 2
        return max(1, inside - self.left_of(inside))

    @property
    def column(self) -> int:
        """The column that the cursor is in."""
        return 0 if self.held is None else self.held.span.column(self.here)

    @property
    def shown(self) -> int:
        """How many columns have steps."""
        return 1 if self.held is None else used(self.held.span, self.viewer.log_.last_step())

    def draw(self) -> None:
        """Go to the column of the step; read what is missing."""
        viewer = self.viewer
        first, last = viewer.log_.first_step(), viewer.log_.last_step()
        place = (viewer.number, viewer.row.seq if viewer.row is not None else None)
        if place != self.place:
            self.place, self.here = place, viewer.number
            self.arrived()
        whole = fitting(first, last, self.width)
        per = whole if self.per is None else min(self.per, whole)
        if self.held is None or self.held.span.per != per:
            span = span_of(first, last, self.width, per, self.here)
        else:
            span = shifted(self.held.span, first, last, self.here, self.width)
        self.read(span, last)
        self.wide = max(1, min(self.WIDEST, self.width // self.shown))
        self.draw_columns()

    # ---- reading

    def read(self, span: Span, last: int) -> None:
        """Read the step lines of a span in a thread, or those that came since it was read."""
        log = self.viewer.log_
        first, run = log.first_step(), (log.header.run_id, log.header.rank)
        if self.held is None or (self.held.span, self.run) != (span, run) or last < self.read_to:
            self.run = run
            self.held = self.gather(span)
            blocks = reading_order(span, first, last, self.here)
            total = min(last + 1, span.stop) - max(first, span.start)
        elif self.part < 1 or last <= self.read_to:
            return
        else:
            starts = range(max(span.start, self.read_to), last + 1, AT_ONCE)
            blocks = iter([range(n, min(n + AT_ONCE, last + 1)) for n in starts])
            total = last + 1 - starts.start
        self.part = 0.0
        held = self.held
        self.work(lambda: self.read_all(held, blocks, max(1, total), last))

    def read_all(self, held: Gathered, blocks: Iterator[range], total: int, last: int) -> None:
        """Read step lines and tell the screen from time to time; runs in a thread."""
        worker, told, done = get_current_worker(), time.monotonic(), 0

        def take(steps: list[Step]) -> None:
            nonlocal told, done
            held.add(steps)
            done += len(steps)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.viewer.from_thread(self.took, held, min(0.99, done / total), last)
            self.viewer.turns.breathe()

        log = self.viewer.log_
        read_blocks(log, blocks, take, lambda: worker.is_cancelled, modules=held.modules)
        for share in held.read_on(log, lambda: worker.is_cancelled):
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.viewer.from_thread(self.took, held, min(0.99, share), last, True)
            self.viewer.turns.breathe()
        if not worker.is_cancelled:
            self.viewer.from_thread(self.took, held, 1.0, last)

    def took(self, held: Gathered, part: float, last: int, beyond: bool = False) -> None:
        """Draw what was read so far; `beyond` the step lines."""
        if held is self.held:
            self.part, self.read_to, self.beyond = part, last, beyond
            if self.display:
                self.draw_columns()

    @property
    def each(self) -> str:
        """Which rank is shown, and how many steps a column holds, for a title."""
        per = 1 if self.held is None else self.held.span.per
        each = "a step a column" if per == 1 else f"{per} steps a column"
        return ", ".join(filter(None, [self.viewer.stand.rank_told, each]))

    @property
    def reading(self) -> str:
        """How much was read, for a title; nothing once it is all."""
        if self.beyond and self.part < 1:
            return f", full steps {self.part:.0%} read (esc stops)"
        return "" if self.part >= 1 else f", {self.part:.0%} read"

    def give_up(self) -> bool:
        """Read no further from the calls of steps; what is there stays."""
        if not self.beyond or self.part >= 1:
            return False
        self.viewer.workers.cancel_group(self.viewer, f"view-{self.NAME}")
        self.part, self.beyond = 1.0, False
        self.draw_columns()
        return True

    # ---- keys

    def action_column(self, columns: int) -> None:
        """Go to the next or previous column of steps."""
        if self.held is not None:
            log, span = self.viewer.log_, self.held.span
            at = span.start + (self.column + columns) * span.per
            self.here = max(log.first_step(), min(log.last_step(), at))
            self.draw()

    def action_zoom_steps(self, closer: bool) -> None:
        """Let a column hold fewer or more steps."""
        if self.held is not None:
            self.per = zoomed(self.held.span.per, closer)
            self.draw()

"""Where one stands in a run: the rank, the step, the row; what is open there, and the way back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tensortrace.records import Finding, Module, Severity
from tensortrace.run import Ranks, Run
from tensortrace.tui.step import findings
from tensortrace.tui.step.folds import Opened
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows

KEPT_PLACES = 100


@dataclass(frozen=True, slots=True)
class Stop:
    """A place one has been at: the step, the slot in it, what was open."""

    number: int
    slot: int
    opened: Opened
    view: str = "step"
    rank: int = 0

    @property
    def at(self) -> tuple[int, int, int]:
        """The place in the run, whatever view shows it."""
        return self.number, self.slot, self.rank

    @property
    def place(self) -> tuple[int, int, str, int]:
        """What makes two stops the same."""
        return self.number, self.slot, self.view, self.rank


class Stand:
    """The place in a run that the screen shows, and the findings: places to go to.

    It knows no screen: whoever goes somewhere does so here, and it has the new place drawn.

    Args:
        ranks: the run.
        cursor: tells the line of the table that the cursor is on.
        show: draws the step, with the cursor on a line of the table.
        forget: drops what was read of the rank that was shown until now.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        cursor: Callable[[], int],
        show: Callable[[int], None],
        forget: Callable[[], None],
    ) -> None:
        self.cursor, self.show, self.forget = cursor, show, forget
        self.ranks = ranks
        # The rank that is shown; of others it is their findings.
        self.log = ranks.runs[0]
        # That which its log holds, until another is written in its place.
        self.run_id = self.log.header.run_id
        self.modules: dict[str, Module] = self.log.modules
        self.number = self.log.first_step()
        self.opened = Opened()
        self.rows = StepRows(self.log.step(self.number), self.opened)
        # The row that the user chose: the cursor stays on its place from step to step.
        self.anchor: Row | None = None
        # The name of the view that is shown; "step" is the main screen itself.
        self.shown = "step"
        self.following = False
        self.found: list[Finding] = []
        self.marks: dict[int, Severity] = {}
        self.at_finding: Finding | None = None
        self.stops: deque[Stop] = deque(maxlen=KEPT_PLACES)

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        at = self.cursor()
        return self.rows[at] if at < len(self.rows) else None

    @property
    def slot(self) -> int:
        """The slot of the step that the cursor is on."""
        return self.rows.slot(self.cursor())

    @property
    def here(self) -> tuple[int, int]:
        """(step, seq) of the cursor; a row without seq is at the end of its step."""
        row = self.row
        return self.number, row.seq if row is not None and row.seq is not None else 1 << 62

    @property
    def spot(self) -> tuple[Run, int, int]:
        """What is the same as long as the cursor stays on its row."""
        return self.log, self.number, self.slot

    # ---- to a step, a row

    def go_to(self, number: int, place: Callable[[StepRows], int] | None = None) -> None:
        """Show a step; the cursor stays at the same place in it unless `place` tells its slot."""
        number = max(self.log.first_step(), min(number, self.log.last_step()))
        near = self.cursor()
        self.number = number
        step = self.log.step(number)
        if step is self.rows.step:
            self.rows.opened = self.opened
            self.rows.fold()
        else:
            self.rows = StepRows(step, self.opened)
        rows = self.rows
        self.show(rows.find(self.anchor, near) if place is None else rows.reveal(place(rows)))
        if place is not None:
            self.anchor = self.row

    def go_to_seq(self, number: int, seq: int | None) -> None:
        """Show a record of a step by its seq; the calls around it open."""
        self.following = False
        self.go_to(number, lambda rows: rows.at_seq(seq) or 0)

    def stay_at_end(self) -> None:
        """Show the end of the last step from now on."""
        self.following = True
        self.go_to(self.log.last_step(), lambda rows: max(0, len(rows) - 1))

    # ---- there and back

    @property
    def stop(self) -> Stop:
        """Where the cursor is."""
        return Stop(self.number, self.slot, self.opened.copy(), self.shown, self.log.header.rank)

    def remember(self) -> None:
        """Keep the place for the way back."""
        here = self.stop
        if not self.stops or self.stops[-1].place != here.place:
            self.stops.append(here)

    def remember_once(self) -> None:
        """Keep the place for the way back, unless another view of it is kept."""
        if not self.stops or self.stops[-1].at != self.stop.at:
            self.remember()

    def earlier_stop(self) -> Stop | None:
        """Where the last jump began, None if there was none; it is given up."""
        here = self.stop
        while self.stops:
            stop = self.stops.pop()
            if stop.place != here.place:
                return stop
        return None

    def return_to(self, stop: Stop) -> None:
        """Show a place as it was left."""
        for run in self.ranks.runs:
            if run.header.rank == stop.rank:
                self.turn_to(run)
        self.opened = stop.opened.copy()
        self.go_to(stop.number, lambda rows: stop.slot)

    # ---- ranks and their findings

    def turn_to(self, run: Run) -> None:
        """Stand at another rank from now on."""
        if run is not self.log:
            self.log, self.run_id, self.modules = run, run.header.run_id, run.modules
            self.marks = findings.worst_by_step(self.found_here)
            self.following = False
            self.forget()

    def begin_anew(self) -> None:
        """Another run is in the log: what led to a place of the one before leads nowhere."""
        self.run_id, self.at_finding = self.log.header.run_id, None
        self.go_to(self.number)
        self.stops.clear()

    @property
    def rank_told(self) -> str:
        """Which rank is shown, "" in a run of one alone."""
        header = self.log.header
        several = header.world_size > 1 or len(self.ranks.runs) > 1
        return f"rank {header.rank}" if several else ""

    @property
    def found_here(self) -> list[Finding]:
        """The findings of the rank that is shown."""
        return [finding for finding in self.found if self.ranks.of(finding) is self.log]

    def take(self, found: list[Finding]) -> None:
        """These are the findings of all ranks now."""
        self.found = found
        self.marks = findings.worst_by_step(self.found_here)

    def go_to_finding(self, finding: Finding) -> None:
        """Show the step of a finding, on its rank, with the cursor on its row."""
        run = self.ranks.of(finding)
        if run is not None:
            self.turn_to(run)
        self.at_finding = finding
        self.go_to(finding.step, lambda rows: rows.find_finding(finding))

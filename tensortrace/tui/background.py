"""What the viewer reads in threads: the whole log once, its growth, the timeline, other ranks."""

from __future__ import annotations

import time

from textual.worker import get_current_worker

from tensortrace.errors import LogError
from tensortrace.export.contents import in_order_of_cause
from tensortrace.records import Finding
from tensortrace.run import Ranks, Run, start_run
from tensortrace.tui.frame import Frame
from tensortrace.tui.step import findings
from tensortrace.tui.step_lines import TELL_EVERY_S
from tensortrace.tui.terminal.styled import UNICODE, Glyphs

POLL_S, IDLE_POLL_S, IDLE_AFTER_S = 0.2, 1.0, 10.0


class Reader(Frame):
    """The part of the viewer that works beside the screen."""

    def __init__(self, log: Run | Ranks, glyphs: Glyphs = UNICODE) -> None:
        super().__init__(log, glyphs)
        self.changed_at = 0.0
        self.told_notices: dict[int, str | None] = {}

    def start_reading(self) -> None:
        """Read the whole log in a thread and look for growth from time to time."""
        self.changed_at, self.begun = time.monotonic(), True
        self.in_thread("index", self.read_all)
        self.draw_top()
        self.set_timer(POLL_S, self.keep_looking)

    def read_all(self) -> None:
        """Index the log; runs in a thread."""
        worker = get_current_worker()
        told = time.monotonic()
        for _ in self.stand.ranks.index(self.log_, cancelled=lambda: worker.is_cancelled):
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.from_thread(self.take_findings)
            self.turns.breathe()
        if not worker.is_cancelled:
            self.from_thread(self.take_findings)

    def take_findings(self) -> None:
        """Show what the reader has found so far."""
        held = findings.in_order(self.stand.ranks.findings)
        self.stand.modules = self.log_.modules
        self.title_findings()
        if held == self.found and self.stand.ranks.indexed < 1:
            return
        self.stand.take(held)
        if self.stand.at_finding in held:
            self.pane("findings").cursor = held.index(self.stand.at_finding)
        # A warning only once all is read: an error may come later in the log.
        causes = held if len(self.stand.ranks.runs) == 1 else self.in_order_of_cause()
        first = findings.first_error(causes) or (
            findings.first_of(causes, "warning") if self.stand.ranks.indexed >= 1 else None
        )
        if not self.touched and first is not None and first != self.stand.at_finding:
            self.go_to_finding(first)
        self.draw_findings()
        self.draw_top()

    def in_order_of_cause(self) -> list[Finding]:
        """All findings, the cause first."""
        return in_order_of_cause(self.found, several=len(self.stand.ranks.runs) > 1)

    # ---- growth

    def keep_looking(self) -> None:
        """Look at the file: five times a second, once a second when nothing has come for long."""
        self.poll()
        idle = time.monotonic() - self.changed_at > IDLE_AFTER_S
        self.set_timer(IDLE_POLL_S if idle else POLL_S, self.keep_looking)

    def poll(self) -> None:
        """Show what has come; or how the run stands, if that alone is another."""
        if not self.drawable:
            return
        if not self.stand.ranks.refresh():
            if self.state != self.state_told:
                self.draw_top()
            return
        self.changed_at = time.monotonic()
        self.turns.changed()
        if self.stand.ranks.indexed < 1:
            self.in_thread("index", self.read_all)
        self.tell_notice()
        self.take_findings()
        self.grow()

    def grow(self) -> None:
        """Show what came: the last step if the run is followed, else the same place."""
        if self.stand.following:
            self.stand.stay_at_end()
        elif self.number >= self.log_.last_step() or self.rows.step.summary is None:
            self.stand.go_to(self.number)

    def tell_notice(self) -> None:
        """Say once that a log was truncated, replaced or damaged."""
        for run in self.stand.ranks.runs:
            rank = run.header.rank
            if run.notice == self.told_notices.get(rank):
                continue
            self.told_notices[rank] = run.notice
            if run is self.log_:
                self.forget()
                if self.stand.run_id != run.header.run_id:
                    self.begin_anew()
            if run.notice:
                self.tell(run.notice, "warning")

    def begin_anew(self) -> None:
        """Another run is in the log: what led to a place of the one before leads nowhere."""
        self.touched = False
        self.stand.begin_anew()

    # ---- ranks

    def action_rank(self, direction: int) -> None:
        """Go to the same place on the next rank; those that lie beside the log are opened first."""
        if self.log_.live:
            self.stand.ranks.look_beside()  # another may have begun since
        if self.stand.ranks.beside:
            self.open_beside()
        runs = self.stand.ranks.runs
        if len(runs) == 1:
            self.tell("this run has one rank only, or the logs of others are elsewhere")
            return
        following = self.stand.following
        self.stand.turn_to(runs[(runs.index(self.log_) + direction) % len(runs)])
        if following and self.log_.live:
            self.stand.stay_at_end()
        else:
            self.stand.go_to(self.number)
        self.tell(f"rank {self.log_.header.rank} of {self.log_.header.world_size}")

    def open_beside(self) -> None:
        """Open the other ranks, too."""
        opened = list(self.stand.ranks.runs)
        for path in self.stand.ranks.beside:
            try:
                opened.append(start_run(path))
            except LogError as err:
                self.tell(str(err), "warning")
        for run in self.stand.ranks.runs:
            run.ranks = {run.header.rank: run.path}  # asked for once
        try:
            self.stand.ranks = Ranks(opened)
        except LogError as err:
            self.tell(str(err), "warning")
            return
        self.in_thread("index", self.read_all)

    def offer_ranks(self) -> None:
        """Say that there are logs of other ranks, and why one of them is not open."""
        for sentence in self.stand.ranks.unread:
            self.tell(sentence, "warning")
        count = len(self.stand.ranks.beside) - len(self.stand.ranks.unread)
        if count > 0:
            more = "another rank lies" if count == 1 else f"{count} more ranks lie"
            self.tell(f"{more} beside this log: press ) to go there")

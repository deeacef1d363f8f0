"""Reading a run beside the screen, in threads: the whole log once, its growth, the other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from textual.worker import get_current_worker

from tensortrace.errors import LogError
from tensortrace.run import Ranks, Run, start_run
from tensortrace.tui.step_lines import TELL_EVERY_S

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

POLL_S, IDLE_POLL_S, IDLE_AFTER_S = 0.2, 1.0, 10.0


class Reader:
    """Reads the logs of a run, and says when there is more to show.

    Args:
        found: shows what was found so far.
        grew: shows what was written to the logs meanwhile.
    """

    def __init__(
        self, frame: Frame, found: Callable[[], object], grew: Callable[[], object]
    ) -> None:
        self.frame, self.stand = frame, frame.stand
        self.found, self.grew = found, grew
        self.changed_at = 0.0
        self.told_notices: dict[int, str | None] = {}

    def begin(self) -> None:
        """Read the whole log in a thread and look for growth from time to time."""
        self.changed_at, self.frame.begun = time.monotonic(), True
        self.frame.in_thread("index", self.read_all)
        self.frame.draw_top()
        self.frame.set_timer(POLL_S, self.keep_looking)

    def read_all(self) -> None:
        """Index the log; runs in a thread."""
        worker, stand = get_current_worker(), self.stand
        told = time.monotonic()
        for _ in stand.ranks.index(stand.log, cancelled=lambda: worker.is_cancelled):
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.frame.from_thread(self.found)
            self.frame.turns.breathe()
        if not worker.is_cancelled:
            self.frame.from_thread(self.found)

    def keep_looking(self) -> None:
        """Look at the file: five times a second, once a second when nothing has come for long."""
        self.poll()
        idle = time.monotonic() - self.changed_at > IDLE_AFTER_S
        self.frame.set_timer(IDLE_POLL_S if idle else POLL_S, self.keep_looking)

    def poll(self) -> None:
        """Have shown what has come; or how the run stands, if that alone is another."""
        if not self.frame.drawable:
            return
        if not self.stand.ranks.refresh():
            if self.frame.state != self.frame.state_told:
                self.frame.draw_top()
            return
        self.changed_at = time.monotonic()
        self.frame.turns.changed()
        if self.stand.ranks.indexed < 1:
            self.frame.in_thread("index", self.read_all)
        self.grew()

    def noticed(self) -> Iterator[Run]:
        """Each log that was truncated, replaced or damaged since it was asked for last."""
        for run in self.stand.ranks.runs:
            rank = run.header.rank
            if run.notice != self.told_notices.get(rank):
                self.told_notices[rank] = run.notice
                yield run

    # ---- other ranks

    def open_beside(self) -> None:
        """Open the other ranks, too."""
        opened = list(self.stand.ranks.runs)
        for path in self.stand.ranks.beside:
            try:
                opened.append(start_run(path))
            except LogError as err:
                self.frame.tell(str(err), "warning")
        for run in self.stand.ranks.runs:
            run.ranks = {run.header.rank: run.path}  # asked for once
        try:
            self.stand.ranks = Ranks(opened)
        except LogError as err:
            self.frame.tell(str(err), "warning")
            return
        self.frame.in_thread("index", self.read_all)

    def offer_ranks(self) -> None:
        """Say that there are logs of other ranks, and why one of them is not open."""
        for sentence in self.stand.ranks.unread:
            self.frame.tell(sentence, "warning")
        count = len(self.stand.ranks.beside) - len(self.stand.ranks.unread)
        if count > 0:
            more = "another rank lies" if count == 1 else f"{count} more ranks lie"
            self.frame.tell(f"{more} beside this log: press ) to go there")

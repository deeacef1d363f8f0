"""The search of the viewer: over the bytes of all ranks, in a thread, with progress and an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from textual.worker import Worker, get_current_worker

from tensortrace.log import CHUNK
from tensortrace.records import Finding, Module
from tensortrace.run import Run
from tensortrace.tui import search
from tensortrace.tui.step.row import Row
from tensortrace.tui.step_lines import TELL_EVERY_S

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

SEARCHING = "searching for"


def around(runs: Sequence[Run], run: Run, here: int, direction: int) -> list[tuple[Run, int, int]]:
    """The pieces of logs in the order of a search from a line of one: ``(run, start, stop)``."""
    stops = {id(one): one.file.complete(one.file.size()) for one in runs}
    at, stop = runs.index(run), stops[id(run)]
    others = [*runs[at + 1 :], *runs[:at]]
    if direction > 0:
        line_end = run.file.read(here, CHUNK).find(b"\n") + 1 + here
        ends = (run, line_end, stop), (run, 0, line_end)
    else:
        ends = (run, 0, here), (run, here, stop)
    between = [(one, 0, stops[id(one)]) for one in others[::direction]]
    return [ends[0], *between, ends[1]]


class Seeker:
    """Looks for a text over all ranks, and goes to what it finds.

    Args:
        open_beside: opens the other ranks of the run, too.
    """

    def __init__(self, frame: Frame, open_beside: Callable[[], None]) -> None:
        self.frame, self.stand, self.open_beside = frame, frame.stand, open_beside
        self.term = ""
        self.hit: search.Hit | None = None
        self.hit_row: Row | None = None
        # The thread that searches.
        self.worker: Worker[None] | None = None
        # Whether the search has gone round, and whether it goes on from a hit that moved nothing.
        self.wrapped = self.again = False

    def find_text(self, text: str) -> None:
        """Look for a text from the cursor on."""
        self.term, self.hit = text, None
        self.find(1)

    def find(self, direction: int) -> None:
        """Search on from the cursor in a thread, over all ranks; a hit moves the cursor."""
        self.wrapped = self.again = False
        self.begin(direction)

    def begin(self, direction: int) -> None:
        """Begin a search in a thread."""
        self.cancel()
        if self.stand.ranks.beside:
            self.open_beside()
        self.frame.tell(f"{SEARCHING} {self.term} (esc cancels)")
        run = self.stand.log
        start = self.hit.offset if self.hit and self.hit_row is self.stand.row else None
        start = self.stand.rows.offset(self.stand.cursor()) if start is None else start
        self.worker = self.frame.in_thread("search", lambda: self.look(run, start, direction))

    def look(self, run: Run, here: int, direction: int) -> None:
        """Search from a line of a rank round all ranks back to it; runs in a thread."""
        worker, term = get_current_worker(), self.term
        find = search.find_next if direction > 0 else search.find_previous
        pieces = around(self.stand.ranks.runs, run, here, direction)
        total = sum(high - low for _, low, high in pieces)
        told, done = time.monotonic(), 0

        def cancelled() -> bool:  # asked once in each megabyte
            nonlocal told, done
            done += CHUNK
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.frame.from_thread(self.take_progress, worker, min(done / max(total, 1), 0.99))
            self.frame.turns.give_way()
            return worker.is_cancelled

        for at, (held, low, high) in enumerate(pieces):
            what = search.sought(term, held.sources, held.modules)
            hit = find(held.file, what, low, high, cancelled)
            if worker.is_cancelled:
                return
            if hit is not None:
                self.frame.from_thread(self.take_hit, hit, held, at == len(pieces) - 1, direction)
                return
        self.frame.from_thread(self.take_hit, None, run, False, direction)

    def take_progress(self, worker: Worker[None], done: float) -> None:
        """Say how far a search has come."""
        if worker is self.worker:
            self.frame.progress = f"searched {done:.0%}"
            self.frame.draw_top()

    def take_hit(self, hit: search.Hit | None, run: Run, wrapped: bool, direction: int) -> None:
        """Go to what was found, on its rank."""
        self.worker, self.frame.progress = None, ""
        self.hit = hit
        self.frame.untell(SEARCHING)
        if hit is None:
            count = len(self.stand.ranks.runs)
            where = "this log" if count == 1 else f"the logs of {count} ranks"
            self.frame.tell(f"{self.term}: nowhere in {where}{self.where_looked()}", "warning")
            return
        before = self.stand.spot
        self.stand.following = False
        self.stand.remember()
        self.wrapped |= wrapped
        other = run is not self.stand.log
        self.stand.turn_to(run)
        record, offset = hit.record, hit.offset
        if isinstance(record, Finding):
            # That of the merged list says its rank.
            of, found = self.stand.ranks.of, self.stand.found
            mine = [f for f in found if of(f) is run and f.id == record.id]
            self.frame.go_to_finding(mine[0] if mine else record)
        elif isinstance(record, Module):
            path = record.path
            self.stand.go_to(record.step, lambda rows: rows.find_module(path))
        else:
            self.stand.go_to(record.step, lambda rows: rows.at_offset(offset) or 0)
        self.hit_row = self.stand.row
        if self.stand.spot == before and not self.again:
            # A module is shown by its first call, a finding by its row: they have the text too.
            self.again = True
            self.begin(direction)
        elif self.wrapped:
            self.frame.tell("went round the end of the log")
        elif other:
            self.frame.tell(f"found on rank {run.header.rank}")

    def where_looked(self) -> str:
        """Say what a search without a hit went through, or that it is in source text alone."""
        runs = self.stand.ranks.runs
        places = {at for run in runs for at in search.places_of(self.term, run.sources)}
        if not places:
            return " (its names, code, messages and shapes)"
        file, line = min(places)
        return f" but in the source, {PurePath(file).name}:{line}, of which no call was recorded"

    def cancel(self) -> bool:
        """Give up a search; False if there was none."""
        if self.worker is None:
            return False
        self.worker.cancel()
        self.worker, self.frame.progress = None, ""
        self.frame.untell(SEARCHING)
        self.frame.draw_top()
        return True

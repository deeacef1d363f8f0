"""The search of the viewer: over the bytes of all ranks, in a thread, with progress and an end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import PurePath

from textual.worker import Worker, get_current_worker

from tensortrace.log import CHUNK
from tensortrace.records import Finding, Module
from tensortrace.run import Ranks, Run
from tensortrace.tui import search
from tensortrace.tui.background import Reader
from tensortrace.tui.step.row import Row
from tensortrace.tui.step_lines import TELL_EVERY_S
from tensortrace.tui.terminal.styled import UNICODE, Glyphs

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


class Seeker(Reader):
    """The part of the viewer that looks for a text."""

    def __init__(self, log: Run | Ranks, glyphs: Glyphs = UNICODE) -> None:
        super().__init__(log, glyphs)
        self.term = ""
        self.hit: search.Hit | None = None
        self.hit_row: Row | None = None
        self.searching: Worker[None] | None = None
        # What share of the logs the search has gone through, None without one.
        self.searched: float | None = None
        # Whether the search has gone round, and whether it goes on from a hit that moved nothing.
        self.wrapped = self.again = False

    def find_text(self, text: str) -> None:
        """Look for a text from the cursor on."""
        self.term, self.hit = text, None
        self.find(1)

    def find(self, direction: int) -> None:
        """Search on from the cursor in a thread, over all ranks; a hit moves the cursor."""
        self.wrapped = self.again = False
        self.seek(direction)

    def seek(self, direction: int) -> None:
        """Begin a search in a thread."""
        self.cancel_search()
        if self.stand.ranks.beside:
            self.open_beside()
        self.tell(f"{SEARCHING} {self.term} (esc cancels)")
        run = self.log_
        start = self.hit.offset if self.hit and self.hit_row is self.row else None
        start = self.rows.offset(self.stand.cursor()) if start is None else start
        self.searching = self.in_thread("search", lambda: self.search_from(run, start, direction))

    def search_from(self, run: Run, here: int, direction: int) -> None:
        """Search from a line of a rank round all ranks back to it; runs in a thread."""
        worker, term = get_current_worker(), self.term
        look = search.find_next if direction > 0 else search.find_previous
        pieces = around(self.stand.ranks.runs, run, here, direction)
        total = sum(high - low for _, low, high in pieces)
        told, done = time.monotonic(), 0

        def cancelled() -> bool:  # asked once in each megabyte
            nonlocal told, done
            done += CHUNK
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.from_thread(self.take_progress, worker, min(done / max(total, 1), 0.99))
            self.turns.give_way()
            return worker.is_cancelled

        for at, (held, low, high) in enumerate(pieces):
            what = search.sought(term, held.sources, held.modules)
            hit = look(held.file, what, low, high, cancelled)
            if worker.is_cancelled:
                return
            if hit is not None:
                self.from_thread(self.take_hit, hit, held, at == len(pieces) - 1, direction)
                return
        self.from_thread(self.take_hit, None, run, False, direction)

    def take_progress(self, worker: Worker[None], done: float) -> None:
        """Say how far a search has come."""
        if worker is self.searching:
            self.searched = done
            super().draw_top()

    @property
    def state(self) -> tuple[str, str]:
        """How the run stands, or how much was searched."""
        if self.searched is not None:
            return f"searched {self.searched:.0%}", "bar-live"
        return super().state

    def take_hit(self, hit: search.Hit | None, run: Run, wrapped: bool, direction: int) -> None:
        """Go to what was found, on its rank."""
        self.searching = self.searched = None
        self.hit = hit
        self.untell(SEARCHING)
        if hit is None:
            count = len(self.stand.ranks.runs)
            where = "this log" if count == 1 else f"the logs of {count} ranks"
            self.tell(f"{self.term}: nowhere in {where}{self.searched_text()}", "warning")
            return
        before = self.stand.spot
        self.stand.following = False
        self.stand.remember()
        self.wrapped |= wrapped
        other = run is not self.log_
        self.stand.turn_to(run)
        record, offset = hit.record, hit.offset
        if isinstance(record, Finding):
            # That of the merged list says its rank.
            mine = [f for f in self.found if self.stand.ranks.of(f) is run and f.id == record.id]
            self.go_to_finding(mine[0] if mine else record)
        elif isinstance(record, Module):
            path = record.path
            self.stand.go_to(record.step, lambda rows: rows.find_module(path))
        else:
            self.stand.go_to(record.step, lambda rows: rows.at_offset(offset) or 0)
        self.hit_row = self.row
        if self.stand.spot == before and not self.again:
            # A module is shown by its first call, a finding by its row: they have the text too.
            self.again = True
            self.seek(direction)
        elif self.wrapped:
            self.tell("went round the end of the log")
        elif other:
            self.tell(f"found on rank {run.header.rank}")

    def searched_text(self) -> str:
        """Say what a search without a hit went through, or that it is in source text alone."""
        places = {
            at for run in self.stand.ranks.runs for at in search.places_of(self.term, run.sources)
        }
        if not places:
            return " (its names, code, messages and shapes)"
        file, line = min(places)
        return f" but in the source, {PurePath(file).name}:{line}, of which no call was recorded"

    def cancel_search(self) -> bool:
        """Give up a search; False if there was none."""
        running, self.searching, self.searched = self.searching, None, None
        if running is None:
            return False
        running.cancel()
        self.untell(SEARCHING)
        super().draw_top()
        return True

"""Walking the run by what belongs together: along the data flow, the causes, back in time.

Every way ends at a row. Where several rows qualify a list asks which; where none does one line says
why. Each jump is remembered, so that one key leads back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rich.cells import cell_len
from textual.worker import get_current_worker

from tensortrace.records import Call, Finding, Record
from tensortrace.text import escape, module_text
from tensortrace.tui.dialogs.pick import Pick
from tensortrace.tui.step import flow
from tensortrace.tui.step.cells import full_name, name_of, short_place
from tensortrace.tui.step.flow import Flow, Link, Way
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.step_lines import SUMMARIES_AT_ONCE
from tensortrace.tui.terminal.styled import Styled, fit

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

# Earlier steps that are looked through for the same place.
MOST_STEPS = 100


class Walker:
    """Goes from a row to those that belong to it, and back."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.stand = frame, frame.stand
        # The rows of the list that is shown, as (step, seq).
        self.places: list[tuple[int, int | None]] = []

    def back(self) -> None:
        """Go back to where the last jump began."""
        stop = self.stand.earlier_stop()
        if stop is None:
            self.frame.tell("no earlier place to go back to")
            return
        self.stand.following = False
        self.frame.return_to(stop)

    # ---- along the data flow

    def sources(self) -> None:
        """Go to what made an input of the row."""
        self.lead("comes from", flow.sources)

    def uses(self) -> None:
        """Go to what used an output of the row."""
        self.lead("goes to", flow.uses)

    def counterpart(self) -> None:
        """Go from a call to its gradient, and back."""
        self.lead("belongs to", flow.counterparts)

    def lead(self, title: str, ask: Callable[[Record | None, Flow], Way]) -> None:
        """Ask the step in a thread where a row leads, and go there."""
        row, rows = self.stand.row, self.stand.rows
        if row is not None:
            name = full_name(row.record, self.stand.modules)
            told = partial(self.take_way, rows, f"{name} {title}")
            self.frame.in_thread("walk", lambda: self.ask_flow(rows, row, ask, told))

    def ask_flow(
        self,
        rows: StepRows,
        row: Row,
        ask: Callable[[Record | None, Flow], Way],
        told: Callable[[Way], None],
    ) -> None:
        """Look through the lines of the step; runs in a thread."""
        worker = get_current_worker()
        way = ask(row.record, Flow(rows.step, lambda: worker.is_cancelled))
        if not worker.is_cancelled:
            self.frame.from_thread(told, way)

    def take_way(self, rows: StepRows, title: str, way: Way) -> None:
        """Go to the one row, ask which of several, or say why there is none."""
        if rows is not self.stand.rows:
            return  # the user has gone on
        if not way.links:
            self.frame.tell(way.why)
        elif len(way.links) == 1:
            self.stand.remember()
            self.stand.go_to_seq(self.stand.number, way.links[0].seq)
            if way.why:
                self.frame.tell(way.why)
        else:
            lines = [self.link_line(link) for link in way.links]
            seqs = [link.seq for link in way.links]
            self.ask_which(title, lines, [(self.stand.number, seq) for seq in seqs], 0)

    def link_line(self, link: Link) -> Styled:
        """Write a link: the tensor, then the record that it leads to."""
        record, modules = link.record, self.stand.modules
        name, more = full_name(record, modules), name_of(Row(record, ""), modules)[1]
        told: Styled = [(f"{escape(link.label)[:24]:<12} ", "faint"), (f"#{link.seq} {name}", "op")]
        if isinstance(record, Call):
            place = module_text(record.module) if record.op and record.module else ""
            told.append(("  ".join(["", *filter(None, [more, place, record.phase])]), ""))
        location = getattr(record, "location", None)
        told.append((f"  {short_place(location)}" if location else "", "faint"))
        return told

    # ---- lists to walk

    def ask_which(
        self,
        title: str,
        lines: list[Styled],
        places: list[tuple[int, int | None]],
        at: int,
        *,
        last: str = "that was the last of them",
    ) -> None:
        """Show a list whose lines are rows: the table goes along, Esc leads back.

        Args:
            last: what is told where one walks on past the last line.
        """
        begin = self.stand.stop
        self.places = places
        self.go_along(at)

        def done(chosen: int | None) -> None:
            self.places = []
            self.frame.return_to(begin)
            if pick.past:
                self.frame.tell(last)
            if chosen is not None and places[chosen][1] is not None:
                self.stand.remember()
                self.stand.go_to_seq(*places[chosen])

        pick = Pick(title, lines, at, self.frame.glyphs)
        self.frame.push_screen(pick, done)

    def go_along(self, at: int) -> None:
        """Show the row of the line that the cursor of the list is on."""
        if at < len(self.places) and self.places[at][1] is not None:
            self.stand.go_to_seq(*self.places[at])

    def causes(self) -> None:
        """List the causes of the finding at the row, or that the row is a cause of."""
        finding = self.finding_here()
        if finding is None:
            row = self.stand.row
            bare = next(iter(row.findings if row is not None else ()), None)
            self.frame.tell(
                "no finding here has a chain of causes: e goes to the next one" if bare is None else
                f"{bare.code} has no chain of causes: the detail says why, 7 what was found before"
            )  # fmt: skip
            return
        heads = [f"#{'-' if link.seq is None else link.seq} {escape(link.op or 'call')[:20]}"
                 for link in finding.chain]  # fmt: skip
        places = [short_place(link.location) for link in finding.chain]
        lines: list[Styled] = [
            [(fit(head, max(map(cell_len, heads)) + 2), "op"),
             (fit(place, min(28, max(map(cell_len, places)) + 2)), "faint"),
             (escape((link.location.code or "").strip()) if link.location else "", "")]
            for head, place, link in zip(heads, places, finding.chain, strict=True)
        ]  # fmt: skip
        rows = [(finding.step, link.seq) for link in finding.chain]
        here = (self.stand.number, self.stand.row.seq if self.stand.row is not None else None)
        at = next((i for i, row in enumerate(rows) if row == here), 0)
        # At the finding itself one wants the first cause, on the way there one stays.
        at = 0 if at == len(rows) - 1 else at
        self.ask_which(
            f"Causes of {finding.code} in step {finding.step}, in order", lines, rows, at,
            last="that was the last of its causes",
        )  # fmt: skip

    def finding_here(self) -> Finding | None:
        """The finding whose causes one would walk from the row under the cursor."""
        stand, row = self.stand, self.stand.row
        held = [*(row.findings if row is not None else ()), *stand.rows.step.findings]
        if stand.at_finding is not None:
            held.insert(len(row.findings) if row is not None else 0, stand.at_finding)
        seq = row.seq if row is not None else None
        for finding in held:
            at_it = row is not None and finding in row.findings
            along = finding.step == stand.number and seq in [link.seq for link in finding.chain]
            if finding.chain and (at_it or along):
                return finding
        return None

    # ---- back in time

    def before(self) -> None:
        """Go to the same place in the nearest earlier step that has it."""
        row, number = self.stand.row, self.stand.number
        if row is None:
            return
        near = self.stand.slot
        self.frame.in_thread("walk", lambda: self.look_before(row, number, near))

    def look_before(self, row: Row, number: int, near: int) -> None:
        """Look through the earlier steps whose calls were kept; runs in a thread."""
        worker, log, frame = get_current_worker(), self.stand.log, self.frame
        looked, first, stop = 0, log.first_step(), number
        while stop > first and looked < MOST_STEPS:
            start = max(first, stop - (1 if stop == number else SUMMARIES_AT_ONCE))
            kept = [s.step for s in log.heads(start, stop) if log.has_calls(s)]
            for earlier in reversed(kept):
                if worker.is_cancelled:
                    return
                looked += 1
                slot = StepRows(log.step(earlier)).same_place(row, near)
                if slot is not None:
                    frame.from_thread(self.take_before, number, earlier, slot)
                    return
            stop = start
        frame.from_thread(frame.tell, "no earlier step that was kept whole has this place")

    def take_before(self, asked: int, number: int, slot: int) -> None:
        """Go to the place that was found, unless the user has gone on."""
        if asked != self.stand.number:
            return
        self.stand.remember()
        self.stand.following = False
        self.stand.go_to(number, lambda rows: slot)
        if number != asked - 1:
            self.frame.tell(f"step {number}: the steps between have no such call")

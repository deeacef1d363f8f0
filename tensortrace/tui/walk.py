"""Walking the run by what belongs together: into a call, along the data flow, back in time.

Every way ends at a row. Where several rows qualify a list asks which; where none does one line says
why. Each jump is remembered, so that one key leads back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.cells import cell_len
from textual.worker import get_current_worker

from tensortrace.records import Call, Finding, Record
from tensortrace.run import Ranks, Run
from tensortrace.text import escape, module_text
from tensortrace.tui.dialogs.pick import Pick
from tensortrace.tui.seek import Seeker
from tensortrace.tui.stand import Stop
from tensortrace.tui.step import flow
from tensortrace.tui.step.cells import full_name, name_of, short_place
from tensortrace.tui.step.flow import Flow, Link, Way
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.step_lines import SUMMARIES_AT_ONCE
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, fit

# Earlier steps that are looked through for the same place.
MOST_STEPS = 100


class Walker(Seeker):
    """The part of the viewer that goes from a row to those that belong to it."""

    def __init__(self, log: Run | Ranks, glyphs: Glyphs = UNICODE) -> None:
        super().__init__(log, glyphs)
        # The rows of the list that is shown, as (step, seq).
        self.places: list[tuple[int, int | None]] = []

    # ---- there and back

    def return_to(self, stop: Stop) -> None:
        """Show a place as it was left, in the view it was left in."""
        self.stand.return_to(stop)
        self.show_view(stop.view)

    def action_jump_back(self) -> None:
        """Go back to where the last jump began."""
        stop = self.stand.earlier_stop()
        if stop is None:
            self.tell("no earlier place to go back to")
            return
        self.stand.following = False
        self.return_to(stop)

    # ---- into a call

    def action_unfold(self) -> None:
        """Show the modules inside the call, then its ops; if all show, go to the first."""
        at = self.stand.cursor()
        if self.rows.closed(at):
            self.close_tree(at, False)
        elif not self.rows.inside(at) and self.rows.holds(at):
            self.pane("calls").move_to(at + 1)
        elif not self.rows.inside(at):
            self.tell("no ops were recorded inside this row")
        elif self.rows.opens(at):
            self.pane("calls").move_to(self.rows.first_inside(at))
        else:
            self.put_fold(at, True)

    def action_fold(self) -> None:
        """Hide the ops inside the call, then its modules; then go to the call around."""
        at = self.stand.cursor()
        closed = self.rows.closed(at)
        if not closed and self.rows.inside(at) and self.rows.opens(at):
            self.put_fold(at, False)
            return
        if not closed and self.rows.holds(at):
            self.close_tree(at, True)
            return
        owner = self.rows.owner(at)
        if owner is not None:
            self.pane("calls").move_to(owner)

    def action_fold_all(self, shown: bool) -> None:
        """Show all modules, then all ops; hide all ops, then all modules but the outermost."""
        at = self.stand.cursor()
        slot = self.rows.slot(at)
        if self.rows.folds is not None and slot < len(self.rows.folds.owner) and not shown:
            slot = [slot, *self.rows.folds.around(slot)][-1]
        ops, before = self.stand.opened.every or bool(self.stand.opened.sites), len(self.rows)
        # One level at a time, or the next one where this step has nothing of the first.
        if shown and self.stand.opened.closed:
            self.stand.opened.closed.clear()
            self.rows.fold()
        if (ops and not shown) or (shown and len(self.rows) == before):
            self.stand.opened.every = shown
            self.stand.opened.sites.clear()
            self.rows.fold()
        if not shown and len(self.rows) == before:
            self.rows.close_all()
        self.redraw_calls(self.seen(slot))
        if len(self.rows) == before and self.rows.folds is not None:
            self.tell("all calls and ops of this step are shown" if shown else
                      "no call inside another has anything to hide")  # fmt: skip

    def seen(self, slot: int) -> int:
        """The slot itself if it has a row, else the call around it that has one."""
        folds = self.rows.folds
        around = [] if folds is None or slot >= len(folds.owner) else folds.above(slot)
        return next((at for at in (slot, *around) if self.rows.position(at) is not None), slot)

    def close_tree(self, at: int, closed: bool) -> None:
        """Hide or show the modules inside a call."""
        slot = self.rows.slot(at)
        self.rows.close(at, closed)
        self.redraw_calls(slot)

    def put_fold(self, at: int, shown: bool) -> None:
        """Show or hide the ops of one call."""
        slot = self.rows.slot(at)
        self.rows.put(at, shown)
        self.redraw_calls(slot)

    def redraw_calls(self, slot: int) -> None:
        """Draw the table again with the cursor on the row of a slot."""
        self.draw_calls(self.rows.position(slot) or 0)
        self.stand.anchor = self.row
        self.want_detail()

    # ---- along the data flow

    def action_sources(self) -> None:
        """Go to what made an input of the row."""
        self.walk("comes from", flow.sources)

    def action_uses(self) -> None:
        """Go to what used an output of the row."""
        self.walk("goes to", flow.uses)

    def action_counterpart(self) -> None:
        """Go from a call to its gradient, and back."""
        self.walk("belongs to", flow.counterparts)

    def walk(self, title: str, ask: Callable[[Record | None, Flow], Way]) -> None:
        """Ask the step in a thread where a row leads, and go there."""
        row, rows = self.row, self.rows
        if row is not None:
            name = full_name(row.record, self.modules)
            told = partial(self.take_way, rows, f"{name} {title}")
            self.in_thread("walk", lambda: self.ask_flow(rows, row, ask, told))

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
            self.from_thread(told, way)

    def take_way(self, rows: StepRows, title: str, way: Way) -> None:
        """Go to the one row, ask which of several, or say why there is none."""
        if rows is not self.rows:
            return  # the user has gone on
        if not way.links:
            self.tell(way.why)
        elif len(way.links) == 1:
            self.stand.remember()
            self.stand.go_to_seq(self.number, way.links[0].seq)
            if way.why:
                self.tell(way.why)
        else:
            lines = [self.link_line(link) for link in way.links]
            seqs = [link.seq for link in way.links]
            self.ask_which(title, lines, [(self.number, seq) for seq in seqs], 0)

    def link_line(self, link: Link) -> Styled:
        """Write a link: the tensor, then the record that it leads to."""
        record = link.record
        name, more = full_name(record, self.modules), name_of(Row(record, ""), self.modules)[1]
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
        self.on_pick_walked(Pick.Walked(at))

        def done(chosen: int | None) -> None:
            self.places = []
            self.return_to(begin)
            if pick.past:
                self.tell(last)
            if chosen is not None and places[chosen][1] is not None:
                self.stand.remember()
                self.stand.go_to_seq(*places[chosen])

        pick = Pick(title, lines, at, self.glyphs)
        self.push_screen(pick, done)

    def on_pick_walked(self, message: Pick.Walked) -> None:
        """Show the row of the line that the cursor of the list is on."""
        if message.at < len(self.places) and self.places[message.at][1] is not None:
            self.stand.go_to_seq(*self.places[message.at])

    def action_causes(self) -> None:
        """List the causes of the finding at the row, or that the row is a cause of."""
        finding = self.finding_here()
        if finding is None:
            bare = next(iter(self.row.findings if self.row is not None else ()), None)
            self.tell(
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
        seq = self.row.seq if self.row is not None else None
        at = next((i for i, row in enumerate(rows) if row == (self.number, seq)), 0)
        # At the finding itself one wants the first cause, on the way there one stays.
        at = 0 if at == len(rows) - 1 else at
        self.ask_which(
            f"Causes of {finding.code} in step {finding.step}, in order", lines, rows, at,
            last="that was the last of its causes",
        )  # fmt: skip

    def finding_here(self) -> Finding | None:
        """The finding whose causes one would walk from the row under the cursor."""
        row = self.row
        held = [*(row.findings if row is not None else ()), *self.rows.step.findings]
        if self.stand.at_finding is not None:
            held.insert(len(row.findings) if row is not None else 0, self.stand.at_finding)
        seq = row.seq if row is not None else None
        for finding in held:
            at_it = row is not None and finding in row.findings
            along = finding.step == self.number and seq in [link.seq for link in finding.chain]
            if finding.chain and (at_it or along):
                return finding
        return None

    # ---- back in time

    def action_before(self) -> None:
        """Go to the same place in the nearest earlier step that has it."""
        row, number = self.row, self.number
        if row is None:
            return
        near = self.stand.slot
        self.in_thread("walk", lambda: self.look_before(row, number, near))

    def look_before(self, row: Row, number: int, near: int) -> None:
        """Look through the earlier steps whose calls were kept; runs in a thread."""
        worker, looked, first = get_current_worker(), 0, self.log_.first_step()
        stop = number
        while stop > first and looked < MOST_STEPS:
            start = max(first, stop - (1 if stop == number else SUMMARIES_AT_ONCE))
            kept = [s.step for s in self.log_.heads(start, stop) if self.log_.has_calls(s)]
            for earlier in reversed(kept):
                if worker.is_cancelled:
                    return
                looked += 1
                slot = StepRows(self.log_.step(earlier)).same_place(row, near)
                if slot is not None:
                    self.from_thread(self.take_before, number, earlier, slot)
                    return
            stop = start
        self.from_thread(self.tell, "no earlier step that was kept whole has this place")

    def take_before(self, asked: int, number: int, slot: int) -> None:
        """Go to the place that was found, unless the user has gone on."""
        if asked != self.number:
            return
        self.stand.remember()
        self.stand.following = False
        self.stand.go_to(number, lambda rows: slot)
        if number != asked - 1:
            self.tell(f"step {number}: the steps between have no such call")

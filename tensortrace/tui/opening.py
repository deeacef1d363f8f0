"""Where the viewer opens: at a step, a finding, a module, the end; or where one was last time."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from tensortrace.records import Finding
from tensortrace.run import Ranks, Run
from tensortrace.tui import places
from tensortrace.tui.ahead import Ahead
from tensortrace.tui.places import Place
from tensortrace.tui.step.calls import MEANINGS
from tensortrace.tui.terminal.looks import LOOKS
from tensortrace.tui.terminal.styled import UNICODE, Glyphs
from tensortrace.tui.walk import Walker


@dataclass(frozen=True, slots=True)
class Opening:
    """What was asked for on the command line.

    Attributes:
        finding: the id of a finding, or a code: the first of that code.
        module: a module path; its call in the step, or in the first step.
        follow: stay at the end of a run that is being written.
    """

    step: int | None = None
    finding: str | None = None
    module: str | None = None
    follow: bool = False


class Opener(Walker):
    """The part of the viewer that finds the place to open at, and remembers it at the end.

    Args:
        memory: the folder of the remembered places; None remembers nothing.
    """

    def __init__(
        self,
        log: Run | Ranks,
        step: int | None = None,
        glyphs: Glyphs = UNICODE,
        *,
        opening: Opening | None = None,
        memory: Path | None = None,
    ) -> None:
        asked = opening or Opening(step)
        super().__init__(log, asked.step, glyphs)
        self.ahead = Ahead(self)
        self.opening, self.memory = asked, memory
        self.follows_anew = asked.follow
        self.wanted_finding = asked.finding
        self.touched = asked != Opening()
        look = LOOKS.get(places.recall_theme(memory)) if memory is not None else None
        if look is not None:
            self.begin_in(look)

    def start_reading(self) -> None:
        """Make the views ahead, once the log is read."""
        super().start_reading()
        self.ahead.begin()

    def grow(self) -> None:
        """Show what came in the view too."""
        super().grow()
        if self.view is not None:
            self.want_detail()

    def open_at_place(self) -> None:
        """Go to the place that was asked for, or where one was; else to the first step."""
        asked = self.opening
        if asked.follow and not self.log_.live:
            self.tell("this run has ended: there is nothing to follow")
            asked = self.opening = replace(asked, follow=False)
            self.touched = asked != Opening()
        first, last = self.log_.first_step(), self.log_.last_step()
        place = None
        if asked == Opening() and self.memory is not None:
            place = places.recall(self.log_, self.memory)
        if asked.follow:
            self.stand.stay_at_end()
            return
        if place is not None:
            self.return_to_place(place)
            return
        number = first if asked.step is None else asked.step
        if not first <= number <= last:
            self.tell(f"this log has steps {first} to {last}", "warning")
        path = asked.module
        self.stand.go_to(number, lambda rows: 0 if path is None else rows.find_module(path))
        if path is not None and getattr(self.row and self.row.record, "module", None) != path:
            known = "" if path in self.modules else ", nor has what was read of the log yet"
            self.tell(f"step {self.number} has no call of {path}{known}", "warning")

    def begin_anew(self) -> None:
        """Follow another run if that was asked for; else go to its first error, or stay."""
        super().begin_anew()
        self.touched = self.opening != Opening()
        if self.follows_anew and self.log_.live:
            self.stand.stay_at_end()

    def return_to_place(self, place: Place) -> None:
        """Show where one was last time."""
        self.touched = True
        if place.columns is not None:
            self.columns = frozenset(place.columns) & frozenset(MEANINGS)
        self.stand.go_to(place.step, lambda rows: rows.at_seq(place.seq) or 0)
        self.tell(f"back at step {place.step}, where you were; e goes to the next finding")
        if place.view != "step":
            self.call_after_refresh(self.show_view, place.view)

    def take_findings(self) -> None:
        """Go to the finding that was asked for, as soon as it is read."""
        super().take_findings()
        if self.view is not None:
            self.want_detail()
        wanted = self.wanted_finding
        if wanted is None:
            return
        found = find(self.found, wanted)
        if found is not None:
            self.wanted_finding = None
            self.go_to_finding(found)
        elif self.log_.indexed >= 1:
            self.wanted_finding = None
            self.tell(f"no finding {wanted} in this log", "warning")

    def keep_place(self) -> None:
        """Remember the place for the next time."""
        if self.memory is not None and self.screen_stack:
            row = self.row
            seq = row.seq if row is not None else None
            columns = None if self.columns is None else tuple(sorted(self.columns))
            place = Place(self.log_.header.run_id, self.number, seq, self.shown, columns)
            places.keep(place, self.log_, self.memory)

    def action_theme(self, name: str) -> None:
        """Change the colours, and remember them."""
        self.theme = LOOKS[name].theme.name
        if self.memory is not None:
            places.keep_theme(name, self.memory)

    def action_help_quit(self) -> None:
        """Say which key ends it: ctrl+c is pressed by mistake too."""
        self.tell("q quits; the place is kept")

    async def action_quit(self) -> None:
        """Remember the place and end."""
        self.keep_place()
        await super().action_quit()

    def on_load(self) -> None:
        """Leave the terminal as it was, too, where a signal ends the process."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup has the latter ignored
                asyncio.get_running_loop().add_signal_handler(number, self.end_by, number)

    def end_by(self, number: int) -> None:
        """End with the code that a shell gives a signal, and remember the place."""
        self.exit(return_code=128 + number)
        self.keep_place()


def find(held: list[Finding], wanted: str) -> Finding | None:
    """The finding of an id, else the first of a code."""
    named = next((finding for finding in held if finding.id == wanted), None)
    return named or next((f for f in held if f.code == wanted.upper()), None)

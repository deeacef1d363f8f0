"""Where the viewer opens: at a step, a finding, a module, the end; or where one was last time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tensortrace.records import Finding
from tensortrace.tui import places
from tensortrace.tui.places import Place
from tensortrace.tui.step.calls import MEANINGS
from tensortrace.tui.terminal.looks import LOOKS

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame


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


class Opener:
    """Finds the place to open at, and remembers the one at the end.

    Args:
        asked: what was asked for on the command line.
        memory: the folder of the remembered places; None remembers nothing.
    """

    def __init__(self, frame: Frame, asked: Opening, memory: Path | None) -> None:
        self.frame, self.stand = frame, frame.stand
        self.asked, self.memory = asked, memory
        self.follows_anew = asked.follow
        self.wanted_finding = asked.finding
        frame.touched = asked != Opening()
        look = LOOKS.get(places.recall_theme(memory)) if memory is not None else None
        if look is not None:
            frame.begin_in(look)

    def open(self) -> None:
        """Go to the place that was asked for, or where one was; else to the first step."""
        asked, frame, stand = self.asked, self.frame, self.stand
        if asked.follow and not stand.log.live:
            frame.tell("this run has ended: there is nothing to follow")
            asked = self.asked = replace(asked, follow=False)
            frame.touched = asked != Opening()
        first, last = stand.log.first_step(), stand.log.last_step()
        place = None
        if asked == Opening() and self.memory is not None:
            place = places.recall(stand.log, self.memory)
        if asked.follow:
            stand.stay_at_end()
            return
        if place is not None:
            self.return_to_place(place)
            return
        number = first if asked.step is None else asked.step
        if not first <= number <= last:
            frame.tell(f"this log has steps {first} to {last}", "warning")
        path = asked.module
        stand.go_to(number, lambda rows: 0 if path is None else rows.find_module(path))
        if path is not None and getattr(stand.row and stand.row.record, "module", None) != path:
            known = "" if path in stand.modules else ", nor has what was read of the log yet"
            frame.tell(f"step {stand.number} has no call of {path}{known}", "warning")

    def return_to_place(self, place: Place) -> None:
        """Show where one was last time."""
        frame = self.frame
        frame.touched = True
        if place.columns is not None:
            frame.columns = frozenset(place.columns) & frozenset(MEANINGS)
        self.stand.go_to(place.step, lambda rows: rows.at_seq(place.seq) or 0)
        frame.tell(f"back at step {place.step}, where you were; e goes to the next finding")
        if place.view != "step":
            frame.call_after_refresh(frame.show_view, place.view)

    def open_anew(self) -> None:
        """Follow the other run that is in the log now, if that was asked for."""
        self.frame.touched = self.asked != Opening()
        if self.follows_anew and self.stand.log.live:
            self.stand.stay_at_end()

    def look_for_finding(self) -> None:
        """Go to the finding that was asked for, as soon as it is read."""
        wanted = self.wanted_finding
        if wanted is None:
            return
        found = find(self.stand.found, wanted)
        if found is not None:
            self.wanted_finding = None
            self.frame.go_to_finding(found)
        elif self.stand.log.indexed >= 1:
            self.wanted_finding = None
            self.frame.tell(f"no finding {wanted} in this log", "warning")

    def keep_place(self) -> None:
        """Remember the place for the next time."""
        frame, stand = self.frame, self.stand
        if self.memory is not None and frame.screen_stack:
            row = stand.row
            seq = row.seq if row is not None else None
            columns = None if frame.columns is None else tuple(sorted(frame.columns))
            place = Place(stand.log.header.run_id, stand.number, seq, stand.shown, columns)
            places.keep(place, stand.log, self.memory)

    def keep_theme(self, name: str) -> None:
        """Remember the colours for the next time."""
        if self.memory is not None:
            places.keep_theme(name, self.memory)


def find(held: list[Finding], wanted: str) -> Finding | None:
    """The finding of an id, else the first of a code."""
    named = next((finding for finding in held if finding.id == wanted), None)
    return named or next((f for f in held if f.code == wanted.upper()), None)

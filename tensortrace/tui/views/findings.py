"""The view of the findings: in order of cause, filtered, with explanation, chain and fix beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.geometry import Size

from tensortrace.records import Finding, Severity
from tensortrace.text import finding_text
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.panes import Pane
from tensortrace.tui.step import detail, findings
from tensortrace.tui.terminal.styled import Styled
from tensortrace.tui.views.view import View

# By the digit after TT.
FAMILIES = {
    "1": "non-finite", "2": "gradients", "3": "activations", "4": "parameters", "5": "precision",
    "6": "data and loss", "7": "loop", "8": "shapes and devices", "9": "ranks",
}  # fmt: skip
# What each press of the key leaves in.
SEVERITY_FILTERS: tuple[tuple[str, frozenset[Severity]], ...] = (
    ("", frozenset(("error", "warning", "note"))),
    ("errors", frozenset(("error",))),
    ("warnings", frozenset(("warning",))),
    ("notes", frozenset(("note",))),
)
AROUND = 3
# Cells of a list whose pane was not laid out yet.
NARROW = 40


def family_of(finding: Finding) -> str:
    """The digit that says what a finding is about, "" of a code that is none of ours."""
    digit = finding.code[2:3] if finding.code.startswith("TT") else ""
    return digit if digit in FAMILIES else ""


class FindingsView(View):
    """What the checks found, the cause first."""

    NAME = "findings"
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("findings")

    def __init__(self) -> None:
        super().__init__()
        self.family, self.severity = "", 0
        self.held: list[Finding] = []
        self.ordered: tuple[object, list[Finding]] = (None, [])
        # The finding under the cursor, and the one that the viewer led to, once for each.
        self.at: Finding | None = None
        self.led: Finding | None = None
        # The room that it was drawn for.
        self.drawn: tuple[Size, int] | None = None

    def compose(self) -> ComposeResult:
        """The list, and what the one under the cursor says."""
        yield Pane("findings-list", "Findings", height=findings.LINES)
        yield Pane("findings-told", "Why", cursor=False)

    # ---- drawing

    def draw(self) -> None:
        """Show the list; the cursor is on the finding that one came to last."""
        viewer = self.viewer
        if self.ordered[0] is not viewer.found:
            self.ordered = (viewer.found, viewer.in_order_of_cause())
            self.held = self.filtered(self.ordered[1])
        if viewer.stand.at_finding is not None and viewer.stand.at_finding is not self.led:
            self.at = self.led = viewer.stand.at_finding
        held, modules, glyphs = self.held, viewer.modules, viewer.glyphs
        self.drawn = self.room
        height = findings.lines_each(held, *self.drawn[0])

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            return findings.finding_line(
                held[at], part, modules, width, here=here, glyphs=glyphs, height=height
            )

        self.main.item_height = height
        self.main.set_title(self.title_text())
        at = held.index(self.at) if self.at in held else self.main.cursor or 0
        self.main.show(len(held), draw, at)
        self.draw_told()

    @property
    def told(self) -> Pane:
        """The pane beside or below the list."""
        return self.query_one("#findings-told", Pane)

    @property
    def room(self) -> tuple[Size, int]:
        """The size of the list, and cells of a line beside it; of a hidden pane some that work."""
        width = (self.told.size.width or self.viewer.size.width - 2) - 2
        return self.main.size or Size(NARROW, 0), max(20, width)

    def on_pane_resized(self, message: Pane.Resized) -> None:
        """Lay out for the room that the panes now have; they may get it after all else."""
        message.stop()
        if self.display and self.ready and self.room != self.drawn:
            self.draw()

    def title_text(self) -> str:
        """Say how many there are, and of which kind."""
        total = len(self.ordered[1])
        kinds = [FAMILIES.get(self.family, ""), SEVERITY_FILTERS[self.severity][0]]
        told = ", ".join(filter(None, kinds))
        reading = self.viewer.log_.indexed
        more = "" if reading >= 1 else f", {reading:.0%} read"
        if told and total:
            return f"Findings {len(self.held)} of {total}: {told}{more}"
        return f"Findings by cause, {total}{more}" if total else f"No findings{more}"

    def filtered(self, ordered: Sequence[Finding]) -> list[Finding]:
        """Leave out what the filters leave out."""
        wanted = SEVERITY_FILTERS[self.severity][1]
        return [
            f for f in ordered
            if f.severity in wanted and (not self.family or family_of(f) == self.family)
        ]  # fmt: skip

    @property
    def finding(self) -> Finding | None:
        """The finding under the cursor."""
        at = self.main.cursor or 0
        return self.held[at] if at < len(self.held) else None

    def draw_told(self) -> None:
        """Tell the finding under the cursor: what, why, fix, chain, the lines of code."""
        viewer, finding = self.viewer, self.finding
        lines: list[Styled] = []
        if finding is not None:
            lines = detail.finding_lines(finding, viewer.modules, self.room[1], viewer.glyphs)
            lines += repeated(finding, viewer.log_.last_step())
            places = [finding.location, finding.location and finding.location.caller,
                      *(link.location for link in finding.chain)]  # fmt: skip
            for place in dict.fromkeys(place for place in places if place is not None):
                source = viewer.log_.source(place.file, place.line)
                if source is not None:
                    lines.append([])
                    lines.append([(detail.source_title(place), "faint")])
                    lines += detail.snippet(place, source, AROUND, viewer.glyphs, self.room[1])
        self.told.show(len(lines), lambda at, part, width, here: lines[at])

    def leave(self) -> None:
        """Begin at the finding that one came to last when the view is opened again."""
        self.led = None

    # ---- keys

    def moved(self, pane: Pane, at: int) -> None:
        """Tell another one."""
        if pane is self.main:
            self.at = self.finding
            self.draw_told()

    def open(self, pane: Pane, at: int) -> None:
        """Go to where it was found."""
        if self.finding is not None:
            self.viewer.stand.remember()
            self.viewer.stand.following = False
            self.viewer.go_to_finding(self.finding)
            self.viewer.show_view("step")

    def action_family(self) -> None:
        """Show the findings of the next family that has any, then all again."""
        present = ["", *sorted({family_of(f) for f in self.ordered[1]} - {""})]
        at = present.index(self.family) if self.family in present else 0
        self.family = present[(at + 1) % len(present)]
        self.filter_again()

    def action_severity(self) -> None:
        """Show only errors, warnings, notes, then all again."""
        self.severity = (self.severity + 1) % len(SEVERITY_FILTERS)
        self.filter_again()

    def filter_again(self) -> None:
        """Show what the filters leave in."""
        self.held = self.filtered(self.ordered[1])
        self.draw()

    def action_causes(self) -> None:
        """Go to the finding and walk its causes."""
        if self.finding is not None:
            self.open(self.main, 0)
            self.viewer.call_after_refresh(self.viewer.action_causes)

    def copied(self) -> tuple[str, str] | None:
        """The finding as people tell it."""
        if self.finding is None:
            return None
        text = finding_text(self.finding)
        return text + "\n" + msgspec.json.encode(self.finding).decode("utf-8", "replace"), "finding"


def repeated(finding: Finding, last: int) -> list[Styled]:
    """Say how far from the end of the run it was."""
    return [[(f"  when step {finding.step} of {last}", "faint")]]

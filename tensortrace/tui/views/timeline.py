"""The view of the whole run: loss, gradient norm and a statistic of one's choice over the steps."""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec
from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import BindingType

from tensortrace.text import escape, module_text, number_text
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.dialogs.choose import Choice, choose
from tensortrace.tui.grid import QUANTITIES
from tensortrace.tui.panes import Pane
from tensortrace.tui.span import Span
from tensortrace.tui.step.cells import full_name
from tensortrace.tui.terminal.styled import Styled, clip_path, fit
from tensortrace.tui.views.columns import Columns
from tensortrace.tui.views.plot import Extent, curve, is_log
from tensortrace.tui.views.site import held_of
from tensortrace.tui.views.site_track import SiteStatistic, of_site
from tensortrace.tui.views.span_view import SpanView
from tensortrace.tui.views.tracks import GRAD_NORM, LOSS, RATE, Statistic, Tracks, statistics

GUTTER = 11
# Cells of the title of a plot beside the name: the number here, the kind of scale.
TITLE_BESIDE = 36


class TimelineView(SpanView):
    """All steps at once; the marks of findings stand over them."""

    NAME = "timeline"
    WIDEST = 1000  # a short run takes all the room
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("timeline")

    def __init__(self) -> None:
        super().__init__()
        # The run and the rank that numbers of a tensor were read from.
        self.known_of = ("", 0)
        self.chosen: Statistic | SiteStatistic = RATE

    def compose(self) -> ComposeResult:
        """One pane that is redrawn whole."""
        yield Pane("timeline-plot", "Timeline", cursor=False)

    @property
    def tracks(self) -> Tracks | None:
        """What was gathered."""
        return self.held if isinstance(self.held, Tracks) else None

    def gather(self, span: Span) -> Tracks:
        """Begin to gather what is drawn."""
        if isinstance(self.chosen, SiteStatistic) and self.run != self.known_of:
            self.chosen.known.clear()  # of another run or rank
        self.known_of = self.run
        return Tracks(span, dict.fromkeys((LOSS, GRAD_NORM, self.chosen)))

    def left_of(self, width: int) -> int:
        """The ends of the scales."""
        return min(GUTTER, width // 4)

    # ---- drawing

    def draw_columns(self) -> None:
        """Draw the plots, one under the other, in the room there is."""
        tracks = self.tracks
        if tracks is None:
            return
        pane = self.main
        width, height = pane.size.width or 78, pane.size.height or 18
        lines = self.head_lines(tracks, width)
        room = max(2, (height - len(lines)) // len(tracks.held))
        for row in range(len(tracks.held)):
            lines += self.track_lines(tracks, row, width, room)
        pane.set_title(f"Timeline: {self.each}{self.reading}")
        pane.show(len(lines), lambda at, part, width, here: lines[at], keep=True)

    def head_lines(self, tracks: Tracks, width: int) -> list[Styled]:
        """The findings, and which steps there are."""
        viewer = self.viewer
        held = Columns(tracks.span, self.shown, self.wide, self.left_of(width), viewer.glyphs)
        return [held.marks_line(viewer.marks), held.steps_line(self.column, width)]

    def track_lines(self, tracks: Tracks, row: int, width: int, height: int) -> list[Styled]:
        """Draw one statistic: what it is and its number here, then the curve."""
        glyphs, gutter, column = self.viewer.glyphs, self.left_of(width), self.column
        extents: list[Extent] = [
            None if math.isnan(low) else (float(low), float(high))
            for low, high in zip(tracks.low[row], tracks.high[row], strict=True)
        ][: self.shown]
        bad = [step >= 0 for step in tracks.bad[row][: self.shown].tolist()]
        held = [extent for extent in extents if extent is not None]
        scale = " (log scale)" if is_log(extents) else ""
        now = here_text(extents, bad, column)
        title: Styled = [
            (f" {self.label(tracks.held[row], max(16, width - TITLE_BESIDE))}", "strong"),
            (scale, "faint"),
            ("  here ", "faint"),
            (now, "error" if now.endswith("not finite") else "ok"),
        ]
        if any(bad):
            columns = f"{sum(bad)} column{'s' * (sum(bad) != 1)}"
            title.append((f"  x: not finite in {columns}", "error"))
        if not held and not any(bad):
            return [title, [(" not in this log" if self.part >= 1 else "", "faint")]]
        rows = max(1, height - 1)
        ends = {0: number_text(max(e[1] for e in held)) if held else "",
                rows - 1: number_text(min(e[0] for e in held)) if held else ""}  # fmt: skip
        if len(set(ends.values())) == 1:
            ends = {(rows - 1) // 2: ends[0]}
        lines = [title]
        for at, text in enumerate(curve(extents, self.wide, rows, glyphs)):
            line: Styled = [(fit(ends.get(at, ""), gutter - 1, glyphs, right=True) + " ", "faint")]
            for number in range(self.shown):
                piece = text[number * self.wide : (number + 1) * self.wide]
                style = "ok"
                if bad[number] and (at == 0 or extents[number] is None):
                    piece, style = "x".ljust(self.wide), "error"
                line.append((piece, "here" if number == column else style))
            lines.append(line)
        return lines

    def label(self, statistic: Statistic | SiteStatistic, width: int | None = None) -> str:
        """Name a statistic for a person, with a module path in it that fits a width."""
        if isinstance(statistic, SiteStatistic):
            which = f" {escape(statistic.site.label)}"
            where, told = statistic.title.removesuffix(which), f"{which} {statistic.name}"
            return self.where(where, width, told) + told
        if statistic.path is None:
            return statistic.name
        module = self.viewer.modules.get(statistic.path)
        where = module_text(statistic.path, module.cls if module else None)
        told = f" {QUANTITIES[statistic.name]}"
        return self.where(where, width, told) + told

    def where(self, path: str, width: int | None, told: str) -> str:
        """A path in what is told beside it leaves of a width."""
        if width is None:
            return path
        return clip_path(path, max(8, width - cell_len(told)), self.viewer.glyphs)

    # ---- keys

    def action_quantity(self) -> None:
        """Ask which statistic the last plot shows."""
        held: list[Statistic | SiteStatistic] = [*statistics(self.viewer.modules)]
        row = self.viewer.row
        if row is not None:
            name = full_name(row.record, self.viewer.modules)
            held += [one for site in held_of(row, self.viewer.rows) for one in of_site(site, name)]
        choices = [Choice(self.label(one), one) for one in held]
        choose(self.viewer, "Show which statistic over the steps?", choices, self.take)

    def take(self, chosen: object) -> None:
        """Show another statistic."""
        if isinstance(chosen, Statistic | SiteStatistic):
            self.chosen, self.held = chosen, None
            if self.ready:
                self.draw()

    def copied(self) -> tuple[str, str] | None:
        """The step line under the cursor, as JSON."""
        held = self.viewer.log_.summaries(self.here, self.here + 1)
        if not held:
            return None
        told = msgspec.json.encode(held[0]).decode("utf-8", "replace")
        return told, f"the line of step {self.here} as JSON"

    def action_end(self, last: bool) -> None:
        """Go to the first or the last step."""
        log = self.viewer.log_
        self.here = log.last_step() if last else log.first_step()
        self.draw()

    def open(self, pane: Pane, at: int) -> None:
        """Go to the step under the cursor: one with a finding or a bad number, if there is any."""
        tracks, viewer = self.tracks, self.viewer
        if tracks is None:
            return
        steps = tracks.span.steps(self.column)
        marked = [step for step in viewer.marks if step in steps and viewer.marks[step] != "note"]
        bad = [step for step in tracks.bad[:, self.column].tolist() if step >= 0]
        held = self.here if tracks.span.per == 1 else min(marked or bad or [self.here])
        viewer.stand.remember()
        viewer.stand.following = False
        viewer.stand.go_to(held)
        viewer.show_view("step")

    def clicked(self, pane: Pane, at: int, x: int) -> None:
        """Go to the column under the pointer; a click on the cursor goes to the step."""
        left = x - self.left_of(pane.size.width)
        if left >= 0:
            column = min(self.shown - 1, left // self.wide)
            if column == self.column:
                self.open(pane, at)
            else:
                self.action_column(column - self.column)


def here_text(extents: list[Extent], bad: list[bool], column: int) -> str:
    """The numbers of a column in words."""
    if not 0 <= column < len(extents):
        return "-"
    held, told = extents[column], "not finite" if bad[column] else ""
    if held is None:
        return told or "-"
    low, high = map(number_text, held)
    return ", ".join(filter(None, [low if low == high else f"{low} to {high}", told]))

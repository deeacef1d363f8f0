"""The view of one tensor: its numbers beside those of its gradient, over the steps, its flow."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import ClassVar

import msgspec
from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.worker import get_current_worker

from tensortrace.records import Tensor
from tensortrace.text import escape, location_text, number_text
from tensortrace.tui.bindings import bindings_of
from tensortrace.tui.dialogs.choose import Choice, choose
from tensortrace.tui.panes import Pane
from tensortrace.tui.span import WIDEST, Span, fitting, span_of, used
from tensortrace.tui.step import detail, flow
from tensortrace.tui.step.cells import full_name, short_place
from tensortrace.tui.step.distribution import distribution_lines
from tensortrace.tui.step.flow import Flow, Way
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import ASCII, Glyphs, Styled, clip, clip_path, fit
from tensortrace.tui.views.site import Held, beside, held_of, over_steps
from tensortrace.tui.views.site_track import of_site
from tensortrace.tui.views.span_view import TELL_EVERY_S
from tensortrace.tui.views.view import View

GUTTER, PLOT_LINES = 11, 6
# Cells of the title beside what varies.
TITLE_BESIDE = 16
HINT = "  (l: the next one)"


class TensorView(View):
    """All that is known of one tensor of the row."""

    NAME = "tensor"
    BINDINGS: ClassVar[list[BindingType]] = bindings_of("tensor")

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Held] = []
        self.at = 0
        self.asked: tuple[StepRows, Row] | None = None
        self.ways: tuple[Way, Way] | None = None
        # Over the steps: the value and what is beside it, by column.
        self.span = Span(0, 1, 1)
        self.series: dict[int, list[Tensor | None]] = {}
        self.done = False

    def compose(self) -> ComposeResult:
        """One page."""
        yield Pane("tensor-page", "Tensor", cursor=False)

    # ---- what is shown

    @property
    def chosen(self) -> list[Held]:
        """The tensor, and its gradient or value if that is known."""
        if not self.held:
            return []
        one = self.held[min(self.at, len(self.held) - 1)]
        other = beside(one, self.held)
        return [one] if other is None else [one, other]

    def draw(self) -> None:
        """Show the tensors of the row; the one of the same name stays chosen."""
        viewer = self.viewer
        rows, row = viewer.rows, viewer.row
        if row is None:
            self.held = []
            self.draw_page()
            return
        if self.asked is None or self.asked[0] is not rows or self.asked[1] != row:
            label = self.held[self.at].label if self.at < len(self.held) else ""
            self.asked, self.held = (rows, row), held_of(row, rows)
            self.at = next((i for i, one in enumerate(self.held) if one.label == label), 0)
            self.look()
        self.draw_page()

    def leave(self) -> None:
        """Read no further for a page that nobody sees; it begins again when it is."""
        if not self.done:
            self.viewer.workers.cancel_group(self.viewer, f"view-{self.NAME}")
            self.asked = None

    def look(self) -> None:
        """Read the flow and the steps in a thread."""
        self.ways, self.series, self.done = None, {}, False
        if self.asked is None or not self.chosen:
            return
        # What an earlier look still hands over is of another tensor, though of the same row.
        rows, row = self.asked
        self.asked = rows, row
        log = self.viewer.log_
        first, last = log.first_step(), log.last_step()
        width = max(1, self.inside - GUTTER)
        per = fitting(first, last, width)
        self.span = span_of(first, last, width, per, self.viewer.number)
        asked, span, chosen = self.asked, self.span, self.chosen
        self.work(lambda: self.ask(asked, span, chosen))

    @property
    def inside(self) -> int:
        """Cells of a line of the page."""
        return max(20, (self.main.size.width or self.viewer.size.width - 2) - 1)

    def ask(self, asked: tuple[StepRows, Row], span: Span, chosen: list[Held]) -> None:
        """Look through the step, then through the others; runs in a thread."""
        worker = get_current_worker()
        rows, row = asked
        if rows.large:
            rows.gather(row, lambda: worker.is_cancelled)
        lines = Flow(rows.step, lambda: worker.is_cancelled)
        ways = flow.sources(row.record, lines), flow.uses(row.record, lines)
        self.viewer.from_thread(self.took_ways, asked, ways)
        found: dict[int, list[Tensor | None]] = {}
        told = time.monotonic()
        for column, tensors in over_steps(
            self.viewer.log_, span, chosen, rows.step.number, lambda: worker.is_cancelled
        ):
            if worker.is_cancelled:
                return
            found[column] = tensors
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                self.viewer.from_thread(self.took, asked, found, False)
                found = {}
            self.viewer.turns.breathe()
        if not worker.is_cancelled:
            self.viewer.from_thread(self.took, asked, found, True)

    def took_ways(self, asked: tuple[StepRows, Row], ways: tuple[Way, Way]) -> None:
        """Show who made it and who used it."""
        if asked is self.asked:
            self.ways = ways
            self.draw_page()

    def took(
        self, asked: tuple[StepRows, Row], found: dict[int, list[Tensor | None]], done: bool
    ) -> None:
        """Show the tensor in more steps, by column."""
        if asked is not self.asked:
            return
        self.done = done
        self.series.update(found)
        if self.display:
            self.draw_page()

    # ---- drawing

    def draw_page(self) -> None:
        """Write the page."""
        pane, width, glyphs = self.main, self.inside, self.viewer.glyphs
        lines: list[Styled] = []
        row = self.viewer.row
        if not self.chosen or row is None:
            lines.append([(" this row has no tensor: choose another with j and k in view 1", "")])
            pane.set_title("Tensor")
        else:
            one = self.chosen[0]
            name = full_name(row.record, self.viewer.modules)
            told = f", step {self.viewer.number}"
            room = width - cell_len(escape(one.label)) - len(told) - TITLE_BESIDE
            name = clip_path(name, max(8, room), glyphs)
            pane.set_title(f"Tensor {one.label} of {name}{told}")
            lines += self.choice_lines(width)
            shown = [(escape(held.label), held.tensor) for held in self.chosen]
            lines += detail.stat_lines(shown, width)
            lines += distribution_lines(shown, width, glyphs)
            for at, held in enumerate(self.chosen):
                lines += self.series_lines(at, held, width)
            lines += self.flow_lines()
            location = detail.location_of(row)
            if location is not None:
                source = self.viewer.log_.source(location.file, location.line)
                place, code = location_text(location), escape((location.code or "").strip())
                code = clip(f"  {code}", max(0, width - 7 - cell_len(place)), glyphs)
                lines.append([("where  ", "faint"), (place, "strong"), (code, "")])
                lines += detail.snippet(location, source, 2, glyphs, width)
        pane.show(len(lines), lambda at, part, width, here: lines[at], keep=True)

    def choice_lines(self, width: int) -> list[Styled]:
        """The names of the tensors of the row, the chosen one in brackets."""
        lines: list[Styled] = [[("", "")]]
        used_ = 0
        for at, held in enumerate(self.held):
            name = escape(held.label)[:40]
            text = f"[{name}]" if at == self.at else f" {name} "
            if used_ + len(text) > width and used_:
                lines.append([("", "")])
                used_ = 0
            lines[-1].append((text, "section" if at == self.at else "faint"))
            used_ += len(text)
        if len(self.held) > 1 and used_ + len(HINT) <= width:
            lines[-1].append((HINT, "faint"))
        return lines

    def series_lines(self, at: int, held: Held, width: int) -> list[Styled]:
        """Draw smallest, mean with deviation and largest over the steps."""
        columns = used(self.span, self.viewer.log_.last_step())
        wide = max(1, min(WIDEST, (width - GUTTER) // columns))
        tensors = [None if self.series.get(i) is None else self.series[i][at]
                   for i in range(columns)]  # fmt: skip
        known = sum(tensor is not None for tensor in tensors)
        looking = "" if self.done else ", looking"
        each = f", one of every {self.span.per}" if self.span.per > 1 and known > 1 else ""
        told = f"{known} step{'s' * (known != 1)}{each}{looking}: min to max, mean with deviation"
        head: Styled = [(f"{escape(held.label)} over steps", "strong"), (f"  {told}", "faint")]
        if known < 2:  # of one step the lines above tell it
            return [head]
        here = self.span.column(self.viewer.number)
        return [head, *box_lines(tensors, wide, PLOT_LINES, here, self.viewer.glyphs)]

    def flow_lines(self) -> list[Styled]:
        """Who made the inputs of the row, and who used what it made."""
        lines: list[Styled] = []
        for title, way in zip(("from", "to"), self.ways or (), strict=False):
            for link in way.links:
                name = full_name(link.record, self.viewer.modules)
                place = short_place(getattr(link.record, "location", None))
                beside = 30 + cell_len(place) + len(str(link.seq))
                name = clip_path(name, max(8, self.inside - beside), self.viewer.glyphs)
                lines.append([
                    (f"{title:<6} ", "faint"), (f"{escape(link.label)[:24]:<12} ", ""),
                    (f"#{link.seq} {name}", "op"), (f"  {place}", "faint"),
                ])  # fmt: skip
            if not way.links:
                lines.append([(f"{title:<6} ", "faint"), (way.why, "faint")])
        if lines:
            lines.append([("       i and o walk there; 5 shows all of it", "faint")])
        return lines

    # ---- keys

    def action_tensor(self, direction: int) -> None:
        """Choose the next or previous tensor of the row."""
        if self.held:
            self.at = (self.at + direction) % len(self.held)
            self.look()
            self.draw_page()

    def action_chart(self) -> None:
        """Ask for a statistic of the tensor, and draw it over all steps in the timeline."""
        row = self.viewer.row
        if row is None or not self.chosen:
            return
        name = full_name(row.record, self.viewer.modules)
        held = of_site(self.chosen[0], name)
        choices = [Choice(one.name, one, one.title) for one in held]
        question = f"Chart which statistic of {self.chosen[0].label} over all steps?"
        choose(self.viewer, escape(question), choices, self.viewer.chart)

    def open(self, pane: Pane, at: int) -> None:
        """Go to the row."""
        self.viewer.stand.remember()
        self.viewer.show_view("step")

    def copied(self) -> tuple[str, str] | None:
        """The tensor as it is in the log."""
        if not self.chosen:
            return None
        return msgspec.json.encode(self.chosen[0].tensor).decode(), "the tensor as JSON"


def box_lines(
    tensors: Sequence[Tensor | None], wide: int, height: int, here: int, glyphs: Glyphs
) -> list[Styled]:
    """Draw for each column a line from smallest to largest, thicker within mean ± deviation."""
    thin, thick, middle = ("|", "#", "o") if glyphs is ASCII else ("│", "█", "●")
    known = [t for t in tensors if t is not None and t.min is not None and t.max is not None]
    low = min((t.min for t in known if t.min is not None), default=0.0)
    high = max((t.max for t in known if t.max is not None), default=0.0)

    def level(value: float) -> int:
        extent = high / 4 - low / 4  # in quarters: the difference may be no float
        share = (value / 4 - low / 4) / extent if extent > 0 else 0.5
        return round(max(0.0, min(1.0, share)) * (height - 1)) if math.isfinite(share) else 0

    lines: list[Styled] = []
    for row in range(height - 1, -1, -1):
        end = number_text(high) if row == height - 1 else number_text(low) if row == 0 else ""
        line: Styled = [(fit(end if known else "", GUTTER - 1, glyphs, right=True) + " ", "faint")]
        for column, tensor in enumerate(tensors):
            glyph, style = " ", ""
            if tensor is not None and tensor.nonfinite and row == height - 1:
                glyph, style = "x", "error"
            elif tensor is not None and tensor.min is not None and tensor.max is not None:
                mean, std = tensor.mean or 0.0, tensor.std or 0.0
                if row == level(mean):
                    glyph, style = middle, "strong"
                elif (
                    level(max(mean - std, tensor.min)) <= row <= level(min(mean + std, tensor.max))
                ):
                    glyph, style = thick, "ok"
                elif level(tensor.min) <= row <= level(tensor.max):
                    glyph, style = thin, "faint"
            line.append((glyph.ljust(wide), "here" if column == here else style))
        lines.append(line)
    return lines

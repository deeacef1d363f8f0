"""The screen of the viewer: its panes, the place in the run that they show, drawing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from rich.console import RenderableType
from textual import events
from textual._compositor import ChopsUpdate, LayoutUpdate
from textual.app import App, ComposeResult
from textual.containers import Horizontal, Vertical
from textual.driver import Driver
from textual.geometry import Size
from textual.notifications import Notification
from textual.screen import Screen
from textual.widgets import Input
from textual.worker import Worker

from tensortrace.records import Finding, Module, Severity
from tensortrace.run import Ranks, Run
from tensortrace.text import escape, number_text
from tensortrace.tui.detail_panes import DetailPanes
from tensortrace.tui.dialogs.screens import Prompt
from tensortrace.tui.footer import Keys
from tensortrace.tui.header import Headline, headline, program_of, state_of
from tensortrace.tui.layout import DETAIL_FROM_HEIGHT, FINDINGS_FROM, PANES, PaneName, arrange
from tensortrace.tui.panes import Pane
from tensortrace.tui.stand import Stand, Stop
from tensortrace.tui.step import findings
from tensortrace.tui.step.calls import columns, head_line, row_line
from tensortrace.tui.step.folds import Folds
from tensortrace.tui.step.row import Row
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.step_lines import StepLines, Trends
from tensortrace.tui.tabs import Tabs
from tensortrace.tui.terminal.looks import DARK, LOOKS, Look
from tensortrace.tui.terminal.painting import Changes, Painted
from tensortrace.tui.terminal.paints import Immediate
from tensortrace.tui.terminal.quick import Turns
from tensortrace.tui.terminal.strips import Ground
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled
from tensortrace.tui.timeline import Timeline, window
from tensortrace.tui.views import NAMES, kind_of
from tensortrace.tui.views.view import View

BREAKPOINTS = [(0, "-narrow"), (FINDINGS_FROM, "-wide")]
HEIGHTS = [(0, "-low"), (DETAIL_FROM_HEIGHT, "-high")]
# Messages stand over the data: so many at once, for so long.
MOST_TOLD, TOLD_S = 2, 2.5
# What the title says of a step whose calls are not all in the log.
NOT_KEPT = {"all": "", "some": ", not all calls kept", "none": ", calls not kept"}
# What goes on says so until it ends.
UNDER_WAY = "searching"


class Main(Immediate[object], Ground):
    """The screen that the panes lie on."""


class Across(Horizontal, Ground):
    """Panes side by side."""


class Down(Vertical, Ground):
    """Panes one below the other."""


class Frame(App[int]):
    """The run, the place in it and the panes that draw it.

    Args:
        log: what is read; nothing is ever written to it.
        glyphs: the signs to draw with.
    """

    CSS_PATH = "app.tcss"
    # Classes of the screen by its width; views that have two panes put them side by side.
    HORIZONTAL_BREAKPOINTS = BREAKPOINTS
    VERTICAL_BREAKPOINTS = HEIGHTS
    TITLE = "tensortrace"

    def __init__(self, log: Run | Ranks, glyphs: Glyphs = UNICODE) -> None:
        super().__init__()
        for look in LOOKS.values():
            self.register_theme(look.theme)
        self.begin_in(DARK)
        self.glyphs = glyphs
        self.stand = Stand(
            log if isinstance(log, Ranks) else Ranks([log]),
            cursor=lambda: self.pane("calls").cursor or 0,
            show=self.show_place,
            forget=self.forget,
        )
        self.step_lines, self.trends = StepLines(self), Trends(self)
        self.details = DetailPanes(self)
        # Threads wait for the first screen, which they would hold up.
        self.begun = False
        # Columns of the table that the user wants; None leaves it to the width.
        self.columns: frozenset[str] | None = None
        self.zoom: PaneName | None = None
        self.source_wanted: bool | None = None
        self.painted = Painted(0, 0)
        self.turns = Turns()
        # What is under way, and how the run stands, as the first line said it last.
        self.progress, self.state_told = "", ("", "")
        # Until the user does something, the screen goes to the first error as soon as it is read.
        self.touched = False

    def begin_in(self, look: Look) -> None:
        """Take a theme before there is a screen.

        As the default: set later, every rule would be read and every widget styled again.
        """
        self.set_reactive(Frame.theme, look.theme.name)
        self.stylesheet.set_variables(self.get_css_variables())
        self.set_class(look.theme.dark, "-dark-mode", update=False)
        self.set_class(not look.theme.dark, "-light-mode", update=False)

    def get_driver_class(self) -> type[Driver]:
        """Read keys in our own way where Textual would read those of a terminal."""
        found = super().get_driver_class()
        if found.__name__ != "LinuxDriver":
            return found
        from tensortrace.tui.terminal.keyboard import Keyboard

        return Keyboard

    # ---- building the screen

    def get_default_screen(self) -> Screen[object]:
        """Make the screen that the panes lie on."""
        return Main(id="_default")

    def compose(self) -> ComposeResult:
        """Put the panes where `layout.arrange` shows or hides them; views come later."""
        yield Headline()
        yield Tabs(NAMES)
        yield Timeline(self.glyphs)
        with Across(id="main"):
            yield Pane("findings", "Findings", height=findings.LINES)
            with Down(id="right"):
                yield Pane("calls", "Step", sticky=1)
                with Across(id="bottom"):
                    yield Pane("detail", "Detail", cursor=False)
                    yield Pane("source", "Source", cursor=False)
        yield Prompt()
        yield Keys()

    def pane(self, name: PaneName) -> Pane:
        """One of the four panes."""
        return self.screen_stack[0].query_one(f"#{name}", Pane)

    @property
    def view(self) -> View | None:
        """The view that is shown, None for the step."""
        if self.shown == "step":
            return None
        return self.screen_stack[0].query_one(f"#view-{self.shown}", View)

    # ---- views

    def show_view(self, name: str) -> None:
        """Show a view and give it the focus; a view is made when it is first asked for."""
        if name == self.shown or name not in NAMES:
            return
        main, left = self.screen_stack[0], self.view
        self.make_view(name)
        self.stand.shown = name
        if left is not None:
            left.leave()
        self.arrange()
        if not isinstance(self.focused, Input):
            # At once: a pane that is hidden with the focus takes it from whoever has it then.
            main.set_focus(self.main_pane if self.view is None or self.view.ready else None)
        main.query_one(Tabs).show(name)
        self.call_after_refresh(self.focus_view)

    def make_view(self, name: str) -> None:
        """Make a view, unless it is there."""
        main = self.screen_stack[0]
        if name != "step" and not main.query(f"#view-{name}"):
            main.mount(kind_of(name)(), after="#main")

    def focus_view(self) -> None:
        """Draw the view that is shown now and give its main pane the focus."""
        view = self.view
        if view is not None and not view.ready:
            self.call_after_refresh(self.focus_view)
            return
        self.draw_top()
        if view is not None:
            view.draw()
        else:
            self.redraw()
        self.give_focus(self.main_pane)
        self.refresh_bindings()

    @property
    def main_pane(self) -> Pane:
        """The pane that has the focus unless another one was chosen."""
        view = self.view
        return self.pane(self.zoom or "calls") if view is None or not view.ready else view.main

    # ---- the room that there is

    def arrange(self, size: Size | None = None) -> None:
        """Show the panes that there is room for, on a screen of a size if it is new."""
        size = self.size if size is None else size
        main, view = self.screen_stack[0], self.view
        for other in main.query(View):
            other.display = other is view
        main.query_one("#main").display = view is None
        held = arrange(size.width, size.height, self.zoom, self.source_wanted)
        for name in PANES:
            self.pane(name).display = name in held.visible
        bottom = main.query_one("#bottom")
        bottom.display = bool(held.visible & {"detail", "source"})
        bottom.styles.height = held.bottom if "calls" in held.visible else "1fr"
        main.query_one("#right").display = held.visible != {"findings"}
        main.query_one("#findings").styles.width = 36 if "calls" in held.visible else "1fr"
        main.query_one(Tabs).display = held.tabs and len(NAMES) > 1
        strip = main.query_one(Timeline)
        strip.styles.height = held.timeline
        strip.display = view is None or view.STRIP
        focused = self.focused.id if isinstance(self.focused, Pane) else None
        if view is None and focused in PANES and focused not in held.visible:
            main.set_focus(self.pane(next(name for name in PANES if name in held.visible)))

    def give_focus(self, pane: Pane) -> None:
        """Give a pane the focus at once, but take it from no question that is being typed.

        `Widget.focus` does so some turns later: a question that was asked meanwhile would be gone.
        """
        main = self.screen_stack[0]
        if not main.query_one(Prompt).display:
            main.set_focus(pane)

    def on_resize(self, event: events.Resize) -> None:
        """Choose the panes again and fill them for the new width."""
        if self.screen_stack[0].query(Timeline):
            # The program itself takes the new size only after this.
            self.arrange(event.size)
            self.call_after_refresh(self.redraw)

    def on_pane_resized(self, message: Pane.Resized) -> None:
        """Fill a pane for the room that it now has; it may get it after all else was drawn."""
        pane = message.pane
        if pane.id == "findings" and self.finding_height != pane.item_height:
            self.draw_findings()
        elif pane.id in ("detail", "source") and not self.details.fits(pane):
            self.details.want()

    def _display(self, screen: Screen[object], renderable: RenderableType | None) -> None:
        """Write to the terminal only the cells that changed."""
        if not isinstance(renderable, LayoutUpdate | ChopsUpdate):
            super()._display(screen, renderable)
            return
        size = screen._compositor.size
        if (self.painted.width, self.painted.height) != size:
            self.painted = Painted(*size)
        super()._display(screen, cast("RenderableType", Changes(renderable, self.painted)))

    def action_paint_anew(self) -> None:
        """Write every cell again: what the terminal shows may be another program's."""
        self.painted = Painted(0, 0)
        self.screen.refresh()

    async def on_event(self, event: events.Event) -> None:
        """Note that the user took over, or that the terminal has another size."""
        if isinstance(event, events.Resize):
            self.painted = Painted(0, 0)
        if isinstance(event, events.Key | events.MouseDown | events.MouseScrollDown):
            self.touched = True
            self.turns.asked()
        stood = list(self._notifications) if isinstance(event, events.Key) else []
        await super().on_event(event)
        if stood:
            self.call_later(self.untell_old, stood)

    def in_thread(self, name: str, task: Callable[[], None]) -> Worker[None]:
        """Run something beside the screen; what of that name ran before is given up."""
        return self.run_worker(task, thread=True, exclusive=True, group=name)

    def from_thread(self, callback: Callable[..., object], *args: object) -> None:
        """Have the screen do something soon, if it is still there; a thread never waits for it.

        `call_from_thread` waits: at the end of the program for ever.
        """
        self.call_later(self._if_open, callback, *args)

    def _if_open(self, callback: Callable[..., object], *args: object) -> None:
        if self.drawable:
            callback(*args)

    @property
    def drawable(self) -> bool:
        """Whether the screen is there: a timer may still fire while it is being taken down."""
        stack = self.screen_stack
        return bool(stack) and stack[0].is_running and bool(stack[0].query(Headline))

    # ---- the place in the run, as views ask for it

    @property
    def log_(self) -> Run:
        """The rank that is shown."""
        return self.stand.log

    @property
    def modules(self) -> dict[str, Module]:
        """The modules of the rank that is shown, by path."""
        return self.stand.modules

    @property
    def number(self) -> int:
        """The step that is shown."""
        return self.stand.number

    @property
    def rows(self) -> StepRows:
        """The rows of the step."""
        return self.stand.rows

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        return self.stand.row

    @property
    def found(self) -> list[Finding]:
        """The findings of all ranks."""
        return self.stand.found

    @property
    def marks(self) -> dict[int, Severity]:
        """The worst that was found in each step of the rank that is shown."""
        return self.stand.marks

    @property
    def shown(self) -> str:
        """The name of the view that is shown."""
        return self.stand.shown

    def go_to_finding(self, finding: Finding) -> None:
        """Show the step of a finding with the cursor on its row, and on its line of the list."""
        self.stand.go_to_finding(finding)
        if finding in self.found:
            self.pane("findings").place(self.found.index(finding))

    def return_to(self, stop: Stop) -> None:
        """Show a place as it was left, in the view it was left in."""
        self.stand.return_to(stop)
        self.show_view(stop.view)

    def forget(self) -> None:
        """Drop what was read of the steps: they are those of another log now."""
        self.step_lines.forget()

    # ---- drawing

    def show_place(self, cursor: int) -> None:
        """Show the step that one came to, with the cursor on a line of the table."""
        rows = self.rows
        summary = rows.step.summary
        if summary is not None:
            self.step_lines.keep(summary)
        self.draw_calls(cursor)
        if rows.folds is None:
            self.in_thread("folds", lambda: self.read_folds(rows))
        self.draw_top()
        self.details.want()

    def read_folds(self, rows: StepRows) -> None:
        """Read what is inside what in a large step; runs in a thread."""
        folds = rows.read_folds()
        self.from_thread(self.take_folds, rows, folds)

    def take_folds(self, rows: StepRows, folds: Folds) -> None:
        """Hide the ops inside calls; the row under the cursor stays."""
        slot = rows.slot(self.stand.cursor())
        rows.fold(folds)
        if rows is self.rows:
            self.draw_calls(rows.reveal(slot))
            self.details.want()

    def redraw(self) -> None:
        """Draw everything around the table again, at the same place."""
        self.draw_findings()
        self.draw_top()
        self.details.want()

    def draw_calls(self, cursor: int) -> None:
        """Hand the table its rows; it draws only those that are visible."""
        table, held, modules = self.pane("calls"), self.rows, self.modules

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            if at < 0:
                return head_line(width, self.glyphs, self.columns)
            return row_line(
                held, at, modules, width, here=here, first=at == table.topmost, glyphs=self.glyphs,
                chosen=self.columns, trends=self.trends.grid,
            )  # fmt: skip

        summary = held.step.summary
        told = NOT_KEPT[held.step.kept]
        if summary is None:
            lost = self.log_.lost_from
            is_lost = lost is not None and self.number >= lost
            told = ", no step line (max_bytes)" if is_lost else ", still open"
        table.set_title(f"Step {self.number}{told}" if len(held) else "No step yet")
        table.show(len(held), draw, cursor)

    def draw_findings(self) -> None:
        """Hand the findings pane what is known so far."""
        pane, held, modules = self.pane("findings"), self.found, self.modules

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            return findings.finding_line(
                held[at], part, modules, width, here=here, glyphs=self.glyphs,
                height=pane.item_height,
            )  # fmt: skip

        self.title_findings()
        pane.item_height = self.finding_height
        pane.show(len(held), draw, pane.cursor or 0)

    @property
    def finding_height(self) -> int:
        """How many lines each finding has room for."""
        size = self.pane("findings").size
        return findings.lines_each(self.found, size.width, size.height)

    def title_findings(self) -> None:
        """Say how many findings there are, and how much of the log was read for them."""
        reading = "" if self.log_.indexed >= 1 else f", {self.log_.indexed:.0%} read"
        told = f"Findings {len(self.found)}" if self.found else "No findings"
        self.pane("findings").set_title(told + reading)

    @property
    def state(self) -> tuple[str, str]:
        """How the run stands, or what is being done, in words and their style."""
        if self.progress:
            return self.progress, "bar-live"
        share = self.log_.unpacked
        if share < 1:
            return (f"unpacked {share:.0%}" if share else "reading"), "bar-live"
        return state_of(self.log_, following=self.stand.following)

    def draw_top(self) -> None:
        """Draw the first line and the timeline."""
        first, last = self.log_.first_step(), self.log_.last_step()
        summary = self.step_lines.held.get(self.number)
        self.state_told = self.state
        line = headline(
            program=program_of(self.log_),
            rank=(self.log_.header.rank, self.log_.header.world_size),
            step=(self.number, last),
            loss=number_text(summary.loss if summary else None),
            findings=findings.count_by_severity(self.stand.found_here),
            elsewhere=len(self.found) - len(self.stand.found_here),
            state=self.state_told,
            width=self.size.width,
        )
        self.screen_stack[0].query_one(Headline).show(line)
        shown = window(self.number, first, last, max(1, self.size.width - 2))
        timeline = self.screen_stack[0].query_one(Timeline)
        timeline.show(
            self.step_lines.held, self.marks, self.number, shown, self.size.width,
            rank=self.stand.rank_told,
        )  # fmt: skip
        self.step_lines.want(shown)
        self.trends.want()

    def draw_trends(self) -> None:
        """Draw the trends of the rows, if the table has room for them."""
        if columns(self.pane("calls").size.width, self.columns)["trend"]:
            self.draw_calls(self.stand.cursor())

    def tell(self, text: str, severity: str = "information") -> None:
        """Show a short message that may hold text of the log; few stand at once."""
        kind = "warning" if severity == "warning" else "information"
        self.notify(escape(text), severity=kind, markup=False, timeout=TOLD_S)  # type: ignore[arg-type]
        self.call_later(self.thin_out)

    def thin_out(self) -> None:
        """Leave the last messages only, each once."""
        last = {told.message: told for told in self._notifications}
        kept = list(last.values())[-MOST_TOLD:]
        for old in [told for told in self._notifications if told not in kept]:
            del self._notifications[old]
        self._refresh_notifications()

    def untell_old(self, stood: list[Notification]) -> None:
        """Take away what was told before a key: what it did is another matter."""
        known = {told.identity for told in stood if not told.message.startswith(UNDER_WAY)}
        for old in [told for told in self._notifications if told.identity in known]:
            del self._notifications[old]
        self._refresh_notifications()

    def untell(self, start: str = "") -> None:
        """Take away the messages that begin with a text."""
        for old in [n for n in self._notifications if n.message.startswith(start)]:
            del self._notifications[old]
        self._refresh_notifications()

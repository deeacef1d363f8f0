"""Switching between the views; the place in the run stays the same in all of them."""

from __future__ import annotations

from functools import partial

from textual.timer import Timer
from textual.widgets import Input

from tensortrace.tui.bindings import in_view
from tensortrace.tui.dialogs.toggle import Toggle
from tensortrace.tui.panes import Pane
from tensortrace.tui.stand import Stop
from tensortrace.tui.step.calls import MEANINGS, columns
from tensortrace.tui.tabs import Tabs
from tensortrace.tui.terminal.quick import keep_what_is_there
from tensortrace.tui.views import NAMES, kind_of
from tensortrace.tui.walk import Walker

# Views are made ahead this far apart.
AHEAD_S = 0.25


class Switcher(Walker):
    """The part of the viewer that knows which view is shown."""

    ahead: Timer

    def show_view(self, name: str) -> None:
        """Show a view and give it the focus; a view is made when it is first asked for."""
        if name == self.shown or name not in NAMES:
            return
        main, left = self.screen_stack[0], self.view
        self.make(name)
        self.stand.shown = name
        if left is not None:
            left.leave()
        self.arrange()
        if not isinstance(self.focused, Input):
            # At once: a pane that is hidden with the focus takes it from whoever has it then.
            main.set_focus(self.main_pane if self.view is None or self.view.ready else None)
        main.query_one(Tabs).show(name)
        self.call_after_refresh(self.focus_view)

    def make(self, name: str) -> None:
        """Make a view, unless it is there."""
        main = self.screen_stack[0]
        if name != "step" and not main.query(f"#view-{name}"):
            main.mount(kind_of(name)(), after="#main")

    def start_reading(self) -> None:
        """Make the views ahead, once the log is read."""
        super().start_reading()
        self.ahead = self.set_interval(AHEAD_S, self.make_ahead)

    def make_ahead(self) -> None:
        """Make a view that was not asked for yet while nothing happens: its key is quick then."""
        if not self.drawable or self.stand.ranks.indexed < 1 or not self.turns.still:
            return
        main = self.screen_stack[0]
        name = next((name for name in NAMES[1:] if not main.query(f"#view-{name}")), None)
        if name is None:
            self.ahead.stop()
            keep_what_is_there()
        else:
            load = partial(self.load_ahead, name)
            self.in_thread("ahead", load)

    def load_ahead(self, name: str) -> None:
        """Load the module of a view, then have it made; runs in a thread."""
        kind_of(name)
        self.from_thread(self.make, name)

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

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave out the keys that do nothing in the view that is shown."""
        return in_view(action, self.shown)

    def action_view(self, name: str) -> None:
        """Show a view by its key."""
        self.look_at(name)

    def look_at(self, name: str) -> None:
        """Show a view of the place; one key leads back to the first that one looked at it from."""
        if name != self.shown:
            self.stand.remember_once()
        self.show_view(name)

    def chart(self, statistic: object) -> None:
        """Draw a statistic over the steps in the timeline."""
        from tensortrace.tui.views.timeline import TimelineView

        self.stand.remember()
        self.show_view("timeline")
        view = self.screen_stack[0].query_one("#view-timeline", TimelineView)
        view.take(statistic)

    def on_tabs_picked(self, message: Tabs.Picked) -> None:
        """Show the view that was clicked."""
        self.look_at(message.name)

    def return_to(self, stop: Stop) -> None:
        """Show a place as it was left, in the view it was left in."""
        super().return_to(stop)
        self.show_view(stop.view)

    def take_findings(self) -> None:
        """Show what was found in the view too."""
        super().take_findings()
        if self.view is not None:
            self.want_detail()

    def grow(self) -> None:
        """Show what came in the view too."""
        super().grow()
        if self.view is not None:
            self.want_detail()

    # ---- the table of the step

    def action_columns(self) -> None:
        """Choose the columns of the table."""
        width = self.pane("calls").size.width
        shown = self.columns
        if shown is None:
            shown = frozenset(columns(width).widths)

        def done(answer: tuple[frozenset[str] | None] | None) -> None:
            if answer is not None:
                self.columns = answer[0]
                self.draw_calls(self.stand.cursor())
                held = columns(self.pane("calls").size.width, self.columns).widths
                missing = [name for name in MEANINGS if name in (answer[0] or held)]
                missing = [name for name in missing if name not in held]
                if missing:
                    self.tell(f"no room here for {', '.join(missing)}")

        self.push_screen(Toggle(list(MEANINGS.items()), shown, self.glyphs), done)

"""Switching between the views; the place in the run stays the same in all of them."""

from __future__ import annotations

from tensortrace.tui.bindings import in_view
from tensortrace.tui.panes import Pane
from tensortrace.tui.tabs import Tabs
from tensortrace.tui.views import VIEWS
from tensortrace.tui.walk import Stop, Walker


class Switcher(Walker):
    """The part of the viewer that knows which view is shown."""

    def show_view(self, name: str) -> None:
        """Show a view and give it the focus; a view is made when it is first asked for."""
        kinds = {kind.NAME: kind for kind in VIEWS}
        if name == self.shown or not (name == "step" or name in kinds):
            return
        main, left = self.screen_stack[0], self.view
        if name != "step" and not main.query(f"#view-{name}"):
            main.mount(kinds[name](), after="#main")
        self.shown = name
        if left is not None:
            left.leave()
        self.arrange()
        main.query_one(Tabs).show(name)
        self.call_after_refresh(self.focus_view)

    def focus_view(self) -> None:
        """Draw the view that is shown now and give its main pane the focus."""
        view = self.view
        self.draw_top()
        if view is not None:
            view.draw()
        else:
            self.redraw()
        self.main_pane.focus()
        self.refresh_bindings()

    @property
    def main_pane(self) -> Pane:
        """The pane that has the focus unless another one was chosen."""
        view = self.view
        return self.pane(self.zoom or "calls") if view is None else view.main

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave out the keys that do nothing in the view that is shown."""
        return in_view(action, self.shown)

    def action_view(self, name: str) -> None:
        """Show a view by its key."""
        self.show_view(name)

    def on_tabs_picked(self, message: Tabs.Picked) -> None:
        """Show the view that was clicked."""
        self.show_view(message.name)

    def return_to(self, stop: Stop) -> None:
        """Show a place as it was left, in the view it was left in."""
        super().return_to(stop)
        self.show_view(stop.view)

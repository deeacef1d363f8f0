"""Making the views before they are asked for: the key of one is quick then."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from textual.timer import Timer

from tensortrace.tui.terminal.quick import keep_what_is_there
from tensortrace.tui.views import NAMES, kind_of

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame

# Views are made this far apart.
AHEAD_S = 0.25


class Ahead:
    """Makes one view after the other while nothing happens, once the log is read."""

    timer: Timer

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def begin(self) -> None:
        """Look from time to time whether there is time for one."""
        self.timer = self.frame.set_interval(AHEAD_S, self.make)

    def make(self) -> None:
        """Make a view that was not asked for yet, if nothing happens."""
        frame = self.frame
        if not frame.drawable or frame.stand.ranks.indexed < 1 or not frame.turns.still:
            return
        main = frame.screen_stack[0]
        name = next((name for name in NAMES[1:] if not main.query(f"#view-{name}")), None)
        if name is None:
            self.timer.stop()
            keep_what_is_there()
        else:
            frame.in_thread("ahead", partial(self.load, name))

    def load(self, name: str) -> None:
        """Load the module of a view, then have it made; runs in a thread."""
        kind_of(name)
        self.frame.from_thread(self.frame.make_view, name)

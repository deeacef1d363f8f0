"""What a view is: one way to look at the run, in place of the table of the step.

A view is a container of panes. It is told to `draw` when it opens, when the place in the run
changes, when the log has grown and when the screen has another size; it asks the viewer for the
place (`number`, `row`, `found`, `modules`, `log_`), and goes to another by its `stand`. Its own
keys stand in `bindings.KEYS` with its name, as methods `action_...` here. Whatever takes long is
read in a thread by `work`.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, ClassVar, cast

from textual.containers import Container

from tensortrace.tui.panes import Pane
from tensortrace.tui.terminal.strips import Ground

if TYPE_CHECKING:
    from tensortrace.tui.app import Viewer

# A screen that is being taken down draws no more.
DRAWN_S = 0.2


class View(Container, Ground):
    """One way to look at the run. `NAME` is that of its tab and of its keys.

    Attributes:
        STRIP: whether the strip of steps stays above it.
    """

    NAME: ClassVar[str]
    STRIP: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(id=f"view-{self.NAME}", classes="view")
        self.display = False

    @property
    def viewer(self) -> Viewer:
        """The program, with the place in the run."""
        return cast("Viewer", self.app)

    @property
    def main(self) -> Pane:
        """The pane that gets the focus."""
        return self.query(Pane).first()

    @property
    def ready(self) -> bool:
        """Whether its panes are there: on a busy machine they are made some turns after it."""
        return bool(self.query(Pane))

    def draw(self) -> None:
        """Show what belongs to the place in the run; called often, so it costs little."""

    def give_up(self) -> bool:
        """Stop what takes long, so that esc does that before it leaves; False if nothing does."""
        return False

    def leave(self) -> None:
        """Another view is shown now."""

    def open(self, pane: Pane, at: int) -> None:
        """Enter, or a click on the item that the cursor is on."""

    def moved(self, pane: Pane, at: int) -> None:
        """The cursor of a pane is on another item."""

    def clicked(self, pane: Pane, at: int, x: int) -> None:
        """A click on an item, `x` cells from the left; the cursor goes there too."""

    def copied(self) -> tuple[str, str] | None:
        """What `y` copies, and in a word or two what that is; None for the record of the row."""
        return None

    def work(self, task: Callable[[], None]) -> None:
        """Run something in a thread; what the view had running before is given up.

        It begins when what is drawn by now stands on the screen: two that use the interpreter at
        once take as long as one after the other, and the screen would be the second.
        """
        drawn = Event()
        self.call_after_refresh(drawn.set)

        def begin() -> None:
            drawn.wait(DRAWN_S)
            task()

        self.viewer.run_worker(begin, thread=True, exclusive=True, group=f"view-{self.NAME}")

    def on_resize(self) -> None:
        """Draw for the new size."""
        if self.display and self.ready:
            self.draw()

    def on_pane_moved(self, message: Pane.Moved) -> None:
        """Keep it here: the panes of a view are its own."""
        message.stop()
        self.moved(message.pane, message.at)

    def on_pane_opened(self, message: Pane.Opened) -> None:
        """Keep it here: the panes of a view are its own."""
        message.stop()
        self.open(message.pane, message.at)

    def on_pane_clicked(self, message: Pane.Clicked) -> None:
        """Keep it here: the panes of a view are its own."""
        message.stop()
        self.clicked(message.pane, message.at, message.x)

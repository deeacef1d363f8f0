"""A short list over the lower part of the screen: walk it with j and k, the table goes along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen

from tensortrace.tui.dialogs.over import Over
from tensortrace.tui.panes import Pane
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled

MOST_LINES = 12


class Pick(ModalScreen[int | None], Over[int | None]):
    """Choose one of some lines: Enter gives its number, Esc None.

    Args:
        title: what the lines are; escaped like any text of the log.
        lines: their pieces, escaped.
        at: where the cursor begins.
    Attributes:
        past: whether the key that walks on was pressed on the last line, which closes the list.
    """

    class Walked(Message):
        """The cursor is on another line."""

        def __init__(self, at: int) -> None:
            super().__init__()
            self.at = at

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j,down", "walk(1)", "Down", show=False),
        Binding("k,up", "walk(-1)", "Up", show=False),
        Binding("g,home", "end(False)", "First", show=False),
        Binding("G,end", "end(True)", "Last", show=False),
        Binding("c", "onward", "Next", show=False),
        Binding("enter,l,right", "take", "Go there", show=False),
        Binding("escape,q,h,left,backspace", "dismiss", "Back", show=False),
    ]

    def __init__(
        self, title: str, lines: Sequence[Styled], at: int = 0, glyphs: Glyphs = UNICODE
    ) -> None:
        super().__init__()
        self.past = False
        self.title_, self.lines, self.at, self.glyphs = title, lines, at, glyphs

    def compose(self) -> ComposeResult:
        """One pane, as high as it has lines."""
        pane = Pane("pick", "")
        pane.set_title(self.title_)
        pane.styles.height = min(len(self.lines), MOST_LINES) + 2
        yield pane

    @property
    def pane(self) -> Pane:
        """The list."""
        return self.query_one("#pick", Pane)

    def on_mount(self) -> None:
        """Show the lines."""

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            return [((self.glyphs.cursor if here else " ") + " ", ""), *self.lines[at]]

        self.pane.show(len(self.lines), draw, self.at)
        self.pane.focus()

    def action_walk(self, lines: int) -> None:
        """Move the cursor."""
        self.pane.move_by(lines)

    def action_onward(self) -> None:
        """Go to the next line; after the last one back."""
        if (self.pane.cursor or 0) + 1 < len(self.lines):
            self.pane.move_by(1)
        else:
            self.past = True
            self.dismiss(None)

    def action_end(self, last: bool) -> None:
        """Go to the first or the last line."""
        self.pane.move_end(last)

    def action_take(self) -> None:
        """Choose the line under the cursor."""
        self.dismiss(self.pane.cursor)

    def on_pane_moved(self, message: Pane.Moved) -> None:
        """Tell the screen below."""
        message.stop()
        self.app.post_message(self.Walked(message.at))

    def on_pane_opened(self, message: Pane.Opened) -> None:
        """A click on the selected line chooses it."""
        message.stop()
        self.dismiss(message.at)

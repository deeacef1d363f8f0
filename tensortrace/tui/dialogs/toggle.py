"""A short list of which each line is on or off: which columns the table has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from tensortrace.tui.dialogs.over import Over
from tensortrace.tui.panes import Pane
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled

Answer = tuple[frozenset[str] | None]


class Toggle(ModalScreen[Answer | None], Over[Answer | None]):
    """Switch names on and off: Enter gives those that are on, Esc changes nothing.

    The answer is in a tuple, as it may itself be None: what fits, by the width of the screen.

    Args:
        names: every name, and what it means.
        on: those that are on.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j,down", "walk(1)", "Down", show=False),
        Binding("k,up", "walk(-1)", "Up", show=False),
        Binding("space,l,right", "switch", "On or off", show=False),
        Binding("a", "automatic", "What fits", show=False),
        Binding("enter", "take", "Take", show=False),
        Binding("escape,q,h,left,backspace", "dismiss", "Back", show=False),
    ]

    def __init__(
        self, names: Sequence[tuple[str, str]], on: frozenset[str], glyphs: Glyphs = UNICODE
    ) -> None:
        super().__init__()
        self.names, self.on, self.glyphs = names, on, glyphs

    def compose(self) -> ComposeResult:
        """One pane, as high as it has lines."""
        pane = Pane("toggle", "Columns: space on or off, enter takes, a what fits, esc back")
        pane.styles.height = len(self.names) + 2
        yield pane

    @property
    def pane(self) -> Pane:
        """The list."""
        return self.query_one("#toggle", Pane)

    def on_mount(self) -> None:
        """Show the lines."""
        self.draw(0)
        self.pane.focus()

    def draw(self, at: int) -> None:
        """Show the lines, each with its sign."""

        def draw(at: int, part: int, width: int, here: bool) -> Styled:
            name, meaning = self.names[at]
            sign = "[x]" if name in self.on else "[ ]"
            return [((self.glyphs.cursor if here else " ") + " ", ""),
                    (f"{sign} ", "ok" if name in self.on else "faint"),
                    (f"{name:<8}", "strong"), (meaning, "faint")]  # fmt: skip

        self.pane.show(len(self.names), draw, at)

    def action_walk(self, lines: int) -> None:
        """Move the cursor."""
        self.pane.move_by(lines)

    def action_switch(self) -> None:
        """Switch the name under the cursor."""
        at = self.pane.cursor or 0
        self.on ^= {self.names[at][0]}
        self.draw(at)

    def on_pane_opened(self, message: Pane.Opened) -> None:
        """A click on the selected line switches it."""
        message.stop()
        self.action_switch()

    def action_automatic(self) -> None:
        """Leave the choice to the width."""
        self.dismiss((None,))

    def action_take(self) -> None:
        """Take what is on."""
        self.dismiss((self.on,))
